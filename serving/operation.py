"""The words in which `serving.operations` speaks of a route."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from serving import schemas

__all__ = ["Answer", "Operation", "Parameter", "Sample"]


@dataclass(frozen=True)
class Answer:
    """An answer that is no error: its schema where it is JSON, else its media type alone.

    Attributes:
        also: further media types that the same answer may come in.
    """

    description: str
    schema: type[BaseModel] | Mapping[str, Any] | None = None
    example: Any = None
    media_type: str = "application/json"
    also: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A parameter that is not in the query's schema."""

    name: str
    place: str
    description: str
    example: str
    required: bool = False


@dataclass(frozen=True)
class Sample:
    """A command that a shell runs: `curl -s` and these arguments, in a folder with one.jpg, two.png and pixels.npy."""

    title: str
    arguments: str


@dataclass(frozen=True)
class Operation:
    """What is said of one method of one path.

    Attributes:
        description: more than the summary.
        query, body: schemas of the query and of a JSON body.
        images, arrays: whether the body may also be images, and pixels as an array.
        errors: codes of `serving.problems` beside those that any request may get.
        summary: of a route that has no docstring of ours.
        open: whether it is answered without a key.
    """

    tag: str
    answers: Mapping[int, Answer]
    description: str = ""
    query: type[BaseModel] = schemas.NoQuery
    parameters: tuple[Parameter, ...] = ()
    body: type[BaseModel] | Mapping[str, Any] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    images: bool = False
    arrays: bool = False
    errors: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    summary: str = ""
    open: bool = False
