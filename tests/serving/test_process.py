"""The real service in processes of its own, as users start it."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bentoml
import httpx
import numpy as np
import pytest
import yaml
from bentoml.exceptions import BentoMLException
from openai import NotFoundError, OpenAI, UnprocessableEntityError
from PIL import Image

from coterie.bundle import Bundle
from serving.operations import BENTOML

PROJECT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0


def environment(home: Path, **changes: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COTERIE_", "BENTOML_"))}
    return inherited | {"BENTOML_HOME": str(home / "bentoml"), "COTERIE_STATE": str(home / "state")} | changes


@contextmanager
def serving(target: str, home: Path, *, cwd: Path = PROJECT, **changes: str) -> Iterator[httpx.Client]:
    """Run `bentoml serve target` until the block ends; the client speaks to it once it is ready."""
    home.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", target, "--port", str(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(home, **changes), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
                wait_until_ready(client, process, home / "log")
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert code == 0, (home / "log").read_text()


def wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the service did not become ready:\n{log.read_text()}")


def jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_real_images_get_the_answers_that_the_bundle_gives_offline(
    tiny_bundle: Bundle, digit_images, tmp_path: Path
) -> None:
    images = [*digit_images.images[:3], *(jpeg(image) for image in digit_images.images[3:6])]
    expected = tiny_bundle.classify(images)
    with serving("serving.service:Coterie", tmp_path, COTERIE_BUNDLE=str(tiny_bundle.path)) as client:
        raw = [
            client.post("/v1/classify", content=image, headers={"content-type": kind})
            for image, kind in zip(images, ["image/png"] * 3 + ["image/jpeg"] * 3, strict=True)
        ]
        files = [("images", (f"image{i}", image)) for i, image in enumerate(images)]
        together = client.post("/v1/classify", files=files)
        assert [response.status_code for response in [*raw, together]] == [200] * 7
        for entries in ([response.json()["data"][0] for response in raw], together.json()["data"]):
            assert [entry["label"] for entry in entries] == [answer.label for answer in expected]
            for field in ("probability", "threshold", "similarity"):
                wanted = [getattr(answer, field) for answer in expected]
                assert [entry[field] for entry in entries] == pytest.approx(wanted, abs=1e-6)
        assert together.headers["x-bundle-id"] == tiny_bundle.manifest.id

        vectors = [entry["embedding"] for entry in client.post("/v1/embeddings", files=files).json()["data"]]
        for vector, wanted in zip(vectors, tiny_bundle.embed(images), strict=True):
            assert vector == pytest.approx(wanted.tolist(), abs=1e-6)

        refused = client.post("/v1/classify", content=b"no image")
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_image")
        assert client.get("/nope").json()["error"]["code"] == "unknown_route"
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
    assert (tmp_path / "state" / "tiny-digits" / "gallery.sqlite").is_file()


def test_bentomls_own_client_gets_the_same_answers(
    tiny_bundle: Bundle, digit_images, data_uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    images = digit_images.images[:20]
    strings = [data_uri(image) if row % 2 else base64.b64encode(image).decode() for row, image in enumerate(images)]
    settings = {"COTERIE_BUNDLE": str(tiny_bundle.path)}
    with serving("serving.service:Coterie", tmp_path, **settings) as http:
        with bentoml.SyncHTTPClient(str(http.base_url)) as client:
            np.testing.assert_allclose(client.embed(images=strings), tiny_bundle.embed(images), atol=1e-6)
            body = {"input": strings, "top": 2, "neighbors": 1, "false_reject": 0.2}
            assert (
                client.classify(images=strings, top=2, neighbors=1, false_reject=0.2)
                == (http.post("/v1/classify", json=body).json()["data"])
            )
            for refused, status, words in (
                ({"images": [strings[0], "AAAA"]}, 422, "image 1: "),
                ({"images": [strings[0], "***"]}, 422, "image 1: "),
                ({"images": ["http://127.0.0.1/a.png"]}, 422, "URLs are not fetched"),
                ({"images": []}, 400, "at least one"),
                ({"images": [strings[0]] * 257}, 413, "more than 256"),
            ):
                with pytest.raises(BentoMLException) as caught:
                    client.embed(**refused)
                assert caught.value.error_code == status and words in str(caught.value)
            for options, words in (({"false_reject": 0.03}, "0.05"), ({"top": -1}, "from 0 to 1000")):
                with pytest.raises(BentoMLException, match=words) as caught:
                    client.classify(images=strings[:1], **options)
                assert caught.value.error_code == 400
        for method, path in BENTOML:
            answer = http.request(method, path)
            said = http.get("/openapi.json").json()["paths"][path][method.lower()]["responses"][str(answer.status_code)]
            assert answer.headers["content-type"].partition(";")[0] in said["content"], path
        form = {"images": (None, "http://127.0.0.1:1/a.png")}
        assert http.post("/embed", files=form).status_code == 415
        secret = "SECRET" * 20
        assert http.post("/embed", json={"images": secret}).status_code == 400
        pickled = http.post("/embed", content=b"x", headers={"content-type": "application/vnd.bentoml+pickle"})
        assert pickled.status_code == 415
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "SECRET" not in log
    noted = [json.loads(line) for line in log.splitlines() if '"/embed"' in line]
    assert [(note["status"], note["error"]) for note in noted[-3:]] == [
        (415, "unsupported_body"),
        (400, "bad_request"),
        (415, "unsupported_body"),
    ]
    assert noted[0]["images"] == 20


def test_openais_client_gets_embeddings_as_numbers_and_as_base64(
    tiny_bundle: Bundle, digit_images, data_uri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    images = digit_images.images[:3]
    strings, name = [data_uri(image) for image in images], tiny_bundle.manifest.name
    settings = {"COTERIE_BUNDLE": str(tiny_bundle.path)}
    with (
        serving("serving.service:Coterie", tmp_path, **settings) as http,
        OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == [name]
        # By itself it asks for base64 and decodes that.
        answers = [
            client.embeddings.create(model=name, input=strings),
            client.embeddings.create(model=name, input=strings, encoding_format="float"),
        ]
        for answer in answers:
            assert [entry.index for entry in answer.data] == [0, 1, 2]
            vectors = np.asarray([entry.embedding for entry in answer.data], dtype=np.float32)
            np.testing.assert_allclose(vectors, tiny_bundle.embed(images), atol=1e-6)
        assert answers[0].data == answers[1].data
        text = client.embeddings.create(model=name, input=strings[0], encoding_format="base64").data[0].embedding
        assert np.frombuffer(base64.b64decode(text), dtype="<f4").tolist() == answers[0].data[0].embedding
        with pytest.raises(UnprocessableEntityError) as caught:
            client.embeddings.create(model=name, input=[strings[0], "AAAA"])
        assert (caught.value.param, caught.value.code) == ("input[1]", "invalid_image")
        with pytest.raises(NotFoundError):
            client.embeddings.create(model="another", input=strings)


def test_the_documented_commands_do_what_is_said_of_them(tiny_bundle: Bundle, digit_images, tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "serving.md").read_text("utf-8")
    ours = text[: text.index("## Clients")]
    (tmp_path / "one.jpg").write_bytes(jpeg(digit_images.images[0]))
    (tmp_path / "two.png").write_bytes(digit_images.images[1])
    (tmp_path / "notes.txt").write_text("no image")
    np.save(tmp_path / "pixels.npy", tiny_bundle.pixels(digit_images.images[:2]))
    commands = [line for block in re.findall(r"```sh\n(.*?)```", ours, re.DOTALL) for line in block.splitlines()]
    said = {}
    settings = {"COTERIE_BUNDLE": str(tiny_bundle.path)}
    with serving("serving.service:Coterie", tmp_path / "home", **settings) as client:
        for command in commands:
            line = command.replace("http://127.0.0.1:3000", str(client.base_url)).replace(
                "python -c", f"{sys.executable} -c"
            )
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
            said[command] = done.stdout

    def objects(part: str) -> list[str]:
        ((answer,),) = [[json.loads(out) for command, out in said.items() if part in command]]
        return [entry["object"] for entry in answer["data"]]

    assert objects("-H 'Content-Type: image/jpeg'") == ["classification"]
    assert objects("v1/classify -H 'Content-Type: application/x-npy'") == ["classification"] * 2
    assert objects("v1/embeddings -H 'Content-Type: application/json'") == ["embedding"]
    assert objects("encoding_format=base64") == ["embedding"]
    assert objects("false_reject=0.01&top=3") == ["classification"]
    assert objects("label=3&label=5") == objects("metadata.row=7") == ["neighbors"]
    assert objects("v1/verify") == ["verification"] * 2
    assert objects("on_error=partial") == ["classification", "error"]
    assert [out for command, out in said.items() if "numpy.load" in command] == ["(2, 32)\n"]
    failed = [
        json.loads(out)["error"]["code"]
        for command, out in said.items()
        if '"error"' in out and "partial" not in command
    ]
    assert failed == ["invalid_image"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what a Bento is built from; the checkout itself may have a bundle lying in it."""
    root = tmp_path / "project"
    for name in ("coterie", "serving"):
        shutil.copytree(PROJECT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "bentofile.yaml", root)
    return root


def ending(home: Path, *, cwd: Path, **changes: str) -> str:
    """What `bentoml serve` in `cwd` says on stderr before it ends by itself."""
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve"],
        cwd=cwd,
        env=environment(home, **changes),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 2
    return done.stderr


def test_without_a_bundle_it_ends_with_one_line_that_names_the_remedy(project: Path, tmp_path: Path) -> None:
    (line,) = ending(tmp_path, cwd=project).splitlines()
    assert "coterie export" in line and "COTERIE_BUNDLE" in line


@pytest.mark.parametrize("name", ["model.onnx", "gallery.parquet"])
def test_with_a_damaged_bundle_it_ends_with_one_line(
    tiny_bundle: Bundle, project: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "damaged")
    file = tmp_path / "damaged" / name
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    (line,) = ending(tmp_path, cwd=project, COTERIE_BUNDLE=str(tmp_path / "damaged")).splitlines()
    assert f"{name} is damaged" in line


def test_a_bento_carries_its_bundle_wherever_it_is_moved(
    tiny_bundle: Bundle, digit_images, project: Path, tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    options = {"cwd": project, "env": environment(tmp_path / "here"), "capture_output": True, "text": True}
    without = subprocess.run(build, **options)  # type: ignore[call-overload]
    assert without.returncode != 0 and "bundle/README.md not found" in without.stderr

    shutil.copytree(tiny_bundle.path, project / "bundle")
    subprocess.run(build, check=True, **options)  # type: ignore[call-overload]
    (bento,) = (tmp_path / "here" / "bentoml" / "bentos" / "coterie").glob("*/")
    assert "BENTOML_HOST=0.0.0.0" in (bento / "env" / "docker" / "Dockerfile").read_text()
    shutil.move(bento, tmp_path / "moved")
    shutil.rmtree(tmp_path / "here")
    shutil.rmtree(project)

    with serving(str(tmp_path / "moved"), tmp_path / "there", cwd=tmp_path) as client:
        (entry,) = client.post("/v1/classify", content=digit_images.images[0]).json()["data"]
        assert entry["label"] == tiny_bundle.classify(digit_images.images[:1])[0].label
        assert client.get("/v1/bundle").json()["id"] == tiny_bundle.manifest.id


def test_the_bentos_packages_are_the_base_dependencies() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert yaml.safe_load((PROJECT / "bentofile.yaml").read_text())["python"]["packages"] == declared
