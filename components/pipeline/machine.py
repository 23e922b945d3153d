"""What this machine is: processor, cores, memory, devices, as the system tells it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

DRIVER_ANSWERS_WITHIN_S = 2.0


def cpu_model() -> str:
    """Name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine, or of the container if that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            return min(total, int(text))
    return total


def gpus() -> list[str]:
    """Name (and memory, if the driver answers quickly) of every NVIDIA device."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(
                query, capture_output=True, text=True, timeout=DRIVER_ANSWERS_WITHIN_S, check=True
            )
            return asked.stdout.strip().splitlines()
    # A driver without persistence takes seconds to answer; the kernel knows the names at once.
    found = (file.read_text() for file in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = (re.search(r"^Model:\s*(.+)$", text, re.MULTILINE) for text in found)
    return [name[1].strip() for name in names if name]


def visible_gpus() -> int:
    """How many NVIDIA devices programs started from here may use."""
    found = len(gpus())
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or shown is None:
        return found
    # Names may be of slices (MIG), of which a device has several: the list is what counts.
    return len([name for name in shown.split(",") if name.strip() not in ("", "-1")])
