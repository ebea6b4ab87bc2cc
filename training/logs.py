"""Where metrics go beside the run's metrics.jsonl: TensorBoard if it is installed, Weights & Biases if asked for."""

import uuid
from importlib.util import find_spec
from typing import Any

from coterie.errors import RecipeError
from coterie.files import write_text
from training.recipe import Recipe
from training.run import Run

__all__ = ["MetricsLog", "check_wandb"]


def check_wandb() -> None:
    """Raise RecipeError unless Weights & Biases is installed."""
    if find_spec("wandb") is None:
        raise RecipeError("--wandb needs Weights & Biases, which is not installed: pip install wandb")


class MetricsLog:
    """Writes a run's rows of metrics, one an epoch.

    Args:
        run: whose metrics.jsonl and tensorboard/ are written.
        recipe: what Weights & Biases shows as the configuration.
        epoch: the first that will be written; what a killed process wrote of it and later ones is forgotten.
        wandb: project of Weights & Biases, or None.
    """

    def __init__(self, run: Run, recipe: Recipe, *, epoch: int = 0, wandb: str | None = None) -> None:
        self.run = run
        self._tensorboard = _tensorboard_writer(run, epoch)
        self._wandb = None if wandb is None else _wandb_run(run, recipe, wandb)

    def write(self, rows: list[dict[str, float]], new: dict[str, float]) -> None:
        """Write all rows so far to the run; `new`, what the last one has that is new, elsewhere."""
        self.run.write_metrics(rows)
        epoch = int(rows[-1]["epoch"])
        values = {name: value for name, value in new.items() if name != "epoch"}
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=epoch)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard_writer(run: Run, epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path / "tensorboard"), purge_step=epoch)


def _wandb_run(run: Run, recipe: Recipe, project: str) -> Any:
    import wandb

    # The same id again after a resume, so that the curves go on; names are not unique.
    file = run.path / "wandb-id.txt"
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    config = recipe.model_dump(mode="json")
    return wandb.init(project=project, name=run.path.name, id=file.read_text(), resume="allow", config=config)
