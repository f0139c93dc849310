"""Terms are found in every disguise that we thought of, and innocent texts pass."""

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.blocklist import Blocklist, normalise, read_blocklist
from components.errors import InputError

LIST = Blocklist(
    [("violence", "kill"), ("violence", "blow up"), ("names", "Müller"), ("other", "爆弾"), ("other", "god")]
)


@pytest.mark.parametrize(
    "text",
    [
        *("kill", "KILL", "a man who wants to kill!", "kill@home", "(kill)", "'kill'", "do.kill.it", "kill_it"),
        *("ｋｉｌｌ", "𝓴𝓲𝓵𝓵", "Ⓚⓘⓛⓛ", "kíll", "k\u0336i\u0336l\u0336l\u0336", "ki\u200bll", "k\u00adill"),
        *("кill", "kіll", "κill", "k1ll", "ki11", "say k1ll"),
        *("k i l l", "k.i.l.l", "k-i-l-l", "k_i_l_l", "k  i\nl\tl", "k i l l a cat", "say k i l l", "k 1 l l"),
        *("ki-ll", "k.ill", "ki_ll", "kiiiill", "killlll", "kkkkill", "k i i i l l"),
        *("blow up", "Blow  UP", "blow-up", "blow\nup", "b l o w u p", "bl0w up", "blooow up"),
        *("müller", "Muller", "MU\u0308LLER", "ein 爆弾だ", "爆 弾"),
    ],
)
def test_disguised_term_is_found(text: str) -> None:
    assert LIST.category_of(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        *("skill", "killer whale", "kiln", "kil", "k ill", "blow it up", "up blow", "blow", "good", "goods", ""),
        *("a red circle on a blue background", "1000 stars", "11 circles at 10:30", "$5 and 3@2", "mull", "爆", "!"),
        *("a b c", "x y z", "I l l", "god-speed you", "5 k i t e s"),
    ],
)
def test_innocent_text_passes(text: str) -> None:
    allowed = {"god-speed you"}  # "god" stands there as a word
    assert (LIST.category_of(text) is None) != (text in allowed)


@pytest.mark.parametrize(
    ("term", "says", "innocent"),
    [
        ("ばか", ("ばか", "お前はばかだ", "は\u3099か", "は\u0336\u3099か", "ば か"), ("はかた", "はかり", "ぱか")),
        ("バカ", ("ﾊﾞｶ", "バ\u200bカ"), ("ハカ", "パカ")),
        ("قتل", ("قتل", "قَتَل", "لا قتل!", "ق ت ل"), ("مقتلة", "قتلت")),
        ("הרג", ("הרג", "הָרַג", "(הרג)"), ("הרגל",)),
        ("हत्या", ("हत्या", "एक हत्या।"), ("हत्यारा", "हतया", "हत्य")),
        ("ระเบิด", ("ระเบิด", "มีระเบิดที่นี่"), ("ระเบยด",)),
        ("폭탄", ("폭탄을", "큰 폭탄"), ("폭포",)),
        ("kill", ("ki\u3099ll", "k\u0941ill", "k\u093eill"), ("skill",)),
    ],
)
def test_every_script_has_the_borders_and_marks_that_it_is_written_with(
    term: str, says: tuple[str, ...], innocent: tuple[str, ...]
) -> None:
    words = Blocklist([("x", term)])
    assert [text for text in says if words.category_of(text) is None] == []
    assert [text for text in innocent if words.category_of(text) is not None] == []


def test_category_is_that_of_the_term() -> None:
    assert [LIST.category_of(text) for text in ("kill", "mueller muller", "爆弾", "nothing")] == [
        *("violence", "names", "other"),
        None,
    ]


def test_file_has_categories_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# ours\nfirst # why\n\n[weapons]\nbig gun\n[ more things ]\n!!!\nlast\n", encoding="utf-8")
    words = read_blocklist(path)
    found = [words.category_of(text) for text in ("first", "BIG-GUN", "last", "ours", "weapons", "why")]
    assert found == ["blocklist", "weapons", "more things", None, None, None]
    with pytest.raises(InputError, match=r"serve\.blocklist_file expected UTF-8 text"):
        read_blocklist(tmp_path / "none")
    path.write_text("[weapons]\ncannon\n", encoding="utf-8-sig")
    assert [read_blocklist(path).category_of(text) for text in ("cannon", "weapons")] == ["weapons", None]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="expected UTF-8"):
        read_blocklist(path)


@given(st.text(max_size=200))
def test_any_text_is_judged_and_normalising_twice_changes_nothing(text: str) -> None:
    LIST.category_of(text)
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet="abcdefghij", min_size=1, max_size=8), st.text(max_size=30), st.text(max_size=30))
def test_term_with_spaces_around_is_always_found(term: str, before: str, after: str) -> None:
    assert Blocklist([("x", term)]).category_of(f"{before} {term} {after}") == "x"


def test_long_text_of_single_letters_is_judged_quickly() -> None:
    words = Blocklist([("x", "ab" * 30 + "c"), ("x", "ab " * 20 + "d"), *(("x", f"aa{i}") for i in range(300))])
    start = time.process_time()
    assert words.category_of("a b " * 500) is None and words.category_of("a" * 2000) is None
    # 30 ms when it was written; a search of all windows took seconds.
    assert time.process_time() - start < 1


def test_long_list_is_gone_through_a_few_times_whatever_the_text() -> None:
    """400 single letters, each a group of its own: the list must not be searched for each of them."""
    words = Blocklist([("x", f"term{index}") for index in range(1000)])
    searches = 0

    def count(frame: object, event: str, called: object) -> None:
        nonlocal searches
        searches += event == "c_call" and getattr(called, "__name__", "") == "find"

    sys.setprofile(count)
    try:
        found = [words.category_of(text) for text in ("a bb " * 400, "a b c dd " * 250)]
    finally:
        sys.setprofile(None)
    assert found == [None, None] and searches < 10 * 1000
