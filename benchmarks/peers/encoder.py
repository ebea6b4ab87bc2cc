"""What the other servers run: PIL and one ONNX Runtime session. Of this project they know an ONNX file."""

import os

import numpy as np
import onnxruntime
from PIL import Image


class Encoder:
    """Images to embeddings, by the file that PEER_MODEL names."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0)) // int(os.environ.get("PEER_WORKERS", "1"))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options, ["CPUExecutionProvider"])
        _, self.height, self.width, _ = self.session.get_inputs()[0].shape

    def pixels(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("RGB").resize((self.width, self.height), Image.Resampling.BICUBIC))

    def embed(self, pixels: list[np.ndarray]) -> np.ndarray:
        return self.session.run(["embedding"], {"images": np.stack(pixels)})[0]
