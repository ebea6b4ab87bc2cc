"""What the service says of each of its routes: the table that /openapi.json and /docs are made from.

Summaries are the routes' own docstrings, and schemas those of the code; here stands what neither can tell.
"""

from coterie.bundle import Manifest
from serving import changing_schemas as changing
from serving import samples, schemas
from serving.operation import Answer, Operation, Parameter, Sample
from serving.tensors import NPY

__all__ = ["BENTOML", "OPERATIONS"]

BODY = ("bad_request", "slow_body", "too_large", "unsupported_body")
GALLERY = ("gallery_busy", "gallery_unavailable")
IMAGES = (*BODY, "invalid_image", "overloaded", "encoder_failed", *GALLERY, "timed_out")
ASKING = ("not_found", *IMAGES, "invalid_tensor")
TIMES = ("x-queue-time", "x-inference-time")
VECTORS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}

LABEL = Parameter("label", "path", "The class: 1 to 128 bytes of UTF-8 without slash or control characters.", "8", True)
ITEM = Parameter("id", "path", "The item: the first 24 hexadecimal digits of its image's sha256.", samples.ITEM, True)
KEY = Parameter(
    "Idempotency-Key",
    "header",
    "1 to 200 characters, best a random UUID. The same request under the same key gets the first answer again for 24 "
    "hours, from any worker.",
    "5e0f3c1a-7d0b-4a43-9d53-2f6f6c1b8a01",
)


def _sent(path: str, *, arrays: bool = True) -> tuple[Sample, ...]:
    """One path with each kind of body."""
    return (
        Sample("one image", f"\"$URL{path}\" -H 'Content-Type: image/jpeg' --data-binary @one.jpg"),
        Sample("several files", f'"$URL{path}" -F file=@one.jpg -F file=@two.png'),
        *([Sample("pixels", f"\"$URL{path}\" -H 'Content-Type: {NPY}' --data-binary @pixels.npy")] if arrays else []),
    )


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/"): Operation(
        "Service",
        {
            200: Answer(
                "Name, bundle and routes; a page where HTML is asked for.",
                schemas.Index,
                samples.INDEX,
                also=("text/html",),
            )
        },
        samples=(Sample("the routes", '"$URL/"'),),
    ),
    ("GET", "/openapi.json"): Operation(
        "Service",
        {200: Answer("An OpenAPI 3.1 document.", {"type": "object"}, headers=("ETag",))},
        samples=(Sample("save it", '"$URL/openapi.json" -o openapi.json'),),
        open=True,
    ),
    ("GET", "/docs"): Operation(
        "Service", {200: Answer("A page.", media_type="text/html", headers=("ETag",))}, open=True
    ),
    ("GET", "/page/{name}"): Operation(
        "Service",
        {200: Answer("A script or a style.", media_type="text/css", also=("text/javascript",), headers=("ETag",))},
        parameters=(Parameter("name", "path", "The file's name.", "page.css", True),),
        errors=("not_found",),
        open=True,
    ),
    ("GET", "/metrics"): Operation(
        "Service",
        {200: Answer("Prometheus's text format.", media_type="text/plain")},
        samples=(Sample("the counts", '"$URL/metrics"'),),
    ),
    ("POST", "/v1/embeddings"): Operation(
        "Ask",
        {
            200: Answer(
                "One embedding for each image, in the order sent.",
                schemas.EmbeddingList,
                samples.EMBEDDINGS,
                also=(NPY,),
                headers=TIMES,
            )
        },
        "OpenAI's shape. With `Accept: application/x-npy` the answer is the bare float32 array N×D.",
        schemas.EmbeddingsQuery,
        body=schemas.EmbeddingsBody,
        example=samples.EMBEDDINGS_BODY,
        images=True,
        arrays=True,
        errors=ASKING,
        samples=(
            *_sent("/v1/embeddings"),
            Sample("as an array", f"\"$URL/v1/embeddings\" -H 'Accept: {NPY}' -F file=@one.jpg -o vectors.npy"),
        ),
    ),
    ("POST", "/v1/classify"): Operation(
        "Ask",
        {
            200: Answer(
                "One answer for each image, in the order sent.", schemas.Classified, samples.CLASSIFIED, headers=TIMES
            )
        },
        "`label` is null where `known` is false: the image belongs to no class at the asked rate.",
        schemas.ClassifyQuery,
        body=schemas.ClassifyBody,
        example=samples.CLASSIFY_BODY,
        images=True,
        arrays=True,
        errors=ASKING,
        samples=_sent("/v1/classify"),
    ),
    ("POST", "/v1/search"): Operation(
        "Ask",
        {
            200: Answer(
                "The nearest items for each image, in the order sent.",
                schemas.Searched,
                samples.SEARCHED,
                headers=TIMES,
            )
        },
        "Filters are exact: the nearest of the items that match are found, wherever they lie.",
        schemas.SearchQuery,
        body=schemas.SearchBody,
        example=samples.SEARCH_BODY,
        images=True,
        arrays=True,
        errors=ASKING,
        samples=_sent("/v1/search?k=3&label=3&label=5"),
    ),
    ("POST", "/v1/verify"): Operation(
        "Ask",
        {
            200: Answer(
                "One answer for each image, in the order sent.", schemas.Verified, samples.VERIFIED, headers=TIMES
            )
        },
        "`label` must be given, in the query or in a JSON body.",
        schemas.VerifyQuery,
        body=schemas.VerifyBody,
        example=samples.VERIFY_BODY,
        images=True,
        arrays=True,
        errors=ASKING,
        samples=_sent("/v1/verify?label=3"),
    ),
    ("POST", "/embed"): Operation(
        "BentoML's clients",
        {200: Answer("One embedding for each image.", VECTORS, samples.VECTORS, headers=TIMES)},
        body=schemas.StringsBody,
        example=samples.STRINGS,
        errors=IMAGES,
    ),
    ("POST", "/classify"): Operation(
        "BentoML's clients",
        {
            200: Answer(
                "Entries as those of /v1/classify.",
                {"type": "array", "items": schemas.ClassificationEntry},
                samples.CLASSIFIED["data"],
                headers=TIMES,
            )
        },
        body=schemas.ClassifyStringsBody,
        example=samples.STRINGS,
        errors=("not_found", *IMAGES),
    ),
    ("GET", "/v1/bundle"): Operation(
        "Bundle",
        {200: Answer("The manifest.", Manifest, samples.MANIFEST)},
        errors=("bad_request",),
        samples=(Sample("the manifest", '"$URL/v1/bundle"'),),
    ),
    ("POST", "/v1/bundle"): Operation(
        "Bundle",
        {200: Answer("The bundle that is served from now on.", changing.Swapped, samples.SWAPPED)},
        "The bundle is verified, loaded and warmed up beside the old one, and no request fails. Other workers follow "
        "within seconds.",
        body=changing.BundleBody,
        example=samples.BUNDLE_BODY,
        errors=("bad_request", "slow_body", "too_large", "conflict", "bundle_refused", "overloaded", *GALLERY),
    ),
    ("GET", "/v1/models"): Operation(
        "Bundle",
        {200: Answer("OpenAI's list, with one entry.", schemas.ModelList, samples.MODELS)},
        errors=("bad_request",),
        samples=(Sample("the models", '"$URL/v1/models"'),),
    ),
    ("GET", "/v1/classes"): Operation(
        "Gallery",
        {200: Answer("All classes.", schemas.ClassList, samples.CLASSES)},
        errors=("bad_request", *GALLERY),
        samples=(Sample("the classes", '"$URL/v1/classes"'),),
    ),
    ("POST", "/v1/classes/{label}/examples"): Operation(
        "Gallery",
        {
            201: Answer("What was enrolled, durable.", changing.NewItemList, samples.ENROLLED),
            200: Answer("Nothing was enrolled: no image could be used.", changing.NewItemList, samples.NOT_ENROLLED),
        },
        "The class is known to every worker at its next request. An image is one item: sent again under another label, "
        "it moves there.",
        changing.ExamplesQuery,
        (LABEL, KEY),
        changing.ExamplesBody,
        samples.EXAMPLES_BODY,
        images=True,
        errors=("not_found", "conflict", "idempotency_key_reused", *IMAGES),
        samples=_sent("/v1/classes/8/examples", arrays=False),
    ),
    ("DELETE", "/v1/classes/{label}"): Operation(
        "Gallery",
        {200: Answer("How many items went.", changing.ClassDeleted, samples.CLASS_DELETED)},
        "Items, pictures and images are erased from every file.",
        parameters=(LABEL,),
        errors=("bad_request", "not_found", *GALLERY),
        samples=(Sample("forget a class", '-X DELETE "$URL/v1/classes/8"'),),
    ),
    ("GET", "/v1/gallery"): Operation(
        "Gallery",
        {200: Answer("Those of the items that are there.", changing.ItemList, samples.ITEMS)},
        query=changing.ItemsQuery,
        errors=("bad_request", "too_large", *GALLERY),
        samples=(Sample("two items", f'"$URL/v1/gallery?id={samples.ITEM}&id=nowhere"'),),
    ),
    ("GET", "/v1/gallery/{id}"): Operation(
        "Gallery",
        {200: Answer("The item.", changing.ItemEntry, samples.ITEM_ENTRY)},
        parameters=(ITEM,),
        errors=("bad_request", "not_found", *GALLERY),
        samples=(Sample("an item", f'"$URL/v1/gallery/{samples.ITEM}"'),),
    ),
    ("DELETE", "/v1/gallery/{id}"): Operation(
        "Gallery",
        {200: Answer("It is gone.", changing.ItemDeleted, samples.ITEM_DELETED)},
        parameters=(ITEM,),
        errors=("bad_request", "not_found", *GALLERY),
        samples=(Sample("erase an item", f'-X DELETE "$URL/v1/gallery/{samples.ITEM}"'),),
    ),
    ("GET", "/v1/gallery/{id}/thumbnail"): Operation(
        "Gallery",
        {200: Answer("A WebP picture.", media_type="image/webp")},
        parameters=(ITEM,),
        errors=("bad_request", "not_found", *GALLERY),
        samples=(Sample("save it", f'"$URL/v1/gallery/{samples.ITEM}/thumbnail" -o thumbnail.webp'),),
    ),
}

# Answered by BentoML, beside the routes of the application.
BENTOML: dict[tuple[str, str], Operation] = {
    ("GET", "/schema.json"): Operation(
        "BentoML's clients",
        {200: Answer("BentoML's own description.", {"type": "object"})},
        summary="What BentoML's clients read first",
    ),
    ("GET", "/livez"): Operation(
        "Probes",
        {200: Answer("The process lives.", media_type="text/plain")},
        summary="Does it live",
        open=True,
    ),
    ("GET", "/healthz"): Operation(
        "Probes", {200: Answer("The same.", media_type="text/plain")}, summary="The same as /livez", open=True
    ),
    ("GET", "/readyz"): Operation(
        "Probes",
        {
            200: Answer("It answers.", media_type="text/plain"),
            503: Answer("It does not, at the moment.", media_type="text/plain"),
        },
        summary="Does the encoder answer",
        open=True,
    ),
}
