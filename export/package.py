"""A run and a gallery of labelled images become a bundle.

Images that the run kept for calibration, or that it has never seen, calibrate the classifier and are not part of the
gallery: a threshold drawn from images that are also neighbours would promise too much.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import FORMAT, Bundle, EncoderCard, Manifest, write_bundle
from coterie.classifier import calibrate, score
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
from training.run import DatasetRecord, Run

__all__ = ["Export", "export_run"]

# Share of images the run has never seen that calibrate, when it kept none of the gallery's for that.
CALIBRATION_SHARE = 0.2


@dataclass(frozen=True)
class Export:
    """What an export made.

    Attributes:
        bundle: the bundle on disk, verified.
        parity: smallest cosine between the exported and the torch encoder.
        images: what the gallery held, with those that could not be read.
    """

    bundle: Bundle
    parity: float
    images: LabelledPixels


def export_run(
    run: Run, gallery: Path, out: Path, *, name: str | None = None, overwrite: bool = False, strict: bool = False
) -> Export:
    """Export a finished run with the labelled images `gallery`, a tree or a table, and write the bundle `out`.

    Args:
        name: of the gallery, under which a service keeps its changes; by default the recipe's name.

    Raises:
        GateFailed: the exported encoder differs from torch's; nothing is written.
        DataError: the gallery cannot be used.
        CoterieError: `out` exists and `overwrite` is false.
    """
    if out.exists() and not overwrite:
        raise CoterieError(f"{out} exists already: replace it with --overwrite, or choose another --out")
    encoder, spec = run.load_encoder()
    recipe, record = run.recipe(), run.dataset()
    name = check_label(name or recipe.name)
    found = read_images(gallery)
    with progress_bar("reading gallery", len(found)) as advance:
        images = read_pixels(found, spec.preprocessing, thumbnails=True, strict=strict, progress=advance)
    # What the run set apart for a last test must not become what its images are compared with.
    images = images.select(np.asarray([not record.set_apart(digest) for digest in images.hashes]))
    held_out = _held_out(images, record)
    properties = {"embedding_dim": str(encoder.dim), "recipe": recipe.name, "dataset": record.fingerprint}
    with progress_bar("exporting to ONNX", None):
        model = to_onnx(encoder, spec.preprocessing.input_size, properties)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        # On the CPU: the bundle's vectors do not depend on the machine it was exported on.
        exported = Encoder(path, device="cpu")
        parity = check_parity(exported, encoder, images.pixels)
        with progress_bar("embedding gallery", len(images)) as advance:
            embeddings = exported.embed(images.pixels, progress=advance)
    snapshot = _snapshot(images, embeddings, held_out)
    calibration = calibrate(snapshot, embeddings[held_out], images.names[held_out])
    scores = score(embeddings[held_out], snapshot, calibration)
    predicted = np.asarray(snapshot.clusters.labels)[scores.best]
    manifest = Manifest(
        format=FORMAT,
        name=name,
        encoder=EncoderCard(**spec.preprocessing.model_dump(), mean=spec.mean, std=spec.std, embedding_dim=encoder.dim),
        classes=snapshot.clusters.labels,
        gallery_size=len(snapshot.items),
        calibration=calibration,
        accuracy={"held_out_top1": top1(predicted, images.names[held_out]), "held_out_images": int(held_out.sum())},
        provenance={
            "recipe": recipe.name,
            "architecture": spec.name,
            "dataset": record.fingerprint,
            "gallery": images.fingerprint,
            "versions": versions("coterie", "torch", "onnx", "timm"),
        },
        files={},
    )
    bundle = write_bundle(
        out, model=model, snapshot=snapshot, card=model_card(manifest), manifest=manifest, overwrite=overwrite
    )
    return Export(bundle, parity, images)


def _held_out(images: LabelledPixels, record: DatasetRecord) -> NDArray[np.bool_]:
    """Which images calibrate, bool (n,): those the run held out, or else a share of those it has never seen."""
    held_out = np.asarray([record.held_out(digest) for digest in images.hashes])
    unseen = np.asarray([not record.has_trained_on(digest) for digest in images.hashes])
    for label in range(len(images.classes)):
        rows = np.flatnonzero(images.labels == label)
        if not held_out[rows].any() and unseen[rows].all():
            chosen = split_by_hash(images.labels[rows], [images.hashes[row] for row in rows], CALIBRATION_SHARE)
            held_out[rows[chosen]] = True
        elif held_out[rows].all() and len(rows):
            held_out[rows[0]] = False  # a class must not vanish from the gallery
    if not held_out.any():
        raise DataError(
            "every image of the gallery was trained on, none is left to calibrate with: "
            "give the images that the run was trained on, or add new ones"
        )
    return held_out


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
