"""How many processors a process may keep busy, by its affinity and by the limits of its container."""

import math
import os
from pathlib import Path

import pytest

from coterie import machine
from coterie.machine import cpu_quota, processors


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with this /proc/self/cgroup and these files below /sys/fs/cgroup."""
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
V2 = "0::/kubepods/pod1/abc\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # Version 2: its own group, a group above, the container's group mounted as the root.
        (V2, {"kubepods/pod1/abc/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"kubepods/pod1/abc/cpu.max": "max 100000\n"}, math.inf),
        (V2, {"kubepods/pod1/abc/cpu.max": "400000 100000\n", "kubepods/cpu.max": "50000 25000\n"}, 2.0),
        (V2, {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3.0),
        ("0::/../../other\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (V2, {}, math.inf),
        # Version 1: the same, and a controller of another name is not the processors'.
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "250000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, math.inf),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "250000\n"}, math.inf),
        ("3:cpuset:/abc\n", {"cpu/abc/cpu.cfs_quota_us": "1000\n", "cpu/abc/cpu.cfs_period_us": "1000\n"}, math.inf),
        # Both at once, where version 2 has no say over processors.
        (
            V1 + "0::/docker/abc\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n", "unified/cpu.max": "1 1\n"},
            2.0,
        ),
        # What cannot be understood limits nothing.
        (V2, {"cpu.max": "a lot\n"}, math.inf),
        (V2, {"cpu.max": ""}, math.inf),
    ],
)
def test_the_lowest_limit_of_the_control_groups_holds(
    tmp_path: Path, groups: str, files: dict[str, str], expected: float
) -> None:
    assert cpu_quota(system(tmp_path, groups, files)) == expected


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 6.0, 2), (1, 0.0, 1)],
)
def test_affinity_and_quota_are_both_obeyed(
    monkeypatch: pytest.MonkeyPatch, allowed: int, quota: float, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert processors() == expected


def test_here_it_is_a_number_of_processors() -> None:
    assert 1 <= processors() <= (os.cpu_count() or 1)
