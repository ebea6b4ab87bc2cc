"""Embedding many images: what is written, what is left out, and that a kill costs neither rows nor order."""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coterie.decoding import decoding_processes
from coterie.embedding import embed_images
from coterie.encoder import Encoder
from coterie.errors import CoterieError, DataError
from coterie.gallery import matrix_column
from coterie.shards import hold
from coterie_cli.main import main

CUT = b"\x89PNG\r\n\x1a\n and no more"


def embed(bundle, data, out, **options):
    return embed_images(bundle.path, data, out, device="cpu", **{"workers": 0, "shard": 16, **options})


def rejects(out):
    with out.with_suffix(".rejects.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def leftovers(folder):
    return [path.name for path in folder.glob("*.parts")]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "all.parquet"


@pytest.fixture
def tree(digit_images, tmp_path):
    """Fifty images in folders named after their class."""
    root = tmp_path / "photos"
    for number, (image, label) in enumerate(zip(digit_images.images[:50], digit_images.labels, strict=False)):
        (root / label / "more").mkdir(parents=True, exist_ok=True)
        (root / label / ("more" if number % 2 else "") / f"{number:03d}.png").write_bytes(image)
    return root


@pytest.fixture
def table(digit_images, tmp_path):
    """A hundred images inside a Parquet file, in row groups of 30."""
    file = tmp_path / "photos.parquet"
    columns = {"image": pa.array(digit_images.images[:100], pa.binary()), "label": digit_images.labels[:100].tolist()}
    pq.write_table(pa.table(columns), file, row_group_size=30)
    return file


def test_rows_hold_what_the_bundle_says_of_each_image(tiny_bundle, tree, out):
    result = embed(tiny_bundle, tree, out)
    rows = pq.read_table(out)
    files = [tree / path for path in rows["path"].to_pylist()]
    assert result.images == len(rows) == 50
    assert sorted(files) == sorted(path for path in tree.rglob("*.png"))
    assert rows["label"].to_pylist() == [file.relative_to(tree).parts[0] for file in files]
    assert rows["sha256"].to_pylist() == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    np.testing.assert_allclose(matrix_column(rows["embedding"]), tiny_bundle.embed(files), atol=1e-6)
    assert rejects(out) == {}
    assert leftovers(out.parent) == []


def test_the_file_says_which_bundle_made_it_and_has_vectors_of_one_width(tiny_bundle, tree, out):
    embed(tiny_bundle, tree, out)
    schema = pq.read_schema(out)
    assert schema.field("embedding").type == pa.list_(pa.float32(), tiny_bundle.manifest.encoder.embedding_dim)
    assert schema.metadata[b"coterie.bundle"].decode() == tiny_bundle.manifest.id
    assert schema.metadata[b"coterie.model"].decode() == tiny_bundle.manifest.files["model.onnx"].sha256


def test_decoding_processes_give_the_same_file(tiny_bundle, tree, out):
    embed(tiny_bundle, tree, out)
    embed(tiny_bundle, tree, out.with_name("processes.parquet"), workers=2)
    assert out.read_bytes() == out.with_name("processes.parquet").read_bytes()


def test_as_many_batches_are_embedded_at_once_as_threads_are_asked_for(tiny_bundle, tree, out, monkeypatch):
    embed(tiny_bundle, tree, out)
    meeting, numbers, embed_batch = threading.Barrier(3), count(), Encoder.embed

    def meet(encoder, pixels):
        if next(numbers) < 3:
            meeting.wait(20)  # for the two others, which would never come on fewer threads
        return embed_batch(encoder, pixels)

    monkeypatch.setattr(Encoder, "embed", meet)
    embed(tiny_bundle, tree, out.with_name("threads.parquet"), threads=3)
    assert out.read_bytes() == out.with_name("threads.parquet").read_bytes()


def test_unreadable_images_are_listed_with_their_reason_and_the_others_stay(tiny_bundle, tree, out):
    (tree / "0" / "cut.png").write_bytes(CUT)
    (tree / "1" / "empty.jpg").touch()
    result = embed(tiny_bundle, tree, out)
    assert (result.images, result.rejected) == (50, 2)
    found = rejects(out)
    assert found.keys() == {"0/cut.png", "1/empty.jpg"}
    assert found["1/empty.jpg"] == "the file is empty"
    assert not set(found) & set(pq.read_table(out)["path"].to_pylist())


def test_only_unreadable_images_is_an_error_and_leaves_their_reasons_alone(tiny_bundle, tmp_path, out):
    data = tmp_path / "bad"
    data.mkdir()
    (data / "cut.png").write_bytes(CUT)
    with pytest.raises(DataError, match=r"none of the 1 images in .*all\.rejects\.csv has the reasons"):
        embed(tiny_bundle, data, out)
    assert rejects(out).keys() == {"cut.png"}
    assert not out.exists()
    assert leftovers(out.parent) == []


def test_one_image_beside_the_folders_leaves_all_without_a_label(tiny_bundle, tree, out):
    (tree / "another.png").write_bytes(next(tree.rglob("*.png")).read_bytes())
    embed(tiny_bundle, tree, out)
    rows = pq.read_table(out)
    assert len(rows) == 51
    assert rows["label"].null_count == 51


def test_hidden_and_foreign_files_are_passed_over(tiny_bundle, tree, out):
    (tree / ".cache").mkdir()
    (tree / ".cache" / "1.png").write_bytes(CUT)
    (tree / "0" / ".2.png").write_bytes(CUT)
    (tree / "0" / "notes.txt").write_text("no image")
    assert embed(tiny_bundle, tree, out).rejected == 0


def test_a_name_that_is_not_text_is_written_escaped(tiny_bundle, tree, out):
    image = next(tree.rglob("*.png")).read_bytes()
    try:
        Path(os.fsdecode(os.fsencode(tree / "0") + b"/\xff.png")).write_bytes(image)
    except OSError:
        pytest.skip("this file system takes only text for names")
    embed(tiny_bundle, tree, out)
    assert r"0/\udcff.png" in pq.read_table(out)["path"].to_pylist()


@pytest.mark.parametrize("header", ["path", "label,path"])
def test_a_csv_may_do_without_labels(tiny_bundle, tree, out, header):
    paths = sorted(path.relative_to(tree.parent).as_posix() for path in tree.rglob("*.png"))
    lines = [header, *(path if header == "path" else f"class {path[-5]},{path}" for path in paths), "", '"nowhere.png"']
    if header == "label,path":
        lines[-1] = ",nowhere.png"
    table = tree.parent / "images.csv"
    table.write_text("\n".join(lines) + "\n")
    embed(tiny_bundle, table, out)
    rows = pq.read_table(out)
    assert rows["path"].to_pylist() == paths
    assert rows["label"].to_pylist() == [None if header == "path" else f"class {path[-5]}" for path in paths]
    assert rejects(out) == {"nowhere.png": "cannot be read (No such file or directory)"}


def test_images_inside_a_parquet_file_keep_order_labels_and_digests(tiny_bundle, digit_images, table, out):
    embed(tiny_bundle, table, out)
    rows = pq.read_table(out)
    assert rows["path"].to_pylist() == [f"photos/{row}" for row in range(100)]
    assert rows["label"].to_pylist() == digit_images.labels[:100].tolist()
    assert rows["sha256"].to_pylist() == [hashlib.sha256(image).hexdigest() for image in digit_images.images[:100]]
    expected = tiny_bundle.embed(digit_images.images[:100])
    np.testing.assert_allclose(matrix_column(rows["embedding"]), expected, atol=1e-6)


def test_structs_of_bytes_and_paths_with_numbered_classes(tiny_bundle, digit_images, tree, out):
    file = next(tree.rglob("*.png"))
    images = [
        {"bytes": digit_images.images[0], "path": "inside.png"},
        {"bytes": None, "path": file.relative_to(tree.parent).as_posix()},
        {"bytes": None, "path": None},
    ]
    names = '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    columns = {"image": images, "label": pa.array([1, -1, 0])}
    table = pa.table(columns).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, tree.parent / "mixed.parquet")
    embed(tiny_bundle, tree.parent / "mixed.parquet", out)
    rows = pq.read_table(out)
    assert rows["path"].to_pylist() == ["inside.png", images[1]["path"]]
    assert rows["label"].to_pylist() == ["dog", None]
    assert rejects(out) == {"mixed/2": "the file is empty"}


def test_what_holds_no_images_is_refused_before_anything_is_written(tiny_bundle, tmp_path, out):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"image": [1.5]}), tmp_path / "numbers.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name, message in {
        "empty": "has no images",
        "numbers.parquet": "double",
        "text.parquet": "cannot be read as Parquet",
        "nowhere": "is not a folder",
        "no.parquet": "cannot be read",
    }.items():
        with pytest.raises(DataError, match=message):
            embed(tiny_bundle, tmp_path / name, out)
    assert not out.parent.exists()


def test_a_file_that_is_there_is_replaced_only_on_request(tiny_bundle, tree, out):
    embed(tiny_bundle, tree, out)
    first = out.read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        embed(tiny_bundle, tree, out)
    shutil.rmtree(tree / "0")
    embed(tiny_bundle, tree, out, overwrite=True)
    assert out.read_bytes() != first


def test_the_input_is_not_overwritten(tiny_bundle, table):
    before = table.read_bytes()
    with pytest.raises(DataError, match="is the table that is to be read"):
        embed(tiny_bundle, table, table, overwrite=True)
    assert table.read_bytes() == before


@pytest.fixture
def unfinished(tiny_bundle, tree, out, monkeypatch):
    """All shards are written, and then the power goes."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coterie.embedding.join", stop)
        embed(tiny_bundle, tree, out)
    return tree


def test_finished_shards_are_not_done_again(tiny_bundle, unfinished, out, monkeypatch):
    monkeypatch.delattr(Encoder, "embed")
    assert embed(tiny_bundle, unfinished, out).images == 50


def test_the_work_of_another_run_is_named_and_given_up_only_on_request(tiny_bundle, unfinished, out):
    shutil.rmtree(unfinished / "0")
    with pytest.raises(DataError, match=r"its data and images differ: .* --restart"):
        embed(tiny_bundle, unfinished, out)
    left = len(list(unfinished.rglob("*.png")))
    assert embed(tiny_bundle, unfinished, out, restart=True).images == len(pq.read_table(out)) == left < 50


def test_a_damaged_shard_is_named(tiny_bundle, unfinished, out):
    (out.parent / "all.parquet.parts" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"00001\.parquet is damaged .* --restart"):
        embed(tiny_bundle, unfinished, out)


def test_two_at_once_on_one_output_are_refused(tiny_bundle, tree, out):
    with hold(out.with_name("all.parquet.parts")), pytest.raises(CoterieError, match="in use: another process"):
        embed(tiny_bundle, tree, out)
    assert embed(tiny_bundle, tree, out).images == 50


def test_a_killed_decoding_process_is_one_clear_error(tiny_bundle, tree, out, monkeypatch):
    def broken(workers):
        pool = decoding_processes(workers)
        assert isinstance(pool.submit(os._exit, 1).exception(), BrokenProcessPool)
        return pool

    with monkeypatch.context() as patch, pytest.raises(CoterieError, match=r"was killed, .* fewer --workers"):
        patch.setattr("coterie.embedding.decoding_processes", broken)
        embed(tiny_bundle, tree, out, workers=1)
    assert embed(tiny_bundle, tree, out).images == 50


BEGIN = """
import sys
from pathlib import Path
from coterie import embedding

write_part = embedding.write_part

def written_and_said(*arguments):
    write_part(*arguments)
    print("a shard", flush=True)

if __name__ == "__main__":
    embedding.write_part = written_and_said
    bundle, data, out = map(Path, sys.argv[1:])
    embedding.embed_images(bundle, data, out, device="cpu", workers=1, shard=2)
"""


def begin_and_kill(bundle, data, out, shards):
    """Kill it when it has written so many shards more, and see that its processes end, too."""
    script = out.parent / "begin.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(BEGIN)
    command = [sys.executable, script, bundle.path, data, out]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    for _ in range(shards):
        assert process.stdout.readline() == b"a shard\n"
    process.kill()
    # Its decoders have the other end of the pipe; it closes with the last of them.
    process.communicate(timeout=60)
    assert leftovers(out.parent) == ["all.parquet.parts"]
    assert not out.exists()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_killed_three_times_it_ends_with_the_same_file(tiny_bundle, digit_images, tmp_path, out):
    images = list(digit_images.images)
    images[5::40] = [CUT] * len(images[5::40])
    data = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), data, row_group_size=7)
    embed(tiny_bundle, data, out, shard=2)
    undisturbed, reasons = out.read_bytes(), rejects(out)
    out.unlink()
    for shards in (1, 5, 2):
        begin_and_kill(tiny_bundle, data, out, shards)
    embed(tiny_bundle, data, out, shard=2)
    assert out.read_bytes() == undisturbed
    assert rejects(out) == reasons
    assert leftovers(out.parent) == []


def test_the_command_counts_what_was_left_out_on_stderr_and_is_done(tiny_bundle, tree, out, monkeypatch, capsys):
    (tree / "0" / "cut.png").write_bytes(CUT)
    arguments = ["embed", tiny_bundle.path, tree, "--out", out, "--workers", 0, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["coterie", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "1 images were left out" in capsys.readouterr().err
    assert len(pq.read_table(out)) == 50
