"""Routes that show what is served: the bundle, its classes and the gallery's items."""

import asyncio
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from serving import schemas
from serving.answers import json_answer
from serving.changing_schemas import ItemEntry, ItemList, ItemsQuery
from serving.engine import Engine
from serving.errors import NotFoundError
from serving.limits import check_count
from serving.requests import engine_of, query_of

__all__ = ["bundle", "classes", "item", "items", "models", "thumbnail"]


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
    clusters, enrolled = await asyncio.to_thread(
        lambda: (engine.gallery().clusters, engine.live_gallery.enrolled_counts())
    )
    rows = zip(clusters.labels, clusters.counts.tolist(), clusters.reaches.tolist(), strict=True)
    return await json_answer(
        len(clusters),
        lambda: schemas.ClassList(
            bundle=engine.manifest.id,
            data=[
                schemas.ClassEntry(label=label, count=count, enrolled=enrolled.get(label, 0), radius=radius)
                for label, count, radius in rows
            ],
        ),
    )


async def items(request: Request) -> Response:
    """GET /v1/gallery?id=…&id=…: those of the items that are there, in the order asked for."""
    query, engine = query_of(request, ItemsQuery), engine_of(request)
    check_count(len(query.id), engine.limits, of="ids", param="id")
    found = await asyncio.to_thread(_items, engine, query.id)
    return await json_answer(len(found), lambda: ItemList(data=found))


async def item(request: Request) -> Response:
    """GET /v1/gallery/{id}: one item."""
    query_of(request, schemas.NoQuery)
    found = await asyncio.to_thread(_items, engine_of(request), [request.path_params["id"]])
    if not found:
        raise NotFoundError("the gallery has no such item", param="id")
    return await json_answer(1, lambda: found[0])


def _items(engine: Engine, ids: list[str]) -> list[ItemEntry]:
    snapshot, gallery = engine.gallery(), engine.live_gallery
    items = snapshot.items
    return [
        ItemEntry(
            id=identifier,
            label=items.label(row),
            metadata=items.metadata[row],
            enrolled=gallery.is_enrolled(identifier),
            thumbnail=f"/v1/gallery/{quote(identifier, safe='')}/thumbnail" if items.thumbnails[row] else None,
        )
        for identifier in dict.fromkeys(ids)
        if (row := snapshot.rows.get(identifier)) is not None
    ]


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
