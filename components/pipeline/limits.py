"""What the system allows this program: open files, memory and processor of a container, folders.

A container or a batch system gives less than the machine has, and programs that count the machine's
cores and memory do not notice.
"""

from __future__ import annotations

import locale
import os
import resource
import sys
from pathlib import Path

from components.pipeline.addresses import GIB, gib
from components.pipeline.finding import Finding
from components.pipeline.machine import cores, cpu_model, memory_bytes
from components.pipeline.servers import free_port

#: Two workers do with 256; a Ray process opens a few for each of its peers.
FILES_WANTED = 1024
MEMORY_WANTED = 4 * GIB
CGROUPS = Path("/sys/fs/cgroup")


def processor(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Finding:
    """Cores of the machine, and how many of them a container may use."""
    text = f"{cores()} ({cpu_model()})"
    quota = _cpu_quota(cgroups, own)
    if quota is None or quota >= cores():
        return Finding("cores", text)
    return Finding(
        "cores",
        f"{text}, of which this container may use {quota:g}",
        "give it more (docker run --cpus), or one worker: --set train_recommender.workers=1",
    )


def memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Finding:
    """Memory of the machine, or of the container if that is less."""
    total = memory_bytes()
    limit = _number(_group_files(cgroups, own, "memory", "memory.max", "memory.limit_in_bytes"))
    text = gib(total)
    if limit is not None and limit < total:
        text, total = f"{gib(limit)} for this container, of {gib(total)}", int(limit)
    if total < MEMORY_WANTED:
        remedy = "close other programs or take a smaller size: --profile laptop"
        return Finding("memory", f"{text}, the default size wants {gib(MEMORY_WANTED)}", remedy)
    return Finding("memory", text)


def _cpu_quota(cgroups: Path, own: Path) -> float | None:
    """Cores that the control group gives; None for all."""
    for file in _group_files(cgroups, own, "cpu", "cpu.max"):
        quota, _, period = file.read_text().strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    quota_us = _number(_group_files(cgroups, own, "cpu", "cpu.cfs_quota_us"))
    period_us = _number(_group_files(cgroups, own, "cpu", "cpu.cfs_period_us"))
    return quota_us / period_us if quota_us and period_us else None


def _group_files(cgroups: Path, own: Path, controller: str, *names: str) -> list[Path]:
    """The files of that name of our group and of those above it, of both versions of cgroups."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        roots = [cgroups / controllers] if controllers else [cgroups, cgroups / "unified"]
        for root in roots:
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                found += [folder / name for name in names if (folder / name).is_file()]
                if folder == root:
                    break
    return found


def _number(files: list[Path]) -> float | None:
    """The least of the numbers in ``files``; None if there is none."""
    texts = [file.read_text().strip() for file in files]
    return min((float(text) for text in texts if text.isdigit()), default=None)


def open_files() -> Finding:
    """How many files a process may hold open; Ray and the servers raise the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
    text = f"{soft} a process, at most {most}"
    if hard != resource.RLIM_INFINITY and hard < FILES_WANTED:
        return Finding("open files", text, f"ulimit -n {FILES_WANTED * 4}, as root if need be")
    return Finding("open files", text)


def home_folder() -> Finding:
    """HOME, where libraries keep settings; the platform itself writes nothing there."""
    home = os.environ.get("HOME")
    if home is None:
        return Finding("user folder", "HOME is not set; nothing here needs it")
    if not Path(home).is_dir():
        return Finding("user folder", f"HOME={home} is not there; nothing here needs it")
    return Finding("user folder", f"HOME={home}")


def encoding() -> Finding:
    """How names of files and texts are written."""
    names = sys.getfilesystemencoding()
    text = f"{names}, locale {locale.setlocale(locale.LC_CTYPE)}"
    if names.lower() != "utf-8":
        return Finding("encoding", text, "export LC_ALL=C.UTF-8, or PYTHONUTF8=1")
    if os.environ.get("PYTHONUTF8") == "1":
        text += " (PYTHONUTF8=1)"
    return Finding("encoding", text)


def ports(wanted: dict[str, int]) -> Finding:
    """The ports that ``reelflow ui`` takes first."""
    taken = [f"{port} ({name})" for name, port in wanted.items() if free_port(port) != port]
    if taken:
        return Finding("ports", f"in use: {', '.join(taken)}; `reelflow ui` takes others")
    return Finding("ports", f"{', '.join(map(str, wanted.values()))} are free for `reelflow ui`")
