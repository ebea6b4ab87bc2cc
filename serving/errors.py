"""What can go wrong with a request, and the one table that turns it into a status.

Messages of `RequestError` are written for the client. Whatever else is raised answers with the general sentence of the
table, so that no path, stack or library name leaves the house.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from coterie.errors import CoterieError, StoreBusyError, StoreError

__all__ = [
    "BadRequestError",
    "BundleRefusedError",
    "ConflictError",
    "EncoderError",
    "ForbiddenError",
    "HeadersTooLargeError",
    "NotFoundError",
    "OverloadedError",
    "Problem",
    "RejectedImageError",
    "RequestError",
    "ReusedKeyError",
    "SlowBodyError",
    "TimedOutError",
    "TooLargeError",
    "TooLongError",
    "UnauthorizedError",
    "UnsupportedBodyError",
    "WrongTensorError",
    "problem",
]


class RequestError(CoterieError):
    """A request that gets an error for an answer.

    Args:
        message: for the client: what was wrong, where, and what to do.
        param: the part of the request it is about.
        headers: to send along.
    """

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = dict(headers or {})


class BadRequestError(RequestError):
    """The request does not have the form that the route asks for."""


class UnauthorizedError(RequestError):
    """The route asks for a key, and there is none or no valid one."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="authorization", headers={"WWW-Authenticate": "Bearer"})


class ForbiddenError(RequestError):
    """Who asks may not do this."""


class SlowBodyError(RequestError):
    """The body did not arrive in time."""


class TooLongError(RequestError):
    """The path and query are longer than any that means something here."""


class HeadersTooLargeError(RequestError):
    """The header lines are larger than any that mean something here."""


class NotFoundError(RequestError):
    """There is no such thing here."""


class ConflictError(RequestError):
    """What is asked for does not go with how things are: a class is full, a bundle is being loaded."""


class ReusedKeyError(RequestError):
    """An Idempotency-Key that stands for another request."""


class BundleRefusedError(RequestError):
    """A bundle that cannot take the place of the one that is served."""


class TooLargeError(RequestError):
    """More bytes or images than one request may bring."""


class UnsupportedBodyError(RequestError):
    """A body of a kind that no image comes in."""


class RejectedImageError(RequestError):
    """One image of the request cannot be used; the message names its index."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index}: {reason}", param=f"input[{index}]")
        self.index = index


class WrongTensorError(RequestError):
    """An array that does not hold images of the encoder's size."""


class OverloadedError(RequestError):
    """As many images are under way as the service holds."""


class EncoderError(RequestError):
    """The encoder gave no usable answer."""


class TimedOutError(RequestError):
    """The answer would come too late."""


@dataclass(frozen=True)
class Problem:
    """How a kind of error looks to the client; `message` stands in where the error's own is not for outside.

    Attributes:
        retry_after: seconds after which the same request may succeed, where that is known.
    """

    status: int
    type: str
    code: str
    message: str = "the service failed to answer; this is logged, and not your request's fault"
    retry_after: int | None = None


PROBLEMS: dict[type[Exception], Problem] = {
    BadRequestError: Problem(400, "invalid_request_error", "bad_request"),
    UnauthorizedError: Problem(401, "authentication_error", "unauthorized"),
    ForbiddenError: Problem(403, "permission_error", "forbidden"),
    SlowBodyError: Problem(408, "invalid_request_error", "slow_body"),
    TooLongError: Problem(414, "invalid_request_error", "uri_too_long"),
    HeadersTooLargeError: Problem(431, "invalid_request_error", "headers_too_large"),
    NotFoundError: Problem(404, "invalid_request_error", "not_found"),
    ConflictError: Problem(409, "invalid_request_error", "conflict"),
    ReusedKeyError: Problem(422, "invalid_request_error", "idempotency_key_reused"),
    BundleRefusedError: Problem(422, "invalid_request_error", "bundle_refused"),
    TooLargeError: Problem(413, "invalid_request_error", "too_large"),
    UnsupportedBodyError: Problem(415, "invalid_request_error", "unsupported_body"),
    RejectedImageError: Problem(422, "invalid_request_error", "invalid_image"),
    WrongTensorError: Problem(422, "invalid_request_error", "invalid_tensor"),
    OverloadedError: Problem(429, "rate_limit_error", "overloaded"),
    EncoderError: Problem(503, "server_error", "encoder_failed"),
    StoreBusyError: Problem(
        503, "server_error", "gallery_busy", "the gallery is being changed by another process: try again", 1
    ),
    StoreError: Problem(
        503, "server_error", "gallery_unavailable", "the gallery cannot be read or changed at the moment"
    ),
    TimedOutError: Problem(504, "server_error", "timed_out"),
    Exception: Problem(500, "server_error", "internal_error"),
}


def problem(error: Exception) -> Problem:
    """The table's entry for an error: its own class's, or that of the nearest base."""
    return next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)
