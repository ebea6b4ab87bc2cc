"""Divergence and collapse are named with the knob to turn."""

import math
import warnings

import pytest

from coterie.errors import CoterieWarning, RecipeError
from training.health import check_health
from training.recipe import load_recipe

COLUMNS = 255


def rows(*losses):
    return [{"epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses)]


def check(*losses, settings=()):
    objective = load_recipe("digits", settings).loss.build(n_classes=8, embedding_dim=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_health(rows(*losses), objective, COLUMNS, warmup_epochs=1)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    with pytest.raises(RecipeError, match=r"epoch 1: lower optimizer\.lr"):
        check(5.0, loss)


def test_a_loss_that_stays_at_collapse_is_warned_of_once():
    at = math.log(COLUMNS)
    check(at, at, at)  # two epochs after the warm-up: it may still begin to fall
    with pytest.raises(CoterieWarning, match=r"log\(255\).*lower optimizer\.lr"):
        check(at, at, at, at)
    check(at, at, at, at, at)
    check(at, at, at, 0.9 * at)


@pytest.mark.parametrize(("objective", "temperature"), [("supcon", 0.1), ("simclr", 0.5)])
def test_the_loss_of_collapse_bears_the_temperature_where_the_loss_does(objective, temperature):
    at = temperature * math.log(COLUMNS)
    with pytest.raises(CoterieWarning):
        check(at, at, at, at, settings=[f"loss={{objective: {objective}, scale_by_temperature: true}}"])


@pytest.mark.parametrize("loss", ["{objective: triplet}", "{denominator: only_negatives}", "{positives_cap: 3}"])
def test_other_losses_have_no_such_value(loss):
    at = math.log(COLUMNS)
    check(at, at, at, at, settings=[f"loss={loss}"])
