"""Requests and answers to show: handwritten digits, as `coterie demo` serves them.

The tests send every request to an application and hold its answer against the one that stands here.
"""

from typing import Any

__all__: list[str] = []

# Scikit-learn's digits 990 and 1047, 8×8 pixels.
THREE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAQUlEQVR42mNgYEi4f96AgYGBgWG/gsF9BghoOA+h9/83"
    "gIsIMDAwCBQwMBSsZ2BiUIhXYGBQYGBgYAi4f/99AgMA+lEOhrxPJrcAAAAASUVORK5CYII="
)
EIGHT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAQklEQVR42gXBURlAMBgAwPtGABFEWAQaaKDKGojEqycaTIP9"
    "DeYOtReMzOtBSVw59heW1jegVgyUiDvgcWYSU/PxA6BVEttZlf6nAAAAAElFTkSuQmCC"
)
# The start of the sha256 of the second one's bytes.
ITEM = "e3cf1d44efd50341f99d7ae1"
BUNDLE_ID = "sha256:ea51f1273684fbc125a5d0826808c0112914e31e88122a316515f190602fe1c9"
PREVIOUS_ID = "sha256:86053cd905b27ae9f84c333b01dc2f0b06161b530c1d0985688795329cc5326b"

EMBEDDINGS_BODY = {"input": [THREE], "model": "digits", "encoding_format": "base64"}
CLASSIFY_BODY = {"input": [THREE, EIGHT], "false_reject": 0.05, "top": 2, "neighbors": 1}
SEARCH_BODY = {"input": THREE, "k": 1, "label": ["3", "5"]}
VERIFY_BODY = {"input": THREE, "label": "3", "false_reject": 0.01}
EXAMPLES_BODY = {"input": [EIGHT], "metadata": {"source": "scanner 2"}}
BUNDLE_BODY = {"bundle": "coterie-bundle:86053cd905b2"}
STRINGS = {"images": [THREE]}

NEIGHBOR = {
    "id": "22d7762463f458f241dca14c",
    "label": "3",
    "similarity": 0.91802,
    "metadata": {"row": 329},
    "thumbnail": "/v1/gallery/22d7762463f458f241dca14c/thumbnail",
}
DECIDED_BY = {"calibration": "0049d013c27c", "snapshot": 0}

INDEX = {"service": "coterie", "model": "digits", "bundle": BUNDLE_ID, "routes": ["POST /v1/classify"]}
EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": "zczMPgAAAD8AAIC+ZmZmPw=="}],
    "model": "digits",
    "usage": {"prompt_tokens": 0, "total_tokens": 0},
}
CLASSIFIED: dict[str, Any] = {
    "object": "list",
    "bundle": BUNDLE_ID,
    "data": [
        {
            "object": "classification",
            "index": 0,
            "label": "3",
            "known": True,
            "probability": 0.9871,
            "threshold": 0.5902,
            "similarity": 0.8411,
            "classes": [
                {"label": "3", "probability": 0.9871, "cluster_similarity": 0.7642},
                {"label": "2", "probability": 0.0052, "cluster_similarity": 0.1913},
            ],
            "neighbors": [NEIGHBOR],
            **DECIDED_BY,
        },
        {
            "object": "classification",
            "index": 1,
            "label": None,
            "known": False,
            "probability": 0.4417,
            "threshold": 0.5902,
            "similarity": 0.4603,
            "classes": [
                {"label": "3", "probability": 0.4417, "cluster_similarity": 0.2952},
                {"label": "2", "probability": 0.3184, "cluster_similarity": 0.1792},
            ],
            "neighbors": [NEIGHBOR | {"similarity": 0.58668}],
            **DECIDED_BY,
        },
    ],
}
SEARCHED = {
    "object": "list",
    "bundle": BUNDLE_ID,
    "data": [{"object": "neighbors", "index": 0, "neighbors": [NEIGHBOR], "snapshot": 0}],
}
VERIFIED = {
    "object": "list",
    "bundle": BUNDLE_ID,
    "data": [
        {
            "object": "verification",
            "index": 0,
            "label": "3",
            "match": True,
            "similarity": 0.8411,
            "threshold": 0.4906,
            **DECIDED_BY,
        }
    ],
}
MANIFEST = {
    "format": 2,
    "id": BUNDLE_ID,
    "name": "digits",
    "encoder": {
        "input_size": [16, 16],
        "resize": "crop",
        "crop_fraction": 1.0,
        "interpolation": "bilinear",
        "background": [255, 255, 255],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "embedding_dim": 32,
        "precision": "fp32",
    },
    "classes": ["0", "1", "2", "3", "4", "5", "6", "7"],
    "gallery_size": 480,
    "calibration": {
        "temperature": 0.1,
        "vote_weight": 6.4401,
        "cluster_weight": 3.944,
        "n_neighbors": 20,
        "neighbor_share": 0.5,
        "typical_gap": 0.2105,
        "limits": {"0.01": 0.8161, "0.02": 0.7978, "0.05": 0.6398, "0.1": 0.4906, "0.2": 0.3615},
        "images": 320,
        "ece": 0.0222,
        "ece_of_vote": 0.0207,
        "left_out_auroc": {"0": 0.9796, "0.5": 0.993, "1": 0.9916},
    },
    "accuracy": {},
    "provenance": {"made_by": "coterie 0.1.0"},
    "files": {
        "model.onnx": {"sha256": "86053cd905b27ae9f84c333b01dc2f0b06161b530c1d0985688795329cc5326b", "size": 34408}
    },
}
SWAPPED = {"object": "bundle", "id": PREVIOUS_ID, "name": "digits", "previous": BUNDLE_ID}
MODELS = {"object": "list", "data": [{"id": "digits", "object": "model", "created": 0, "owned_by": "coterie"}]}
CLASSES = {
    "object": "list",
    "bundle": BUNDLE_ID,
    "data": [
        {"object": "class", "label": "0", "count": 60, "enrolled": 0, "radius": 0.1756},
        {"object": "class", "label": "8", "count": 5, "enrolled": 5, "radius": 0.2643},
    ],
}
ENROLLED = {"object": "list", "data": [{"object": "gallery.item", "index": 0, "id": ITEM, "label": "8"}]}
INVALID_IMAGE = {
    "message": "image 0: neither a data URI nor base64",
    "type": "invalid_request_error",
    "param": "input[0]",
    "code": "invalid_image",
}
NOT_ENROLLED = {"object": "list", "data": [{"object": "error", "index": 0, "error": INVALID_IMAGE}]}
ITEM_ENTRY = {
    "object": "gallery.item",
    "id": ITEM,
    "label": "8",
    "metadata": {"source": "scanner 2"},
    "enrolled": True,
    "thumbnail": f"/v1/gallery/{ITEM}/thumbnail",
}
ITEMS = {"object": "list", "data": [ITEM_ENTRY]}
CLASS_DELETED = {"object": "class.deleted", "label": "8", "deleted": True, "items": 5}
ITEM_DELETED = {"object": "gallery.item.deleted", "id": ITEM, "deleted": True}
VECTORS = [[0.4, 0.5, -0.25, 0.9]]
