"""Tables of labelled images: what a CSV or a Parquet file may look like, and what is wrong with those that may not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie.dataset import LabelledPixels, read_images, read_pixels
from coterie.errors import DataError
from coterie.images import Preprocessing

EIGHT = Preprocessing(input_size=(8, 8))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def tree(digit_tree_of: Callable[..., Path], tmp_path: Path) -> Path:
    """Three images of each digit from 0 to 2."""
    return digit_tree_of(tmp_path / "digits", classes=range(3), per_class=3)


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str | bytes) -> Path:
        file = tmp_path / "labels.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    def write(metadata: dict[str, str] | None = None, **columns: pa.Array | list[object]) -> Path:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "images.parquet")
        return tmp_path / "images.parquet"

    return write


def files(tree: Path) -> list[Path]:
    return sorted(tree.rglob("*.png"))


def pixels(data: Path, group: str | None = None) -> LabelledPixels:
    return read_pixels(read_images(data, group=group), EIGHT)


def hugging_face(**features: object) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_the_same_images_are_the_same_whichever_form_they_come_in(tree, write_csv, write_parquet):
    found = files(tree)
    rows = "".join(f"{path.relative_to(tree.parent)},{path.parent.name}\n" for path in found)
    table = write_csv("path,label\n" + rows)
    columns = write_parquet(
        image=[path.read_bytes() for path in found], label=[int(path.parent.name) for path in found]
    )
    forms = [pixels(form) for form in (tree, table, columns)]
    assert len({form.fingerprint for form in forms}) == 1
    for form in forms:
        assert form.classes == ("0", "1", "2")
        np.testing.assert_array_equal(form.pixels, forms[0].pixels)


# CSV


@pytest.mark.parametrize("image", ["path", "image", "file", "filename", "file_name", "filepath", "image_path", "Image"])
@pytest.mark.parametrize("label", ["label", "class", "category", "Label"])
def test_columns_go_by_several_names_in_any_order(write_csv, image, label):
    images = read_images(write_csv(f"width,{label},{image},height\n640,cat,a/1.png,480\n640,dog,a/2.png,480\n"))
    assert [path.as_posix() for path in images.paths] == ["a/1.png", "a/2.png"]
    assert (images.classes, images.labels.tolist()) == (("cat", "dog"), [0, 1])


def test_rows_keep_their_order_and_classes_are_sorted(write_csv):
    images = read_images(write_csv("path,label\n3.png,dog\n1.png,cat\n2.png,dog\n"))
    assert [path.name for path in images.paths] == ["3.png", "1.png", "2.png"]
    assert (images.classes, images.labels.tolist()) == (("cat", "dog"), [1, 0, 1])


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfpath,label\n1.png,K\xc3\xa4fer\n2.png,7\n",
        b"path,label\r\n1.png,K\xc3\xa4fer\r\n\r\n2.png,7",
        b'"path","label"\n"1.png","K\xc3\xa4fer"\n2.png,7\n\n',
    ],
    ids=["byte order mark", "carriage returns and blank lines", "quotes"],
)
def test_what_spreadsheets_write_is_read(write_csv, text):
    images = read_images(write_csv(text))
    assert (images.classes, images.labels.tolist()) == (("7", "Käfer"), [1, 0])


def test_paths_are_relative_to_the_table_or_absolute(tree, write_csv):
    first, second, *_ = files(tree)
    found = pixels(write_csv(f"path,label\n{first.relative_to(tree.parent)},a\n{second},b\n"))
    assert len(found) == 2


def test_a_missing_image_file_is_left_out_with_a_reason(tree, write_csv):
    found = pixels(write_csv(f"path,label\n{files(tree)[0]},a\ngone.png,b\n"))
    assert len(found) == 1
    assert [str(rejected) for rejected in found.rejected] == ["gone.png: cannot be read (No such file or directory)"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,species", r"no label column: it has 'path', 'species'; name it one of label, class, category"),
        ("picture,label", r"no image column: it has 'picture', 'label'; name it one of path, image, file"),
        ("path;label", r"no image column: it has 'path;label'"),
        ("path,label,file", r"more than one image column, 'path', 'file'"),
        ("path,label,class", r"more than one label column, 'label', 'class'"),
        ("path,label,label", r"more than one label column, 'label', 'label'"),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_listed(write_csv, header, message):
    with pytest.raises(DataError, match=message):
        read_images(write_csv(f"{header}\n1.png,cat,dog\n"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1.png,cat\n2.png\n", "line 3: 1 values where the header has 2"),
        ("1.png,cat\n2.png,cat,dog\n", "line 3: 3 values where the header has 2"),
        ('1.png,cat\n\n"a\nb.png",cat\n2.png\n', "line 6: 1 values"),
        ("1.png,cat\n2.png,\n", "line 3: the label is missing"),
        ("1.png,cat\n , cat\n", "line 3: the image is missing"),
        ("1.png,cat\n2.png,a/b\n", "line 3: 'a/b' cannot name a class"),
        ("1.png,cat\n2.png,..\n", r"line 3: '\.\.' cannot name a class"),
        ("1.png,cat\n2\0.png,cat\n", "line 3: the image has a null character"),
        ('1.png,cat\n"2.png,cat\n3.png,cat\n', "line 3: not CSV from here on"),
        ("1.png,cat\n" + '"' + "2.png,cat\n" * 20_000, "line 3: not CSV from here on"),
    ],
    ids=[
        "too few",
        "too many",
        "after a quoted line break",
        "no label",
        "no path",
        "slash",
        "dots",
        "null",
        "open quote",
        "open quote in a large file",
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(write_csv, rows, message):
    with pytest.raises(DataError, match=rf"labels\.csv, {message}"):
        read_images(write_csv("path,label\n" + rows))


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_another_encoding_is_named_with_the_line(write_csv, bom):
    with pytest.raises(DataError, match="line 3: not UTF-8"):
        read_images(write_csv(bom + b"path,label\n1.png,cat\n2.png,K\xe4fer\n3.png,cat\n"))


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("\n\n", "is empty"), ("path,label\n\n", "has a header but no rows")]
)
def test_an_empty_table_says_what_to_write(write_csv, text, message):
    with pytest.raises(DataError, match=message):
        read_images(write_csv(text))


@pytest.mark.parametrize("name", ["gone.csv", "gone.parquet"])
def test_a_missing_table_is_named(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} cannot be read .*No such file"):
        read_images(tmp_path / name)


def test_too_few_classes_or_images_are_named(write_csv):
    table = write_csv("path,label\n1.png,cat\n2.png,cat\n3.png,dog\n")
    with pytest.raises(DataError, match=r"labels\.csv has only 2 classes \(cat, dog\), at least 3"):
        read_images(table, min_classes=3)
    with pytest.raises(DataError, match=r"class 'dog' in .*labels\.csv has only 1 image, at least 2"):
        read_images(table, min_images=2)


# One label an image


@pytest.mark.parametrize("label", ["cat|dog", "cat;dog", '"cat,dog"', '"dog, cat"', "cat|dog|cat"])
def test_several_labels_in_a_cell_are_refused(write_csv, label):
    with pytest.raises(DataError, match=r"line 4: multi-label: .* is made of other rows' labels"):
        read_images(write_csv(f"path,label\n1.png,cat\n2.png,dog\n3.png,{label}\n"))


@pytest.mark.parametrize("label", ["cat|bird", '"cat, brown"', "cat;"])
def test_a_label_may_have_separators_where_its_parts_are_no_labels(write_csv, label):
    images = read_images(write_csv(f"path,label\n1.png,cat\n2.png,dog\n3.png,{label}\n"))
    assert len(images.classes) == 3


def test_one_path_under_two_labels_is_refused(write_csv):
    with pytest.raises(
        DataError, match=r"line 4: multi-label: 1\.png is labelled 'dog' here and 'cat' before \(.*line 2\)"
    ):
        read_images(write_csv("path,label\n1.png,cat\n2.png,dog\n1.png,dog\n"))


def test_one_path_twice_under_one_label_counts_once(tree, write_csv):
    first, second, *_ = files(tree)
    found = pixels(write_csv(f"path,label\n{first},a\n{second},b\n{first},a\n"))
    assert [rejected.reason for rejected in found.rejected] == [f"the same bytes as {first}"]


def test_one_content_under_two_labels_is_left_out_and_says_so(tree, write_parquet):
    content = files(tree)[0].read_bytes()
    found = pixels(write_parquet(image=[content, content], label=["cat", "dog"]))
    assert [str(rejected) for rejected in found.rejected] == [
        "images/1: the same bytes as images/0, which is labelled 'cat'"
    ]


def test_a_column_of_lists_is_refused(write_parquet):
    for kind in (pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 1)):
        with pytest.raises(DataError, match="column 'label': multi-label: it holds lists"):
            read_images(write_parquet(path=["1.png"], label=pa.array([[1]], kind)))


# Parquet


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), IMAGE, {"bytes": pa.binary(), "path": pa.null()}]
)
def test_images_may_lie_in_the_table_as_bytes(tree, write_parquet, kind):
    contents = [path.read_bytes() for path in files(tree)]
    kind = pa.struct(kind) if isinstance(kind, dict) else kind
    rows = [{"bytes": content, "path": None} for content in contents] if pa.types.is_struct(kind) else contents
    found = pixels(write_parquet(image=pa.array(rows, kind), label=[0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert found.fingerprint == pixels(tree).fingerprint
    assert [path.as_posix() for path in found.paths] == [f"images/{row}" for row in range(9)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string()), IMAGE])
def test_images_may_lie_beside_the_table(tree, write_parquet, kind):
    names = [path.relative_to(tree.parent).as_posix() for path in files(tree)]
    rows = [{"bytes": None, "path": name} for name in names] if kind == IMAGE else names
    found = pixels(write_parquet(image=pa.array(rows, kind), label=[0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert found.fingerprint == pixels(tree).fingerprint
    assert [path.as_posix() for path in found.paths] == names


def test_some_images_may_lie_in_the_table_and_others_beside_it(tree, write_parquet):
    first, second, *_ = files(tree)
    rows = [{"bytes": first.read_bytes(), "path": "1.png"}, {"bytes": None, "path": str(second)}]
    found = pixels(write_parquet(image=pa.array(rows, IMAGE), label=["a", "b"]))
    assert found.paths == (Path("1.png"), second)


def test_images_in_the_table_may_share_a_name(tree, write_parquet):
    rows = [{"bytes": path.read_bytes(), "path": "1.png"} for path in files(tree)]
    assert len(pixels(write_parquet(image=pa.array(rows, IMAGE), label=[0, 0, 0, 1, 1, 1, 2, 2, 2]))) == 9


def test_an_image_in_the_table_that_is_none_is_left_out(tree, write_parquet):
    found = pixels(write_parquet(image=[files(tree)[0].read_bytes(), b"", b"no image"], label=["a", "a", "b"]))
    empty, foreign = (str(rejected) for rejected in found.rejected)
    assert empty == "images/1: the file is empty"
    assert foreign.startswith("images/2: not an image")


@pytest.mark.parametrize(
    "labels",
    [
        ["7", "10", "7"],
        [7, 10, 7],
        pa.array([7, 10, 7], pa.uint8()),
        pa.array(["7", "10", "7"]).dictionary_encode(),
        pa.array([7, 10, 7]).dictionary_encode(),
    ],
)
def test_labels_may_be_text_or_whole_numbers(write_parquet, labels):
    images = read_images(write_parquet(path=["1", "2", "3"], label=labels))
    assert (images.classes, images.labels.tolist()) == (("10", "7"), [1, 0, 1])


def test_hugging_face_class_labels_get_their_names(write_parquet):
    features = hugging_face(label={"names": ["dog", "cat", "bird"], "_type": "ClassLabel"}, image={"_type": "Image"})
    images = read_images(write_parquet(features, path=["1", "2", "3"], label=[1, 0, 1]))
    assert (images.classes, images.labels.tolist()) == (("cat", "dog"), [0, 1, 0])


@pytest.mark.parametrize(
    "metadata",
    [
        hugging_face(label={"dtype": "int64", "_type": "Value"}),
        hugging_face(other={"names": ["dog"], "_type": "ClassLabel"}),
        {"huggingface": "[]"},
        {"huggingface": "{"},
        {"pandas": "{}"},
    ],
)
def test_whole_numbers_without_names_stay_numbers(write_parquet, metadata):
    assert read_images(write_parquet(metadata, path=["1", "2"], label=[1, 0])).classes == ("0", "1")


def test_text_beside_class_names_stays_as_it_is(write_parquet):
    features = hugging_face(label={"names": ["dog", "cat"], "_type": "ClassLabel"})
    assert read_images(write_parquet(features, path=["1", "2"], label=["0", "bird"])).classes == ("0", "bird")


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_without_a_name_is_refused(write_parquet, number):
    features = hugging_face(label={"names": ["dog", "cat"], "_type": "ClassLabel"})
    with pytest.raises(DataError, match=f"column 'label', row 1: {number} is none of the 2 classes"):
        read_images(write_parquet(features, path=["1", "2"], label=[1, number]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["1", "2"]}, "no label column: it has 'path'"),
        ({"path": ["1", "2"], "image": [b"1", b"2"], "label": [0, 1]}, "more than one image column, 'path', 'image'"),
        ({"path": ["1", "2"], "label": [0.0, 1.0]}, "column 'label': it is of type double"),
        ({"path": [1.5, 2.5], "label": [0, 1]}, "column 'path': it is of type double"),
        ({"image": [{"x": 1}, {"x": 2}], "label": [0, 1]}, "has the fields bytes and path"),
        ({"image": [{"bytes": "1", "path": "1"}], "label": [0]}, "its bytes are of type string"),
        ({"path": ["1", "2"], "label": [0, None]}, r"images\.parquet, row 1: the label is missing"),
        ({"path": ["1", None], "label": [0, 1]}, "row 1: the image is missing"),
        ({"image": [b"1", None], "label": [0, 1]}, "row 1: the image is missing"),
        ({"image": [{"bytes": None, "path": None}], "label": [0]}, "row 0: the image is missing"),
        ({"path": ["1", "2"], "label": ["a", "a/b"]}, "row 1: 'a/b' cannot name a class"),
        ({"path": ["1", "2", "3"], "label": ["a", "b", "a|b"]}, "row 2: multi-label"),
        ({"path": ["1", "1"], "label": ["a", "b"]}, "row 1: multi-label: 1 is labelled 'b' here"),
        ({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "has no rows"),
        ({"path": pa.array([b"\xff"]).view(pa.string()), "label": ["a"]}, "cannot be read as Parquet: .*utf-8"),
    ],
)
def test_a_parquet_file_that_cannot_be_used_says_why(write_parquet, columns, message):
    with pytest.raises(DataError, match=message):
        read_images(write_parquet(**columns))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"path,label\n", lambda data: data[:-20]])
def test_a_damaged_parquet_file_is_refused(write_parquet, damage):
    file = write_parquet(path=["1", "2"], label=["a", "b"])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"images\.parquet cannot be read as Parquet"):
        read_images(file)


def test_damage_inside_a_parquet_file_is_refused(write_parquet):
    file = write_parquet(path=[str(row) for row in range(1000)], label=["a"] * 1000)
    data = bytearray(file.read_bytes())
    data[4:40] = bytes(36)
    file.write_bytes(data)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_images(file)


# Groups


def test_a_column_names_the_object_of_each_image(write_csv, write_parquet):
    table = write_csv("path,label,part\n1.png,good,17\n2.png,bad,17\n3.png,bad,18\n")
    assert read_images(table).groups is None
    assert read_images(table, group="part").groups == ("17", "17", "18")
    for parts in ([17, 17, 18], ["17", "17", "18"], pa.array(["17", "17", "18"]).dictionary_encode()):
        columns = write_parquet(path=["1", "2", "3"], label=["good", "bad", "bad"], part=parts)
        assert read_images(columns, group="part").groups == ("17", "17", "18")


def test_groups_follow_their_images_past_those_left_out(tree, write_csv):
    first, second, *_ = files(tree)
    found = pixels(write_csv(f"path,label,part\n{first},a,1\ngone.png,a,2\n{second},b,3\n"), group="part")
    assert found.groups == ("1", "3")


def test_a_group_column_that_is_missing_or_has_gaps_is_named(write_csv, write_parquet):
    with pytest.raises(DataError, match="no column 'piece' to group by: it has 'path', 'label', 'part'"):
        read_images(write_csv("path,label,part\n1.png,a,1\n"), group="piece")
    with pytest.raises(DataError, match="several columns 'part' to group by"):
        read_images(write_csv("path,label,part,part\n1.png,a,1,2\n"), group="part")
    with pytest.raises(DataError, match="line 3: the group is missing"):
        read_images(write_csv("path,label,part\n1.png,a,1\n2.png,a,\n"), group="part")
    with pytest.raises(DataError, match="row 1: the group is missing"):
        read_images(write_parquet(path=["1", "2"], label=["a", "a"], part=["1", None]), group="part")
    with pytest.raises(DataError, match="column 'part': it is of type double"):
        read_images(write_parquet(path=["1", "2"], label=["a", "a"], part=[1.0, 2.0]), group="part")


def test_classes_may_serve_as_groups(write_parquet):
    table = write_parquet(path=["1", "2"], label=["a", "b"])
    assert read_images(table, group="label").groups == ("a", "b")
