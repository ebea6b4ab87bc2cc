"""The seam between what changes something and whoever keeps a record of it.

A route that has changed something says so here, once, when the change is durable. Middleware that keeps records finds
it as `scope["state"]["audit"]` when the route has answered; where it is missing, nothing was changed.
"""

import logging
from dataclasses import dataclass

from starlette.requests import Request

__all__ = ["Change", "audit"]

logger = logging.getLogger("coterie.serving")


@dataclass(frozen=True)
class Change:
    """What a request has changed.

    Attributes:
        action: enroll, forget, delete or swap; replay for what an earlier request of the same key has enrolled.
        target: the class's label, the item's id, or the bundle's id.
        count: of the items that came or went; 0 for a bundle.
    """

    action: str
    target: str
    count: int


def audit(request: Request, action: str, target: str, count: int) -> None:
    """Say what the request has changed."""
    request.state.audit = Change(action, target, count)
    logger.info("%s %r (%d)", action, target, count)
