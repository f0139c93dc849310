"""The gate's page says what was decided, shows each check's interval beside its limit, and escapes what it is given."""

import re
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from components.decision_page import WIDTH_PX, Judged, lead, make_decision_page
from components.policy import ANCHORS, FORGETTING, IMPROVEMENT, SERVING, Check, Decision

NUMBERS = {"change": -0.12, "low": -0.2, "high": -0.04, "n": 120, "wanted": 0.01}
IMPROVED = Check(IMPROVEMENT, "pass", "on the new data the loss changes by -12.0%", NUMBERS)
FORGOT = Check(FORGETTING, "fail", "it forgets <more>", {"change": 0.09, "low": 0.07, "high": 0.11, "allowed": 0.05})
WORSE = Check(ANCHORS, "inconclusive", "-0.5 points", {"change": -0.5, "low": -1.2, "high": 0.2, "allowed": 1.0})
SERVES = Check(SERVING, "pass", "it serves", {"ready_s": 5.0})


def decision(verdict: str, *checks: Check) -> Decision:
    order = ("fail", "inconclusive", "pass", "skipped")
    reasons = tuple(check.sentence for outcome in order for check in checks if check.outcome == outcome)
    return Decision(verdict, reasons, checks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("judged", "told"),
    [
        (Judged(2, 1, decision("promote", SERVES, IMPROVED)), "Version 2 replaces version 1. On the new data the loss"),
        (Judged(1, 0, decision("promote", SERVES)), "Version 1 is the first champion."),
        (Judged(3, 2, decision("reject", IMPROVED, FORGOT)), "rejected. Version 2 stays champion. It forgets <more>."),
        (Judged(3, 2, decision("hold", IMPROVED, WORSE)), "held: the evidence does not decide. Version 2 stays"),
        (Judged(3, 2, decision("reject", FORGOT), forced=True), "promoted by force; the gate says reject."),
    ],
)
def test_lead_is_the_verdict_and_what_decided_it(judged: Judged, told: str) -> None:
    assert told in lead(judged)


def test_page_has_a_row_for_each_check_and_a_drawing_for_each_interval() -> None:
    judged = Judged(3, 2, decision("reject", SERVES, IMPROVED, FORGOT, WORSE))
    grid = Image.new("RGB", (300, 200), (10, 200, 90))
    page = make_decision_page(
        "fresco version 3", judged, {"Champion": "x"}, {"The gate": "a: 1"}, grid, "evaluate.html"
    )
    assert page.count("<tr>") == 5 and "it forgets &lt;more&gt;" in page and "<more>" not in page
    assert 'href="evaluate.html"' in page and "data:image" in page
    drawings = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]
    assert len(drawings) == 3, "what serves has no interval"


@pytest.mark.parametrize(
    ("check", "good_side", "clear"),
    [(IMPROVED, "left", True), (FORGOT, "left", False), (WORSE, "right", False)],
)
def test_interval_lies_in_the_shaded_side_exactly_when_the_check_passes(
    check: Check, good_side: str, clear: bool
) -> None:
    page = make_decision_page("x", Judged(2, 1, decision("hold", check)), {}, {})
    drawing = ET.fromstring(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)[0])
    shade = drawing.find("rect")
    line = next(path.attrib["d"] for path in drawing.findall("path") if path.get("stroke-width") == "3")
    low, high = (float(number) for number in re.findall(r"M([\d.]+) \d+H([\d.]+)", line)[0])
    start, end = float(shade.attrib["x"]), float(shade.attrib["x"]) + float(shade.attrib["width"])
    assert (start == 0.0) == (good_side == "left") and (end == pytest.approx(WIDTH_PX, abs=0.1)) == (
        good_side == "right"
    )
    assert (start <= low and high <= end) == clear
