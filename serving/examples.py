"""Examples of a class on their way into the gallery: what a request asks for, and how that is carried out once.

Everything here but `Examples` itself takes its time, and is called in threads.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from coterie.errors import DataError, ImageError
from coterie.images import decode_to_fit, thumbnail
from coterie.items import ID_DIGITS
from coterie.machine import processors
from coterie.store import Receipt, StoredItem
from serving.changing_schemas import NewItem, NewItemList
from serving.engine import Engine
from serving.errors import BadRequestError, ConflictError, RejectedImageError, RequestError, ReusedKeyError
from serving.schemas import ErrorItem

__all__ = ["Examples", "check_metadata", "enrolled_before", "keep"]

# An item's metadata stay in memory in every worker.
METADATA_BYTES = 16 * 1024
ERRORS = TypeAdapter(list[ErrorItem])

pictures = ThreadPoolExecutor(processors(), thread_name_prefix="picture")


@dataclass(frozen=True)
class Examples:
    """What a request asks for.

    Attributes:
        images: encoded, or the error of one that has been refused already.
        metadata: of each image.
        partial: whether those that can be used are to be enrolled although others cannot.
        key: digest of the request's Idempotency-Key, if it has one.
    """

    label: str
    images: Sequence[bytes | RequestError]
    metadata: Sequence[dict[str, Any]]
    partial: bool
    key: str | None

    @cached_property
    def digests(self) -> list[str]:
        """sha256 of each image, hexadecimal."""
        return ["" if isinstance(image, RequestError) else hashlib.sha256(image).hexdigest() for image in self.images]

    def receipt(self, errors: Sequence[ErrorItem]) -> Receipt | None:
        """What a request of the same key is answered by."""
        if self.key is None:
            return None
        # Not the body's bytes: a multipart form has another boundary when it is sent again.
        asked = [self.label, self.digests, self.metadata, self.partial]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return Receipt(self.key, digest, ERRORS.dump_json(list(errors)).decode() if errors else "")

    def answer(self, errors: Sequence[ErrorItem]) -> NewItemList:
        """One entry for each image, in the order sent."""
        failed = {error.index: error for error in errors}
        return NewItemList(
            data=[
                failed[row] if row in failed else NewItem(index=row, id=digest[:ID_DIGITS], label=self.label)
                for row, digest in enumerate(self.digests)
            ]
        )


def check_metadata(given: dict[str, Any] | list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """One object for each image.

    Raises:
        BadRequestError: not as many as images, one that is too large, or one that JSON cannot say.
    """
    each = given if isinstance(given, list) else [given] * images
    if len(each) != images:
        raise BadRequestError(
            f"metadata has {len(each)} objects for {images} images: give one for all, or one for each",
            param="metadata",
        )
    for metadata in each[:1] if isinstance(given, dict) else each:
        try:
            size = len(json.dumps(metadata, ensure_ascii=False, allow_nan=False).encode("utf-8"))
        except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair, very deep
            raise BadRequestError("metadata has a value that JSON cannot say", param="metadata") from error
        if size > METADATA_BYTES:
            raise BadRequestError(
                f"metadata takes {size:,} bytes as JSON, and at most {METADATA_BYTES:,} are kept with an item",
                param="metadata",
            )
    return each


def enrolled_before(engine: Engine, examples: Examples) -> NewItemList | None:
    """The answer of an earlier request of the same key, if there was one.

    Raises:
        ReusedKeyError: that was another request.
        StoreError: the store cannot be read.
    """
    if examples.key is None:
        return None
    receipt = engine.live_gallery.receipt(examples.key)
    return None if receipt is None else _answer_by(examples, receipt)


def keep(
    engine: Engine, examples: Examples, rows: Sequence[NDArray[np.float32] | ErrorItem]
) -> tuple[NewItemList, int]:
    """Enrol the images that have an embedding among `rows`; durable when this returns.

    Returns:
        The answer, and how many items it enrolled: none, if another request of the same key was quicker.

    Raises:
        ConflictError: the class is full, or this service keeps no changes.
        ReusedKeyError: a request of the same key was quicker, and another one.
        StoreError: the gallery cannot be changed.
    """
    used = [row for row, result in enumerate(rows) if not isinstance(result, ErrorItem)]
    errors = [result for result in rows if isinstance(result, ErrorItem)]

    def item(row: int) -> StoredItem:
        image, embedding = examples.images[row], rows[row]
        assert isinstance(image, bytes) and isinstance(embedding, np.ndarray)
        identifier = examples.digests[row][:ID_DIGITS]
        return StoredItem(
            identifier, examples.label, embedding, examples.metadata[row], _picture(engine, row, image), image
        )

    # An image that was sent twice is one item.
    items = {one.id: one for one in pictures.map(item, used)}
    receipt = examples.receipt(errors)
    try:
        kept = engine.live_gallery.add(list(items.values()), receipt)
    except DataError as error:
        raise ConflictError(str(error), param="label") from error
    if kept is not None and kept is not receipt:
        return _answer_by(examples, kept), 0
    return examples.answer(errors), len(items)


def _answer_by(examples: Examples, receipt: Receipt) -> NewItemList:
    mine = examples.receipt(())
    assert mine is not None
    if mine.request != receipt.request:
        raise ReusedKeyError(
            "this Idempotency-Key was used for another request: give each request a key of its own",
            param="idempotency-key",
        )
    return examples.answer(ERRORS.validate_json(receipt.answer) if receipt.answer else ())


def _picture(engine: Engine, row: int, image: bytes) -> bytes:
    try:
        return thumbnail(decode_to_fit(image, engine.manifest.encoder.preprocessing, engine.limits.image)[0])
    except ImageError as error:
        raise RejectedImageError(row, str(error)) from error
