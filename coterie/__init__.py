"""The core of Coterie: images, bundles, encoders, galleries and the open-set classifier.

Nothing here imports torch or bentoml, and heavy modules load on first use, so that `import coterie` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.bundle import Bundle

__all__ = ["Bundle"]


def __getattr__(name: str) -> Any:
    if name == "Bundle":
        from coterie.bundle import Bundle

        return Bundle
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")
