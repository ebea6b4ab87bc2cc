"""The service's JSON, in and out."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "AnswerList",
    "AskingQuery",
    "ClassEntry",
    "ClassList",
    "ClassScoreEntry",
    "ClassificationEntry",
    "Classified",
    "ClassifyBody",
    "ClassifyQuery",
    "ClassifyStringsBody",
    "EmbeddingEntry",
    "EmbeddingList",
    "EmbeddingsBody",
    "EmbeddingsQuery",
    "ErrorAnswer",
    "ErrorEntry",
    "ErrorItem",
    "ImagesBody",
    "Index",
    "ModelEntry",
    "ModelList",
    "NeighborEntry",
    "NeighborsEntry",
    "NoQuery",
    "SearchBody",
    "SearchQuery",
    "Searched",
    "StringsBody",
    "Usage",
    "VerificationEntry",
    "Verified",
    "VerifyBody",
    "VerifyQuery",
    "first_complaint",
]


METADATA = "metadata."


def first_complaint(error: ValidationError) -> tuple[str | None, str]:
    """The name of the first wrong value, None for the whole, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])[:100] if first["loc"] else None
    said = first["msg"].removeprefix("Value error, ")
    return name, "there is no such parameter" if first["type"] == "extra_forbidden" else said


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoQuery(_Request):
    """Query of a route that takes none."""


class AskingQuery(_Request):
    """Query of every route that asks something about images.

    Attributes:
        on_error: what an image that cannot be used does: fail the request, or stand in the answer as an error.
    """

    on_error: Literal["fail", "partial"] = "fail"

    @property
    def partial(self) -> bool:
        return self.on_error == "partial"


class EmbeddingsQuery(AskingQuery):
    """Query of /v1/embeddings.

    Attributes:
        encoding_format: float unless given; base64 is little-endian float32.
    """

    encoding_format: Literal["float", "base64"] | None = None


class ClassifyQuery(AskingQuery):
    """Query of /v1/classify.

    Attributes:
        false_reject: share of known images that may be called unknown; one of those the bundle is calibrated for.
        top: how many classes to list at most.
        neighbors: how many gallery items to list.
        k: how many gallery items vote; those that the bundle is calibrated with unless given.
    """

    false_reject: float = Field(default=0.05, gt=0, lt=1)
    top: int = Field(default=5, ge=0, le=1000)
    neighbors: int = Field(default=5, ge=0, le=1000)
    k: int | None = Field(default=None, ge=1, le=1000)


class _Search(AskingQuery):
    """What both bodies and queries of /v1/search say.

    Attributes:
        k: how many gallery items to list.
        label: only items of these classes; may be repeated.
        metadata: only items with all these values.
    """

    k: int = Field(default=10, ge=1, le=1000)
    label: Annotated[list[str], BeforeValidator(lambda one: [one] if isinstance(one, str) else one)] = []
    metadata: dict[str, Any] = {}


class SearchQuery(_Search):
    """Query of /v1/search.

    Attributes:
        metadata: only items with all these values: `metadata.key=value`, the value as JSON or plain text.
    """

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: dict[str, Any]) -> dict[str, Any]:
        metadata = {name: value for name, value in values.items() if name.startswith(METADATA)}
        if not metadata:
            return values
        rest = {name: value for name, value in values.items() if name not in metadata}
        return rest | {"metadata": {name.removeprefix(METADATA): _value(value) for name, value in metadata.items()}}


class VerifyQuery(AskingQuery):
    """Query of /v1/verify.

    Attributes:
        label: the class that every image is held against.
        false_reject: share of its images that may be refused; one of those the bundle is calibrated for.
    """

    label: str | None = None
    false_reject: float = Field(default=0.05, gt=0, lt=1)


class ImagesBody(_Request):
    """JSON body with images.

    Attributes:
        input: one or many images as data URIs or base64.
        model: name or id of the bundle; another one than is served is refused.
    """

    input: str | list[str]
    model: str | None = None

    def images(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class EmbeddingsBody(ImagesBody, EmbeddingsQuery):
    """JSON body of /v1/embeddings, as OpenAI's clients send it.

    Attributes:
        dimensions: the encoder's own, if at all.
        user: is ignored.
    """

    dimensions: int | None = None
    user: str | None = None


class StringsBody(BaseModel):
    """JSON body of BentoML's clients.

    Attributes:
        images: data URIs or base64.
    """

    model_config = ConfigDict(frozen=True)

    strings: list[str] = Field(alias="images")

    def images(self) -> list[str]:
        return self.strings


class ClassifyStringsBody(StringsBody):
    """JSON body of BentoML's clients for /classify.

    Attributes:
        false_reject, top, neighbors: as of /v1/classify.
    """

    false_reject: float = 0.05
    top: int = 5
    neighbors: int = 5


class ClassifyBody(ImagesBody, ClassifyQuery):
    """JSON body of /v1/classify; what it says counts more than the query."""


class SearchBody(ImagesBody, _Search):
    """JSON body of /v1/search, likewise; its metadata is an object."""


class VerifyBody(ImagesBody, VerifyQuery):
    """JSON body of /v1/verify, likewise."""


def _value(text: str | list[str]) -> Any:
    """A metadata value of the query: 7, true, null or "7" as JSON has them, anything else as it stands."""
    if isinstance(text, list):
        raise ValueError("give each metadata key once")
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


class ErrorEntry(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str


class ErrorAnswer(BaseModel):
    error: ErrorEntry


class ErrorItem(BaseModel):
    """What stands in the place of an image that failed, where the request wants errors so."""

    object: Literal["error"] = "error"
    index: int
    error: ErrorEntry


class EmbeddingEntry(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """OpenAI's clients expect it; images have no tokens."""

    model_config = ConfigDict(frozen=True)  # else every answer gets a deep copy of it

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingEntry | ErrorItem]
    model: str
    usage: Usage = Usage()


class ClassScoreEntry(BaseModel):
    label: str
    probability: float
    cluster_similarity: float


class NeighborEntry(BaseModel):
    id: str
    label: str
    similarity: float
    metadata: dict[str, Any]
    thumbnail: str


class ClassificationEntry(BaseModel):
    """One image's answer; `label` is null where it is not known, and `classes` lists the nearest all the same.

    Attributes:
        similarity: to the most probable class, its cluster and its nearest item joined; `threshold` is the least that
            is accepted.
        calibration, snapshot: by what it was decided: the calibration's id, and the gallery's last change.
    """

    object: Literal["classification"] = "classification"
    index: int
    label: str | None
    known: bool
    probability: float
    threshold: float
    similarity: float
    classes: list[ClassScoreEntry]
    neighbors: list[NeighborEntry]
    calibration: str
    snapshot: int


class NeighborsEntry(BaseModel):
    """The gallery items nearest to one image, most similar first."""

    object: Literal["neighbors"] = "neighbors"
    index: int
    neighbors: list[NeighborEntry]
    snapshot: int


class VerificationEntry(BaseModel):
    """Whether one image belongs to the class `label`; `similarity` to it must reach `threshold`."""

    object: Literal["verification"] = "verification"
    index: int
    label: str
    match: bool
    similarity: float
    threshold: float
    calibration: str
    snapshot: int


class AnswerList(BaseModel):
    """One answer for each image, in the order sent."""

    object: Literal["list"] = "list"
    bundle: str
    data: Sequence[ClassificationEntry | NeighborsEntry | VerificationEntry | ErrorItem]


class Classified(AnswerList):
    """Answer of /v1/classify."""

    data: list[ClassificationEntry | ErrorItem]


class Searched(AnswerList):
    """Answer of /v1/search."""

    data: list[NeighborsEntry | ErrorItem]


class Verified(AnswerList):
    """Answer of /v1/verify."""

    data: list[VerificationEntry | ErrorItem]


class Index(BaseModel):
    """What is served here, and where."""

    service: Literal["coterie"] = "coterie"
    model: str
    bundle: str
    routes: list[str]


class ClassEntry(BaseModel):
    """A class; `radius` is the typical gap, 1 − similarity, of its images to its widest prototype.

    Attributes:
        count, enrolled: its items, and those of them that came after the bundle was made.
    """

    object: Literal["class"] = "class"
    label: str
    count: int
    enrolled: int
    radius: float


class ClassList(BaseModel):
    object: Literal["list"] = "list"
    bundle: str
    data: list[ClassEntry]


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0  # bundles hold no times
    owned_by: str = "coterie"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]
