"""Stage 1: train an encoder with supervised contrastive learning on labelled images, on one device or many.

The loop reads top to bottom in `_Loop.run`. All randomness of a step follows from the recipe's seed and the numbers of
epoch, step and rank, so a run that was interrupted and resumed ends with the same weights as one that was not.
"""

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from coterie.dataset import LabelledPixels
from coterie.errors import CoterieWarning, RecipeError, TrainingStopped
from coterie.machine import processors
from coterie.progress import Advance, progress_bar
from training.distributed import World, gather_rows, own_rows
from training.health import check_health
from training.learner import Learner
from training.logs import MetricsLog, check_wandb
from training.monitor import centre, draw_curves, features_of, measure
from training.optimisers import learning_rate
from training.prepare import Prepared, prepare
from training.recipe import Recipe
from training.run import Run
from training.sampling import epoch_batches

__all__ = ["resolve_precision", "train"]

SAVE_SHARE = 0.05  # of the time, at most, goes into checkpoints
SAVE_SECONDS = 300.0  # between two checkpoints within an epoch
AGREE_LAG = 4  # steps after which other ranks' wish to stop is looked at, so that none waits for the device
WHITENING_IMAGES = 50_000


def train(
    data: Path,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    strict: bool = False,
    group: str | None = None,
    wandb: str | None = None,
    time_limit: float | None = None,
) -> tuple[Run, LabelledPixels]:
    """Train on labelled images and write the run directory `out`; under torchrun, together with the other ranks.

    Args:
        data: a class-per-folder tree, a CSV or a Parquet file.
        group: what keeps images together in the split, see coterie.dataset.read_images.
        wandb: project of Weights & Biases to report to, if any.
        time_limit: seconds after which the run is saved and stopped.

    Returns:
        The finished run, and the images it was given (with those that could not be read listed).

    Raises:
        DataError: the images cannot be used.
        RecipeError: `out` holds another run, or the loss became NaN.
        TrainingStopped: by SIGTERM or the time limit, after the state was saved.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    if wandb is not None:
        check_wandb()
    world = World.start()
    try:
        run = Run(out)
        recipe = world.from_first(lambda: _resolve(recipe, run, world.device, resume=resume))
        torch.set_num_threads(max(1, processors() // world.local_size))
        torch.backends.cudnn.benchmark = True
        prepared = prepare(data, recipe, world, group=group, strict=strict)
        state = world.from_first(lambda: _saved_state(run, recipe, prepared))
        loop = _Loop(recipe, prepared, world, state)
        if world.is_first and not run.started:
            run.write_start(recipe, prepared.record)
        log = MetricsLog(run, recipe, epoch=loop.epoch, wandb=wandb) if world.is_first else None
        with _stop_signal(deadline) as wants_to_stop:
            loop.run(run, log, wants_to_stop)
        return run, prepared.images
    finally:
        world.close()


def resolve_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `auto` decided for the device."""
    if recipe.precision != "auto":
        return recipe
    return recipe.model_copy(update={"precision": "bf16" if _fast_bf16(device) else "fp32"})


def _resolve(recipe: Recipe, run: Run, device: torch.device, *, resume: bool) -> Recipe:
    if run.started and not resume:
        raise RecipeError(f"{run.path} holds a run already: continue it with --resume, or choose another --out")
    if run.started and recipe.precision == "auto":  # a run stays with what it began with
        return recipe.model_copy(update={"precision": run.recipe().precision})
    return resolve_precision(recipe, device)


def _saved_state(run: Run, recipe: Recipe, prepared: Prepared) -> dict[str, Any] | None:
    """The state that a run was saved in, if it was started."""
    if not run.started:
        return None
    run.check_same(recipe, prepared.record)
    return run.load_checkpoint()


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Other processors emulate bf16 and are slower with it than with fp32.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class _Loop:
    """The course of epochs and steps, and the place in it.

    Args:
        state: of the run when it was last saved, or None at its beginning.
    """

    def __init__(self, recipe: Recipe, data: Prepared, world: World, state: dict[str, Any] | None) -> None:
        self.recipe, self.data, self.world = recipe, data, world
        self.source = data.source
        self.labels = torch.from_numpy(data.images.labels).to(world.device)
        labels = self.labels[torch.from_numpy(data.train)]
        self.learner = Learner(recipe, labels, data.n_classes, world, fresh=state is None)
        self.batch_size = _batch_size(recipe, len(data.train), world.size)
        self.steps_per_epoch = len(data.train) // self.batch_size  # the last batch is never ragged
        rng = np.random.default_rng(recipe.seed)
        some, held_out = rng.permutation(data.train), rng.permutation(data.calibration)
        self.gallery, self.whitened = np.sort(some[: recipe.monitor.gallery]), np.sort(some[:WHITENING_IMAGES])
        self.queries = np.sort(held_out[: recipe.monitor.queries])
        self.rows: list[dict[str, float]] = []
        self.epoch = self.step = 0
        self.sums = torch.zeros(2, device=world.device)  # of steps' results; kept there, so that no step waits
        self.seconds = 0.0  # in this epoch
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        if state is not None:
            self._restore(state)

    def run(self, run: Run, log: MetricsLog | None, wants_to_stop: Callable[[], bool]) -> None:
        """Train to the last epoch, saving the whole state after each, and measure, whiten and save the encoder."""
        epochs = self.recipe.schedule.epochs
        with self._progress(epochs) as advance:
            while self.epoch < epochs:
                self._train_epoch(run, wants_to_stop, advance)
                self.rows.append(self._row())
                self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
                self.sums.zero_()
                self._check_health()
                stop = self.epoch < epochs and bool(self._gathered([wants_to_stop()]).any())
                if log is not None:
                    log.write(self.rows, self.rows[-1])
                    if stop or self.epoch == epochs or time.monotonic() - self.saved_at > self.save_cost / SAVE_SHARE:
                        self._save(run)
                self.world.wait_for_first()
                advance(0, note=_note(self.rows[-1]))
                if stop:
                    raise TrainingStopped(f"stopped and saved after {self.epoch} epochs: go on with --resume")
        if log is not None:
            self._finish(run, log)

    def _train_epoch(self, run: Run, wants_to_stop: Callable[[], bool], advance: Advance) -> None:
        """The steps of the current epoch that are still to do."""
        recipe, world = self.recipe, self.world
        chosen = epoch_batches(
            torch.from_numpy(self.data.images.labels[self.data.train]),
            self.batch_size,
            Generator().manual_seed(self._seed()),
            balanced=recipe.data.sampling == "balanced",
            images_per_class=recipe.batch.images_per_class,
        )
        own = torch.from_numpy(self.data.train)[chosen[self.step :, own_rows(self.batch_size)]].to(world.device)
        self.learner.parallel.train()
        started, before = time.perf_counter(), self.seconds
        told: deque[Tensor] = deque()  # steps' results of all ranks (ranks, 3), the oldest first
        for rows, pixels in zip(own, self.source.batches(own), strict=True):
            number = self.epoch * self.steps_per_epoch + self.step
            self.lr = learning_rate(number, self.steps_per_epoch, recipe.optimizer, recipe.schedule, self.batch_size)
            seed = self._seed(self.step, world.rank)
            result = self.learner.step(pixels, self.labels[rows], lr=self.lr, number=number, seed=seed)
            told.append(self._gathered([*result, wants_to_stop()]))
            # Some objectives tell a rank's own loss, whose mean over the ranks is the batch's.
            self.sums += told[-1][:, :2].mean(0)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            advance(1)
            stop = world.size == 1 and wants_to_stop()
            if len(told) > AGREE_LAG:
                stop = (world.size > 1 and bool(told[0][:, 2].any())) or stop
                told.popleft()
            stop = stop and self.step < self.steps_per_epoch
            if world.is_first and (stop or time.monotonic() - self.saved_at > SAVE_SECONDS):
                self._save(run)
            if stop:
                world.wait_for_first()
                place = f"epoch {self.epoch}, step {self.step} of {self.steps_per_epoch}"
                raise TrainingStopped(f"stopped and saved in {place}: go on with --resume")
        self.sums.cpu()  # the device has now done it all
        self.seconds = before + time.perf_counter() - started

    def _row(self) -> dict[str, float]:
        """What is written of the epoch that ended."""
        loss, without_positives = (self.sums / self.steps_per_epoch).tolist()
        row = {
            "epoch": self.epoch,
            "loss": loss,
            "lr": self.lr,
            "images_per_second": self.steps_per_epoch * self.batch_size / self.seconds,
            "seconds": self.seconds,
        }
        if self.learner.counts_positives:
            row["share_without_positives"] = without_positives
        is_last = self.epoch + 1 == self.recipe.schedule.epochs
        if self.world.is_first and np.isfinite(loss) and (is_last or (self.epoch + 1) % self.recipe.monitor.every == 0):
            row |= self._measure(self.queries)
        # What stays undefined, such as alignment without a pair of one class, has no word in JSON.
        return {name: value for name, value in row.items() if name == "loss" or np.isfinite(value)}

    def _measure(self, queries: NDArray[np.int64], prefix: str = "") -> dict[str, float]:
        measured = measure(
            self._features(self.gallery),
            self.labels[torch.from_numpy(self.gallery)],
            self._features(queries),
            self.labels[torch.from_numpy(queries)],
            self.data.n_classes,
        )
        return {prefix + name: value for name, value in measured.items()}

    def _features(self, rows: NDArray[np.int64]) -> Tensor:
        """Features of these images, each shrunk to the input size as a whole."""
        size = self.recipe.data.preprocessing.input_size
        batches = self.source.batches(torch.from_numpy(rows).to(self.world.device).split(512))
        return features_of(self.learner.encoder, (centre(pixels, size) for pixels in batches))

    def _finish(self, run: Run, log: MetricsLog) -> None:
        if len(self.data.test):
            tested = self._measure(self.data.test, prefix="test_")
            self.rows[-1] |= tested
            log.write(self.rows, tested)
        encoder, shrinkage = self.learner.encoder, self.recipe.encoder.whitening_shrinkage
        if shrinkage is not None:
            labels = self.labels[torch.from_numpy(self.whitened)]
            encoder.whiten(self._features(self.whitened), labels, shrinkage=shrinkage)
        run.save_encoder(encoder, self.learner.spec)
        draw_curves(self.rows, run.path / "curves.png")
        log.close()

    def _check_health(self) -> None:
        learner, warmup = self.learner, self.recipe.schedule.warmup_epochs
        with warnings.catch_warnings():
            if not self.world.is_first:
                warnings.simplefilter("ignore", CoterieWarning)
            columns = learner.columns(self.batch_size)
            check_health(self.rows, learner.network.objective, columns, warmup_epochs=warmup)

    def _seed(self, *place: int) -> int:
        """63 bits for the current epoch, or a place in it."""
        sequence = np.random.SeedSequence(self.recipe.seed, spawn_key=(self.epoch, *place))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1

    def _gathered(self, values: Sequence[Tensor | bool]) -> Tensor:
        """These scalars of every rank, float (ranks, n), without waiting for the device."""
        device = self.world.device
        row = [v.float() if isinstance(v, Tensor) else torch.full((), float(v), device=device) for v in values]
        return gather_rows(torch.stack(row)[None])

    @contextmanager
    def _progress(self, epochs: int) -> Iterator[Advance]:
        if not self.world.is_first:
            yield lambda *_, **__: None
            return
        with progress_bar(f"training {self.recipe.name}", epochs * self.steps_per_epoch) as advance:
            advance(self.epoch * self.steps_per_epoch + self.step, note=_note(self.rows[-1]) if self.rows else "")
            yield advance

    def _save(self, run: Run) -> None:
        started = time.monotonic()
        state = {
            "epochs_done": self.epoch,
            "steps_done": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "rows": self.rows,
            "batch": (self.batch_size, self.world.size),
            "learner": self.learner.state_dict(),
        }
        run.save_checkpoint(state)
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - started

    def _restore(self, state: dict[str, Any]) -> None:
        size, ranks = state["batch"]
        if (size, ranks) != (self.batch_size, self.world.size):
            raise RecipeError(f"the run was started with {ranks} processes: resume it with as many")
        self.learner.load_state_dict(state["learner"])
        self.epoch, self.step, self.seconds = state["epochs_done"], state["steps_done"], state["seconds"]
        self.sums.copy_(state["sums"])
        self.rows = list(state["rows"])


def _batch_size(recipe: Recipe, n_train: int, ranks: int) -> int:
    """Images a step: the recipe's, or fewer where there are not as many, in whole classes on whole ranks."""
    asked, whole = recipe.batch.size, ranks * (recipe.batch.images_per_class or 1)
    if asked % ranks or asked < whole:
        raise RecipeError(
            f"batch.size {asked} cannot be shared by {ranks} processes with batch.images_per_class "
            f"{recipe.batch.images_per_class or 1}: choose a multiple of {whole}"
        )
    size = min(asked, n_train // whole * whole)
    if size < 2:
        raise RecipeError(f"{n_train} training images are too few for a batch over {ranks} processes: add images")
    return size


def _note(row: dict[str, float]) -> str:
    accuracy = f"k-NN {row['knn_top1']:.3f}  " if "knn_top1" in row else ""
    return f"epoch {row['epoch'] + 1}  loss {row['loss']:.3f}  {accuracy}{row['images_per_second']:.0f} images/s"


@contextmanager
def _stop_signal(deadline: float | None) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM came or the deadline passed."""
    received: list[int] = []
    before = None
    # Outside the main thread signals belong to whoever runs it.
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received) or (deadline is not None and time.monotonic() > deadline)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
