"""The whole training loop beside the one in common use: torchvision's transforms in workers, a masked loss.

    python -m benchmarks.train DATA [--recipe photos-cpu] [--set key=value …] [--json FILE] [--runs 5]

Both train the same encoder and head from the same images in memory, with the same batches, views, objective and
optimiser. The reference decodes nothing either: its data set hands Pillow images to RandomResizedCrop, flip,
ColorJitter and grey in DataLoader workers (as many as measured best, from 1 to the processors), and its step is float32
with the channels first, as SupContrast's code and its many descendants have it. Ours is measured as the recipe says
and with float32, and the reference with our precision and layout, so that it shows what these contribute.

1,653 photographs of sign-digits at 32 pixels, photos-cpu's ResNet-14 without rotation, two cores, torch 2.15.0, medians
of 4 interleaved epochs, on an AMD EPYC with AVX512_BF16 (docs/results/train.json) and on an Intel machine with AMX:

                                              AMD                      Intel
    reference, 1 and 2 workers                471, 452 views/s         184, 198 views/s
    reference, tuned: bf16, channels last   1,012 views/s, 2.15×       447 views/s, 2.25×
    coterie, fp32                             712 views/s, 1.51×       316 views/s, 1.59×
    coterie, bf16 as the recipe says        1,119 views/s, 2.38×       687 views/s, 3.46×

The share of time in which a GPU is busy: not yet run.

Times are of whole epochs without monitoring, taken in turns in one process. On a GPU it also gives the share of time in
which a kernel ran, from torch's profiler.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
import torchvision
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.loss import textbook
from coterie.files import write_text
from coterie.machine import processors
from training.distributed import World
from training.learner import Learner
from training.optimisers import build_optimizer
from training.prepare import prepare
from training.pretrain import resolve_precision
from training.recipe import Recipe, load_recipe
from training.sampling import epoch_batches

__all__ = ["main"]


class TwoViews(Dataset[tuple[Tensor, int]]):
    """Augmented views of each image, stacked, as the reference makes them: one image at a time."""

    def __init__(self, pixels: Tensor, labels: Tensor, recipe: Recipe) -> None:
        augment = recipe.augment
        if augment.rotate or augment.shear or augment.blur or augment.policy != "none":
            raise SystemExit("compare with a recipe of crop, flip, jitter and grey: --set augment.rotate=0 …")
        jitter = v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
        size = recipe.data.preprocessing.input_size
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, augment.crop_area, augment.crop_ratio),
                v2.RandomHorizontalFlip(augment.flip),
                v2.RandomApply([jitter], augment.jitter),
                v2.RandomGrayscale(augment.grey),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(recipe.data.mean, recipe.data.std),
            ]
        )
        self.images = [v2.functional.to_pil_image(image.permute(2, 0, 1)) for image in pixels]
        self.labels, self.views = labels.tolist(), recipe.batch.views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.stack([self.transform(self.images[row]) for _ in range(self.views)]), self.labels[row]


Epoch = Callable[[], int]  # trains one and returns the views it took


def reference(
    recipe: Recipe, pixels: Tensor, labels: Tensor, world: World, workers: int, *, tuned: bool = False
) -> Epoch:
    """The common loop; `tuned`, with the recipe's precision and the channels last."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    network = Learner(recipe, labels, int(labels.max()) + 1, world).network.to(memory_format=layout)
    network.bf16 = network.bf16 and tuned
    others = nn.ModuleList(network.beside_encoder())
    optimizer = build_optimizer(recipe.optimizer, network.encoder, others)
    # The views come normalised.
    network.encoder.mean.zero_()
    network.encoder.std.fill_(1)
    loader = DataLoader(
        TwoViews(pixels.cpu(), labels, recipe),
        batch_size=recipe.batch.size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=world.device.type == "cuda",
    )

    def epoch() -> int:
        network.train()
        views_seen = 0
        for views, truth in loader:
            views = views.transpose(0, 1).flatten(0, 1).to(world.device, memory_format=layout, non_blocking=True)
            truth = truth.to(world.device, non_blocking=True)
            loss = textbook(network.project(views), truth.repeat(recipe.batch.views))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            views_seen += len(views)
        loss.item()
        return views_seen

    return epoch


def ours(recipe: Recipe, pixels: Tensor, labels: Tensor, world: World) -> Epoch:
    """Coterie's loop, without what follows an epoch."""
    learner = Learner(recipe, labels, int(labels.max()) + 1, world)
    numbers = count()

    def epoch() -> int:
        learner.parallel.train()
        views_seen = 0
        order = epoch_batches(labels.cpu(), recipe.batch.size, Generator().manual_seed(next(numbers)))
        for rows in order.to(world.device):
            number = next(numbers)
            result = learner.step(pixels[rows], labels[rows], lr=recipe.optimizer.lr, number=number, seed=number)
            views_seen += len(rows) * recipe.batch.views
        result.loss.item()
        return views_seen

    return epoch


def views_per_second(loops: dict[str, Epoch], runs: int) -> Iterator[tuple[str, list[float]]]:
    """Each loop's rates over `runs` epochs, taken in turns after one epoch to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for run in range(runs + 1):
        for name, epoch in loops.items():
            started = time.perf_counter()
            views = epoch()
            if run:
                rates[name].append(views / (time.perf_counter() - started))
    yield from rates.items()


def busy_share(epoch: Epoch) -> float:
    """Share of an epoch's time in which the GPU ran a kernel or a copy; overlapping ones count once."""
    from torch.profiler import ProfilerActivity, profile

    epoch()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        epoch()
    spans = sorted((event.time_range.start, event.time_range.end) for event in profiler.events())
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - spans[0][0])


def main() -> None:
    """Measure, print a table and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", default="photos-cpu")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    world = World.start()
    torch.set_num_threads(processors())
    torch.manual_seed(0)
    recipe = resolve_precision(load_recipe(arguments.recipe, arguments.settings), world.device)
    prepared = prepare(arguments.data, recipe, world, group=None, strict=False)
    (pixels,) = prepared.source.batches([torch.arange(len(prepared.images), device=world.device)])
    labels = torch.from_numpy(prepared.images.labels).to(world.device)
    loops = {
        f"reference, {workers} worker{'s'[: workers - 1]}": reference(recipe, pixels, labels, world, workers)
        for workers in sorted({1, 2, processors()})
    }
    loops["tuned reference, 1 worker"] = reference(recipe, pixels, labels, world, 1, tuned=True)
    if recipe.precision != "fp32":
        loops["coterie, fp32"] = ours(recipe.model_copy(update={"precision": "fp32"}), pixels, labels, world)
    loops[f"coterie, {recipe.precision}"] = ours(recipe, pixels, labels, world)
    rates = dict(views_per_second(loops, arguments.runs))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(value for name, value in medians.items() if name.startswith("reference"))
    for name, value in medians.items():
        print(f"{name:24} {value:10,.0f} views/s   {value / best:6.2f} times the reference")
    result = {
        "recipe": recipe.model_dump(mode="json"),
        "images": len(labels),
        "runs": arguments.runs,
        "views_per_second": rates,
        "ratio": medians[f"coterie, {recipe.precision}"] / best,
        "gpu_busy": busy_share(loops[f"coterie, {recipe.precision}"]) if world.device.type == "cuda" else None,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"{processors()} CPU cores",
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }
    if arguments.json:
        write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["ratio"] >= 2 else 1)


if __name__ == "__main__":
    main()
