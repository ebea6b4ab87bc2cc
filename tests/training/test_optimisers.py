"""Learning rates over time, and which parameters are decayed."""

import pytest
import torch
from torch import nn

from training.optimisers import build_optimizer, learning_rate
from training.sections import OptimizerSection, ScheduleSection


def rates(schedule, steps=10, batch_size=256, **settings):
    optimizer = OptimizerSection(lr=1.0, **settings)
    total = schedule.epochs * steps
    return [learning_rate(step, steps, optimizer, schedule, batch_size) for step in range(total)]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_rises_in_the_warm_up_and_then_falls_to_zero(decay):
    course = rates(ScheduleSection(epochs=10, warmup_epochs=2, decay=decay))
    assert course[:20] == sorted(course[:20])
    assert course[20] == 1.0
    assert course[20:] == sorted(course[20:], reverse=True)
    assert 0 < course[-1] < 0.02
    assert course[60] == pytest.approx(0.5)  # half-way, for both


def test_steps_fall_at_their_milestones():
    course = rates(ScheduleSection(epochs=10, warmup_epochs=0, decay="step", milestones=(0.6, 0.75), factor=0.2))
    assert course[59] == 1.0
    assert course[60] == course[74] == pytest.approx(0.2)
    assert course[75] == course[-1] == pytest.approx(0.04)


def test_the_rate_is_for_256_images_if_it_is_scaled():
    schedule = ScheduleSection(epochs=2, warmup_epochs=0)
    assert rates(schedule, batch_size=1024, scale_lr=True)[0] == 4.0
    assert rates(schedule, batch_size=1024)[0] == 1.0


@pytest.fixture
def modules():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Linear(4, 2)


def test_biases_and_normalisation_are_not_decayed(modules):
    encoder, head = modules
    optimizer = build_optimizer(OptimizerSection(weight_decay=0.1), encoder, head)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(encoder[0].weight), id(head.weight)}
    everything = build_optimizer(OptimizerSection(weight_decay=0.1, decay_all=True), encoder, head)
    assert all(group["weight_decay"] == 0.1 for group in everything.param_groups)
    assert sum(len(group["params"]) for group in everything.param_groups) == 6


def test_lars_adapts_the_rates_of_weights_whether_they_are_decayed_or_not(modules):
    optimizer = build_optimizer(OptimizerSection(name="lars", weight_decay=0), *modules)
    adapted = {id(p) for group in optimizer.param_groups if group["always_adapt"] for p in group["params"]}
    assert adapted == {id(modules[0][0].weight), id(modules[1].weight)}


def test_the_encoder_may_learn_more_slowly_than_the_head(modules):
    encoder, head = modules
    optimizer = build_optimizer(OptimizerSection(encoder_lr_scale=0.1), encoder, head)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(encoder[0].weight)] == 0.1
    assert scales[id(head.bias)] == 1.0


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "lars", "rmsprop"])
def test_every_optimiser_lowers_a_loss(name, modules):
    encoder, head = modules
    torch.manual_seed(0)
    optimizer = build_optimizer(OptimizerSection(name=name, lr=0.05, eps=1e-3), encoder, head)
    images, target = torch.rand(8, 3, 3, 3), torch.rand(8, 2)
    losses = []
    for _ in range(30):
        loss = (head(encoder(images).flatten(1)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
