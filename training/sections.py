"""The sections of a recipe: every setting of training, its type, its bounds and its default.

Knows values; knows neither files nor what is done with them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from coterie.images import Preprocessing
from training.objectives import Objective, ObjectiveModule, build_objective

__all__ = [
    "AugmentSection",
    "BatchSection",
    "DataSection",
    "EmaSection",
    "EncoderSection",
    "LossSection",
    "MomentumSection",
    "MonitorSection",
    "OptimizerSection",
    "ScheduleSection",
    "Section",
    "TargetSection",
]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(Section):
    """What the encoder sees of each image, and where the images wait.

    Attributes:
        cache_size: height and width to which training images are brought once, at least the input size; random
            crops are cut from these.
        mean, std: per channel, of pixels scaled to 0 … 1; they become part of the exported graph.
        calibration: share of each class that is never trained on, kept for monitoring and calibration.
        test: share of each class that nothing looks at before the end, and that export leaves out of the gallery.
        storage: `memory` holds all images on the device, `stream` reads them anew each epoch; `auto` streams what
            would fill more than a third of the memory there is.
        workers: processes that read streamed images; by default one less than the processors.
        sampling: `balanced` shows every class equally often, repeating images of small classes.
    """

    preprocessing: Preprocessing
    cache_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    calibration: Annotated[float, Field(gt=0, lt=1)] = 0.15
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    storage: Literal["auto", "memory", "stream"] = "auto"
    workers: Annotated[int, Field(ge=0)] | None = None
    sampling: Literal["natural", "balanced"] = "natural"


class EncoderSection(Section):
    """The backbone and the projection head that training puts on it; see training.encoders for the names.

    Attributes:
        stem: `small` keeps the resolution (3×3, no max-pool), `large` quarters it; `auto` decides by the input size.
        start: `random`, `pretrained` (timm's hub), a run directory or a weights file.
        projection_dim: width of the projection head's output, which the loss sees.
        projection_layers: linear layers of the head, 1 to 3.
        whitening_shrinkage: of the within-class covariance, see training.whitening; null leaves the features alone.
    """

    name: str = "cifar_resnet20"
    width: Annotated[int, Field(ge=4)] = 16
    stem: Literal["auto", "small", "large"] = "auto"
    start: str = "random"
    projection_dim: Annotated[int, Field(ge=2)] = 128
    projection_layers: Annotated[int, Field(ge=1, le=3)] = 2
    whitening_shrinkage: Annotated[float, Field(gt=0, le=1)] | None = 0.1


class LossSection(BaseModel):
    """An objective by name, with its own options beside it; see training.objectives.

    SupCon's are temperature, summation, denominator, positives_cap and scale_by_temperature.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    objective: Objective = Objective.SUPCON

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def build(self, *, n_classes: int, embedding_dim: int) -> ObjectiveModule:
        """The objective with these options."""
        return build_objective(self.objective, n_classes=n_classes, embedding_dim=embedding_dim, **self.options)

    @model_validator(mode="after")
    def _options_fit(self) -> "LossSection":
        try:
            self.build(n_classes=2, embedding_dim=2)
        except TypeError as error:  # an option of the wrong type; pydantic only takes a ValueError for a user's
            raise ValueError(str(error)) from error
        return self


class TargetSection(Section):
    """What the loss is told about each image.

    Attributes:
        mixup: α of the Beta distribution from which each image draws how much of another is mixed into it
            (arXiv 1710.09412); 0 mixes nothing.
        label_smoothing: share of each label that is spread over all classes.
        class_weights: `balanced` weighs each anchor by the inverse of its class's size.
    """

    mixup: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: Literal["equal", "balanced"] = "equal"

    @property
    def soft(self) -> bool:
        """Whether labels become class probabilities."""
        return self.mixup > 0 or self.label_smoothing > 0


class AugmentSection(Section):
    """Random changes, drawn for each image and view; see training.augment for what each does.

    Attributes:
        policy: `autoaugment-imagenet`, `-cifar10` or `-svhn` (arXiv 1805.09501) or `randaugment` (arXiv 1909.13719),
            between the crop and the colours. The paper uses AutoAugment without jitter, grey and blur, and stacks
            RandAugment between jitter and grey.
        randaugment_ops, randaugment_magnitude: operations for each image, and their strength from 0 to 30.
    """

    crop_area: tuple[PositiveShare, PositiveShare] = (0.2, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    shear: Annotated[float, Field(ge=0, le=45)] = 0.0
    policy: Literal["none", "autoaugment-imagenet", "autoaugment-cifar10", "autoaugment-svhn", "randaugment"] = "none"
    randaugment_ops: Annotated[int, Field(ge=1)] = 2
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grey: Share = 0.2
    blur: Share = 0.0

    @field_validator("crop_area", "crop_ratio")
    @classmethod
    def _is_ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] > bounds[1]:
            raise ValueError(f"{list(bounds)} must rise from the least to the most")
        return bounds


class OptimizerSection(Section):
    """An optimiser and its rate.

    Attributes:
        name: `nesterov` is sgd with Nesterov's momentum; lars is You et al.'s, with trust coefficient 0.001.
        scale_lr: the rate is for 256 images and is multiplied by batch size / 256.
        weight_decay: of weights; biases and normalisation layers are left out unless `decay_all`.
        encoder_lr_scale: the encoder's rate relative to the head's, below 1 to fine-tune.
        eps: of adamw and rmsprop.
        clip_norm: gradients longer than this are shortened to it.
    """

    name: Literal["sgd", "nesterov", "adamw", "lars", "rmsprop"] = "adamw"
    lr: Positive = 1e-3
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_all: bool = False
    encoder_lr_scale: Positive = 1.0
    eps: Positive | None = None
    scale_lr: bool = False
    clip_norm: Positive | None = None


class ScheduleSection(Section):
    """The learning rate's course, stepped every batch: linear warm-up, then decay.

    Attributes:
        decay: `cosine` and `linear` fall towards zero; `step` multiplies by `factor` at each milestone.
        milestones: shares of all epochs, for `step`.
    """

    epochs: Annotated[int, Field(ge=1)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    decay: Literal["cosine", "linear", "step"] = "cosine"
    milestones: tuple[Share, ...] = (0.7, 0.8, 0.9)
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class BatchSection(Section):
    """Images per step, over all processes, and augmented views of each.

    Attributes:
        images_per_class: if set, a batch holds so many images of each of its classes.
        chunk: if set, views pass through the encoder in chunks of this many with exact gradients of the whole
            batch's loss, for batches beyond memory (see training.gradient_cache).
    """

    size: Annotated[int, Field(ge=2)] = 256
    views: Annotated[int, Field(ge=1)] = 2
    images_per_class: Annotated[int, Field(ge=2)] | None = None
    chunk: Annotated[int, Field(ge=2)] | None = None


class MomentumSection(Section):
    """A momentum encoder whose labelled outputs are kept as further columns of the loss (arXiv 1911.05722).

    Attributes:
        queue: embeddings kept, with their labels; the paper's 79.1 % run had 8192.
        decay: share of the momentum encoder that each step keeps.
    """

    queue: Annotated[int, Field(ge=1)] = 8192
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999


class EmaSection(Section):
    """A running average of the encoder's weights, which then is what is measured and exported.

    Attributes:
        decay: share of the average that each step keeps, reached from 0 by `1 − 1/(step + 1)^(2/3)`.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


class MonitorSection(Section):
    """What is measured on the held-out images after an epoch.

    Attributes:
        every: epochs between two measurements; the last epoch is always measured.
        gallery: training images among which neighbours are sought and on which the linear probe is fitted, at most.
        queries: held-out images that are measured, at most.
    """

    every: Annotated[int, Field(ge=1)] = 1
    gallery: Annotated[int, Field(ge=1)] = 20_000
    queries: Annotated[int, Field(ge=1)] = 10_000
