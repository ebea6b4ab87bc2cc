"""Whether training goes anywhere: divergence and collapse, named with the knob to turn."""

import math
import warnings

from coterie.errors import CoterieWarning, RecipeError
from training.losses import Denominator, SupConLoss
from training.objectives import ObjectiveModule

__all__ = ["check_health"]

EPOCHS = 3  # at the loss of collapse, before it is called one
CLOSE = 0.01  # relative


def check_health(
    rows: list[dict[str, float]], objective: ObjectiveModule, columns: int, *, warmup_epochs: float
) -> None:
    """Look at the rows of metrics so far.

    Args:
        columns: with how many rows an anchor is compared; at collapse, where all similarities are equal, the loss is
            log(columns).

    Raises:
        RecipeError: the last epoch's loss is not finite.

    Warns:
        CoterieWarning: once, when the loss has stayed at that of collapse.
    """
    epoch, loss = int(rows[-1]["epoch"]), rows[-1]["loss"]
    if not math.isfinite(loss):
        raise RecipeError(
            f"the loss is not finite in epoch {epoch}: lower optimizer.lr, lengthen schedule.warmup_epochs, "
            "or set optimizer.clip_norm"
        )
    if (
        not isinstance(objective, SupConLoss)
        or objective.denominator is not Denominator.ALL
        or objective.positives_cap is not None
    ):
        return
    collapsed = (objective.temperature if objective.scale_by_temperature else 1.0) * math.log(columns)
    warm = [row for row in rows if row["epoch"] >= warmup_epochs]
    stuck = [abs(row["loss"] - collapsed) < CLOSE * collapsed for row in warm[: EPOCHS + 1]]
    if len(stuck) == EPOCHS and all(stuck):
        warnings.warn(
            f"the loss has stayed at {collapsed:.3f} = log({columns}) for {EPOCHS} epochs, where all embeddings are "
            "one point: lower optimizer.lr, lengthen schedule.warmup_epochs, or raise batch.size",
            CoterieWarning,
            stacklevel=2,
        )
