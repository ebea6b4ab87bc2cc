"""Images into a gallery, out of it as a file, and into a new bundle."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie.bundle import Bundle
from coterie.decoding import ImageRow
from coterie.enrolment import enrol
from coterie.errors import CoterieError, DataError, QuotaError
from coterie.exchange import export_items, import_items
from coterie.gallery import Gallery
from coterie.items import item_id
from coterie.merging import merge
from coterie.store import StoredItem, StoreOptions
from coterie.stream import open_stream


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def gallery(tiny_bundle: Bundle, state: Path) -> Iterator[Gallery]:
    with tiny_bundle.gallery(state) as gallery:
        yield gallery


@pytest.fixture
def tree(digit_tree_of: Callable[..., Path], tmp_path: Path) -> Path:
    """12 images each of 8 and 9, which are new to the bundle."""
    return digit_tree_of(tmp_path / "new", classes=(8, 9), per_class=12, skip=130)


def enrol_folder(bundle: Bundle, gallery: Gallery, folder: Path, **more):  # type: ignore[no-untyped-def]
    stream = open_stream(folder)
    return enrol(bundle, gallery, stream.rows(0), stream.root, **more)


# Enrolling


def test_a_tree_of_images_is_enrolled_with_pictures_and_images(
    tiny_bundle: Bundle, gallery: Gallery, tree: Path
) -> None:
    steps: list[int] = []
    done = enrol_folder(tiny_bundle, gallery, tree, progress=steps.append)
    assert (len(done.added), done.known, done.rejected, sum(steps)) == (24, 0, (), 24)
    snapshot = gallery.snapshot()
    assert snapshot.clusters.counts[snapshot.clusters.labels.index("9")] == 12
    file = sorted((tree / "8").iterdir())[0]
    row = snapshot.rows[item_id(file.read_bytes())]
    assert snapshot.items.metadata[row] == {"path": f"8/{file.name}"}
    np.testing.assert_allclose(snapshot.items.embeddings[row], tiny_bundle.embed([file])[0], atol=1e-6)
    assert snapshot.items.thumbnails[row].startswith(b"RIFF")
    assert gallery.original(snapshot.items.ids[row]) == file.read_bytes()


def test_the_same_again_enrols_nothing(tiny_bundle: Bundle, gallery: Gallery, tree: Path) -> None:
    enrol_folder(tiny_bundle, gallery, tree / "8", label="8")
    before = gallery.snapshot().sequence
    done = enrol_folder(tiny_bundle, gallery, tree / "8", label="8")
    assert (done.added, done.known) == ((), 12)
    assert gallery.snapshot().sequence == before
    done = enrol_folder(tiny_bundle, gallery, tree)
    assert (len(done.added), done.known) == (12, 12)


def test_another_label_moves_what_is_there(tiny_bundle: Bundle, gallery: Gallery, tree: Path) -> None:
    enrol_folder(tiny_bundle, gallery, tree)
    done = enrol_folder(tiny_bundle, gallery, tree / "8", label="nine")
    assert (len(done.added), done.known) == (12, 0)
    assert "8" not in gallery.snapshot().clusters.labels


def test_what_cannot_be_used_is_left_out_and_named(tiny_bundle: Bundle, gallery: Gallery, tree: Path) -> None:
    first = sorted((tree / "8").iterdir())[0]
    (tree / "8" / "broken.png").write_bytes(b"no image")
    (tree / "9" / "a copy.png").write_bytes(first.read_bytes())
    (tree / "alone.png").write_bytes(b"")  # with it, no image has a label
    done = enrol_folder(tiny_bundle, gallery, tree)
    assert len(done.rejected) == 27 and all("no label" in str(one) for one in done.rejected)
    (tree / "alone.png").unlink()
    done = enrol_folder(tiny_bundle, gallery, tree)
    reasons = {str(one.path): one.reason for one in done.rejected}
    assert reasons.keys() == {"8/broken.png", "9/a copy.png"}
    assert reasons["9/a copy.png"] == f"the same bytes as 8/{first.name}, which is labelled '8'"
    assert len(done.added) == 24


def test_bad_labels_and_paths_harm_no_other(tiny_bundle: Bundle, gallery: Gallery, tree: Path) -> None:
    content = sorted((tree / "8").iterdir())[0].read_bytes()
    rows = [ImageRow("1", "a/b", content), ImageRow("nul\0", "8"), ImageRow("2", "8", content)]
    done = enrol(tiny_bundle, gallery, rows, tree)
    assert (len(done.added), [str(one.path) for one in done.rejected]) == (1, ["1", "nul\0"])


def test_a_full_class_stops_it_and_what_came_before_stays(
    tiny_bundle: Bundle, state: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.enrolment.BATCH", 4)
    with tiny_bundle.gallery(state, options=StoreOptions(class_quota=10)) as gallery:
        with pytest.raises(QuotaError, match="COTERIE_CLASS_QUOTA"):
            enrol_folder(tiny_bundle, gallery, tree)
        assert len(gallery.enrolled_ids()) == 8


# Export and import


@pytest.fixture
def exported(tiny_bundle: Bundle, gallery: Gallery, tree: Path, tmp_path: Path) -> Path:
    enrol_folder(tiny_bundle, gallery, tree)
    gallery.add([StoredItem("without image", "8", np.eye(32, dtype=np.float32)[0], {"ü": [1]}, b"")])
    assert export_items(tiny_bundle, gallery, tmp_path / "out.parquet") == 25
    return tmp_path / "out.parquet"


def test_what_was_exported_can_be_imported_elsewhere(
    tiny_bundle: Bundle, gallery: Gallery, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coterie.exchange.BATCH", 10)
    steps: list[tuple[int, int]] = []
    with tiny_bundle.gallery(tmp_path / "elsewhere") as other:
        progress = lambda *numbers: steps.append(numbers)  # noqa: E731
        assert import_items(tiny_bundle, other, exported, progress=progress) == (25, [])
        assert import_items(tiny_bundle, other, exported) == (25, [])
        mine, theirs = gallery.snapshot(), other.snapshot()
        assert list(mine.items.ids) == list(theirs.items.ids)
        assert mine.items.labels.tolist() == theirs.items.labels.tolist()
        assert list(mine.items.metadata) == list(theirs.items.metadata)
        assert list(mine.items.thumbnails) == list(theirs.items.thumbnails)
        np.testing.assert_array_equal(mine.items.embeddings, theirs.items.embeddings)
        for identifier in other.enrolled_ids():
            assert other.original(identifier) == gallery.original(identifier)
    assert steps == [(10, 25), (10, 25), (5, 25)]


def test_another_encoder_embeds_what_it_imports_and_names_what_it_cannot(
    tiny_bundle: Bundle, exported: Path, tmp_path: Path
) -> None:
    table = pq.read_table(exported)
    other = table.replace_schema_metadata({**table.schema.metadata, b"coterie.model": b"another"})
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(25 * 5, dtype=np.float32)), 5)
    pq.write_table(other.set_column(2, "embedding", zeros), tmp_path / "other.parquet")
    with tiny_bundle.gallery(tmp_path / "elsewhere") as gallery:
        count, rejected = import_items(tiny_bundle, gallery, tmp_path / "other.parquet")
        assert count == 24
        (one,) = rejected
        assert "without image (8): another encoder embedded it" in str(one)
        snapshot = gallery.snapshot()
        name = next(iter(gallery.enrolled_ids()))
        expected = tiny_bundle.embed([gallery.original(name) or b""])[0]
        np.testing.assert_allclose(snapshot.items.embeddings[snapshot.rows[name]], expected, atol=1e-6)


def test_a_file_that_is_no_export_is_refused_with_its_row(
    tiny_bundle: Bundle, gallery: Gallery, exported: Path, tmp_path: Path
) -> None:
    table = pq.read_table(exported)

    def with_value(column: str, row: int, value: object) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        place = table.schema.names.index(column)
        return table.set_column(place, column, pa.array(values, table.schema.field(column).type))

    cases = {
        "row 3: 'a/b' cannot name a class": with_value("label", 3, "a/b"),
        "row 2: row 0 has length 0.0": with_value("embedding", 2, [0.0] * 32),
        "row 1: its image has the id": with_value("original", 1, b"another image"),
        "row 4: its metadata is not a JSON object": with_value("metadata", 4, "[]"),
        "cannot be read as a gallery's export": with_value("metadata", 4, "{"),
        "it has no metadata, thumbnail": table.drop_columns(["metadata", "thumbnail"]),
        "it has no name of an encoder": table.replace_schema_metadata({}),
    }
    with tiny_bundle.gallery(tmp_path / "elsewhere") as other:
        for message, content in cases.items():
            pq.write_table(content, tmp_path / "bad.parquet")
            with pytest.raises(DataError, match=message):
                import_items(tiny_bundle, other, tmp_path / "bad.parquet")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match="cannot be read as a gallery's export"):
            import_items(tiny_bundle, other, tmp_path / "bad.parquet")
        with pytest.raises(DataError, match="cannot be read"):
            import_items(tiny_bundle, other, tmp_path / "nowhere.parquet")
        assert not other.enrolled_ids()


def test_nothing_enrolled_is_nothing_to_export(tiny_bundle: Bundle, gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to export"):
        export_items(tiny_bundle, gallery, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


# A new bundle


def test_merging_makes_a_bundle_whose_own_gallery_is_what_the_gallery_was(
    tiny_bundle: Bundle, gallery: Gallery, tree: Path, tmp_path: Path
) -> None:
    enrol_folder(tiny_bundle, gallery, tree)
    gone = gallery.remove([tiny_bundle.base.items.ids[3]])
    gallery.edit(tiny_bundle.base.items.ids[4], metadata={"edited": True})
    now = gallery.snapshot()
    merged = merge(tiny_bundle, gallery, tmp_path / "merged", card=lambda manifest: f"# {manifest.gallery_size}\n")
    merged.verify()
    assert (merged.path / "README.md").read_text() == f"# {8 * 60 + 24 - 1}\n"
    base = merged.base
    assert list(base.items.ids) == list(now.items.ids) and gone[0] not in base.rows
    assert list(base.items.metadata) == list(now.items.metadata)
    assert list(base.items.thumbnails) == list(now.items.thumbnails)
    np.testing.assert_array_equal(base.items.embeddings, now.items.embeddings)
    for column in ("prototypes", "radii", "counts", "bounds"):
        np.testing.assert_array_equal(getattr(base.clusters, column), getattr(now.clusters, column))
    manifest = merged.manifest
    assert manifest.calibration == tiny_bundle.manifest.calibration
    assert manifest.files["model.onnx"] == tiny_bundle.manifest.files["model.onnx"]
    assert (manifest.name, manifest.accuracy) == ("tiny-digits", {})
    assert manifest.provenance["merged"] == {"bundle": tiny_bundle.manifest.id, "enrolled": 24, "removed": 1}
    # The map of this bundle is its embeddings' first two values, a linear map like any.
    np.testing.assert_allclose(base.items.positions, base.items.embeddings[:, :2], atol=1e-4)


def test_a_service_of_the_merged_bundle_goes_on_with_the_same_state(
    tiny_bundle: Bundle, gallery: Gallery, state: Path, tree: Path, tmp_path: Path
) -> None:
    enrol_folder(tiny_bundle, gallery, tree)
    gallery.remove([tiny_bundle.base.items.ids[3]])
    now = gallery.snapshot()
    merged = merge(tiny_bundle, gallery, tmp_path / "merged", card=lambda _: "")
    with merged.gallery(state) as again:
        assert set(again.snapshot().rows) == set(now.rows)
        for column in ("labels", "counts", "radii", "bounds"):
            np.testing.assert_array_equal(getattr(again.snapshot().clusters, column), getattr(now.clusters, column))


def test_images_held_out_calibrate_the_merged_bundle(
    tiny_bundle: Bundle, gallery: Gallery, tree: Path, tmp_path: Path, digit_images
) -> None:
    enrol_folder(tiny_bundle, gallery, tree)
    held_out = tiny_bundle.embed(digit_images.images), digit_images.labels
    merged = merge(tiny_bundle, gallery, tmp_path / "merged", card=lambda _: "", held_out=held_out)
    manifest = merged.manifest
    assert manifest.calibration.images == 300 != tiny_bundle.manifest.calibration.images
    assert manifest.accuracy["held_out_images"] == 300
    assert manifest.accuracy["held_out_top1"] > 0.85
    assert set(merged.base.clusters.bounds.ravel().tolist()) == {2.0}  # the new classes were calibrated on, too
    with pytest.raises(CoterieError, match="exists already"):
        merge(tiny_bundle, gallery, tmp_path / "merged", card=lambda _: "")


def test_an_empty_gallery_makes_no_bundle(tiny_bundle: Bundle, gallery: Gallery, tmp_path: Path) -> None:
    gallery.remove(tiny_bundle.base.items.ids)
    with pytest.raises(DataError, match="every item of this gallery was removed"):
        merge(tiny_bundle, gallery, tmp_path / "merged", card=lambda _: "")
    assert json.dumps([entry.name for entry in tmp_path.iterdir()]) == '["state"]'
