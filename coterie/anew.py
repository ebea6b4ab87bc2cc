"""Enrolled images embedded anew by another encoder, from the originals that the store has kept.

The embeddings of the encoder before stay where they are: for its processes that still run, for going back to it, and
for images whose original was not kept. Killed half way, the work goes on where it stopped.
"""

import random
import warnings
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from coterie.changes import GalleryStore, Lacking
from coterie.errors import CoterieError, CoterieWarning, ImageError, StoreError
from coterie.machine import processors
from coterie.progress import progress_bar

__all__ = ["embed_anew"]

BATCH = 256  # images that are kept, and after a kill done again, at a time
FEW = 32  # take no two seconds, and no progress bar
NAMED = 10


def embed_anew(
    store: GalleryStore,
    *,
    known: Container[str],
    decode: Callable[[bytes], NDArray[np.uint8]],
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> None:
    """Embed the items that have no embedding of this encoder; warns of those that cannot be, which are kept aside.

    Args:
        known: ids of the bundle's own images, whose embeddings it brings.
        decode: an encoded image to the encoder's pixels (h, w, 3).
        encode: pixels (n, h, w, 3) to embeddings (n, d).

    Raises:
        StoreError: the store cannot be used; BundleError: the encoder cannot.
    """
    lacking = [item for item in store.lacking() if item.id not in known]
    reasons = {item: "its image was not kept" for item in lacking if item.original is None}
    wanted = [item for item in lacking if item.original is not None]
    # Several processes may open the store at once: each begins elsewhere, and skips what the others have done.
    random.shuffle(wanted)
    with (
        ThreadPoolExecutor(processors()) as pool,
        progress_bar("Embedding enrolled images anew", len(wanted)) if len(wanted) > FEW else nullcontext() as advance,
    ):
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            still = {item.id for item in store.lacking()}
            images: dict[Lacking, NDArray[np.uint8]] = {}
            for item, pixels in pool.map(_read(store, decode), [item for item in part if item.id in still]):
                if isinstance(pixels, CoterieError):
                    reasons[item] = str(pixels)
                else:
                    images[item] = pixels
            if images:
                embeddings = encode(np.stack(list(images.values())))
                store.complete({item.id: row for item, row in zip(images, embeddings, strict=True)})
            if advance:
                advance(len(part))
    if len(wanted):
        store.forget_encoders()
    if reasons:
        named = "; ".join(f"{item.id} ({item.label}): {why}" for item, why in list(reasons.items())[:NAMED])
        warnings.warn(
            f"{len(reasons)} enrolled images could not be embedded by this encoder and are kept aside, where an older "
            f"bundle finds them: {named}{' …' if len(reasons) > NAMED else ''}. Enrol them again to have them here",
            CoterieWarning,
            stacklevel=2,
        )


def _read(
    store: GalleryStore, decode: Callable[[bytes], NDArray[np.uint8]]
) -> Callable[[Lacking], tuple[Lacking, NDArray[np.uint8] | CoterieError]]:
    def read(item: Lacking) -> tuple[Lacking, NDArray[np.uint8] | CoterieError]:
        try:
            content = store.original(item.id)
            if content is None:
                return item, StoreError("it was removed meanwhile")
            return item, decode(content)
        except (ImageError, StoreError) as error:
            return item, error

    return read
