"""Routes that take images and say what they show; nothing is changed here."""

from starlette.requests import Request
from starlette.responses import Response

from serving import schemas
from serving.answers import classification_list, embedding_list, json_answer
from serving.engine import ClassifyOptions
from serving.errors import BadRequestError
from serving.inputs import read_images
from serving.requests import check_model, engine_of, in_time, query_of

__all__ = ["classify", "embeddings"]


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: one embedding per image, in OpenAI's shape."""
    engine = engine_of(request)
    query = query_of(request, schemas.EmbeddingsQuery)
    images, body = await read_images(request, engine.limits, schemas.EmbeddingsBody)
    encoding_format = query.encoding_format
    if body is not None:
        check_model(body.model, engine)
        if body.dimensions not in (None, engine.manifest.encoder.embedding_dim):
            raise BadRequestError(
                f"this encoder's embeddings have {engine.manifest.encoder.embedding_dim} dimensions", param="dimensions"
            )
        encoding_format = body.encoding_format or encoding_format
    vectors = await in_time(request, engine.embed(images))
    return await json_answer(len(vectors), lambda: embedding_list(vectors, encoding_format or "float", engine))


async def classify(request: Request) -> Response:
    """POST /v1/classify: label or unknown for each image."""
    engine = engine_of(request)
    query = query_of(request, schemas.ClassifyQuery)
    images, body = await read_images(request, engine.limits, schemas.ClassifyBody)
    if body is not None:
        check_model(body.model, engine)
    options = ClassifyOptions(**query.model_dump())
    answers = await in_time(request, engine.classify(images, options))
    return await json_answer(len(answers), lambda: classification_list(answers, engine))
