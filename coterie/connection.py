"""How a client of a service sends: its settings, when it tries again, and how it makes errors of answers."""

import os
import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from coterie.calls import Call
from coterie.errors import ServiceError

__all__ = ["LOST", "Connection", "Retries"]

Entry = TypeVar("Entry")

AGAIN = frozenset({429, 503})
LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
POSITION = re.compile(r"input\[(\d+)\]")


@dataclass(frozen=True)
class Retries:
    """How often a request is made again, and after how long.

    Attributes:
        times: after the first; 0 for never.
        first: seconds before the first of them; each later one waits twice as long, less a random part up to half.
        longest: seconds, whatever the service asks for.
    """

    times: int = 5
    first: float = 0.5
    longest: float = 30.0

    def wait(self, done: int, response: httpx.Response | None) -> float | None:
        """Seconds until the next try after `done` retries; None if there is none."""
        if done >= self.times:
            return None
        asked = 0.0 if response is None else _retry_after(response.headers.get("retry-after", ""))
        # A random part, so that clients which were refused together do not come back together.
        return min(self.longest, max(asked, self.first * 2.0**done * random.uniform(0.5, 1)))


class Connection:
    """What both clients are told, and how they make errors of answers."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        batch: int = 32,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: Retries = Retries(),
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ServiceError(f"{url!r} is no address of a service: it begins with http:// or https://")
        self.url, self.batch, self.concurrency, self.retries = url.rstrip("/"), batch, concurrency, retries
        key = (key or os.environ.get("COTERIE_KEY") or "").strip()  # files end with a line's end
        if not (key.isascii() and key.isprintable()):
            raise ServiceError("the API key has characters that no key has: copy it again")
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout,
            "headers": {"authorization": f"Bearer {key}"} if key else {},
        }
        self._timeout = timeout

    def _request(self, call: Call[Entry], body: dict[str, Any]) -> dict[str, Any]:
        return {
            "method": call.method,
            "url": call.path,
            "params": call.params,
            "headers": call.headers,
            "timeout": call.seconds or self._timeout,
            **body,
        }

    def _result(self, call: Call[Entry], response: httpx.Response | Exception) -> Entry:
        assert isinstance(response, httpx.Response)
        if response.status_code == 404 and call.missing is not None and _said(response).get("code") == "not_found":
            return call.missing
        if not response.is_success:
            raise self._refusal(call, response)
        try:
            return call.read(response)
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(f"{self.url} does not answer as a Coterie service does ({error!r})") from error

    def _pause(self, call: Call[Entry], outcome: httpx.Response | Exception, done: int) -> float | None:
        """Seconds until the call is to be made again after `done` retries; None if its answer is to be taken.

        Raises:
            ServiceError: it has been made often enough.
        """
        response = outcome if isinstance(outcome, httpx.Response) else None
        if response is not None and response.status_code not in AGAIN:
            return None
        seconds = self.retries.wait(done, response)
        if seconds is None:
            raise self._refusal(call, response) if response is not None else self._unreachable(outcome)
        return seconds

    def _refusal(self, call: Call[Entry], response: httpx.Response) -> ServiceError:
        said = _said(response)
        message, param = said.get("message") or f"{self.url} answered {response.status_code}", said.get("param")
        index = None
        if found := POSITION.fullmatch(param or ""):
            # The service counts within one request.
            index = call.start + int(found[1])
            message = message.replace(f"image {found[1]}:", f"image {index}:", 1)
        return ServiceError(message, status=response.status_code, code=said.get("code"), index=index)

    def _unreachable(self, error: object) -> ServiceError:
        reason = str(error) or type(error).__name__
        return ServiceError(f"{self.url} cannot be reached ({reason}): is the service running there?")


def _said(response: httpx.Response) -> dict[str, Any]:
    """The error that an answer names."""
    try:
        said = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks to wait, given as such or as a date."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0
