"""Another bundle takes the place of the one that is served; nothing asked meanwhile fails."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from starlette.testclient import TestClient

from coterie.bundle import MODEL, Bundle, write_bundle
from coterie.clusters import ClassClusters
from coterie.errors import BundleError, StoreError
from coterie.gallery import Snapshot
from coterie.items import GalleryItems, item_id
from serving import swapping
from serving.engine import Engine
from serving.pointer import bundle_to_serve, end_older_swap, pointer_file, read_pointer
from serving.routes import build_app
from serving.served import Served
from serving.swapping import Swapper

EIGHT = "/v1/classes/8/examples"


def turned(bundle: Bundle, path: Path, **changes: Any) -> Bundle:
    """The same bundle with another encoder, whose embeddings are those of the first, turned: all similarities stay."""
    dim = bundle.manifest.encoder.embedding_dim
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0].astype(np.float32)
    model = onnx.load(bundle.path / MODEL)
    (directions,) = (tensor for tensor in model.graph.initializer if tensor.name == "directions")
    directions.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(directions) @ turn, "directions"))
    base = bundle.base
    assert isinstance(base.items, GalleryItems) and isinstance(base.clusters, ClassClusters)
    items = replace(base.items, embeddings=base.items.embeddings @ turn)
    clusters = replace(base.clusters, prototypes=base.clusters.prototypes @ turn)
    return write_bundle(
        path,
        model=model.SerializeToString(),
        snapshot=Snapshot(items, clusters),
        card="# Turned digits\n",
        manifest=bundle.manifest.model_copy(update=changes),
    )


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `first`, which is the tiny bundle, `turned` and `stranger`, which is of another gallery."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(tiny_bundle.path, folder / "first")
    turned(tiny_bundle, folder / "turned")
    turned(tiny_bundle, folder / "stranger", name="other-digits")
    shutil.copytree(folder / "turned", folder / "damaged")
    content = bytearray((folder / "damaged" / MODEL).read_bytes())
    content[100] ^= 1
    (folder / "damaged" / MODEL).write_bytes(content)
    return folder


class Worker:
    """A process of the service, but for the process."""

    def __init__(self, configured: Path, state: Path, bundles: Path | None) -> None:
        opened = Bundle.open(configured, device="cpu")
        self.served = Served(self._load(bundle_to_serve(opened, state, Bundle.open), state))
        self.swapper = Swapper(
            self.served,
            opened.manifest,
            state,
            open_bundle=Bundle.open,
            load=lambda bundle: self._load(bundle, state),
            bundles=bundles,
        )
        app = build_app()
        app.state.served, app.state.swapper = self.served, self.swapper
        self.client = TestClient(app, raise_server_exceptions=False)

    def _load(self, bundle: Bundle, state: Path) -> Engine:
        return Engine(bundle, state=state)

    @property
    def id(self) -> str:
        return self.client.get("/v1/bundle").headers["x-bundle-id"]

    def swap(self, bundle: str) -> Any:
        return self.client.post("/v1/bundle", json={"bundle": bundle})


@pytest.fixture
def worker_of(bundles: Path, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(configured: str = "first", folder: Path | None = bundles) -> Worker:
        workers.append(Worker(bundles / configured, tmp_path / "state", folder))
        return workers[-1]

    yield make
    for worker in workers:
        worker.swapper.close()
        worker.served.close()


def id_of(bundles: Path, name: str) -> str:
    return Bundle.open(bundles / name, verify=False).manifest.id


def test_the_new_bundle_answers_and_every_worker_follows(worker_of, bundles: Path, digit_images) -> None:
    one, two = worker_of(), worker_of()
    image = digit_images.images[0]
    before = one.client.post("/v1/embeddings", content=image).json()["data"][0]["embedding"]
    response = one.swap("turned")
    assert response.json() == {
        "object": "bundle",
        "id": id_of(bundles, "turned"),
        "name": "tiny-digits",
        "previous": id_of(bundles, "first"),
    }
    assert one.id == id_of(bundles, "turned") and two.id == id_of(bundles, "first")
    two.swapper.follow()
    assert two.id == id_of(bundles, "turned")
    after = [
        worker.client.post("/v1/embeddings", content=image).json()["data"][0]["embedding"] for worker in (one, two)
    ]
    assert after[0] == after[1] and not np.allclose(after[0], before, atol=0.1)


def test_a_worker_follows_by_itself(worker_of, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapping, "SECONDS", 0.01)
    one, two = worker_of(), worker_of()
    followed = threading.Event()
    replace_, two.served.replace = two.served.replace, lambda engine: (replace_(engine), followed.set())  # type: ignore[method-assign]
    two.swapper.start()
    one.swap("turned")
    assert followed.wait(20)
    assert two.id == id_of(bundles, "turned")


def test_no_request_fails_while_bundles_are_swapped_to_and_fro(worker_of, bundles: Path, digit_images) -> None:
    worker = worker_of()
    image = digit_images.images[0]
    answers: list[httpx.Response] = []

    async def scene() -> None:
        transport = httpx.ASGITransport(worker.client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            over = asyncio.Event()

            async def ask() -> None:
                while not over.is_set():
                    answers.append(await client.post("/v1/classify", content=image))

            asking = [asyncio.ensure_future(ask()) for _ in range(8)]
            for name in ("turned", "first", "turned", "first", "turned"):
                assert (await client.post("/v1/bundle", json={"bundle": name})).status_code == 200
            over.set()
            await asyncio.gather(*asking)

    expected = worker.client.post("/v1/classify", content=image).json()["data"][0]
    asyncio.run(asyncio.wait_for(scene(), 60))
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        (entry,) = answer.json()["data"]
        assert answer.json()["bundle"] == answer.headers["x-bundle-id"]
        assert (entry["label"], entry["known"]) == (expected["label"], expected["known"])
        assert entry["similarity"] == pytest.approx(expected["similarity"], abs=1e-4)
    assert len({answer.headers["x-bundle-id"] for answer in answers}) == 2


def test_a_request_finishes_on_the_engine_it_began_with_which_is_then_closed(
    worker_of, bundles: Path, digit_images, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()
    old = worker.served.engine
    gate, asked, closed, real = threading.Event(), threading.Event(), threading.Event(), old._encoder.embed
    close = old.close

    def slow(pixels: np.ndarray) -> np.ndarray:
        asked.set()
        assert gate.wait(20)
        return real(pixels)

    monkeypatch.setattr(old._encoder, "embed", slow)
    monkeypatch.setattr(old, "close", lambda: (close(), closed.set()))
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(worker.client.post("/v1/classify", content=digit_images.images[0]))
    )
    thread.start()
    assert asked.wait(20)
    assert worker.swap("turned").status_code == 200
    assert worker.id == id_of(bundles, "turned")
    assert not closed.is_set()
    gate.set()
    thread.join(20)
    assert answers[0].status_code == 200 and answers[0].json()["bundle"] == id_of(bundles, "first")
    assert closed.wait(20)


def test_an_engine_that_nobody_holds_is_closed_at_once(worker_of, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of()
    old, closed = worker.served.engine, threading.Event()
    close = old.close
    monkeypatch.setattr(old, "close", lambda: (close(), closed.set()))
    worker.swap("turned")
    assert closed.wait(20)


def test_what_was_enrolled_is_embedded_anew_by_the_new_encoder_and_back(
    worker_of, digit_images, files, bundles: Path
) -> None:
    one, two = worker_of(), worker_of()
    eights = digit_images.of("8").images
    one.client.post(EIGHT, files=files(eights[:5]))
    before = one.client.post("/v1/classify", content=eights[10]).json()["data"][0]
    assert before["label"] == "8"
    one.swap("turned")
    # The other worker has not followed yet, and enrols with the old encoder.
    two.client.post(EIGHT, files=files(eights[5:7]))
    rows = {row["label"]: row["count"] for row in one.client.get("/v1/classes").json()["data"]}
    assert rows["8"] == 7
    two.client.delete(f"/v1/gallery/{item_id(eights[5])}")
    two.client.delete(f"/v1/gallery/{item_id(eights[6])}")
    after = one.client.post("/v1/classify", content=eights[10]).json()["data"][0]
    assert (after["label"], after["similarity"]) == ("8", pytest.approx(before["similarity"], abs=1e-4))
    one.swap("first")
    assert one.client.post("/v1/classify", content=eights[10]).json()["data"][0]["label"] == "8"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "is not a bundle"),
        ("damaged", "does not match its checksum"),
        ("stranger", "it is of the gallery 'other-digits'"),
        ("", "does not lead below COTERIE_BUNDLES"),
        (".", "does not lead below COTERIE_BUNDLES"),
        ("..", "does not lead below COTERIE_BUNDLES"),
        ("../elsewhere/turned", "does not lead below COTERIE_BUNDLES"),
        ("turned/../../x", "does not lead below COTERIE_BUNDLES"),
        ("/etc", "does not lead below COTERIE_BUNDLES"),
        ("out", "does not lead below COTERIE_BUNDLES"),
        ("a\0b", "it is no path"),
        ("x" * 5000, "was not swapped in"),
        ("coterie-bundle:nowhere", "the model store has no such tag"),
        ("coterie-bundle:../../etc", "the model store has no such tag"),
        ("coterie-bundle:", "the model store has no such tag"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_old_bundle_goes_on(
    worker_of, bundles: Path, tmp_path: Path, error_of, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(swapping, "stored", lambda version: None)
    outside = tmp_path / "outside"
    shutil.copytree(bundles / "turned", outside)
    (bundles / "out").unlink(missing_ok=True)
    (bundles / "out").symlink_to(outside)
    worker = worker_of()
    response = worker.client.post("/v1/bundle", json={"bundle": name})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("bundle_refused", "bundle")
    assert reason in error["message"] and str(bundles) not in error["message"]
    assert worker.id == id_of(bundles, "first")
    assert read_pointer(worker.swapper.file) is None


def test_paths_are_not_taken_without_a_folder_for_them_but_tags_are(
    worker_of, bundles: Path, monkeypatch: pytest.MonkeyPatch, error_of
) -> None:
    worker = worker_of(folder=None)
    assert "COTERIE_BUNDLES" in error_of(worker.swap("turned"), 422)["message"]
    monkeypatch.setattr(swapping, "stored", {"abc123": bundles / "turned"}.get)
    assert worker.swap("coterie-bundle:abc123").status_code == 200
    assert worker.id == id_of(bundles, "turned")


def test_a_bundle_that_fails_to_load_in_any_way_is_refused(
    worker_of, bundles: Path, error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()

    def fail(_: Any) -> Any:
        raise MemoryError("secret")

    monkeypatch.setattr(worker.swapper, "_load", fail)
    error = error_of(worker.swap("turned"), 422)
    assert "cannot be loaded here" in error["message"] and "secret" not in error["message"]
    assert worker.id == id_of(bundles, "first")


def test_a_pointer_that_cannot_be_written_leaves_the_old_bundle(
    worker_of, bundles: Path, error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.pointer.write_text", full)
    error_of(worker.swap("turned"), 503)
    assert worker.id == id_of(bundles, "first")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"bundle": 1}', b'{"bundle": "turned", "force": true}', b'{"path": "x"}']
)
def test_a_body_of_another_shape_is_400(worker_of, error_of, body: bytes) -> None:
    error_of(worker_of().client.post("/v1/bundle", content=body), 400)


def test_only_one_bundle_is_loaded_at_a_time(
    worker_of, bundles: Path, error_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of()
    gate, loading, load = threading.Event(), threading.Event(), worker.swapper._load

    def slow(bundle: Bundle) -> Engine:
        loading.set()
        assert gate.wait(20)
        return load(bundle)

    monkeypatch.setattr(worker.swapper, "_load", slow)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(worker.swap("turned")))
    thread.start()
    assert loading.wait(20)
    assert error_of(worker.swap("turned"), 409)["code"] == "conflict"
    gate.set()
    thread.join(20)
    assert answers[0].status_code == 200


def test_swapping_in_what_is_served_already_loads_nothing(worker_of, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of()
    monkeypatch.setattr(worker.swapper, "_load", None)
    answer = worker.swap("first").json()
    assert answer["id"] == answer["previous"]


def test_a_worker_that_cannot_follow_keeps_the_old_bundle_until_it_can(
    worker_of, bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = worker_of(), worker_of()
    one.swap("turned")
    with monkeypatch.context() as patch:

        def fail(_: Any) -> Any:
            raise BundleError("no memory")

        patch.setattr(two.swapper, "_load", fail)
        with pytest.raises(BundleError):
            two.swapper.follow()
        assert two.id == id_of(bundles, "first")
    two.swapper.follow()
    assert two.id == id_of(bundles, "turned")


# --- starting again --------------------------------------------------------------------------------------------------


def test_a_worker_that_starts_again_serves_what_was_swapped_in(worker_of, bundles: Path) -> None:
    worker_of().swap("turned")
    assert worker_of().id == id_of(bundles, "turned")


def test_the_operators_newer_word_ends_a_swap_even_when_the_old_one_is_named_again(
    worker_of, bundles: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    worker_of().swap("turned")
    file = pointer_file(state, "tiny-digits")
    end_older_swap(Bundle.open(bundles / "first"), state)
    assert file.exists()
    assert worker_of("turned").id == id_of(bundles, "turned")
    end_older_swap(Bundle.open(bundles / "turned"), state)
    assert not file.exists()
    assert worker_of("first").id == id_of(bundles, "first")


def test_a_service_with_another_bundle_does_not_follow(worker_of, bundles: Path) -> None:
    other = worker_of("turned")
    worker_of("first").swap("first")
    other.swapper.follow()
    assert other.id == id_of(bundles, "turned")


@pytest.mark.parametrize("spoil", [shutil.rmtree, lambda path: (path / "README.md").write_text("other")])
def test_a_swapped_in_bundle_that_is_gone_names_the_file_to_remove(
    worker_of, bundles: Path, tmp_path: Path, spoil: Callable[[Path], Any]
) -> None:
    shutil.copytree(bundles / "turned", bundles / "late", dirs_exist_ok=True)
    worker_of().swap("late")
    spoil(bundles / "late")
    with pytest.raises(BundleError, match=r"remove .*served\.json to serve"):
        bundle_to_serve(Bundle.open(bundles / "first"), tmp_path / "state", Bundle.open)
    shutil.rmtree(bundles / "late", ignore_errors=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"configured": "x"}', b"\xff"])
def test_a_damaged_pointer_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "served.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"served\.json.*remove it"):
        read_pointer(tmp_path / "served.json")
