"""The findings of the language tasks.

Imported without numpy, like ``peftcli.data.findings``.
"""

from __future__ import annotations

from peftcli.data.findings import Finding, Kind, Records, by_name
from peftcli.data.rows import listed
from peftcli.tasks.text.flags import CUT_OFF, NO_TARGET, OVERLONG, Flag

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
