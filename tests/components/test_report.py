"""Report pieces: nothing to fetch, nothing unescaped, numbers rounded to their intervals, a grid that reads."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from components import report
from components.metrics import Estimate
from components.report import Card, MetricRow

VOID = {"meta", "img", "circle", "path", "br"}


class Balance(HTMLParser):
    """Fails on a tag that is closed twice or never, and keeps the text and the addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # closes itself

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    return parser


def picture(value: int = 0, side_px: int = 16) -> Image.Image:
    return Image.fromarray(np.full((side_px, side_px, 3), value, np.uint8))


def row(change: Estimate | None = None, better: int = 0) -> MetricRow:
    estimates = Estimate(0.5, 0.4, 0.6, 9), Estimate(0.3, 0.2, 0.4, 9)
    return MetricRow("score", "what it is", *estimates, change, better, "p = 0.25" if change else "")


def test_a_page_is_balanced_and_fetches_nothing():
    cards = report.cards([Card("a caption", "seed 1", (("base", picture()), ("none", None)))])
    sections = [
        report.section("One", "note", report.tiles([row()]), cards),
        report.section(
            "Two", "", report.scorecard_table([row()]), report.notes({"a": "b"}), report.folded("t", "x: 1")
        ),
    ]
    html = report.page("Title", "Kind", "Lead.", {"Run": "r-1"}, sections, "end")
    found = parsed(html)
    assert all(address.startswith("data:image/") for address in found.addresses) and found.addresses
    assert "url(" not in html and "@import" not in html and "<script" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_text_from_data_cannot_become_markup():
    evil = '<script>alert("x")</script>&'
    pieces = [
        report.section(evil, evil, report.notes({evil: evil}), report.folded(evil, evil)),
        report.cards([Card(evil, evil, ((evil, picture()),))]),
        report.tiles([MetricRow(evil, evil, Estimate(1, 0, 2, 3))]),
        report.scorecard_table([MetricRow(evil, evil, Estimate(1, 0, 2, 3))]),
        report.plot(evil, evil, ""),
    ]
    html = report.page(evil, evil, evil, {evil: evil}, pieces, evil)
    assert "<script" not in html
    assert evil in "".join(parsed(html).text)


def test_small_pictures_are_stored_without_loss_and_large_ones_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    html = report.cards([Card("c", "", (("p", noise),))])
    data = base64.b64decode(re.search(r'base64,([^"]+)"', html).group(1))
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), np.array(noise)) and 'class="pixels"' in html
    assert "data:image/webp" in report.cards([Card("c", "", (("p", picture(9, 512)),))])


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (Estimate(0.44871, 0.4371, 0.46022, 61), ("0.449", "0.437", "0.460")),
        (Estimate(71.26, 69.22, 73.1, 64), ("71.3", "69.2", "73.1")),
        (Estimate(-0.00123, -0.0031, 0.0005, 9), ("−0.0012", "−0.0031", "0.0005")),
        (Estimate(1234.5, 1000, 1500, 9), ("1234", "1000", "1500")),
        (Estimate(0.25, 0.25, 0.25, 9), ("0.250", "0.250", "0.250")),
    ],
)
def test_numbers_are_rounded_to_what_the_interval_supports(estimate, shown):
    assert report.rounded(estimate) == shown


@pytest.mark.parametrize(
    ("change", "better", "colour"),
    [
        (Estimate(-0.2, -0.3, -0.1, 9), -1, "good"),
        (Estimate(0.2, 0.1, 0.3, 9), -1, "bad"),
        (Estimate(0.2, 0.1, 0.3, 9), 1, "good"),
        (Estimate(-0.2, -0.3, -0.1, 9), 1, "bad"),
        (Estimate(0.2, 0.1, 0.3, 9), 0, ""),
    ],
)
def test_a_difference_is_coloured_only_where_it_is_clear_and_one_side_is_better(change, better, colour):
    for html in (report.tiles([row(change, better)]), report.scorecard_table([row(change, better)])):
        assert f'<span class="{colour}">' in html


def test_the_table_says_p_value_encoder_and_warning():
    warned = MetricRow("FID", "", Estimate(9, 8, 10, 64, "0123456789ab", "biased below <b>10,000</b>"))
    html = report.scorecard_table([row(Estimate(-0.2, -0.3, -0.1, 9)), warned])
    for text in ("p = 0.25", "0123456789ab", "biased below &lt;b&gt;10,000", "encoder"):
        assert text in html
    assert "encoder" not in report.scorecard_table([row()])


def test_the_table_has_columns_for_the_base_only_where_there_is_one():
    alone = report.scorecard_table([MetricRow("score", "", Estimate(1, 0, 2, 3))])
    assert "base" not in alone and "difference" not in alone
    assert "base" in report.scorecard_table([row()])


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.getcolors(1 << 24)}


def test_grid_shows_every_picture_enlarged_without_smoothing():
    rows = [(picture(10 + index), picture(100 + index)) for index in range(6)]
    grid = report.draw_grid(rows, [f"caption {index}" for index in range(6)], ("before", "after"))
    area = {value: count for count, value in grid.getcolors(1 << 24)}
    for value in [10 + index for index in range(6)] + [100 + index for index in range(6)]:
        assert area[(value, value, value)] >= 190 * 190  # 16 px times 12, but for a shade shared with some letter


def test_grid_without_a_picture_leaves_a_quiet_square():
    grid = report.draw_grid([(picture(1), None)], ["c"])
    assert report.EMPTY in colours(grid)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_grid_keeps_margins_and_a_shape_that_fits_a_screen(count):
    grid = report.draw_grid(
        [(picture(1), picture(2), picture(3))] * count, ["two large red circles"] * count, ("a", "b", "c")
    )
    edge = grid.crop((0, 0, grid.width, 20))
    assert colours(edge) == {report.PAPER}
    assert 0.4 < grid.width / grid.height < 3


def test_grid_of_large_pictures_does_not_enlarge_them():
    assert report.draw_grid([(picture(5, 512),)], ["c"]).width == 512 + 2 * report.MARGIN_PX


def test_long_captions_are_wrapped_and_cut():
    font = report._font(18)
    for text in ("word " * 60, "x" * 500, "", "short"):
        lines = report._wrapped(text, font, 300)
        assert 1 <= len(lines) <= report.CAPTION_LINES
        assert all(font.getlength(line) <= 300 for line in lines)
    assert report._wrapped("word " * 60, font, 300)[-1].endswith("…")
    assert report._wrapped("short", font, 300) == ["short"]
