"""What each objective computes, what it asks for, and how it is built by name."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.losses import SupConLoss
from training.objectives import Objective, ObjectiveModule, build_objective


def rows(n: int, d: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(name: str, **options: object) -> ObjectiveModule:
    return build_objective(name, n_classes=3, embedding_dim=8, **options)


@pytest.mark.parametrize("name", Objective)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_objective_gives_a_scalar_and_teaches_encoder_and_classifier(name: str, dtype: torch.dtype) -> None:
    objective = build(name)
    n_views = objective.max_views or 2
    z = rows(12).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(z, torch.arange(12 // n_views).remainder(3).repeat(n_views), n_views=n_views)
        loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert z.grad is not None
    assert z.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters())


def test_objectives_say_what_they_want() -> None:
    wants_embedding = {name.value for name in Objective if build(name).uses_embedding}
    assert wants_embedding == {"max_margin", "cross_entropy"}
    assert wants_embedding == {name.value for name in Objective if list(build(name).parameters())}
    assert all(build(name).uses_embedding != build(name).uses_projection for name in Objective)
    assert [name.value for name in Objective if build(name).takes_keys] == ["supcon"]
    assert [name.value for name in Objective if build(name).takes_weights] == ["supcon", "cross_entropy"]


@pytest.mark.parametrize("name", Objective)
def test_the_trainers_switches_are_no_options_of_a_recipe(name: str) -> None:
    objective = build(name)
    assert (objective.validate, objective.across_ranks) == (True, False)
    for switch in ("validate", "across_ranks"):
        with pytest.raises(ValueError, match=f"{name} has no option {switch}"):
            build(name, **{switch: True})


@pytest.mark.parametrize("name", ["supcon", "simclr", "n_pairs"])
def test_supcons_family_checks_values_unless_told_not_to(name: str) -> None:
    objective, z = build(name), rows(6).index_fill(0, torch.tensor([1]), 0)
    labels, n_views = torch.zeros(6).long(), objective.max_views or 2
    with pytest.raises(ValueError, match="row 1 of z has length 0"):
        objective(z, labels, n_views=n_views)
    objective.validate = False
    assert objective(z, labels, n_views=n_views).isfinite()


def test_supcon_passes_all_its_options_on() -> None:
    options = {"temperature": 0.3, "summation": "inside", "denominator": "one_positive", "positives_cap": 3}
    z, labels = rows(12), torch.arange(6).remainder(2).repeat(2)
    expected = SupConLoss(**options)(z, labels, n_views=2)
    assert build("supcon", **options)(z, labels, n_views=2) == expected
    assert build("supcon")(z, labels, n_views=2) != expected


def test_simclr_sees_images_and_not_labels() -> None:
    z, objective = rows(12), build("simclr", temperature=0.2)
    loss = objective(z, torch.zeros(12).long(), n_views=3)
    assert loss == objective(z, torch.arange(4).repeat(3), n_views=3)
    assert loss == SupConLoss(temperature=0.2)(z, torch.arange(4).repeat(3))


def test_n_pairs_is_a_softmax_over_one_positive_and_the_negatives() -> None:
    # Labels 0, 0, 1, 1: each anchor's positive is its neighbour and nothing is capped out. With τ = 1 the
    # loss is the cross-entropy of the similarities to the other three.
    z = F.normalize(rows(4))
    similarities = (z @ z.T).masked_fill(torch.eye(4, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(similarities, torch.tensor([1, 0, 3, 2]))
    torch.testing.assert_close(build("n_pairs")(z, torch.tensor([0, 0, 1, 1]), n_views=1), expected)


def test_triplet_derived_by_hand() -> None:
    # Similarities: ab 0.8, ac 0.6, ad -1, bc 0, bd -0.8, cd -0.6; margin 0.5. The nearest negative beyond
    # the positive: a takes c, 0.6 - 0.8 + 0.5 = 0.3; b takes c, 0 - 0.8 + 0.5 < 0; c has none below -0.6;
    # d takes b, -0.8 + 0.6 + 0.5 = 0.3. The mean over the violating two is 0.3.
    z = torch.tensor([[2, 0], [0.8, 0.6], [0.6, -0.8], [-1, 0]])
    assert build("triplet", margin=0.5)(z, torch.tensor([0, 0, 1, 1]), n_views=1).item() == pytest.approx(0.3)


@pytest.mark.parametrize("plain", [0.0, 2.0])
def test_max_margin_replaces_the_target_angle(plain: float) -> None:
    z, labels = rows(9), torch.arange(9) % 3
    objective = build("max_margin", margin=4, lambda_start=0, lambda_min=plain)
    (weight,) = objective.parameters()
    logits = z @ weight.detach().double()  # (n, classes)
    lengths = z.norm(dim=1, keepdim=True) * weight.detach().double().norm(dim=0)
    angle = (logits / lengths).acos()
    k = (angle * 4 / math.pi).floor()
    target = F.one_hot(labels, 3).bool()
    annealed = (plain * angle.cos() + (-1) ** k * (4 * angle).cos() - 2 * k) / (1 + plain)
    with_margin = torch.where(target, lengths * annealed, logits)
    torch.testing.assert_close(objective(z, labels, n_views=1).double(), F.cross_entropy(with_margin, labels))
    assert len(k[target].unique()) > 1  # several branches of the angle's function


def test_the_margin_is_annealed_over_steps_of_training_that_a_checkpoint_keeps() -> None:
    z, labels = rows(9), torch.arange(9) % 3
    objective = build("max_margin", lambda_start=10, lambda_min=1)
    weight = objective.loss.W.detach()
    for step in range(3):
        fixed = build("max_margin", lambda_start=0, lambda_min=10 / (1 + 0.12 * step))
        fixed.loss.W.data.copy_(weight)
        torch.testing.assert_close(objective(z, labels, n_views=1), fixed(z, labels, n_views=1))
    resumed = build("max_margin", lambda_start=10, lambda_min=1)
    resumed.load_state_dict(objective.state_dict())
    torch.testing.assert_close(resumed(z, labels, n_views=1), objective.eval()(z, labels, n_views=1))
    resumed.steps.fill_(1000)
    assert resumed(z, labels, n_views=1) > 0 and resumed.loss.plain == 1


def test_cross_entropy_takes_probabilities() -> None:
    z, labels, objective = rows(6).float(), torch.arange(6) % 3, build("cross_entropy")
    smoothed = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    expected = F.cross_entropy(objective.get_submodule("classifier")(z), labels, label_smoothing=0.1)
    torch.testing.assert_close(objective(z, smoothed, n_views=1), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_weighs_rows(soft: bool) -> None:
    z, labels, objective = rows(6), torch.arange(6) % 3, build("cross_entropy").double()
    of_class = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = F.cross_entropy(objective.get_submodule("classifier")(z), labels, weight=of_class)  # Σ w L / Σ w
    targets = F.one_hot(labels, 3).double() if soft else labels
    torch.testing.assert_close(objective(z, targets, n_views=1, weights=of_class[labels]), expected)
    assert objective(z, targets, n_views=1, weights=torch.zeros(6)) == 0
    with pytest.raises(ValueError, match=r"weights must be floating-point \(6,\), not \(3,\)"):
        objective(z, targets, n_views=1, weights=of_class)


@pytest.mark.parametrize(
    ("name", "n_views", "message"),
    [
        ("simclr", 1, "SimCLR needs at least 2 view"),
        ("n_pairs", 2, "NPairs needs 1 view"),
        ("triplet", 5, "must divide"),
    ],
)
def test_a_wrong_number_of_views_is_refused(name: str, n_views: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)(rows(12), torch.zeros(12).long(), n_views=n_views)


@pytest.mark.parametrize("name", ["n_pairs", "triplet", "max_margin"])
def test_class_probabilities_are_refused_where_they_mean_nothing(name: str) -> None:
    assert not build(name).soft_labels
    with pytest.raises(ValueError, match=r"needs integer labels, not class probabilities \(6, 3\)"):
        build(name)(rows(6), torch.full((6, 3), 1 / 3), n_views=1)


def test_building_names_what_is_unknown_or_missing() -> None:
    with pytest.raises(ValueError, match="unknown objective 'arcface': choose one of supcon, simclr, n_pairs"):
        build_objective("arcface")
    with pytest.raises(ValueError, match="cross_entropy learns a classifier: give embedding_dim"):
        build_objective("cross_entropy", n_classes=3)
    with pytest.raises(ValueError, match="triplet has no option temperature: its options are margin, positive_mining"):
        build_objective("triplet", temperature=0.1)
    with pytest.raises(ValueError, match="cross_entropy has no option label_smoothing: its options are none"):
        build("cross_entropy", label_smoothing=0.1)
