"""Reports that a person reads: one HTML file each, with nothing to fetch, and the before/after grid as a PNG.

Functions return HTML text and compose by joining; everything that comes from data is escaped. Pictures are embedded,
plots are inline SVG (`components/plots.py`), the style sheet is `assets/report.css` and follows the reader's light or
dark preference. A number is shown with its interval, rounded to what the interval can support.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from components.metrics import Estimate
from components.plots import whiskers

STYLE_SHEET = Path(__file__).parent / "assets" / "report.css"
PIXELATED_UP_TO_PX = 128  # smaller pictures are shown with visible pixels and stored losslessly


@dataclass(frozen=True)
class MetricRow:
    """One metric of a model, of its base (or another model) where measured, and of the paired difference."""

    name: str
    note: str
    model: Estimate
    base: Estimate | None = None
    change: Estimate | None = None
    better: int = 0
    """1 or -1: the sign of a clear difference that is good; 0 where the difference is not clear or neither is good."""
    decided: str = ""
    """The p-value in words."""


@dataclass(frozen=True)
class Card:
    """One prompt and its pictures, each under a label; None where there is no picture."""

    caption: str
    detail: str
    pictures: tuple[tuple[str, Image.Image | None], ...]


def page(title: str, eyebrow: str, lead: str, facts: Mapping[str, str], sections: Sequence[str], footer: str) -> str:
    """A whole HTML document; `facts` are who, what and when, `sections` come from `section`."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · {escape(eyebrow)}</title>\n<style>\n{STYLE_SHEET.read_text()}</style>\n</head>\n"
        f'<body>\n<main>\n<header>\n<div class="eyebrow">{escape(eyebrow)}</div>\n<h1>{escape(title)}</h1>\n'
        f'<p class="lead">{escape(lead)}</p>\n<dl class="facts">{rows}</dl>\n</header>\n'
        + "\n".join(sections)
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, note: str, *bodies: str) -> str:
    """A titled part of a page; the bodies are HTML made by the functions below."""
    return f"<section>\n<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>\n" + "\n".join(bodies) + "\n</section>"


def tiles(rows: Sequence[MetricRow], base: str = "base") -> str:
    """The metrics that matter most, large, each with its interval drawn beside the base's."""
    return f'<div class="tiles">{"".join(_tile(row, base) for row in rows)}</div>'


def _tile(row: MetricRow, base: str) -> str:
    value, low, high = rounded(row.model)
    drawn = whiskers(_triple(row.model), _triple(row.base) if row.base else None)
    return (
        f'<div class="tile"><span class="name">{escape(row.name)}</span><span class="value">{value}</span>'
        f'<span class="range">{low} to {high}</span>{drawn}<span class="change">{_compared(row, base)}</span></div>'
    )


def _compared(row: MetricRow, name: str) -> str:
    """One line under a number: what the base has, and whether the paired difference is clear of zero."""
    if row.base is None:
        return escape(row.note)
    base = f"{escape(name)} {rounded(row.base)[0]}"
    if row.change is None:
        return base
    return f'{base}, <span class="{_verdict(row)}">{_signed(row.change)}</span>'


def _verdict(row: MetricRow) -> str:
    """good or bad where the difference is clear, nothing otherwise."""
    if row.change is None or row.better == 0:
        return ""
    return "good" if row.change.value * row.better > 0 else "bad"


def scorecard_table(rows: Sequence[MetricRow], model: str = "model", base: str = "base") -> str:
    """Every metric with its 95 % interval, warning, encoder and count; columns only where some row fills them."""
    with_base = any(row.base is not None for row in rows)
    with_encoder = any(row.model.encoder for row in rows)
    head = ["metric", model, *([base, "difference"] if with_base else []), *(["encoder"] if with_encoder else [])]
    lines = []
    for row in rows:
        warning = f'<small class="warning">{escape(row.model.warning)}</small>' if row.model.warning else ""
        cells = [f"{escape(row.name)}<small>{escape(row.note)}</small>{warning}", _interval(row.model)]
        if with_base:
            cells += [_interval(row.base) if row.base else "", _difference(row)]
        if with_encoder:
            cells.append(f"<code>{escape(row.model.encoder)}</code>" if row.model.encoder else "")
        cells.append(str(row.model.n))
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = "".join(f"<th>{escape(title)}</th>" for title in [*head, "items"])
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _difference(row: MetricRow) -> str:
    if row.change is None:
        return ""
    decided = f'<small class="decided">{escape(row.decided)}</small>' if row.decided else ""
    return f'<span class="{_verdict(row)}">{_interval(row.change, signed=True)}</span>{decided}'


def cards(items: Sequence[Card]) -> str:
    """Prompts with their pictures side by side."""
    return f'<div class="cards">{"".join(_card(item) for item in items)}</div>'


def _card(item: Card) -> str:
    cells = "".join(
        f"<div>{_img(picture, label)}<span>{escape(label)}</span></div>" for label, picture in item.pictures
    )
    detail = f" <small>{escape(item.detail)}</small>" if item.detail else ""
    head = f"<figcaption>{escape(item.caption)}{detail}</figcaption>"
    return f'<figure class="card">{head}<div class="row">{cells}</div></figure>'


def _img(picture: Image.Image | None, label: str) -> str:
    if picture is None:
        return '<div class="none"></div>'
    small = max(picture.size) <= PIXELATED_UP_TO_PX
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "WEBP", quality=88)
    kind, look = ("png", ' class="pixels"') if small else ("webp", "")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{look} alt="{escape(label)}" src="data:image/{kind};base64,{data}">'


def sheet(picture: Image.Image) -> str:
    """A picture of pictures, as wide as its place."""
    return _img(picture, "sample sheet")


def plot(title: str, note: str, svg: str) -> str:
    """An inline SVG with a title."""
    return f'<figure class="plot"><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>{svg}</figure>'


def plots(items: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(items)}</div>'


def notes(items: Mapping[str, str]) -> str:
    """Terms with their explanations."""
    return (
        '<dl class="notes">' + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items()) + "</dl>"
    )


def folded(title: str, text: str) -> str:
    """Preformatted text behind a line to click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def rounded(estimate: Estimate) -> tuple[str, str, str]:
    """Value, low and high with one number of decimals: two digits of half the interval."""
    half = (estimate.high - estimate.low) / 2
    decimals = 3 if half <= 0 else min(6, max(0, 1 - math.floor(math.log10(half))))
    value, low, high = (
        f"{number:.{decimals}f}".replace("-", "−") for number in (estimate.value, estimate.low, estimate.high)
    )
    return value, low, high


def _signed(estimate: Estimate) -> str:
    value = rounded(estimate)[0]
    return value if value.startswith("−") else "+" + value


def _interval(estimate: Estimate, signed: bool = False) -> str:
    value, low, high = rounded(estimate)
    return f"{_signed(estimate) if signed else value}<small>{low} to {high}</small>"


def _triple(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


PAPER, INK, SOFT, EMPTY = (251, 250, 248), (34, 33, 31), (109, 106, 100), (232, 229, 223)
CELL_PX = 192  # pictures are enlarged by a whole factor up to about this side
MARGIN_PX, CARD_GAP_PX, PICTURE_GAP_PX, LINE_PX = 48, 44, 12, 26
CAPTION_LINES = 2


def draw_grid(
    rows: Sequence[Sequence[Image.Image | None]], captions: Sequence[str], headings: Sequence[str] = ()
) -> Image.Image:
    """A picture of pictures: each row (say before, after, real) under its caption, in as many columns as look well.

    `headings` name the pictures of a row and stand at the top of every column. Small pictures are enlarged by a whole
    factor without smoothing. A row may have None where a picture is missing.
    """
    width_px = max(picture.width for row in rows for picture in row if picture is not None)
    cell_px = width_px * max(1, CELL_PX // width_px)
    count = max(len(row) for row in rows)
    card_width = count * cell_px + (count - 1) * PICTURE_GAP_PX
    text_font, heading_font = _font(18), _font(15)
    texts = [_wrapped(caption, text_font, card_width) for caption in captions]
    card_height = max(len(text) for text in texts) * LINE_PX + 8 + cell_px
    across = _columns(len(rows), card_width + CARD_GAP_PX, card_height + CARD_GAP_PX)
    down = math.ceil(len(rows) / across)
    top = MARGIN_PX + (34 if headings else 0)
    size = (
        2 * MARGIN_PX + across * card_width + (across - 1) * CARD_GAP_PX,
        top + MARGIN_PX + down * card_height + (down - 1) * CARD_GAP_PX,
    )
    grid = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(grid)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        left = MARGIN_PX + (index % across) * (card_width + CARD_GAP_PX)
        upper = top + (index // across) * (card_height + CARD_GAP_PX)
        picture_top = upper + card_height - cell_px
        pen.multiline_text((left, picture_top - 8 - len(text) * LINE_PX), "\n".join(text), INK, text_font, spacing=5)
        for place, picture in enumerate(row):
            x = left + place * (cell_px + PICTURE_GAP_PX)
            if index < across and place < len(headings):
                pen.text((x, MARGIN_PX - 8), headings[place], SOFT, heading_font)
            if picture is None:
                pen.rectangle((x, picture_top, x + cell_px - 1, picture_top + cell_px - 1), EMPTY)
            else:
                grid.paste(_fitted(picture, cell_px), (x, picture_top))
    return grid


def _columns(num_cards: int, card_width: int, card_height: int) -> int:
    """The number of columns that brings the grid nearest to a 4:3 page, full rows preferred."""

    def badness(across: int) -> float:
        down = math.ceil(num_cards / across)
        shape = abs(math.log(across * card_width / (down * card_height) / (4 / 3)))
        return shape + 0.5 * (across * down - num_cards) / num_cards

    return min(range(1, num_cards + 1), key=badness)


def _fitted(picture: Image.Image, cell_px: int) -> Image.Image:
    how = Image.Resampling.NEAREST if picture.width <= cell_px else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((cell_px, cell_px), how)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib carries it, so that labels look the same on every machine."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size_px)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The text in at most CAPTION_LINES lines of the width; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = lines[:CAPTION_LINES]
    if len(lines) > CAPTION_LINES:
        kept[-1] += " …"
    for index, line in enumerate(kept):
        while font.getlength(line) > width_px:
            line = line.rstrip(" …")[:-1] + "…"
        kept[index] = line
    return kept
