"""Preference: the losses are TRL's, the answers alone count, and the reference is what training began from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import encoded, open_task
from preferencekit import LOSSES, TRL, adapted, examples_of
from taskkit import CASES, PREFERRED, UNPAIRED
from trainkit import build, run_recipe

from peftcli.core.weights import named_tensors
from peftcli.errors import DataError
from peftcli.tasks.base import encoding
from peftcli.tasks.preference import Answers
from peftcli.tasks.text.answer_inputs import Reference, split
from peftcli.tasks.text.fast.unpadded import unpad

PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
WITH_HEAD = {"peft_type": "LORA", "target_modules": ["q_proj"], "lora_dropout": 0.5, "modules_to_save": ["lm_head"]}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "target_modules": "all-linear"},
    "dropout and a trained module": WITH_HEAD,
    "a residual start": {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "a start with an effect": {"peft_type": "LORA", "target_modules": "all-linear", "init_lora_weights": False},
    "a soft prompt": PROMPT,
    "a prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
}
BEGIN_ELSEWHERE = ("a start with an effect", "a soft prompt", "a prefix")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_trls(loss: str) -> None:
    task, examples = examples_of(loss)
    found = task.loss(adapted(), task.collate(examples, training=False))
    assert float(found.total.detach()) / len(examples) == pytest.approx(TRL[loss], abs=1e-4)
    metrics = task.metrics({name: value.detach().numpy() for name, value in found.sums.items()}, [], len(examples))
    assert metrics["loss"] == pytest.approx(TRL[loss], abs=1e-4)
    margin = metrics["reward_chosen"] - metrics["reward_rejected"]
    assert metrics["reward_margin"] == pytest.approx(margin, abs=1e-6)
    assert metrics.get("kl", 1) > 0
    assert ("kl_chosen" in metrics) == (task.settings.loss in ("dpo", "ipo"))
    assert ("nll" in metrics) == (task.settings.loss == "orpo")
    assert {"loss", "nll"} & metrics.keys() <= {*task.lower_is_better}


@pytest.mark.parametrize("loss", ["dpo", pytest.param("ipo", marks=pytest.mark.slow)])
def test_the_kl_of_pairs_is_what_the_chosen_answers_gained_in_log_probability(loss: str) -> None:
    task, examples = examples_of(loss)
    gained = 0.0
    for example in examples:
        ids, labels = (torch.as_tensor(split(example, name)[0]).long()[None] for name in ("input_ids", "labels"))
        for model, sign in ((adapted(), 1), (build("llama"), -1)):
            nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], reduction="sum")
            gained -= sign * float(nll.detach())
    sums = task.loss(adapted(), task.collate(examples, training=False)).sums
    found = task.metrics({name: value.detach().numpy() for name, value in sums.items()}, [], len(examples))
    assert found["kl_chosen"] == pytest.approx(gained / len(examples), abs=1e-4)
    assert found["kl_chosen"] == pytest.approx(found["reward_chosen"] / LOSSES[loss]["beta"], abs=1e-5)
    assert abs(found["kl_chosen"]) > 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_and_a_random_predictor(loss: str) -> None:
    """Of answers of 4 tokens, whose log-probabilities are given; the reference has -10 for each answer."""
    task, _ = examples_of(loss)
    single, draw = loss == "kto", torch.Generator().manual_seed(0)
    good = torch.arange(2000) < 1000  # of pairs, the chosen ones are the first half
    lengths = torch.full((2000,), 4)

    def measured(gains: torch.Tensor) -> dict[str, float]:
        reference = None if loss in ("orpo", "simpo") else torch.full((2000,), -10.0)
        answers = Answers(gains - 10, lengths, (10 - gains) / 4)
        found = task._kto(gains, torch.tensor(0.25), good) if single else task._pairs(answers, reference, None)
        sums = {name: each.numpy() for name, each in found.sums.items()}
        metrics: dict[str, float] = task.metrics(sums, [], 2000 if single else 1000)
        return metrics

    scale = task.settings.beta / (4 if loss in ("orpo", "simpo") else 1)  # those compare means of tokens
    perfect = measured(torch.where(good, 3.0, -2.0))
    assert perfect["reward_accuracy"] == 1
    assert perfect["reward_margin"] == pytest.approx(5 * scale, rel=1e-5)
    random = measured(torch.randn(2000, generator=draw))
    assert random["reward_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert random["reward_margin"] == pytest.approx(0, abs=0.15 * scale)
    wrong = measured(torch.where(good, -2.0, 3.0))
    assert (wrong["reward_accuracy"], wrong["reward_margin"]) == (0, pytest.approx(-5 * scale, rel=1e-5))


def test_kl_is_that_of_answers_to_other_prompts() -> None:
    """The reference itself has none; of another model it is what the two say of each prompt with the answer before."""
    task, examples = examples_of("kto", reference="base")
    batch = task.collate(examples, training=False)

    def measured(model: Any) -> float:
        sums = {name: each.numpy() for name, each in task.loss(model, batch).sums.items()}
        return float(task.metrics(sums, [], len(examples))["kl"])

    assert measured(adapted(**METHODS["lora"])) == 0
    model, base = adapted(), build("llama")
    for _, _, parameter in named_tensors(model).values():
        parameter.data.mul_(3)  # far enough to be above zero
    ids, labels = ([each.arrays[name] for each in examples] for name in ("input_ids", "labels"))
    starts = [int((np.asarray(each) >= 0).argmax()) for each in labels]
    gaps = []
    for at, start in enumerate(starts):
        prompt, answer = ids[at][:start], ids[at - 1][starts[at - 1] :]
        row = torch.tensor([*prompt, *answer])[None]
        with torch.no_grad():
            said = [each(input_ids=row).logits[0, start - 1 : -1].log_softmax(-1) for each in (model, base)]
        gains = (said[0] - said[1]).gather(1, torch.tensor([*answer])[:, None])[:, 0]
        counts = torch.tensor([*labels[at - 1][starts[at - 1] :]]) >= 0
        gaps.append(float(gains[counts].sum()))
    expected = sum(gaps) / len(gaps)
    assert expected > 0.1
    assert measured(model) == pytest.approx(expected, rel=1e-4)


def test_kl_counts_the_tokens_that_the_loss_counts() -> None:
    task = open_task("preference", "chat", loss="kto")
    turns = [("assistant", "tea"), ("user", "or juice?"), ("assistant", "tea again")]
    several = [{"role": role, "content": content} for role, content in turns]
    asked = [{"role": "user", "content": "tea or juice?"}]
    rows = [{"prompt": asked, "completion": each, "label": True} for each in (several, several[:1])]
    examples = encoded(task, rows)
    labels = task.collate(examples, training=False)["_kl_labels"]
    counted = [int((np.asarray(each.arrays["labels"]) >= 0).sum()) for each in examples]
    assert (labels >= 0).sum(1).tolist() == counted[::-1]


def test_single_answers_are_trained_and_measured(tmp_path: Path) -> None:
    case = replace(CASES["preference"], task={"type": "preference", "loss": "kto"}, rows=lambda: UNPAIRED)
    run = run_recipe(case.write(tmp_path), "training.eval_strategy=epoch", "training.eval_on_start=true")
    assert run.losses[-1] < run.losses[0]
    first, last = run.run["eval"]["first"], run.run["eval"]["last"]
    assert first["eval_reward_margin"] == 0 < last["eval_reward_margin"]
    assert first["eval_loss"] == 0.5 > last["eval_loss"]
    assert first["eval_kl"] == 0


def test_a_batch_of_one_has_no_kl_and_is_refused(tmp_path: Path, cli: Any) -> None:
    case = replace(CASES["preference"], task={"type": "preference", "loss": "kto"}, rows=lambda: UNPAIRED)
    recipe, key = case.write(tmp_path), "training.per_device_train_batch_size"
    for command in (["check", "--deep"], ["train"]):
        said = cli(*command, recipe, f"{key}=1", "training.gradient_accumulation_steps=4", code=3)
        assert key in said
        assert "its KL would always be 0" in said
    task, examples = examples_of("dpo")
    task.refuse_rows(examples, 1, training=True)


def test_an_evaluation_of_one_row_at_once_has_no_kl_and_is_refused(tmp_path: Path, cli: Any) -> None:
    case = replace(CASES["preference"], task={"type": "preference", "loss": "kto"}, rows=lambda: UNPAIRED)
    recipe, key = case.write(tmp_path), "training.per_device_eval_batch_size"
    cli("check", "--deep", recipe, f"{key}=1")  # nothing is evaluated
    for command in (["check", "--deep", recipe, "training.eval_strategy=epoch"], ["evaluate", recipe]):
        assert key in cli(*command, f"{key}=1", code=3)
    task, examples = examples_of("kto", reference="base")
    sums: dict[str, Any] = {}
    for some in (examples[:3], examples[3:]):  # the last batch is a row alone
        for name, value in task.loss(adapted(), task.collate(some, training=False)).sums.items():
            sums[name] = sums.get(name, 0) + value.detach().double().numpy()
    assert task.metrics(sums, [], 4)["kl"] == pytest.approx(float(sums["kl"]) / 3)


def test_the_split_of_a_step_changes_no_loss(tmp_path: Path) -> None:
    """Of orpo, whose own loss is the mean over the tokens of all pairs of a step."""
    losses = []
    for size in (4, 2):
        case = replace(CASES["preference"], task={"type": "preference", "loss": "orpo"})
        split = f"training.gradient_accumulation_steps={4 // size}"
        (tmp_path / str(size)).mkdir()
        run = run_recipe(case.write(tmp_path / str(size)), f"training.per_device_train_batch_size={size}", split)
        losses.append(run.losses)
    assert len({len(each.arrays["input_ids"]) for each in examples_of("orpo")[1]}) > 1
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.grid(each="loss")
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo"])
def test_pairs_in_one_batch_lose_what_they_lose_alone(loss: str, padding: bool) -> None:
    task, model = examples_of(loss)[0], adapted()
    assert padding or unpad(model)
    examples = encoded(task, PREFERRED[:4])
    together, step_inputs = task.loss(model, task.collate(examples, training=True)), task.step_inputs(examples)
    alone = [task.loss(model, task.collate([each], training=True) | step_inputs) for each in examples]
    torch.testing.assert_close(together.total, sum(each.total for each in alone))
    evaluated = [task.loss(model, task.collate([each], training=False)) for each in examples]
    sums = [
        {name: sum(each.sums[name].detach() for each in part).numpy() for name in together.sums}
        for part in ([together], evaluated)
    ]
    assert task.metrics(sums[0], [], 4) == pytest.approx(task.metrics(sums[1], [], 4), abs=1e-5)


def test_smoothing_takes_some_pairs_to_be_the_wrong_way_round() -> None:
    plain, (task, examples) = examples_of("dpo")[0], examples_of("dpo", label_smoothing=0.2)
    batch, model = task.collate(examples, training=False), adapted()
    turned = plain.collate(encoded(plain, [_turned(row) for row in PREFERRED[:4]]), training=False)
    expected = 0.8 * plain.loss(model, batch).total + 0.2 * plain.loss(model, turned).total
    torch.testing.assert_close(task.loss(model, batch).total, expected)


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def test_what_counts_are_the_turns_after_the_prompt() -> None:
    user, said = {"role": "user", "content": "sun"}, {"role": "assistant", "content": "moon"}
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("the old mill", "tea"))
    task = open_task("preference", "chat")
    [pair] = encoded(task, [{"chosen": [user, said, user, chosen], "rejected": [user, said, user, rejected]}])
    [asked] = encoded(task, [{"prompt": "sun", "chosen": [said, user, chosen], "rejected": [said, user, rejected]}])
    [text] = encoded(task, [{"prompt": "sun", "chosen": " tea", "rejected": " moon"}])
    [unspaced] = encoded(task, [{"chosen": "法国在哪里,在欧洲", "rejected": "法国在哪里,很远"}])
    answers = ["the old mill<|im_end|>", "tea<|im_end|>"]
    for example, expected in (
        (pair, answers),
        (asked, answers),
        (text, [" tea<|im_end|>"] * 1),
        (unspaced, ["在欧洲<|im_end|>", "很远<|im_end|>"]),
    ):
        counted = [[number for number in each.tolist() if number >= 0] for each in split(example, "labels")]
        assert [task.processor.decode(each) for each in counted][: len(expected)] == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_what_training_began_from(method: str) -> None:
    model, task = adapted(**METHODS[method]), open_task("preference", "chat")
    ids = {"input_ids": torch.arange(5, 25).view(2, 10)}
    began, base = model(**ids).logits.detach(), build("llama")(**ids).logits
    task.begin(model, from_adapter=False)
    assert task.settings.reference == ("start" if method in BEGIN_ELSEWHERE else "base")
    with torch.no_grad():
        for _, _, parameter in named_tensors(model).values():
            parameter.add_(torch.randn_like(parameter))
    model.train()
    random, trained = torch.get_rng_state(), {name: each.clone() for name, each in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    found = task.loss(model, task.collate(encoded(task, PREFERRED[:2]), training=True))
    with task.reference(model):
        seen = model.eval()(**ids).logits
    torch.testing.assert_close(seen, began if method in BEGIN_ELSEWHERE else base)
    assert modes.count(True) > 1
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    if "dropout" not in method:
        assert torch.equal(torch.get_rng_state(), random)
    assert found.total.requires_grad


@pytest.mark.parametrize("method", ["dropout and a trained module", "a start with an effect"])
def test_a_new_adapter_loses_log_2_and_learns(method: str) -> None:
    model, task = adapted(**METHODS[method]).eval(), open_task("preference", "chat")
    task.begin(model, from_adapter=False)
    loss = task.loss(model, task.collate(encoded(task, PREFERRED[:4]), training=True)).total
    assert float(loss.detach()) == pytest.approx(4 * math.log(2), rel=1e-5)
    loss.backward()
    trained = [parameter.grad for _, _, parameter in named_tensors(model).values()]
    assert any(each is not None and each.abs().sum() > 1e-3 for each in trained)


def test_a_new_adapter_is_its_reference_in_bfloat16_too() -> None:
    """What trains takes gradients, the reference none: both compute the same numbers, with attention row by row."""
    model, task = adapted(**METHODS["lora"]), open_task("preference", "chat")
    unpad(model, None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(model, task.collate(encoded(task, PREFERRED[:4]), training=True)).total
    assert float(loss.detach()) == pytest.approx(4 * math.log(2), rel=1e-7)


def test_the_reference_has_no_dropout() -> None:
    model = adapted(**METHODS["a start with an effect"], lora_dropout=0.5).train()
    after = []
    for loss in ("simpo", "dpo"):  # without a reference, and with one
        task = open_task("preference", "chat", loss=loss)
        task.begin(model, from_adapter=False)
        torch.manual_seed(0)
        task.loss(model, task.collate(encoded(task, PREFERRED[:2]), training=True))
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_a_start_that_was_not_kept_is_no_reference() -> None:
    with pytest.raises(DataError, match="not kept"), Reference("start")(adapted(**PROMPT)):
        pass


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"loss": "dpo", "simpo_gamma": 1.0}, "simpo_gamma"),
        ({"loss": "orpo", "undesirable_weight": 2.0}, "undesirable_weight"),
        ({"loss": "simpo", "reference": "base"}, "reference"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError) as caught:
        open_task("preference", "chat", **settings)
    assert caught.value.key == f"task.{key}"


def test_a_single_answer_may_repeat_its_prompt() -> None:
    task, turn = open_task("preference", "chat", loss="kto"), {"role": "user", "content": "sun"}
    said = [{"role": "assistant", "content": "tea"}]
    rows = [{"prompt": "sun", "completion": each, "label": True} for each in (said, [turn, *said])]
    one, other = encoded(task, rows)
    assert one.arrays == other.arrays


def test_rows_of_another_loss_are_refused() -> None:
    for loss, row in (("kto", PREFERRED[0]), ("dpo", UNPAIRED[0])):
        with pytest.raises(DataError, match="kto") as caught:
            encoded(open_task("preference", "chat", loss=loss), [row])
        assert caught.value.key == "task.loss"
    one, other = (encoding("preference", open_task("preference", "chat", loss=loss)) for loss in ("dpo", "kto"))
    assert one != other, "a loss never gets from the cache what another one has encoded"


def test_single_answers_are_good_or_not() -> None:
    task = open_task("preference", "chat", loss="kto")
    found = encoded(task, [{**UNPAIRED[0], "label": label} for label in (True, 0, "yes", None)])
    assert [int(each.arrays["good"]) for each in found[:2]] == [1, 0]
    assert [(each.key, each.line) for each in found[2:]] == [("label", 3), ("label", 4)]


def test_a_pair_is_shown_to_be_compared_with_its_answers_marked() -> None:
    task, [pair, *_] = examples_of("dpo")
    shown = task.show(pair).parts
    assert [(text.title, text.beside) for text in shown] == [("chosen", False), ("rejected", True)]
    for text in shown:
        answer = f"{PREFERRED[0][text.title][0]['content']}<|im_end|>"
        assert "".join(token.text for token in text.tokens if token.trained) == answer
        assert PREFERRED[0]["prompt"][0]["content"] in "".join(token.text for token in text.tokens)


@pytest.mark.slow
def test_a_single_answer_is_shown_with_what_it_is() -> None:
    task, examples = examples_of("kto")
    for row, example in zip(UNPAIRED, examples, strict=False):
        text, label = task.show(example).parts
        assert (text.title, text.beside) == ("completion", False)
        assert label.text == ("good" if row["label"] else "not good")
