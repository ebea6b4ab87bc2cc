"""Recipes: what is accepted, what is refused, and with which words."""

import pytest

from coterie.errors import RecipeError
from training.recipe import Recipe, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_bear_their_files_name(name):
    assert load_recipe(name).name == name


def test_settings_replace_single_values():
    recipe = load_recipe("digits", ["optimizer.lr=0.3", "data.preprocessing.input_size=[8, 8]", "loss.positives_cap=3"])
    assert recipe.optimizer.lr == 0.3
    assert recipe.data.preprocessing.input_size == (8, 8)
    assert recipe.loss.options == {"temperature": 0.1, "positives_cap": 3}


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("digits", ["seed=7"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.speed=1", "optimizer.speed is unknown: known are name, lr"),
        ("optimizer.weight_decy=1", "did you mean weight_decay"),
        ("shedule.epochs=3", "did you mean schedule"),
        ("momentum.que=3", "did you mean queue"),
        ("optimizer.lr={", "not a YAML value"),
        ("data={preprocessing: {input_size: [8, 8], resze: crop}}", "did you mean resize"),
        ("schedule.epochs=none", "schedule.epochs"),
        ("optimizer.lr", "key=value"),
        ("name.lr=1", "name holds a value"),
        ("data.cache_size=[8, 8]", "smaller than"),
        ("loss.temperature=0", "temperature must be positive"),
        ("loss.temperature=warm", "loss"),
        ("loss.warmth=3", "no option warmth"),
        ("loss.objective=magic", "loss.objective"),
        ("loss={objective: n_pairs}", "batch.views is 2"),
    ],
)
def test_a_wrong_setting_is_named(setting, named):
    with pytest.raises(RecipeError, match=named):
        load_recipe("digits", [setting])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["loss={objective: triplet}", "targets.mixup=0.2"], "does not take"),
        (["loss={objective: triplet}", "targets.class_weights=balanced"], "does not weigh"),
        (["loss={objective: cross_entropy}", "momentum.queue=9"], "leave momentum out"),
        (["momentum.queue=9", "batch.views=1"], "batch.views to 2"),
        (["loss={objective: cross_entropy}", "batch.chunk=9"], "smaller batch"),
        (["batch.images_per_class=3"], "does not divide"),
        (["data.test=0.8"], "no image to train on"),
        (["loss.positives_cap=3", "momentum.queue=9"], "leave one of them out"),
        (["loss.positives_cap=3", "targets.mixup=0.2"], "leave one of them out"),
        (["loss.positives_cap=1", "batch.views=4"], "at least 3"),
        (["augment.crop_area=[0.8, 0.2]"], "must rise"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, named):
    with pytest.raises(RecipeError, match=named):
        load_recipe("digits", settings)


def test_a_recipe_may_extend_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: digits\nname: mine\noptimizer: {lr: 0.1}\nloss: {objective: simclr}")
    mine, digits = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("digits")
    assert mine.optimizer == digits.optimizer.model_copy(update={"lr": 0.1})
    assert mine.loss.options == {}  # another objective, other options
    assert mine.augment == digits.augment
    (tmp_path / "again.yaml").write_text(f"extends: {tmp_path / 'again.yaml'}")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(tmp_path / "again.yaml"))


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("-ce")])
def test_a_twin_differs_in_nothing_but_its_loss(name):
    twin, recipe = load_recipe(name), load_recipe(name.removesuffix("-ce"))
    assert twin == recipe.model_copy(update={"name": name, "loss": twin.loss})
    assert twin.loss.objective == "cross_entropy"


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(RecipeError, match="digits"):
        load_recipe("no-such-recipe")


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_a_recipe_cannot_be_changed():
    recipe = load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_leave_no_doubts(name):
    assert load_recipe(name).doubts() == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["encoder.name=resnet18"], "encoder.width"),
        (["optimizer.momentum=0.5"], "optimizer.momentum"),
        (["optimizer={name: sgd, eps: 0.1}"], "optimizer.eps"),
        (["schedule.factor=0.5"], "schedule.milestones"),
        (["augment.randaugment_ops=3"], "randaugment"),
        (["schedule.epochs=2"], "takes all of the 2 epochs"),
        (["data.sampling=balanced", "targets.class_weights=balanced"], "corrects twice"),
    ],
)
def test_settings_that_are_hardly_meant_are_told(settings, named):
    (sentence,) = load_recipe("digits", settings).doubts()
    assert named in sentence
