"""What the environment says, and what stays silent."""

import subprocess
import sys
from pathlib import Path

import pytest

from coterie.errors import CoterieError, DeviceError
from coterie.store import StoreOptions
from serving.settings import Settings


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


def test_threads() -> None:
    assert Settings.from_environment({"COTERIE_THREADS": "3"}).threads == 3
    for threads in ("0", "-1", "many", "1.5", "²"):
        with pytest.raises(CoterieError, match=f"COTERIE_THREADS is '{threads}': use a number from 1 on"):
            Settings.from_environment({"COTERIE_THREADS": threads})


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
