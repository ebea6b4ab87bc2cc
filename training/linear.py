"""A linear classifier trained by gradient descent, as the second stage of SupCon trains its own (arXiv 2004.11362).

Knows features and labels; knows nothing of images, encoders or runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from timm.optim.rmsprop_tf import RMSpropTF
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from coterie.errors import RecipeError
from coterie.progress import progress_bar
from training.sections import Positive, Section

__all__ = ["RECIPES", "ProbeSettings", "fit_linear"]

MOMENTUM = 0.9


class ProbeSettings(Section):
    """How the classifier is trained; the defaults are the paper's for CIFAR.

    Attributes:
        recipe: whose settings these were before single values were replaced.
        base_lr: learning rate for 256 images, scaled linearly with the batch: 2.5 is 5 at 512.
        schedule: `steps` is ×0.2 after 60, 75 and 90 % of the epochs; `exponential` a linear warm-up over 12/90 of
            them, then ×0.97 every 180th.
        normalize: bring the features to unit length first.
        epochs: published for 50,000 images and more. A few hundred make one step an epoch, and may want more epochs.
        batch: most images per step; an epoch is cut into equal batches.
        augment: a new random view of each image every epoch, by the run's recipe; without, features are computed once,
            which takes a small part of the time.
    """

    recipe: Literal["cifar", "imagenet"] = "cifar"
    optimizer: Literal["sgd", "rmsprop"] = "sgd"
    base_lr: Positive = 2.5
    schedule: Literal["steps", "exponential"] = "steps"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    normalize: bool = False
    batch: Annotated[int, Field(ge=1)] = 512
    epochs: Annotated[int, Field(ge=1)] = 100
    augment: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


RECIPES = {
    "cifar": ProbeSettings(),
    # As published, but for the batch of 6,144.
    "imagenet": ProbeSettings(
        recipe="imagenet",
        optimizer="rmsprop",
        base_lr=0.05,
        schedule="exponential",
        weight_decay=1e-6,
        label_smoothing=0.05,
        normalize=True,
        epochs=90,
    ),
}


def fit_linear(
    features_in: Callable[[Sequence[Tensor]], Iterator[Tensor]],
    labels: Tensor,
    dim: int,
    settings: ProbeSettings,
    generator: Generator,
) -> tuple[nn.Linear, float]:
    """Train a classifier of n images.

    Args:
        features_in: gives for each batch of numbers (b,) the features (b, dim) of these images.
        labels: int64 (n,), on the device of the classifier and the generator.
        generator: source of each epoch's order.

    Returns:
        The classifier after the last epoch, and that epoch's mean loss.

    Raises:
        RecipeError: the loss became NaN.
    """
    device = labels.device
    classifier = nn.Linear(dim, int(labels.max()) + 1, device=device)
    # The problem is convex: the start does not decide the end, and zero needs no random numbers.
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = _optimizer(classifier, settings)
    steps = math.ceil(len(labels) / settings.batch)
    peak = settings.base_lr * len(labels) / steps / 256
    with progress_bar("linear probe", settings.epochs * steps) as advance:
        for epoch in range(settings.epochs):
            total = torch.zeros((), device=device)  # stays there, so that no step waits for it
            batches = torch.randperm(len(labels), generator=generator, device=device).tensor_split(steps)
            for step, (batch, features) in enumerate(zip(batches, features_in(batches), strict=True)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * _share_of_peak(
                        epoch * steps + step, settings.epochs * steps, settings.schedule
                    )
                loss = F.cross_entropy(classifier(features), labels[batch], label_smoothing=settings.label_smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                advance(1)
            mean_loss = total.item() / steps
            if not math.isfinite(mean_loss):
                raise RecipeError(
                    f"the probe's loss is not finite in epoch {epoch}: lower base_lr, which is {settings.base_lr:g}, "
                    "with --set base_lr=…, or bring the features to unit length with --set normalize=true"
                )
            advance(0, note=f"epoch {epoch + 1}  loss {mean_loss:.3f}")
    return classifier, mean_loss


def _optimizer(classifier: nn.Linear, settings: ProbeSettings) -> Optimizer:
    if settings.optimizer == "sgd":
        return SGD(classifier.parameters(), momentum=MOMENTUM, weight_decay=settings.weight_decay)
    # The paper's constants for TensorFlow's RMSProp, whose ε stands inside the square root.
    return RMSpropTF(
        classifier.parameters(), alpha=0.9, eps=1e-3, momentum=MOMENTUM, weight_decay=settings.weight_decay
    )


def _share_of_peak(done: int, steps: int, schedule: Literal["steps", "exponential"]) -> float:
    """Learning rate over its peak when so many of all `steps` are done; see ProbeSettings."""
    if schedule == "steps":
        return math.prod(0.2 for percent in (60, 75, 90) if 100 * done >= percent * steps)
    half_epochs = 180 * done / steps  # of the published 90
    return half_epochs / 24 if half_epochs < 24 else 0.97 ** int(half_epochs - 24)
