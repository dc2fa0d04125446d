from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from examplekit import COLUMNS, outcome

from peftcli.data.findings import Finding, Records, find_in_records, refuse
from peftcli.data.rows import Place
from peftcli.data.store import Outcome, Selection, Store, Writer
from peftcli.errors import DataError
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.text.findings import CUT_OFF, NO_TARGET, OVERLONG, Flag, record_findings

Row = Outcome | DataError


def used(flags: int = 0, **more: int) -> Outcome:
    return outcome([{"input_ids": [1, 2], "labels": [-100, 2]}], [1], tokens=2, flags=flags, **more)


def left_out(reason: str) -> Outcome:
    return Outcome(reason=reason, size=9)


def from_records(parts: Sequence[Selection], *, split: str = "train", skip_bad_rows: bool = False) -> list[Finding]:
    return find_in_records(Records(parts, split), record_findings, skip_bad_rows=skip_bad_rows)


BAD = DataError("is empty", file="a.jsonl", line=3)


@pytest.fixture
def part(tmp_path: Path):
    """A store of these rows, on the lines 1, 2, ... of a file."""

    def part(
        rows: Sequence[Row], file: str = "a.jsonl", *, lines: bool = True, chosen: list[int] | None = None
    ) -> Selection:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with Writer(folder, COLUMNS) as writer:
            writer.add([Place(file, at + 1, at + 1 if lines else None) for at in range(len(rows))], rows)
            writer.finish()
        return Selection(Store(folder), None if chosen is None else np.array(chosen))

    return part


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_names_and_levels_are_a_promise() -> None:
    assert {name: (kind.level, kind.can_stop) for name, kind in FINDINGS.items()} == {
        "bad_rows": ("error", True),
        "no_trained_tokens": ("warning", True),
        "answers_cut": ("warning", True),
        "rows_dropped_overlong": ("warning", False),
        "end_not_trained": ("warning", True),
        "no_prompt": ("warning", True),
        "double_bos": ("error", True),
        "markers_in_text": ("warning", False),
        "odd_turns": ("warning", False),
        "chat_model_without_template": ("warning", False),
        "turns_left_out": ("warning", False),
        "turns_not_read": ("error", True),
        "bad_answers_trained": ("warning", False),
        "pictures_not_read": ("warning", False),
        "encoding_damage": ("warning", False),
        "rows_truncated": ("info", False),
        "rows_split": ("info", False),
        "pieces_left_out": ("info", False),
        "prompt_differs": ("warning", False),
        "empty_answers": ("warning", False),
        "empty_prompts": ("info", False),
        "exact_duplicates": ("info", False),
        "near_duplicates": ("info", False),
        "labels_differ": ("warning", False),
        "train_in_eval": ("warning", False),
        "prompts_in_eval": ("info", False),
        "low_trained_share": ("info", False),
        "unbalanced_classes": ("warning", False),
        "looks_mislabelled": ("warning", False),
        "hurts_evaluation": ("info", False),
        "without_influence": ("info", False),
        "missing_classes": ("warning", False),
        "joined_labels": ("warning", False),
        "rows_not_accepted": ("warning", False),
        "converted_tags": ("warning", False),
        "parts_of_words": ("warning", False),
        "several_places": ("warning", False),
        "binary_masks": ("warning", True),
        "clips_too_long": ("warning", True),
        "silent_clips": ("warning", True),
        "clips_without_sound": ("warning", False),
        "nothing_to_mask": ("warning", True),
        "unknown_tokens": ("warning", True),
        "choice_twice": ("warning", False),
        "unbalanced_masks": ("warning", False),
        "small_pictures": ("warning", False),
        "no_caption": ("warning", True),
        "captions_cut": ("warning", False),
        "positive_is_anchor": ("warning", False),
        "negative_is_positive": ("warning", False),
        "pairs_with_label": ("warning", False),
        "positive_is_negative": ("warning", False),
        "documents_contradict": ("warning", False),
        "constant_reward": ("warning", False),
        "context_in_row": ("warning", True),
        "repeated_texts": ("info", False),
        "anchors_in_eval": ("info", False),
        "boxes_are_corners": ("error", True),
        "pictures_too_long": ("warning", True),
        "answers_differ": ("info", False),
        "no_picture": ("info", False),
    }


def test_the_names_are_known_without_numpy() -> None:
    code = "import sys, peftcli.tasks.findings; print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("bad_rows", BAD),
        ("no_trained_tokens", left_out(NO_TARGET)),
        ("no_trained_tokens", left_out(CUT_OFF)),
        ("rows_dropped_overlong", left_out(OVERLONG)),
        ("answers_cut", used(Flag.TRUNCATED | Flag.ANSWER_CUT, lost=3)),
        ("rows_truncated", used(Flag.TRUNCATED)),
        ("end_not_trained", used(Flag.OPEN)),
        ("double_bos", used(Flag.DOUBLE_BOS)),
        ("markers_in_text", used(Flag.MARKERS)),
        ("odd_turns", used(Flag.ODD_TURNS)),
        ("turns_left_out", used(Flag.UNSEEN)),
        ("encoding_damage", used(Flag.DAMAGED)),
        ("rows_split", used(Flag.SPLIT)),
        ("pieces_left_out", used(Flag.PIECES_LEFT_OUT)),
    ],
)
def test_each_kind_of_row_has_its_finding(part, name: str, row: Row) -> None:
    found = only(from_records([part([used(), row, used(), used(), row, used()])]))
    assert (found.name, found.count, found.rows, found.level) == (
        name,
        2,
        ["a.jsonl:2", "a.jsonl:5"],
        FINDINGS[name].level,
    )


def test_the_message_says_how_many_of_how_many(part) -> None:
    assert only(from_records([part([used(Flag.ODD_TURNS), used(), BAD, BAD])])[1:]).message.startswith("1 of 2 rows ")
    cut = only(from_records([part([left_out(CUT_OFF), left_out(NO_TARGET), *[used()] * 9])]))
    assert cut.message.startswith("2 of 11 rows have no trained token")
    assert "(1 because all of their trained tokens are beyond max_length)" in cut.message


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("no_trained_tokens", left_out(NO_TARGET)),
        ("answers_cut", used(Flag.TRUNCATED | Flag.ANSWER_CUT)),
        ("end_not_trained", used(Flag.OPEN)),
    ],
)
def test_more_than_half_of_the_rows_is_an_error(part, name: str, row: Row) -> None:
    half, more = from_records([part([row, used()])]), from_records([part([row, row, used()])])
    assert (only(half).name, only(half).level) == (name, "warning")
    assert (only(more).name, only(more).level) == (name, "error")
    assert only(from_records([part([row])], split="eval")).level == "warning"


def test_bad_rows_stop_unless_the_recipe_skips_them(part) -> None:
    for split in ("train", "eval"):
        assert only(from_records([part([BAD])], split=split)).level == "error"
        assert only(from_records([part([BAD])], split=split, skip_bad_rows=True)).level == "warning"


def test_ten_places_are_named_the_worst_first_over_all_parts(part) -> None:
    odd = [used(Flag.ODD_TURNS), used()]
    parts = [part(odd * 8), part([used(Flag.DOUBLE_BOS), *odd * 3], "b.jsonl", lines=False)]
    first, second = from_records(parts)
    assert (first.name, first.rows) == ("double_bos", ["b.jsonl row 1"])
    assert second.count == 11
    assert second.rows == [*(f"a.jsonl:{line}" for line in range(1, 16, 2)), "b.jsonl row 2", "b.jsonl row 4"]


def test_only_the_chosen_rows_count(part) -> None:
    rows = [used(Flag.ODD_TURNS), BAD, used(Flag.ODD_TURNS), used()]
    found = only(from_records([part(rows, chosen=[2, 3])]))
    assert (found.count, found.rows, found.message[:11]) == (1, ["a.jsonl:3"], "1 of 2 rows")
    assert from_records([part(rows, chosen=[3])]) == []


def test_an_error_stops_unless_it_is_allowed_by_name(part) -> None:
    findings = from_records([part([used(Flag.DOUBLE_BOS | Flag.OPEN | Flag.ODD_TURNS)])])
    with pytest.raises(DataError) as error:
        refuse(findings, [])
    text = str(error.value)
    assert "double_bos: 1 of 1 rows begin with two" in text
    assert "(a.jsonl:1)" in text
    assert "dataset.allow: [double_bos, end_not_trained]" in text
    assert "peftcli inspect" in text
    assert "odd_turns" not in text
    with pytest.raises(DataError, match=r"allow: \[end_not_trained\]"):
        refuse(findings, ["double_bos"])
    refuse(findings, ["double_bos", "end_not_trained"])


def test_bad_rows_cannot_be_allowed(part) -> None:
    with pytest.raises(DataError, match="bad_rows") as error:
        refuse(from_records([part([BAD])]), ["bad_rows"])
    assert "dataset.allow" not in str(error.value)
    assert "on_bad_row: skip" in str(error.value)


def test_many_errors_take_six_lines(part) -> None:
    rows: list[Row] = [BAD] + [left_out(NO_TARGET)] * 9 + [used(Flag.DOUBLE_BOS | Flag.OPEN | Flag.ANSWER_CUT)]
    with pytest.raises(DataError) as error:
        refuse(from_records([part(rows)]), [])
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert lines[3].endswith("; and 2 more")
