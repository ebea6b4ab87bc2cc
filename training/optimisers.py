"""Optimisers by name and the learning rate's course."""

import math

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from training.recipe import OptimizerSection, ScheduleSection

__all__ = ["build_optimizer", "learning_rate"]

# timm's plain names `sgd` and `lars` mean Nesterov momentum; the paper's settings are without.
TIMM_NAMES = {"sgd": "momentum", "adamw": "adamw", "lars": "lars", "rmsprop": "rmsprop"}


def build_optimizer(config: OptimizerSection, modules: nn.Module) -> Optimizer:
    """An optimiser over all parameters; biases and BatchNorm weights are not decayed."""
    return create_optimizer_v2(
        modules,
        opt=TIMM_NAMES[config.name],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
    )


def learning_rate(
    step: int, steps_per_epoch: int, optimizer: OptimizerSection, schedule: ScheduleSection, batch_size: int
) -> float:
    """Linear warm-up, then a half cosine to zero at the last step (SGDR, arXiv 1608.03983, without restarts)."""
    peak = optimizer.lr * (batch_size / 256 if optimizer.scale_lr else 1)
    warmup = schedule.warmup_epochs * steps_per_epoch
    total = schedule.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
