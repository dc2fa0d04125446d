"""GRPO: rewards are what they say, a sample depends on its row alone, and equal rewards teach nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainkit
from classifierkit import encoded, open_task
from preferencekit import GRPO, GRPO_ROWS, adapted
from taskkit import CASES
from trainkit import run_recipe

from peftcli.adapters.load import read_settings
from peftcli.cli.app import main
from peftcli.data.rows import Place
from peftcli.errors import AdapterError, DataError
from peftcli.tasks.grpo import advantages_of
from peftcli.tasks.settings import GrpoSettings
from peftcli.tasks.text.rewards import CheckedAnswer, Rewards

SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"const": "Ada"}}}


def rewarded(reward: dict[str, Any], *texts: str, tokens: int = 4, **settings: Any) -> list[float]:
    """The rewards of answers to rows whose columns are the same."""
    rewards = Rewards(GrpoSettings(rewards=[reward], **settings))
    columns = {"answer": " tea ", "schema": json.dumps(SCHEMA), "count": 7}
    found = rewards([CheckedAnswer(text, tokens, columns, Place("a.jsonl", 3, 5)) for text in texts])
    return found[:, 0].tolist()


@pytest.mark.parametrize(
    ("reward", "right", "wrong"),
    [
        ({"exact_match": "answer"}, ("tea", "\ntea "), ("Tea", "tea.")),
        ({"exact_match": "count"}, ("7",), ("7.0",)),
        ({"contains": "red fox"}, ("a red fox.",), ("a red  fox", "")),
        ({"regex": r"^(Yes|No)\b"}, ("Yes.", "No, never"), ("Yesterday", "I say No")),
        (
            {"json_schema": SCHEMA},
            ('{"name": "Ada"}', ' {"name": "Ada", "a": 1}\n'),
            ('{"name": "Al"}', '{"name"', "3"),
        ),
        ({"json_schema": "schema"}, ('{"name": "Ada"}',), ('{"name": NaN}', "[" * 100_000, '{"name": "Ada"} yes')),
    ],
)
def test_rewards_of_answers(reward: dict[str, Any], right: Sequence[str], wrong: Sequence[str]) -> None:
    assert rewarded(reward, *right, *wrong) == [1.0] * len(right) + [0.0] * len(wrong)


def test_the_length_of_answers_is_within_bounds() -> None:
    found = [rewarded({"length": {"min": 3, "max": 4}}, "a", tokens=count) for count in (2, 3, 4, 5)]
    assert found == [[0], [1], [1], [0]]


def test_schemas_are_read_from_files_and_fetch_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SCHEMA))
    assert rewarded({"json_schema": f"{tmp_path}/a.json"}, '{"name": "Ada"}', "{}") == [1, 0]
    assert GrpoSettings(rewards=[{"json_schema": f"{tmp_path}/a.json"}]).files() == [f"{tmp_path}/a.json"]
    with pytest.raises(DataError, match=r"a.jsonl:5: .*example.com"):
        rewarded({"json_schema": {"$ref": "https://example.com/a.json"}}, "{}")


FAILING = {
    "raises": ("return [1 / len(text) for text in answers]", "ZeroDivisionError"),
    "is not a number": ("return [float('nan') if not text else 1 for text in answers]", "the reward is nan"),
    "is missing": ("return [None if not text else 1 for text in answers]", "the reward is None"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_reward_that_fails_names_the_row(tmp_path: Path, case: str) -> None:
    body, words = FAILING[case]
    code = tmp_path / "own.py"
    code.write_text(f"def score(answers, **columns):\n    {body}\n")
    own: dict[str, Any] = {"rewards": [{"python": f"{code}:score"}]}
    with pytest.raises(DataError, match="has to be allowed"):
        Rewards(GrpoSettings(**own))
    rewards = Rewards(GrpoSettings(**own, trust_reward_code=True))
    assert rewards.names == ["score"]
    answers = [CheckedAnswer(text, 1, {}, Place("a.jsonl", at, at)) for at, text in enumerate(("a", "", "b"), 7)]
    with pytest.raises(DataError, match=words) as caught:
        rewards(answers)
    assert (caught.value.exit_code, caught.value.file, caught.value.line) == (3, "a.jsonl", 8)


def test_own_rewards_get_the_columns_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(answers, wanted, **_):\n    return [len(w) for w in wanted]\n")
    settings = GrpoSettings(rewards=[{"python": f"{tmp_path}/own.py:score", "weight": 2.0}], trust_reward_code=True)
    assert settings.files() == [f"{tmp_path}/own.py"], "its content is part of the run"
    answers = [CheckedAnswer("a", 1, {"wanted": text}, Place("a.jsonl", 1)) for text in ("abc", "d")]
    assert Rewards(settings)(answers).tolist() == [[3], [1]]


def test_a_group_of_equal_rewards_gives_no_gradient() -> None:
    task = open_task("grpo", "chat", **{**GRPO, "rewards": [{"contains": ""}]})
    model, batch = adapted(), task.collate(encoded(task, GRPO_ROWS), training=True)
    loss = task.loss(model, batch)
    loss.total.backward()
    assert float(loss.sums["without_signal"]) == len(GRPO_ROWS)
    assert all(not each.grad.any() for each in model.parameters() if each.requires_grad)
    assert advantages_of(np.array([[0.1 + 0.2] * 3, [1.0, 0.0, 0.0]]), scale=False).tolist()[0] == [0, 0, 0]


def answers_of(rows: Sequence[int], draws: Sequence[int], **settings: Any) -> list[list[list[int]]]:
    """The tokens of the sampled answers to some rows."""
    task = open_task("grpo", "chat", **GRPO, **settings)
    examples = encoded(task, GRPO_ROWS)
    batch = task.collate(
        [replace(examples[at], draw=draw) for at, draw in zip(rows, draws, strict=True)], training=True
    )
    task.loss(adapted(), batch)
    return [[each.ids for each in group] for group in batch["_groups"][0].answers]


def test_a_sample_depends_on_its_row_and_draw_alone() -> None:
    torch.manual_seed(0)
    together = answers_of([0, 1, 2], [5, 6, 7])
    torch.manual_seed(1)
    assert answers_of([2, 0], [7, 5]) == [together[2], together[0]]
    assert answers_of([0], [8])[0] != together[0]
    assert len({tuple(ids) for ids in together[0]}) > 1


def test_samples_follow_the_models_distribution() -> None:
    task = open_task("grpo", "chat", **{**GRPO, "group_size": 2000, "max_new_tokens": 1}, temperature=0.5)
    batch = task.collate([replace(encoded(task, GRPO_ROWS)[0], draw=3)], training=True)
    model = adapted()
    task.loss(model, batch)
    found = torch.bincount(torch.tensor([each.ids[0] for each in batch["_groups"][0].answers[0]]), minlength=300) / 2000
    with torch.no_grad():
        shares = (model(batch["input_ids"]).logits[0, -1] / 0.5).softmax(-1)
    assert float((found - shares).abs().max()) < 5 * float((shares.max() / 2000).sqrt())


WRONG = {
    "no rewards": ("rewards=[]", "task.rewards", "is required"),
    "two kinds": ("rewards=[{contains: a, regex: b}]", "task.rewards[0]", "expected one of exact_match, contains"),
    "no bounds": ("rewards=[{length: {}}]", "task.rewards[0].length", "expected bounds"),
    "turned round": ("rewards=[{length: {min: 3, max: 2}}]", "task.rewards[0].length", "expected bounds"),
    "one answer": ("group_size=1", "task.group_size", "must be at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    setting, key, words = WRONG[case]
    recipe = CASES["grpo"].write(tmp_path)
    assert main(["check", str(recipe), f"task.{setting}"]) == 2
    found = capsys.readouterr()
    assert f"{key}: {words}" in found.out + found.err


def test_wrong_rows_and_patterns_are_refused() -> None:
    task = open_task("grpo", "chat", **GRPO)
    (error,) = encoded(task, [{**GRPO_ROWS[0], "answer": None}])
    assert isinstance(error, DataError)
    assert "expected a text or a number" in error.message
    with pytest.raises(DataError, match="no column 'answer'"):
        encoded(task, [{"prompt": "a"}])
    with pytest.raises(DataError, match="is not a regular expression"):
        encoded(open_task("grpo", "chat", rewards=[{"regex": "("}]), GRPO_ROWS)
    with pytest.raises(DataError, match="is no JSON Schema"):
        encoded(open_task("grpo", "chat", rewards=[{"json_schema": {"type": 3}}]), GRPO_ROWS)


def test_a_run_logs_rewards_and_keeps_answers(tmp_path: Path) -> None:
    run = run_recipe(CASES["grpo"].write(tmp_path), "training.eval_strategy=steps", "training.eval_steps=4")
    steps = [line for line in trainkit.read_metrics(run.folder) if "loss" in line]
    assert {"reward", "reward_contains", "reward_exact_match", "without_signal", "answers_cut", "kl"} <= steps[0].keys()
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [each["step"] for each in samples] == sorted(each["step"] for each in samples)
    assert {each["step"] for each in samples} == {4, 6}
    assert samples[0].keys() == {"step", "prompt", "answer", "reward", "rewards"}


def test_an_adapter_names_no_reward_code() -> None:
    with pytest.raises(AdapterError, match="names code to run"):
        read_settings("grpo", {"trust_reward_code": True}, "task.json", "settings")
