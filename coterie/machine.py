"""What of the machine this process may use, and what it runs on."""

import os
from importlib.metadata import PackageNotFoundError, version

__all__ = ["processors", "versions"]


def processors() -> int:
    """Processors this process may run on, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by name; "source" for what runs from its source tree without being installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found
