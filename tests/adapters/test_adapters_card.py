from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.adapters.card import for_hub, read_info, render_card, write_card
from peftcli.errors import AdapterError

RUN: dict[str, Any] = {
    "recipe": {
        "base_model": {"name": "acme/tiny-base"},
        "task": "causal_lm",
        "method": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "dataset": {"train": "/home/someone/data/train.jsonl", "max_length": 512},
        "training": {
            "output_dir": "/home/someone/out",
            "learning_rate": 2e-4,
            "max_steps": -1,
            "seed": 7,
            "bf16": True,
        },
    },
    "base_model": {"name": "acme/tiny-base", "revision": None, "sha256": None},
    "data": {
        "files": ["/home/someone/data/train.jsonl"],
        "rows": 1400,
        "used": 1398,
        "dropped": {"too long": 2},
        "truncated": 3,
        "tokens": 90000,
        "targets": 40000,
        "eval": {"rows": 140, "used": 140, "dropped": {}, "truncated": 0, "tokens": 9000, "targets": 4000},
    },
    "parameters": {"trainable": 2359296, "all": 1231940608},
    "eval": {
        "first": {"eval_loss": 2.5},
        "last": {"eval_loss": 1.3},
        "best": {"eval_loss": 1.23456789},
        "best_step": 60,
        "kept": {"eval_loss": 1.23456789},
    },
    "train_loss": 1.05,
    "steps": {"done": 100, "total": 100},
    "versions": {"torch": "2.13.0", "peftcli": "0.1.0"},
}
CONFIG = {
    "base_model_name_or_path": "acme/tiny-base",
    "peft_type": "LORA",
    "peft_version": "0.13.0",
    "r": 8,
    "task_type": "CAUSAL_LM",
}


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def with_method(kind: str, task: str) -> dict[str, Any]:
    return {**RUN, "recipe": {**RUN["recipe"], "task": task, "method": {"type": kind}}}


def make_folder(path: Path, config: dict[str, Any], run: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    if run:
        (path / "run.json").write_text(json.dumps(run))
    return path


def test_the_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(render_card(RUN)) == {
        "base_model": "acme/tiny-base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:acme/tiny-base", "lora", "peftcli", "transformers"],
    }


def test_the_hubs_own_reader_accepts_it() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(render_card(RUN)).data
    assert (data.base_model, data.library_name, data.license) == ("acme/tiny-base", "peft", None)


def test_the_card_says_what_the_run_measured() -> None:
    card = render_card(RUN, plot=True)
    for row in (
        "| train | rows | 1,400 |",
        "| train | used | 1,398 |",
        "| train | dropped: too long | 2 |",
        "| eval | rows | 140 |",
        "| train | targets | 40,000 |",
        "| method.target_modules | q_proj, v_proj |",
        "| training.learning_rate | 0.0002 |",
        "| training.bf16 | true |",
        "| steps | 100 |",
        "| eval_loss | 2.5 | 1.23457 |",
        "| train_loss |  | 1.05 |",
        "| torch | 2.13.0 |",
    ):
        assert row in card
    assert "2,359,296 of 1,231,940,608 parameters were trained (0.192 %)" in card
    assert "![Loss by step](loss.png)" in card
    assert "max_steps" not in card


COMPARED: dict[str, Any] = {
    "rows": 200,
    "units": 180,
    "unit": "groups",
    "draws": 10000,
    "seconds": 12.3,
    "metrics": {
        "eval_loss": {
            "base": 3.3, "adapter": 2.26, "difference": -1.04, "low": -1.2, "high": -0.9, "verdict": "better"
        },
        "eval_token_accuracy": {
            "base": 0.4, "adapter": 0.41, "difference": 0.01, "low": -0.02, "high": 0.04, "verdict": "no_difference"
        },
    },
    "main": "eval_loss",
    "base_head_is_new": False,
    "outputs": [{"row": "/home/someone/data/eval.jsonl:1", "input": "secret", "base": "x", "adapter": "y"}],
}  # fmt: skip
FORGOTTEN: dict[str, Any] = {
    "texts": 200, "loss": 0.05, "low": 0.03, "high": 0.07, "kl": 0.04, "kept_tokens": 0.93,
    "groups": {"english": {"texts": 60, "loss": 0.04, "kl": 0.03, "kept_tokens": 0.94}},
}  # fmt: skip
PROVEN = {**RUN, "comparison": COMPARED, "forgetting": FORGOTTEN}


def test_the_card_compares_with_the_base_model_and_says_what_was_forgotten() -> None:
    data = {**RUN["data"], "sha256": {"/home/someone/data/train.jsonl": "ab" * 32}}
    run = {**PROVEN, "data": data}
    card = render_card(run)
    assert "| eval_loss | 3.3 | 2.26 | -1.04 | -1.2 to -0.9 | better |" in card
    assert "| eval_token_accuracy | 0.4 | 0.41 | 0.01 | -0.02 to 0.04 | no difference |" in card
    assert "on the same held-out rows; intervals by 10,000 draws of 180 groups." in card
    assert "| all | 200 | 0.05 | 0.04 | 0.93 |\n| english | 60 | 0.04 | 0.03 | 0.94 |" in card
    assert "rise of the cross-entropy (95 % interval 0.03 to 0.07)" in card
    assert f"| train | sha256 | {'ab' * 32} |" in card
    assert "someone" not in card
    assert "secret" not in card
    assert render_card({**RUN, "data": data}) == render_card(RUN), "the card of an older run"
    assert "so it guesses" in render_card({**run, "comparison": {**COMPARED, "base_head_is_new": True}})


def test_results_on_held_out_rows_are_in_the_model_index_unverified() -> None:
    from huggingface_hub import ModelCard

    results = ModelCard(render_card({**RUN, "comparison": COMPARED})).data.eval_results
    assert results is not None
    assert [(each.metric_type, each.metric_value, each.verified) for each in results] == [
        ("loss", 2.26, False),
        ("token_accuracy", 0.41, False),
    ]
    assert {(each.dataset_type, each.task_type) for each in results} == {("private", "text-generation")}
    of_hub = {**RUN, "recipe": {**RUN["recipe"], "dataset": {"train": "acme/rows"}}, "comparison": COMPARED}
    assert "type: acme/rows" in render_card(of_hub)
    local = {**of_hub, "data": {**RUN["data"], "sha256": {"acme/rows": "ab" * 32}}}
    assert "type: acme/rows" not in render_card(local)


def test_without_an_evaluation_before_training_no_column_is_empty() -> None:
    card = render_card({**RUN, "eval": {**RUN["eval"], "first": {}}})
    assert "| metric | this adapter |\n| --- | --- |\n| eval_loss | 1.23457 |\n| train_loss | 1.05 |\n" in card


@pytest.mark.parametrize(
    ("settings", "command", "call"),
    [
        ({}, "'a photo of sks dog'", 'pipeline(prompt="a photo of sks dog")'),
        ({"instance_prompt": 'my "cat"\n$HOME'}, """'my "cat" $HOME'""", r'pipeline(prompt="my \"cat\"\n$HOME")'),
    ],
)
def test_the_prompt_of_pictures_is_that_of_training(settings: dict[str, Any], command: str, call: str) -> None:
    run = {**with_method("lora", "text_to_image"), "task": {"type": "text_to_image", **settings}}
    card = render_card(run)
    assert f"peftcli predict path/to/this/adapter {command}\n" in card
    assert call in python_blocks(card)[0]


def test_no_plot_is_shown_that_is_not_there() -> None:
    assert "loss.png" not in render_card(RUN)


@pytest.mark.parametrize(
    "base", ["/home/someone/models/tiny-base", r"C:\Users\someone\tiny-base", "../someone/tiny-base"]
)
def test_no_folder_of_the_machine_is_named(base: str) -> None:
    run = {**RUN, "base_model": {"name": base}}
    run["recipe"] = {
        **RUN["recipe"],
        "method": {"type": "prompt_tuning", "tokenizer_name_or_path": "/home/someone/tok"},
    }
    card = render_card(run)
    assert "someone" not in card
    assert "tiny-base" in card
    assert "base_model" not in front_matter(card)


def test_a_regular_expression_is_shown_whole() -> None:
    run = {**RUN, "recipe": {**RUN["recipe"], "method": {"type": "lora", "target_modules": r".*\.(q|v)_proj"}}}
    assert r"| .*\.(q\|v)_proj |" in render_card(run)


def test_names_cannot_break_out_of_the_text() -> None:
    run = {**RUN, "base_model": {"name": 'a/b`\n# <script>\x1b"'}, "versions": {"torch|": "<b>"}}
    card = render_card(run)
    assert front_matter(card)["base_model"] == run["base_model"]["name"]
    body = card.split("---\n", 2)[2]
    assert "\n# <script>" not in body
    assert "\x1b" not in body
    assert r"| torch\| | \<b\> |" in body
    for block in python_blocks(card):
        ast.parse(block)


@pytest.mark.parametrize(
    ("task", "kind", "first_line"),
    [
        ("causal_lm", "lora", "from peft import AutoPeftModelForCausalLM"),
        ("causal_lm", "prompt_tuning", "from peftcli import AutoPeftModelForCausalLM"),
        ("seq2seq_lm", "lora", "from peft import AutoPeftModelForSeq2SeqLM"),
        ("", "lora", "from peft import AutoPeftModel"),
    ],
)
def test_the_example_fits_the_task(task: str, kind: str, first_line: str) -> None:
    import peft

    card = render_card(with_method(kind, task), adapter="me/mine")
    (block,) = python_blocks(card)
    ast.parse(block)
    assert block.splitlines()[0] == first_line
    assert hasattr(peft, first_line.split()[-1])
    assert '.from_pretrained("me/mine")' in block
    assert ("peftcli generate me/mine" in card) == (task in ("causal_lm", "seq2seq_lm"))


@pytest.mark.parametrize(("task", "chat"), [("causal_lm", False), ("causal_lm", True), ("seq2seq_lm", False)])
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, chat: bool) -> None:
    import peft
    import tokenizers
    import transformers

    monkeypatch.chdir(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"Hello": 0, "user": 1, "<pad>": 2}, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    sizes = {"vocab_size": 3, "pad_token_id": 2, "eos_token_id": 2}
    if task == "causal_lm":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, **sizes
            )
        )
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    else:
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=2, **sizes
            )
        )
        config = peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model.save_pretrained("acme/tiny-base")
    tokenizer.save_pretrained("acme/tiny-base")
    peft.get_peft_model(type(model).from_pretrained("acme/tiny-base"), config).save_pretrained("me/mine")

    monkeypatch.chdir("/")
    (block,) = python_blocks(render_card(with_method("lora", task), adapter="me/mine"))
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    new = found["tokens"].shape[1] - (2 if chat else 1)
    assert 1 <= new <= 64


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_card(make_folder(tmp_path / "a", CONFIG, RUN)).read_bytes()
    assert write_card(make_folder(tmp_path / "b", CONFIG, RUN)).read_bytes() == first
    assert first.decode() == render_card(RUN)


def test_without_run_json_the_config_says_what_there_is_to_say(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", CONFIG)
    card = write_card(folder).read_text()
    assert front_matter(card)["base_model"] == "acme/tiny-base"
    assert front_matter(card)["pipeline_tag"] == "text-generation"
    assert "| method.r | 8 |" in card
    assert "peft_version" not in card
    assert "## Results" not in card
    assert "## Training data" not in card
    assert read_info(folder)["recipe"]["task"] == "causal_lm"


@pytest.mark.parametrize(
    ("of_another", "task"),
    [
        ({"song": 1}, "causal_lm"),
        ({"lora_alpha": 0}, "causal_lm"),
        ({"init_lora_weights": "song"}, "causal_lm"),
        ({"peft_type": "SONG"}, "causal_lm"),
        ({"task_type": "SONG"}, ""),
    ],
)
def test_an_adapter_that_peftcli_does_not_load_has_a_card(
    of_another: dict[str, Any], task: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "adapter", {**CONFIG, **of_another})
    assert read_info(folder)["recipe"]["task"] == task
    assert for_hub(folder, "me/mine")


def test_a_name_without_an_owner_is_a_base_model_on_the_hub_only_where_it_is_of_transformers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {**CONFIG, "base_model_name_or_path": "tiny"})
    assert front_matter(write_card(folder).read_text())["base_model"] == "tiny"
    assert "base_model" not in front_matter(write_card(folder, tags=()).read_text())


def test_an_empty_folder_gives_a_valid_card(tmp_path: Path) -> None:
    card = render_card(read_info(tmp_path))
    assert front_matter(card) == {"library_name": "peft", "tags": ["peftcli", "transformers"]}


def test_the_uploaded_card_names_the_repository_unless_it_was_edited(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", CONFIG, RUN)
    write_card(folder)
    assert for_hub(folder, "me/mine") == render_card(RUN, adapter="me/mine")
    write_card(folder, {"transformers", "sft"})
    assert for_hub(folder, "me/mine") == render_card(RUN, adapter="me/mine", tags={"transformers", "sft"})
    (folder / "README.md").write_text("# My words\n")
    assert for_hub(folder, "me/mine") == "# My words\n"


def test_without_a_run_the_card_knows_the_task_by_its_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {**CONFIG, "task_type": "SEQ_CLS"})
    settings = {"labels": ["tea", "coffee", "juice"]}
    (folder / "task.json").write_text(json.dumps({"type": "sequence_classification", "settings": settings}))
    assert 'id2label=dict(enumerate(["tea", "coffee", "juice"]))' in render_card(read_info(folder))


def test_the_uploaded_card_names_the_base_model_on_the_hub(tmp_path: Path) -> None:
    base = "/home/someone/tiny"
    run = {**RUN, "base_model": {"name": base}}
    folder = make_folder(tmp_path / "a", {**CONFIG, "base_model_name_or_path": base}, run)
    write_card(folder)
    card = for_hub(folder, "me/mine", "acme/tiny")
    assert front_matter(card)["base_model"] == "acme/tiny"
    assert 'AutoTokenizer.from_pretrained("acme/tiny")' in card
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\nOn {base}.\n")
    card = for_hub(folder, "me/mine", "acme/tiny")
    assert front_matter(card) == {"license": "mit", "base_model": "acme/tiny"}
    assert card.endswith("---\nOn acme/tiny.\n")
    (folder / "README.md").write_text("# My words\n")
    assert for_hub(folder, "me/mine", "acme/tiny") == "---\nbase_model: acme/tiny\n---\n\n# My words\n"


NEW: dict[str, Any] = {
    **RUN,
    "recipe": {
        **RUN["recipe"],
        "base_model": {"name": "acme/tiny-base", "chat_template": "chatml", "new_tokens": ["<|a|>", "<b`>"]},
    },
    "eos_token_id": [0, 302],
}


def test_the_adapters_own_tokenizer_is_the_one_to_load() -> None:
    card = render_card(NEW, adapter="me/mine", processor=True)
    block = python_blocks(card)[0]
    ast.parse(block)
    assert 'tokenizer = AutoTokenizer.from_pretrained("me/mine")' in block
    assert "tiny-base" not in block
    assert (
        "The tokenizer is the adapter's own: it has the special tokens `<|a|>`, `<b>` and the chat template of its "
        "training." in card
    )
    assert "model.resize_token_embeddings(len(tokenizer))" in card
    assert 'AutoTokenizer.from_pretrained("acme/tiny-base")' in render_card(NEW)
    assert "own" not in render_card(NEW)


def test_a_tokenizer_that_only_has_another_template() -> None:
    base = {"name": "acme/tiny-base", "chat_template": "chatml", "new_tokens": []}
    card = render_card({**NEW, "recipe": {**RUN["recipe"], "base_model": base}}, processor=True)
    assert "The tokenizer is the adapter's own: it has the chat template of its training." in card
    assert "resize_token_embeddings" not in card
    assert "The tokenizer is the adapter's own.\n" in render_card(RUN, processor=True)


def test_a_model_is_told_where_answers_end_if_it_does_not_know() -> None:
    line = "model.generation_config.eos_token_id = [0, 302]"
    for card in (render_card(NEW), render_card(NEW, processor=True)):
        block = python_blocks(card)[0]
        ast.parse(block)
        assert block.index("from_pretrained") < block.index(line) < block.index(".generate(")
    assert "eos_token_id" not in render_card(RUN)


def test_the_folder_says_whether_it_holds_a_tokenizer(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", CONFIG, NEW)
    assert "own" not in write_card(folder).read_text()
    (folder / "tokenizer_config.json").write_text("{}")
    assert "The tokenizer is the adapter's own" in write_card(folder).read_text()
    assert for_hub(folder, "me/mine") == render_card(NEW, adapter="me/mine", processor=True)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a pipe"),
    "a folder": (Path.mkdir, "is a folder"),
    "larger than any": (lambda path: path.write_bytes(b"") or os.truncate(path, 1 << 40), "at most"),
}


@pytest.mark.parametrize("name", ["run.json", "README.md"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    make, message = BAD_FILES[kind]
    folder = make_folder(tmp_path / "a", CONFIG)
    make(folder / name)
    with pytest.raises(AdapterError, match=f"{name}: .*{message}"):
        for_hub(folder, "me/mine")


def test_a_run_json_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", CONFIG)
    (folder / "run.json").write_text("[" * 200_000)
    with pytest.raises(AdapterError, match=r"run\.json: not valid JSON: nested deeper"):
        read_info(folder)


def paths(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """To everything in nested objects."""
    inner = {key: paths(value) if isinstance(value, dict) else [] for key, value in values.items()}
    return [(key, *path) for key, found in inner.items() for path in [(), *found]]


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("path", paths(PROVEN), ids=".".join)
def test_anything_may_stand_in_a_run_json(tmp_path: Path, path: tuple[str, ...]) -> None:
    for number, junk in enumerate(("x", 3, -1.5, True, None, [], ["x"], {"x": "y"}, 10**400)):
        run = json.loads(json.dumps(PROVEN))
        within = run
        for key in path[:-1]:
            within = within[key]
        within[path[-1]] = junk
        folder = make_folder(tmp_path / str(number), CONFIG, run)
        (folder / "tokenizer_config.json").write_text("{}")
        assert front_matter(for_hub(folder, "me/mine"))["library_name"] == "peft"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("date: 2024-13-45", "month must be in"),
        ("a: " + "[" * 1000, "recursion"),
        ("a: b\nb: [", r"README\.md:4: .*expected the node content"),
        ("- a", "no mapping"),
        ("{a: 1}: 2", "unhashable"),
        ("a: !!python/name:os.system", "constructor"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}", "merge"),
        ("a: 1\n" * 30_000, "more than 100,000 characters"),
    ],
)
def test_front_matter_that_cannot_be_changed_is_said(tmp_path: Path, head: str, message: str) -> None:
    folder = make_folder(tmp_path / "a", CONFIG)
    (folder / "README.md").write_text(f"---\n{head}\n---\n# My words\n")
    assert for_hub(folder, "me/mine").endswith("# My words\n"), "pushed as it is"
    with pytest.raises(AdapterError, match=message) as caught:
        for_hub(folder, "me/mine", "acme/x")
    assert caught.value.file == str(folder / "README.md")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\r\nlicense: mit\r\n---\r\nHi\r\n", "---\nlicense: mit\nbase_model: acme/x\n---\nHi\n"),
        ("\ufeff---\nlicense: mit\n---\nHi\n", "---\nlicense: mit\nbase_model: acme/x\n---\nHi\n"),
        ("---\nlicense: mit\n---", "---\nlicense: mit\nbase_model: acme/x\n---\n"),
        ("---\n---\nHi\n", "---\nbase_model: acme/x\n---\nHi\n"),
        ("---\ndate: 2024-01-05\n---\n", "---\ndate: 2024-01-05\nbase_model: acme/x\n---\n"),
        ("# Hi\n\n---\na: b\n---\n", "---\nbase_model: acme/x\n---\n\n# Hi\n\n---\na: b\n---\n"),
    ],
)
def test_front_matter_of_any_writer_is_kept(tmp_path: Path, card: str, expected: str) -> None:
    folder = make_folder(tmp_path / "a", CONFIG)
    (folder / "README.md").write_bytes(card.encode())
    assert for_hub(folder, "me/mine", "acme/x") == expected
