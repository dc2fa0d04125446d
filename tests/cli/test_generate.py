from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from trainkit import MESSAGES, PAIRS, PROMPT_TUNING, PROMPTS, Child, run_recipe, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from peftcli.adapters.answer_file import content_key
from peftcli.adapters.generate import load_generator
from peftcli.adapters.load import SHARED_FILES
from peftcli.core.layer import adapter_layers
from peftcli.tasks.text.formats import AlpacaExample
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import PromptForm, TextWithSystem, with_system
from peftcli.tasks.text.stop_tokens import StopTokens

LONG = (
    *("training.max_steps=30", "training.learning_rate=2e-2", "method.r=8", "training.logging_steps=50"),
    *("dataset.limit=2", "training.per_device_train_batch_size=2"),
)
BASE = str(trainkit.base_folder())
QUESTIONS = [question for question, _ in PAIRS[:5]]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on conversations until it knows some by heart."""
    return run_recipe(write_recipe(tmp_path_factory.mktemp("lora")), *LONG).folder


@pytest.fixture(scope="module")
def prompt_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("prompt"))
    return run_recipe(recipe, PROMPT_TUNING, "training.max_steps=20", "training.learning_rate=0.3").folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on prompts and completions, though the base model has a chat template."""
    return run_recipe(write_recipe(tmp_path_factory.mktemp("plain"), rows=PROMPTS), *LONG).folder


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("t5"), trainkit.base_folder("t5", chat=False), PROMPTS)
    recipe.write_text(recipe.read_text().replace("causal_lm", "seq2seq_lm"))
    return run_recipe(recipe, *LONG).folder


@pytest.fixture(scope="module")
def generator(lora: Path) -> TextGenerator:
    return load_generator(str(lora))


@pytest.fixture
def said(cli: Callable) -> Callable[..., dict]:
    """``peftcli generate ... --json`` for one prompt."""

    def said(adapter: Path, prompt: str, *args: object) -> dict:
        ran = cli("generate", adapter, "--prompt", prompt, "--max-new-tokens", 24, "--json", *args)
        assert ran.code == 0, ran.err
        assert ran.err == ""
        return json.loads(ran.out)

    return said


def alone(adapter: Path) -> list[dict[str, Any]]:
    """What the command answers to each of the questions, asked one by one."""
    generator = load_generator(str(adapter))
    return [asdict(generator.generate([question], GenerationSettings(max_new_tokens=24))[0]) for question in QUESTIONS]


def greedy(model: torch.nn.Module, text: str, stop: set[int], longest: int = 24) -> tuple[str, int]:
    """The likeliest continuation, by forward passes over the whole text."""
    tokenizer = AutoTokenizer.from_pretrained(trainkit.base_folder())
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    with torch.inference_mode():
        while len(ids) - start < longest and not (len(ids) > start and ids[-1] in stop):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True), len(ids) - start


def chatml(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_one_prompt(said: Callable, lora: Path) -> None:
    answer = said(lora, PAIRS[0][0])
    assert list(answer) == ["prompt", "text", "tokens", "finish_reason"]
    assert (answer["prompt"], answer["text"], answer["finish_reason"]) == (*PAIRS[0], "stop")
    words = AutoTokenizer.from_pretrained(trainkit.base_folder())(PAIRS[0][1])["input_ids"]
    assert answer["tokens"] == len(words) + 1, "the end-of-turn token counts"


def test_peft_says_the_same(said: Callable, lora: Path) -> None:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    model = PeftModel.from_pretrained(base, lora).eval()
    tokenizer = AutoTokenizer.from_pretrained(trainkit.base_folder())
    for question in QUESTIONS[:2]:
        inputs = tokenizer(chatml(question), return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer = said(lora, question)
        assert answer["text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer["tokens"] == len(ids)


def test_without_adapter_it_is_the_base_model(said: Callable, lora: Path, prompt_tuned: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    for question in QUESTIONS[:1]:
        text, tokens = greedy(model, chatml(question), {2})
        answer = said(lora, question, "--no-adapter")
        assert (answer["text"], answer["tokens"]) == (text.strip(), tokens)
        assert said(prompt_tuned, question, "--no-adapter") == answer
        assert said(lora, question) != answer


def test_virtual_tokens_stand_before_the_prompt(said: Callable, prompt_tuned: Path) -> None:
    from safetensors.torch import load_file

    base = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    vectors = load_file(prompt_tuned / "adapter_model.safetensors")["prompt_embeddings"]

    def model(input_ids: torch.Tensor) -> object:
        return base(inputs_embeds=torch.cat([vectors, base.get_input_embeddings()(input_ids[0])])[None])

    for question in QUESTIONS[:2]:
        text, tokens = greedy(model, chatml(question), {2})
        answer = said(prompt_tuned, question)
        assert (answer["text"], answer["tokens"]) == (text.strip(), tokens)


def test_length_ends_an_answer(said: Callable, lora: Path) -> None:
    answer = said(lora, PAIRS[0][0], "--max-new-tokens", 1)
    assert (answer["tokens"], answer["finish_reason"]) == (1, "length")
    whole = said(lora, PAIRS[0][0])
    exact = said(lora, PAIRS[0][0], "--max-new-tokens", whole["tokens"])
    assert exact == whole, "the end-of-turn token may be the last that fits"


def test_sampling_follows_the_seed(said: Callable, lora: Path) -> None:
    def sampled(seed: int, *args: object) -> str:
        return said(lora, "What?", "--no-adapter", "--temperature", 1.5, "--seed", seed, *args)["text"]

    first, nothing_else = sampled(1), said(lora, "What?", "--no-adapter")["text"]
    assert sampled(1) == first
    assert len({first, sampled(2), nothing_else}) == 3
    assert sampled(1, "--top-p", 0.0001) == nothing_else, "only the likeliest token is left"


def test_samples_of_one_prompt_differ_from_batch_to_batch(cli: Callable, lora: Path, tmp_path: Path) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": "What?"}] * 4), tmp_path / "out.jsonl"
    args = ("generate", lora, "--input", source, "--output", target, "--max-new-tokens", 12, "--no-adapter")
    for size in (1, 2):
        found = []
        for _ in range(2):
            assert cli(*args, "--temperature", 1.5, "--batch-size", size).code == 0
            found.append([json.loads(line)["text"] for line in target.read_text().splitlines()])
        assert len(set(found[0])) == 4
        assert found[0] == found[1], "the same seed gives the same samples"


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("adapter", ["lora", "prompt_tuned", "plain", "translator"])
def test_the_printed_text_is_the_text(
    cli: Callable, said: Callable, request: pytest.FixtureRequest, adapter: str
) -> None:
    folder = request.getfixturevalue(adapter)
    printed = cli("generate", folder, "--prompt", QUESTIONS[0], "--max-new-tokens", 24)
    assert (printed.code, printed.err) == (0, "")
    assert printed.out == said(folder, QUESTIONS[0])["text"] + "\n"


@pytest.mark.grid
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("adapter", ["lora", "prompt_tuned", "plain", "translator"])
def test_a_batch_file_holds_what_single_prompts_give(
    cli: Callable, request: pytest.FixtureRequest, tmp_path: Path, adapter: str, batch_size: int
) -> None:
    folder = request.getfixturevalue(adapter)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": question} for question in QUESTIONS])
    target = tmp_path / "new" / "out.jsonl"
    args = ("--input", source, "--output", target, "--batch-size", batch_size, "--max-new-tokens", 24)
    ran = cli("generate", folder, *args, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == {"output": str(target), "rows": 5}
    assert ran.err.splitlines()[-1] == "5/5"
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == alone(folder)


def test_the_adapter_is_merged_in_memory_where_the_answers_stay(
    cli: Callable, lora: Path, prompt_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", [{"prompt": each} for each in QUESTIONS]), tmp_path / "out.jsonl"
    ran = cli("generate", lora, "--input", source, "--output", target, "--batch-size", 2, "--max-new-tokens", 24)
    assert ran.err.startswith("merged in memory: the logits of the first batch differ by"), ran.err
    assert [json.loads(line) for line in target.read_text().splitlines()] == alone(lora)

    def merged(adapter: Path) -> tuple[TextGenerator, str]:
        told: list[str] = []
        return load_generator(str(adapter), merge_for=QUESTIONS[:2], tell=told.append), *told

    assert not adapter_layers(merged(lora)[0].model)
    assert merged(prompt_tuned)[1].startswith("not merged in memory: virtual tokens cannot be merged")
    monkeypatch.setattr("peftcli.adapters.merged._TOLERANCE", -1.0)
    generator, told = merged(lora)
    assert told.startswith("not merged in memory: the logits of the first batch would differ by")
    assert asdict(generator.generate(QUESTIONS[:1], GenerationSettings(max_new_tokens=24))[0]) == alone(lora)[0]


def test_a_batch_file_goes_on_after_a_stop(
    cli: Callable, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": question} for question in QUESTIONS])
    args = ("generate", lora, "--input", source, "--batch-size", 2, "--max-new-tokens", 8)
    assert cli(*args, "--output", tmp_path / "whole.jsonl").code == 0
    asked: list[int] = []
    answers = TextGenerator.generate

    def stopped(self: TextGenerator, prompts: Sequence[Any], *more: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(self, prompts, *more, **options)

    monkeypatch.setattr(TextGenerator, "generate", stopped)
    ran = cli(*args, "--output", tmp_path / "out.jsonl")
    assert ran.code == 75
    assert f"stopped after 4 of {len(QUESTIONS)} answers (SIGTERM)\nrun the same command again to resume" in ran.err
    assert not (tmp_path / "out.jsonl").exists()
    other = cli(*args, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 1)
    assert other.code == 0, "other settings begin anew"
    assert not list(tmp_path.glob(".*"))

    asked.clear()
    assert cli(*args, "--output", tmp_path / "out.jsonl").code == 75
    asked[:] = [2, 2, 2]
    ran = cli(*args, "--output", tmp_path / "out.jsonl")
    assert ran.code == 0
    assert ran.err.startswith(f"4/{len(QUESTIONS)}\n")
    assert sum(asked[3:]) == len(QUESTIONS) - 4
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_answers_of_another_chat_template_begin_anew(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "README.md"):
        (tmp_path / name).write_text("before")
    before = content_key({"adapter": str(tmp_path)})
    (tmp_path / "README.md").write_text("after")
    assert content_key({"adapter": str(tmp_path)}) == before
    (tmp_path / "chat_template.jinja").write_text("after")
    assert content_key({"adapter": str(tmp_path)}) != before


def test_answers_hold_no_secret(cli: Callable, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_PASSWORD", "sun and moon 7")
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "say sun and moon 7"}])
    ran = cli("generate", lora, "--input", source, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    assert ran.code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "say ***"


def test_messages_in_a_batch_file(cli: Callable, said: Callable, lora: Path, tmp_path: Path) -> None:
    """A dataset's rows do, whose answer is left out."""
    asked = {"role": "user", "content": PAIRS[0][0]}
    rows = [MESSAGES[0], {"messages": [asked]}, {"messages": [{"role": "system", "content": "Be short."}, asked]}]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    ran = cli("generate", lora, "--input", source, "--output", target, "--max-new-tokens", 24)
    assert (ran.code, ran.out) == (0, f"{target}: 3 answers\n")
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[0] == answers[1] == said(lora, PAIRS[0][0])
    assert [answer["prompt"] for answer in answers] == [PAIRS[0][0]] * 3


def test_a_system_prompt(cli: Callable, said: Callable, lora: Path, tmp_path: Path) -> None:
    """It comes first, but for a row that has one of its own."""
    asked = {"role": "user", "content": PAIRS[0][0]}
    turns = [{"role": "system", "content": "Be short."}, asked]
    rows = [{"messages": turns}, {"prompt": PAIRS[0][0]}, {"messages": [asked]}]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    few = ("--max-new-tokens", 24)
    assert cli("generate", lora, "--system", "Be short.", "--input", source, "--output", target, *few).code == 0
    answers = {json.loads(line)["text"] for line in target.read_text().splitlines()}
    assert answers == {said(lora, PAIRS[0][0], "--system", "Be short.")["text"]}
    own = with_system(turns, "Be long.")
    assert own == turns
    assert with_system("Hi", "Be short.") == TextWithSystem("Hi", "Be short.")
    assert with_system(AlpacaExample("Hi", ""), "Be short.") == AlpacaExample("Hi", "", system="Be short.")


def test_plain_text_gets_no_chat_template(said: Callable, plain: Path, lora: Path) -> None:
    assert said(plain, PAIRS[0][0])["text"] == " " + PAIRS[0][1], "as it was trained"
    base = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    text, _ = greedy(base, PAIRS[0][0], {2})
    assert said(plain, PAIRS[0][0], "--no-adapter")["text"] == text
    assert said(lora, PAIRS[0][0], "--no-adapter")["text"] != text


def test_pushed_files_are_asked_as_the_run_folder_is(
    said: Callable, lora: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = [{"role": "system", "content": "Be kind."}]
    rows = [{"messages": [*kind, *row["messages"]]} for row in MESSAGES]
    for adapter in (lora, plain, run_recipe(write_recipe(tmp_path, rows=rows), *LONG).folder):
        pushed = tmp_path / f"{adapter.parent.name}-pushed"
        shutil.copytree(adapter, pushed, ignore=lambda folder, names: {*names} - {*SHARED_FILES})
        here = load_generator(str(adapter))
        assert load_generator(str(pushed)).form == here.form
        assert here.form.system == ("Be kind." if adapter.parent == tmp_path else "")
        answer = said(adapter, "Hello")
        assert said(pushed, "Hello") == answer
        example = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
        assert example
        code = example[1].replace("path/to/this/adapter", str(pushed)).replace("path/to/the/base/model", BASE)
        capsys.readouterr()
        exec(code.replace("max_new_tokens=64", "max_new_tokens=24"), {})
        assert capsys.readouterr().out.strip() == answer["text"].strip(), code


def test_encoder_decoder(said: Callable, translator: Path) -> None:
    answer = said(translator, PAIRS[0][0])
    assert (answer["text"], answer["finish_reason"]) == (PROMPTS[0]["completion"], "stop")
    base = trainkit.base_folder("t5", chat=False)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForSeq2SeqLM.from_pretrained(base)
    inputs = tokenizer(PAIRS[0][0], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    found = said(translator, PAIRS[0][0], "--no-adapter")
    assert found["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert found["tokens"] == len(ids) - 1


def test_another_base(cli: Callable, said: Callable, lora: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trainkit.base_folder(), moved)
    assert said(lora, QUESTIONS[0], "--base", moved) == said(lora, QUESTIONS[0])
    ran = cli("generate", lora, "--prompt", "x", "--base", trainkit.base_folder("gpt2"))
    assert ran.code == 4
    assert "target_modules" in ran.err


def test_failures(cli: Callable, lora: Path, plain: Path, tmp_path: Path) -> None:
    def fails(code: int, said: str, *args: object) -> None:
        ran = cli("generate", *args)
        assert ran.code == code, ran.err
        assert said in ran.err
        assert "Traceback" not in ran.err
        assert ran.out == ""
        assert not (tmp_path / "out.jsonl").exists()

    def batch(*lines: object) -> tuple[object, ...]:
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return ("--input", source, "--output", tmp_path / "out.jsonl")

    fails(2, "--output", lora, "--input", tmp_path / "x.jsonl")
    for option, value in (
        ("--seed", -1),
        ("--seed", 2**32),
        ("--temperature", 1e-40),
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--top-p", "nan"),
    ):
        fails(2, option, lora, "--prompt", "a", option, value)
    fails(2, "--prompt: is not UTF-8 text", lora, "--prompt", "a\udcff")
    fails(2, "is not open for writing", lora, "--input", tmp_path / "x.jsonl", "--output", "/dev/fd/99999")
    fails(2, "with --output, which may be - for stdin and stdout", lora)
    fails(2, "no tokens", plain, "--prompt", "")
    fails(3, "no such file", lora, "--input", tmp_path / "x.jsonl", "--output", tmp_path / "out.jsonl")
    fails(3, "in.jsonl:2", lora, *batch({"prompt": "a"}, {"question": "b"}))
    fails(3, "in.jsonl:1", lora, *batch({"messages": ["hello"]}))
    fails(3, "no turn to answer", lora, *batch({"messages": [{"role": "assistant", "content": "hello"}]}))
    fails(4, "adapter_config.json", tmp_path, "--prompt", "a")
    bare = trainkit.base_folder("llama", chat=False)
    fails(2, "no chat template", lora, "--base", bare, *batch({"messages": [{"role": "user", "content": "a"}]}))


# --- where answers end ------------------------------------------------------------------------------------------------

TURNS = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + 'END\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model without a template, whose own EOS is no end of any turn."""
    folder = tmp_path_factory.mktemp("endless") / "base"
    shutil.copytree(trainkit.base_folder(chat=False), folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 0}))
    return folder


@pytest.fixture(scope="module")
def teach(tmp_path_factory: pytest.TempPathFactory, endless: Path) -> Callable[..., Path]:
    """An adapter that learnt conversations in a template whose turns end with ``end``."""

    def teach(end: str, *new: str) -> Path:
        folder = tmp_path_factory.mktemp("taught")
        template = folder / "template.jinja"
        template.write_text(TURNS.replace("END", end))
        base = f"base_model={{name: {endless}, chat_template: {template}, new_tokens: {json.dumps(new)}}}"
        at_the_end = ("training.eval_strategy=steps", "training.eval_steps=30")
        return run_recipe(write_recipe(folder), base, *LONG, *at_the_end).folder

    return teach


@pytest.fixture(scope="module")
def with_new_tokens(teach: Callable) -> Path:
    return teach("<done>", "<done>", "<spare>")


@pytest.fixture(scope="module")
def with_old_token(teach: Callable) -> Path:
    return teach("<|im_end|>")


@pytest.fixture(scope="module")
def with_words(teach: Callable) -> Path:
    return teach("[end]")


@pytest.mark.parametrize("adapter", ["with_new_tokens", "with_old_token", "with_words"])
def test_an_answer_stops_where_training_ended_it(
    cli: Callable, said: Callable, request: pytest.FixtureRequest, adapter: str
) -> None:
    folder = request.getfixturevalue(adapter)
    answer = said(folder, PAIRS[0][0])
    assert (answer["text"], answer["finish_reason"]) == (PAIRS[0][1], "stop")
    words = len(AutoTokenizer.from_pretrained(folder)(PAIRS[0][1])["input_ids"])
    assert answer["tokens"] == words + 1 if adapter != "with_words" else words < answer["tokens"] <= words + 5
    printed = cli("generate", folder, "--prompt", PAIRS[0][0], "--max-new-tokens", 24)
    assert (printed.code, printed.out) == (0, PAIRS[0][1] + "\n")


def test_rows_of_a_batch_stop_each_at_its_own_end(cli: Callable, with_words: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": question} for question in QUESTIONS])
    target = tmp_path / "out.jsonl"
    args = ("--input", source, "--output", target, "--batch-size", 5, "--max-new-tokens", 24)
    assert cli("generate", with_words, *args).code == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == alone(with_words)
    assert len({row["tokens"] for row in rows}) > 1


def test_peft_stops_there_with_what_the_card_says(said: Callable, with_new_tokens: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(with_new_tokens).eval()
    tokenizer = AutoTokenizer.from_pretrained(with_new_tokens)
    done = tokenizer.convert_tokens_to_ids("<done>")
    card = (with_new_tokens / "README.md").read_text()
    assert f"model.generation_config.eos_token_id = [0, {done}]" in card
    model.generation_config.eos_token_id = [0, done]
    asked = [{"role": "user", "content": PAIRS[0][0]}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == PAIRS[0][1]
    assert ids[-1] == done


def test_the_base_model_alone_reads_prompts_with_new_tokens(said: Callable, with_new_tokens: Path) -> None:
    assert said(with_new_tokens, "What is <done>?", "--no-adapter")["text"] != PAIRS[0][1]


def test_evaluation_gives_what_training_measured(cli: Callable, with_new_tokens: Path) -> None:
    recipe = with_new_tokens / "recipe.yaml"
    ran = cli("evaluate", recipe, "--adapter", with_new_tokens, "--json")
    assert ran.code == 0, ran.err
    measured = trainkit.read_run(with_new_tokens)["eval"]["last"]
    assert json.loads(ran.out)["eval"]["last"] == pytest.approx(measured, rel=1e-5)


def test_the_end_of_text_ends_a_plain_answer_too(tmp_path: Path, endless: Path, said: Callable) -> None:
    folder = run_recipe(write_recipe(tmp_path, endless, PROMPTS), *LONG).folder
    assert said(folder, PAIRS[0][0])["finish_reason"] == "stop"


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|im_start|>", None])
def test_padding_changes_no_answer(generator: TextGenerator, pad: str | None) -> None:
    from peftcli.models.tokens import settle_pad

    settings = GenerationSettings(max_new_tokens=24)
    apart = [generator.generate([question], settings)[0] for question in QUESTIONS]
    generator.tokenizer.pad_token = pad
    settle_pad(generator.tokenizer, generator.model)
    assert generator.generate(QUESTIONS, settings) == apart


# --- what the model reads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    ("form", "prompt", "template", "count"),
    [
        (PromptForm(False), "Hi", "", 0),
        (PromptForm(False), "<s>Hi", "", 1),
        (PromptForm.of_rows("alpaca", {}, has_template=False), "Hi", "", 0),
        (PromptForm(True), "Hi", "{{ bos_token }}", 1),
        (PromptForm(True), "Hi", "", 0),
    ],
)
def test_bos_is_read_once(
    generator: TextGenerator,
    form: PromptForm,
    prompt: str,
    template: str,
    count: int,
    adds_bos: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokenizers import AddedToken, processors

    seen: list[list[int]] = []

    def generate(model: object, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr("peftcli.tasks.text.generation.generate", generate)
    tokenizer = trainkit.tokenizer()
    tokenizer.add_special_tokens({"bos_token": AddedToken("<s>", special=True)})
    bos = tokenizer.bos_token_id
    if adds_bos:
        single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
        tokenizer.backend_tokenizer.post_processor = single
    tokenizer.chat_template = template + trainkit.CHATML
    TextGenerator(generator.model, tokenizer, form, StopTokens()).generate([prompt], GenerationSettings())
    expected = count if form.chat else max(count, int(adds_bos))
    assert seen[0].count(bos) == expected
    assert seen[0].index(bos) == 0 if expected else bos not in seen[0]


# --- chat -------------------------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal, and what was shown on it."""

    def __init__(self) -> None:
        self.controller, self._terminal = pty.openpty()
        self.name = os.ttyname(self._terminal)
        self._shown: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def text(self) -> str:
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(self._shown).decode(errors="replace"))
        return plain.replace("\r\n", "\n")

    def type(self, line: str) -> None:
        os.write(self.controller, line.encode())

    def until(self, child: Child, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not happened():
            assert child.process.is_alive(), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def _read(self) -> None:
        while True:
            try:
                self._shown.append(os.read(self.controller, 4096))
            except OSError:
                return


def test_chat_on_a_terminal(said: Callable, lora: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    child = Child(tmp_path, "generate", lora, "--max-new-tokens", 24, terminal=terminal.name, env={"TERM": "dumb"})
    for turn, question in enumerate(QUESTIONS[:2], 1):
        terminal.until(child, lambda turn=turn: terminal.text.count("> ") == turn)
        terminal.type(question + "\n")
    terminal.until(child, lambda: terminal.text.count("> ") == 3)
    terminal.type("\n")
    assert child.wait() == 0, terminal.text
    lines = terminal.text.splitlines()
    assert lines[0] == "an empty line ends the chat"
    assert lines[1] == f"> {QUESTIONS[0]}"
    assert lines[2] == said(lora, QUESTIONS[0])["text"]
    assert lines[3] == f"> {QUESTIONS[1]}"


def test_what_is_typed_but_no_text_is_asked_again(lora: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    child = Child(tmp_path, "generate", lora, terminal=terminal.name, env={"TERM": "dumb"})
    terminal.until(child, lambda: terminal.text.count("> ") == 1)
    os.write(terminal.controller, b"caf\xe9\n")
    terminal.until(child, lambda: terminal.text.count("> ") == 2)
    assert "the input is not UTF-8 text" in terminal.text
    terminal.type("\n")
    assert child.wait() == 0, terminal.text


def test_the_end_of_input_ends_the_chat(lora: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    child = Child(tmp_path, "generate", lora, terminal=terminal.name, env={"TERM": "dumb"})
    terminal.until(child, lambda: "> " in terminal.text)
    terminal.type("\x04")
    assert child.wait() == 0


def test_chat_remembers(lora: Path) -> None:
    """The second turn is asked with the first before it."""
    generator = load_generator(str(lora))
    settings = GenerationSettings(max_new_tokens=8)
    first = {"role": "user", "content": QUESTIONS[0]}
    answer = {"role": "assistant", "content": PAIRS[0][1]}
    second = {"role": "user", "content": QUESTIONS[1]}
    long = generator.generate([[first, answer, second]], settings)[0]
    text = f"{chatml(QUESTIONS[0])}{PAIRS[0][1]}<|im_end|>\n{chatml(QUESTIONS[1])}"
    expected, tokens = greedy(generator.model, text, {2}, longest=8)
    assert (long.text, long.tokens, long.prompt) == (expected.strip(), tokens, QUESTIONS[1])
