"""A client of a running service, sync and async: `Client` and `AsyncClient`, with the same methods.

Many images go in several requests, a few at a time. A request that is refused for want of room (429), or while the
service is not there (503, a broken connection), is made again after a while: all of them may be, for questions change
nothing, and changes carry a key by which the service knows them again.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from coterie import calls
from coterie.calls import Call, ClassInfo, EnrolledItem, Enrolment, Images, Item, Job, RefusedImage, Swapped
from coterie.connection import LOST, Connection, Retries

if TYPE_CHECKING:
    from coterie.bundle import Manifest
    from coterie.classifier import Classification, Neighbor, Verification

__all__ = [
    "AsyncClient",
    "ClassInfo",
    "Client",
    "EnrolledItem",
    "Enrolment",
    "Item",
    "RefusedImage",
    "Retries",
    "Swapped",
]

Entry = TypeVar("Entry")
Result = TypeVar("Result")


class Client(Connection):
    """Speaks to the service at `url`; close it, or use it as a context manager. Safe for many threads.

    Args:
        url: such as http://127.0.0.1:3000.
        key: an API key; else what COTERIE_KEY says.
        batch: images in one request; concurrency: requests at a time.
        timeout: seconds for an answer.
        retries: how often and when a request is made again.
        transport: what carries requests, for tests.

    Every method raises ServiceError if the service refuses or cannot be reached.

    Example:
        with Client("http://127.0.0.1:3000") as client:
            client.enroll("boot", ["1.jpg", "2.jpg"])
            print(client.classify(["new.jpg"])[0].label)
    """

    def __init__(
        self, url: str, key: str | None = None, *, transport: httpx.BaseTransport | None = None, **options: Any
    ) -> None:
        super().__init__(url, key, **options)
        self._http = httpx.Client(transport=transport, **self._options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def embed(self, images: Images) -> NDArray[np.float32]:
        """Embeddings, float32 (n, d) of unit length.

        Args:
            images: paths, encoded bytes, Pillow images or uint8 arrays; or one array (n, h, w, 3) of the encoder's
                size, which goes as it is.
        """
        return self._run(calls.embed(images, self.batch))

    def classify(
        self,
        images: Images,
        *,
        false_reject: float = 0.05,
        top: int = 5,
        neighbors: int = 5,
        k: int | None = None,
        partial: bool = False,
    ) -> "list[Classification | Any]":
        """Label or unknown for each image; see `coterie.classifier.classify`.

        Args:
            k: how many gallery items vote, else as many as the bundle is calibrated with.
            partial: let a `RefusedImage` stand in the place of an image that cannot be used, instead of an error for
                all; so do the other methods that ask.
        """
        job = calls.classify(
            images, self.batch, false_reject=false_reject, top=top, neighbors=neighbors, k=k, partial=partial
        )
        return self._run(job)

    def search(
        self,
        images: Images,
        *,
        k: int = 10,
        labels: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> "list[list[Neighbor] | Any]":
        """The gallery items nearest to each image, of these classes and with these values in their metadata."""
        job = calls.search(images, self.batch, k=k, labels=labels, metadata=metadata or {}, partial=partial)
        return self._run(job)

    def verify(
        self, images: Images, label: str, *, false_reject: float = 0.05, partial: bool = False
    ) -> "list[Verification | Any]":
        """Whether each image belongs to the class."""
        job = calls.verify(images, self.batch, label=label, false_reject=false_reject, partial=partial)
        return self._run(job)

    def enroll(
        self,
        label: str,
        images: Images,
        *,
        metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        partial: bool = False,
        key: str | None = None,
    ) -> Enrolment:
        """Add examples of a class; durable when this returns.

        Args:
            metadata: for all images, or one for each.
            partial: enrol those that can be used, though others cannot.
            key: by which the service knows the same request again; else a random one.
        """
        return self._run(calls.enroll(label, images, self.batch, metadata=metadata, partial=partial, key=key))

    def forget(self, label: str) -> int:
        """Erase a class; how many items went, 0 if there is none or an earlier try has erased it."""
        return self._send(calls.forget(label))

    def classes(self) -> list[ClassInfo]:
        """The classes, with counts and radii."""
        return self._send(calls.classes())

    def item(self, identifier: str) -> Item | None:
        """One item of the gallery, if it is there."""
        return next(iter(self.items([identifier])), None)

    def items(self, identifiers: Sequence[str]) -> list[Item]:
        """Those of the items that are there."""
        return self._run(calls.items(identifiers, self.batch))

    def delete(self, identifier: str) -> bool:
        """Erase one item; False if it is not there, or an earlier try has erased it."""
        return self._send(calls.delete(identifier))

    def bundle(self) -> "Manifest":
        """The manifest of what is served."""
        return self._send(calls.bundle())

    def swap(self, bundle: str) -> Swapped:
        """Serve another bundle: a tag of BentoML's model store, or a path below the service's COTERIE_BUNDLES."""
        return self._send(calls.swap(bundle))

    def _run(self, job: Job[Entry, Result]) -> Result:
        if len(job.calls) < 2:
            return job.join([self._send(call) for call in job.calls])
        with ThreadPoolExecutor(min(self.concurrency, len(job.calls))) as pool:
            try:
                return job.join(list(pool.map(self._send, job.calls)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, call: Call[Entry]) -> Entry:
        body, done = call.body(), 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = self._http.request(**self._request(call, body))
            except LOST as error:
                outcome = error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._unreachable(error) from error
            seconds = self._pause(call, outcome, done)
            if seconds is None:
                return self._result(call, outcome)
            time.sleep(seconds)
            done += 1


class AsyncClient(Connection):
    """`Client` for asyncio: the same arguments, and the same methods to be awaited.

    Example:
        async with AsyncClient("http://127.0.0.1:3000") as client:
            answers = await client.classify(["new.jpg"])
    """

    def __init__(
        self, url: str, key: str | None = None, *, transport: httpx.AsyncBaseTransport | None = None, **options: Any
    ) -> None:
        super().__init__(url, key, **options)
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def embed(self, images: Images) -> NDArray[np.float32]:
        """See `Client.embed`."""
        return await self._run(calls.embed(images, self.batch))

    async def classify(
        self,
        images: Images,
        *,
        false_reject: float = 0.05,
        top: int = 5,
        neighbors: int = 5,
        k: int | None = None,
        partial: bool = False,
    ) -> "list[Classification | Any]":
        """See `Client.classify`."""
        job = calls.classify(
            images, self.batch, false_reject=false_reject, top=top, neighbors=neighbors, k=k, partial=partial
        )
        return await self._run(job)

    async def search(
        self,
        images: Images,
        *,
        k: int = 10,
        labels: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> "list[list[Neighbor] | Any]":
        """See `Client.search`."""
        job = calls.search(images, self.batch, k=k, labels=labels, metadata=metadata or {}, partial=partial)
        return await self._run(job)

    async def verify(
        self, images: Images, label: str, *, false_reject: float = 0.05, partial: bool = False
    ) -> "list[Verification | Any]":
        """See `Client.verify`."""
        job = calls.verify(images, self.batch, label=label, false_reject=false_reject, partial=partial)
        return await self._run(job)

    async def enroll(
        self,
        label: str,
        images: Images,
        *,
        metadata: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        partial: bool = False,
        key: str | None = None,
    ) -> Enrolment:
        """See `Client.enroll`."""
        return await self._run(calls.enroll(label, images, self.batch, metadata=metadata, partial=partial, key=key))

    async def forget(self, label: str) -> int:
        """See `Client.forget`."""
        return await self._send(calls.forget(label))

    async def classes(self) -> list[ClassInfo]:
        """See `Client.classes`."""
        return await self._send(calls.classes())

    async def item(self, identifier: str) -> Item | None:
        """See `Client.item`."""
        return next(iter(await self.items([identifier])), None)

    async def items(self, identifiers: Sequence[str]) -> list[Item]:
        """See `Client.items`."""
        return await self._run(calls.items(identifiers, self.batch))

    async def delete(self, identifier: str) -> bool:
        """See `Client.delete`."""
        return await self._send(calls.delete(identifier))

    async def bundle(self) -> "Manifest":
        """See `Client.bundle`."""
        return await self._send(calls.bundle())

    async def swap(self, bundle: str) -> Swapped:
        """See `Client.swap`."""
        return await self._send(calls.swap(bundle))

    async def _run(self, job: Job[Entry, Result]) -> Result:
        free = asyncio.Semaphore(self.concurrency)

        async def send(call: Call[Entry]) -> Entry:
            async with free:
                return await self._send(call)

        tasks = [asyncio.ensure_future(send(call)) for call in job.calls]
        try:
            return job.join(list(await asyncio.gather(*tasks)))
        finally:
            for task in tasks:
                task.cancel()

    async def _send(self, call: Call[Entry]) -> Entry:
        body, done = await asyncio.to_thread(call.body), 0
        while True:
            outcome: httpx.Response | Exception
            try:
                outcome = await self._http.request(**self._request(call, body))
            except LOST as error:
                outcome = error
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise self._unreachable(error) from error
            seconds = self._pause(call, outcome, done)
            if seconds is None:
                return self._result(call, outcome)
            await asyncio.sleep(seconds)
            done += 1
