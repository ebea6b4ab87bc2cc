"""Plain BentoML with adaptive batching of PIL images, as its documentation has it."""

import os

import bentoml
import numpy as np
from encoder import Encoder
from PIL.Image import Image


@bentoml.service(workers=int(os.environ.get("PEER_WORKERS", "1")), logging={"access": {"enabled": False}})
class Embed:
    def __init__(self) -> None:
        self.encoder = Encoder()

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["PEER_BATCH"]))
    def embed(self, images: list[Image]) -> np.ndarray:
        return self.encoder.embed([self.encoder.pixels(image) for image in images])
