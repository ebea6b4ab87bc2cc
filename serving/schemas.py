"""The service's JSON, in and out."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = [
    "ClassEntry",
    "ClassList",
    "ClassScoreEntry",
    "ClassificationEntry",
    "ClassificationList",
    "ClassifyBody",
    "ClassifyQuery",
    "EmbeddingEntry",
    "EmbeddingList",
    "EmbeddingsBody",
    "EmbeddingsQuery",
    "ErrorAnswer",
    "ErrorEntry",
    "ModelEntry",
    "ModelList",
    "NeighborEntry",
    "NoQuery",
    "Usage",
    "first_complaint",
]


def first_complaint(error: ValidationError) -> tuple[str | None, str]:
    """The name of the first wrong value, None for the whole, and what is wrong with it."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0])[:100] if first["loc"] else None
    return name, "there is no such parameter" if first["type"] == "extra_forbidden" else first["msg"]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NoQuery(_Request):
    """Query of a route that takes none."""


class ClassifyQuery(_Request):
    """Query of /v1/classify.

    Attributes:
        false_reject: share of known images that may be called unknown; one of those the bundle is calibrated for.
        top: how many classes to list at most.
        neighbors: how many gallery items to list.
    """

    false_reject: float = Field(default=0.05, gt=0, lt=1)
    top: int = Field(default=5, ge=0, le=1000)
    neighbors: int = Field(default=5, ge=0, le=1000)


class EmbeddingsQuery(_Request):
    """Query of /v1/embeddings, for bodies other than JSON."""

    encoding_format: Literal["float", "base64"] | None = None


class ClassifyBody(_Request):
    """JSON body of /v1/classify: one or many images as data URIs or base64."""

    input: str | list[str]
    model: str | None = None

    def images(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class EmbeddingsBody(ClassifyBody):
    """JSON body of /v1/embeddings, as OpenAI's clients send it; base64 is little-endian float32."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class EmbeddingEntry(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """OpenAI's clients expect it; images have no tokens."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingEntry]
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


class ClassificationList(BaseModel):
    object: Literal["list"] = "list"
    bundle: str
    data: list[ClassificationEntry]


class ClassEntry(BaseModel):
    """A class; `radius` is the typical gap, 1 − similarity, of its images to its widest prototype."""

    object: Literal["class"] = "class"
    label: str
    count: int
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


class ErrorEntry(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    error: ErrorEntry
