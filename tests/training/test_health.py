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
    recipe = load_recipe("digits", ["schedule.warmup_epochs=1", *settings])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_health(rows(*losses), recipe, COLUMNS)


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


def test_the_loss_of_collapse_bears_the_temperature_where_the_loss_does():
    at = 0.1 * math.log(COLUMNS)
    with pytest.raises(CoterieWarning):
        check(at, at, at, at, settings=["loss.scale_by_temperature=true"])


def test_other_objectives_have_no_such_loss():
    at = math.log(COLUMNS)
    check(at, at, at, at, settings=["loss={objective: triplet}"])
