"""The model card: valid front matter, the manifest's numbers, and nothing that differs between machines."""

import pytest
import yaml

from export.card import model_card


@pytest.fixture
def manifest(tiny_bundle):
    provenance = {"architecture": "timm:test_vit", "weights": "timm/test_vit.r160_in1k", "license": "apache-2.0"}
    measured = {"held_out_top1": 0.98765, "held_out_images": 320}
    return tiny_bundle.manifest.model_copy(update={"provenance": provenance, "accuracy": measured})


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_a_hub_reads(manifest):
    found = front_matter(model_card(manifest))
    assert found["library_name"] == "coterie"
    assert found["pipeline_tag"] == "image-feature-extraction"
    assert found["license"] == "apache-2.0"
    assert found["base_model"] == "timm/test_vit.r160_in1k"
    assert "onnx" in found["tags"]


def test_a_licence_that_is_not_known_is_not_made_up(manifest):
    found = front_matter(model_card(manifest.model_copy(update={"provenance": {"weights": "sha256:00"}})))
    assert not {"license", "base_model"} & set(found)


def test_only_what_supcon_trained_says_so(manifest):
    for objective, says_so in (("supcon", True), ("triplet", False)):
        changed = manifest.model_copy(update={"provenance": {"recipe": "digits", "objective": objective}})
        card = model_card(changed)
        assert ("supervised-contrastive-learning" in front_matter(card)["tags"]) == says_so
        assert f"by the recipe `digits` with the objective `{objective}`" in card


def test_the_numbers_are_the_manifests(manifest):
    card = model_card(manifest)
    assert "| top-1, rejection ignored | 0.9877 |" in card
    assert f"{manifest.calibration.limits['0.05']:.3f}" in card


def test_the_range_of_each_rate_is_said_and_what_too_few_images_cannot_promise(manifest):
    # A rate of 1 % takes 99 images at least; 320 promise it.
    assert "too few" not in model_card(manifest)
    few = manifest.calibration.model_copy(update={"images": 50})
    card = model_card(manifest.model_copy(update={"calibration": few}))
    lines = {line.split("|")[1].strip(): line for line in card.splitlines() if "%" in line and line.startswith("|")}
    assert "too few" in lines["1%"]
    # 5 of 51 lie above: Beta(5, 46) has 5 % of its mass below 4.0 % and above 17.4 %.
    assert "4.0% to 17.4%" in lines["10%"]


def test_what_rejects_is_named(manifest):
    assert "the cluster and the nearest item" in model_card(manifest)
    alone = manifest.calibration.model_copy(update={"neighbor_share": 0.0})
    assert "too far from the cluster of" in model_card(manifest.model_copy(update={"calibration": alone}))


def test_many_classes_are_counted_not_listed(manifest):
    many = tuple(f"class {number}" for number in range(60))
    card = model_card(manifest.model_copy(update={"classes": many}))
    assert "60: `class 0`" in card
    assert "and 10 more" in card
