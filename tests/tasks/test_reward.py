"""Reward: the loss is that of TRL's RewardTrainer, a batch is pairs, and a reward does not depend on the batch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from classifierkit import encoded, open_task, table_of
from taskkit import CASES, PREFERRED
from trainkit import run_recipe

from peftcli.errors import DataError
from peftcli.tasks.base import PredictOptions, model_inputs
from peftcli.tasks.shown import Facts

CHOSEN, REJECTED = [0.4, -1.2, 2.0, 0.1], [0.9, -1.5, -0.7, 0.1]
MARGINS = [0.0, 1.0, 0.5, -0.25]


def told(rewards: list[float]) -> Any:
    """A model that answers with these rewards."""
    return lambda **inputs: SimpleNamespace(logits=torch.tensor(rewards)[:, None])


def model_of(task: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(task.base.name, **task.model_options())
    task.fit_model(model, None)
    return model.eval()


@pytest.mark.parametrize(("margins", "expected"), [([0.0] * 4, 0.57165575), (MARGINS, 0.68957144)])
def test_the_loss_is_trls(margins: list[float], expected: float) -> None:
    task = open_task("reward", "chat")
    rows = [{**row, "margin": margin} for row, margin in zip(PREFERRED, margins, strict=False)]
    loss = task.loss(told(CHOSEN + REJECTED), task.collate(encoded(task, rows), training=True))
    assert float(loss.total) / 4 == pytest.approx(expected, abs=1e-6)
    found = task.metrics({name: value.numpy() for name, value in loss.sums.items()}, [], 4)
    assert found == pytest.approx({"loss": expected, "reward_accuracy": 0.5, "reward_margin": 0.625}, abs=1e-6)


def test_a_perfect_and_a_random_predictor() -> None:
    task, random = open_task("reward", "chat"), torch.Generator().manual_seed(0)
    batch = task.collate(encoded(task, PREFERRED[:4]) * 500, training=False)

    def measured(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, float]:
        sums = task.loss(told(torch.cat([chosen, rejected]).tolist()), batch).sums
        found: dict[str, float] = task.metrics({name: each.numpy() for name, each in sums.items()}, [], 2000)
        return found

    one, other = torch.randn(2, 2000, generator=random)
    perfect = measured(one.abs() + 20, -other.abs() - 20)
    assert perfect["reward_accuracy"] == 1
    assert perfect["loss"] == pytest.approx(0, abs=1e-6)
    assert perfect["reward_margin"] == pytest.approx(40 + float((one.abs() + other.abs()).mean()), rel=1e-5)
    guessed = measured(one, other)
    assert guessed["reward_accuracy"] == pytest.approx(0.5, abs=0.04)
    assert guessed["reward_margin"] == pytest.approx(0, abs=0.1)
    assert measured(torch.zeros(2000), torch.zeros(2000)) == pytest.approx(
        {"loss": math.log(2), "reward_accuracy": 0, "reward_margin": 0}
    ), "to say nothing of a pair is not to be right"


def test_a_batch_of_pairs_gives_what_each_answer_alone_gives() -> None:
    task = open_task("reward", "chat")
    examples, model = encoded(task, PREFERRED), model_of(task)
    batch = task.collate(examples, training=False)
    assert len(batch["input_ids"]) == 2 * len(examples)
    together = model(**model_inputs(batch)).logits[:, 0]
    alone = [
        model(input_ids=row[mask.bool()][None]).logits[0, 0]
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("kind", ["chat", "bert"])
def test_predict_scores_texts_prompts_and_conversations(kind: str) -> None:
    task = open_task("reward", kind)
    model = model_of(task)
    forms = [
        [{"text": "sun tea"}, {"text": "sun moon seven"}],
        [{"prompt": "sun", "completion": " tea"}, {"prompt": "sun moon", "completion": " seven"}],
        [{"messages": row["prompt"] + row["chosen"]} for row in PREFERRED[:2]] if kind == "chat" else None,
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERRED[:2]] if kind == "chat" else None,
    ]
    answers = [list(task.predict(model, table_of(each)[1], PredictOptions())) for each in forms if each]
    assert [set(each) for each in answers[0]] == [{"reward"}] * 2
    assert answers[0][0]["reward"] == pytest.approx(answers[1][0]["reward"])
    assert answers[2:3] == answers[3:]
    assert len({each["reward"] for rows in answers for each in rows}) == 2 * len(answers[::2])
    named = [{"question": row["prompt"], "answer": row["completion"]} for row in forms[1] or ()]
    options = PredictOptions(columns={"prompt": "question", "completion": "answer"})
    assert list(task.predict(model, table_of(named)[1], options)) == answers[1]
    for pair in ({**PREFERRED[0]}, {"prompt": "sun", "good": " tea", "bad": " moon"}):
        renamed = {"chosen": "good", "rejected": "bad"} if "good" in pair else {}
        with pytest.raises(DataError, match="the rows hold pairs; predict scores single answers"):
            list(task.predict(model, table_of([pair])[1], PredictOptions(columns=renamed)))


def test_a_margin_is_a_number_of_a_column_that_is_there() -> None:
    row = PREFERRED[0]
    assert [float(each.arrays["margin"]) for each in encoded(open_task("reward", "chat"), [{**row, "margin": 2}])] == [
        2
    ]
    [found] = encoded(open_task("reward", "chat", margin="gap"), [{**row, "gap": 0.5, "margin": 2}])
    assert float(found.arrays["margin"]) == 0.5
    [bad] = encoded(open_task("reward", "chat"), [{**row, "margin": "much"}])
    assert (bad.key, bad.line) == ("margin", 1)
    with pytest.raises(DataError, match="gap") as caught:
        encoded(open_task("reward", "chat", margin="gap"), [row])
    assert caught.value.key == "task.margin"


def test_a_pair_is_shown_to_be_compared_with_its_margin() -> None:
    task = open_task("reward", "chat")
    [first, second] = encoded(task, [{**PREFERRED[0], "margin": 0.5}, {**PREFERRED[1], "margin": 0}])
    chosen, rejected, margin = task.show(first).parts
    assert [(text.title, text.beside) for text in (chosen, rejected)] == [("chosen", False), ("rejected", True)]
    for text in (chosen, rejected):
        assert PREFERRED[0][text.title][0]["content"] in "".join(token.text for token in text.tokens)
    assert margin == Facts({"margin": "0.5"})
    assert len(task.show(second).parts) == 2


def test_answers_need_no_end(tmp_path: Path) -> None:
    """Texts over an encoder, whose tokenizer has no end to train, are no finding."""
    recipe = CASES["reward"].write(tmp_path)
    rows = [{"prompt": "sun", "chosen": f" tea {at}", "rejected": f" moon {at}"} for at in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    base = shutil.copytree(open_task("reward", "bert").base.name, tmp_path / "base")
    described = json.loads((base / "tokenizer_config.json").read_text())
    described.pop("eos_token", None)
    (base / "tokenizer_config.json").write_text(json.dumps(described))
    settings = (f"base_model={base}", f"dataset.train={tmp_path}/texts.jsonl", "dataset.eval=null")
    assert (
        run_recipe(recipe, *settings, "training.eval_strategy=no", "training.max_steps=1").run["status"] == "complete"
    )
