"""Stage 1: train an encoder with supervised contrastive learning on labelled images, on one device or many.

The loop reads top to bottom in `_Loop.run`. All randomness of a step follows from the recipe's seed and the numbers of
epoch, step and rank, so a run that was interrupted and resumed ends with the same weights as one that was not.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from coterie.dataset import LabelledPixels
from coterie.errors import RecipeError, TrainingStopped
from coterie.machine import processors
from coterie.progress import Advance, progress_bar
from training.distributed import World, gather_rows, own_rows
from training.health import check_health
from training.learner import Learner
from training.logs import MetricsLog
from training.monitor import centre, draw_curves, features_of, measure
from training.optimisers import learning_rate
from training.prepare import Prepared, prepare
from training.recipe import Recipe
from training.run import Run
from training.sampling import epoch_batches

__all__ = ["resolve_precision", "train"]

SAVE_SECONDS = 600.0  # between two checkpoints of an epoch that takes longer
AGREE_STEPS = 50  # between two questions to the other ranks whether to stop
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
    world = World.start()
    try:
        run = Run(out)
        if run.started and not resume:
            raise RecipeError(f"{out} holds a run already: continue it with --resume, or choose another --out")
        recipe = resolve_precision(recipe, world.device)
        torch.set_num_threads(max(1, processors() // world.size))
        torch.backends.cudnn.benchmark = True
        prepared = prepare(data, recipe, world, group=group, strict=strict)
        if run.started:
            run.check_same(recipe, prepared.record)
        loop = _Loop(recipe, prepared, world)
        if world.is_first and not run.started:
            run.write_start(recipe, prepared.record)
        with _stop_signal(deadline) as wants_to_stop:
            loop.run(run, MetricsLog(run, recipe, wandb=wandb) if world.is_first else None, wants_to_stop)
        return run, prepared.images
    finally:
        world.close()


def resolve_precision(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with `auto` decided for the device."""
    if recipe.precision != "auto":
        return recipe
    return recipe.model_copy(update={"precision": "bf16" if _fast_bf16(device) else "fp32"})


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without AMX a processor emulates bf16 and is slower with it than with fp32.
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))


class _Loop:
    """The course of epochs and steps, and the place in it."""

    def __init__(self, recipe: Recipe, data: Prepared, world: World) -> None:
        self.recipe, self.data, self.world = recipe, data, world
        self.source = data.source(recipe, world.device)
        self.labels = torch.from_numpy(data.images.labels).to(world.device)
        self.learner = Learner(recipe, self.labels[torch.from_numpy(data.train)], data.n_classes, world)
        whole = world.size * (recipe.batch.images_per_class or 1)
        self.batch_size = min(recipe.batch.size, len(data.train)) // whole * whole
        if self.batch_size < 2:
            raise RecipeError(f"{len(data.train)} training images are too few for batches of {whole}: add images")
        self.steps_per_epoch = len(data.train) // self.batch_size  # the last batch is never ragged
        some = np.random.default_rng(recipe.seed).permutation(data.train)
        self.gallery, self.whitened = np.sort(some[: recipe.monitor.gallery]), np.sort(some[:WHITENING_IMAGES])
        self.rows: list[dict[str, float]] = []
        self.epoch = self.step = 0
        self.sums = torch.zeros(2, device=world.device)  # of steps' results; kept there, so that no step waits
        self.seconds = 0.0  # in this epoch

    def run(self, run: Run, log: MetricsLog | None, wants_to_stop: Callable[[], bool]) -> None:
        """Train to the last epoch, saving the whole state after each, and measure, whiten and save the encoder."""
        epochs = self.recipe.schedule.epochs
        self._restore(run)
        with self._progress(epochs) as advance:
            while self.epoch < epochs:
                self._train_epoch(run, wants_to_stop, advance)
                self.rows.append(self._row())
                self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
                self.sums.zero_()
                check_health(self.rows, self.recipe, self.learner.columns(self.batch_size))
                if log is not None:
                    log.write(self.rows)
                    run.save_checkpoint(self._state())
                advance(0, note=_note(self.rows[-1]))
                if self.epoch < epochs and self._any_rank(wants_to_stop()):
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
        started = saved = time.perf_counter()
        before = self.seconds
        for rows, pixels in zip(own, self.source.batches(own), strict=True):
            number = self.epoch * self.steps_per_epoch + self.step
            self.lr = learning_rate(number, self.steps_per_epoch, recipe.optimizer, recipe.schedule, self.batch_size)
            seed = self._seed(self.step, world.rank)
            result = self.learner.step(pixels, self.labels[rows], lr=self.lr, number=number, seed=seed)
            self.sums += torch.stack(result)
            self.step += 1
            self.seconds = before + time.perf_counter() - started
            advance(1)
            if self.step < self.steps_per_epoch and (world.size == 1 or self.step % AGREE_STEPS == 0):
                stop = self._any_rank(wants_to_stop())
                if world.is_first and (stop or time.perf_counter() - saved > SAVE_SECONDS):
                    run.save_checkpoint(self._state())
                    saved = time.perf_counter()
                if stop:
                    place = f"epoch {self.epoch}, step {self.step} of {self.steps_per_epoch}"
                    raise TrainingStopped(f"stopped and saved in {place}: go on with --resume")
        self.sums.cpu()  # the device has now done it all
        self.seconds = before + time.perf_counter() - started

    def _row(self) -> dict[str, float]:
        """What is written of the epoch that ended."""
        # Some objectives tell a rank's own loss, whose mean over the ranks is the batch's.
        loss, without_positives = (gather_rows(self.sums[None]).mean(0) / self.steps_per_epoch).tolist()
        row = {
            "epoch": self.epoch,
            "loss": loss,
            "lr": self.lr,
            "share_without_positives": without_positives,
            "images_per_second": self.steps_per_epoch * self.batch_size / self.seconds,
            "seconds": self.seconds,
        }
        is_last = self.epoch + 1 == self.recipe.schedule.epochs
        if self.world.is_first and np.isfinite(loss) and (is_last or (self.epoch + 1) % self.recipe.monitor.every == 0):
            row |= self._measure(self.data.calibration)
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
            self.rows[-1] |= self._measure(self.data.test, prefix="test_")
            log.write(self.rows)
        encoder, shrinkage = self.learner.encoder, self.recipe.encoder.whitening_shrinkage
        if shrinkage is not None:
            labels = self.labels[torch.from_numpy(self.whitened)]
            encoder.whiten(self._features(self.whitened), labels, shrinkage=shrinkage)
        run.save_encoder(encoder, self.learner.spec)
        draw_curves(self.rows, run.path / "curves.png")
        log.close()

    def _seed(self, *place: int) -> int:
        """63 bits for the current epoch, or a place in it."""
        state = np.random.SeedSequence([self.recipe.seed, self.epoch, *place]).generate_state(1, np.uint64)
        return int(state[0]) >> 1

    def _any_rank(self, stop: bool) -> bool:
        return bool(gather_rows(torch.tensor([stop], device=self.world.device)).any()) if self.world.size > 1 else stop

    @contextmanager
    def _progress(self, epochs: int) -> Iterator[Advance]:
        if not self.world.is_first:
            yield lambda *_, **__: None
            return
        with progress_bar(f"training {self.recipe.name}", epochs * self.steps_per_epoch) as advance:
            advance(self.epoch * self.steps_per_epoch + self.step, note=_note(self.rows[-1]) if self.rows else "")
            yield advance

    def _state(self) -> dict[str, object]:
        return {
            "epochs_done": self.epoch,
            "steps_done": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "rows": self.rows,
            "learner": self.learner.state_dict(),
        }

    def _restore(self, run: Run) -> None:
        state = run.load_checkpoint()
        if state is not None:
            self.learner.load_state_dict(state["learner"])
            self.epoch, self.step, self.seconds = state["epochs_done"], state["steps_done"], state["seconds"]
            self.sums.copy_(state["sums"])
            self.rows = list(state["rows"])


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
