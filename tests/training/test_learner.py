"""A training step with everything that may be switched on, on real digits."""

import copy

import pytest
import torch

from coterie.errors import RecipeError
from training.distributed import World
from training.learner import Learner
from training.recipe import load_recipe

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SMALL = ["encoder.name=cifar_resnet8", "encoder.width=8", "encoder.projection_dim=16"]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(12) % 3


def learner(labels, *settings):
    return Learner(load_recipe("digits", [*SMALL, *settings]), labels, 3, ALONE)


def steps(trained, batch, n=3):
    return [trained.step(*batch, lr=0.01, number=number, seed=number) for number in range(n)]


def weights(trained):
    return torch.cat([parameter.detach().flatten() for parameter in trained.network.parameters()])


@pytest.mark.parametrize(
    "settings",
    [
        ["momentum={queue: 20}"],
        ["momentum={queue: 20}", "targets.mixup=0.4"],
        ["targets={mixup: 0.4, label_smoothing: 0.1, class_weights: balanced}"],
        ["loss={objective: cross_entropy}", "targets={mixup: 0.4, class_weights: balanced}"],
        ["ema={decay: 0.9}", "optimizer.clip_norm=1"],
        ["batch.chunk=10"],
        ["batch.chunk=10", "momentum={queue: 20}"],
        ["augment.policy=randaugment", "optimizer.name=lars"],
        ["augment.policy=autoaugment-cifar10", "optimizer.name=nesterov"],
        ["encoder.projection_layers=3", "batch.views=4", "loss.positives_cap=5"],
        ["precision=bf16"],
    ],
)
def test_a_step_changes_the_weights_and_a_seed_decides_how(batch, settings):
    first, second = learner(batch[1], *settings), learner(batch[1], *settings)
    before = weights(first).clone()
    results = steps(first, batch)
    assert all(torch.isfinite(result.loss) for result in results)
    assert not torch.equal(weights(first), before)
    steps(second, batch)
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("settings", [[], ["momentum={queue: 20}", "ema={decay: 0.9}", "targets.mixup=0.4"]])
def test_a_learner_that_is_restored_goes_on_as_if_nothing_had_happened(batch, settings):
    whole, broken = learner(batch[1], *settings), learner(batch[1], *settings)
    steps(whole, batch, 4)
    steps(broken, batch, 2)
    state = copy.deepcopy(broken.state_dict())
    restored = learner(batch[1], *settings)
    restored.load_state_dict(state)
    for number in (2, 3):
        restored.step(*batch, lr=0.01, number=number, seed=number)
    assert torch.equal(weights(restored), weights(whole))
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(restored.encoder.state_dict()[name], value), name


def test_the_queue_holds_the_last_keys_with_their_labels_and_gives_more_to_compare_with(batch):
    trained = learner(batch[1], "momentum={queue: 30, decay: 0.5}")
    assert trained.columns(12) == 11  # one view of twelve images
    result = steps(trained, batch, 1)[0]
    assert trained.queue.columns["keys"].shape == (12, 16)
    assert result.share_without_positives == 0
    steps(trained, batch, 3)
    assert trained.columns(12) == 11 + 30
    torch.testing.assert_close(trained.queue.columns["key_labels"], torch.cat([batch[1]] * 3)[:30])


def test_the_momentum_encoder_follows_slowly(batch):
    trained = learner(batch[1], "momentum={queue: 30, decay: 0.75}")
    start = weights(trained).clone()
    trained.step(*batch, lr=0.01, number=0, seed=0)
    slow = torch.cat([p.flatten() for p in trained.queue.average.module.parameters()])
    torch.testing.assert_close(slow, 0.75 * start + 0.25 * weights(trained))


def test_without_positives_their_share_is_told(batch):
    pixels, _ = batch
    alone = learner(torch.arange(12), "batch.views=1")
    result = alone.step(pixels, torch.arange(12), lr=0.01, number=0, seed=0)
    assert result.share_without_positives == 1
    assert result.loss == 0


def test_the_average_is_what_is_measured_and_exported(batch):
    trained = learner(batch[1], "ema={decay: 0.9}")
    steps(trained, batch)
    assert trained.encoder is trained.ema.module
    assert learner(batch[1]).encoder is not None
    assert not torch.equal(trained.encoder.backbone.stem[0].weight, trained.network.encoder.backbone.stem[0].weight)


def test_a_doubtful_stem_is_warned_of(batch):
    with pytest.warns(UserWarning, match="large stem"):
        learner(batch[1], "encoder.name=resnet18", "encoder.stem=large")


def test_compiling_without_a_compiler_is_refused_before_any_work(batch, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RecipeError, match=r"C\+\+ compiler.*compile=false"):
        learner(batch[1], "compile=true")
