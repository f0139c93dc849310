"""Which captioned pictures does a source hold, and under which of the known layouts?

Layouts: `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (the ImageFolder convention); pictures beside
same-named `.txt` captions; Parquet with image bytes and captions (as Hugging Face data sets are stored); and
`emblems://WORLD?count=N&seed=S`, drawn on the spot. Pure parsing: the listing and the reading are handed in, so a
folder and a bucket are the same. No picture is decoded here; what cannot be one carries its `problem` from here on.
"""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from components.errors import DataError, InputError

EMBLEMS_SCHEME = "emblems://"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption")
PICTURE_KEYS = ("image", "image_bytes")
LAYOUTS_HELP = (
    "metadata.jsonl or metadata.csv with file_name and text, pictures with same-named .txt captions,"
    " or Parquet with image and text columns"
)

NO_CAPTION = "no_caption"
EMPTY_CAPTION = "empty_caption"
UNREADABLE_CAPTION = "unreadable_caption"
UNREADABLE_NAME = "unreadable_name"
MISSING_FILE = "missing_file"
OUTSIDE = "path_outside_source"


@dataclass(frozen=True)
class Listed:
    """One file of the source: its path relative to the source, and whether it is a link that leaves the source."""

    path: str
    outside: bool = False


@dataclass(frozen=True)
class Candidate:
    """A picture that may be accepted, not yet read. Exactly one of the ways to its bytes is set, or `problem` is."""

    name: str
    """Unique within the source; what the card and the manifest call it."""
    path: str = ""
    """Picture file, relative to the source."""
    caption: str | None = None
    caption_path: str = ""
    """Text file to read the caption from, when it is not known yet."""
    row_group: int = -1
    """Row group of a Parquet file: stands for all pictures in it."""
    index: int = -1
    """Index of a built-in example."""
    problem: str = ""
    """Why it is rejected unread; empty otherwise."""


@dataclass(frozen=True)
class EmblemSource:
    world: str
    count: int
    seed: int


def parse_emblems(uri: str) -> EmblemSource:
    """Read `emblems://WORLD?count=N&seed=S` (count 1000 and seed 0 when left out); InputError says what is wrong."""
    from components.emblems import WORLDS

    parts = urlsplit(uri)
    worlds = (*WORLDS, "collage")
    values = {key: texts[-1] for key, texts in parse_qs(parts.query, keep_blank_values=True).items()}
    unknown = sorted(set(values) - {"count", "seed"})
    count, seed = values.get("count", "1000"), values.get("seed", "0")
    if parts.netloc not in worlds or unknown or not count.isdecimal() or not seed.isdecimal() or int(count) < 1:
        raise InputError(
            f"data.source expected emblems://WORLD?count=N&seed=S with WORLD one of {', '.join(worlds)}, N at least 1"
            f" and S a whole number from 0, found {uri!r}"
        )
    return EmblemSource(parts.netloc, int(count), int(seed))


def find_candidates(
    source: str, listing: list[Listed], read: Callable[[str], bytes], open_file: Callable[[str], BinaryIO]
) -> list[Candidate]:
    """Return the candidates of a folder or prefix; `read` and `open_file` take a path relative to it.

    InputError when there is nothing, when no layout is recognised, or when pictures have no captions at all.
    """
    if not listing:
        raise InputError(
            f"data.source expected captioned pictures in {source!r}, found an empty folder; put in {LAYOUTS_HELP}"
        )
    metadata = _one_metadata_per_folder(listing)
    tables = [file for file in listing if file.path.lower().endswith(".parquet")]
    if metadata:
        found = _from_metadata(metadata, listing, read)
    elif tables:
        found = [group for file in tables for group in _row_groups(file, open_file)]
    else:
        found = _from_caption_files(source, listing)
    return [_with_printable_name(candidate) for candidate in found]


def parquet_rows(file: BinaryIO, path: str, row_group: int) -> Iterator[tuple[Candidate, bytes | None]]:
    """Yield every picture of one row group with its bytes; None where the row holds none (a path is not followed)."""
    try:
        table = pq.ParquetFile(file)
        picture, caption = _columns(table.schema_arrow, path)
        row = sum(table.metadata.row_group(group).num_rows for group in range(row_group))
        for batch in table.iter_batches(batch_size=64, row_groups=[row_group], columns=[picture, caption]):
            for value, text in zip(batch[picture].to_pylist(), batch[caption].to_pylist(), strict=True):
                yield _parquet_candidate(path, row, value, text)
                row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} expected to be whole, found row group {row_group} unreadable: {error}") from error


def caption_problem(caption: str | None) -> str:
    """Say why a caption cannot be used; empty when it can."""
    if caption is None:
        return NO_CAPTION
    if not _is_unicode(caption):
        return UNREADABLE_CAPTION
    return "" if caption.strip() else EMPTY_CAPTION


def decode_caption(content: bytes) -> str | None:
    """Return the text of a caption file (UTF-8, with or without a mark), None when it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def place_inside(folder: str, file_name: str) -> str | None:
    """Return `file_name` (relative to `folder`) as a path relative to the source; None when it leaves the source."""
    path = posixpath.normpath(posixpath.join(folder, file_name))
    outside = posixpath.isabs(file_name) or "://" in file_name or path == ".." or path.startswith("../")
    return None if outside else path


def _one_metadata_per_folder(listing: list[Listed]) -> list[str]:
    """Pick each folder's metadata file; where both kinds lie side by side, metadata.jsonl is the one."""
    found: dict[str, str] = {}
    for name in METADATA_NAMES:
        for file in listing:
            if posixpath.basename(file.path) == name and not file.outside:
                found.setdefault(posixpath.dirname(file.path), file.path)
    return sorted(found.values())


def _from_metadata(metadata: list[str], listing: list[Listed], read: Callable[[str], bytes]) -> list[Candidate]:
    files = {file.path: file for file in listing}
    candidates, named = [], set()
    for path in metadata:
        for line, entry in _metadata_entries(path, read(path)):
            candidate = _metadata_candidate(f"{path}:{line}", posixpath.dirname(path), entry, files)
            candidates.append(candidate)
            named.add(candidate.path)
    candidates += [
        Candidate(file.path, file.path, problem=OUTSIDE if file.outside else NO_CAPTION)
        for file in listing
        if file.path not in named and (file.outside or _is_picture(file.path))
    ]
    return candidates


def _metadata_entries(path: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, fields) of a metadata file; InputError names the line that cannot be read."""
    text = decode_caption(content)
    if text is None:
        raise InputError(f"{path} expected to be UTF-8 text, found other bytes; save it as UTF-8")
    if path.endswith(".csv"):
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for fields in rows:
                yield rows.line_num, fields
        except csv.Error as error:
            raise InputError(f"{path} line {rows.line_num} expected comma-separated values, found: {error}") from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} line {number} expected one JSON object, found: {error}") from error
            if not isinstance(entry, dict):
                raise InputError(f"{path} line {number} expected a JSON object, found {line[:80]!r}")
            yield number, entry


def _metadata_candidate(where: str, folder: str, entry: dict[str, Any], files: dict[str, Listed]) -> Candidate:
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise InputError(f"{where} expected file_name, the picture's path, found only {sorted(map(str, entry))}")
    path = place_inside(folder, file_name)
    if path is None:
        return Candidate(file_name, problem=OUTSIDE)
    caption = next((entry[key] for key in CAPTION_KEYS if isinstance(entry.get(key), str)), None)
    linked_away = [file.path for file in files.values() if file.outside] if path not in files else []
    if (path in files and files[path].outside) or any(path.startswith(f"{link}/") for link in linked_away):
        return Candidate(path, path, problem=OUTSIDE)
    problem = MISSING_FILE if path not in files else caption_problem(caption)
    return Candidate(path, path, caption, problem=problem)


def _row_groups(listed: Listed, open_file: Callable[[str], BinaryIO]) -> list[Candidate]:
    path = listed.path
    if listed.outside:
        return [Candidate(path, path, problem=OUTSIDE)]
    try:
        with open_file(path) as file:
            table = pq.ParquetFile(file)
            _columns(table.schema_arrow, path)
            return [Candidate(f"{path}#{group}", path, row_group=group) for group in range(table.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} expected to be a Parquet file, found: {error}") from error


def _columns(schema: pa.Schema, path: str) -> tuple[str, str]:
    """Return the names of the picture and the caption column; InputError lists the columns there are."""
    with_bytes = {field.name for field in schema if _holds_bytes(field.type)}
    picture = next((name for name in PICTURE_KEYS if name in with_bytes), None)
    caption = next((name for name in CAPTION_KEYS if name in schema.names), None)
    if picture is None or caption is None:
        raise InputError(
            f"{path} expected a column {' or '.join(PICTURE_KEYS)} (bytes, or a struct with bytes and path) and a"
            f" column {' or '.join(CAPTION_KEYS)}, found {', '.join(f'{field.name}: {field.type}' for field in schema)}"
        )
    return picture, caption


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parquet_candidate(path: str, row: int, value: Any, text: Any) -> tuple[Candidate, bytes | None]:
    name = f"{path}#{row}"
    caption = text if isinstance(text, str) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    problem = MISSING_FILE if content is None else caption_problem(caption)
    return Candidate(name, path, caption, problem=problem), content


def _from_caption_files(source: str, listing: list[Listed]) -> list[Candidate]:
    texts = {posixpath.splitext(file.path)[0]: file for file in listing if file.path.lower().endswith(".txt")}
    pictures = [file for file in listing if file.outside or _is_picture(file.path)]
    if not pictures:
        raise InputError(f"data.source expected captioned pictures in {source!r}, found none; put in {LAYOUTS_HELP}")
    pairs = [(file, texts.get(posixpath.splitext(file.path)[0])) for file in pictures]
    if all(text is None and not file.outside for file, text in pairs):
        raise InputError(
            f"data.source expected captions, found {len(pictures)} pictures and no caption in {source!r};"
            f" add {LAYOUTS_HELP}"
        )
    return [_beside(file, text) for file, text in pairs if file is not text]


def _beside(picture: Listed, text: Listed | None) -> Candidate:
    if picture.outside or (text is not None and text.outside):
        return Candidate(picture.path, picture.path, problem=OUTSIDE)
    if text is None:
        return Candidate(picture.path, picture.path, problem=NO_CAPTION)
    return Candidate(picture.path, picture.path, caption_path=text.path)


def _is_picture(path: str) -> bool:
    return path.lower().endswith(PICTURE_SUFFIXES)


def _with_printable_name(candidate: Candidate) -> Candidate:
    """Reject a candidate whose file name is not Unicode: neither the manifest nor the card could name it."""
    if _is_unicode(candidate.name + candidate.path + candidate.caption_path):
        return candidate
    name = candidate.name.encode("utf-8", "backslashreplace").decode()
    return Candidate(name, problem=candidate.problem or UNREADABLE_NAME)


def _is_unicode(text: str) -> bool:
    """Say whether UTF-8 can write it: an escaped lone surrogate or a file name in another encoding cannot be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
