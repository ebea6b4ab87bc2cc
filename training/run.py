"""A run directory: what training wrote, and what resuming and export read.

recipe.yaml          the resolved recipe
dataset.json         fingerprint, classes, counts, split by content hash
metrics.jsonl        one line an epoch
curves.png           the same as pictures
checkpoint.pt        the whole state, for resuming; tensors and plain values only
encoder.safetensors  the encoder's weights, without the projection head
encoder.json         what rebuilds the encoder around them
"""

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from coterie.dataset import LabelledPixels
from coterie.errors import RecipeError
from coterie.files import write_bytes, write_text
from coterie.images import Preprocessing
from training.encoders import EncoderSpec, ImageEncoder, build_encoder
from training.recipe import Recipe, load_recipe

__all__ = ["DatasetRecord", "Run"]

HASH_DIGITS = 16  # 64 bits tell the images of any data set apart


@dataclass(frozen=True)
class DatasetRecord:
    """What a run saw.

    Attributes:
        fingerprint: of all images, training and calibration together.
        classes: class names in the order of the labels.
        train, calibration, test: first 16 hexadecimal digits of each image's sha256.
    """

    fingerprint: str
    classes: tuple[str, ...]
    train: frozenset[str]
    calibration: frozenset[str]
    test: frozenset[str] = frozenset()

    @classmethod
    def of(cls, images: LabelledPixels, **parts: NDArray[np.int64]) -> "DatasetRecord":
        """Record `images`; `train`, `calibration` and `test` are rows of theirs."""
        short = np.asarray([digest[:HASH_DIGITS] for digest in images.hashes])
        split = {name: frozenset(short[rows].tolist()) for name, rows in parts.items()}
        return cls(fingerprint=images.fingerprint, classes=images.classes, **split)

    def has_trained_on(self, digest: str) -> bool:
        """Whether the image of this sha256 was among the training images."""
        return digest[:HASH_DIGITS] in self.train

    def held_out(self, digest: str) -> bool:
        """Whether the image of this sha256 was kept for calibration."""
        return digest[:HASH_DIGITS] in self.calibration

    def set_apart(self, digest: str) -> bool:
        """Whether the image of this sha256 was kept for a last test."""
        return digest[:HASH_DIGITS] in self.test

    @property
    def split(self) -> dict[str, frozenset[str]]:
        """The parts by name."""
        return {"train": self.train, "calibration": self.calibration, "test": self.test}

    def to_json(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "counts": {name: len(part) for name, part in self.split.items()},
            "split": {name: sorted(part) for name, part in self.split.items()},
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DatasetRecord":
        split = {name: frozenset(part) for name, part in values["split"].items()}
        return cls(fingerprint=values["fingerprint"], classes=tuple(values["classes"]), **split)


class Run:
    """One training run on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a finished run.

        Raises:
            RecipeError: `path` is no run directory, or its training has not finished.
        """
        run = cls(path)
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(f"{path} is not a run: make one with `coterie train DATA --recipe NAME --out {path}`")
        if not (path / "encoder.safetensors").is_file():
            raise RecipeError(f"the run {path} has not finished: continue it with `coterie train … --resume`")
        return run

    @property
    def started(self) -> bool:
        return (self.path / "recipe.yaml").exists()

    def recipe(self) -> Recipe:
        return load_recipe(str(self.path / "recipe.yaml"))

    def dataset(self) -> DatasetRecord:
        return DatasetRecord.from_json(json.loads((self.path / "dataset.json").read_text("utf-8")))

    def metrics(self) -> list[dict[str, float]]:
        """One row an epoch, as metrics.jsonl holds them."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text("utf-8").splitlines()]

    def check_same(self, recipe: Recipe, dataset: DatasetRecord) -> None:
        """Raise RecipeError unless this run was started with the same recipe on the same images."""
        if self.recipe() != recipe:
            raise RecipeError(
                f"{self.path} was started with another recipe: resume with the same, or choose another --out"
            )
        if self.dataset() != dataset:
            raise RecipeError(f"{self.path} was started on other images: resume on the same, or choose another --out")

    def write_start(self, recipe: Recipe, dataset: DatasetRecord) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "dataset.json", json.dumps(dataset.to_json(), indent=1) + "\n")
        write_text(self.path / "metrics.jsonl", "")
        write_text(self.path / "recipe.yaml", recipe.to_yaml())

    def write_metrics(self, rows: list[dict[str, float]]) -> None:
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(self.path / "checkpoint.pt", buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last whole state, or None before the first epoch ended.

        Raises:
            RecipeError: it cannot be read.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RecipeError(f"{path} is damaged ({reason}): restore it, or train anew with another --out") from error
        return state

    def save_encoder(self, encoder: ImageEncoder, spec: EncoderSpec) -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
        write_text(self.path / "encoder.json", json.dumps({**spec.to_json(), "dim": encoder.dim}, indent=1) + "\n")
        write_bytes(self.path / "encoder.safetensors", save_safetensors(weights))

    def load_encoder(self) -> tuple[ImageEncoder, EncoderSpec]:
        """The trained encoder in evaluation mode, on the CPU."""
        try:
            values = json.loads((self.path / "encoder.json").read_text("utf-8"))
            spec = EncoderSpec(
                name=values["name"],
                width=values["width"],
                mean=tuple(values["mean"]),
                std=tuple(values["std"]),
                preprocessing=Preprocessing.model_validate(values["preprocessing"]),
                stem=values["stem"],
            )
            encoder = build_encoder(spec)
            encoder.load_state_dict(load_safetensors((self.path / "encoder.safetensors").read_bytes()))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise RecipeError(f"the encoder of run {self.path} cannot be read: {error}") from error
        return encoder.eval(), spec
