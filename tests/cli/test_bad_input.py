"""What a person does wrong gets one clear line on stderr and exit code 2; nothing is left half-written."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from coterie.providers import has_driver


def one_line(err):
    """The error line, which is all of stderr but progress bars."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def train(coterie, data, tmp_path, *more):
    small = ("--set", "schedule.epochs=1", "--set", "encoder.width=8")
    return coterie("train", data, "--recipe", "digits", "--out", tmp_path / "run", *small, *more)


def test_a_missing_folder(coterie, tmp_path):
    code, _, err = train(coterie, tmp_path / "nowhere", tmp_path)
    assert code == 2
    assert "not a folder" in one_line(err)


def test_a_folder_without_classes(coterie, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = train(coterie, tmp_path / "empty", tmp_path)
    assert code == 2
    assert "no class folders" in one_line(err)


def test_a_table_without_labels(coterie, tiny_bundle, tmp_path):
    (tmp_path / "labels.csv").write_text("path,species\n1.png,cat\n")
    code, _, err = coterie("evaluate", tiny_bundle.path, tmp_path / "labels.csv")
    assert code == 2
    assert "labels.csv has no label column: it has 'path', 'species'" in one_line(err)


def test_one_class_only(coterie, digit_tree, tmp_path):
    for label in "1234567":
        shutil.rmtree(digit_tree / label)
    code, _, err = train(coterie, digit_tree, tmp_path)
    assert code == 2
    assert "only 1 class (0)" in one_line(err)


def test_a_class_with_one_image(coterie, digit_tree, tmp_path):
    for file in sorted((digit_tree / "3").iterdir())[1:]:
        file.unlink()
    code, _, err = train(coterie, digit_tree, tmp_path)
    assert code == 2
    assert "class '3'" in one_line(err)
    assert not (tmp_path / "run").exists()


def test_unreadable_files_are_named_and_counted_and_the_run_goes_on(coterie, digit_tree, tmp_path):
    (digit_tree / "3" / "broken.png").write_bytes(b"not an image")
    (digit_tree / "4" / "empty.jpg").touch()
    code, out, err = train(coterie, digit_tree, tmp_path)
    assert code == 0
    assert "2 images were left out" in err
    assert "broken.png" in err
    assert "empty.jpg" in err
    assert "k-NN top-1" in out


def test_strict_stops_at_an_unreadable_file(coterie, digit_tree, tmp_path):
    (digit_tree / "3" / "broken.png").write_bytes(b"not an image")
    code, _, err = train(coterie, digit_tree, tmp_path, "--strict")
    assert code == 2
    assert "broken.png" in one_line(err)
    assert not (tmp_path / "run").exists()


def test_a_class_that_loses_all_but_one_image_to_damage(coterie, digit_tree, tmp_path):
    for file in sorted((digit_tree / "3").iterdir())[1:]:
        file.write_bytes(b"damaged")
    code, _, err = train(coterie, digit_tree, tmp_path)
    assert code == 2
    assert "class '3'" in one_line(err)


@pytest.mark.parametrize("command", ["evaluate", "serve", "bundle info"])
def test_a_directory_that_is_no_bundle(coterie, command, digit_tree, tmp_path):
    arguments = [*command.split(), tmp_path]
    code, _, err = coterie(*arguments, *([digit_tree] if command == "evaluate" else []))
    assert code == 2
    assert "is not a bundle" in one_line(err)


@pytest.mark.parametrize("name", ["model.onnx", "gallery.parquet", "clusters.parquet", "README.md", "manifest.json"])
def test_a_bundle_with_a_flipped_byte(coterie, name, tiny_bundle, digit_tree, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, bundle)
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    code, _, err = coterie("evaluate", bundle, digit_tree)
    assert code == 2
    assert name in one_line(err)
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert name in one_line(err)


def test_training_where_only_serving_is_installed(coterie, digit_tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # what `import torch` finds in the base install
    monkeypatch.delitem(sys.modules, "training.pretrain", raising=False)
    code, _, err = train(coterie, digit_tree, tmp_path)
    assert code == 2
    assert "install coterie[train]" in one_line(err)


def test_an_unfinished_run(coterie, digit_tree, tmp_path):
    code, _, err = coterie("export", tmp_path, "--gallery", digit_tree, "--out", tmp_path / "bundle")
    assert code == 2
    assert "is not a run" in one_line(err)


def test_a_taken_port(coterie, tiny_bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = coterie("serve", tiny_bundle.path, "--port", taken.getsockname()[1])
    assert code == 2
    assert "choose another --port" in one_line(err)


def test_a_gate_that_is_missed_exits_with_one(coterie, tiny_bundle, digit_tree):
    for path in (digit_tree / "1").glob("*.png"):
        path.rename(digit_tree / "0" / path.name)
    (digit_tree / "1").rmdir()
    code, out, err = coterie("evaluate", tiny_bundle.path, digit_tree, "--min-top1", "1")
    assert code == 1
    assert "below --min-top1" in one_line(err)
    assert "top-1" in out


def test_a_rate_without_a_threshold(coterie, tiny_bundle, digit_tree):
    code, _, err = coterie("evaluate", tiny_bundle.path, digit_tree, "--false-reject", "0.033")
    assert code == 2
    assert "0.05" in one_line(err)


def test_a_file_that_cannot_be_written(coterie, tiny_bundle, digit_tree, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = coterie("evaluate", tiny_bundle.path, digit_tree, "--json", tmp_path / "file" / "numbers.json")
    assert code == 2
    assert str(tmp_path / "file") in one_line(err)


@pytest.mark.parametrize("command", ["evaluate", "embed", "serve"])
def test_an_unknown_device(coterie, command, tiny_bundle, digit_tree, tmp_path):
    more = {"evaluate": [digit_tree], "embed": [digit_tree, "--out", tmp_path / "out.parquet"], "serve": []}
    code, _, err = coterie(command, tiny_bundle.path, *more[command], "--device", "tpu")
    assert code == 2
    assert "use auto, cpu" in one_line(err)


@pytest.mark.skipif(has_driver(), reason="there is a driver here")
@pytest.mark.parametrize("device", ["cuda", "cuda:all", "tensorrt:1"])
def test_a_gpu_where_there_is_none(coterie, device, tiny_bundle, digit_tree):
    (digit_tree / "0" / "damaged.png").write_bytes(b"not decoded before the device is tried")
    code, _, err = coterie("evaluate", tiny_bundle.path, digit_tree, "--device", device, "--strict")
    assert code == 2
    assert f"{device} cannot be had here: NVIDIA's driver is missing" in one_line(err)


def test_the_demo_leaves_a_folder_alone_that_is_not_its_own(coterie, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    code, _, err = coterie("demo", "--no-serve", "--dir", tmp_path)
    assert code == 2
    assert "--dir" in one_line(err)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "command", ["", "demo", "train", "export", "evaluate", "serve", "bundle info", "bundle verify"]
)
def test_every_command_explains_itself_without_torch(coterie, command):
    code, out, _ = coterie(*command.split(), "--help")
    assert code == 0
    assert "Example" in out or not command


def test_serving_hands_over_with_the_settings(coterie, tiny_bundle, tmp_path, monkeypatch):
    handed: list[tuple[list[str], dict[str, str]]] = []

    def instead_of_exec(program, command, environment):
        handed.append((command, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", instead_of_exec)
    settings = ["--state", tmp_path / "state", "--device", "cpu", "--threads", 3, "--max-images", 9, "--no-request-log"]
    settings += ["--allow-urls", "a.example", "--allow-urls", "b.example", "--keys", tmp_path / "keys.json"]
    code, _, _ = coterie("serve", tiny_bundle.path, "--port", "39211", *settings)
    assert code == 0
    command, environment = handed[0]
    assert command[2:4] == ["bentoml", "serve"]
    assert environment["COTERIE_BUNDLE"] == str(Path(tiny_bundle.path).resolve())
    assert environment["COTERIE_STATE"] == str((tmp_path / "state").resolve())
    assert environment["COTERIE_DEVICE"] == "cpu"
    assert environment["COTERIE_THREADS"] == "3"
    assert environment["COTERIE_MAX_IMAGES"] == "9" and environment["COTERIE_REQUEST_LOG"] == "0"
    assert environment["COTERIE_ALLOW_URLS"] == "a.example b.example"
    assert environment["COTERIE_KEYS"] == str(tmp_path / "keys.json")
    assert environment["BENTOML_DO_NOT_TRACK"] == "True"
    assert "COTERIE_HOSTS" not in environment
