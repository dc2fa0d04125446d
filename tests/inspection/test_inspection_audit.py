from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from examplekit import COLUMNS, outcome
from transformers import T5Config

from peftcli.data import duplicates, used_rows
from peftcli.data.duplicates import Sketches, common_shingles, repeats, spread
from peftcli.data.rows import Place
from peftcli.data.store import Outcome, Selection, Store, View, Writer
from peftcli.data.used_rows import Ragged
from peftcli.errors import DataError
from peftcli.inspection.audit import Audit, audit, histogram, leaks
from peftcli.tasks import settings
from peftcli.tasks.causal_lm import CausalLM
from peftcli.tasks.seq2seq_lm import Seq2SeqLM
from peftcli.tasks.text.findings import NO_TARGET, Flag

IGNORED = -100
Ids = list[int]


@pytest.fixture
def causal(tokenizers) -> CausalLM:
    return CausalLM(settings.CausalLMSettings(), tokenizers("smollm"), base=None)


@pytest.fixture
def seq2seq(tokenizers) -> Seq2SeqLM:
    return Seq2SeqLM(settings.Seq2SeqLMSettings(), tokenizers("smollm"), base=SimpleNamespace(config=T5Config()))


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., Selection]:
    """A store of rows: outcomes, errors, or pairs of prompt and answer."""

    def part(rows: Sequence[Any], file: str = "a.jsonl", chosen: list[int] | None = None) -> Selection:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        outcomes = [used(*row) if isinstance(row, tuple) else row for row in rows]
        with Writer(folder, COLUMNS) as writer:
            for start in range(0, len(rows), 3):
                places = [Place(file, at + 1, at + 1) for at in range(start, min(start + 3, len(rows)))]
                writer.add(places, outcomes[start : start + 3])
            writer.finish()
        return Selection(Store(folder), None if chosen is None else np.array(chosen))

    return part


def feature(prompt: Ids, answer: Ids) -> dict[str, Ids]:
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def used(prompt: Ids, answer: Ids, **more: Any) -> Outcome:
    return outcome([feature(prompt, answer)], [len(answer)], tokens=len(prompt) + len(answer), **more)


def pair(source: Ids, target: Ids) -> Outcome:
    """A row of an encoder-decoder."""
    return outcome([{"input_ids": source, "labels": target}], [len(target)], tokens=len(source) + len(target))


def named(found: Audit) -> dict[str, list[str]]:
    return {finding.name: finding.rows for finding in found.findings}


def some(rng: random.Random, count: int) -> Ids:
    """Ids of tokens that are text."""
    return [rng.randrange(30, 250) for _ in range(count)]


# --- the facts ------------------------------------------------------------------------------------------------------


def test_the_facts_are_those_of_the_rows(part, causal) -> None:
    error = DataError("is empty", file="a.jsonl", line=3, key="messages")
    cut = used([40] * 5, [50] * 5, flags=Flag.TRUNCATED | Flag.ANSWER_CUT, lost=7)
    cut.size = 30
    rows = [([40] * 6, [50] * 2), cut, error, Outcome(reason=NO_TARGET, size=4), ([40] * 2, [50, 3])]
    facts = audit(View([part(rows)]), causal).facts
    counts = {"rows": 5, "used": 3, "examples": 3, "tokens": 22, "targets": 9}
    assert {name: facts[name] for name in counts} == counts
    assert {name for name, count in facts["flags"].items() if count} == {"truncated", "answer_cut"}
    assert facts["left_out"] == {"cannot be used": 1, NO_TARGET: 1}
    assert facts["share_trained"] == 9 / 22
    assert facts["ends_trained"] == pytest.approx(2 / 3)
    assert facts["targets_cut"] == 7
    assert facts["bad_rows"] == [{"row": "a.jsonl:3", "message": "is empty", "key": "messages"}]
    assert facts["longest"][0] == {"row": "a.jsonl:2", "tokens": 30, "outcome": "used"}
    assert [each["row"] for each in facts["longest"]] == [f"a.jsonl:{line}" for line in (2, 1, 4, 5)]
    assert facts["longest"][2] == {"row": "a.jsonl:4", "tokens": 4, "outcome": NO_TARGET}
    assert {name: facts["lengths"]["rows"][name] for name in ("min", "median", "max", "mean")} == {
        "min": 4, "median": 4, "max": 30, "mean": 11.5,
    }  # fmt: skip
    assert facts["lengths"]["examples"]["max"] == 10


def test_what_rows_end_with_is_told(part, causal) -> None:
    end = causal.processor.convert_tokens_to_ids("<|im_end|>")
    rows = [([40], [50, end]), ([41], [51, end]), ([42], [52])]
    word = causal.processor.decode([52])
    assert audit(View([part(rows)]), causal).facts["ends"] == {"<|im_end|>": 2, word: 1}


def test_each_file_is_counted(part, causal) -> None:
    first, second = part([([40], [50]), ([41], [51] * 3)]), part([([42], [52]), DataError("bad")], "b.jsonl")
    assert audit(View([first, second]), causal).facts["sources"] == [
        {"source": "a.jsonl", "dataset": 0, "rows": 2, "used": 2, "tokens": 6, "targets": 4},
        {"source": "b.jsonl", "dataset": 1, "rows": 2, "used": 1, "tokens": 2, "targets": 1},
    ]


def test_only_chosen_rows_are_looked_at(part, causal) -> None:
    rows = [([40], [50]), DataError("bad"), ([40], [50]), ([41], [51] * 9), ([44], [55])]
    found = audit(View([part(rows, chosen=[2, 3])]), causal)
    assert (found.facts["rows"], found.facts["used"], found.facts["tokens"]) == (2, 2, 12)
    assert found.facts["bad_rows"] == []
    assert found.facts["longest"][0]["row"] == "a.jsonl:4"
    assert found.findings == []


def test_a_split_row_is_one_row(part, causal) -> None:
    whole = [45, 46, 47, 48, 49, 50]
    split = outcome([feature([], whole[:4]), feature([], whole[3:])], [4, 3], tokens=6, flags=Flag.SPLIT)
    found = audit(View([part([split, ([40], [41]), split])]), causal)
    assert (found.facts["used"], found.facts["examples"], found.facts["tokens"]) == (3, 5, 16)
    assert named(found)["exact_duplicates"] == ["a.jsonl:3"]


def test_rows_that_are_alike_once_they_are_cut_are_said_to_be_cut(part, causal) -> None:
    same = used([40], [50], flags=Flag.TRUNCATED)
    [finding] = audit(View([part([same, used([40], [50]), same])]), causal).findings
    assert (
        finding.message
        == "2 of 3 rows repeat an earlier row exactly; cut at max_length, after which they may differ: 1 of them"
    )


def test_chunks_do_not_show(part, causal, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [(some(rng, rng.randrange(1, 60)), some(rng, rng.randrange(1, 20))) for _ in range(60)]
    view = View([part([*rows, *rows[:7]]), part(rows[5:9], "b.jsonl")])
    whole = audit(view, causal)
    monkeypatch.setattr(used_rows, "_CHUNK", 50)
    pieces = audit(view, causal)
    assert (pieces.facts, pieces.findings) == (whole.facts, whole.findings)
    assert whole.facts["duplicates"]["exact"] == 11


def test_no_row_at_all(part, causal) -> None:
    found = audit(View([part([DataError("bad")])]), causal)
    assert (found.facts["used"], found.facts["share_trained"], found.findings) == (0, 0.0, [])


@pytest.mark.parametrize("values", [[5], [0, 1, 2], [7] * 90 + [100_000], list(range(1000)), [1023, 1024]])
def test_histogram_counts_every_row_in_few_bars(values: list[int]) -> None:
    found = histogram(np.array(values))
    edges, counts = found["edges"], found["counts"]
    assert len(edges) == len(counts) + 1 <= 21
    assert edges == sorted(set(edges))
    assert counts == [sum(a <= value < b for value in values) for a, b in pairwise(edges)]
    assert counts[0] > 0
    assert edges[-1] == max(values) + 1


# --- findings of inspect alone --------------------------------------------------------------------------------------


def test_answers_without_text(part, causal) -> None:
    end = causal.processor.convert_tokens_to_ids("<|im_end|>")
    space = causal.processor("\n\n", add_special_tokens=False)["input_ids"]
    two = feature([40], [50, end])
    two = {name: two[name] + more for name, more in (("input_ids", [41, end]), ("labels", [IGNORED, end]))}
    rows = [
        ([40], [50, end]),
        ([41], [end]),
        ([42], [*space, end]),
        outcome([two], [3], tokens=5),
        ([43], [51]),
        used([44], [*space], flags=Flag.TRUNCATED | Flag.ANSWER_CUT),
    ]
    found = audit(View([part(rows)]), causal)
    assert named(found)["empty_answers"] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]


def test_prompts_that_are_empty_beside_others(part, causal) -> None:
    bos, text = causal.processor.bos_token_id, [50, 51, 52]
    assert named(audit(View([part([([40], text), ([], text[:2]), ([bos], text)])]), causal)) == {
        "empty_prompts": ["a.jsonl:2", "a.jsonl:3"]
    }
    # where no row has a prompt they are texts, and all is as it should be
    assert audit(View([part([([], text), ([bos], text[:2])])]), causal).findings == []


def test_rows_that_hardly_train(part, causal) -> None:
    rows = [([40] * 300, [50]), ([41] * 99, [50]), ([42] * 3, [50])]
    assert named(audit(View([part(rows)]), causal)) == {"low_trained_share": ["a.jsonl:1"]}


def test_levels_follow_the_share(part, causal) -> None:
    rng = random.Random(1)
    rows = [([40], some(rng, 5)) for _ in range(199)]
    few, many = audit(View([part([*rows, rows[0]])]), causal), audit(View([part([*rows, *rows[:3]])]), causal)
    assert [(each.name, each.level, each.count) for each in few.findings] == [("exact_duplicates", "info", 1)]
    assert [(each.name, each.level, each.count) for each in many.findings] == [("exact_duplicates", "warning", 3)]


def test_duplicates_across_sources(part, causal) -> None:
    found = audit(View([part([([40], [50])]), part([([40], [51]), ([40], [50])], "b.jsonl")]), causal)
    assert named(found) == {"exact_duplicates": ["b.jsonl:2"]}


def test_evaluation_rows_that_are_trained(part, causal) -> None:
    rng = random.Random(2)
    trained = [(some(rng, 12), some(rng, 6)) for _ in range(30)]
    # the shared prompt of half the rows says nothing
    trained += [([40] * 9, some(rng, 6)) for _ in range(30)]
    others = [(trained[4][0], some(rng, 6)), ([40] * 9, some(rng, 6)), (some(rng, 9), some(rng, 5))]
    train = audit(View([part(trained)]), causal)
    evaluation = audit(View([part([others[0], trained[3], *others[1:]], "e.jsonl")]), causal, split="eval")
    counts, findings = leaks(train, evaluation)
    assert counts == {"rows": 1, "prompts": 1}
    assert [(each.name, each.level, each.rows, each.split) for each in findings] == [
        ("train_in_eval", "warning", ["e.jsonl:2"], "eval"),
        ("prompts_in_eval", "warning", ["e.jsonl:1"], "eval"),
    ]
    assert findings[0].message.startswith("1 of 4 evaluation rows are also training rows")


def test_an_encoder_decoder(part, seq2seq) -> None:
    rows = [pair([40, 41, 42], [50, 2]), pair([40, 41, 42], [51, 2]), pair([40, 41, 42], [50, 2]), pair([43, 44], [2])]
    found = audit(View([part(rows)]), seq2seq)
    assert (found.facts["tokens"], found.facts["targets"], found.facts["share_trained"]) == (18, 7, 7 / 18)
    assert named(found) == {"empty_answers": ["a.jsonl:4"], "exact_duplicates": ["a.jsonl:3"]}
    held = audit(View([part([pair([40, 41, 42], [51, 2]), pair([40, 41, 42], [55, 2])])]), seq2seq)
    assert leaks(found, held)[0] == {"rows": 1, "prompts": 0}


# --- hashes ---------------------------------------------------------------------------------------------------------


def rows_of(lists: Sequence[Sequence[int]]) -> Ragged:
    lengths = np.array([len(each) for each in lists])
    return Ragged(np.concatenate([np.array(each, np.int32) for each in lists]), np.cumsum(lengths) - lengths)


def test_equal_rows_and_only_they_have_equal_hashes() -> None:
    rng = random.Random(3)
    lists = [[rng.randrange(4) for _ in range(rng.randrange(1, 6))] for _ in range(3000)]
    hashes = rows_of(lists).hashes()
    assert len(set(hashes.tolist())) == len({tuple(each) for each in lists})
    seen: set[tuple[int, ...]] = set()
    again = [tuple(each) in seen or seen.add(tuple(each)) is not None for each in lists]
    assert repeats(hashes).tolist() == again
    assert rows_of(lists[5:7]).hashes().tolist() == hashes[5:7].tolist()


def test_spread_covers_both_ends() -> None:
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(101, 3).tolist() == [0, 50, 100]
    assert spread(9, 1).tolist() == [0]
    assert spread(9, 0).tolist() == spread(0, 3).tolist() == []


# --- near duplicates ------------------------------------------------------------------------------------------------


def edited(row: Ids, share: float, rng: random.Random) -> Ids:
    out = list(row)
    for at in rng.sample(range(len(row)), max(1, round(share * len(row)))):
        out[at] = rng.randrange(30, 20_000)
    return out


def jaccard(one: Ids, other: Ids, without: Sequence[int] = ()) -> float:
    """The definition, in plain Python; ``without`` is a beginning that all rows share."""

    def shingles(row: Sequence[int]) -> set[tuple[int, ...]]:
        return {tuple(row[at : at + 3]) for at in range(len(row) - 2)} - {
            tuple(without[at : at + 3]) for at in range(len(without) - 2)
        }

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def near(lists: Sequence[Ids]) -> dict[int, tuple[int, float]]:
    sketches = Sketches(common_shingles([rows_of(lists)]))
    for start in range(0, len(lists), 100):
        sketches.add(start, rows_of(lists[start : start + 100]))
    tokens, everything = np.array([len(each) for each in lists]), np.ones(len(lists), bool)
    pairs = sketches.pairs(lambda numbers: rows_of([lists[at] for at in numbers]), tokens, everything)
    return {
        later: (earlier, index)
        for later, earlier, index in zip(
            pairs.later.tolist(), pairs.earlier.tolist(), pairs.index.tolist(), strict=True
        )
    }


@pytest.fixture(scope="module")
def planted() -> tuple[list[Ids], Ids, dict[int, int]]:
    """1200 rows that share a prompt; 300 of them are edited copies, from hardly to much."""
    rng = random.Random(4)
    prompt = [rng.randrange(30, 20_000) for _ in range(40)]
    lists = [prompt + [rng.randrange(30, 20_000) for _ in range(rng.randrange(40, 160))] for _ in range(900)]
    copies = {900 + at: at for at in range(300)}
    lists += [prompt + edited(lists[at][40:], 0.002 * (at % 60), rng) for at in copies.values()]
    return lists, prompt, copies


def test_every_pair_that_is_found_is_one_and_hardly_any_is_missed(planted) -> None:
    lists, prompt, copies = planted
    found = near(lists)
    truth = {later: jaccard(lists[later], lists[earlier], prompt) for later, earlier in copies.items()}
    assert {later: earlier for later, (earlier, _) in found.items()}.items() <= copies.items()
    assert all(index == pytest.approx(truth[later], abs=0.03) for later, (_, index) in found.items())
    alike = {later for later, index in truth.items() if index >= 0.72}
    assert len(alike) > 100
    assert len(alike & set(found)) >= 0.97 * len(alike)
    assert all(truth[later] >= 0.68 for later in found)


def test_a_prompt_that_all_rows_share_makes_no_duplicates() -> None:
    rng = random.Random(5)
    prompt = [rng.randrange(30, 20_000) for _ in range(300)]
    lists = [prompt + [rng.randrange(30, 20_000) for _ in range(30)] for _ in range(200)]
    assert jaccard(lists[0], lists[1]) > 0.7
    assert near(lists) == {}


def test_in_a_tiny_dataset_a_pair_is_no_prompt() -> None:
    rng = random.Random(6)
    lists = [[rng.randrange(30, 20_000) for _ in range(80)] for _ in range(3)]
    lists.append(edited(lists[1], 0.01, rng))
    assert {later: earlier for later, (earlier, _) in near(lists).items()} == {3: 1}


def test_the_same_rows_give_the_same_pairs(planted) -> None:
    lists = planted[0][800:1000]
    assert near(lists) == near(lists)


def test_exact_duplicates_are_not_near_ones(planted, part, causal) -> None:
    rng = random.Random(7)
    first = some(rng, 90)
    close = [*first[:-1], 29]
    found = audit(View([part([([40], first), ([40], first), ([40], close), ([40], some(rng, 90))])]), causal)
    assert named(found) == {"exact_duplicates": ["a.jsonl:2"], "near_duplicates": ["a.jsonl:3"]}
    assert found.facts["duplicates"]["pairs"][0]["like"] == "a.jsonl:1"
    assert found.facts["duplicates"]["compared"] == 3


def test_of_very_many_rows_a_sample_is_compared(part, causal, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(8)
    lists = [some(rng, 90) for _ in range(4)]
    rows = [([40], [*row[: 90 - at], *some(rng, at)]) for row in lists for at in (0, 3)]
    monkeypatch.setattr(duplicates, "MOST_ROWS", 4)
    facts = audit(View([part(rows)]), causal).facts
    assert (facts["duplicates"]["near"], facts["duplicates"]["compared"]) == (0, 4)
    monkeypatch.undo()
    assert audit(View([part(rows)]), causal).facts["duplicates"]["near"] == 4


def test_very_short_rows_are_not_compared() -> None:
    assert near([[40, 41, 42, 43, at] for at in range(50, 60)]) == {}
