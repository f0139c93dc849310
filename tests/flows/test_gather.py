"""What the gate measures an improvement on: the test pictures that are new to the champion, and only those."""

from pathlib import Path

import numpy as np
import pytest

from components.dataset import TEST, TRAIN, DatasetVersion, Item
from flows import gather
from flows.gather import _judged_by, _losses
from flows.measure import Performance


def version(fingerprint: str, *pictures: tuple[str, str]) -> DatasetVersion:
    items = tuple(Item(sha256, f"caption of {sha256}", split, f"{sha256}.png") for sha256, split in pictures)
    return DatasetVersion("d", fingerprint, Path("nowhere"), items)


OWN = version("1", ("a", TEST), ("c", TEST), ("t", TRAIN))
GROWN = version("2", ("a", TEST), ("b", TEST), ("c", TEST), ("d", TEST), ("t", TRAIN), ("u", TRAIN))


def test_only_pictures_that_the_champions_data_lacks_are_new() -> None:
    assert _judged_by(GROWN, OWN) == (GROWN.split(TEST), [1, 3]), "measured whole, as the scorecard is: it is kept"
    assert _judged_by(OWN, OWN)[1] == [0, 1], "on its own data all are compared"
    assert _judged_by(GROWN, None)[1] == [0, 1, 2, 3], "of a champion that names no data nothing is known"


def test_of_more_test_pictures_than_are_measured_the_new_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MAX_LOSS_PICTURES", 2)
    pictures, fresh = _judged_by(GROWN, OWN)
    assert ([item.sha256 for item in pictures], fresh) == (["b", "d"], [0, 1])
    pictures, fresh = _judged_by(GROWN, None)
    assert ([item.sha256 for item in pictures], fresh) == (["a", "b"], [0, 1])


def test_losses_of_old_pictures_do_not_thin_the_improvement_on_new_ones() -> None:
    candidate, champion = (Performance(np.array([[1.0], [low], [1.0], [low]]), []) for low in (0.2, 0.8))
    found = _losses(GROWN.id, [candidate, champion], True, _judged_by(GROWN, OWN)[1])
    assert found.candidate_N is not None and found.champion_N is not None
    assert found.candidate_N.tolist() == [0.2, 0.2] and found.champion_N.tolist() == [0.8, 0.8]
