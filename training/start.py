"""Start weights: what an encoder's backbone holds before its first step.

Knows timm's hub, run directories, files of weights and the names that others give to the same weights. All of a
backbone is loaded, or nothing.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coterie.errors import RecipeError
from training.encoders import EncoderSpec, ImageEncoder
from training.run import Run

__all__ = ["Normalisation", "load_start"]

WRAPPERS = ("state_dict", "model")  # where a checkpoint keeps its weights
PREFIXES = ("module.", "backbone.", "encoder.")  # what training puts before a backbone's own names
# Classifiers, and what an ImageEncoder has after its backbone.
AFTER_BACKBONE = ("classifier", "fc", "head", "centre", "whitener")
SHOWN = 3  # misfits named in an error


class Normalisation(NamedTuple):
    """Mean and standard deviation per channel, of pixels scaled to 0 … 1, that weights were trained with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_start(encoder: ImageEncoder, spec: EncoderSpec, start: str) -> Normalisation | None:
    """Load the first weights of the backbone that `build_encoder(spec)` gave, and make its whitening the identity.

    Args:
        start: `random` keeps the weights as built; `pretrained` takes those of timm's hub; else a run directory, or a
            file. A file is .safetensors, or .pt or .pth of tensors alone (no objects), plain or below `state_dict`
            or `model`; the prefixes `module.`, `backbone.` and `encoder.` and the classifier are taken off.

    Returns:
        What the weights were trained with, where that is known.

    Raises:
        RecipeError: there are no such weights, or they are not those of this architecture, to the last one.
    """
    if start == "random":
        return None
    if start == "pretrained":
        weights, normalisation = _from_hub(spec)
        source = f"timm's weights of {spec.name}"
    elif Path(start).is_dir():
        run_encoder, run_spec = Run.open(Path(start)).load_encoder()
        weights, normalisation = run_encoder.backbone.state_dict(), Normalisation(run_spec.mean, run_spec.std)
        source = f"run {start} ({run_spec.architecture})"
    else:
        weights, normalisation = _own_names(_read(Path(start)), encoder.backbone.state_dict(), start), None
        source = f"file {start}"
    _check_fit(weights, encoder.backbone.state_dict(), f"encoder.start: {source} does not fit {spec.architecture}")
    encoder.backbone.load_state_dict(weights, strict=False)  # BatchNorm's counters may be missing
    encoder.reset_whitening()
    return normalisation


def _from_hub(spec: EncoderSpec) -> tuple[dict[str, Tensor], Normalisation]:
    if spec.timm_name is None:
        raise RecipeError(
            f"encoder.start=pretrained: there are no weights of {spec.name}; choose a ResNet or timm:NAME"
        )
    from timm.data import resolve_model_data_config

    from training.timm_backbones import create

    try:
        model = create(spec.timm_name, spec.preprocessing.input_size, pretrained=True)
    except Exception as error:  # the hub's client, its transport and the formats each raise their own
        raise RecipeError(
            f"encoder.start=pretrained: no weights of {spec.name} ({_line(error)}); "
            "download them elsewhere and give encoder.start the file, or set it to random"
        ) from error
    config = resolve_model_data_config(model)
    return model.state_dict(), Normalisation(tuple(config["mean"]), tuple(config["std"]))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise RecipeError(f"encoder.start={path}: no such run or file; `random` and `pretrained` are the other choices")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise RecipeError(f"encoder.start={path}: weights are read from .safetensors, .pt and .pth files")
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"encoder.start={path} is damaged, or holds objects beside tensors: save its state_dict alone, "
            "best as .safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, SafetensorError) as error:
        raise RecipeError(f"encoder.start={path} cannot be read: {_line(error)}") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    entries = content.items() if isinstance(content, dict) else ()
    weights = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not weights:
        raise RecipeError(f"encoder.start={path} holds no weights by name: save a state_dict")
    return weights


def _own_names(weights: dict[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """`weights` by the backbone's own names, without what comes after the backbone."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        name = key
        while name not in wanted and name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name not in wanted and name.partition(".")[0] in AFTER_BACKBONE:
            continue
        if name in found:
            raise RecipeError(f"encoder.start={where} holds two weights {name}: save the state_dict of one backbone")
        found[name] = tensor
    return found


def _check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], verdict: str) -> None:
    """Raise RecipeError with `verdict` unless `weights` are all of `wanted` and no more, with the same shapes."""
    weights, wanted = _without_counters(weights), _without_counters(wanted)
    misfits = {name: f"no {name}" for name in wanted if name not in weights}
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            misfits[name] = f"{name} is {_times(weights[name])}, not {_times(tensor)}"
    matched = len(wanted) - len(misfits)
    misfits |= {name: f"{name} has no place" for name in weights if name not in wanted}
    if not misfits:
        return
    remedy = "choose the encoder that it was trained with"
    if list(misfits) == ["conv1.weight"]:  # all else fits: the stem alone differs
        theirs, ours = weights["conv1.weight"].shape[-1], wanted["conv1.weight"].shape[-1]
        remedy = f"set encoder.stem={'large' if theirs > ours else 'small'}"
    first = "; ".join(list(misfits.values())[:SHOWN])
    more = f" and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
    raise RecipeError(f"{verdict}: {matched} of {len(wanted)} weights match; {first}{more}; {remedy}")


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the number of batches each BatchNorm saw, which nothing reads and old files lack."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def _times(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
