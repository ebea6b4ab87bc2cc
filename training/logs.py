"""Where metrics go beside the run's metrics.jsonl: TensorBoard if it is installed, Weights & Biases if asked for."""

from typing import Any

from coterie.errors import RecipeError
from training.recipe import Recipe
from training.run import Run

__all__ = ["MetricsLog"]


class MetricsLog:
    """Writes a run's rows of metrics, one an epoch.

    Args:
        run: whose metrics.jsonl and tensorboard/ are written.
        recipe: what Weights & Biases shows as the configuration.
        wandb: its project, or None.

    Raises:
        RecipeError: Weights & Biases is asked for and not installed.
    """

    def __init__(self, run: Run, recipe: Recipe, *, wandb: str | None = None) -> None:
        self.run = run
        self._tensorboard = _tensorboard_writer(run)
        self._wandb = None if wandb is None else _wandb_run(run, recipe, wandb)

    def write(self, rows: list[dict[str, float]]) -> None:
        """Write all rows so far; the last one is new."""
        self.run.write_metrics(rows)
        row = dict(rows[-1])
        epoch = int(row.pop("epoch"))
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(row, step=epoch)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard_writer(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run.path / "tensorboard"))


def _wandb_run(run: Run, recipe: Recipe, project: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RecipeError("--wandb needs Weights & Biases, which is not installed: pip install wandb") from error
    # The same id again after a resume, so that the curves go on.
    config = recipe.model_dump(mode="json")
    return wandb.init(project=project, name=run.path.name, id=run.path.name, resume="allow", config=config)
