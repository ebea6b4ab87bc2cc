"""The bundle: an immutable directory that holds an encoder, its gallery, its clusters and their calibration.

manifest.json     what the rest is, with the sha256 and size of every file; `id` is the sha256 of the manifest
model.onnx        the encoder
gallery.parquet   labelled embeddings with thumbnails and metadata
clusters.parquet  class clusters
README.md         the model card
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, field_validator

from coterie.anew import embed_anew
from coterie.classifier import Calibration, Classification, classify
from coterie.clusters import ClassClusters
from coterie.encoder import Encoder
from coterie.errors import BundleError, DataError, ImageError
from coterie.files import atomic_directory
from coterie.gallery import Gallery, GalleryItems, Snapshot, matrix_column
from coterie.images import ImageSource, Preprocessing, load_pixels
from coterie.index import IndexOptions
from coterie.labels import check_label
from coterie.providers import check_device
from coterie.session import model_shapes
from coterie.store import Store, StoreOptions

__all__ = ["Bundle", "EncoderCard", "FileEntry", "Manifest", "write_bundle"]

FORMAT = 2
MODEL, GALLERY, CLUSTERS, CARD = "model.onnx", "gallery.parquet", "clusters.parquet", "README.md"
MANIFEST = "manifest.json"
FILES = frozenset({MODEL, GALLERY, CLUSTERS, CARD})
# BentoML's model store adds this to a bundle that is kept there.
FOREIGN = frozenset({"model.yaml"})


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderCard(Preprocessing):
    """The encoder and the pixels it expects; `mean` and `std` are already part of the graph."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding_dim: int
    precision: Literal["fp32", "fp16", "int8"] = "fp32"

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(**{name: getattr(self, name) for name in Preprocessing.model_fields})


class FileEntry(_Frozen):
    """One file of the bundle."""

    sha256: str
    size: int


class Manifest(_Frozen):
    """What a bundle is. No times and no paths, so that two exports of one run are equal."""

    format: int
    id: str = ""
    name: str
    encoder: EncoderCard
    classes: tuple[str, ...]
    gallery_size: int
    calibration: Calibration
    accuracy: dict[str, float]
    provenance: dict[str, Any]
    files: dict[str, FileEntry]

    @field_validator("name")
    @classmethod
    def _names_one_folder(cls, name: str) -> str:
        # A service keeps its state in a folder of this name; a bundle from elsewhere must not choose another place.
        try:
            check_label(name)
        except DataError as error:
            raise ValueError(str(error)) from error
        if Path(name).name != name:
            raise ValueError(f"{name!r} cannot name a gallery: it is not the name of a folder")
        return name

    def canonical(self) -> str:
        """JSON with sorted keys and without spaces: equal manifests are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def compute_id(self) -> str:
        """`sha256:` and the digest of the canonical manifest without its id."""
        values = self.model_dump(mode="json", exclude={"id"})
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


class Bundle:
    """An opened bundle. Images go in; embeddings and labels come out.

    Use `Bundle.open`. The encoder and the gallery load when they are first needed.
    """

    def __init__(
        self, path: Path, manifest: Manifest, device: str, threads: int | None, side_by_side: bool = False
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._device, self._threads, self._side_by_side = device, threads, side_by_side

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        device: str = "auto",
        threads: int | None = None,
        side_by_side: bool = False,
        verify: bool = True,
    ) -> "Bundle":
        """Open the bundle directory `path`.

        Args:
            device: where the encoder runs, see `coterie.encoder.Encoder`; whether it can is found when it loads.
            threads: of the encoder on the CPU; by default as many as this process may use.
            side_by_side: run several batches at once on the CPU, each on one thread.
            verify: read every file and compare its checksum.

        Raises:
            BundleError: no bundle there, another format, or a file that is damaged, missing or too many.
            DeviceError: `device` is none.
        """
        check_device(device)
        path = Path(path)
        bundle = cls(path, _read_manifest(path), device, threads, side_by_side)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare every file with the manifest, and the manifest with its own id.

        Raises:
            BundleError: names the first file that differs.
        """
        manifest = self.manifest
        as_written = (self.path / MANIFEST).read_bytes() == (manifest.canonical() + "\n").encode("utf-8")
        if not as_written or manifest.compute_id() != manifest.id:
            raise BundleError(f"{self.path / MANIFEST} is damaged: its content does not match its id; export again")
        present = {file.name for file in self.path.iterdir()} - FOREIGN - {MANIFEST}
        for name in sorted(present - set(manifest.files)):
            raise BundleError(f"{self.path / name} does not belong to the bundle: remove it")
        for name, entry in manifest.files.items():
            _check_file(self.path / name, entry)

    def verify_parts(self) -> None:
        """Compare the manifest with what the model, the gallery and the clusters really hold; reads them.

        Raises:
            BundleError: names the first file that does not fit.
        """
        self._check_model(*model_shapes(self.path / MODEL))
        self.base  # noqa: B018  a cached property that checks

    @cached_property
    def encoder(self) -> Encoder:
        encoder = Encoder(
            self.path / MODEL, device=self._device, threads=self._threads, side_by_side=self._side_by_side
        )
        self._check_model(encoder.input_size, encoder.dim)
        return encoder

    def _check_model(self, input_size: tuple[int, int], dim: int) -> None:
        card = self.manifest.encoder
        if (input_size, dim) != (card.input_size, card.embedding_dim):
            raise BundleError(f"{self.path / MODEL} does not have the size and width its manifest states")

    @cached_property
    def base(self) -> Snapshot:
        """The bundle's own gallery and clusters."""
        items = GalleryItems.read(self.path / GALLERY)
        clusters = _read_clusters(self.path / CLUSTERS)
        if items.embeddings.shape[1] != self.manifest.encoder.embedding_dim or len(items) != self.manifest.gallery_size:
            raise BundleError(f"{self.path / GALLERY} does not have the size and width its manifest states")
        if clusters.prototypes.shape[1] != self.manifest.encoder.embedding_dim:
            raise BundleError(f"{self.path / CLUSTERS} does not have the width its manifest states")
        if not tuple(sorted(set(items.labels.tolist()))) == clusters.labels == self.manifest.classes:
            raise BundleError(f"{self.path} has different classes in its {MANIFEST}, {GALLERY} and {CLUSTERS}")
        return Snapshot(items, clusters)

    def gallery(
        self,
        state: Path | None = None,
        *,
        options: StoreOptions = StoreOptions(),
        index: IndexOptions = IndexOptions(),
    ) -> Gallery:
        """The gallery; with a state folder, changes kept there are part of it and can be added to.

        Images that were enrolled with another encoder are embedded anew, which may take a while.

        Args:
            options: how changes are kept.
            index: what the index may cost.

        Raises:
            StoreError: the changes cannot be read.
        """
        base = self.base
        if index != base.options:
            base = Snapshot(base.items, base.clusters, options=index)
        if state is None:
            return Gallery(base)
        store = Store(
            state / self.manifest.name / "gallery.sqlite", encoder=self.manifest.files[MODEL].sha256, options=options
        )

        def complete() -> None:
            preprocessing = self.manifest.encoder.preprocessing
            embed_anew(
                store,
                known=base.rows,
                decode=lambda content: load_pixels(content, preprocessing),
                encode=self.encoder.embed,
            )

        try:
            return Gallery(base, store, complete=complete)
        except BaseException:
            store.close()
            raise

    def pixels(self, images: Sequence[ImageSource]) -> NDArray[np.uint8]:
        """Decode images to the encoder's input, uint8 (n, h, w, 3).

        Raises:
            ImageError: one of them cannot be used; the message names it.
            TypeError: one image was given instead of a sequence.
        """
        if isinstance(images, (bytes, str, Path, Image)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise TypeError("give a sequence of images: [image] for a single one")
        preprocessing = self.manifest.encoder.preprocessing
        pixels = np.empty((len(images), *preprocessing.input_size, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            try:
                pixels[row] = load_pixels(image, preprocessing)
            except ImageError as error:
                where = image if isinstance(image, (str, Path)) else f"image {row}"
                raise ImageError(f"{where}: {error}") from error
        return pixels

    def embed(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Embed paths, bytes, PIL images or uint8 arrays: float32 (n, d), unit length.

        Raises:
            ImageError: one of them cannot be used.
        """
        return self.encoder.embed(self.pixels(images))

    def classify(self, images: Sequence[ImageSource], *, false_reject: float = 0.05) -> list[Classification]:
        """Name the class of each image, or say that it is unknown."""
        return classify(self.embed(images), self.base, self.manifest.calibration, false_reject=false_reject)


def write_bundle(
    path: Path,
    *,
    model: bytes,
    snapshot: Snapshot,
    card: str,
    manifest: Manifest,
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle directory whole or not at all; `manifest.files` and `manifest.id` are filled in here.

    Raises:
        CoterieError: `path` exists and `overwrite` is false.
    """
    with atomic_directory(path, overwrite=overwrite) as temporary:
        (temporary / MODEL).write_bytes(model)
        snapshot.items.whole().write(temporary / GALLERY)
        _write_clusters(snapshot.clusters, temporary / CLUSTERS)
        (temporary / CARD).write_text(card, "utf-8")
        entries = {
            name: FileEntry(sha256=_sha256(temporary / name), size=(temporary / name).stat().st_size)
            for name in sorted(FILES)
        }
        complete = manifest.model_copy(update={"files": entries})
        complete = complete.model_copy(update={"id": complete.compute_id()})
        (temporary / MANIFEST).write_text(complete.canonical() + "\n", "utf-8")
    return Bundle.open(path)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise BundleError(f"{path} is not a bundle, it has no {MANIFEST}: make one with `coterie export`")
    try:
        values = json.loads(file.read_text("utf-8"))
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise BundleError(f"{path} has bundle format {found!r}, this version reads {FORMAT}: export it again")
        manifest = Manifest.model_validate(values)
    except (OSError, ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        raise BundleError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    if set(manifest.files) != FILES:
        odd = ", ".join(repr(name) for name in sorted(FILES ^ set(manifest.files))[:3])
        raise BundleError(f"{file} lists other files than a bundle's {', '.join(sorted(FILES))}: {odd}")
    return manifest


def _check_file(file: Path, entry: FileEntry) -> None:
    remedy = "copy it again, or export again"
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{file} is missing from the bundle, or a link or folder in its place: {remedy}")
    try:
        whole = file.stat().st_size == entry.size and _sha256(file) == entry.sha256
    except OSError as error:
        raise BundleError(f"{file} cannot be read ({error.strerror}): {remedy}") from error
    if not whole:
        raise BundleError(f"{file} is damaged: it does not match its checksum; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_clusters(clusters: ClassClusters, path: Path) -> None:
    """One row for each prototype; what belongs to its class stands in each of them."""
    dim, owners = clusters.prototypes.shape[1], clusters.owners
    table = pa.table(
        {
            "label": pa.array([clusters.labels[row] for row in owners], pa.string()),
            "prototype": pa.FixedSizeListArray.from_arrays(clusters.prototypes.ravel(), dim),
            "radius": pa.array(clusters.radii, pa.float32()),
            "count": pa.array(clusters.counts[owners], pa.int64()),
            "spacing": pa.array(clusters.spacings[owners], pa.float32()),
            "bound": pa.FixedSizeListArray.from_arrays(clusters.bounds[owners].ravel(), 2),
        }
    )
    pq.write_table(table, path, compression="zstd")


def _read_clusters(path: Path) -> ClassClusters:
    try:
        table = pq.read_table(path).combine_chunks()
        labels, first, owners = np.unique(table["label"].to_pylist(), return_index=True, return_inverse=True)
        if (np.diff(owners) < 0).any():
            raise ValueError("its classes are not in order")
        return ClassClusters(
            labels=tuple(labels.tolist()),
            counts=table["count"].to_numpy()[first],
            spacings=table["spacing"].to_numpy()[first],
            bounds=matrix_column(table["bound"])[first],
            prototypes=matrix_column(table["prototype"]),
            owners=owners,
            radii=table["radius"].to_numpy(),
        )
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} holds no class clusters: {error}") from error
