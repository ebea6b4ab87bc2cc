"""LitServe with dynamic batching, as its documentation has it: an image in JSON or a form, a list of numbers out."""

import base64
import io
import os
from typing import Any

import litserve
import numpy as np
from encoder import Encoder
from fastapi import Request
from PIL import Image


class Embed(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.encoder = Encoder()

    def decode_request(self, request: Request) -> np.ndarray:
        sent = request["image"]
        file = io.BytesIO(base64.b64decode(sent)) if isinstance(sent, str) else sent.file
        return self.encoder.pixels(Image.open(file))

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return inputs

    def predict(self, x: list[np.ndarray]) -> np.ndarray:
        return self.encoder.embed(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return {"embedding": output.ravel().tolist()}


if __name__ == "__main__":
    api = Embed(max_batch_size=int(os.environ["PEER_BATCH"]), batch_timeout=float(os.environ["PEER_TIMEOUT"]))
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ.get("PEER_WORKERS", "1")),
        fast_queue=os.environ.get("PEER_FAST_QUEUE") == "1",
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PEER_PORT"]),
        generate_client_file=False,
        log_level="error",
        access_log=False,
    )
