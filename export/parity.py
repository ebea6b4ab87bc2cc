"""Does the exported encoder give what the torch encoder gives?"""

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.encoder import Encoder
from coterie.errors import GateFailed
from training.encoders import ImageEncoder
from training.monitor import embed

__all__ = ["MIN_COSINE", "check_parity"]

MIN_COSINE = 0.99999
BATCHES = (1, 7, 32)


def check_parity(exported: Encoder, encoder: ImageEncoder, pixels: NDArray[np.uint8]) -> float:
    """Compare embeddings of `pixels` uint8 (n, h, w, 3) at several batch sizes.

    Returns:
        The smallest cosine found.

    Raises:
        GateFailed: it is below MIN_COSINE; the message says which image.
    """
    worst = 1.0
    for batch in BATCHES:
        part = pixels[:batch]
        expected = embed(encoder, torch.from_numpy(part)).numpy()
        cosines = np.einsum("nd,nd->n", expected, exported.embed(part))
        row = int(cosines.argmin())
        worst = min(worst, float(cosines[row]))
        if worst < MIN_COSINE:
            raise GateFailed(
                f"the exported encoder differs from torch's: cosine {cosines[row]:.6f} for image {row} of a batch of "
                f"{len(part)}, at least {MIN_COSINE} needed; no bundle was written"
            )
    return worst
