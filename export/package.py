"""An encoder and a gallery of labelled images become a bundle.

Images that a run kept for calibration, or that the encoder has never seen, calibrate the classifier and are not part of
the gallery: a threshold drawn from images that are also neighbours would promise too much.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.bundle import FORMAT, Bundle, EncoderCard, Manifest, write_bundle
from coterie.calibration import calibrate
from coterie.classifier import score
from coterie.clusters import ClassClusters
from coterie.dataset import LabelledPixels, read_images, read_pixels
from coterie.encoder import Encoder
from coterie.errors import CoterieError, DataError
from coterie.gallery import GalleryItems, Snapshot
from coterie.labels import check_label
from coterie.machine import versions
from coterie.metrics import top1
from coterie.progress import progress_bar
from coterie.splits import split_by_hash
from export.card import model_card
from export.onnx import to_onnx
from export.parity import check_parity
from export.precision import Agreement, Precision, check_conversion, convert
from export.source import EncoderSource, run_source
from training.encoders import ImageEncoder
from training.monitor import features_of
from training.run import DatasetRecord, Run

__all__ = ["Export", "export_bundle", "export_run"]

# Share of images the encoder has never seen that calibrate, where a run kept none of the gallery's for that.
CALIBRATION_SHARE = 0.2
FEWEST = 3  # images of a class of which that share is one
# Of the within-class covariance of a gallery's features, as recipes have it.
WHITENING_SHRINKAGE = 0.1
WHITENING_IMAGES = 10_000
BATCH = 32


@dataclass(frozen=True)
class Export:
    """What an export made.

    Attributes:
        bundle: the bundle on disk, verified.
        parity: smallest cosine between the exported and the torch encoder, at full precision.
        images: what the gallery held, with those that could not be read.
        agreement: of the packaged encoder with the one at full precision; None where they are the same.
    """

    bundle: Bundle
    parity: float
    images: LabelledPixels
    agreement: Agreement | None = None


def export_run(
    run: Run,
    gallery: Path,
    out: Path,
    *,
    name: str | None = None,
    group: str | None = None,
    precision: Precision = Precision.FP32,
    overwrite: bool = False,
    strict: bool = False,
) -> Export:
    """Export a finished run; as `export_bundle`."""
    return export_bundle(
        run_source(run), gallery, out, name=name, group=group, precision=precision, overwrite=overwrite, strict=strict
    )


def export_bundle(
    source: EncoderSource,
    gallery: Path,
    out: Path,
    *,
    name: str | None = None,
    group: str | None = None,
    precision: Precision = Precision.FP32,
    overwrite: bool = False,
    strict: bool = False,
) -> Export:
    """Export an encoder with the labelled images `gallery`, a tree or a table, and write the bundle `out`.

    Args:
        name: of the gallery, under which a service keeps its changes; by default the source's.
        group: what keeps images of one object together, see coterie.dataset.read_images.

    Raises:
        GateFailed: the exported encoder differs from torch's, or the converted one from that; nothing is written.
        DataError: the gallery cannot be used.
        CoterieError: `out` exists and `overwrite` is false.
    """
    if out.exists() and not overwrite:
        raise CoterieError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    name = check_label(name or source.name)
    images = _read(gallery, source, group=group, strict=strict)
    held_out = _held_out(images, source.seen)
    encoded = _encode(source, images, held_out, precision)
    snapshot = _snapshot(images, encoded.embeddings, held_out)
    queries, truth = encoded.embeddings[held_out], images.names[held_out]
    calibration = calibrate(snapshot, queries, truth)
    predicted = np.asarray(snapshot.clusters.labels)[score(queries, snapshot, calibration).best]
    spec = source.spec
    manifest = Manifest(
        format=FORMAT,
        name=name,
        encoder=EncoderCard(
            **spec.preprocessing.model_dump(),
            mean=spec.mean,
            std=spec.std,
            embedding_dim=source.encoder.dim,
            precision=precision.value,
        ),
        classes=snapshot.clusters.labels,
        gallery_size=len(snapshot.items),
        calibration=calibration,
        accuracy={"held_out_top1": top1(predicted, truth), "held_out_images": len(truth), **encoded.measured},
        provenance={
            **source.provenance,
            "gallery": images.fingerprint,
            "versions": versions("coterie", "torch", "onnx", "timm"),
        },
        files={},
    )
    bundle = write_bundle(
        out, model=encoded.model, snapshot=snapshot, card=model_card(manifest), manifest=manifest, overwrite=overwrite
    )
    return Export(bundle, encoded.parity, images, encoded.agreement)


def _read(gallery: Path, source: EncoderSource, *, group: str | None, strict: bool) -> LabelledPixels:
    found = read_images(gallery, group=group)
    with progress_bar("reading gallery", len(found)) as advance:
        images = read_pixels(found, source.spec.preprocessing, thumbnails=True, strict=strict, progress=advance)
    # What a run set apart for a last test must not become what its images are compared with.
    return images.select(np.asarray([not source.seen.set_apart(digest) for digest in images.hashes]))


def _held_out(images: LabelledPixels, seen: DatasetRecord) -> NDArray[np.bool_]:
    """Which images calibrate, bool (n,): those a run held out, and a share of the classes that it has never seen."""
    held_out = np.asarray([seen.held_out(digest) for digest in images.hashes])
    known = held_out | np.asarray([seen.has_trained_on(digest) for digest in images.hashes])
    new = np.flatnonzero(~np.isin(images.labels, images.labels[known]))
    held_out[new] = split_by_hash(
        images.labels[new],
        [images.hashes[row] for row in new],
        CALIBRATION_SHARE,
        groups=None if images.groups is None else [images.groups[row] for row in new],
    )
    for label in np.unique(images.labels):
        rows = np.flatnonzero(images.labels == label)
        if held_out[rows].all():
            held_out[rows[0]] = False  # a class must not vanish from the gallery
    if held_out.any():
        return held_out
    if known.all():
        raise DataError(
            "every image of the gallery was trained on, none is left to calibrate with: "
            "give the images that the run was trained on, or add new ones"
        )
    raise DataError(
        f"no class of the gallery has images to spare for calibration: give at least {FEWEST} of one, "
        "and of more than one object if they are grouped"
    )


@dataclass(frozen=True)
class _Encoded:
    """The model to package, its embeddings (n, d) of all images, and how it was checked."""

    model: bytes
    embeddings: NDArray[np.float32]
    parity: float
    agreement: Agreement | None = None

    @property
    def measured(self) -> dict[str, float]:
        """What the conversion did, for the manifest; nothing at full precision."""
        if self.agreement is None:
            return {}
        return {
            "knn_top1": self.agreement.knn_top1,
            "knn_top1_fp32": self.agreement.knn_top1_fp32,
            "min_cosine_to_fp32": self.agreement.min_cosine,
            "mean_cosine_to_fp32": self.agreement.mean_cosine,
        }


def _encode(
    source: EncoderSource, images: LabelledPixels, held_out: NDArray[np.bool_], precision: Precision
) -> _Encoded:
    if not source.whitened:
        _whiten(source.encoder, images, np.flatnonzero(~held_out))
    with progress_bar("exporting to ONNX", None):
        properties = {"embedding_dim": str(source.encoder.dim), **source.provenance}
        model = to_onnx(source.encoder, source.spec.preprocessing.input_size, properties)
    with _session(model) as exported:
        parity = check_parity(exported, source.encoder, images.pixels)
        embeddings = _embed(exported, images)
    if precision is Precision.FP32:
        return _Encoded(model, embeddings, parity)
    with progress_bar(f"converting to {precision}", None):
        model = convert(model, precision, images.pixels[~held_out])
    with _session(model) as converted:
        reference, embeddings = embeddings, _embed(converted, images)
    agreement = check_conversion(reference, embeddings, images.names, held_out, precision, images.paths)
    return _Encoded(model, embeddings, parity, agreement)


@contextmanager
def _session(model: bytes) -> Iterator[Encoder]:
    """On the CPU: the bundle's vectors do not depend on the machine it was exported on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        yield Encoder(path, device="cpu")


def _embed(encoder: Encoder, images: LabelledPixels) -> NDArray[np.float32]:
    with progress_bar("embedding gallery", len(images)) as advance:
        return encoder.embed(images.pixels, progress=advance)


def _whiten(encoder: ImageEncoder, images: LabelledPixels, gallery: NDArray[np.int64]) -> None:
    """Fit the encoder's last step on the images at the rows `gallery`, or on some of them, evenly chosen."""
    rows = gallery[:: -(-len(gallery) // WHITENING_IMAGES)]
    encoder.reset_whitening()
    with progress_bar("whitening features", len(rows)) as advance:

        def batches() -> Iterator[Tensor]:
            for batch in np.array_split(rows, -(-len(rows) // BATCH)):
                yield torch.from_numpy(images.pixels[batch])
                advance(len(batch))

        features = features_of(encoder, batches())
    encoder.whiten(features, torch.from_numpy(images.labels[rows]), shrinkage=WHITENING_SHRINKAGE)


def _snapshot(images: LabelledPixels, embeddings: NDArray[np.float32], held_out: NDArray[np.bool_]) -> Snapshot:
    keep = np.flatnonzero(~held_out)
    labels = images.names
    items = GalleryItems(
        ids=tuple(images.hashes[row][:24] for row in keep),
        labels=labels[keep],
        embeddings=embeddings[keep],
        positions=_plane(embeddings[keep]),
        thumbnails=tuple(images.thumbnails[row] for row in keep),
        metadata=tuple({"path": images.paths[row].as_posix()} for row in keep),
    )
    clusters = ClassClusters.fit(items.embeddings, items.labels, (embeddings[held_out], labels[held_out]))
    return Snapshot(items, clusters)


def _plane(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """The embeddings' first two principal components (n, 2), signs fixed so that equal input gives an equal map."""
    centred = embeddings - embeddings.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    plane = centred @ axes[:, -1:-3:-1]
    return np.asarray(plane * np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]]), dtype=np.float32)
