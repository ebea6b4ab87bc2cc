"""Every kind of image, and very large bodies, through HTTP: the embedding is the one that the bundle makes offline."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from serving.engine import Engine
from serving.limits import RequestLimits
from serving.routes import build_app
from serving.served import Served


@pytest.fixture
def client(tiny_bundle: Bundle) -> Iterator[TestClient]:
    """With the usual limits."""
    app = build_app()
    app.state.served = Served(Engine(tiny_bundle))
    with TestClient(app, raise_server_exceptions=False) as one:
        yield one
    app.state.served.close()


def colours() -> Image.Image:
    """Brighter on top, so that it matters which way is up."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 120, (24, 40, 3)) + np.linspace(135, 0, 24)[:, None, None]
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(colours(), "JPEG", exif=exif)


def deep() -> Image.Image:
    """Sixteen bits, few of which eight would hold."""
    return Image.fromarray(np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16))


def transparent() -> Image.Image:
    image = colours().convert("LA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def moving(kind: str) -> bytes:
    return saved(colours(), kind, save_all=True, append_images=[colours().rotate(180)])


KINDS = {
    **{f"EXIF {orientation}": turned(orientation) for orientation in range(1, 9)},
    "CMYK": saved(colours().convert("CMYK"), "JPEG"),
    "LA": saved(transparent(), "PNG"),
    "palette with transparency": saved(colours().quantize(16), "PNG", transparency=3),
    "I;16": saved(deep(), "PNG"),
    "AVIF": saved(colours(), "AVIF"),
    "GIF that moves": moving("GIF"),
    "WebP that moves": moving("WEBP"),
    "one pixel": saved(Image.new("RGB", (1, 1), (200, 30, 60)), "PNG"),
}


def embeddings(answer: Any) -> NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    return np.asarray([entry["embedding"] for entry in answer.json()["data"]], dtype=np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_any_kind_has_the_embedding_that_the_bundle_gives_it(
    tiny_bundle: Bundle, client: TestClient, kind: str
) -> None:
    answer = client.post("/v1/embeddings", content=KINDS[kind], headers={"content-type": "image/*"})
    np.testing.assert_allclose(embeddings(answer), tiny_bundle.embed([KINDS[kind]]), atol=1e-6)


def test_all_kinds_in_one_form_keep_their_places(tiny_bundle: Bundle, client: TestClient, files) -> None:
    images = list(KINDS.values())
    answer = client.post("/v1/embeddings", files=files(images))
    np.testing.assert_allclose(embeddings(answer), tiny_bundle.embed(images), atol=1e-6)
    upright, upside_down = tiny_bundle.embed([KINDS["EXIF 1"], KINDS["EXIF 3"]])
    assert upright @ upside_down < 0.9  # else the kinds could not be told apart


# --- large bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [True, False])
def test_fifty_megabytes_are_taken_and_what_is_over_the_limit_is_not(
    tiny_bundle: Bundle, client: TestClient, error_of, stated: bool
) -> None:
    # Bytes after an image's end are no part of it.
    image = saved(colours(), "BMP")
    large = image + bytes(50 * 2**20 - len(image))
    over = bytes(RequestLimits().max_body + 1)

    def sent(content: bytes) -> Any:
        chunks = (content[start : start + 2**20] for start in range(0, len(content), 2**20))
        return client.post("/v1/embeddings", content=content if stated else chunks)

    np.testing.assert_allclose(embeddings(sent(large)), tiny_bundle.embed([image]), atol=1e-6)
    assert error_of(sent(over), 413)["code"] == "too_large"


def test_a_form_of_ten_thousand_files_is_refused(client: TestClient, error_of, files) -> None:
    answer = client.post("/v1/embeddings", files=files([b"x"] * 10_000))
    assert "256 images" in error_of(answer, 413)["message"]
