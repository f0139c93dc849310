"""How pictures are handed over: in the body or by address, with what drew them in headers that HTTP can carry."""

import base64

from cluster.answers import answer, headers_of
from cluster.images_schema import ImagesRequest, make_order
from cluster.painter_contract import Finished
from cluster.placement import ServeSection

INFO = {"width_px": 16, "height_px": 24, "size_multiple_px": 8, "min_side_px": 16}
FACTS = {"model_version": 7, "dataset": "emblèmes@0123", "run_id": None}
FINISHED = Finished((b"one", b"two"), "32x48", FACTS, ())


def test_pictures_are_in_the_body_or_behind_addresses_each_with_its_seed() -> None:
    order = make_order(ImagesRequest(prompt="x", n=2, seed=5), ServeSection(), INFO)
    inside = answer(order, FINISHED, None)
    assert [base64.b64decode(entry["b64_json"]) for entry in inside["data"]] == [b"one", b"two"]
    assert inside["size"] == "32x48" and inside["seeds"] == [5, 6] and inside["dataset"] == "emblèmes@0123"
    outside = answer(order, FINISHED, lambda content: f"http://here/{content.decode()}")
    assert [entry["url"] for entry in outside["data"]] == ["http://here/one", "http://here/two"]
    assert all("b64_json" not in entry for entry in outside["data"])


def test_headers_are_ascii_and_leave_out_what_is_not_known() -> None:
    assert headers_of(FACTS) == {"x-fresco-model-version": "7", "x-fresco-dataset": "embl%C3%A8mes@0123"}
