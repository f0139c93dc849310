"""The model card: front matter that parses, and no markup from names."""

import yaml

from components.model_card import CardFacts, make_card

FACTS = CardFacts(
    name="fresco",
    version=3,
    dataset="emblems@0123456789ab",
    resolution_px=64,
    scorecard={"denoising_loss": {"value": 0.123456789, "low": 0.1, "high": 0.2, "n": 120}},
    reasons=["on the new data the loss changes by -4.0%"],
    lineage={"run": "fresco-abc", "code commit": "abc1234"},
    recipe={"steps": 900, "seed": 0},
    has_picture=True,
)


def test_front_matter_is_what_the_hub_reads():
    front = yaml.safe_load(make_card(FACTS).split("---\n")[1])
    assert front["library_name"] == "diffusers" and front["pipeline_tag"] == "text-to-image"
    result = front["model-index"][0]["results"][0]
    assert result["dataset"] == {"type": "fresco", "name": "emblems@0123456789ab"}
    assert result["metrics"] == [{"type": "denoising_loss", "value": 0.123457, "name": "denoising_loss"}]


def test_card_tells_version_data_recipe_scores_lineage_and_how_to_load():
    card = make_card(FACTS)
    for text in ("version 3", "emblems@0123456789ab", "| steps | 900 |", "0.1235 (0.1 to 0.2), n = 120", "fresco-abc"):
        assert text in card
    assert "DiffusionPipeline.from_pretrained" in card and "![Pictures drawn from test captions](samples.png)" in card


def test_card_without_picture_or_recipe_leaves_them_out():
    card = make_card(CardFacts("x", 1, "d", 16, {}, [], {}))
    assert "samples.png" not in card and "## Recipe" not in card


def test_names_cannot_bring_markup_or_rows():
    card = make_card(CardFacts("<b>*x*", 1, "d", 16, {}, ["a\nb"], {"run": "a | b\n# c"}))
    assert r"\<b\>\*x\*, version 1" in card and "- a b" in card and r"| run | a \| b # c |" in card
