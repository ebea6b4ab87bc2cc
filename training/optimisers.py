"""Optimisers by name and the learning rate's course."""

import math
from typing import Any

from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from training.sections import OptimizerSection, ScheduleSection

__all__ = ["build_optimizer", "learning_rate"]

# timm's plain name `sgd` means Nesterov momentum; the paper's settings are without.
TIMM_NAMES = {"sgd": "momentum", "nesterov": "nesterov", "adamw": "adamw", "lars": "lars", "rmsprop": "rmsprop"}


def build_optimizer(config: OptimizerSection, encoder: nn.Module, others: nn.Module) -> Optimizer:
    """An optimiser over the encoder's parameters and those trained beside it.

    Each parameter group has an `lr_scale`, by which the learning rate is to be multiplied.
    """
    groups: list[dict[str, Any]] = []
    for modules, scale in ((encoder, config.encoder_lr_scale), (others, 1.0)):
        for is_weights in (True, False):  # parameters of one dimension are biases and normalisation's
            parameters = [p for p in modules.parameters() if p.requires_grad and (p.ndim > 1) == is_weights]
            group = {"params": parameters, "lr_scale": scale}
            group["weight_decay"] = config.weight_decay if is_weights or config.decay_all else 0.0
            if config.name == "lars":  # scales the rates of weights even where they are not decayed
                group["always_adapt"] = is_weights
            groups += [group] if parameters else []
    takes_eps = config.name in ("adamw", "rmsprop") and config.eps is not None
    optimizer: Optimizer = create_optimizer_v2(
        groups,
        opt=TIMM_NAMES[config.name],
        lr=config.lr,
        weight_decay=0.0,  # stands in the groups
        momentum=config.momentum,
        **({"eps": config.eps} if takes_eps else {}),
    )
    return optimizer


def learning_rate(
    step: int, steps_per_epoch: int, optimizer: OptimizerSection, schedule: ScheduleSection, batch_size: int
) -> float:
    """Linear warm-up, then half a cosine (arXiv 1608.03983, without restarts), a line, or steps.

    Cosine and line would reach zero at the step after the last.
    """
    peak = optimizer.lr * (batch_size / 256 if optimizer.scale_lr else 1)
    warmup = schedule.warmup_epochs * steps_per_epoch
    total = schedule.epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    match schedule.decay:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return peak * (1 - progress)
        case "step":
            passed = sum(step >= milestone * total for milestone in schedule.milestones)
            return peak * schedule.factor**passed
