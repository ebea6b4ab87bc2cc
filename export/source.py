"""Where an exported encoder comes from: a finished run, or an architecture of timm with weights from elsewhere.

Knows what each brings: its pixels, what it has seen, its origin. What follows is the same for both.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from coterie.errors import RecipeError
from coterie.images import Preprocessing
from training.encoders import EncoderSpec, ImageEncoder, build_encoder
from training.run import DatasetRecord, Run
from training.start import load_start

__all__ = ["EncoderSource", "pretrained_source", "run_source"]

# By timm's names of how it evaluates. Its `squash` may cut a rim off, which `stretch` shows.
RESIZE = {"center": "crop", "squash": "stretch", "border": "pad"}
NOTHING_SEEN = DatasetRecord(fingerprint="", classes=(), train=frozenset(), calibration=frozenset())


@dataclass(frozen=True)
class EncoderSource:
    """An encoder in evaluation mode, on the CPU, and what is known of it.

    Attributes:
        name: of its gallery, unless another is given.
        provenance: for the manifest and the model's own properties; no paths, no times.
        seen: the images it was trained on, and those that were kept from it.
        whitened: whether its last step is what it shall be; if not, the gallery's images decide it.
    """

    encoder: ImageEncoder
    spec: EncoderSpec
    name: str
    provenance: Mapping[str, str]
    seen: DatasetRecord
    whitened: bool


def run_source(run: Run) -> EncoderSource:
    """The encoder of a finished run.

    Raises:
        RecipeError: it cannot be read.
    """
    encoder, spec = run.load_encoder()
    recipe, record = run.recipe(), run.dataset()
    provenance = {
        "recipe": recipe.name,
        "objective": recipe.loss.objective.value,
        "architecture": spec.name,
        "dataset": record.fingerprint,
    }
    return EncoderSource(encoder, spec, recipe.name, provenance, record, whitened=True)


def pretrained_source(name: str, *, weights: Path | None = None, input_size: int | None = None) -> EncoderSource:
    """An architecture of timm with the weights of timm's hub, or of a file, and the pixels that timm evaluates it on.

    Args:
        name: timm:NAME, or a ResNet as recipes name it.
        weights: a .safetensors, .pt or .pth file, as training.start reads it.
        input_size: height and width instead of timm's own.

    Raises:
        RecipeError: there are no such encoder or weights, or they fit neither each other nor the size.
    """
    if weights is not None and not weights.is_file():
        raise RecipeError(f"--weights {weights}: no such file")
    spec = _as_timm_evaluates(name, input_size)
    encoder, spec, origin = _from_hub(spec) if weights is None else _from_file(spec, weights)
    provenance = {"architecture": spec.name, **origin}
    return EncoderSource(encoder, spec, name.removeprefix("timm:"), provenance, NOTHING_SEEN, whitened=False)


def _as_timm_evaluates(name: str, input_size: int | None) -> EncoderSpec:
    # Names are checked by the spec, which its pixels then follow. At this size a ResNet's stem is timm's.
    spec = EncoderSpec(name, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), Preprocessing(input_size=(224, 224)))
    if spec.timm_name is None:
        raise RecipeError(f"--encoder {name}: timm has no such encoder; train it, and export the run")
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    size = {"input_size": (3, input_size, input_size)} if input_size else {}
    pretrained = get_pretrained_cfg(spec.timm_name)
    config = resolve_data_config(size, pretrained_cfg=pretrained.to_dict() if pretrained else {})
    preprocessing = Preprocessing(
        input_size=config["input_size"][1:],
        resize=RESIZE[config["crop_mode"]],
        crop_fraction=min(config["crop_pct"], 1.0),
        interpolation=config["interpolation"],
    )
    return replace(spec, mean=tuple(config["mean"]), std=tuple(config["std"]), preprocessing=preprocessing)


def _from_hub(spec: EncoderSpec) -> tuple[ImageEncoder, EncoderSpec, dict[str, str]]:
    from timm.models import get_pretrained_cfg

    encoder = build_encoder(spec)
    try:
        load_start(encoder, spec, "pretrained")
    except RecipeError as error:
        raise RecipeError(
            f"no weights of {spec.name} from timm's hub ({error.__cause__ or error}): "
            "download them elsewhere and give the file with --weights"
        ) from error
    config = get_pretrained_cfg(spec.timm_name)
    origin = {"weights": config.hf_hub_id or f"{config.architecture}.{config.tag}", "license": config.license}
    return encoder.eval(), spec, {key: value for key, value in origin.items() if value}


def _from_file(spec: EncoderSpec, weights: Path) -> tuple[ImageEncoder, EncoderSpec, dict[str, str]]:
    """A ResNet has the stem that its weights fit; where they fit either, timm's."""
    origin = {"weights": "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()}
    refused = []
    for stem in ("large", "small") if spec.is_resnet else (spec.stem,):
        fitting = replace(spec, stem=stem)
        encoder = build_encoder(fitting)
        try:
            load_start(encoder, fitting, str(weights.absolute()))  # a file may be called `random`
            return encoder.eval(), fitting, origin
        except RecipeError as error:
            refused.append(error)
    # The message is written for a recipe's key.
    raise RecipeError(str(refused[0]).replace("encoder.start", "--weights")) from refused[0]
