"""Routes that change something: examples in, classes and items out, another bundle in charge.

What a route answers is durable, and counts in every worker at its next request.
"""

import asyncio
import hashlib

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from coterie.errors import DataError
from coterie.labels import check_label
from serving import changing_schemas as schemas
from serving.answers import entry, json_answer
from serving.audit import audit
from serving.engine import Engine
from serving.errors import BadRequestError, NotFoundError, RequestError
from serving.examples import Examples, check_metadata, enrolled_before, keep
from serving.inputs import read_sent
from serving.limits import read_body
from serving.records import note_images
from serving.requests import check_model, engine_of, in_time, query_of
from serving.schemas import NoQuery, first_complaint
from serving.swapping import Swapper

__all__ = ["delete_item", "enroll", "forget", "swap"]

KEY_LENGTH = 200


async def enroll(request: Request) -> Response:
    """POST /v1/classes/{label}/examples: images that show the class from now on."""
    engine = engine_of(request)
    engine.check_room()
    examples = await _read_examples(request, engine)
    answer, count = await asyncio.to_thread(enrolled_before, engine, examples), 0
    if answer is None:
        answered = await in_time(request, engine.answer(examples.images, None, partial=examples.partial))
        rows = [entry(row, index) if isinstance(row, RequestError) else row for index, row in enumerate(answered.rows)]
        # No longer bound to the client: once begun, it is done.
        answer, count = await asyncio.to_thread(keep, engine, examples, rows)
    made = len({one.id for one in answer.data if isinstance(one, schemas.NewItem)})
    if made:
        # Whoever made the change may have died before it was written down.
        audit(request, "enroll" if count else "replay", examples.label, made)
    return await json_answer(len(answer.data), lambda: answer, status=201 if made else 200)


async def forget(request: Request) -> Response:
    """DELETE /v1/classes/{label}: erase all items of a class."""
    query_of(request, NoQuery)
    engine, label = engine_of(request), _label_of(request)

    def remove() -> int:
        try:
            return len(engine.live_gallery.remove(label=label))
        except DataError:
            return 0

    if not (count := await asyncio.to_thread(remove)):
        raise NotFoundError("the gallery has no such class: GET /v1/classes lists them", param="label")
    audit(request, "forget", label, count)
    return await json_answer(1, lambda: schemas.ClassDeleted(label=label, items=count))


async def delete_item(request: Request) -> Response:
    """DELETE /v1/gallery/{id}: erase one item."""
    query_of(request, NoQuery)
    engine, identifier = engine_of(request), request.path_params["id"]
    if not await asyncio.to_thread(engine.live_gallery.remove, [identifier]):
        raise NotFoundError("the gallery has no such item", param="id")
    audit(request, "delete", identifier, 1)
    return await json_answer(1, lambda: schemas.ItemDeleted(id=identifier))


async def swap(request: Request) -> Response:
    """POST /v1/bundle: serve another bundle of the same gallery."""
    query_of(request, NoQuery)
    try:
        asked = schemas.BundleBody.model_validate_json(await read_body(request, engine_of(request).limits))
    except ValidationError as error:
        param, message = first_complaint(error)
        raise BadRequestError(f"{param or 'the body'}: {message}", param=param) from error
    swapper: Swapper = request.app.state.swapper
    # Goes on although the client may leave, for the other workers follow what has been begun.
    before, now = await asyncio.to_thread(swapper.swap, asked.bundle)
    audit(request, "swap", now.id, 0)
    content = to_json(schemas.Swapped(id=now.id, name=now.name, previous=before.id))
    return Response(content, media_type="application/json")


async def _read_examples(request: Request, engine: Engine) -> Examples:
    label, key = _label_of(request), _key_of(request)
    query = query_of(request, schemas.ExamplesQuery)
    # Without a size arrays are refused: what is kept is the image as it was sent.
    images, body = await read_sent(request, engine.limits, schemas.ExamplesBody)
    note_images(request.scope, len(images))
    if body is not None:
        check_model(body.model, engine)
        given = body.model_fields_set & schemas.ExamplesQuery.model_fields.keys()
        query = query.model_copy(update={name: getattr(body, name) for name in given})
    return Examples(label, images, check_metadata(query.metadata, len(images)), query.partial, key)


def _label_of(request: Request) -> str:
    label: str = request.path_params["label"]
    try:
        # What was no UTF-8 has been replaced on its way here.
        return check_label(label.replace("\ufffd", "\0"))
    except DataError as error:
        raise BadRequestError(str(error), param="label") from error


def _key_of(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= KEY_LENGTH:
        raise BadRequestError(
            f"an Idempotency-Key has 1 to {KEY_LENGTH} characters: use a random UUID", param="idempotency-key"
        )
    return hashlib.sha256(key.encode()).hexdigest()
