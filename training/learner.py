"""The state of a training run: networks, optimiser, averages and queue; and one step of it.

Knows batches of pixels and labels, on one rank of however many; knows neither epochs, files nor where images come from.
"""

import importlib.util
import os
import shutil
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coterie.errors import CoterieWarning, RecipeError
from training.augment import Augment
from training.distributed import World, gather_rows
from training.encoders import EncoderSpec, ImageEncoder, build_encoder, encoder_warnings, projection_head
from training.gradient_cache import backward_in_chunks
from training.momentum import MomentumQueue
from training.network import Network
from training.optimisers import build_optimizer
from training.positives import share_without_positives
from training.recipe import Recipe
from training.start import Normalisation, load_start
from training.targets import Targets, balanced_weights

__all__ = ["Learner", "StepResult"]


class StepResult(NamedTuple):
    """What a step tells, scalars on the device."""

    loss: Tensor
    share_without_positives: Tensor  # of the anchors, where positives are what labels say


class Learner:
    """Everything that training changes.

    Args:
        recipe: the run's.
        labels: int64 (n,), of the training images; on the device.
        n_classes: classes there are.
        world: this process and the others.
        fresh: take the recipe's start weights; without, those of a state that is loaded next.
    """

    def __init__(self, recipe: Recipe, labels: Tensor, n_classes: int, world: World, *, fresh: bool = True) -> None:
        self.recipe, self.world = recipe, world
        self.spec, network = _build_network(recipe, n_classes, world, fresh=fresh)
        self.network = network
        self.optimizer = build_optimizer(recipe.optimizer, network.encoder, nn.ModuleList(network.beside_encoder()))
        self.ema = ModelEmaV3(network.encoder, decay=recipe.ema.decay, use_warmup=True) if recipe.ema else None
        self.queue: MomentumQueue | None = None
        if recipe.momentum:
            soft = recipe.targets.soft
            example = labels.new_zeros((1, n_classes), dtype=torch.float32) if soft else labels[:1]
            self.queue = MomentumQueue(recipe.momentum, network, example, recipe.encoder.projection_dim)
        if recipe.compile:
            _check_compiler(world.device)
            network.compile_projection()
        self.generator = Generator(device=world.device)
        size = recipe.data.preprocessing.input_size
        self.augment = Augment(recipe.augment, size, self.generator, compile=recipe.compile)
        balanced = recipe.targets.class_weights == "balanced"
        self.targets = Targets(recipe.targets, balanced_weights(labels, n_classes) if balanced else None, n_classes)
        # What each rank's gradients are averaged through.
        self.parallel: nn.Module = network
        if world.size > 1:
            self.parallel = DistributedDataParallel(network, [world.device] if world.device.type == "cuda" else None)

    @property
    def encoder(self) -> ImageEncoder:
        """The encoder that is measured and exported: the last one, or its running average."""
        encoder: ImageEncoder = self.network.encoder if self.ema is None else self.ema.module
        return encoder

    @property
    def counts_positives(self) -> bool:
        """Whether labels decide who has positives."""
        return self.network.objective.takes_keys

    def columns(self, batch_size: int) -> int:
        """With how many rows the loss compares an anchor, in a batch of so many images."""
        views = self.recipe.batch.views * batch_size
        return views - 1 if self.queue is None else views - batch_size - 1 + int(self.queue.filled)

    def step(self, pixels: Tensor, labels: Tensor, *, lr: float, number: int, seed: int) -> StepResult:
        """One step of the optimiser on this rank's images.

        Args:
            pixels: uint8 (b, h, w, 3).
            labels: int64 (b,).
            lr: learning rate of the step.
            number: steps done before.
            seed: decides everything random in the step, on this rank.
        """
        n_views, b = self.recipe.batch.views, len(labels)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        augmenting, dropping, mixing = np.random.SeedSequence(seed).generate_state(3, np.uint64).tolist()
        self.generator.manual_seed(augmenting >> 1)
        torch.manual_seed(dropping >> 1)
        views = torch.cat([self.augment(pixels) for _ in range(n_views)])  # (n_views · b, 3, h, w)
        views, targets, weights = self.targets(views, labels, n_views, np.random.default_rng(mixing))
        views = views.contiguous(memory_format=torch.channels_last)
        options: dict[str, Any] = {}
        if self.queue is not None:  # the last view goes through the momentum encoder
            self.queue.enqueue(views[-b:], targets[-b:], self.recipe.batch.chunk)
            options |= self.queue.columns
            views, targets, n_views = views[:-b], targets[:-b], n_views - 1
        if weights is not None:
            options["weights"] = weights[: len(targets)]
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(views, targets, {"n_views": n_views, **options})
        if self.recipe.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.network.encoder, step=number + 1)
        if self.queue is not None:
            self.queue.follow(self.network)
        alone = torch.zeros_like(loss)
        if self.counts_positives:
            alone = share_without_positives(gather_rows(targets), options.get("key_labels"))
        return StepResult(loss, alone)

    def _backward(self, views: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        chunk = self.recipe.batch.chunk
        if chunk is None:
            loss: Tensor = self.parallel(views, targets, **options)
            loss.backward()
            return loss.detach()
        return backward_in_chunks(
            self.parallel,
            project=self.network.project,
            loss_of=lambda z: self.network.objective(z, targets, **options),
            views=views,
            chunk=chunk,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"modules": self._modules().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._modules().load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _modules(self) -> nn.ModuleDict:
        parts = {"network": self.network, "queue": self.queue, "ema": None if self.ema is None else self.ema.module}
        return nn.ModuleDict({name: module for name, module in parts.items() if module is not None})


def _check_compiler(device: torch.device) -> None:
    """Raise RecipeError where torch.compile would fail, only after minutes and in many lines."""
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "triton"
    else:
        names = (os.environ.get("CXX", "g++"), "clang++", "cl")
        missing = "" if any(map(shutil.which, names)) else "a C++ compiler"
    if missing:
        raise RecipeError(f"compile: true needs {missing}, which is not here: install it, or --set compile=false")


def _build_network(recipe: Recipe, n_classes: int, world: World, *, fresh: bool) -> tuple[EncoderSpec, Network]:
    torch.manual_seed(recipe.seed)
    section = recipe.encoder
    spec = EncoderSpec(
        section.name,
        section.width,
        mean=recipe.data.mean,
        std=recipe.data.std,
        preprocessing=recipe.data.preprocessing,
        stem=section.stem,
    )
    encoder = build_encoder(spec)
    normalisation = load_start(encoder, spec, section.start) if fresh else None
    if fresh and world.is_first:
        _warn(recipe, spec, normalisation)
    objective = recipe.loss.build(n_classes=n_classes, embedding_dim=encoder.dim)
    objective.validate = False  # values are checked once an epoch; checking each batch would wait for the device
    objective.across_ranks = world.size > 1
    head = None
    if objective.uses_projection:
        head = projection_head(encoder.dim, section.projection_dim, layers=section.projection_layers)
    network: nn.Module = Network(encoder, head, objective, bf16=recipe.precision == "bf16")
    if world.size > 1 and world.device.type == "cuda":
        # timm's own, for its BatchNorms with an activation inside would lose it in torch's.
        network = convert_sync_batchnorm(network)
    # Convolutions are 1.3 to 1.5 times as fast with the channels last.
    return spec, network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _warn(recipe: Recipe, spec: EncoderSpec, normalisation: Normalisation | None) -> None:
    doubts = recipe.doubts() + encoder_warnings(spec)
    if normalisation is not None and not np.allclose((spec.mean, spec.std), normalisation, atol=0.01):
        doubts.append(
            f"encoder.start was trained with data.mean {normalisation.mean} and data.std {normalisation.std}, "
            f"the recipe has {spec.mean} and {spec.std}"
        )
    for doubt in doubts:
        warnings.warn(doubt, CoterieWarning, stacklevel=2)
