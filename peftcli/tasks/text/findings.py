"""Facts about rows of texts (why they are left out, and flags), and the findings of the language tasks.

Imported without numpy, like ``peftcli.data.findings``.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from itertools import pairwise

from peftcli.data.findings import Finding, Kind, Records, by_name
from peftcli.data.rows import listed

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
    HAS_CONTEXT = 32768
    """The row itself contains the context that a teacher alone should see."""


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
    """Return whether a text shows signs of wrong decoding: NUL, replacement characters, or UTF-8 read as Latin-1."""
    return not (text.isascii() and "\0" not in text) and _DAMAGE.search(text) is not None


def has_odd_turns(roles: Sequence[str]) -> bool:
    """Return whether a conversation's turns do not alternate, or do not end with an answer."""
    turns = [role for role in roles if role not in ("system", "developer")]
    twice = any(one == other != "tool" for one, other in pairwise(turns))
    return twice or turns[0] == "assistant" or turns[-1] != "assistant"


_HALF = 0.5

FINDINGS = by_name(
    # A few rows without an answer are common. If most rows are such, the mask or the format is wrong, and
    # the run would learn from the rest.
    Kind(
        "no_trained_tokens",
        "warning",
        "have no trained token and are left out",
        "Check dataset.train_on, dataset.format and max_length.",
        error_above=_HALF,
    ),
    # Teacher and student read the same then, more or less.
    Kind(
        "context_in_row",
        "warning",
        "contain the context that the teacher alone should see",
        "Take it out of the rows, or leave out task.context.",
        error_above=_HALF,
    ),
    # The model learns the beginning of an answer and never its end.
    Kind(
        "answers_cut",
        "warning",
        "lose trained tokens at max_length",
        "Raise max_length, or set overlong: drop (in causal_lm also split).",
        error_above=_HALF,
    ),
    # Never an error: it happens only if the recipe asks for it.
    Kind(
        "rows_dropped_overlong",
        "warning",
        "are longer than max_length and are left out",
        "Raise max_length, or set overlong: truncate (in causal_lm also split).",
    ),
    # A model that is trained on them does not stop. In a few rows it can be intended.
    Kind(
        "end_not_trained",
        "warning",
        "have an answer whose end is not trained: the model does not learn from them where to stop",
        "Set base_model.chat_template to a template that ends its turns with a token, such as chatml. A model that "
        "stops at the next turn's header, such as GLM, needs none: dataset.allow: [end_not_trained].",
        error_above=_HALF,
    ),
    # Of answers to compare: without a prompt column, it is what both of them begin with.
    Kind(
        "no_prompt",
        "warning",
        "are answers without a prompt",
        "Name the column of the prompts, as in dataset: {columns: {prompt: question}}.",
        error_above=_HALF,
    ),
    # Never intended: generation starts with one.
    Kind(
        "double_bos",
        "error",
        "begin with two beginning-of-sequence tokens",
        "Remove the token from the text of the rows: the tokenizer or its template adds it.",
    ),
    Kind(
        "markers_in_text",
        "warning",
        "contain special tokens of the tokenizer in their text",
        "Remove chat markers from the contents: the template writes them.",
    ),
    Kind(
        "odd_turns",
        "warning",
        "have two turns of one role in a row, begin with an answer or end without one",
        "Check whether turns are missing.",
    ),
    # No error: many base models have a template that nobody trained them with.
    Kind(
        "chat_model_without_template",
        "warning",
        "are trained without the chat template that the base model's tokenizer has",
        "Pairs of prompt and completion become turns of the template with dataset: {format: alpaca, columns: "
        "{instruction: prompt, output: completion}}; texts have to be written as messages.",
    ),
    Kind(
        "turns_left_out",
        "warning",
        "contain a text, thinking, a tool call or tools that the chat template leaves out",
        "Check the rows: the model does not see all of their content.",
    ),
    # An answer without the turns that it answers teaches to guess them.
    Kind(
        "turns_not_read",
        "error",
        "have turns of a conversation in a column that is not read",
        "Earlier turns are read as a part of messages, or as history beside instruction and output: "
        "dataset: {format: alpaca, columns: {instruction: prompt, output: response, history: YOUR_COLUMN}}.",
    ),
    Kind(
        "bad_answers_trained",
        "warning",
        "have a label that is false, which is not read: their answers are trained like the good ones",
        "To learn from them as bad answers: task: {type: preference, loss: kto}. To train the good ones alone, remove "
        "these rows.",
    ),
    Kind(
        "pictures_not_read",
        "warning",
        "have a column of pictures, which the task does not read",
        "Remove the rows that need their picture: the model answers from the text alone.",
    ),
    # As with templates whose prompt opens a thinking that answers do not hold, and prompts that end with a blank.
    Kind(
        "prompt_differs",
        "warning",
        "have an answer that begins otherwise than it is asked for",
        "The model is asked with a beginning that it was not trained on, such as <think>: set base_model.chat_template "
        "to a template that asks as it writes. A blank at the end of a prompt, which tokens join to the next word, "
        "belongs before the completion.",
    ),
    Kind(
        "encoding_damage",
        "warning",
        "contain text that was decoded wrongly, such as U+FFFD or 'Ã©'",
        "Recreate the file from its source, as UTF-8.",
    ),
    Kind(
        "rows_truncated",
        "info",
        "are truncated at max_length without losing a trained token",
        "Nothing needs to be done.",
    ),
    Kind(
        "rows_split",
        "info",
        "are split into examples of max_length",
        "Nothing needs to be done.",
    ),
    Kind(
        "pieces_left_out",
        "info",
        "are split, and their pieces without trained tokens are left out",
        "Nothing needs to be done, unless prompts should be trained: dataset.train_on: all.",
    ),
    # The others need the tokens, which only inspect reads.
    Kind(
        "empty_answers",
        "warning",
        "have an answer without text",
        "Remove these rows: they teach the model to say nothing.",
    ),
    Kind(
        "empty_prompts",
        "info",
        "have no prompt: all of their text is trained",
        "Check whether the prompt is in another column: dataset.columns.",
    ),
    Kind(
        "prompts_in_eval",
        "info",
        "have a prompt that is also a training prompt, with another answer",
        "Check whether eval_loss should measure that.",
        warning_above=0.1,
    ),
    Kind(
        "low_trained_share",
        "info",
        "have less than 1 trained token in 100",
        "Check whether the prompts need to be this long.",
        warning_above=_HALF,
    ),
)
"""The names are a promise: recipes allow them, scripts read them."""

_PICTURES = {"image", "images"}
"""Columns that usually hold pictures."""
_OF_FLAGS = {
    "answers_cut": Flag.ANSWER_CUT,
    "end_not_trained": Flag.OPEN,
    "double_bos": Flag.DOUBLE_BOS,
    "markers_in_text": Flag.MARKERS,
    "odd_turns": Flag.ODD_TURNS,
    "turns_left_out": Flag.UNSEEN,
    "encoding_damage": Flag.DAMAGED,
    "prompt_differs": Flag.PROMPT_DIFFERS,
    "rows_split": Flag.SPLIT,
    "pieces_left_out": Flag.PIECES_LEFT_OUT,
    "bad_answers_trained": Flag.BAD_ANSWER,
}


def unread_columns(records: Records) -> str:
    """The end of a message that lists the columns that are not read; empty if all are."""
    unread = {name for part in records.parts for name in part.columns_not_read}
    return f"; columns that are not read: {listed(sorted(unread))}" if unread else ""


def record_findings(records: Records) -> list[Finding]:
    """Return the findings from the outcomes and flags of the rows."""
    cut_off = records.count(records.with_outcome(CUT_OFF))
    more = f" ({cut_off} because all of their trained tokens are beyond max_length)" if cut_off else ""
    truncated = records.with_flag(Flag.TRUNCATED, without=Flag.ANSWER_CUT)
    findings = [
        *records.findings(FINDINGS["no_trained_tokens"], records.with_outcome(NO_TARGET, CUT_OFF), more=more),
        *records.findings(FINDINGS["rows_dropped_overlong"], records.with_outcome(OVERLONG)),
    ]
    findings += records.findings(FINDINGS["pictures_not_read"], records.with_unread(_PICTURES), of_used=True)
    turns, unread = records.with_flag(Flag.DROPS_TURNS), unread_columns(records)
    findings += records.findings(FINDINGS["turns_not_read"], turns, more=unread, of_used=True)
    for name, flag in _OF_FLAGS.items():
        findings += records.findings(FINDINGS[name], records.with_flag(flag), of_used=True)
    return findings + records.findings(FINDINGS["rows_truncated"], truncated, of_used=True)
