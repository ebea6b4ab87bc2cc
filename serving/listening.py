"""Where this process listens, read from its own sockets, for the settings of a server are not all that decides it."""

import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["listens_on_loopback"]

DESCRIPTORS = Path("/dev/fd")


def listens_on_loopback() -> bool:
    """Whether this process listens, and at loopback addresses alone; False also where that cannot be told."""
    addresses = list(_listening_addresses())
    return bool(addresses) and all(map(_is_loopback, addresses))


def _listening_addresses() -> Iterator[str]:
    """Addresses of the TCP sockets among this process's descriptors that take connections."""
    try:
        descriptors = [int(entry.name) for entry in DESCRIPTORS.iterdir()]
    except OSError:  # Windows
        return
    for descriptor in descriptors:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as one:
                internet = one.family in (socket.AF_INET, socket.AF_INET6)
                if internet and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield one.getsockname()[0]
        except OSError:  # closed meanwhile, or no socket after all
            continue


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
