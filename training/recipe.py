"""A recipe: everything that decides how an encoder is trained, validated before any work starts.

Recipes are YAML files. One that begins with `extends: NAME` takes that recipe's values and replaces those it gives
itself; `--set optimizer.lr=0.3` replaces single values. What was really used is written to the run.
"""

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from coterie.errors import RecipeError
from training.sections import (
    AugmentSection,
    BatchSection,
    DataSection,
    EmaSection,
    EncoderSection,
    LossSection,
    MomentumSection,
    MonitorSection,
    OptimizerSection,
    ScheduleSection,
    Section,
    TargetSection,
)

__all__ = ["Recipe", "load_recipe", "recipe_names"]


class Recipe(Section):
    """A validated training configuration.

    Attributes:
        momentum, ema: null leaves them out.
        precision: of the encoder's forward and backward pass; the loss is always in float32. `auto` takes bf16 where
            the processor has instructions for it, and the run's recipe.yaml says which it was.
        compile: let torch.compile fuse the encoder's and the augmentation's operations; costs a minute at the start.
    """

    name: str
    data: DataSection
    encoder: EncoderSection = EncoderSection()
    loss: LossSection = LossSection()
    targets: TargetSection = TargetSection()
    augment: AugmentSection = AugmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    momentum: MomentumSection | None = None
    ema: EmaSection | None = None
    monitor: MonitorSection = MonitorSection()
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> list[str]:
        """What single sections cannot see."""
        objective, wanted = self.loss.objective, self.loss.build(n_classes=2, embedding_dim=2)
        batch, views = self.batch, self.batch.views
        most = "" if wanted.max_views is None else f" and at most {wanted.max_views}"
        cache, size = self.data.cache_size, self.data.preprocessing.input_size
        cap = self.loss.options.get("positives_cap")
        learns_classes = any(True for _ in wanted.parameters())
        wrong = {
            f"batch.views is {views}: {objective} takes at least {wanted.min_views}{most} of each image": (
                views < wanted.min_views or views > (wanted.max_views or views)
            ),
            f"data.cache_size {cache} is smaller than data.preprocessing.input_size {size}": (
                cache is not None and (cache[0] < size[0] or cache[1] < size[1])
            ),
            "data.calibration and data.test together leave no image to train on": (
                self.data.calibration + self.data.test >= 1
            ),
            f"targets give class probabilities, which {objective} does not take: set mixup and label_smoothing to 0": (
                self.targets.soft and not wanted.soft_labels
            ),
            f"targets.class_weights is balanced, but {objective} does not weigh its anchors": (
                self.targets.class_weights == "balanced" and not wanted.takes_weights
            ),
            f"momentum keeps a queue, which {objective} does not take: leave momentum out": (
                self.momentum is not None and not wanted.takes_keys
            ),
            "momentum encodes the last view of each image: set batch.views to 2 or more": (
                self.momentum is not None and views < 2
            ),
            f"batch.chunk is for losses over the whole batch; {objective} needs none: use a smaller batch": (
                batch.chunk is not None and learns_classes
            ),
            f"loss.positives_cap {cap} does not go with momentum, mixup or label smoothing: leave one of them out": (
                cap is not None and (self.momentum is not None or self.targets.soft)
            ),
            f"loss.positives_cap is {cap}: with batch.views {views} it is at least {views - 1}": (
                cap is not None and cap < views - 1
            ),
            f"batch.images_per_class {batch.images_per_class} does not divide batch.size {batch.size}": (
                batch.images_per_class is not None and batch.size % batch.images_per_class != 0
            ),
        }
        return [problem for problem, found in wrong.items() if found]

    def doubts(self) -> list[str]:
        """What is allowed and hardly meant, such as settings that nothing reads; one sentence each."""
        augment, optimizer, schedule = self.augment, self.optimizer, self.schedule
        plain = {name: type(getattr(self, name))() for name in ("augment", "optimizer", "schedule")}
        stepped = (schedule.milestones, schedule.factor) != (plain["schedule"].milestones, plain["schedule"].factor)
        of_policy = ("randaugment_ops", "randaugment_magnitude")
        idle = {
            f"encoder.width has no effect on {self.encoder.name}": (
                self.encoder.width != 16 and not self.encoder.name.startswith("cifar_resnet")
            ),
            "optimizer.momentum has no effect on adamw": (
                optimizer.name == "adamw" and optimizer.momentum != plain["optimizer"].momentum
            ),
            f"optimizer.eps has no effect on {optimizer.name}": (
                optimizer.eps is not None and optimizer.name not in ("adamw", "rmsprop")
            ),
            f"schedule.milestones and factor have no effect on {schedule.decay} decay": (
                schedule.decay != "step" and stepped
            ),
            f"augment.randaugment_… has no effect with augment.policy {augment.policy}": (
                augment.policy != "randaugment"
                and any(getattr(augment, name) != getattr(plain["augment"], name) for name in of_policy)
            ),
            f"schedule.warmup_epochs {schedule.warmup_epochs:g} takes all of the {schedule.epochs} epochs": (
                schedule.warmup_epochs >= schedule.epochs
            ),
            "data.sampling and targets.class_weights are both balanced, which corrects twice": (
                self.data.sampling == "balanced" and self.targets.class_weights == "balanced"
            ),
        }
        return [sentence for sentence, found in idle.items() if found]

    def to_yaml(self) -> str:
        """The resolved recipe, every default spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str, settings: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file, and apply `key.key=value` settings.

    Raises:
        RecipeError: no such recipe, not YAML, or a value that does not fit; the message names the key, and what an
            unknown key may have meant.
    """
    values = _values(name_or_file)
    for setting in settings:
        _apply(values, setting)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_problem(details) for details in error.errors())
        raise RecipeError(f"recipe {name_or_file}: {problems}") from error


def _shipped() -> Any:
    return resources.files("training") / "recipes"


def _values(name_or_file: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    if name_or_file in extended_by:
        raise RecipeError(f"recipe {name_or_file} extends itself, by way of {', '.join(extended_by)}")
    try:
        values = yaml.safe_load(_read(name_or_file))
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name_or_file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name_or_file} holds no settings")
    extended = values.pop("extends", None)
    return values if extended is None else _merged(_values(str(extended), (*extended_by, name_or_file)), values)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Section by section; but a loss replaces a loss, for their options differ."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "loss"
        merged[key] = _merged(merged[key], value) if both else value
    return merged


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
        if values.get(parent) is None:  # a section that is left out, or null
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise RecipeError(f"--set {setting!r}: {parent} holds a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {setting!r}: {text!r} is not a YAML value") from error


def _problem(details: ErrorDetails) -> str:
    """One validation error in words; an unknown key with the known one nearest to it."""
    *parents, last = (str(part) for part in details["loc"]) if details["loc"] else ("",)
    name = ".".join([*parents, last])
    if details["type"] != "extra_forbidden":
        return f"{name}: {details['msg']}" if name else details["msg"].removeprefix("Value error, ")
    known = _keys(parents)
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
    return f"{name} is unknown: " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")


def _keys(parents: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for parent in parents:
        annotation: Any = model.model_fields[parent].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]  # `Section | None` for an optional one
        model = next(choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel))
    return list(model.model_fields)
