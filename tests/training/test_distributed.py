"""Three processes over Gloo give what one gives: losses, gradients, and a network's under DistributedDataParallel.

The module is its own worker: the `answers` fixture starts it three times, as torchrun would, and each process works
through all cases, so that torch is loaded once for each. Three, because the middle one has others on both sides.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.errors import DeviceError
from training import losses, pairwise
from training.distributed import World, gather_live, gather_rows, own_rows
from training.losses import SupConLoss
from training.objectives import Objective, ObjectiveModule, build_objective

SIZE, DIM, CLASSES = 3, 6, 3
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
LIMIT = 5  # seconds that a rank waits for another in the tests of failure


# --- the cases: a whole batch, of which every rank has the views of its own images ---


@dataclass(frozen=True)
class Case:
    """One loss of one batch; rows are n_views stacked blocks."""

    options: dict[str, Any]
    labels: Tensor
    n_views: int = 1
    weights: Tensor | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)

    @property
    def temperature(self) -> float:
        return float(self.options.get("temperature", 0.1))

    def part(self, rows: Tensor, rank: int) -> Tensor:
        return rows.unflatten(0, (self.n_views, SIZE, -1))[:, rank].flatten(0, 1)

    def inputs(self, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Rows, labels and what else the loss takes, of a rank or (None) of all."""
        share = (lambda rows: rows) if rank is None else (lambda rows: self.part(rows, rank))
        others = dict(self.keys, n_views=self.n_views)
        if self.weights is not None:
            others["weights"] = share(self.weights)
        return share(random(len(self.labels))).to(dtype), share(self.labels), others


def random(n: int, d: int = DIM, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def probabilities(n: int, seed: int = 0) -> Tensor:
    return random(n, CLASSES, seed).mul(3).softmax(1)


LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 2, 2, 0, 0])  # the ranks have 0 1 2 0, 1 0 1 1 and 2 2 0 0
WEIGHTS = torch.linspace(0, 2, 12, dtype=torch.float64)
KEYS = random(13, seed=1)
BATCHES: dict[str, dict[str, Any]] = {
    "one view": {"labels": LABELS},
    "two views": {"labels": LABELS.repeat(2), "n_views": 2},
    "without positives": {"labels": torch.tensor([0, 1, 1, 2, 3, 4, 2, 5, 6, 7, 8, 9])},  # but 1 and, between ranks, 2
    "keys": {"labels": LABELS, "keys": {"keys": KEYS, "key_labels": torch.arange(13) % 4}},
    "probabilities": {"labels": probabilities(12)},
    "probabilities, keys": {
        "labels": probabilities(12),
        "keys": {"keys": KEYS, "key_labels": probabilities(13, seed=1)},
    },
    "weights": {"labels": LABELS, "weights": WEIGHTS},
}
VARIANTS = list(itertools.product(["outside", "inside"], ["all", "one_positive", "only_negatives"]))


def _cases() -> Iterator[tuple[str, Case]]:
    for summation, denominator in VARIANTS:
        variant = {"summation": summation, "denominator": denominator}
        for name, batch in BATCHES.items():
            yield f"{summation}-{denominator}-{name}", Case(variant, **batch)
        for temperature in (0.01, 0.0015):  # below the range of exponentials in float32, and in float64
            options = {"temperature": temperature, **variant}
            yield f"{summation}-{denominator}-τ={temperature}", Case(options, **BATCHES["keys"])
        for cap in (1, 3):
            options = {"positives_cap": cap, **variant}
            yield f"{summation}-{denominator}-cap={cap}", Case(options, LABELS.repeat(2), 2, WEIGHTS.repeat(2))


CASES = dict(_cases())
OBJECTIVES = {
    "supcon": Case({"scale_by_temperature": True}, LABELS.repeat(2), 2, WEIGHTS.repeat(2)),
    "simclr": Case({}, LABELS.repeat(3), 3),
    "n_pairs": Case({}, LABELS),
    "triplet": Case({}, LABELS.repeat(2), 2),
    "max_margin": Case({"n_classes": CLASSES, "embedding_dim": DIM}, LABELS),
    "cross_entropy": Case({"n_classes": CLASSES, "embedding_dim": DIM}, LABELS.repeat(2), 2, WEIGHTS.repeat(2)),
}


class Network(nn.Module):
    """A small encoder and its objective, the same in every process."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.objective: ObjectiveModule = build_objective(name, **OBJECTIVES[name].options)
        self.to(dtype)

    def forward(self, rows: Tensor, labels: Tensor, **others: Any) -> Tensor:
        return self.objective(self.encoder(rows), labels, **others)


# --- the worker ---


class Collectives(TorchDispatchMode):
    """Counts the operations between ranks, of whatever kind."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def loss_answer(case: Case, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, labels, others = case.inputs(rank, dtype)
    rows.requires_grad_()
    with Collectives() as forward:
        value = SupConLoss(across_ranks=True, **case.options)(rows, labels, **others)
    with Collectives() as backward:
        value.backward()
    return {"value": value.detach(), "gradient": rows.grad, "forward": forward.calls, "backward": backward.calls}


def network_answer(name: str, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    network = Network(name, dtype)
    network.objective.across_ranks = True
    rows, labels, others = OBJECTIVES[name].inputs(rank, dtype)
    parallel = DistributedDataParallel(network)  # gradients are averaged only while it is there
    value = parallel(rows, labels, **others)
    value.backward()
    return {"value": value.detach(), "gradients": [parameter.grad for parameter in network.parameters()]}


def failure(action: Callable[[], object]) -> dict[str, Any]:
    """How an action failed, and after how long."""
    start = time.monotonic()
    try:
        action()
    except Exception as error:
        return {"error": repr(error), "seconds": time.monotonic() - start}
    return {"error": "none"}


def meet(port: str, seconds: float) -> World:
    os.environ["MASTER_PORT"] = port
    return World.start(timeout=timedelta(seconds=seconds))


def work(out: Path, *ports: str) -> None:
    """All answers of one rank, written to out/RANK.pt."""
    torch.set_num_threads(1)
    # So that twelve rows cross the borders of tiles and blocks.
    pairwise._FEW_ROWS_TILE, losses._CPU_BLOCK_PAIRS = 4, 60
    world = meet(ports[0], 60)
    answers: dict[Any, Any] = {"world": (world.rank, world.size, world.local_rank, str(world.device), world.is_first)}
    answers["gathered"] = gather_rows(torch.full((2, 1), world.rank)).flatten().tolist()
    answers["from first"] = world.from_first(lambda: f"made by rank {world.rank}")
    answers["first failed"] = failure(lambda: world.from_first(lambda: 1 / 0))["error"]
    for dtype in TOLERANCE:
        for name, case in CASES.items():
            answers[name, dtype] = loss_answer(case, world.rank, dtype)
        for name in OBJECTIVES:
            answers[name, dtype] = network_answer(name, world.rank, dtype)
    world.close()

    world = meet(ports[1], LIMIT)
    store = dist.TCPStore("127.0.0.1", int(ports[1]))
    if world.is_first:
        answers["silent"] = failure(lambda: gather_rows(torch.zeros(1)))
        store.set("rank 0 gave up", "")
    else:
        store.wait(["rank 0 gave up"])  # alive, but not gathering
    world.close()

    world = meet(ports[2], 60)
    if world.is_first:
        answers["dead"] = failure(lambda: gather_rows(torch.zeros(1)))
    torch.save(answers, out / f"{world.rank}.pt")
    os._exit(0)  # the others without a word


# --- the tests ---


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank found."""
    out = tmp_path_factory.mktemp("ranks")
    # The stores choose free ports themselves and hold them; the ranks join them, as those of torchrun join its own.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(3)]
    environment = dict(
        os.environ,
        WORLD_SIZE=str(SIZE),
        MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    command = [sys.executable, "-m", "tests.training.test_distributed", str(out)] + [str(s.port) for s in stores]
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            command, cwd=root, env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)), stderr=subprocess.PIPE
        )
        for rank in range(SIZE)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(out / f"{rank}.pt") for rank in range(SIZE)]


def assert_equal(found: Tensor, expected: Tensor, dtype: torch.dtype, temperature: float = 0.1) -> None:
    """Equal to the dtype's tolerance, relative to the largest entry where that is above 1.

    Products of other shapes are rounded otherwise. Logits, and what their exponentials weigh, then differ by ε/τ on
    either side, which below τ = 0.1 is more.
    """
    tolerance = TOLERANCE[dtype]
    if temperature < 0.1:
        tolerance = max(tolerance, 2 * torch.finfo(dtype).eps / temperature)
    tolerance *= max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_ranks_have_the_loss_and_gradient_of_one_process(
    name: str, dtype: torch.dtype, answers: list[dict[Any, Any]]
) -> None:
    case = CASES[name]
    rows, labels, others = case.inputs(None, dtype)
    rows.requires_grad_()
    value = SupConLoss(**case.options)(rows, labels, **others)
    (gradient,) = torch.autograd.grad(value, rows)
    assert gradient.any()
    for rank, answer in enumerate(found[name, dtype] for found in answers):
        assert_equal(answer["value"], value.detach(), dtype, case.temperature)
        assert_equal(answer["gradient"] / SIZE, case.part(gradient, rank), dtype, case.temperature)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_distributed_data_parallel_has_the_gradients_of_one_process(
    name: str, dtype: torch.dtype, answers: list[dict[Any, Any]]
) -> None:
    network = Network(name, dtype)
    rows, labels, others = OBJECTIVES[name].inputs(None, dtype)
    value = network(rows, labels, **others)
    value.backward()
    found = [answer[name, dtype] for answer in answers]
    assert_equal(torch.stack([answer["value"] for answer in found]).mean(), value.detach(), dtype)
    for answer in found:
        for parameter, gradient in zip(network.parameters(), answer["gradients"], strict=True):
            assert parameter.grad is not None
            assert_equal(gradient, parameter.grad, dtype)


def test_every_objective_is_tried() -> None:
    assert set(OBJECTIVES) == {objective.value for objective in Objective}


def test_nothing_is_exchanged_in_the_backward_pass(answers: list[dict[Any, Any]]) -> None:
    for name, dtype in itertools.product(CASES, TOLERANCE):
        fast = name.startswith("outside-all-") and "cap" not in name
        for answer in answers:
            assert answer[name, dtype]["forward"] == (4 if fast else 3), name  # rows, labels, weights; and L
            assert answer[name, dtype]["backward"] == 0, name


def test_ranks_know_who_they_are_and_gather_in_their_order(answers: list[dict[Any, Any]]) -> None:
    assert [answer["world"] for answer in answers] == [(rank, 3, rank, "cpu", rank == 0) for rank in range(3)]
    assert [answer["gathered"] for answer in answers] == [[0, 0, 1, 1, 2, 2]] * 3


def test_what_the_first_rank_makes_reaches_all_and_so_does_its_failure(answers: list[dict[Any, Any]]) -> None:
    assert [answer["from first"] for answer in answers] == ["made by rank 0"] * 3
    assert "ZeroDivisionError" in answers[0]["first failed"]
    assert ["rank 0 failed: see its message" in answer["first failed"] for answer in answers] == [False, True, True]


def test_a_rank_that_stays_away_ends_the_other_within_the_timeout(answers: list[dict[Any, Any]]) -> None:
    assert "RuntimeError" in answers[0]["silent"]["error"]
    assert LIMIT - 1 < answers[0]["silent"]["seconds"] < 3 * LIMIT


def test_a_rank_that_dies_ends_the_other_at_once(answers: list[dict[Any, Any]]) -> None:
    assert "RuntimeError" in answers[0]["dead"]["error"]
    assert answers[0]["dead"]["seconds"] < 30  # of 60 that it would have waited


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_torchrun")
def test_alone_everything_is_the_identity() -> None:
    world = World.start()
    assert (world.rank, world.size, world.is_first, dist.is_initialized()) == (0, 1, True, False)
    rows = random(3).requires_grad_()
    assert gather_live(rows) is rows
    assert gather_rows(rows).equal(rows)
    assert not gather_rows(rows).requires_grad
    assert own_rows(3) == slice(0, 3)
    assert world.from_first(lambda: 5) == 5
    labels = torch.tensor([0, 0, 1])
    assert SupConLoss(across_ranks=True)(rows, labels) == SupConLoss()(rows, labels)
    world.close()


@pytest.mark.usefixtures("_no_torchrun")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, "has RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT but not LOCAL_RANK: start the ranks"),
        ({"RANK": None, "MASTER_PORT": ""}, "but not RANK, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "is damaged: .*'WORLD_SIZE': 'two'"),
        ({"RANK": "2"}, r"is damaged: rank 2 \(local 1\) of 2"),
        ({"RANK": "0"}, r"is damaged: rank 0 \(local 1\) of 2"),
    ],
)
def test_an_environment_that_torchrun_would_not_make_is_refused(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=message):
        World.start()


@pytest.mark.usefixtures("_no_torchrun")
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="local rank 1 has no GPU of its own, 1 being visible: run torchrun with"):
        World.start()


@pytest.mark.usefixtures("_no_torchrun")
def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    changes = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=rf"rank 1 did not meet the other 1 at 127.0.0.1:{store.port} within 0:00:01"):
        World.start(timeout=timedelta(seconds=1))


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
