"""What is known of a row besides its token ids: why it is left out, and flags."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from itertools import pairwise

OVERLONG = "longer than max_length"
CUT_OFF = "no trained token within max_length"
NO_TARGET = "no trained token"


class Flag(enum.IntFlag):
    """Facts about a row that its token ids alone do not show."""

    OPEN = 1
    """A trained answer has no end-of-turn token, or no EOS where that ends it."""
    DOUBLE_BOS = 2
    """The ids begin with two beginning-of-sequence tokens."""
    MARKERS = 4
    """Special tokens are written in the contents of a conversation, to which the chat template adds its own."""
    ODD_TURNS = 8
    """Two user or two assistant turns in a row, an assistant turn first, or no assistant turn last."""
    DAMAGED = 16
    """The texts show encoding damage."""
    TRUNCATED = 32
    """Tokens were cut to fit the length."""
    ANSWER_CUT = 64
    """Trained tokens were cut to fit the length."""
    SPLIT = 128
    """The row was cut into several examples."""
    UNSEEN = 256
    """The chat template leaves out the text of a turn, the last answer's thinking, a tool call, or the tools."""
    PIECES_LEFT_OUT = 512
    """The row was split, and pieces without a trained token are left out."""
    PROMPT_DIFFERS = 1024
    """A trained answer begins after another text than the one with which the chat template asks for an answer, or after
    other tokens than those of its prompt alone."""
    NO_PROMPT = 2048
    """The text before a completion is empty, or no turn but the system's comes before an answer to compare."""
    DROPS_TURNS = 4096
    """A column that is not read holds turns of a conversation."""
    BAD_ANSWER = 8192
    """A column that is not read says that the answer is a bad one."""
    RAW = 16384
    """A text, or a prompt and its completion, has none of the tokens that the tokenizer's chat template writes."""


NONE = Flag(0)

# UTF-8 read as Windows-1252. The first byte of a character is followed by one of these, or by quotation marks and
# dashes, which may also follow a letter legitimately.
_NEXT = (
    "\xa0-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2020-\u2022"
    "\u201a\u201e\u2030\u2039\u203a\u20ac\u2122"
)
_QUOTES = "\u2013\u2014\u2018\u2019\u201c\u201d\u2026"
_DAMAGE = re.compile(
    "|".join(
        [
            "[\ufffd\0]",
            "[\x80-\x9f]",  # C1 control characters: UTF-8 read as Latin-1
            rf"[\xc2\xc3](?:[{_NEXT}]|[{_QUOTES}](?=\w))",  # accented Latin letters
            "(?<=[a-z.,;:!?)])\xc2 ",  # a no-break space, of which a clean-up left a space
            rf"(?<=[a-z])[\xc4-\xd6\xd8-\xde][{_NEXT}{_QUOTES}]",  # a capital in a word
            rf"(?:[\xc4\xc5\xce-\xd1\xd7-\xdb][{_NEXT}{_QUOTES}]){{2}}",  # Greek, Cyrillic, Hebrew, Arabic
            rf"\xe2[\u20ac\u201a\u201e\u2020\u02c6\u2030][{_NEXT}{_QUOTES}]",  # quotation marks, dashes, arrows
            rf"(?:[\xe0-\xef][{_NEXT}{_QUOTES}]{{2}}){{2}}",  # Indian and East Asian scripts
            "\xf0\u0178",  # emoji
            "\xef(?:\xbf\xbd|\xbb\xbf)",  # U+FFFD and the byte order mark
        ]
    )
)


def is_damaged(text: str) -> bool:
    """Whether a text shows signs of wrong decoding: NUL, replacement characters, or UTF-8 read as Latin-1."""
    return not (text.isascii() and "\0" not in text) and _DAMAGE.search(text) is not None


def has_odd_turns(roles: Sequence[str]) -> bool:
    """Whether a conversation's turns do not alternate, or do not end with an answer."""
    turns = [role for role in roles if role not in ("system", "developer")]
    twice = any(one == other != "tool" for one, other in pairwise(turns))
    return twice or turns[0] == "assistant" or turns[-1] != "assistant"
