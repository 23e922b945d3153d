"""A network that leads nowhere and sees everything: what tries to leave is written down.

Inside a network namespace a default route leads to a tunnel whose other end is this program, and
names are asked of a server behind it; so an attempt is a packet here, whoever makes it, in whatever
language.

Usage: python outside.py INTERFACE FILE
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
from pathlib import Path

import pytest
from confined import q

INTERFACE = "outside"
#: Addresses of documentation (RFC 5737, RFC 3849): nobody has them.
OURS, GATEWAY, NAMES = "192.0.2.2", "192.0.2.1", "192.0.2.53"
OURS6, GATEWAY6 = "2001:db8::2", "2001:db8::1"
PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP"}
ICMPV6, HOP_BY_HOP = 58, 0
#: From linux/if_tun.h.
TUN, TUNSETIFF, IFF_TUN, IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0001, 0x1000


def trap(folder: Path, packets: Path) -> str:
    """Lines of a script with network and mounts of its own that set the trap.

    Args:
        folder: for what the script needs.
        packets: file that gets one JSON line for each packet.
    """
    resolv = folder / "resolv.conf"
    resolv.write_text(f"nameserver {NAMES}\noptions timeout:1 attempts:1\n")
    return f"""
ip link set lo up
{q(sys.executable)} {q(__file__)} {INTERFACE} {q(packets)} >/dev/null 2>&1 &
ends=$!
trap 'kill $(echo $ends | tr , " ")' EXIT
while [ ! -e {q(packets)} ]; do kill -0 $ends; sleep 0.05; done
ip link set {INTERFACE} up
ip addr add {OURS}/24 dev {INTERFACE}
ip route add default via {GATEWAY}
if [ -d /proc/sys/net/ipv6 ]; then
  ip -6 addr add {OURS6}/64 dev {INTERFACE} nodad
  ip -6 route add default via {GATEWAY6} dev {INTERFACE}
fi
mount --bind {q(resolv)} "$(readlink -f /etc/resolv.conf)"
"""


def require_tunnel() -> None:
    try:
        os.close(os.open(TUN, os.O_RDWR))
    except OSError as error:
        pytest.skip(f"this machine has no tunnel device: {error}")


def seen(packets: Path) -> list[str]:
    """Where packets went, in the order in which each destination came up first."""
    lines = [json.loads(line) for line in packets.read_text().splitlines()]
    return list(dict.fromkeys(f"{p['protocol']} {p['to']} {p['said']}".strip() for p in lines))


def capture(interface: str, file: Path) -> None:
    tunnel = os.open(TUN, os.O_RDWR)
    request = struct.pack("16sH", interface.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(tunnel, TUNSETIFF, request)
    with file.open("w") as out:
        while True:
            packet = describe(os.read(tunnel, 65536))
            if packet is not None:
                print(json.dumps(packet), file=out, flush=True)


def describe(body: bytes) -> dict[str, str] | None:
    """Destination of a packet; None for what the kernel says of itself (neighbours, groups)."""
    if body[0] >> 4 == 4:
        protocol, rest = body[9], body[(body[0] & 15) * 4 :]
        address = socket.inet_ntop(socket.AF_INET, body[16:20])
    else:
        protocol, rest = body[6], body[40:]
        address = socket.inet_ntop(socket.AF_INET6, body[24:40])
        if protocol in (ICMPV6, HOP_BY_HOP):
            return None
    port = int.from_bytes(rest[2:4], "big") if protocol in (6, 17) else 0
    said = _name(rest[8:]) if (protocol, port) == (17, 53) else ""
    return {
        "protocol": PROTOCOLS.get(protocol, str(protocol)),
        "to": f"{address}:{port}" if port else address,
        "said": said,
    }


def _name(question: bytes) -> str:
    """The name that a DNS query asks for."""
    labels, at = [], 12
    while at < len(question) and (length := question[at]):
        labels.append(question[at + 1 : at + 1 + length].decode(errors="replace"))
        at += 1 + length
    return ".".join(labels)


if __name__ == "__main__":
    capture(sys.argv[1], Path(sys.argv[2]))
