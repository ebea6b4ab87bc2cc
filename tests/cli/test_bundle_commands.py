"""`coterie bundle info` and `verify`: a bundle that is not what it says ends with 1 and the name of the file."""

import json
import shutil

import pytest

from coterie import Bundle
from coterie.bundle import Manifest

FILES = ["README.md", "clusters.parquet", "gallery.parquet", "manifest.json", "model.onnx"]


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_bundle.path, tmp_path / "bundle")


def sign(bundle, **changes):
    """Change values of the manifest and give it the id that belongs to them, as a forger would."""
    values = json.loads((bundle / "manifest.json").read_text("utf-8")) | changes
    values["id"] = Manifest.model_validate(values).compute_id()
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (bundle / "manifest.json").write_text(text + "\n", "utf-8")


def flip(file, position=0.5):
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def replace_by_link(file):
    elsewhere = file.rename(file.parents[1] / file.name)
    file.symlink_to(elsewhere)


def move_into_folder(file):
    content = file.read_bytes()
    file.unlink()
    file.mkdir()
    (file / file.name).write_bytes(content)


DAMAGE = {
    "a flipped byte at the start": lambda file: flip(file, 0),
    "a flipped byte in the middle": flip,
    "a flipped byte at the end": lambda file: flip(file, 1),
    "one byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "missing": lambda file: file.unlink(),
    "a link to the same content": replace_by_link,
    "a folder": move_into_folder,
}


def test_a_whole_bundle_is_verified(coterie, bundle):
    code, out, err = coterie("bundle", "verify", bundle)
    assert (code, err) == (0, "")
    assert "is whole: sha256:" in " ".join(out.split())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file_ends_with_1_and_its_name(coterie, bundle, name, damage):
    DAMAGE[damage](bundle / name)
    code, out, err = coterie("bundle", "verify", bundle)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and name in line
    code, _, err = coterie("bundle", "info", bundle)
    assert code == 2
    assert name in err


@pytest.mark.parametrize("extra", ["notes.txt", ".hidden", "folder/", "folder/model.onnx", "model.onnx.data"])
def test_what_does_not_belong_to_it_ends_with_1_and_its_name(coterie, bundle, extra):
    place = bundle / extra
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if extra.endswith("/") else place.write_bytes(b"")
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert f"{bundle / extra.split('/')[0]} does not belong to the bundle" in err


def test_a_link_that_does_not_belong_to_it_ends_with_1_and_its_name(coterie, bundle):
    (bundle / "link").symlink_to("/etc/passwd")
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert f"{bundle / 'link'} does not belong to the bundle" in err


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "folder/../../outside"])
def test_a_signed_path_outside_of_the_directory_ends_with_1_and_its_name(coterie, bundle, name):
    files = json.loads((bundle / "manifest.json").read_text("utf-8"))["files"]
    sign(bundle, files={**files, name: files["README.md"]})
    (bundle.parent / "outside").write_bytes((bundle / "README.md").read_bytes())
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert "manifest.json" in err and f"'{name}'" in err


def test_a_signed_path_in_place_of_a_file_ends_with_1(coterie, bundle):
    files = json.loads((bundle / "manifest.json").read_text("utf-8"))["files"]
    files["../model.onnx"] = files.pop("model.onnx")
    sign(bundle, files=files)
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert "manifest.json" in err and "'../model.onnx'" in err


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"embedding_dim": 33}, "model.onnx"),
        ({"embedding_dim": 0}, "model.onnx"),
        ({"input_size": [16, 17]}, "model.onnx"),
    ],
)
def test_a_signed_size_that_is_not_the_models_ends_with_1(coterie, bundle, changes, name):
    encoder = json.loads((bundle / "manifest.json").read_text("utf-8"))["encoder"]
    sign(bundle, encoder=encoder | changes)
    Bundle.open(bundle)  # every checksum is right
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert f"{bundle / name} does not have the size and width its manifest states" in err


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"gallery_size": 1}, "gallery.parquet"), ({"classes": ["0", "1"]}, "clusters.parquet")],
)
def test_signed_classes_and_counts_that_are_not_the_gallerys_end_with_1(coterie, bundle, changes, name):
    sign(bundle, **changes)
    code, _, err = coterie("bundle", "verify", bundle)
    assert code == 1
    assert name in err


@pytest.mark.parametrize("where", ["nowhere", ".", "model.onnx"])
def test_what_is_no_bundle_ends_with_1(coterie, bundle, where):
    path = bundle.parent if where == "." else bundle / where
    code, _, err = coterie("bundle", "verify", path)
    assert code == 1
    assert "is not a bundle" in err


def test_info_shows_names_as_they_are(coterie, bundle):
    names = ["[/]", "[bold]", "ä [red]x[/red]"]
    sign(bundle, name="[bold] gallery", classes=names)
    code, out, _ = coterie("bundle", "info", bundle)
    assert code == 0
    assert "[bold] gallery" in out
    assert ", ".join(names) in out
