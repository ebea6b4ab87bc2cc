"""A gallery's changes folded into a new bundle: the same encoder, what was enrolled among its own items."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.bundle import MODEL, Bundle, Manifest, write_bundle
from coterie.calibration import calibrate
from coterie.classifier import Calibration, score
from coterie.clusters import ClassClusters
from coterie.errors import DataError
from coterie.gallery import Gallery
from coterie.items import GalleryItems
from coterie.metrics import top1
from coterie.snapshot import Snapshot

__all__ = ["merge"]

Labelled = tuple[NDArray[np.float32], NDArray[np.str_]]


def merge(
    bundle: Bundle,
    gallery: Gallery,
    out: Path,
    *,
    card: Callable[[Manifest], str],
    held_out: Labelled | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle whose own gallery is what `gallery` is now.

    With images held out, clusters and calibration are fitted anew. Without, they stay what they are: classes that have
    changed keep the clusters that the service has given them, thresholds those that were calibrated before, and the
    measured accuracy, which was that of another gallery, is left out.

    Args:
        card: writes the model card.
        held_out: embeddings (n, d) and labels (n,) of images that neither the encoder nor the gallery has seen.

    Raises:
        DataError: no item is left.
        CoterieError: those held out are of no class of the gallery; `out` exists and `overwrite` is false.
    """
    now = gallery.snapshot()
    if not len(now.items):
        raise DataError("every item of this gallery was removed: a bundle needs some")
    items = _on_the_map(now.items.whole())
    snapshot, calibration, accuracy = _fit(Snapshot(items, now.clusters), bundle.manifest.calibration, held_out)
    own = set(bundle.base.items.ids)
    merged = {
        "bundle": bundle.manifest.id,
        "enrolled": len(gallery.enrolled_ids()),
        "removed": len(own - set(items.ids)),
    }
    manifest = bundle.manifest.model_copy(
        update={
            "id": "",
            "classes": snapshot.clusters.labels,
            "gallery_size": len(items),
            "calibration": calibration,
            "accuracy": accuracy,
            "provenance": {**bundle.manifest.provenance, "merged": merged},
            "files": {},
        }
    )
    model = (bundle.path / MODEL).read_bytes()
    return write_bundle(
        out, model=model, snapshot=snapshot, card=card(manifest), manifest=manifest, overwrite=overwrite
    )


def _fit(
    snapshot: Snapshot, before: Calibration, held_out: Labelled | None
) -> tuple[Snapshot, Calibration, dict[str, float]]:
    if held_out is None:
        return snapshot, before, {}
    items = snapshot.items
    embeddings, labels = held_out
    fitted = Snapshot(items, ClassClusters.fit(items.embeddings, items.labels, held_out))
    calibration = calibrate(fitted, embeddings, labels)
    known = np.flatnonzero(np.isin(labels, fitted.clusters.labels))
    predicted = np.asarray(fitted.clusters.labels, dtype=np.str_)[score(embeddings[known], fitted, calibration).best]
    return fitted, calibration, {"held_out_top1": top1(predicted, labels[known]), "held_out_images": len(known)}


def _on_the_map(items: GalleryItems) -> GalleryItems:
    """The items with a place for each: new ones go where the map, which is a linear one, would have put them."""
    placed = np.asarray(~np.isnan(items.positions[:, 0]))
    if placed.all() or not placed.any():
        return items
    homogeneous = np.column_stack([items.embeddings, np.ones(len(items), dtype=np.float32)])
    axes, *_ = np.linalg.lstsq(homogeneous[placed], items.positions[placed], rcond=None)
    positions = np.where(placed[:, None], items.positions, homogeneous @ axes).astype(np.float32)
    return GalleryItems(items.ids, items.labels, items.embeddings, positions, items.thumbnails, items.metadata)
