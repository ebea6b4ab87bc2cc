"""Arrays in NumPy's npy format, as bodies in and out: no pickle, nothing copied before shape and size are known to fit.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1.0 and 2.0.
"""

import io
from functools import lru_cache
from math import prod

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from serving.errors import BadRequestError, WrongTensorError
from serving.limits import RequestLimits, check_count

__all__ = ["NPY", "read_pixels", "written"]

NPY = "application/x-npy"
# NumPy's own headers take 118 bytes. They are Python literals, which is no place for a long text from outside.
LONGEST_HEADER = 1024


def read_pixels(body: bytes, size: tuple[int, int], limits: RequestLimits) -> NDArray[np.uint8]:
    """The images in a body: uint8 (n, height, width, 3) of exactly `size`, or one without the first axis.

    Returns:
        uint8 (n, height, width, 3), a view of `body`.

    Raises:
        BadRequestError: not an npy file, cut short, too long, or without an image.
        WrongTensorError: of another dtype, order or shape.
        TooLargeError: too many images.
    """
    wanted = f"uint8 N×{size[0]}×{size[1]}×3 in C order"
    shape, fortran, dtype, start = _header(body, wanted)
    if dtype != np.uint8:
        raise WrongTensorError(f"the array is {dtype}: send {wanted}, values 0 to 255")
    if fortran:
        raise WrongTensorError(f"the array is in Fortran order: send {wanted}, as numpy.ascontiguousarray makes it")
    if len(shape) not in (3, 4) or shape[-3:] != (*size, 3):
        raise WrongTensorError(
            f"the array has shape {'×'.join(map(str, shape)) or '()'}: send {wanted}, RGB, "
            f"or {size[0]}×{size[1]}×3 for one image"
        )
    count = shape[0] if len(shape) == 4 else 1
    if not count:
        raise BadRequestError("the array is empty: send at least one image", param="input")
    check_count(count, limits)
    if len(body) - start != prod(shape):
        raise BadRequestError(f"the array's header promises {prod(shape):,} bytes and {len(body) - start:,} follow")
    return np.frombuffer(body, dtype=np.uint8, offset=start).reshape(count, *size, 3)


def written(array: NDArray[np.float32]) -> bytes:
    """The npy file of an array, little-endian float32 in C order."""
    return _float_header(array.shape) + array.astype("<f4", copy=False).tobytes()


@lru_cache(maxsize=256)
def _float_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


def _header(body: bytes, wanted: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Shape, whether in Fortran order, dtype, and where the values begin."""
    file = io.BytesIO(body[: LONGEST_HEADER + 16])
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file, max_header_size=LONGEST_HEADER)
    except Exception as error:  # whatever a parser of Python literals stumbles over
        raise BadRequestError(
            f"the body is no npy file of version 1.0 or 2.0: send {wanted}, as numpy.save writes it"
        ) from error
    return shape, fortran, dtype, file.tell()
