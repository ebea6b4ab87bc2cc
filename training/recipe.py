"""A recipe: everything that decides how an encoder is trained, validated before any work starts.

Recipes are YAML files. `--set optimizer.lr=0.3` replaces single values; what was really used is written to the run.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.objectives import Objective, ObjectiveModule, build_objective

__all__ = ["Recipe", "load_recipe", "recipe_names"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSection(Section):
    """What the encoder sees of each image.

    Attributes:
        cache_size: height and width at which training images are kept in memory, at least the input size; random
            crops are cut from these.
        mean, std: per channel, of pixels scaled to 0 … 1; they become part of the exported graph.
        calibration: share of each class that is never trained on, kept for monitoring and calibration.
    """

    preprocessing: Preprocessing
    cache_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    calibration: Annotated[float, Field(gt=0, lt=1)] = 0.15


class EncoderSection(Section):
    """The backbone: one of `training.encoders`' own small ResNets, or `timm:NAME`.

    Attributes:
        projection_dim: width of the projection head's output, which the loss sees.
        whitening_shrinkage: of the within-class covariance, see training.whitening; null leaves the features alone.
    """

    name: str = "cifar_resnet20"
    width: Annotated[int, Field(ge=4)] = 16
    projection_dim: Annotated[int, Field(ge=2)] = 128
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


class AugmentSection(Section):
    """Random changes, drawn for each image and view; see training.augment for what each does."""

    crop_area: tuple[Positive, Positive] = (0.2, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    shear: Annotated[float, Field(ge=0, le=45)] = 0.0
    jitter: Share = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grey: Share = 0.2
    blur: Share = 0.0


class OptimizerSection(Section):
    """Optimiser by timm's name; the rate is scaled by batch size / 256 when `scale_lr` is set."""

    name: Literal["sgd", "adamw", "lars", "rmsprop"] = "adamw"
    lr: Positive = 1e-3
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    scale_lr: bool = False
    clip_norm: Positive | None = None


class ScheduleSection(Section):
    """Linear warm-up, then cosine decay to zero, stepped every batch."""

    epochs: Annotated[int, Field(ge=1)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 5


class BatchSection(Section):
    """Images per step and augmented views of each."""

    size: Annotated[int, Field(ge=2)] = 256
    views: Annotated[int, Field(ge=1)] = 2


class Recipe(Section):
    """A validated training configuration.

    Attributes:
        precision: of the encoder's forward and backward pass; the loss is always in float32. `auto` takes bf16 where
            the processor has instructions for it, and the run's recipe.yaml says which it was.
    """

    name: str
    data: DataSection
    encoder: EncoderSection = EncoderSection()
    loss: LossSection = LossSection()
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _views_suit_the_objective(self) -> "Recipe":
        wanted, views = self.loss.build(n_classes=2, embedding_dim=2), self.batch.views
        if views < wanted.min_views or (wanted.max_views is not None and views > wanted.max_views):
            most = "" if wanted.max_views is None else f" and at most {wanted.max_views}"
            raise ValueError(
                f"batch.views is {views}: {self.loss.objective} takes at least {wanted.min_views}{most} of each image"
            )
        return self

    @model_validator(mode="after")
    def _cache_holds_the_input(self) -> "Recipe":
        cache, size = self.data.cache_size, self.data.preprocessing.input_size
        if cache and (cache[0] < size[0] or cache[1] < size[1]):
            raise ValueError(f"data.cache_size {cache} is smaller than data.preprocessing.input_size {size}")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str, settings: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file, and apply `key.key=value` settings.

    Raises:
        RecipeError: no such recipe, not YAML, or a value that does not fit; the message names the key.
    """
    text = _read(name_or_file)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name_or_file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name_or_file} holds no settings")
    for setting in settings:
        _apply(values, setting)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"recipe {name_or_file}: {problems}") from error


def _shipped() -> Any:
    return resources.files("training") / "recipes"


def _read(name_or_file: str) -> str:
    if name_or_file in recipe_names():
        return str((_shipped() / f"{name_or_file}.yaml").read_text("utf-8"))
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(f"no recipe {name_or_file!r}: give a YAML file or one of {', '.join(recipe_names())}")
    return path.read_text("utf-8")


def _apply(values: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {setting!r}: write it as key=value, for example optimizer.lr=0.3")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {setting!r}: {parent} holds a value, not a section")
    values[last] = yaml.safe_load(text)
