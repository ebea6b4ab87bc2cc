"""Routes that show what is served: the bundle, its classes and the gallery's items."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from serving import schemas
from serving.answers import json_answer
from serving.errors import NotFoundError
from serving.requests import engine_of, query_of

__all__ = ["bundle", "classes", "models", "thumbnail"]


async def bundle(request: Request) -> Response:
    """GET /v1/bundle: the manifest."""
    query_of(request, schemas.NoQuery)
    return Response(engine_of(request).manifest.canonical(), media_type="application/json")


async def models(request: Request) -> Response:
    """GET /v1/models: OpenAI's list, with the one bundle that is served."""
    query_of(request, schemas.NoQuery)
    name = engine_of(request).manifest.name
    return await json_answer(1, lambda: schemas.ModelList(data=[schemas.ModelEntry(id=name)]))


async def classes(request: Request) -> Response:
    """GET /v1/classes: how many items each class has, and how far its cluster reaches."""
    query_of(request, schemas.NoQuery)
    engine = engine_of(request)
    clusters = (await asyncio.to_thread(engine.gallery)).clusters
    rows = zip(clusters.labels, clusters.counts.tolist(), clusters.reaches.tolist(), strict=True)
    return await json_answer(
        len(clusters),
        lambda: schemas.ClassList(
            bundle=engine.manifest.id,
            data=[schemas.ClassEntry(label=label, count=count, radius=radius) for label, count, radius in rows],
        ),
    )


async def thumbnail(request: Request) -> Response:
    """GET /v1/gallery/{id}/thumbnail: the small picture kept with a gallery item."""
    query_of(request, schemas.NoQuery)
    snapshot = await asyncio.to_thread(engine_of(request).gallery)
    row = snapshot.rows.get(request.path_params["id"])
    if row is None or not snapshot.items.thumbnails[row]:
        raise NotFoundError("the gallery has no such item, or no picture of it", param="id")
    return Response(
        snapshot.items.thumbnails[row], media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"}
    )
