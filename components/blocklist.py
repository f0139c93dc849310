"""Does a prompt say something from a list of words and phrases, however it is spelled?

Compared are whole words after Unicode normalisation (NFKC, case folded, accents and invisible characters dropped) and
the mapping of look-alike letters. Seen through are digits and signs for letters, letters spelled apart, punctuation
inside words, and letters drawn out. Words of other meaning that hold a term ("Scunthorpe") pass, except in scripts that
put no spaces between words. A list is a fence, not a wall: meaning is the classifier's business. Normal forms: Unicode
Standard Annex 15; look-alikes: UTS 39.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from components.errors import InputError

USUAL_CATEGORY = "blocklist"
DRAWN_OUT = 3
"""From so many equal letters on, more of them mean nothing: "good" is not "god", "goooood" may be either."""
FEWEST_SPELLED = 3
"""Letters apart are read as one word from this length on: "a b" is two words."""
_CYRILLIC = dict(zip("авекмнорстухіјѕԁһ", "abekmhopctyxijsdh", strict=True))
_GREEK = dict(zip("αβεηικμνορτυχ", "abenikmvoptux", strict=True))
LOOK_ALIKES = str.maketrans(_CYRILLIC | _GREEK | {"ı": "i", "ø": "o", "ł": "l", "ß": "ss"})
DIGITS = {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "@": "a", "$": "s"}
LEET = tuple(str.maketrans({**DIGITS, "1": one}) for one in "il")
"""A 1 stands for i or l: both are tried."""
VOICING = "\u3099\u309a"
"""Marks that make other letters of kana: ha, ba, pa."""
VOWEL_SCRIPTS = range(0x0900, 0x1800)
"""From Devanagari over Thai and Myanmar to Khmer: marks are their vowels there, elsewhere they are accents."""
_VOWELS = "".join(mark for mark in map(chr, VOWEL_SCRIPTS) if unicodedata.category(mark) in ("Mn", "Mc"))
_LETTER = rf"[^\W_]|[{_VOWELS}]"
WORD = re.compile(rf"(?:{_LETTER})+")
INSIDE_WORD = re.compile(rf"(?<={_LETTER})(?:[^\w\s{_VOWELS}]|_)+(?={_LETTER})")
WITHOUT_BORDERS = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Tibetan, Myanmar, Khmer, kana and Han have no spaces between words; Hangul hangs particles onto them."""
SIGN_FOR_LETTER = re.compile(r"\b\w*(?:[^\W\d_][0-9@$]|[0-9@$][^\W\d_])[\w@$]*|[@$][^\W\d_][\w@$]*")
CATEGORY = re.compile(r"\[(.+)\]")

Runs = tuple[tuple[str, int], ...]
"""A word as letters with how often each stands in a row."""


@dataclass(frozen=True)
class _Term:
    category: str
    words: tuple[Runs, ...]


class Blocklist:
    """Terms by category; `category_of` says which one a text falls into."""

    def __init__(self, terms: Iterable[tuple[str, str]]) -> None:
        """Take (category, word or phrase) pairs."""
        self._phrases: dict[tuple[str, ...], list[_Term]] = defaultdict(list)
        self._spelled: list[tuple[str, _Term]] = []
        self._inside: list[tuple[str, str]] = []
        self._lengths: set[int] = set()
        """Of the phrases, in words."""
        for category, text in terms:
            self._add(category, normalise(text))

    def _add(self, category: str, text: str) -> None:
        words = WORD.findall(text)
        if not words:
            return
        if WITHOUT_BORDERS.search(text):
            self._inside.append((category, "".join(words)))
            return
        term = _Term(category, tuple(_runs(word) for word in words))
        self._phrases[tuple(_skeleton(runs) for runs in term.words)].append(term)
        joined = _runs("".join(words))
        if len("".join(words)) >= FEWEST_SPELLED:
            self._spelled.append((_skeleton(joined), _Term(category, (joined,))))
        self._lengths.add(len(words))

    def category_of(self, text: str) -> str | None:
        """Return the category of the first term found, None when there is none."""
        for variant in _variants(normalise(text)):
            words = WORD.findall(variant)
            found = self._phrase_in(words) or self._spelled_in(words) or self._inside_of("".join(words))
            if found:
                return found
        return None

    def _phrase_in(self, words: list[str]) -> str | None:
        runs = [_runs(word) for word in words]
        skeletons = [_skeleton(word) for word in runs]
        for start in range(len(words)):
            for end in (start + length for length in self._lengths):
                for term in self._phrases.get(tuple(skeletons[start:end]), ()):
                    if all(_says(word, wanted) for word, wanted in zip(runs[start:end], term.words, strict=True)):
                        return term.category
        return None

    def _spelled_in(self, words: list[str]) -> str | None:
        """Look for terms among letters that stand apart, at any place: what follows may be one letter too."""
        groups = ("".join(group) for single, group in groupby(words, key=lambda word: len(word) == 1) if single)
        # In one text, so that a long list is gone through once and not for every group; no term holds a space.
        letters = " ".join(group for group in groups if len(group) >= FEWEST_SPELLED)
        for spelled in dict.fromkeys([letters, *(letters.translate(table) for table in LEET)]):
            found = self._within_letters(spelled) if spelled else None
            if found:
                return found
        return None

    def _within_letters(self, letters: str) -> str | None:
        runs = _runs(letters)
        skeleton = _skeleton(runs)
        for wanted_skeleton, term in self._spelled:
            at = skeleton.find(wanted_skeleton)
            while at >= 0:
                if _holds(runs[at : at + len(wanted_skeleton)], term.words[0]):
                    return term.category
                at = skeleton.find(wanted_skeleton, at + 1)
        return None

    def _inside_of(self, text: str) -> str | None:
        return next((category for category, term in self._inside if term in text), None)


def read_blocklist(path: Path) -> Blocklist:
    """Read a file: a term a line, `#` begins a comment, `[NAME]` begins a category."""
    try:
        # Editors on Windows begin a file with a mark that is no part of its first line.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"serve.blocklist_file expected UTF-8 text, found {path}: {error}") from error
    category, terms = USUAL_CATEGORY, []
    for line in lines:
        text = line.partition("#")[0].strip()
        heading = CATEGORY.fullmatch(text)
        if heading:
            category = heading.group(1).strip()
        elif text:
            terms.append((category, text))
    return Blocklist(terms)


def normalise(text: str) -> str:
    """Return the text as it is compared: one form for each letter, however it was encoded, cased or accented."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept: list[str] = []
    for letter in decomposed:
        if unicodedata.category(letter) not in ("Mn", "Mc", "Me", "Cf") or _changes_letter(kept[-1:], letter):
            kept.append(letter)
    return unicodedata.normalize("NFC", "".join(kept)).translate(LOOK_ALIKES)


def _changes_letter(before: list[str], mark: str) -> bool:
    """Whether a mark makes another letter, or is one, where it stands; an accent, or a disguise, does not."""
    if mark in VOICING:
        return len(unicodedata.normalize("NFC", "".join(before) + mark)) == 1 and bool(before)
    return mark in _VOWELS and any(ord(letter) in VOWEL_SCRIPTS for letter in before)


def _variants(text: str) -> Iterator[str]:
    """Yield what a text may mean to say: as written, with punctuation inside words dropped, with signs as letters."""
    for variant in dict.fromkeys([text, *(_as_letters(text, table) for table in LEET)]):
        yield variant
        yield INSIDE_WORD.sub("", variant)


def _as_letters(text: str, table: dict[int, str]) -> str:
    return SIGN_FOR_LETTER.sub(lambda word: word.group().translate(table), text)


def _runs(word: str) -> Runs:
    return tuple((letter, len(list(group))) for letter, group in groupby(word))


def _skeleton(runs: Runs) -> str:
    return "".join(letter for letter, _ in runs)


def _says(word: Runs, wanted: Runs) -> bool:
    """Whether a word of the same skeleton is the wanted one, letters perhaps drawn out."""
    pairs = zip(word, wanted, strict=True)
    return all(found == asked or found >= max(asked, DRAWN_OUT) for (_, found), (_, asked) in pairs)


def _holds(letters: Runs, wanted: Runs) -> bool:
    """Whether the wanted word stands among letters spelled apart, which may go on before and after it."""
    (_, first), (_, last) = letters[0], letters[-1]
    return first >= wanted[0][1] and last >= wanted[-1][1] and _says(letters[1:-1], wanted[1:-1])
