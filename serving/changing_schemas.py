"""JSON of the routes that change something, in and out."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serving.schemas import AskingQuery, ErrorItem, ImagesBody

__all__ = [
    "BundleBody",
    "ClassDeleted",
    "ExamplesBody",
    "ExamplesQuery",
    "ItemDeleted",
    "ItemEntry",
    "ItemList",
    "ItemsQuery",
    "NewItem",
    "NewItemList",
    "Swapped",
]

Metadata = dict[str, Any]


def _parsed(value: Any) -> Any:
    """What a query says in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error


class ExamplesQuery(AskingQuery):
    """Query of /v1/classes/{label}/examples.

    Attributes:
        metadata: an object for all images, or a list with one for each; in the query as JSON.
    """

    metadata: Annotated[Metadata | list[Metadata], BeforeValidator(_parsed)] = Field(default_factory=dict)


class ExamplesBody(ImagesBody, ExamplesQuery):
    """JSON body of /v1/classes/{label}/examples; what it says counts more than the query."""


class ItemsQuery(BaseModel):
    """Query of /v1/gallery: `id`, as often as there are items to ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[list[str], BeforeValidator(lambda one: [one] if isinstance(one, str) else one)]


class BundleBody(BaseModel):
    """JSON body of POST /v1/bundle: a tag of BentoML's model store, or a path below COTERIE_BUNDLES."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str


class NewItem(BaseModel):
    """An image that was enrolled; the `index`-th of its request."""

    object: Literal["gallery.item"] = "gallery.item"
    index: int
    id: str
    label: str


class NewItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[NewItem | ErrorItem]


class ItemEntry(BaseModel):
    """An item of the gallery; `enrolled` tells those that came after the bundle was made."""

    object: Literal["gallery.item"] = "gallery.item"
    id: str
    label: str
    metadata: Metadata
    enrolled: bool
    thumbnail: str | None


class ItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ItemEntry]


class ItemDeleted(BaseModel):
    object: Literal["gallery.item.deleted"] = "gallery.item.deleted"
    id: str
    deleted: Literal[True] = True


class ClassDeleted(BaseModel):
    """A class that was forgotten, and how many items went with it."""

    object: Literal["class.deleted"] = "class.deleted"
    label: str
    deleted: Literal[True] = True
    items: int


class Swapped(BaseModel):
    """The bundle that is served from now on, and the id of the one before."""

    object: Literal["bundle"] = "bundle"
    id: str
    name: str
    previous: str
