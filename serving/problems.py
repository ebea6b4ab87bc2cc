"""What each code of an error means to a client, for the API's documentation; statuses are those of `serving.errors`."""

from dataclasses import dataclass

from serving import schemas

__all__ = ["ANYWHERE", "AT_THE_DOOR", "DESCRIBED", "Described"]


@dataclass(frozen=True)
class Described:
    """An error as a client sees it; `message` and `param` are an example's, `headers` come with it."""

    status: int
    type: str
    when: str
    message: str
    param: str | None = None
    headers: tuple[str, ...] = ()

    def example(self, code: str) -> schemas.ErrorAnswer:
        return schemas.ErrorAnswer(
            error=schemas.ErrorEntry(message=self.message, type=self.type, param=self.param, code=code)
        )


INVALID, SERVER = "invalid_request_error", "server_error"

DESCRIBED = {
    "bad_request": Described(
        400, INVALID, "The body or an option is not as described here.",
        "query parameter 'top': Input should be greater than or equal to 0", "top",
    ),
    "unauthorized": Described(
        401, "authentication_error", "A key is needed, and none or no valid one was sent.",
        "this needs a valid key: send Authorization: Bearer …", "authorization", ("WWW-Authenticate",),
    ),
    "forbidden": Described(
        403, "permission_error", "The key may ask, not change; or the request comes from a foreign page or name.",
        "the key 1f0c93ab may ask, not change", "authorization",
    ),
    "not_found": Described(
        404, INVALID, "There is no such class, item, model or file.",
        "the gallery has no class '9': GET /v1/classes lists them", "label",
    ),
    "slow_body": Described(408, INVALID, "The body did not arrive in time.", "the body did not arrive in 30 seconds"),
    "conflict": Described(
        409, INVALID, "The class is full, or another bundle is being loaded.",
        "another bundle is being loaded: ask again when that is done",
    ),
    "too_large": Described(
        413, INVALID, "Too many bytes or images.", "more than 256 images in one request: send them in several", "input"
    ),
    "uri_too_long": Described(414, INVALID, "Path and query are too long.", "path and query are over 8,192 bytes"),
    "unsupported_body": Described(
        415, INVALID, "A content type that no image comes in.",
        "images come as image/*, multipart/form-data or application/json, not text/plain", "content-type",
    ),
    "invalid_image": Described(
        422, INVALID, "An image cannot be used; `param` names it.",
        "image 0: neither a data URI nor base64", "input[0]",
    ),
    "invalid_tensor": Described(
        422, INVALID, "An array of another dtype, order or shape.",
        "the array is float32: send uint8 N×16×16×3 in C order, values 0 to 255",
    ),
    "idempotency_key_reused": Described(
        422, INVALID, "The Idempotency-Key stands for another request.",
        "this Idempotency-Key was used for another request: give each request a key of its own", "idempotency-key",
    ),
    "bundle_refused": Described(
        422, INVALID, "The bundle cannot be served here, and the old one goes on.",
        "'coterie-bundle:86053cd905b2' was not swapped in: the model store has no such tag", "bundle",
    ),
    "overloaded": Described(
        429, "rate_limit_error", "As many images are under way as the service holds; `Retry-After` says when to ask "
        "again.", "1024 images are under way: try again in 1 second", headers=("Retry-After",),
    ),
    "headers_too_large": Described(431, INVALID, "The headers are too large.", "the headers are over 65,536 bytes"),
    "internal_error": Described(
        500, SERVER, "The service failed; it is logged.",
        "the service failed to answer; this is logged, and not your request's fault",
    ),
    "encoder_failed": Described(
        503, SERVER, "The encoder gave no usable answer.",
        "image 0: the encoder gave no usable embedding for it", "input[0]",
    ),
    "gallery_busy": Described(
        503, SERVER, "Another process holds the gallery; `Retry-After` says when to ask again.",
        "the gallery is being changed by another process: try again", headers=("Retry-After",),
    ),
    "gallery_unavailable": Described(
        503, SERVER, "The gallery cannot be read or written, say for a full disk.",
        "the gallery cannot be read or changed at the moment",
    ),
    "timed_out": Described(
        504, SERVER, "No answer in time.", "no answer in time: send fewer images, or try again later",
        headers=("Retry-After",),
    ),
}  # fmt: skip

# What any request may get before its route sees it, and from any route of ours.
AT_THE_DOOR = ("unauthorized", "forbidden", "uri_too_long", "headers_too_large")
ANYWHERE = (*AT_THE_DOOR, "internal_error")
