"""SupCon's losses against a slow float64 twin, values derived by hand, and what must hold for every batch."""

import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

from training import losses, pairwise
from training.losses import SupConLoss, batch_diagnostics
from training.pairwise import others_logsumexp
from training.positives import CappedPositives, share_without_positives

VARIANTS = list(itertools.product(["outside", "inside"], ["all", "one_positive", "only_negatives"]))
every_variant = pytest.mark.parametrize(("summation", "denominator"), VARIANTS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches here are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _uneven_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 and blocks of a few rows, so that small batches cross their borders and end in a rest."""
    monkeypatch.setattr(pairwise, "_FEW_ROWS_TILE", 5)
    monkeypatch.setattr(losses, "_CPU_BLOCK_PAIRS", 50)


# --- the twin: one anchor, one pair, one exponential at a time ---


def weights_of_pairs(labels: Tensor, key_labels: Tensor | None, cap: int | None, n_views: int) -> tuple[Tensor, Tensor]:
    """w and v (n, n + k): what each column weighs as a positive and as a negative of each anchor."""
    columns = labels if key_labels is None else torch.cat([labels, key_labels])
    n, m = len(labels), len(columns)
    w, v = torch.zeros(n, m, dtype=torch.float64), torch.zeros(n, m, dtype=torch.float64)
    for i, a in itertools.product(range(n), range(m)):
        if a == i:
            continue
        if labels.is_floating_point():
            w[i, a] = sum(float(p) * float(q) for p, q in zip(labels[i], columns[a], strict=True))
        else:
            w[i, a] = float(labels[i] == columns[a])
        v[i, a] = 1 - w[i, a]
    if cap is not None:
        images = n // n_views
        for i in range(n):
            image, view = i % images, i // images
            ring = [(image + step) % images for step in range(images)]
            order = [
                (view + turn) % n_views * images + other
                for other in ring
                if labels[other] == labels[i]
                for turn in range(n_views)
            ]
            for dropped in order[1 + cap :]:  # the first is the anchor itself
                w[i, dropped] = 0
    return w, v


def twin(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    summation: str = "outside",
    denominator: str = "all",
    positives_cap: int | None = None,
    n_views: int = 1,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    w, v = weights_of_pairs(labels, key_labels, positives_cap, n_views)
    z = z.double()
    z = z / z.pow(2).sum(1, keepdim=True).sqrt()
    columns = z
    if keys is not None:
        columns = torch.cat([z, keys.double() / keys.double().pow(2).sum(1, keepdim=True).sqrt()])
    terms, shares = [], []
    for i in range(len(z)):
        exp = torch.exp(columns @ z[i] / temperature)
        positives = [a for a in range(len(columns)) if w[i, a] > 0]
        negative_sum = (v[i] * exp).sum()
        if not positives or (denominator == "only_negatives" and float(v[i].sum()) == 0):
            continue
        log_ratios = []
        for p in positives:
            if denominator == "all":
                below = ((w[i] + v[i]) * exp).sum()
            elif denominator == "one_positive":
                below = exp[p] + negative_sum
            else:
                below = negative_sum
            log_ratios.append(exp[p].log() - below.log())
        share = w[i, positives] / w[i, positives].sum()
        log_ratio = torch.stack(log_ratios)
        outside = -(share * log_ratio).sum()
        anchor_weight = 1.0 if weights is None else float(weights[i])
        terms.append(anchor_weight * (outside if summation == "outside" else -(share.log() + log_ratio).logsumexp(0)))
        shares.append(anchor_weight)
    return torch.stack(terms).sum() / sum(shares) if sum(shares) else (z * 0).sum()


def rows(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def class_probabilities(n: int, n_classes: int = 3, seed: int = 0) -> Tensor:
    """Mixtures of two classes, smoothed for every third row."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(n_classes, (2, n), generator=generator)
    share = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    mixed = share * one_hot(first, n_classes) + (1 - share) * one_hot(second, n_classes)
    mixed[::3] = 0.9 * mixed[::3] + 0.1 / n_classes
    return mixed


def value_and_gradient(loss: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, z)
    return loss.detach(), gradient


# --- values ---

# Four unit vectors a, b, c, d at 0°, 90°, 180°, 270°; labels 0, 0, 0, 1; τ = 1. Neighbours have similarity 0,
# opposites -1, and exp gives 1 and 1/e. d has no positive and leaves the mean.
#
# all: every denominator is 1 + 1 + 1/e; positives are a {b: 1, c: 1/e}, b {a: 1, c: 1}, c {b: 1, a: 1/e}.
# only_negatives: the denominator is d's exp, 1 for a and c, 1/e for b.
# one_positive: a has b over 1 + 1 and c over 1/e + 1; b has a and c over 1 + 1/e each; c is as a.
# cap 1: a keeps b over b + d = 2; b keeps c over c + d = 1 + 1/e; c keeps a over a + d = 1/e + 1.
E = math.e
BY_HAND = {
    ("outside", "all", None): math.log(2 + 1 / E) + (1 / 2 + 0 + 1 / 2) / 3,
    ("inside", "all", None): math.log(2 + 1 / E) - 2 / 3 * math.log((1 + 1 / E) / 2),
    ("outside", "only_negatives", None): (1 / 2 - 1 + 1 / 2) / 3,
    ("inside", "only_negatives", None): (-2 * math.log((1 + 1 / E) / 2) - 1) / 3,
    ("outside", "one_positive", None): (math.log(2) + math.log(1 + E) + math.log(1 + 1 / E)) / 3,
    ("inside", "one_positive", None): (-2 * math.log((1 / 2 + 1 / (1 + E)) / 2) + math.log(1 + 1 / E)) / 3,
    ("outside", "all", 1): (math.log(2) + math.log(1 + 1 / E) + 1 + math.log(1 + 1 / E)) / 3,
}


@pytest.mark.parametrize(("variant", "expected"), BY_HAND.items())
def test_values_derived_by_hand(variant: tuple[str, str, int | None], expected: float) -> None:
    summation, denominator, cap = variant
    z = torch.tensor([[1, 0], [0, 2], [-3, 0], [0, -0.5]])  # lengths do not matter
    loss = SupConLoss(temperature=1, summation=summation, denominator=denominator, positives_cap=cap)
    assert loss(z, torch.tensor([0, 0, 0, 1]), n_views=1).item() == pytest.approx(expected, abs=1e-6)


LABELS = torch.tensor([0, 1, 2, 0, 1, 0, 7])  # 7 is alone among the rows
CASES = {
    "one view": {"labels": LABELS},
    "two views": {"labels": LABELS.repeat(2)},
    "three views": {"labels": LABELS.repeat(3)},
    "one class": {"labels": torch.zeros(11, dtype=torch.int64)},
    "queue": {"labels": LABELS, "keys": rows(12, seed=9), "key_labels": torch.arange(12) % 3},
    "probabilities": {"labels": class_probabilities(13)},
    "probabilities, queue": {
        "labels": class_probabilities(8),
        "keys": rows(7, seed=9),
        "key_labels": class_probabilities(7, seed=1),
    },
    "cap 1, one view": {"labels": LABELS, "n_views": 1, "positives_cap": 1},
    "cap 2, one view": {"labels": LABELS, "n_views": 1, "positives_cap": 2},
    "cap 1, two views": {"labels": LABELS.repeat(2), "n_views": 2, "positives_cap": 1},
    "cap 3, two views": {"labels": LABELS.repeat(2), "n_views": 2, "positives_cap": 3},
    "cap 3, three views": {"labels": LABELS.repeat(3), "n_views": 3, "positives_cap": 3},
    "cap beyond the class": {"labels": LABELS.repeat(2), "n_views": 2, "positives_cap": 99},
    "weights": {"labels": LABELS, "weights": torch.tensor([1, 0.5, 3, 0, 2, 1, 4]).double()},
    "weights, probabilities": {"labels": class_probabilities(13), "weights": torch.linspace(0, 1, 13).double()},
    "weights, cap": {
        "labels": LABELS.repeat(2),
        "n_views": 2,
        "positives_cap": 1,
        "weights": torch.arange(14).double(),
    },
}


@pytest.mark.usefixtures("_uneven_tiles")
@pytest.mark.parametrize("case", CASES)
@every_variant
def test_equals_its_twin_forward_and_backward(summation: str, denominator: str, case: str) -> None:
    arguments = dict(CASES[case])
    labels, cap = arguments.pop("labels"), arguments.pop("positives_cap", None)
    z = rows(len(labels)).requires_grad_()
    variant = {"temperature": 0.3, "summation": summation, "denominator": denominator, "positives_cap": cap}
    loss, gradient = value_and_gradient(SupConLoss(**variant)(z, labels, **arguments), z)
    slow_loss, slow_gradient = value_and_gradient(twin(z, labels, **variant, **arguments), z)
    torch.testing.assert_close(loss, slow_loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-10, atol=1e-11)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_batch_equals_its_twin(data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(-2, 3), min_size=1, max_size=14)))
    temperature = data.draw(st.sampled_from([0.0015, 0.01, 0.07, 1.0]))  # on both sides of the exponent's range
    summation, denominator = data.draw(st.sampled_from(VARIANTS))
    z = rows(len(labels), d=data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 99)))
    for row in data.draw(st.lists(st.integers(0, len(labels) - 1), max_size=3)):
        z[row] = z[0]  # duplicates
    z.requires_grad_()
    variant = {"temperature": temperature, "summation": summation, "denominator": denominator}
    loss, gradient = value_and_gradient(SupConLoss(**variant)(z, labels), z)
    slow_loss, slow_gradient = value_and_gradient(twin(z, labels, **variant), z)
    torch.testing.assert_close(loss, slow_loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-8)


# --- the tiles ---


@pytest.mark.parametrize("temperature", [0.5, 0.0015])  # plain sums, and maxima
@pytest.mark.parametrize("tile", [1, 3, 8, 64])
def test_tiles_of_any_size_give_the_log_sum_exp_of_the_others(tile: int, temperature: float) -> None:
    z = (rows(8) / rows(8).norm(dim=1, keepdim=True)).requires_grad_()
    keys = rows(5, seed=1) / rows(5, seed=1).norm(dim=1, keepdim=True)
    lse = others_logsumexp(z, temperature=temperature, columns=torch.cat([z, keys]), tile=tile)
    logits = z @ torch.cat([z, keys]).T / temperature
    expected = logits.masked_fill(torch.eye(8, 13, dtype=torch.bool), -math.inf).logsumexp(1)
    upstream = rows(8, d=1, seed=2).squeeze(1)  # of both signs
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((upstream * value).sum(), z)[0] for value in (lse, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("_uneven_tiles")
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.1}, {"temperature": 0.0015}, {"summation": "inside", "denominator": "one_positive"}],
)
def test_gradients_pass_gradcheck(options: dict[str, object]) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    keys, key_labels = rows(3, d=3, seed=1), torch.tensor([3, 3, 1])
    loss = SupConLoss(**options)
    z = rows(7, d=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels, keys=keys, key_labels=key_labels), z)


class _Sizes(TorchDispatchMode):
    """The number of elements of the largest array that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"temperature": 0.005}, {"summation": "inside"}, {"positives_cap": 1}])
def test_no_array_grows_with_the_square_of_the_batch(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d, tile, pairs = 600, 16, 64, 4000
    monkeypatch.setattr(pairwise, "_FEW_ROWS_TILE", tile)
    monkeypatch.setattr(losses, "_CPU_BLOCK_PAIRS", pairs)
    z = torch.randn(n, d, requires_grad=True)
    with _Sizes() as sizes:
        SupConLoss(**options)(z, torch.arange(n) % 10, n_views=1).backward()
    assert n <= sizes.largest <= max(n * d, tile**2, pairs)


# --- properties ---


@every_variant
def test_the_order_of_rows_does_not_matter(summation: str, denominator: str) -> None:
    z, labels = rows(20).requires_grad_(), torch.arange(20) % 4
    loss = SupConLoss(summation=summation, denominator=denominator)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    value, gradient = value_and_gradient(loss(z, labels), z)
    shuffled_value, shuffled_gradient = value_and_gradient(loss(z[order], labels[order]), z)
    torch.testing.assert_close(value, shuffled_value)
    torch.testing.assert_close(gradient, shuffled_gradient)


@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.05, 0.5, 5.0]))
@settings(max_examples=15, deadline=None)
def test_inside_is_at_most_outside(denominator: str, seed: int, temperature: float) -> None:
    z, labels = rows(18, seed=seed), torch.arange(18) % 5
    inside, outside = (
        SupConLoss(temperature=temperature, summation=summation, denominator=denominator)(z, labels)
        for summation in ("inside", "outside")
    )
    assert inside < outside  # strictly: no anchor's positives are equally similar


@every_variant
def test_one_positive_each_makes_both_summations_equal(summation: str, denominator: str) -> None:
    z, labels = rows(12), torch.arange(6).repeat(2)
    one = SupConLoss(summation=summation, denominator=denominator)(z, labels)
    # With one positive, all and one_positive are also the same denominator.
    other = "only_negatives" if denominator == "only_negatives" else "all"
    torch.testing.assert_close(one, SupConLoss(denominator=other)(z, labels))


def test_image_indices_as_labels_give_simclr() -> None:
    z = rows(12) / rows(12).norm(dim=1, keepdim=True)
    similarities = (z @ z.T / 0.5).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    other_view = (torch.arange(12) + 6) % 12
    expected = torch.nn.functional.cross_entropy(similarities, other_view)  # eq. 1
    torch.testing.assert_close(SupConLoss(temperature=0.5)(z, torch.arange(6).repeat(2)), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapse_costs_log_of_the_others(temperature: float, dtype: torch.dtype) -> None:
    n = 1100  # three tiles
    z = torch.ones(n, 8, dtype=dtype, requires_grad=True)
    loss, gradient = value_and_gradient(SupConLoss(temperature=temperature)(z, torch.arange(n) % 7), z)
    assert loss.item() == pytest.approx(math.log(n - 1), rel=1e-4 if dtype == torch.float32 else 1e-12)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.0142, 0.007, 0.005, 0.001])
@every_variant
def test_low_temperatures_are_exact_in_float32(summation: str, denominator: str, temperature: float) -> None:
    z, labels = rows(96, d=128).float().requires_grad_(), torch.arange(96) % 7
    options = {"temperature": temperature, "summation": summation, "denominator": denominator}
    loss, gradient = value_and_gradient(SupConLoss(**options)(z, labels), z)
    exact_z = z.detach().double().requires_grad_()
    exact_loss, exact_gradient = value_and_gradient(SupConLoss(**options)(exact_z, labels), exact_z)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    # Logits reach 1/τ and carry 2^-24 of it; so does the gradient, which is itself of the order of 1/τ.
    error = (gradient - exact_gradient).abs().max() / exact_gradient.abs().max()
    assert error < 1e-5 + 1e-6 / temperature


@every_variant
def test_without_any_positive_the_loss_and_its_gradient_are_zero(summation: str, denominator: str) -> None:
    for n in (1, 9):
        z = rows(n).requires_grad_()
        loss = SupConLoss(summation=summation, denominator=denominator)(z, torch.arange(n))
        loss, gradient = value_and_gradient(loss, z)
        assert loss.item() == 0
        assert not gradient.any()


def test_an_anchor_without_positives_still_repels() -> None:
    z, labels = rows(5).requires_grad_(), torch.tensor([0, 0, 1, 1, 2])
    _, gradient = value_and_gradient(SupConLoss()(z, labels), z)
    assert gradient[4].abs().max() > 1e-3


@every_variant
def test_weights_all_zero_give_no_loss_and_no_gradient(summation: str, denominator: str) -> None:
    z = rows(6).requires_grad_()
    loss = SupConLoss(summation=summation, denominator=denominator)
    value, gradient = value_and_gradient(loss(z, torch.arange(6) % 2, weights=torch.zeros(6)), z)
    assert value.item() == 0
    assert not gradient.any()


def test_only_negatives_needs_a_negative() -> None:
    z = rows(6).requires_grad_()
    loss, gradient = value_and_gradient(SupConLoss(denominator="only_negatives")(z, torch.zeros(6).long()), z)
    assert loss.item() == 0
    assert not gradient.any()


def test_lengths_do_not_matter_and_the_gradient_is_tangential() -> None:
    z, labels = rows(10).requires_grad_(), torch.arange(10) % 3
    value, gradient = value_and_gradient(SupConLoss()(z, labels), z)
    torch.testing.assert_close(SupConLoss()(z.detach() * torch.logspace(-6, 6, 10)[:, None], labels), value)
    torch.testing.assert_close((z * gradient).sum(1), torch.zeros(10, dtype=torch.float64), atol=1e-12, rtol=0)
    assert gradient.abs().max() > 1e-2


def test_scaling_by_temperature_multiplies_value_and_gradient() -> None:
    z, labels = rows(10).requires_grad_(), torch.arange(10) % 3
    plain = value_and_gradient(SupConLoss(temperature=0.2)(z, labels), z)
    scaled = value_and_gradient(SupConLoss(temperature=0.2, scale_by_temperature=True)(z, labels), z)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one * 0.2, other)


# --- labels, views and keys ---


@every_variant
def test_one_hot_rows_are_integer_labels(summation: str, denominator: str) -> None:
    labels, key_labels = torch.tensor([0, 1, 2, 0, 1, 0, 3]), torch.tensor([1, 1, 4])
    z, keys = rows(7).requires_grad_(), rows(3, seed=1)
    loss = SupConLoss(summation=summation, denominator=denominator)
    hard = value_and_gradient(loss(z, labels, keys=keys, key_labels=key_labels), z)
    soft = value_and_gradient(
        loss(z, one_hot(labels, 5).float(), keys=keys, key_labels=one_hot(key_labels, 5).float()), z
    )
    for one, other in zip(hard, soft, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.usefixtures("_uneven_tiles")
@every_variant
def test_keys_are_rows_that_are_no_anchors_and_get_no_gradient(summation: str, denominator: str) -> None:
    # The mean over the concatenation is the rows' part plus the keys' part, each seen from its own side.
    z, keys = rows(9).requires_grad_(), rows(12, seed=1).requires_grad_()
    labels, key_labels = torch.arange(9) % 3, torch.arange(12) % 3
    loss = SupConLoss(summation=summation, denominator=denominator)
    ours = loss(z, labels, keys=keys, key_labels=key_labels)
    theirs = loss(keys, key_labels, keys=z, key_labels=labels)
    both = loss(torch.cat([z, keys]), torch.cat([labels, key_labels]))
    torch.testing.assert_close((9 * ours + 12 * theirs) / 21, both)
    assert torch.autograd.grad(ours, keys, allow_unused=True) == (None,)


def test_a_cap_below_two_images_leaves_only_the_other_view() -> None:
    # One class, so no negatives: the denominator is the other view's own term, and its logarithm cancels.
    z = rows(12).requires_grad_()
    loss = SupConLoss(positives_cap=1)(z, torch.zeros(12).long(), n_views=2)
    loss, gradient = value_and_gradient(loss, z)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("cap", [1, 3, 4])
def test_capped_positives_are_spread_evenly_and_include_the_other_view(cap: int) -> None:
    labels = torch.tensor([5, 2, 5, 5, 2, 2]).repeat(2)
    positives = CappedPositives.from_labels(labels, 2, cap, torch.float64)
    w, v = positives.block(slice(0, 12))
    assert w.sum(1).tolist() == w.sum(0).tolist() == positives.weight.tolist() == [cap] * 12
    assert v.sum(1).tolist() == positives.negative_weight.tolist() == [6] * 12
    assert w[torch.arange(12), (torch.arange(12) + 6) % 12].tolist() == [1] * 12


# --- types and checks ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"summation": "inside"}])
def test_half_precision_is_computed_in_float32_under_autocast(dtype: torch.dtype, options: dict[str, str]) -> None:
    z = (200 * rows(40, d=32)).to(dtype).requires_grad_()  # squares beyond float16's range
    labels = torch.arange(40) % 4
    loss = SupConLoss(temperature=0.05, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(loss(z, labels), z)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    exact = loss(z.detach().double(), labels)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)  # bfloat16 logits would err by 1e-2


BAD_INPUTS = {
    "z must be a floating-point array (n, d), not (4,)": {"z": torch.ones(4)},
    "not (4, 2) of torch.int64": {"z": torch.ones(4, 2).long()},
    "labels must be int64 (4,) or class probabilities (4, C), not (3,)": {"labels": torch.zeros(3).long()},
    "not (4,) of torch.int32": {"labels": torch.zeros(4, dtype=torch.int32)},
    "labels must be class probabilities (4, C), not (4,)": {"labels": torch.zeros(4)},
    "row 1 of labels is [0.5, 0.25] with sum 0.75": {"labels": torch.tensor([[1, 0], [0.5, 0.25]] * 2)},
    "row 0 of labels is [1.5, -0.5]": {"labels": torch.tensor([[1.5, -0.5]] * 4)},
    "row 2 of z has length 0 (1 such rows of 4)": {"z": torch.tensor([[1.0], [1.0], [0.0], [1.0]])},
    "row 3 of z has length nan": {"z": torch.tensor([[1.0], [1.0], [1.0], [math.nan]])},
    "row 0 of z has length inf (2 such": {"z": torch.tensor([[math.inf], [-math.inf], [1.0], [1.0]])},
    "keys and key_labels go together": {"keys": torch.ones(2, 2)},
    "keys must be floating-point (k, 2) like z, not (2, 3)": {
        "keys": torch.ones(2, 3),
        "key_labels": torch.zeros(2).long(),
    },
    "key_labels must be of labels' kind": {"keys": torch.ones(2, 2), "key_labels": torch.ones(2, 1)},
    "row 1 of keys has length 0": {
        "keys": torch.eye(2) * torch.tensor([1, 0]),
        "key_labels": torch.zeros(2).long(),
    },
    "weights must be floating-point (4,), not (3,) of torch.float32": {"weights": torch.ones(3)},
    "not (4,) of torch.int64": {"weights": torch.ones(4).long()},
    "row 2 of weights is -0.5: weights are finite": {"weights": torch.tensor([1, 0, -0.5, 1])},
    "row 0 of weights is nan": {"weights": torch.tensor([math.nan, 0, 1, 1])},
    "n_views must divide the 4 rows of z, not 3": {"n_views": 3},
    "row 2 of labels is 1, yet row 0, another view of that image, is 0": {
        "labels": torch.tensor([0, 0, 1, 1]),
        "n_views": 2,
    },
}


@pytest.mark.parametrize(("message", "inputs"), BAD_INPUTS.items())
def test_bad_inputs_are_named_with_their_values(message: str, inputs: dict[str, object]) -> None:
    good = {"z": torch.eye(4, 2) + 1, "labels": torch.tensor([0, 1, 0, 1])}
    SupConLoss()(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        SupConLoss()(**(good | inputs))


def test_a_cap_refuses_what_it_cannot_mean() -> None:
    z, labels = rows(6), torch.arange(2).repeat(3)
    with pytest.raises(ValueError, match="pass n_views"):
        SupConLoss(positives_cap=1)(z, labels)
    with pytest.raises(ValueError, match="positives_cap 1 would drop views"):
        SupConLoss(positives_cap=1)(z, labels, n_views=3)
    with pytest.raises(ValueError, match="integer labels"):
        SupConLoss(positives_cap=1)(z, one_hot(labels).float(), n_views=1)
    with pytest.raises(ValueError, match="does not go with keys"):
        SupConLoss(positives_cap=1)(z, labels, n_views=1, keys=z, key_labels=labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        ({"temperature": math.nan}, "not nan"),
        ({"positives_cap": 0}, "positives_cap must be at least 1, or None for no cap, not 0"),
        ({"summation": "between"}, "between"),
        ({"denominator": "none"}, "none"),
    ],
)
def test_bad_options_are_refused_when_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SupConLoss(**options)


def test_without_validation_a_zero_row_does_not_poison_the_batch() -> None:
    z = rows(6).index_fill(0, torch.tensor([2]), 0).requires_grad_()
    loss, gradient = value_and_gradient(SupConLoss(validate=False)(z, torch.arange(6) % 2), z)
    assert loss.isfinite()
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


# --- diagnostics ---


def test_diagnostics_of_a_batch_derived_by_hand() -> None:
    # Points at 0°, 90°, 180° with labels 0, 0, 1, and a key of label 1 at 180°: anchors 1, 2 and 3 have one
    # positive each, at squared distances 2, 2 and 0. Uniformity: squared distances 2, 2 and 4, twice each.
    z = torch.tensor([[1.0, 0], [0, 3], [-1, 0]])
    found = batch_diagnostics(z, torch.tensor([0, 0, 1]), keys=torch.tensor([[-2.0, 0]]), key_labels=torch.tensor([1]))
    assert found.share_without_positives.item() == 0
    assert found.mean_positives.item() == 1
    assert found.alignment.item() == pytest.approx(4 / 3, rel=1e-6)
    assert found.uniformity.item() == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3), rel=1e-6)


def test_diagnostics_count_anchors_without_positives() -> None:
    found = batch_diagnostics(rows(5), torch.tensor([4, 4, 4, 8, 9]))
    assert found.share_without_positives.item() == pytest.approx(2 / 5)
    assert found.mean_positives.item() == pytest.approx((2 + 2 + 2) / 5)
    assert batch_diagnostics(rows(3), torch.arange(3)).alignment.isnan()


@pytest.mark.parametrize(
    ("labels", "key_labels", "share"),
    [
        (torch.tensor([4, -1, 4, 8, 9]), None, 3 / 5),
        (torch.tensor([4, -1, 4, 8, 9]), torch.tensor([9, 9, 5]), 2 / 5),
        (torch.tensor([3]), None, 1),
        (torch.zeros(4, dtype=torch.int64), None, 0),
        (torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]), None, 1 / 3),
        (torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]), torch.tensor([[0, 0.1, 0.9]]), 0),
    ],
)
def test_labels_alone_tell_the_share_without_positives(labels: Tensor, key_labels: Tensor | None, share: float) -> None:
    assert share_without_positives(labels, key_labels).item() == pytest.approx(share)
    keys = None if key_labels is None else rows(len(key_labels))
    found = batch_diagnostics(rows(len(labels)), labels, keys=keys, key_labels=key_labels)
    assert found.share_without_positives.item() == pytest.approx(share)


def test_diagnostics_tell_collapse() -> None:
    found = batch_diagnostics(torch.ones(50, 4), torch.arange(50) % 5)
    assert found.alignment.item() == pytest.approx(0, abs=1e-5)
    assert found.uniformity.item() == pytest.approx(0, abs=1e-5)
