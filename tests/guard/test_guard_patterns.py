"""Regular expressions that anybody may have written: they mean what they mean to Python, and none takes long."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.errors import AdapterError
from peftcli.guard import patterns
from peftcli.guard.patterns import Pattern, check_patterns, ends_with

BOMBS = [
    r"(a*)*b",
    r"(.*)*x",
    r"(.+)+x",
    r"(a|a)*b",
    r"(a|aa)+$b",
    r"(((((.*)*)*)*)*)*x",
    r"(.*a){20}x",
    r"(\w+\.?)+!",
    r"^(([a-z_.])+.)+[A-Z]([a-z])+$",
    ".*" * 500 + "x",
    "(x+x+)+y",
    r"(?:(?:(?:a?){30}){30}){30}b",
    r"(?!(.*)*z)(.*)*y",
    "(" * 90 + ".*" + ")*" * 90 + "x",
]
LONG = "model.layers.0.self_attn." + "a" * 60


@pytest.mark.parametrize("pattern", BOMBS)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.thread_time()
    with suppress(AdapterError):
        assert not Pattern(pattern).fullmatch(LONG)
    assert time.thread_time() - start < 5


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is not a regular expression: "),
        ("a" * 3000, "a pattern of 3000 characters; at most 2000"),
        ("(?:ab){10001}", "repeats its parts too often"),
        (r"(?:(?:a{100}){100}){100}", "repeats its parts too often"),
        (r"q_proj{e<=1}", "contains '{e<=1}', which is not supported"),
        (r"[a[:alpha:]]", "contains '[:alpha:]', which is not supported"),
        (r"\p{L}+", "is not a regular expression: "),
        (r"(?|(a)|(b))", "is not a regular expression: "),
        (r"(?R)?a", "is not a regular expression: "),
        (r"\L<names>", "is not a regular expression: "),
        (r"(?V1)[a--b]", "is not a regular expression: "),
        ("(?=" * 300 + "a" + ")" * 300, "is not a regular expression: "),
        (r"(?<=a*)b", "is not a regular expression: "),
        ("(?a)(?u)q", "is not a regular expression: ASCII and UNICODE flags are incompatible"),
    ],
)
def test_what_is_no_pattern_is_said(pattern: str, said: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(said)):
        Pattern(pattern).fullmatch("aa")


USUAL = [
    r".*\.layers\.\d+\.(self_attn|mlp)\.(q|v|up)_proj",
    r"^(?!.*(vision|audio)).*\.(q_proj|v_proj)$",
    r".*\.layers\.(1[0-9]|2[0-3])\.self_attn\.[qkvo]_proj",
    r"(model\.layers\.[0-3]\..*q_proj)|(.*\.lm_head)",
    r"(?i).*Q_PROJ",
    r"(?P<a>.*)\.mlp\..*",
    r".*(?<!language_model\.)model.*up_proj\b",
    r"[^.]*\.[^.]*\.\d{1,2}\..+?_proj",
    r".*?(?:k|v)_proj(?#a comment)",
    r"\S+\.q_proj\Z",
]
NAMES = [
    f"{prefix}model.layers.{layer}.{inner}"
    for prefix in ("", "language_model.", "vision.")
    for layer in (0, 3, 12, 23)
    for inner in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp", "lm_head")
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_mean_what_they_mean_to_python(pattern: str) -> None:
    found = [name for name in NAMES if Pattern(pattern).fullmatch(name)]
    assert found == [name for name in NAMES if re.fullmatch(pattern, name)]
    assert found
    assert len(found) < len(NAMES)


_ONE = st.sampled_from(
    ["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\W", r"\d", "[a.0-3]", r"\b", "^", "$", "_", r"\B"]
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{2,}", "{,2}", "+?", "{0}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, repeats).map(lambda two: f"(?:{two[0]}){two[1]}"),
        inner.map(lambda one: f"(?={one})"),
        inner.map(lambda one: f"(?!{one})"),
        inner.map(lambda one: f"(?i:{one})"),
        inner.map(lambda one: f"({one})*b"),
    )


@given(st.recursive(_ONE, _larger, max_leaves=8), st.text("abAB._1", min_size=1, max_size=6))
@settings(max_examples=300, derandomize=True, database=None)
def test_any_pattern_means_what_it_means_to_python(pattern: str, text: str) -> None:
    assert Pattern(pattern).fullmatch(text) == bool(re.fullmatch(pattern, text))


_WORDS = st.lists(st.sampled_from(["a", "b", "ab", "_", ".", "a.b", "1"]), min_size=1, max_size=5).map("".join)


@given(_WORDS, st.text("ab_.1", min_size=1, max_size=9))
@settings(max_examples=500, derandomize=True, database=None)
def test_a_plain_name_means_what_it_means_as_a_pattern(name: str, text: str) -> None:
    assert ends_with(text, name) == bool(re.fullmatch(rf"(.*\.)?({name})", text))


SLOW = r"(?:(?:(?:.?){15}){15}){15}_"


def test_all_names_share_the_time_of_a_pattern() -> None:
    pattern = Pattern(SLOW)
    pattern.clock.left = 0.3
    start = time.thread_time()
    with pytest.raises(AdapterError, match="takes too long to match; write it more simply"):
        all(not pattern.fullmatch(f"model.layers.{number}.self_attn.q_proj") for number in range(1000))
    assert time.thread_time() - start < 1


def test_all_patterns_of_a_setting_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)
    slow = [f"{number}{SLOW}" for number in range(3)]
    start = time.thread_time()
    check_patterns(slow)
    for pattern in slow:
        with pytest.raises(AdapterError, match="takes too long"):
            ends_with(f"{pattern[0]}{LONG}", pattern)
    assert time.thread_time() - start < 1
    check_patterns(slow)
    assert patterns._ending(slow[0]).clock.left == 0.3


def test_a_usual_pattern_has_time_for_many_names() -> None:
    pattern = Pattern(r"([a-z]+\.?)*_proj")
    assert not any(pattern.fullmatch(f"model.layers.self_attn.q{number % 10}_proj") for number in range(3000))


def test_many_patterns_are_refused_before_they_are_tried() -> None:
    check_patterns([f"model.layers.{number}.q_proj" for number in range(100_000)])
    check_patterns([rf"layers\.{number}\..*_proj" for number in range(1000)])
    with pytest.raises(AdapterError, match="take too long to match"):
        check_patterns([rf"layers\.{number}\..*_proj.*" for number in range(20_000)])
