"""`coterie gallery …`, as a person uses it; bad input gets one clear line and exit code 2."""

import json
import shutil
import sqlite3
from functools import partial

import numpy as np
import pytest
from PIL import Image

from coterie.bundle import Bundle
from coterie.items import item_id
from coterie.store import StoreOptions
from coterie_cli.main import main


@pytest.fixture
def gallery(coterie, monkeypatch, tiny_bundle, tmp_path):
    """Run `coterie gallery COMMAND BUNDLE …` on a state folder of the test's own; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COTERIE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(command, *arguments, bundle=tiny_bundle.path):
        return coterie("gallery", command, bundle, *arguments)

    return run


@pytest.fixture
def tree(digit_tree_of, tmp_path):
    return digit_tree_of(tmp_path / "new", classes=(8, 9), per_class=5, skip=130)


def one_line(err):
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def listed(gallery, tmp_path, *more):
    code, _, _ = gallery("list", "--json", tmp_path / "list.json", *more)
    assert code == 0
    return json.loads((tmp_path / "list.json").read_text())


def test_a_class_is_enrolled_listed_and_removed(gallery, tree, tmp_path):
    code, out, _ = gallery("add", tree)
    assert (code, "Enrolled 10 images." in out) == (0, True)
    code, out, _ = gallery("add", tree)
    assert "Enrolled 0 images; 10 were there already." in out
    code, out, _ = gallery("list")
    assert "tiny-digits, 490 items" in out
    counts = {entry["label"]: (entry["items"], entry["enrolled"]) for entry in listed(gallery, tmp_path)}
    assert counts["8"] == (5, 5) and counts["0"] == (60, 0)
    items = listed(gallery, tmp_path, "--label", "8")
    assert [entry["metadata"]["path"][:2] for entry in items] == ["8/"] * 5
    assert all(entry["enrolled"] for entry in items)
    code, out, _ = gallery("list", "--label", "8")
    assert items[0]["id"] in out and "enrolled" in out
    code, out, _ = gallery("remove", "--id", items[0]["id"], "--id", items[1]["id"])
    assert "Removed 2 items." in out
    code, out, _ = gallery("remove", "--label", "9")
    assert "Removed 5 items." in out
    left = {entry["label"]: entry["items"] for entry in listed(gallery, tmp_path)}
    assert left["8"] == 3 and "9" not in left


def test_single_files_and_folders_of_one_class(gallery, tree, tmp_path):
    first, *others = sorted((tree / "8").iterdir())
    _, out, _ = gallery("add", first, "--label", "eight")
    assert "Enrolled 1 images" in out
    (tmp_path / "loose").mkdir()
    for file in others:
        shutil.copy(file, tmp_path / "loose")
    _, out, _ = gallery("add", tmp_path / "loose", tree / "9", "--label", "eight")
    assert "Enrolled 9 images" in out
    assert {e["label"]: e["items"] for e in listed(gallery, tmp_path)}["eight"] == 10


def test_images_are_kept_or_not(gallery, tree, tmp_path, monkeypatch):
    originals = tmp_path / "state" / "tiny-digits" / "originals"
    first, second, third = sorted((tree / "8").iterdir())[:3]
    gallery("add", first, "--label", "8", "--no-originals")
    monkeypatch.setenv("COTERIE_ORIGINALS", "0")
    gallery("add", second, "--label", "8")
    assert not originals.exists()
    monkeypatch.delenv("COTERIE_ORIGINALS")
    gallery("add", third, "--label", "8")
    (kept,) = (file for file in originals.rglob("*") if file.is_file())
    assert kept.read_bytes() == third.read_bytes()


def test_near_duplicates_and_the_histogram_to_choose_by(gallery, tree, tmp_path):
    first = sorted((tree / "8").iterdir())[0]
    Image.open(first).save(tmp_path / "again.bmp")  # other bytes, the same pixels
    gallery("add", tree)
    gallery("add", tmp_path / "again.bmp", "--label", "9")
    code, out, _ = gallery("duplicates", "--threshold", "0.9999", "--json", tmp_path / "found.json")
    assert code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    pair = {found["pairs"][0]["first"], found["pairs"][0]["second"]}
    assert pair == {item_id(first.read_bytes()), item_id((tmp_path / "again.bmp").read_bytes())}
    assert found["between"] >= 1 and sum(found["counts"]) == 491
    assert "nearest neighbour" in out and "between two" in out


def test_a_merged_bundle_stands_on_its_own(gallery, tree, tmp_path, digit_tree_of, tiny_bundle):
    gallery("add", tree)
    code, out, _ = gallery("merge", "--out", tmp_path / "merged")
    assert code == 0 and "490 items in 10 classes" in out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Not measured since enrolled images became part of the gallery." in card
    held_out = digit_tree_of(tmp_path / "held out", classes=range(10), per_class=20, skip=140)
    shutil.copytree(tree / "8", held_out / "8", dirs_exist_ok=True)  # those are in the gallery, and do not count
    code, out, _ = gallery("merge", "--out", tmp_path / "calibrated", "--held-out", held_out)
    assert code == 0 and "Top-1 on held-out images 0." in out
    calibrated = Bundle.open(tmp_path / "calibrated")
    assert calibrated.manifest.calibration.images == calibrated.manifest.accuracy["held_out_images"] == 200
    assert "`coterie gallery merge` held out" in (tmp_path / "calibrated" / "README.md").read_text()
    np.testing.assert_array_equal(
        calibrated.base.items.embeddings, Bundle.open(tmp_path / "merged").base.items.embeddings
    )


def test_export_import_and_backup_carry_everything(gallery, tree, tmp_path, monkeypatch):
    gallery("add", tree)
    code, out, _ = gallery("export", tmp_path / "out.parquet")
    assert code == 0 and "Exported 10 items" in out
    code, out, _ = gallery("backup", tmp_path / "copy" / "tiny-digits")
    assert code == 0 and "Copied to" in out
    before = listed(gallery, tmp_path, "--label", "8")
    monkeypatch.setenv("COTERIE_STATE", str(tmp_path / "copy"))
    assert listed(gallery, tmp_path, "--label", "8") == before
    code, out, _ = gallery("import", tmp_path / "out.parquet", "--state", tmp_path / "elsewhere")
    assert code == 0 and "Enrolled 10 items." in out
    assert listed(gallery, tmp_path, "--label", "8", "--state", tmp_path / "elsewhere") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--label", "boot"), "no class 'boot': its classes are 0, 1"),
        (("remove",), "give --id, once or more, or --label"),
        (("remove", "--id", "nowhere"), "no item nowhere; nothing was removed"),
        (("remove", "--label", "boot"), "no class 'boot'"),
        (("add", "/nowhere"), "/nowhere is not a folder"),
        (("export", "out.parquet"), "nothing to export"),
        (("import", "nowhere.parquet"), "nowhere.parquet cannot be read"),
        (("merge", "--out", "."), "exists already"),
        (("merge", "--out", "x", "--held-out", "/nowhere"), "/nowhere is not a folder"),
        (("backup", "."), "exists already"),
    ],
)
def test_what_cannot_be_done_is_one_line(gallery, arguments, message):
    code, _, err = gallery(*arguments)
    assert code == 2
    assert message in one_line(err)


@pytest.mark.parametrize(
    "arguments",
    [("duplicates", "--threshold", "2"), ("add", "x", "--class-quota", "0"), ("export",), ("merge",)],
)
def test_wrong_use_exits_with_2(gallery, arguments):
    code, _, err = gallery(*arguments)
    assert code == 2 and "Traceback" not in err


def test_a_full_class_names_the_setting(gallery, tree):
    code, _, err = gallery("add", tree, "--class-quota", "3")
    assert code == 2
    assert "class '8' would have 5 enrolled items, and COTERIE_CLASS_QUOTA allows 3" in one_line(err)


def test_images_that_cannot_be_used_are_named(gallery, tree):
    (tree / "8" / "broken.png").write_bytes(b"no image")
    code, out, err = gallery("add", tree)
    assert code == 0 and "Enrolled 10 images" in out
    assert "1 images were left out" in err and "8/broken.png" in err
    code, _, err = gallery("add", tree / "8" / "broken.png", "--label", "8")
    assert code == 2
    assert "none of the 1 images could be enrolled; the first: broken.png" in one_line(err)


def test_a_gallery_that_another_process_holds_is_one_line(gallery, tree, tmp_path, monkeypatch):
    gallery("add", tree)
    holder = sqlite3.connect(tmp_path / "state" / "tiny-digits" / "gallery.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("coterie.store.StoreOptions", partial(StoreOptions, busy_seconds=0.05))
    code, _, err = gallery("remove", "--label", "9")
    holder.close()
    assert code == 2
    assert "is held by another process: try again" in one_line(err)


@pytest.mark.parametrize("command", ["list", "add", "remove", "duplicates", "merge", "export", "import", "backup"])
def test_each_help_has_an_example(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["coterie", "gallery", command, "--help"])
    with pytest.raises(SystemExit):
        main()
    assert f"Example: coterie gallery {command} " in capsys.readouterr().out
