"""Stage 2: a linear classifier on the features of a frozen encoder (arXiv 2004.11362, section 3.1).

Features are the backbone's own, before whitening: an invertible linear map changes how fast a linear classifier learns,
not which classes it can tell apart. The accuracy is the last epoch's, on images that neither the run nor the classifier
was trained on; choosing the best epoch would be choosing by the answer.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from coterie.dataset import LabelledPixels, Rejected, read_images, read_pixels
from coterie.errors import DataError, RecipeError
from coterie.files import write_text
from coterie.images import Preprocessing
from coterie.machine import processors, versions
from coterie.progress import progress_bar
from training.augment import Augment
from training.encoders import ImageEncoder
from training.linear import RECIPES, ProbeSettings, fit_linear
from training.monitor import features_of
from training.prepare import cached_form
from training.recipe import Recipe
from training.run import DatasetRecord, Run
from training.sources import ImageSource, MemoryImages, StreamedImages, fits_in_memory

__all__ = ["ProbeResult", "ProbeSettings", "probe", "probe_settings"]

SMALL = 64  # pixels; up to this side the paper's CIFAR settings are taken, above it its ImageNet settings
CHUNK = 512  # images that are embedded at once


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found; RUN/probe.json holds the same.

    Attributes:
        top1, top5: shares of the evaluated images after the last epoch; no top-5 with five classes or fewer.
        loss: mean over the last epoch.
        images, train_images: how many were evaluated and trained on.
        data, test: fingerprints of what the images were taken from.
        seconds: from the first image read to the last one classified.
        rejected: images that were left out, unreadable or trained on.
    """

    top1: float
    top5: float | None
    loss: float
    classes: tuple[str, ...]
    images: int
    train_images: int
    data: str
    test: str
    seconds: float
    device: str
    settings: ProbeSettings
    rejected: tuple[Rejected, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the versions of what computed them."""
        return {
            **asdict(self),
            "settings": self.settings.model_dump(),
            "rejected": len(self.rejected),
            "versions": versions("coterie", "torch", "timm"),
        }


def probe_settings(run: Run, assignments: Sequence[str] = ()) -> ProbeSettings:
    """The paper's settings for the run's input size, with `key=value` replacements.

    Raises:
        RecipeError: no such key, or a value that does not fit; the message names the key.
    """
    values: dict[str, object] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or key not in ProbeSettings.model_fields:
            known = ", ".join(ProbeSettings.model_fields)
            raise RecipeError(f"--set {assignment!r}: write it as key=value with one of {known}")
        values[key] = text
    small = max(run.recipe().data.preprocessing.input_size) <= SMALL
    base = RECIPES.get(str(values.get("recipe")), RECIPES["cifar" if small else "imagenet"])
    try:
        return ProbeSettings.model_validate(base.model_dump() | values)
    except ValidationError as error:
        problems = "; ".join(f"--set {details['loc'][0]}=…: {details['msg']}" for details in error.errors())
        raise RecipeError(problems) from error


def probe(
    run: Run, data: Path, settings: ProbeSettings, *, test: Path | None = None, strict: bool = False
) -> ProbeResult:
    """Train a classifier on `data`, evaluate it on what the run held out of `data`, or on `test`; write RUN/probe.json.

    Trained on are the images of `data` that the run neither held out nor set apart, its own and new ones. Images of
    `test` that the run or the classifier was trained on are left out.

    Raises:
        DataError: the images cannot be used, none is left to evaluate on, or one is of a class that has no image to
            train on; RecipeError: the loss became NaN.
    """
    started = time.perf_counter()
    torch.set_num_threads(processors())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, _ = run.load_encoder()  # in evaluation mode, so that BatchNorm keeps its statistics
    encoder.reset_whitening()
    encoder.requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe, record = run.recipe(), run.dataset()
    form = recipe.data.preprocessing
    train_form = cached_form(recipe) if settings.augment else form
    given = _read(data, train_form, recipe, device, strict=strict)
    # Evaluated are the pixels that are served, so decoded anew where training keeps larger ones to crop from.
    asked = given if test is None and train_form == form else _read(test or data, form, recipe, device, strict=strict)
    trained_on, evaluated = _split(given.images, asked.images, record, data, test)
    classes, labels = np.unique(given.images.names[trained_on], return_inverse=True)
    truth = np.searchsorted(classes, asked.images.names[evaluated])
    generator = Generator(device=device).manual_seed(settings.seed)
    features_in = _feature_source(encoder, given.source, trained_on, recipe, settings, generator)
    classifier, loss = fit_linear(features_in, torch.from_numpy(labels).to(device), encoder.dim, settings, generator)
    top1, top5 = _evaluate(classifier, encoder, asked.source, evaluated, truth, settings)
    result = ProbeResult(
        top1=top1,
        top5=top5,
        loss=loss,
        classes=tuple(classes.tolist()),
        images=len(evaluated),
        train_images=len(trained_on),
        data=given.images.fingerprint,
        test=asked.images.fingerprint,
        seconds=time.perf_counter() - started,
        device=device.type,
        settings=settings,
        rejected=given.images.rejected + (_left_out(asked.images, evaluated) if test else ()),
    )
    write_text(run.path / "probe.json", json.dumps(result.to_json(), indent=1) + "\n")
    return result


class _Read(NamedTuple):
    images: LabelledPixels
    source: ImageSource  # their pixels, by row


def _read(data: Path, form: Preprocessing, recipe: Recipe, device: torch.device, *, strict: bool) -> _Read:
    found = read_images(data)
    stays = fits_in_memory(len(found), form.input_size, device)
    with progress_bar(f"reading {data.name}", len(found)) as advance:
        images = read_pixels(found, form, strict=strict, progress=advance, keep_pixels=stays)
    if stays:
        return _Read(images, MemoryImages(torch.from_numpy(images.pixels).to(device)))
    return _Read(images, StreamedImages(found, images.rows.tolist(), form, device, recipe.data.workers))


def _split(
    given: LabelledPixels, asked: LabelledPixels, record: DatasetRecord, data: Path, test: Path | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `given` to train on, and of `asked` to evaluate on; never of the same image."""
    kept_away = [record.held_out(digest) or record.set_apart(digest) for digest in given.hashes]
    trained_on = np.flatnonzero(~np.asarray(kept_away))
    if len(np.unique(given.labels[trained_on])) < 2:
        raise DataError(
            f"{data} has images to train on of fewer than two classes, those aside that the run held out: "
            "give the data that the run was trained on"
        )
    if test is None:
        evaluated = np.flatnonzero([record.held_out(digest) for digest in asked.hashes])
    else:
        seen = {given.hashes[row] for row in trained_on}
        evaluated = np.flatnonzero([not (d in seen or record.has_trained_on(d)) for d in asked.hashes])
    if not len(evaluated):
        raise DataError(
            f"the run held out none of the images in {data}: give the data that it was trained on, or --test images"
            if test is None
            else f"every image in {test} was trained on, none is left to evaluate on: give others as --test"
        )
    strange = sorted(set(asked.names[evaluated].tolist()) - set(given.names[trained_on].tolist()))
    if strange:
        raise DataError(
            f"{data} has no image to train on of class {', '.join(map(repr, strange[:5]))}"
            f"{' …' if len(strange) > 5 else ''} in {test or data}: add some, or remove the class"
        )
    return trained_on, evaluated


def _left_out(asked: LabelledPixels, evaluated: NDArray[np.int64]) -> tuple[Rejected, ...]:
    others = np.setdiff1d(np.arange(len(asked)), evaluated)
    return asked.rejected + tuple(Rejected(asked.paths[row], "trained on") for row in others)


def _feature_source(
    encoder: ImageEncoder,
    source: ImageSource,
    rows: NDArray[np.int64],
    recipe: Recipe,
    settings: ProbeSettings,
    generator: Generator,
) -> Callable[[Sequence[Tensor]], Iterator[Tensor]]:
    """Gives for each batch of numbers (b,) into `rows` its features (b, dim), of new views or of the images alike."""
    if not settings.augment:
        fixed = _features(encoder, source, rows, settings, "computing features")
        return lambda batches: (fixed[batch] for batch in batches)
    augment = Augment(recipe.augment, recipe.data.preprocessing.input_size, generator)
    numbers = torch.from_numpy(rows).to(generator.device)

    def new_views(batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for pixels in source.batches([numbers[batch] for batch in batches]):
            views = augment(pixels).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                features = encoder(views)
            yield F.normalize(features) if settings.normalize else features

    return new_views


def _features(
    encoder: ImageEncoder, source: ImageSource, rows: NDArray[np.int64], settings: ProbeSettings, description: str
) -> Tensor:
    """Features (n, dim) of the images in `rows` (n,) as they are."""
    batches = torch.from_numpy(rows).to(encoder.centre.device).split(CHUNK)

    def counted() -> Iterator[Tensor]:
        for pixels in source.batches(batches):
            yield pixels
            advance(len(pixels))

    with progress_bar(description, len(rows)) as advance:
        features = features_of(encoder, counted())
    return F.normalize(features) if settings.normalize else features


@torch.inference_mode()
def _evaluate(
    classifier: nn.Linear,
    encoder: ImageEncoder,
    source: ImageSource,
    rows: NDArray[np.int64],
    truth: NDArray[np.int64],
    settings: ProbeSettings,
) -> tuple[float, float | None]:
    """Top-1 on the images in `rows` (n,) of classes `truth` (n,); with more than five classes top-5, too."""
    features = _features(encoder, source, rows, settings, "evaluating")
    ranked = classifier(features).topk(min(5, classifier.out_features)).indices.cpu().numpy()
    right = ranked == truth[:, None]  # (n, 5), true at most once a row
    return float(right[:, 0].mean()), float(right.any(1).mean()) if classifier.out_features > 5 else None
