"""All that one command asks for: bundles on the same images, what was wanted of them, gates, and provenance."""

import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coterie.bundle import Bundle
from coterie.dataset import read_images, read_unlabelled
from coterie.errors import CoterieError
from coterie.machine import processors, versions
from coterie.progress import progress_bar
from evaluation.compare import Comparison, check_same_images, compare
from evaluation.evaluate import Evaluation, evaluate
from evaluation.few_shot import DRAWS, SHOTS, FewShot, few_shot
from evaluation.plain import plain
from evaluation.queries import Queries, check_labels, embed_images
from evaluation.robustness import Robustness, measure_robustness
from evaluation.unknown import RANDOM, check_split, random_splits

__all__ = ["Gate", "Provenance", "Study", "Wanted", "check_wanted", "run_study"]

PACKAGES = ("coterie", "numpy", "scipy", "scikit-learn", "faiss-cpu", "onnxruntime-gpu", "onnxruntime", "pillow")


@dataclass(frozen=True)
class Wanted:
    """What to measure beyond the base.

    Attributes:
        unknown: images of no known class: a folder of them, however arranged, or a table.
        hold_out: classes to meet as unknown, separated by commas, or "random" for five splits.
        corruptions, few_shot: whether to measure these, which take longer than all the rest.
        seed: of every draw.
    """

    unknown: Path | None = None
    hold_out: str | None = None
    false_reject: float = 0.05
    corruptions: bool = False
    few_shot: bool = False
    seed: int = 0
    strict: bool = False
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Gate:
    """Bounds of the first bundle; `max_drop` is of top-1 against the first it is compared with."""

    min_top1: float | None = None
    max_ece: float | None = None
    max_drop: float | None = None

    def failures(self, study: "Study") -> list[str]:
        """What does not pass, one reason each. A number that is NaN passes nothing."""
        found, reasons = study.first, []
        if self.min_top1 is not None and not found.top1 >= self.min_top1:
            reasons.append(f"top-1 is {found.top1:.4f}, below --min-top1 {self.min_top1:g}")
        if self.max_ece is not None and not found.ece <= self.max_ece:
            reasons.append(f"the calibration error is {found.ece:.4f}, above --max-ece {self.max_ece:g}")
        if self.max_drop is not None:
            less = study.comparisons[0]["top1"]
            if not -less.difference <= self.max_drop + 1e-12:
                reasons.append(
                    f"top-1 is {less.first:.4f}, {-less.difference:.4f} below the {less.other:.4f} of "
                    f"{study.comparisons[0].other}, more than --max-drop {self.max_drop:g}"
                )
        return reasons


@dataclass(frozen=True)
class Provenance:
    """From what the numbers come."""

    command: str
    versions: dict[str, str]
    machine: str


@dataclass(frozen=True)
class Study:
    """The result. `names` tell the bundles apart: the first is evaluated, the others are what it is compared with."""

    names: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]
    comparisons: tuple[Comparison, ...]
    robustness: tuple[Robustness, ...]
    few_shot: tuple[tuple[FewShot, ...], ...]
    provenance: Provenance
    queries: Queries = field(repr=False)
    bundle: Bundle = field(repr=False)

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @classmethod
    def of(cls, bundle: Bundle, queries: Queries, evaluation: Evaluation) -> "Study":
        """A single evaluation."""
        return cls((evaluation.name,), (evaluation,), (), (), (), _provenance(), queries, bundle)

    def to_json(self) -> dict[str, Any]:
        """The first bundle's numbers, and beside them all the rest."""
        return {
            **self.first.to_json(),
            "robustness": plain(self.robustness[0]) if self.robustness else None,
            "few_shot": plain(self.few_shot[0]) if self.few_shot else None,
            "compared": [
                {
                    **self.evaluations[i].to_json(),
                    "robustness": plain(self.robustness[i]) if self.robustness else None,
                    "few_shot": plain(self.few_shot[i]) if self.few_shot else None,
                }
                for i in range(1, len(self.names))
            ],
            "comparisons": plain(self.comparisons),
            "provenance": plain(self.provenance),
        }


def run_study(bundle: Path, data: Path, others: Sequence[Path] = (), wanted: Wanted = Wanted()) -> Study:
    """Embed, evaluate and compare.

    Raises:
        BundleError, DataError, DeviceError: a bundle or the images cannot be used.
        CoterieError: no threshold was calibrated for the false-reject rate.
    """
    opened = [Bundle.open(path, device=wanted.device, threads=wanted.threads) for path in (bundle, *others)]
    for one in opened:
        one.manifest.calibration.limit(wanted.false_reject)  # before anything is decoded
    images = read_images(data)
    for one in opened:
        check_labels(images.classes, one.manifest.classes)
    splits = _splits(opened, images.classes, wanted)
    unlabelled = read_unlabelled(wanted.unknown) if wanted.unknown else None
    found = [embed_images(one, images, data.name, strict=wanted.strict) for one in opened]
    for queries in found[1:]:
        check_same_images(found[0], queries)
    names = _names((bundle, *others), opened)
    evaluations = []
    for name, one, queries in zip(names, opened, found, strict=True):
        strange = embed_images(one, unlabelled, "the unknown", strict=wanted.strict) if unlabelled else None
        result = evaluate(one, queries, strange, false_reject=wanted.false_reject, held_out=splits, seed=wanted.seed)
        evaluations.append(replace(result, name=name))
    pairs = list(zip(opened, found, strict=True))
    robustness = []
    if wanted.corruptions:
        robustness = measure_robustness(pairs, false_reject=wanted.false_reject, seed=wanted.seed)
    comparisons = [
        compare(
            (names[0], names[i]),
            evaluations[0],
            evaluations[i],
            (robustness[0], robustness[i]) if robustness else None,
            seed=wanted.seed,
        )
        for i in range(1, len(names))
    ]
    return Study(
        names=names,
        evaluations=tuple(evaluations),
        comparisons=tuple(comparisons),
        robustness=tuple(robustness),
        few_shot=tuple(_few_shot(one, queries, wanted.seed) for one, queries in pairs) if wanted.few_shot else (),
        provenance=_provenance(),
        queries=found[0],
        bundle=opened[0],
    )


def _splits(bundles: Sequence[Bundle], asked: Sequence[str], wanted: Wanted) -> tuple[tuple[str, ...], ...]:
    """The classes to hold out, which every gallery has; `asked` are those of the queries."""
    if wanted.hold_out is None:
        return ()
    if wanted.hold_out == RANDOM:
        splits = random_splits(asked, wanted.seed)
    else:
        splits = (tuple(label for part in wanted.hold_out.split(",") if (label := part.strip())),)
    for bundle in bundles:
        for split in splits:
            check_split(split, bundle.manifest.classes, asked)
    return splits


def _few_shot(bundle: Bundle, queries: Queries, seed: int) -> tuple[FewShot, ...]:
    truth = np.searchsorted(np.asarray(bundle.base.clusters.labels, dtype=np.str_), queries.labels)
    with progress_bar("few-shot draws", len(SHOTS) * DRAWS) as advance:
        return few_shot(
            bundle.base, bundle.manifest.calibration, queries.embeddings, truth, seed=seed, progress=advance
        )


def _names(paths: Sequence[Path], bundles: Sequence[Bundle]) -> tuple[str, ...]:
    """The galleries' names where those differ, else the folders'."""
    names = tuple(bundle.manifest.name for bundle in bundles)
    for candidate in (names, tuple(path.resolve().name for path in paths)):
        if len(set(candidate)) == len(paths):
            return candidate
    return tuple(map(str, paths))


def _provenance() -> Provenance:
    found = {name: version for name, version in versions(*PACKAGES).items() if version != "source" or name == "coterie"}
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    command = shlex.join([*program, *sys.argv[1:]])
    machine = f"{platform.system()} {platform.machine()}, {processors()} processors, Python {platform.python_version()}"
    return Provenance(command, found, machine)


def check_wanted(wanted: Wanted, gate: Gate, others: Sequence[Path]) -> None:
    """Refuse what cannot be answered, before any work.

    Raises:
        CoterieError: a gate lacks what it compares with, or a share is none.
    """
    if gate.max_drop is not None and not others:
        raise CoterieError("--max-drop compares with another bundle: name it with --compare")
    for option, value in (("--min-top1", gate.min_top1), ("--max-ece", gate.max_ece), ("--max-drop", gate.max_drop)):
        if value is not None and not 0 <= value <= 1:
            raise CoterieError(f"{option} is {value:g}: give a share from 0 to 1")
    if wanted.seed < 0:
        raise CoterieError(f"--seed is {wanted.seed}: give a whole number from 0 on")
