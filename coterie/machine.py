"""What of the machine this process may use, and what it runs on."""

import math
import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

__all__ = ["cpu_quota", "processors", "versions"]


def processors() -> int:
    """Processors this process can keep busy, which in a container are fewer than the machine's; 1 at least.

    Part of a processor counts as one: two threads on a quota of 1.5 are held back a quarter of the time.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if math.isinf(quota) else min(allowed, max(1, math.ceil(quota)))


@cache
def cpu_quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that Linux's control groups grant this process; infinite where nothing limits it.

    The lowest limit holds of the process's own group and of all groups above it, as far as they can be seen: `cpu.max`
    in version 2, `cpu.cfs_quota_us` by `cpu.cfs_period_us` in version 1. Read once, for sessions keep the threads they
    began with.

    Args:
        root: of the file system, below which proc/ and sys/ are found.
    """
    return min(_limits(root), default=math.inf)


def _limits(root: Path) -> Iterator[float]:
    try:
        groups = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container often sees its own group mounted as the root, under which the path it is told is missing.
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            if ".." in folder.parts:  # a group outside the namespace
                continue
            place = root / "sys/fs/cgroup" / ("cpu" if controllers else "") / folder.relative_to("/")
            try:
                yield _limit_v1(place) if controllers else _limit_v2(place)
            except (OSError, ValueError):
                continue


def _limit_v1(group: Path) -> float:
    quota = int((group / "cpu.cfs_quota_us").read_text("ascii"))
    return quota / int((group / "cpu.cfs_period_us").read_text("ascii")) if quota > 0 else math.inf


def _limit_v2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text("ascii").split()
    return int(quota) / int(period) if quota != "max" else math.inf


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by name; "source" for what runs from its source tree without being installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found
