"""What requests leave behind: heads, ids, lines of the log, counts, and rows of the audit."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from coterie.bundle import Bundle
from serving.access import Access
from serving.engine import Engine
from serving.keys import create_key
from serving.limits import RequestLimits
from serving.metrics import MAX_CLASSES, OTHER, Measures
from serving.records import PIPE_BYTES, Note, Recorder, Records
from serving.routes import build_app
from serving.safety import Safety
from serving.served import Served
from serving.settings import Settings

NOTE = Note(0.0, "GET", "/", 200, 0.001, 0, 0, 0, None, "id", None)


class House:
    """The application with all that stands around it, and what it wrote."""

    def __init__(self, bundle: Bundle, state: Path, limits: RequestLimits) -> None:
        self.log: list[bytes] = []
        self.state = state
        self.safety = Safety(replace(Settings.from_environment({}), state=state, request_log=False))
        self.safety.policy = replace(self.safety.policy, on_loopback=lambda: True)
        self.safety.records._write = self.log.append
        self.engine = Engine(bundle, state=state, limits=limits, observer=self.safety.measures)
        self.app = build_app()
        self.app.state.served = Served(self.engine)
        self.app.state.safety = self.safety
        self.safety.watch(self.app.state.served)
        inner = Access(self.app, lambda: self.safety.policy)
        around = Recorder(inner, lambda: self.safety.records, lambda: self.safety.journal)
        self.client = TestClient(around, base_url="http://localhost", raise_server_exceptions=False)

    def lines(self) -> list[dict[str, Any]]:
        self.safety.records.flush()
        return [json.loads(line) for piece in self.log for line in piece.splitlines()]

    def audit(self) -> list[dict[str, Any]]:
        path = self.state / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def counts(self) -> dict[str, float]:
        """Samples of /metrics, by name and labels as they stand there."""
        text = self.client.get("/metrics").text
        return {
            sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def house(tiny_bundle: Bundle, tmp_path: Path, limits: RequestLimits) -> Iterator[House]:
    one = House(tiny_bundle, tmp_path / "state", limits)
    yield one
    one.client.close()
    one.safety.close()
    one.engine.close()


def test_every_answer_is_told_how_to_be_treated(house: House, digit_images) -> None:
    client = house.client
    (neighbor,) = client.post("/v1/search?k=1", content=digit_images.images[0]).json()["data"][0]["neighbors"]
    answers = [
        client.get("/"),
        client.post("/v1/classify", content=digit_images.images[0]),
        client.post("/v1/classify", content=b"garbage"),
        client.get("/nope"),
        client.put("/v1/classify"),
        client.get("/metrics"),
        client.get("/v1/classes", headers={"Host": "evil.example"}),
        client.get(neighbor["thumbnail"]),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 422, 404, 405, 200, 403, 200]
    for answer in answers:
        for name, value in {
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
        }.items():
            assert answer.headers.get_list(name) == [value]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers
    assert [answer.headers["cache-control"] for answer in answers] == ["no-store"] * 7 + ["private, max-age=3600"]


def test_a_request_keeps_the_id_that_it_came_with_if_it_is_one(house: House) -> None:
    assert house.client.get("/", headers={"X-Request-Id": "a-B.9_c"}).headers["x-request-id"] == "a-B.9_c"
    made = set()
    for odd in ("", "a b", 'x"', "ä", "x" * 129, "a\x7f"):
        headers = {"X-Request-Id": odd.encode("latin-1")}
        made.add(house.client.get("/", headers=headers).headers["x-request-id"])
    assert len(made) == 6 and all(len(one) == 16 and int(one, 16) >= 0 for one in made)
    assert len({line["id"] for line in house.lines()}) == 7


def test_each_request_is_one_line_that_says_what_it_was_and_no_more(house: House, digit_images, files) -> None:
    images = digit_images.images[:3]
    body = sum(map(len, images))
    house.client.post("/v1/classify?top=3", files=files(images), headers={"X-Request-Id": "one"})
    house.client.get("/v1/gallery/secret-item?token=secret", headers={"X-Request-Id": "two"})
    house.client.post("/v1/embeddings", content=b"secret", headers={"X-Request-Id": "three"})
    house.client.get("/secret", headers={"X-Request-Id": "four"})
    house.client.get("/healthz")
    lines = house.lines()
    one, two, three, four = lines
    assert (one["method"], one["route"], one["status"], one["images"]) == ("POST", "/v1/classify", 200, 3)
    assert body < one["bytes_in"] < body + 1000 and one["bytes_out"] > 100 and one["ms"] > 0
    assert one["key"] is None and one["error"] is None
    assert (two["route"], two["status"], two["error"]) == ("/v1/gallery/{id}", 400, "bad_request")
    assert (three["status"], three["error"], three["bytes_in"]) == (422, "invalid_image", 6)
    assert (four["route"], four["status"], four["error"]) == ("other", 404, "unknown_route")
    assert "secret" not in b"".join(house.log).decode()
    assert [line["id"] for line in lines] == ["one", "two", "three", "four"]


def test_a_failure_of_ours_is_noted_as_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("serving.browsing.engine_of", fail)
    assert house.client.get("/v1/models").status_code == 500
    (line,) = house.lines()
    assert (line["status"], line["error"]) == (500, "internal_error")
    assert house.counts()['coterie_requests_total{"method": "GET", "route": "/v1/models", "status": "500"}'] == 1


def test_changes_leave_one_row_with_the_keys_id_and_the_rest_leaves_none(
    house: House, digit_images, files, tmp_path: Path
) -> None:
    key, token = create_key(tmp_path / "state" / "keys.json", "change")
    house.safety.policy.keyring._checked = -10.0
    client = house.client
    client.headers["Authorization"] = f"Bearer {token}"
    assert client.delete("/v1/classes/0").status_code == 200
    enrolled = client.post("/v1/classes/boot/examples", files=files(digit_images.images[:2]))
    assert enrolled.status_code == 201
    item = enrolled.json()["data"][0]["id"]
    assert client.delete(f"/v1/gallery/{item}", headers={"X-Request-Id": "mine"}).status_code == 200
    for refused in (
        client.delete("/v1/classes/none"),
        client.delete(f"/v1/gallery/{item}"),
        client.post("/v1/classes/boot/examples", content=b"garbage"),
        client.delete("/v1/classes/1", headers={"Authorization": "Bearer wrong"}),
    ):
        assert refused.status_code >= 400
    assert client.post("/v1/classify", content=digit_images.images[0]).status_code == 200
    rows = house.audit()
    assert [(row["action"], row["target"], row["count"]) for row in rows] == [
        ("forget", "0", 60),
        ("enroll", "boot", 2),
        ("delete", item, 1),
    ]
    assert {row["key"] for row in rows} == {key.id} and rows[-1]["request"] == "mine"
    assert token not in (tmp_path / "state" / "audit.jsonl").read_text() + b"".join(house.log).decode()
    assert {line["key"] for line in house.lines()} == {key.id, None}


def test_a_change_is_answered_though_the_audit_cannot_be_written(house: House) -> None:
    (house.state / "audit.jsonl").mkdir()
    assert house.client.delete("/v1/classes/0").status_code == 200


def test_metrics_tell_of_requests_steps_and_what_was_answered(house: House, digit_images, files) -> None:
    known, stranger = digit_images.of("3").images[:6], digit_images.of("9").images[:2]
    answers = house.client.post("/v1/classify", files=files([*known, *stranger])).json()["data"]
    house.client.post("/v1/classify", content=b"garbage")
    house.client.get("/anything")
    house.client.get("/anything-else")
    counts = house.counts()

    def requests(method: str, route: str, status: int) -> float:
        labels = json.dumps({"method": method, "route": route, "status": str(status)}, sort_keys=True)
        return counts["coterie_requests_total" + labels]

    assert requests("POST", "/v1/classify", 200) == requests("POST", "/v1/classify", 422) == 1
    assert requests("GET", "other", 404) == 2
    assert counts['coterie_request_seconds_count{"route": "/v1/classify"}'] == 2
    assert counts["coterie_decode_seconds_count{}"] == 9
    assert counts["coterie_queue_seconds_count{}"] == 1
    assert counts["coterie_batch_images_sum{}"] == 8
    assert counts["coterie_encode_seconds_count{}"] == counts["coterie_search_seconds_count{}"] == 1
    for label in {entry["classes"][0]["label"] for entry in answers}:
        nearest = [entry for entry in answers if entry["classes"][0]["label"] == label]
        for known_ in (True, False):
            labels = json.dumps({"known": str(known_).lower(), "nearest": label}, sort_keys=True)
            assert counts.get("coterie_classified_total" + labels, 0) == sum(e["known"] == known_ for e in nearest)
        assert counts["coterie_similarity_sum" + json.dumps({"nearest": label})] == pytest.approx(
            sum(entry["similarity"] for entry in nearest)
        )
    manifest = house.engine.manifest
    serving = json.dumps({"bundle": manifest.id, "name": manifest.name}, sort_keys=True)
    assert counts["coterie_bundle_workers" + serving] == 1
    assert counts["coterie_gallery_items{}"] == 480 and counts["coterie_images_under_way{}"] == 0


def test_the_gallerys_size_follows_its_changes(house: House) -> None:
    house.client.delete("/v1/classes/0")
    assert house.counts()["coterie_gallery_items{}"] == 420


def test_classes_are_counted_though_none_is_listed(house: House, digit_images, files) -> None:
    images = [*digit_images.of("3").images[:3], *digit_images.of("9").images[:3]]
    listed = house.client.post("/v1/classify", files=files(images)).json()["data"]
    house.client.post("/v1/classify?top=0", files=files(images))
    counts = house.counts()
    for label, known in {(entry["classes"][0]["label"], entry["known"]) for entry in listed}:
        same = sum((entry["classes"][0]["label"], entry["known"]) == (label, known) for entry in listed)
        labels = json.dumps({"known": str(known).lower(), "nearest": label}, sort_keys=True)
        assert counts["coterie_classified_total" + labels] == 2 * same
    assert OTHER not in {json.loads(name[name.index("{") :]).get("nearest") for name in counts}


def test_labels_of_metrics_stay_few_whatever_is_asked_and_answered(house: House, tiny_bundle, digit_images) -> None:
    for number in range(50):
        house.client.get(f"/{number}")
        house.client.request(f"M{number}", f"/v1/gallery/{number}")
    (answer,) = tiny_bundle.classify(digit_images.images[:1])
    for number in range(MAX_CLASSES + 50):
        score = replace(answer.classes[0], label=f"class {number}")
        house.safety.measures.answered([replace(answer, classes=(score,))])
    counts = house.counts()
    assert len([name for name in counts if name.startswith("coterie_requests_total")]) <= 4
    nearest = {json.loads(name[name.index("{") :])["nearest"] for name in counts if "classified_total" in name}
    assert len(nearest) == MAX_CLASSES + 1 and OTHER in nearest


def test_counts_of_several_workers_are_summed_and_gauges_of_dead_ones_forgotten(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from serving.metrics import Measures\n"
        "one = Measures(Path(sys.argv[1]))\n"
        "one.requested('GET', '/', 200, 0.1); one.state(bundle='b', name='n', items=7, under_way=3)\n"
        "print('ready', flush=True); sys.stdin.read(1); print(one.text().decode())"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(__file__).resolve().parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=root,
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    workers[0].kill()
    workers[0].wait()
    text = workers[1].communicate("x")[0]
    workers[2].communicate("x")
    assert 'coterie_requests_total{method="GET",route="/",status="200"} 3.0' in text
    assert 'coterie_bundle_workers{bundle="b",name="n"} 2.0' in text
    assert "coterie_images_under_way 6.0" in text and "coterie_gallery_items 7.0" in text


def test_lines_go_out_whole_in_pieces_that_a_pipe_takes_at_once() -> None:
    written: list[bytes] = []
    records = Records(Measures(), write=written.append)
    for _ in range(200):
        records.take(NOTE)
    records.close()
    assert b"".join(written).count(b"\n") == 200
    assert all(piece.endswith(b"\n") and len(piece) <= PIPE_BYTES for piece in written)


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    def fail(_: bytes) -> None:
        raise OSError("no space left")

    records, told = Records(Measures(), write=fail), threading.Event()
    records.take(NOTE)
    records.flush()
    records._refresh = told.set
    records.take(NOTE)
    records.close()
    assert told.is_set()
