"""Labelled images: what is found, what is left out and why."""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from coterie.dataset import read_folder, read_images, read_pixels, read_unlabelled
from coterie.errors import DataError
from coterie.images import Limits, Preprocessing, decode
from coterie.labels import check_label

DIGITS = load_digits()
EIGHT = Preprocessing(input_size=(8, 8))
MakeTree = Callable[..., Path]


def save_digit(row: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((DIGITS.images[row] * 15).astype(np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three images of each digit from 0 to 2."""
    for digit in range(3):
        for number, row in enumerate(np.flatnonzero(DIGITS.target == digit)[:3].tolist()):
            save_digit(row, tmp_path / "data" / str(digit) / f"{number}.png")
    return tmp_path / "data"


# Folders


def test_each_folder_is_a_class_of_its_images(tree: Path) -> None:
    images = read_folder(tree)
    assert images.classes == ("0", "1", "2")
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [path.as_posix() for path in images.paths[:4]] == ["0/0.png", "0/1.png", "0/2.png", "1/0.png"]
    assert len(images) == 9


def test_nested_folders_count_and_hidden_or_foreign_files_do_not(tree: Path) -> None:
    save_digit(0, tree / "0" / "2024" / "spring" / "nested.PNG")
    for hidden in ("0/.hidden.png", "0/.thumbnails/x.png", ".git/x.png"):
        save_digit(0, tree / hidden)
    (tree / "0" / "notes.txt").write_text("not an image")
    (tree / "1" / "folder.png").mkdir()
    save_digit(0, tree / "beside the classes.png")
    images = read_folder(tree)
    assert images.classes == ("0", "1", "2")
    assert np.bincount(images.labels).tolist() == [4, 3, 3]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["nowhere", "data.txt", "data.xlsx"])
def test_what_is_neither_folder_nor_table_is_refused_with_the_three_forms(tmp_path: Path, name: str) -> None:
    (tmp_path / "data.txt").touch()
    with pytest.raises(DataError, match=rf"{name} is not a folder, a \.csv or a \.parquet file"):
        read_images(tmp_path / name)


def test_a_file_is_no_folder(tree: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        read_folder(tree / "0" / "0.png")


def test_a_folder_without_class_folders_says_what_to_do(tree: Path) -> None:
    with pytest.raises(DataError, match="no class folders: put the images of each class into a folder"):
        read_folder(tree / "0")


def test_too_few_classes_are_listed(tree: Path) -> None:
    assert read_folder(tree, min_classes=3).classes == ("0", "1", "2")
    shutil.rmtree(tree / "2")
    with pytest.raises(DataError, match=r"has only 2 classes \(0, 1\), at least 3"):
        read_folder(tree, min_classes=3)
    shutil.rmtree(tree / "1")
    assert read_folder(tree).classes == ("0",)
    with pytest.raises(DataError, match=r"has only 1 class \(0\), at least 2"):
        read_folder(tree, min_classes=2)


@pytest.mark.parametrize(("left", "message"), [(0, "has no images"), (1, "has only 1 image"), (2, "has only 2 images")])
def test_a_class_with_too_few_images_is_named(tree: Path, left: int, message: str) -> None:
    for number in range(left, 3):
        (tree / "1" / f"{number}.png").unlink()
    with pytest.raises(DataError, match=f"class '1' .* {message}, at least 3"):
        read_folder(tree, min_images=3)


def test_a_class_with_one_image_is_enough_unless_more_are_asked_for(tree: Path) -> None:
    for number in (1, 2):
        (tree / "1" / f"{number}.png").unlink()
    assert np.bincount(read_folder(tree).labels).tolist() == [3, 1, 3]


@pytest.mark.parametrize("name", ["a" * 129, "ä" * 65, "line\nbreak", "tab\there", "bell\x07", "\x85next"])
def test_folders_that_cannot_name_a_class_are_refused(tree: Path, name: str) -> None:
    save_digit(0, tree / name / "0.png")
    with pytest.raises(DataError, match="cannot name a class"):
        read_folder(tree)


@pytest.mark.parametrize("label", ["", ".", "..", "a/b", "a\0b", "\ud800", "x" * 129])
def test_labels_that_cannot_name_a_class_are_refused(label: str) -> None:
    with pytest.raises(DataError, match="cannot name a class"):
        check_label(label)


@pytest.mark.parametrize(
    "label", ["0", "...", ".hidden", "boots, brown (2nd)", "größe 43", "長靴", "x" * 128, "ä" * 64]
)
def test_any_other_label_may_name_a_class(label: str) -> None:
    assert check_label(label) == label


# Groups


def test_without_a_group_nothing_is_grouped(tree: Path) -> None:
    assert read_images(tree).groups is None
    assert read_pixels(read_images(tree), EIGHT).groups is None


def test_a_pattern_names_the_object_below_the_class_folder(tree: Path) -> None:
    images = read_images(tree, group=r"^(\d)\.png")
    assert images.groups == tuple("012") * 3  # one object photographed under three labels


def test_groups_stay_with_their_images(tree: Path) -> None:
    (tree / "0" / "1.png").write_bytes(b"no image")
    found = read_pixels(read_images(tree, group=r"(\d)\.png"), EIGHT)
    assert found.groups == ("0", "2", "0", "1", "2", "0", "1", "2")
    assert found.select(found.labels == 0).groups == ("0", "2")


def test_too_few_images_are_named_before_the_group_that_they_lack(tree: Path) -> None:
    for file in tree.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="has no images"):
        read_images(tree, group="part")


# Pixels


def test_images_without_labels_may_lie_anywhere_in_a_folder_or_a_table(tree: Path) -> None:
    labelled = read_images(tree)
    shutil.copy(tree / labelled.paths[0], tree / "loose.png")
    found = read_unlabelled(tree)
    assert set(found.paths) == {*labelled.paths, Path("loose.png")}
    assert (found.classes, set(found.labels)) == (("unlabelled",), {0})
    rows = [f"{path.as_posix()},{number}" for number, path in enumerate(labelled.paths)]
    (tree / "table.csv").write_text("\n".join(["path,label", *rows]))
    of_table = read_unlabelled(tree / "table.csv")
    assert (of_table.paths, of_table.classes) == (labelled.paths, ("unlabelled",))


def test_a_folder_without_any_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        read_unlabelled(tmp_path)


def test_images_are_read_in_order_with_their_hashes_and_thumbnails(tree: Path) -> None:
    steps: list[int] = []
    found = read_pixels(read_folder(tree), EIGHT, thumbnails=True, progress=steps.append)
    rows = [np.flatnonzero(DIGITS.target == digit)[:3].tolist() for digit in range(3)]
    expected = (DIGITS.images[np.concatenate(rows)] * 15).astype(np.uint8)
    np.testing.assert_array_equal(found.pixels[..., 0], expected)
    assert found.names.tolist() == ["0", "0", "0", "1", "1", "1", "2", "2", "2"]
    assert found.hashes == tuple(hashlib.sha256((tree / path).read_bytes()).hexdigest() for path in found.paths)
    assert [np.asarray(decode(picture))[..., 0].tolist() for picture in found.thumbnails] == expected.tolist()
    assert found.rejected == ()
    assert sum(steps) == 9


def test_unreadable_images_are_left_out_and_named(tree: Path) -> None:
    (tree / "0" / "1.png").write_bytes(b"no image")
    (tree / "2" / "0.png").write_bytes((tree / "2" / "0.png").read_bytes()[:60])
    found = read_pixels(read_folder(tree), EIGHT)
    assert np.bincount(found.labels).tolist() == [2, 3, 2]
    assert len(found) == len(found.pixels) == len(found.hashes) == 7
    first, second = (str(rejected) for rejected in found.rejected)
    assert first.startswith(f"{Path('0/1.png')}: not an image")
    assert second.startswith(f"{Path('2/0.png')}: ")


def test_strict_stops_at_an_unreadable_image(tree: Path) -> None:
    (tree / "0" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: not an image"):
        read_pixels(read_folder(tree), EIGHT, strict=True)


def test_strict_does_not_read_on(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "0" / "0.png").write_bytes(b"no image")
    template = (tree / "1" / "0.png").read_bytes()
    for number in range(500):
        (tree / "1" / f"more {number}.png").write_bytes(template + b" " * number)
    read, lock, reading = [], threading.Lock(), Path.read_bytes

    def counted(path: Path) -> bytes:
        with lock:
            read.append(path)
        return reading(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    with pytest.raises(DataError):
        read_pixels(read_folder(tree), EIGHT, strict=True)
    assert 0 < len(read) < 400


def test_only_unreadable_images_is_an_error_that_names_the_first(tree: Path) -> None:
    for file in tree.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 9 images .* the first: 0.0\.png: the file is empty"):
        read_pixels(read_folder(tree), EIGHT)


def test_a_file_that_vanished_is_named(tree: Path) -> None:
    images = read_folder(tree)
    (tree / "1" / "2.png").unlink()
    (rejected,) = read_pixels(images, EIGHT).rejected
    assert str(rejected) == f"{Path('1/2.png')}: cannot be read (No such file or directory)"


def test_images_over_a_limit_are_left_out(tree: Path) -> None:
    Image.new("L", (30, 30)).save(tree / "0" / "large.png")
    (rejected,) = read_pixels(read_folder(tree), EIGHT, limits=Limits(max_pixels=899)).rejected
    assert "30 × 30 pixels, over the limit of 899" in rejected.reason
    sizes = [file.stat().st_size for file in tree.rglob("?.png")]
    (tree / "1" / "0.png").write_bytes(b" " * (max(sizes) + 1))
    found = read_pixels(read_folder(tree), EIGHT, limits=Limits(max_bytes=max(sizes)))
    assert any("bytes, over the limit" in rejected.reason for rejected in found.rejected)


def test_the_same_bytes_count_once_and_the_copy_names_its_original_and_the_label_that_it_contradicts(
    tree: Path,
) -> None:
    shutil.copy(tree / "0" / "0.png", tree / "0" / "copy.png")
    shutil.copy(tree / "0" / "1.png", tree / "2" / "under another label.png")
    found = read_pixels(read_folder(tree), EIGHT)
    assert np.bincount(found.labels).tolist() == [3, 3, 3]
    assert [rejected.reason for rejected in found.rejected] == [
        f"the same bytes as {Path('0/0.png')}",
        f"the same bytes as {Path('0/1.png')}, which is labelled '0'",
    ]


def test_pixels_need_not_stay_and_rows_tell_where_to_read_them_again(tree: Path) -> None:
    (tree / "0" / "1.png").write_bytes(b"no image")
    images = read_images(tree)
    kept, found = (read_pixels(images, EIGHT, keep_pixels=keep) for keep in (True, False))
    assert (len(found.pixels), found.hashes) == (0, kept.hashes)
    again = [hashlib.sha256(images.read(row)).hexdigest() for row in found.rows.tolist()]
    assert again == list(found.hashes)
    assert found.select(found.labels == 2).rows.tolist() == [6, 7, 8]


def test_selected_images_keep_everything_that_belongs_to_them(tree: Path) -> None:
    found = read_pixels(read_folder(tree), EIGHT, thumbnails=True)
    mask = np.arange(9) % 4 == 0
    part = found.select(mask)
    assert part.classes == found.classes
    for row, kept in enumerate(np.flatnonzero(mask).tolist()):
        assert (part.pixels[row] == found.pixels[kept]).all()
        assert part.names[row] == found.names[kept]
        assert (part.paths[row], part.hashes[row]) == (found.paths[kept], found.hashes[kept])
        assert part.thumbnails[row] == found.thumbnails[kept]


# Fingerprint


def fingerprint(folder: Path) -> str:
    return read_pixels(read_folder(folder), EIGHT).fingerprint


def test_the_fingerprint_depends_on_labels_and_contents_alone(tree: Path) -> None:
    before = fingerprint(tree)
    for file in sorted(tree.rglob("*.png"), reverse=True):
        file.rename(file.with_name(f"renamed {9 - int(file.stem)}.png"))
    os.utime(tree / "0" / "renamed 9.png", (0, 0))
    assert fingerprint(tree) == before


@pytest.mark.parametrize("change", ["content", "label", "missing", "class name"])
def test_the_fingerprint_sees_every_change(tree: Path, change: str) -> None:
    before = fingerprint(tree)
    match change:
        case "content":
            save_digit(1000, tree / "0" / "0.png")
        case "label":
            (tree / "0" / "0.png").rename(tree / "1" / "moved.png")
        case "missing":
            (tree / "0" / "0.png").unlink()
        case "class name":
            (tree / "0").rename(tree / "zero")
    assert fingerprint(tree) != before
