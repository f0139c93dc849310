"""The verdict: drift needs significance and effect, silence needs power, and each stream speaks for itself."""

import json
from dataclasses import replace

import numpy as np
import pytest

from components.drift import DriftSettings, Untested, explain, look
from components.drift_streams import ALIGNMENT, CAPTIONS, IMAGES, PROMPTS, Items, Texts, compared
from components.errors import InputError
from components.simple_statistics import KINDS

KINDS_OF_THING = ("cat", "dog", "house", "tree", "car", "boat", "star", "moon")
LEVEL = 1 / 365
SETTINGS = DriftSettings(smallest_concept=0.15)


def items(seed: int, n: int, new: float = 0.0, wrong: float = 0.0, encoder: str = "abc") -> Items:
    """Pictures of eight kinds of thing whose captions say the kind and a colour; `new` of them are a ninth kind.

    Of `wrong` of them the captions belong to other pictures. The encoder sees kinds in pictures and texts.
    """
    generator = np.random.default_rng((seed, n))
    centres = np.random.default_rng(1).normal(size=(9, 12))
    kind, colour = generator.integers(0, 8, n), generator.choice(["red", "blue", "green"], n)
    kind[: round(new * n)] = 8
    told = kind.copy()
    told[n - round(wrong * n) :] = generator.permutation(told[n - round(wrong * n) :])
    order = generator.permutation(n)
    kind, told = kind[order], told[order]
    captions = tuple(f"a {hue} {(*KINDS_OF_THING, 'zebra')[one]}" for hue, one in zip(colour, told, strict=True))
    rows = [centres[which] + generator.normal(size=(n, 12)) for which in (kind, told)]
    rows = [(each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in rows]
    small = np.random.default_rng(2).uniform(size=(9, 192))[kind] + 0.3 * generator.normal(size=(n, 192))
    statistics = {"caption_words": generator.poisson(3, n).astype(float), "rejected": generator.binomial(1, 0.05, n)}
    return Items(encoder, rows[0], small.astype(np.float32), Texts(captions, rows[1]), statistics)


REFERENCE = items(0, 260)


def verdicts(found) -> dict[str, str]:
    return {finding.stream: finding.verdict for finding in found.streams}


def test_nothing_new_is_no_drift_with_all_numbers():
    found = look(REFERENCE, items(1, 260), LEVEL, 0, SETTINGS)
    assert found.verdict == "no_drift" and set(verdicts(found)) == {IMAGES, CAPTIONS, ALIGNMENT}
    for finding in found.streams:
        assert finding.level == LEVEL / 4  # three streams and the statistics
        assert finding.p_value > finding.level and finding.permutations >= 999
        assert finding.split_quantile > 0 and finding.auroc.low < 0.5 < finding.auroc.high
        assert finding.needed <= 260 and f"{finding.needed} a side would do" in finding.sentence
    assert [change.name for change in found.statistics] == ["caption_words", "rejected"]
    assert len(found.reasons) == 4 and found.reasons[-1] == "prompts: not tested: there are no served prompts"
    json.dumps(found.as_dict())


def test_new_kind_of_thing_is_drift_of_pictures_and_captions():
    found = look(REFERENCE, items(1, 260, new=0.15), LEVEL, 0, SETTINGS)
    assert found.verdict == "drift"
    assert (verdicts(found)[IMAGES], verdicts(found)[CAPTIONS]) == ("drift", "drift")
    images = found.streams[0]
    assert images.p_value <= images.level and images.mmd2 > images.split_quantile and 0.02 < images.effect < 0.15
    assert found.reasons[0].startswith("images drifted: p = ")


def test_wrong_captions_are_drift_of_the_alignment_alone():
    """The pictures and the captions are those of undisturbed arrivals: only who stands with whom has changed."""
    found = look(REFERENCE, items(1, 260, wrong=1.0), LEVEL, 0, SETTINGS)
    assert found.verdict == "drift"
    assert verdicts(found) == {IMAGES: "no_drift", CAPTIONS: "no_drift", ALIGNMENT: "drift"}
    numbers = found.streams[2].numbers
    assert numbers["agreement_reference"] > 5 * abs(numbers["agreement_arrivals"])


def test_captions_wrong_by_a_rule_are_drift_too():
    """Every kind is called by the next one's name: pairs agree among themselves, and not with the reference."""
    arrivals = items(1, 260)
    names = dict(zip(KINDS_OF_THING, (*KINDS_OF_THING[1:], KINDS_OF_THING[0]), strict=True))
    texts = tuple(" ".join(names.get(word, word) for word in caption.split()) for caption in arrivals.captions.texts)
    rows = np.stack([REFERENCE.captions.rows_ND[_alike(text)] for text in texts])
    found = look(REFERENCE, replace(arrivals, captions=Texts(texts, rows)), LEVEL, 0, SETTINGS)
    assert verdicts(found)[ALIGNMENT] == "drift"


def _alike(text: str) -> int:
    """A caption of the reference with the same last word."""
    return next(i for i, other in enumerate(REFERENCE.captions.texts) if other.split()[-1] == text.split()[-1])


def test_too_few_arrivals_are_not_enough_data_and_the_number_is_told():
    found = look(REFERENCE, items(1, 30), LEVEL, 0, SETTINGS)
    assert found.verdict == "not_enough_data"
    lacking = [finding for finding in found.streams if finding.verdict == "not_enough_data"]
    assert lacking and all(f"{finding.needed} items a side are needed" in finding.sentence for finding in lacking)
    enough = max(finding.needed for finding in found.streams)
    assert look(items(0, enough + 60), items(1, enough + 60), LEVEL, 0, SETTINGS).verdict == "no_drift"


def test_fewer_items_than_any_p_value_can_speak_with_are_told_before_any_test():
    found = look(REFERENCE, items(1, 4), LEVEL, 0, DriftSettings(streams=(IMAGES,)))
    finding = found.streams[0]
    assert (finding.verdict, finding.p_value, finding.needed) == ("not_enough_data", None, 6)
    assert "no difference whatever could reach p <=" in finding.sentence and "at least 6 a side" in finding.sentence


def test_large_change_is_drift_even_where_there_are_too_few_items_to_rule_drift_out():
    arrivals = items(1, 40)
    moved = replace(arrivals, picture_rows_ND=-arrivals.picture_rows_ND)
    finding = look(REFERENCE, moved, LEVEL, 0, SETTINGS).streams[0]
    assert finding.needed > 40 and finding.verdict == "drift"


def test_change_that_is_sure_and_small_is_no_drift():
    settings = DriftSettings(smallest_concept=0.15, smallest_effect=0.9, streams=(IMAGES,))
    finding = look(REFERENCE, items(1, 260, new=0.15), LEVEL, 0, settings).streams[0]
    assert finding.verdict == "no_drift" and finding.p_value <= finding.level
    assert finding.sentence.endswith("the difference is sure, and too small to matter")


def test_simple_statistic_alone_raises_the_alarm():
    arrivals = items(1, 260)
    rejected = np.random.default_rng(0).binomial(1, 0.3, 400)
    found = look(
        REFERENCE, replace(arrivals, statistics={**arrivals.statistics, "rejected": rejected}), LEVEL, 0, SETTINGS
    )
    assert found.verdict == "drift" and set(verdicts(found).values()) == {"no_drift"}
    assert found.reasons[0].startswith("statistics: rejected went from 0.0")


def test_served_prompts_are_compared_with_captions_where_there_are_some():
    strange = items(5, 200, new=0.5).captions
    found = look(REFERENCE, replace(items(1, 260), prompts=strange), LEVEL, 0, SETTINGS)
    assert verdicts(found) == {IMAGES: "no_drift", CAPTIONS: "no_drift", ALIGNMENT: "no_drift", PROMPTS: "drift"}
    assert found.streams[-1].num_arrivals == 200 and found.streams[0].level == LEVEL / 5


def test_verdict_is_a_function_of_items_level_and_seed():
    arrivals = items(1, 60)
    assert look(REFERENCE, arrivals, LEVEL, 3) == look(REFERENCE, arrivals, LEVEL, 3)
    assert look(REFERENCE, arrivals, LEVEL, 3) != look(REFERENCE, arrivals, LEVEL, 4)


def test_items_that_are_all_equal_are_compared_without_trouble_and_show_nothing():
    rows, pixels = np.ones((40, 12), np.float32), np.zeros((40, 192), np.float32)
    equal = Items("abc", rows, pixels, Texts(("a cat",) * 40, rows))
    found = look(equal, equal, LEVEL, 0, SETTINGS)
    assert found.verdict == "not_enough_data" and {finding.needed for finding in found.streams} == {None}
    assert {finding.p_value for finding in found.streams} == {1.0}
    assert all("no number of items would find" in finding.sentence for finding in found.streams)


def test_of_many_arrivals_a_sample_is_compared():
    finding = look(REFERENCE, items(1, 400), LEVEL, 0, DriftSettings(most_items=120, streams=(IMAGES,))).streams[0]
    assert (finding.num_reference, finding.num_arrivals) == (120, 120)


def test_near_duplicates_do_not_make_the_classifier_see_drift():
    """Each arrival twice: exchangeability is broken, and yet nothing is new; the AUROC must not say otherwise."""
    arrivals = items(1, 130)
    twice = Items(
        "abc",
        np.repeat(arrivals.picture_rows_ND, 2, axis=0),
        np.repeat(arrivals.thumbnails_ND, 2, axis=0),
        Texts(
            tuple(text for text in arrivals.captions.texts for _ in range(2)),
            np.repeat(arrivals.captions.rows_ND, 2, axis=0),
        ),
    )
    finding = look(REFERENCE, twice, LEVEL, 0, DriftSettings(streams=(IMAGES,))).streams[0]
    assert finding.auroc.low < 0.55


def test_explanation_of_new_pictures_shows_them_and_their_words():
    arrivals = items(1, 260, new=0.15)
    finding = look(REFERENCE, arrivals, LEVEL, 0, SETTINGS).streams[0]
    found = explain(*compared(REFERENCE, arrivals, 0, 1000), finding)
    shown = [arrivals.captions.texts[place] for place in found.clusters[0].members]
    assert sum("zebra" in caption for caption in shown) > 0.9 * len(shown)
    assert found.words[0].text == "zebra" and found.words[0].reference == 0


def test_explanation_of_wrong_captions_shows_wrong_pairs():
    arrivals = items(1, 260, wrong=0.6)
    finding = look(REFERENCE, arrivals, LEVEL, 0, SETTINGS).streams[2]
    assert finding.verdict == "drift"
    found = explain(REFERENCE, arrivals, finding)
    right = items(1, 260).captions.texts
    shown = [place for cluster in found.clusters for place in cluster.members]
    assert len(shown) == 40 and np.mean([arrivals.captions.texts[place] != right[place] for place in shown]) > 0.8


def test_reference_of_another_encoder_is_refused_with_advice():
    with pytest.raises(InputError, match=r"pin the reference again with the new encoder, or set model\.clip back"):
        look(REFERENCE, items(1, 50, encoder="xyz"), LEVEL, 0, SETTINGS)
    with pytest.raises(InputError, match="some time must pass"):
        look(REFERENCE, items(1, 50), 0.0, seed=0)


def test_false_alarms_of_looks_are_within_their_level():
    """Every look has another reference, so looks are independent; all streams and statistics, any alarm counts."""
    repeats, level = 60, 0.1
    alarms = sum(
        look(items(1000 + seed, 40), items(2000 + seed, 40), level, seed).verdict == "drift" for seed in range(repeats)
    )
    assert alarms <= 13  # the 99.5 % quantile of 60 looks at 10 %
    assert set(KINDS) > set(REFERENCE.statistics)


def test_streams_that_cannot_be_tested_are_told_and_none_tested_is_not_enough_data():
    found = look(REFERENCE, items(1, 260), LEVEL, 0, SETTINGS)
    assert [one.stream for one in found.untested] == [PROMPTS] and found.verdict == "no_drift"
    assert found.reasons[-1] == "prompts: not tested: there are no served prompts"
    alone = look(REFERENCE, items(1, 260), LEVEL, 0, replace(SETTINGS, streams=(PROMPTS,)))
    assert (alone.verdict, alone.streams, alone.reasons) == ("not_enough_data", (), found.reasons[-1:])
    few = Untested(IMAGES, 300, 7, "7 so far")
    left = look(REFERENCE, items(1, 260), LEVEL, 0, replace(SETTINGS, streams=(CAPTIONS,)), (few,))
    assert left.untested == (few,) and "images: not tested: 7 so far" in left.reasons
    assert verdicts(left) == {CAPTIONS: "no_drift"} and left.as_dict()["untested"][0]["num_arrivals"] == 7
