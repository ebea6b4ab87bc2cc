"""What this process may use of the machine it runs on."""

import os

__all__ = ["processors"]


def processors() -> int:
    """Processors this process may run on, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
