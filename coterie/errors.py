"""What can go wrong by the user's hand or input. Each message says what, where, and what to do about it.

`exit_code` is what the command line ends with: 2 for wrong use or bad input, 1 for a gate that was not passed.
"""

__all__ = [
    "BundleError",
    "CoterieError",
    "CoterieWarning",
    "DataError",
    "DeviceError",
    "GateFailed",
    "ImageError",
    "QuotaError",
    "RecipeError",
    "ServiceError",
    "StoreBusyError",
    "StoreError",
    "TrainingStopped",
]


class CoterieError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""

    exit_code = 2


class ImageError(CoterieError):
    """One image that cannot be used: not an image, damaged, too large, or of an unsupported kind."""


class DataError(CoterieError):
    """A set of labelled images that cannot be used: missing, empty, too few classes, a bad label."""


class RecipeError(CoterieError):
    """A training configuration, or a run directory, that cannot be used."""


class BundleError(CoterieError):
    """A directory that is not a bundle, or a bundle that is damaged or of another format."""


class DeviceError(CoterieError):
    """A device was asked for that is not here, or that fails or has too little memory."""


class StoreError(CoterieError):
    """The gallery's durable changes cannot be read or written."""


class StoreBusyError(StoreError):
    """Another process held the gallery's store for too long; the same change may succeed when it is tried again."""


class QuotaError(DataError):
    """A class would have more enrolled items than it may."""


class ServiceError(CoterieError):
    """A running service refuses, fails or cannot be reached.

    Args:
        status: of its answer, None without one.
        code: of its error, such as `invalid_image`.
        index: of the image it is about, if it is about one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, index: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.index = status, code, index


class TrainingStopped(CoterieError):  # noqa: N818 - neither a mistake
    """Training was asked to stop, and has saved its state."""

    exit_code = 143  # as of a process that SIGTERM ends


class GateFailed(CoterieError):  # noqa: N818 - a finding, not a mistake
    """A measured value misses its bound: parity, accuracy, verification."""

    exit_code = 1


class CoterieWarning(UserWarning):
    """Something that works but is probably not what was meant; shown to the user as one line."""
