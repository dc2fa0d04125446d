"""This machine's address and network interface on the way to another machine, and its connections to others."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Any

import psutil

_SILENT_SECONDS = 60
"""Time that another machine may be silent. One that loses its power, or its cable, closes no connection."""


def local_address_towards(kind: int, target: Any) -> str:
    """Return the address from which this machine reaches another one.

    ``target`` is an address of the family ``kind``, as ``socket.AF_INET``, with a port.

    Raises:
        OSError: it cannot be reached.
    """
    with socket.socket(kind, socket.SOCK_DGRAM) as way:
        way.connect(target)  # sends nothing
        return str(way.getsockname()[0])


def use_interface(address: str) -> None:
    """Let gloo, which else takes that of the machine's name, use the interface with an address, unless one is set."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def use_interface_to(host: str) -> None:
    """Let gloo use the interface that leads to another machine, if it is known which; a name may lead to this one."""
    with suppress(OSError):
        kind, *_, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        address = local_address_towards(kind, target)
        if address != "::1" and not address.startswith("127."):
            use_interface(address)


def on_several_machines() -> bool:
    """Return whether a launcher has started this process as one of several that run on several machines."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return count > int(os.environ.get("LOCAL_WORLD_SIZE", count))


def notice_lost_machines(*, unanswered: bool) -> None:
    """Let the connections that this process has now fail when the other machine has been silent for a minute (Linux).

    With ``unanswered``, what was sent must be taken there within that time, too. NCCL may send what waits.
    """
    if sys.platform != "linux":
        return
    options = {
        socket.TCP_KEEPIDLE: _SILENT_SECONDS // 2,
        socket.TCP_KEEPINTVL: _SILENT_SECONDS // 6,
        socket.TCP_KEEPCNT: 3,
        **({socket.TCP_USER_TIMEOUT: 1000 * _SILENT_SECONDS} if unanswered else {}),
    }
    with suppress(OSError, psutil.Error):  # they cannot be listed
        for each in psutil.Process().net_connections("tcp"):
            if each.raddr and each.raddr.ip != each.laddr.ip:
                with suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as connection:  # closed meanwhile
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for name, value in options.items():
                        connection.setsockopt(socket.IPPROTO_TCP, name, value)
