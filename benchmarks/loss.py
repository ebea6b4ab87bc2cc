"""SupCon's loss beside the masked textbook form and pytorch-metric-learning's, forward and backward.

    python -m benchmarks.loss [--json FILE] [--runs 7] [--no-curve]

n = 8192, d = 128, float32, forward and backward, two threads, torch 2.15.0, medians of 7 interleaved runs on a quiet
machine with AVX-512 (AMD EPYC; docs/results/loss.json, with the curve):

    ours                      0.25 s    44 MB above the inputs
    textbook                  1.42 s   1,622 MB    5.7 times as long
    pytorch-metric-learning   2.89 s   3,035 MB   11.6 times as long

Values are equal to 5e-8 and gradients to 2e-11. With tiles of 512 instead of 1024, the same machine gave 5.0 and 8.9
times, and another, of Intel's, 5.5 to 7.1 and 10.6 to 12.1 times in four sessions. That is with
OMP_WAIT_POLICY=PASSIVE, which this script and `training` set: with threads that spin, both goals were missed beside
much other work.

Times are taken in one process in which the three take turns; memory and the curve in a process for each cell.
Exits with 1 where a goal of the default sizes is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.losses import SupConLoss

TEMPERATURE = 0.1
CLASSES = 100
LARGEST_SQUARE = 8192  # the others hold several arrays (n, n); at twice this they need 8 to 12 GB
CURVE = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]

Loss = Callable[[Tensor, Tensor], Tensor]


def textbook(z: Tensor, labels: Tensor) -> Tensor:
    """Eq. 2 of arXiv 2004.11362 as it is commonly written: masks and products of arrays (n, n)."""
    z = z / z.norm(dim=1, keepdim=True)
    logits = z @ z.T / TEMPERATURE
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype)
    positives = (labels[:, None] == labels[None]).to(z.dtype) * others
    log_probability = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_probability).sum(1) / positives.sum(1)).mean()


def losses() -> dict[str, Loss]:
    """The three, by the names of the table."""
    from pytorch_metric_learning.losses import SupConLoss as MetricLearningSupConLoss

    return {
        "coterie": SupConLoss(temperature=TEMPERATURE),
        "textbook": textbook,
        "pytorch-metric-learning": MetricLearningSupConLoss(temperature=TEMPERATURE),
    }


def batch(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two views of n/2 images in `CLASSES` classes, each class a direction with noise around it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(min(CLASSES, n // 4), (n // 2,), generator=generator).repeat(2)
    centres = torch.randn(CLASSES, d, generator=generator)
    return (centres[labels] + torch.randn(n, d, generator=generator)).requires_grad_(), labels


def step(loss: Loss, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    value = loss(z, labels)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def seconds(loss: Loss, z: Tensor, labels: Tensor) -> float:
    """Of one forward and backward pass."""
    start = time.perf_counter()
    step(loss, z, labels)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Cell:
    """One loss at one size, measured in a process of its own."""

    loss: str
    n: int
    seconds: float  # of the fastest run: in a process of its own, the others' work can only add to it
    runs: int
    peak_mb: float  # resident memory above what it was with the inputs made; 1 MB = 10^6 bytes


def measure(name: str, n: int, d: int) -> Cell:
    """Runs in the child process: peak memory of the first pass, then times."""
    loss = losses()[name]
    step(loss, *batch(64, d))  # what libraries allocate once is not the loss's
    z, labels = batch(n, d)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    first = seconds(loss, z, labels)
    peak = _resident("VmHWM") - before
    times = [first] + [seconds(loss, z, labels) for _ in range(max(1, min(50, int(5 / first))))]
    return Cell(name, n, min(times), len(times), peak / 1e6)


def measure_in_child(name: str, n: int, d: int, threads: int) -> Cell:
    """A child of its own, for memory that others have freed would hide what this one takes."""
    command = [sys.executable, "-m", "benchmarks.loss", "--measure", name]
    command += ["--threads", str(threads), "--n", str(n), "--d", str(d)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return Cell(**json.loads(output.stdout))


@dataclass(frozen=True)
class Differences:
    """From the textbook form in float64; of gradients also relative to the largest entry."""

    value: float
    gradient: float
    gradient_relative: float


def differences(contenders: dict[str, Loss], z: Tensor, labels: Tensor) -> dict[str, Differences]:
    exact_value, exact_gradient = step(textbook, z.detach().double().requires_grad_(), labels)
    found = {}
    for name, loss in contenders.items():
        value, gradient = step(loss, z, labels)
        error = float((gradient - exact_gradient).abs().max())
        found[name] = Differences(abs(float(value - exact_value)), error, error / float(exact_gradient.abs().max()))
    return found


def interleaved(contenders: dict[str, Loss], z: Tensor, labels: Tensor, runs: int) -> dict[str, list[float]]:
    """Seconds of each pass; the contenders take turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, loss in contenders.items():
            times[name].append(seconds(loss, z, labels))
    return times


def main() -> int:
    """Prints the table, the goals and the curve."""
    options = _options()
    n, d, threads = options.n, options.d, options.threads
    torch.set_num_threads(threads)
    if options.measure:
        print(json.dumps(asdict(measure(options.measure, n, d))))
        return 0
    contenders = losses()
    z, labels = batch(n, d)
    errors = differences(contenders, z, labels)  # warms up, too
    passes = interleaved(contenders, z, labels, options.runs)
    times = {name: statistics.median(values) for name, values in passes.items()}
    memory = {name: measure_in_child(name, n, d, threads).peak_mb for name in contenders}
    print(f"n = {n}, d = {d}, float32, {threads} threads, {_machine()}")
    print(f"forward and backward, median of {options.runs} interleaved runs\n")
    print(f"{'':26}{'seconds':>9}{'ratio':>8}{'peak MB':>9}{'Δ value':>11}{'Δ gradient':>12}{'relative':>10}")
    for name, error in errors.items():
        print(
            f"{name:26}{times[name]:9.3f}{times[name] / times['coterie']:8.1f}{memory[name]:9.0f}"
            f"{error.value:11.1e}{error.gradient:12.1e}{error.gradient_relative:10.1e}"
        )
    goals = _goals(times, memory["coterie"], errors["coterie"])
    print()
    for goal, met in goals.items():
        print(f"{'met' if met else 'MISSED':8}{goal}")
    curve = [] if options.no_curve else _print_curve(list(contenders), d, threads)
    if options.json:
        result = {
            "machine": _machine(),
            "load_average": os.getloadavg(),
            "threads": threads,
            "n": n,
            "d": d,
            "runs": options.runs,
            "seconds": times,
            "peak_mb": memory,
            "differences": {name: asdict(error) for name, error in errors.items()},
            "goals": goals,
            "curve": [asdict(cell) for cell in curve],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(goals.values()) else 1


def _goals(times: dict[str, float], peak_mb: float, error: Differences) -> dict[str, bool]:
    ours, textbook_time, metric_learning_time = times.values()
    return {
        "5 times faster than the textbook form": textbook_time >= 5 * ours,
        "10 times faster than pytorch-metric-learning": metric_learning_time >= 10 * ours,
        "at most 64 MB above the inputs": peak_mb <= 64,
        "equal to 1e-5": max(error.value, error.gradient_relative) <= 1e-5,
    }


def _print_curve(names: list[str], d: int, threads: int) -> list[Cell]:
    print(f"\n{'seconds, peak MB':>16}" + "".join(f"{name:>28}" for name in names))
    cells = []
    for n in CURVE:
        running = names if n <= LARGEST_SQUARE else names[:1]
        row = [measure_in_child(name, n, d, threads) for name in running]
        print(f"{n:16,}" + "".join(f"{cell.seconds:19.4f}{cell.peak_mb:9.0f}" for cell in row), flush=True)
        cells += row
    return cells


def _resident(field: str) -> int:
    """Bytes, from Linux: VmRSS now, VmHWM at its highest. (ru_maxrss would start at the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} CPUs, torch {torch.__version__}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument("--runs", type=int, default=7, help="interleaved runs of each loss")
    parser.add_argument("--n", type=int, default=8192, help="rows of the batch")
    parser.add_argument("--d", type=int, default=128, help="dimension of the embeddings")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-curve", action="store_true", help="leave out n = 512 to 65,536")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
