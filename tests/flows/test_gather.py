"""What the gate measures an improvement on: the test pictures that are new to the champion, and only those."""

from pathlib import Path

import numpy as np

from components.dataset import TEST, TRAIN, DatasetVersion, Item
from flows.gather import _fresh_rows, _losses
from flows.measure import Performance


def version(fingerprint: str, *pictures: tuple[str, str]) -> DatasetVersion:
    items = tuple(Item(sha256, f"caption of {sha256}", split, f"{sha256}.png") for sha256, split in pictures)
    return DatasetVersion("d", fingerprint, Path("nowhere"), items)


OWN = version("1", ("a", TEST), ("c", TEST), ("t", TRAIN))
GROWN = version("2", ("a", TEST), ("b", TEST), ("c", TEST), ("d", TEST), ("t", TRAIN), ("u", TRAIN))


def test_only_pictures_that_the_champions_data_lacks_are_new() -> None:
    assert _fresh_rows(GROWN, OWN) == [1, 3]
    assert _fresh_rows(OWN, OWN) == [0, 1], "on its own data all are compared"
    assert _fresh_rows(GROWN, None) == [0, 1, 2, 3], "of a champion that names no data nothing is known"


def test_losses_of_old_pictures_do_not_thin_the_improvement_on_new_ones() -> None:
    candidate, champion = (Performance(np.array([[1.0], [low], [1.0], [low]]), []) for low in (0.2, 0.8))
    found = _losses(GROWN.id, [candidate, champion], True, _fresh_rows(GROWN, OWN))
    assert found.candidate_N is not None and found.champion_N is not None
    assert found.candidate_N.tolist() == [0.2, 0.2] and found.champion_N.tolist() == [0.8, 0.8]
