"""Metrics of generated answers: each says how good they are, and training, evaluation and predictions agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import HARMONY, PART_OF_HEADER, TEMPLATES, make_tokenizer
from classifierkit import encoded, open_task
from taskkit import CASES
from trainkit import MESSAGES, PROMPTS, base_folder, build, run_recipe, write_recipe, write_rows
from transformers import ByT5Tokenizer, FSMTConfig, FSMTForConditionalGeneration

import peftcli.tasks.base
from peftcli.cli.app import main
from peftcli.core.inject import inject
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError
from peftcli.methods import config_from_dict
from peftcli.tasks import settings
from peftcli.tasks.seq2seq_lm import Seq2SeqLM
from peftcli.tasks.text.chat import IGNORED, chat_template, encode_marked, mark_chat
from peftcli.tasks.text.formats import AlpacaExample, ChatExample, Message
from peftcli.tasks.text.generated import METRICS, own_metric
from peftcli.tasks.text.generation import GeneratedText, GenerationSettings, generator_of
from peftcli.tasks.text.prompts import PromptForm, TextWithSystem, prompt_ids, prompt_of, prompt_text

WANTED = ["the old mill stands north of a river", "seven red foxes drink tea in winter", "a stone bridge"]
RANDOM = ["qx vw zk jj pp", "oo uu ii yy ee aa bb", "xx yy zz ww"]
BEST = {"wer": (0, 1), "cer": (0, 1), "exact_match": (1, 0), "bleu": (100, 0), "chrf": (100, 0), "rouge_l": (1, 0)}
ALL = ["exact_match", "bleu", "chrf", "rouge_l"]
PROMPT_TUNING = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "RANDOM"}


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_and_a_random_predictor(name: str) -> None:
    perfect, none = BEST[name]
    assert METRICS[name](WANTED, list(WANTED)) == pytest.approx(perfect)
    assert METRICS[name](WANTED, RANDOM) == pytest.approx(none, abs=0.15 * max(perfect, none))


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ("Кошка сидит на окне.", "кошка сидит на окне", 1),
        ("Кошка сидит на окне.", "Кошка лежит на полу", 0.5),
        ("Летом 2020 года", "2020", 0.5),
        ("猫坐在窗台上", "猫坐", 0.5),
        ("हिन्दी में", "हिन्दी में", 1),
        ("القط على النافذة", "the cat", 0),
        ("Für 2 Euro", "fur 2 euro", 2 * 2 / 7),  # rouge-score's own words
    ],
)
def test_rouge_of_any_script(wanted: str, found: str, expected: float) -> None:
    assert METRICS["rouge_l"]([wanted], [found]) == pytest.approx(expected)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("kind", "rows", "method"),
    [
        ("llama", MESSAGES, None),
        ("llama", PROMPTS, None),
        ("llama", MESSAGES, PROMPT_TUNING),
        ("llama", PROMPTS, PROMPT_TUNING),
        ("bart", PROMPTS, None),  # its encoder has a table of positions
    ],
)
def test_an_answer_does_not_depend_on_the_batch(
    kind: str, rows: list[dict[str, Any]], method: dict[str, Any] | None
) -> None:
    model = build(kind)
    if method:
        torch.manual_seed(1)
        inject(model, config_from_dict({"task_type": "CAUSAL_LM", **method}))
    name = "seq2seq_lm" if kind == "bart" else "causal_lm"
    task = open_task(name, base_folder(kind), generate_metrics=["bleu"], max_new_tokens=12)
    examples = encoded(task, rows[:8])
    with torch.no_grad():
        together = task.loss(model.eval(), task.collate(examples, training=False)).outputs
        alone = [task.loss(model, task.collate([each], training=False)).outputs[0] for each in examples]
    assert together == alone
    assert len({len(each.arrays["prompt"]) for each in examples}) > 1
    assert len(set(alone)) > 1


def test_a_source_is_cut_alike_in_training_and_in_evaluation() -> None:
    task = open_task("seq2seq_lm", base_folder("t5"), generate_metrics=["bleu"], max_length=6)
    task.processor = ByT5Tokenizer()
    [example] = encoded(task, [{"prompt": "red foxes", "completion": "a"}])
    ids = list(example.arrays["prompt"])
    assert (len(ids), ids[-1]) == (6, task.processor.eos_token_id)
    assert ids == list(example.arrays["input_ids"])


def test_no_answers_in_training() -> None:
    task = open_task("causal_lm", "chat", generate_metrics=["bleu"], max_new_tokens=8)
    batch = task.collate(encoded(task, MESSAGES[:2]), training=True)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_the_best_adapter_by_such_a_metric_is_kept(cli: Callable, tmp_path: Path) -> None:
    recipe = CASES["causal_lm"].write(tmp_path)
    best = ("training.metric_for_best_model=eval_chrf", "training.load_best_model_at_end=true")
    often = ("training.eval_strategy=steps", "training.eval_steps=2", "training.save_strategy=steps")
    run = run_recipe(recipe, *best, *often)
    measured = [entry["eval_chrf"] for entry in run.metrics if "eval_chrf" in entry]
    assert len(measured) == 3
    kept = cli("evaluate", recipe, "--adapter", run.folder, "--json")["eval"]["last"]
    assert kept["eval_chrf"] == pytest.approx(max(measured))
    assert len(set(measured)) > 1


def test_a_metric_of_ones_own(cli: Callable, tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    wanted: str\n"
        "def blanks(found, wanted):\n    return {'pairs': len(found), 'blanks': ''.join(wanted).count(' ')}\n"
    )
    recipe = write_recipe(tmp_path)
    settings = ("task.type=causal_lm", "task.max_new_tokens=4", f"task.metric_code={code}:blanks")
    assert main(["evaluate", str(recipe), *settings]) == 3
    found = cli("evaluate", recipe, *settings, "task.trust_metric_code=true", "--json")["eval"]["last"]
    wanted = sum(row["messages"][-1]["content"].count(" ") for row in MESSAGES[10:])
    assert (found["eval_pairs"], found["eval_blanks"]) == (3, wanted)
    best = ("training.metric_for_best_model=blanks", "training.eval_strategy=epoch", "task.trust_metric_code=true")
    refused = cli("train", recipe, *settings, *best, code=2)
    assert "training.greater_is_better: whether a larger eval_blanks is better" in refused


def test_a_metric_of_ones_own_takes_no_other_ones_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(found, wanted):\n    return {'loss': 0, 'bleu': 1, 'mine': 2}")
    own = {"metric_code": f"{tmp_path}/own.py:f", "trust_metric_code": True}
    task = open_task("causal_lm", "chat", generate_metrics=["bleu"], **own)
    with pytest.raises(DataError, match="returns bleu, loss, which the task measures itself"):
        task.metrics({"loss": np.array(1.0), "correct": np.array(1.0)}, [("a", "a")], 1)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("x = 1", "x", "has no function 'x'"),
        ("def f(found, wanted):\n    return 'many'", "f", "could not convert"),
        ("def f(found, wanted):\n    return found[7]", "f", "IndexError"),
        ("import no_such_module", "f", "No module named"),
        (None, "f", "expected a file and its function"),
    ],
)
def test_what_is_wrong_with_it(tmp_path: Path, content: str | None, name: str, words: str) -> None:
    if content is not None:
        (tmp_path / "own.py").write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        own_metric(f"{tmp_path}/own.py:{name}", allowed=True)(["a"], ["b"])
    assert caught.value.key == "task.metric_code"


def streamed(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, asked: list[Message], ids: torch.Tensor
) -> tuple[GeneratedText, list[str]]:
    """The answer of a model that says these ids, and what is written after each, and at the end."""
    written = [""]

    def write(text: str) -> None:
        written[-1] += text

    def says(model: Any, input_ids: torch.Tensor, streamer: Any, **_: Any) -> torch.Tensor:
        streamer.put(input_ids)
        for each in ids[:, None]:
            streamer.put(each)
            written.append("")
        streamer.end()
        return torch.cat([input_ids, ids[None]], 1)

    monkeypatch.setattr("peftcli.tasks.text.generation.generate", says)
    [answer] = generator_of(build("llama"), tokenizer, lambda **_: PromptForm(True)).generate(
        [asked], GenerationSettings(), stream=write
    )
    return answer, written


@pytest.mark.parametrize("thinking", ["", "Think.\nAnd again."])
@pytest.mark.parametrize("template", [TEMPLATES["qwen3"], HARMONY, TEMPLATES["smollm"]], ids=["qwen3", "harmony", "no"])
def test_an_answer_is_what_follows_thinking_and_header(
    template: str, thinking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(template)
    asked: list[Message] = [{"role": "user", "content": "Where is Paris?"}]
    said = {"role": "assistant", "content": "In  France.", "thinking": thinking, "reasoning_content": thinking}
    [example] = encode_marked([mark_chat(ChatExample([*asked, said]), chat_template(tokenizer), "answers")], tokenizer)
    trained = torch.tensor([label for label in example.labels if label != IGNORED])
    answer, written = streamed(monkeypatch, tokenizer, asked, trained)
    assert (answer.text, answer.tokens, answer.finish_reason) == ("In  France.", len(trained), "stop")
    assert "".join(written) == "In  France."
    assert (
        generator_of(build("llama"), tokenizer, lambda **_: PromptForm(True)).generate([], GenerationSettings()) == []
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}<|open|>{{ m.role }}<|A|>{{ m.content }}</s>\n{% endfor %}",
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}",  # what a question ends with stands before an answer
    ],
)
def test_without_a_generation_prompt_the_model_is_asked_as_it_was_trained(template: str) -> None:
    tokenizer = make_tokenizer(template)
    turns = [{"role": "user", "content": "Where is Paris?"}, {"role": "assistant", "content": "In France."}]
    [example] = encode_marked([mark_chat(ChatExample(turns), chat_template(tokenizer), "answers")], tokenizer)
    text, templated = prompt_text(turns[:1], tokenizer, decoder_only=True)
    ids = prompt_ids(text, tokenizer, templated=templated, decoder_only=True)
    first = next(at for at, label in enumerate(example.labels) if label != IGNORED)
    assert ids == example.input_ids[:first]


@pytest.mark.parametrize("header", ["", "<|open|>assistant<|A|>"])
def test_without_a_generation_prompt_an_answer_is_continued_unless_another_was_trained(header: str) -> None:
    written = f"{{{{ '{header}' if m.role == 'assistant' else '' }}}}{{{{ m.content + '</s>' }}}}"
    tokenizer = make_tokenizer(f"{{% for m in messages %}}{written}{{% endfor %}}")
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In"}]
    assert prompt_text(turns, tokenizer, decoder_only=True) == (f"Where?</s>{header}In", True)
    assert prompt_text(turns, tokenizer, decoder_only=True, trained=True) == (f"Where?</s>{header}In</s>{header}", True)


@pytest.mark.parametrize(
    ("template", "said", "text"),
    [
        (TEMPLATES["qwen3"], "<think>\nHm.\n</think>\n\nA </think> of mine.", "A </think> of mine."),
        (TEMPLATES["qwen3"], "What is </think>?", "What is </think>?"),
        (HARMONY, "analysis<|A|>Hm.<|end|><|open|>final<|A|>In France.", "In France."),
        (HARMONY, "The final one.", "The final one."),
        (PART_OF_HEADER, "assistant\nThe assistant said so.", "The assistant said so."),
        (PART_OF_HEADER, "The assistant said so.", "The assistant said so."),
        (PART_OF_HEADER.replace("'\n'", "'\n\"'"), 'assistant\n"In France.', "In France."),
        (TEMPLATES["smollm"], "assistant</think>", "assistant</think>"),
    ],
)
def test_what_stands_before_an_answer_is_cut_at_its_beginning_only(
    template: str, said: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(template)
    ids = torch.tensor(tokenizer.encode(said + "</s>", add_special_tokens=False))
    answer, written = streamed(monkeypatch, tokenizer, [{"role": "user", "content": "Where?"}], ids)
    assert answer.text == text
    assert "".join(written) == text
    before = len(tokenizer.encode(said.removesuffix(text), add_special_tokens=False))
    assert any(written[: before + 8]), "the text is written as it comes"


def test_thinking_of_many_tokens_is_not_decoded_again_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = make_tokenizer("qwen3"), list[int]()
    ids = torch.tensor(tokenizer.encode("<think>" + "Hm. " * 50 + "</think>Yes.</s>", add_special_tokens=False))
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: sizes.append(len(ids)) or decode(ids, **options))
    answer, _ = streamed(monkeypatch, tokenizer, [{"role": "user", "content": "Where?"}], ids)
    assert answer.text == "Yes."
    assert sum(size > 20 for size in sizes) < 20


@pytest.mark.parametrize(
    ("template", "said", "wanted"),
    [
        (TEMPLATES["qwen3"], "<think>\nHm.\n</think>\n\nIn France.", "In France."),
        (TEMPLATES["qwen3"], "Hm.\n</think>\n\nIn France.", "In France."),
        (PART_OF_HEADER, "The assistant said so.", "The assistant said so."),
        (PART_OF_HEADER, "assistant professors", "assistant professors"),
    ],
)
def test_what_is_wanted_of_a_text_with_thinking_is_the_text_after_it(template: str, said: str, wanted: str) -> None:
    task = open_task("causal_lm", "chat", generate_metrics=["exact_match"], max_new_tokens=8)
    task.processor = make_tokenizer(template)
    turns = [{"role": "user", "content": "Where is Paris?"}, {"role": "assistant", "content": said}]
    [example] = encoded(task, [{"messages": turns}])
    assert example.arrays["answer"] == wanted


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_named_before_a_model_is_loaded(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = peftcli.tasks.base.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find(name, *more))
    recipe = CASES["causal_lm"].write(tmp_path)
    assert main(["check", "--deep", str(recipe)]) != 0
    assert f"needs the package {package}: pip install 'peftcli[metrics]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"text": "a text"}], {}, "a text alone has no prompt"),
        ([{"prompt": "", "completion": "a"}], {}, "the prompt is empty"),
        (PROMPTS[:1], {"max_new_tokens": 9999}, "are more than the base model"),
        (PROMPTS[:1], {"overlong": "split"}, "whole rows"),
        (PROMPTS[:1], {"metric_code": "a.py:b"}, "has to be allowed"),
    ],
)
def test_what_cannot_be_measured(rows: list[dict[str, Any]], settings: dict[str, Any], words: str) -> None:
    limits = {"max_new_tokens": 8, **settings}
    with pytest.raises(DataError, match=words):
        raise encoded(open_task("causal_lm", "chat", generate_metrics=["bleu"], **limits), rows)[0]


def test_prompts_are_encoded_again_for_another_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    task = open_task("causal_lm", "chat", generate_metrics=["bleu"])
    before = task.fingerprint()
    monkeypatch.setattr(task.base.config, "max_position_embeddings", 64)
    assert task.fingerprint() != before


def test_virtual_tokens_leave_prompts_fewer_positions() -> None:
    task = open_task("causal_lm", "chat", generate_metrics=["bleu"], max_new_tokens=8)
    task.virtual_tokens = (task.base.config.max_position_embeddings or 0) - 8
    with pytest.raises(DataError, match="the base model's 8 positions besides those of"):
        raise encoded(task, PROMPTS[:1])[0]


def test_the_prompt_of_a_row_of_any_format() -> None:
    def prompt(columns: dict[str, str] | None = None, **values: Any) -> Any:
        return prompt_of(Row(values, Place("a", 1)), columns or {})

    tools = [{"type": "function", "function": {"name": "add"}}]
    user = {"role": "user", "content": "Hi"}
    assert prompt(question="Hi", answer="Ho", columns={"prompt": "question", "completion": "answer"}) == "Hi"
    assert prompt(prompt="Hi", columns={"prompt": "question"}) == "Hi"
    assert (
        prompt(translation={"en": "Hi"}, columns={"prompt": "translation.en", "completion": "translation.fr"}) == "Hi"
    )
    assert prompt(instruction="Add", input="1 2", output="3") == AlpacaExample("Add", "", "1 2")
    assert prompt(prompt="Hi", system="Be kind.") == TextWithSystem("Hi", "Be kind.")
    assert prompt(prompt=[user], system="Be kind.") == [{"role": "system", "content": "Be kind."}, user]
    assert prompt(messages=[user, {"role": "assistant", "content": "Ho"}]) == [user]
    assert prompt(messages=json.dumps([user, {"role": "assistant", "content": "Ho"}])) == [user]
    assert prompt(messages=[user], tools=tools) == ChatExample([user], tools)
    result = {"role": "tool", "content": "3"}
    calling, written = (
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": each}]} for each in ({"a": 1}, '{"a": 1}')
    )
    assert prompt(messages=[user, written, result], tools=json.dumps(tools)) == ChatExample(
        [user, calling, result], tools
    )
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert prompt(prompt=[{"role": "user", "content": parts}]) == [user]
    assert prompt(messages=[user, {"role": "assistant", "content": ""}]) == [user]
    assert prompt(conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]) == [user]
    assert prompt(conversations=[user, {"role": "assistant", "content": "Ho"}]) == [user]
    every: dict[str, Any] = {
        "messages": [{"role": "user", "content": "m"}],
        "conversations": [{"from": "human", "value": "c"}],
        "prompt": "p",
        "instruction": "i",
    }
    for trained_on, wanted in {
        "messages": [{"role": "user", "content": "m"}],
        "sharegpt": [{"role": "user", "content": "c"}],
        "prompt_completion": "p",
        "alpaca": AlpacaExample("i", ""),
    }.items():
        assert prompt_of(Row(every, Place("a", 1)), {}, trained_on) == wanted
    assert prompt_of(Row({"prompt": "p"}, Place("a", 1)), {}, "alpaca") == "p"
    with pytest.raises(DataError, match="is empty; there is nothing to answer"):
        prompt(prompt="", completion="Ho")
    for bad in (
        {"messages": [{"role": "user"}]},
        {"conversations": 5},
        {"instruction": "Add", "input": [1]},
        {"instruction": "Add", "system": 5},
        {"prompt": "Add", "system": 5},
    ):
        with pytest.raises(DataError, match="expected") as caught:
            prompt(**bad)
        assert str(caught.value.key).startswith([*bad][-1])


def test_instructions_are_predicted_as_they_are_evaluated(cli: Callable, tmp_path: Path) -> None:
    rows = [
        {"instruction": row["prompt"], "input": "a b", "output": row["completion"], "prompt": "### Below"}
        for row in PROMPTS
    ]
    recipe = write_recipe(tmp_path, rows=rows)
    measures = ("task.type=causal_lm", "task.generate_metrics=[chrf]", "task.max_new_tokens=7")
    run = run_recipe(recipe, *measures, "training.max_steps=2", "training.eval_strategy=epoch")
    asked = write_rows(tmp_path / "asked.jsonl", [{**row, "output": ""} for row in rows[10:]])
    cli("predict", run.folder, "--input", asked, "--output", tmp_path / "answers.jsonl")
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    found = METRICS["chrf"]([row["output"] for row in rows[10:]], [each["text"] for each in answers])
    assert run.run["eval"]["last"]["eval_chrf"] == pytest.approx(found)
    assert all(each["tokens"] <= 7 for each in answers)


def test_the_loss_leaves_the_labels_as_they_are() -> None:
    """FSMT writes the pad token over the -100 in the labels that it shifts: padding would be trained."""
    config = FSMTConfig(
        langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = FSMTForConditionalGeneration(config).eval()
    task = Seq2SeqLM(settings.Seq2SeqLMSettings(), None, SimpleNamespace(config=config))  # type: ignore[arg-type]
    ids, labels = torch.randint(3, 40, (2, 6)), torch.tensor([[5, 6, 2, -100, -100], [7, 8, 9, 10, 2]])
    together = task.loss_of_targets(model, {"input_ids": ids, "labels": labels.clone()}).total
    rows = [labels[:1, :3], labels[1:]]
    alone = [task.loss_of_targets(model, {"input_ids": ids[[at]], "labels": row}).total for at, row in enumerate(rows)]
    torch.testing.assert_close(together, alone[0] + alone[1])
