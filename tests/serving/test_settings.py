"""What the environment says, and what stays silent."""

import subprocess
import sys
from pathlib import Path

import pytest

from coterie.errors import CoterieError, DeviceError
from coterie.index import IndexOptions
from coterie.store import StoreOptions
from serving.limits import RequestLimits
from serving.safety import check_safety
from serving.settings import Settings, traced, worker_count


def test_defaults_and_empty_variables_are_the_same() -> None:
    defaults = Settings.from_environment({})
    assert defaults == Settings.from_environment(
        {
            "COTERIE_BUNDLE": "",
            "COTERIE_BUNDLES": "",
            "COTERIE_STATE": "",
            "COTERIE_DEVICE": "",
            "COTERIE_THREADS": "",
        }
    )
    assert defaults.bundle is None and defaults.device == "auto" and defaults.threads is None
    assert defaults.state.is_absolute() and defaults.state.name == "coterie"


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment(
        {"COTERIE_BUNDLE": "some/bundle", "COTERIE_BUNDLES": "some", "COTERIE_STATE": "~/state"}
    )
    assert settings.bundle == tmp_path / "some/bundle"
    assert settings.bundles == tmp_path / "some"
    assert settings.state == Path("~/state").expanduser()


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "cuda:0,2", "cuda:all", "tensorrt", "tensorrt:1"])
def test_devices(device: str) -> None:
    assert Settings.from_environment({"COTERIE_DEVICE": device}).device == device


def test_workers_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.settings.processors", lambda: 8)
    for workers, threads in (("3", 2), ("16", 1)):
        settings = Settings.from_environment({"COTERIE_WORKERS": workers})
        assert settings.workers == worker_count({"COTERIE_WORKERS": workers}) == int(workers)
        assert settings.threads == threads
    assert Settings.from_environment({"COTERIE_WORKERS": "2", "COTERIE_THREADS": "5"}).threads == 5
    assert worker_count({}) == 1
    for workers in ("0", "many"):
        assert worker_count({"COTERIE_WORKERS": workers}) == 1  # the service ends with the error when it starts
        with pytest.raises(CoterieError, match="COTERIE_WORKERS"):
            Settings.from_environment({"COTERIE_WORKERS": workers})


def test_threads() -> None:
    assert Settings.from_environment({"COTERIE_THREADS": "3"}).threads == 3
    for threads in ("0", "-1", "many", "1.5", "²"):
        with pytest.raises(CoterieError, match=f"COTERIE_THREADS is '{threads}': use a number from 1 on"):
            Settings.from_environment({"COTERIE_THREADS": threads})


def test_what_the_index_may_cost() -> None:
    assert Settings.from_environment({}).index == IndexOptions()
    changed = Settings.from_environment({"COTERIE_INDEX_MILLISECONDS": "3", "COTERIE_INDEX_MEMORY": "1000000"}).index
    assert changed == IndexOptions(latency_budget=0.003, memory_budget=1_000_000)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "CPU", "cuda:", "cpu:0"])
def test_no_such_device(device: str) -> None:
    with pytest.raises(DeviceError, match="COTERIE_DEVICE"):
        Settings.from_environment({"COTERIE_DEVICE": device})


def test_how_enrolled_images_are_kept() -> None:
    assert Settings.from_environment({}).store == StoreOptions()
    changed = Settings.from_environment({"COTERIE_ORIGINALS": "0", "COTERIE_CLASS_QUOTA": "50"}).store
    assert (changed.originals, changed.class_quota) == (False, 50)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("COTERIE_ORIGINALS", "maybe"), *(("COTERIE_CLASS_QUOTA", value) for value in ("0", "-1", "many", "1.5"))],
)
def test_what_a_variable_cannot_be(variable: str, value: str) -> None:
    with pytest.raises(CoterieError, match=f"{variable} is '{value}'"):
        Settings.from_environment({variable: value})


def test_usage_tracking_is_off_even_if_bentoml_has_asked_before() -> None:
    script = (
        "import os; os.environ.pop('BENTOML_DO_NOT_TRACK', None)\n"
        "from bentoml._internal.utils.analytics.usage_stats import do_not_track\n"
        "assert not do_not_track()\n"
        "import serving\n"
        "assert do_not_track()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_guards_the_service_is_read_as_it_is_documented(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {
            "COTERIE_KEYS": str(tmp_path / "keys"),
            "COTERIE_HOSTS": "Box.example, box",
            "COTERIE_CORS": "https://app.example http://localhost:5173",
            "COTERIE_ALLOW_URLS": "Images.example.org other.example:8443",
            "COTERIE_MAX_BODY": "1000",
            "COTERIE_BODIES_BYTES": "5000",
            "COTERIE_MAX_IMAGES": "3",
            "COTERIE_MAX_PIXELS": "500",
            "COTERIE_BODY_SECONDS": "5",
            "COTERIE_ANSWER_SECONDS": "7",
            "COTERIE_REQUEST_LOG": "0",
        }
    )
    assert settings.keys == tmp_path / "keys" and not settings.request_log
    assert settings.hosts == {"box.example", "box"}
    assert settings.origins == ("https://app.example", "http://localhost:5173")
    limits = settings.limits
    assert (limits.max_body, limits.max_images, limits.body_seconds, limits.seconds) == (1000, 3, 5, 7)
    assert limits.bodies.most == 5000
    assert (
        Settings.from_environment({"COTERIE_MAX_BODY": "9000", "COTERIE_BODIES_BYTES": "1"}).limits.bodies.most == 9000
    )
    assert (limits.image.max_bytes, limits.image.max_pixels) == (1000, 500)
    assert limits.fetcher is not None and limits.fetcher.max_total == 1000
    assert limits.fetcher.hosts == {"images.example.org", "other.example:8443"}
    plain = Settings.from_environment({})
    assert plain.limits == RequestLimits() and plain.keys is None and plain.request_log


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COTERIE_MAX_BODY", "64MB"),
        ("COTERIE_BODIES_BYTES", "1GB"),
        ("COTERIE_MAX_IMAGES", "0"),
        ("COTERIE_BODY_SECONDS", "-1"),
        ("COTERIE_CORS", "*"),
        ("COTERIE_CORS", "app.example"),
        ("COTERIE_CORS", "https://*.example"),
        ("COTERIE_ALLOW_URLS", "*.example.org"),
        ("COTERIE_ALLOW_URLS", "https://images.example.org/"),
        ("COTERIE_REQUEST_LOG", "maybe"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(CoterieError, match=name):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"COTERIE_OTEL": "1"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "COTERIE_OTEL": "0"}, False),
    ],
)
def test_requests_are_traced_where_somebody_takes_the_spans(environment: dict[str, str], wanted: bool) -> None:
    assert traced(environment) is wanted


def test_tracing_without_an_exporter_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings.from_environment({"COTERIE_STATE": str(tmp_path)})
    monkeypatch.setenv("COTERIE_OTEL", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CoterieError, match=r"coterie\[otel\]"):
        check_safety(settings)
    monkeypatch.setenv("COTERIE_OTEL", "0")
    check_safety(settings)
