"""What an engine tells of its work while it does it, for whoever keeps metrics."""

from collections.abc import Sequence
from typing import Any

__all__ = ["Observer"]


class Observer:
    """Hears how long each step of the work took; this one ignores it. Derive from it what is to be kept.

    Methods are called by the threads that do the work, several at once, and `waited` by the event loop: they must
    return at once, be safe to call together, and not raise. Times are seconds.
    """

    def decoded(self, seconds: float) -> None:
        """One encoded image became pixels, or was refused."""

    def waited(self, images: int, seconds: float) -> None:
        """So many images of one request left the queue together, prepared `seconds` before."""

    def encoded(self, images: int, seconds: float) -> None:
        """A batch of so many images went through the encoder."""

    def searched(self, images: int, seconds: float) -> None:
        """So many images of a batch, of one or more requests that asked the same, were held against the gallery."""

    def answered(self, answers: Sequence[Any]) -> None:
        """The answers that were found for these, in the classes of `serving.questions`."""
