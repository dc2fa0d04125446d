"""Chat templates and new tokens of a recipe: in the tokenizer, in the model, in the adapter's file, and padding."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import randomise
from opened import empty_model, load_model, load_tokenizer
from oracle import silence
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from peftcli.adapters.merge import merge_adapter
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.data.rows import Place, Row, Table
from peftcli.data.store import Example
from peftcli.errors import AdapterError, ModelError
from peftcli.guard.adapter_folder import find_weights, read_header
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.lora import LoraConfig
from peftcli.methods.trainable_tokens import TrainableTokensConfig
from peftcli.models import tokens
from peftcli.schema import BaseModel, Source
from peftcli.tasks import settings as task_settings
from peftcli.tasks.causal_lm import CausalLM

NEW = ["<tool>", "<done>"]
VOCABULARY = 300
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
IDS[0, 4], IDS[1, 7], IDS[1, 8] = VOCABULARY, VOCABULARY + 1, VOCABULARY
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So"}]
AUTO = {"t5": AutoModelForSeq2SeqLM}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def base_folder(kind: str) -> Path:
    """As trainkit's, and a Gemma with tied embeddings, a model whose head has a bias, one with rows to spare."""
    made: dict[str, Any] = {
        "gemma": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**_SIZES, head_dim=8, vocab_size=VOCABULARY, sliding_window=16, pad_token_id=0)
        ),
        "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES, vocab_size=VOCABULARY, resid_pdrop=0.0)),
    }
    if kind not in made and kind != "roomy":
        return trainkit.base_folder(kind, chat=kind != "t5")
    folder = trainkit.scratch() / f"tokens-{kind}"
    if not folder.exists():
        model = trainkit.build("llama_tied") if kind == "roomy" else made[kind]()
        if kind == "phi":
            nn.init.normal_(model.lm_head.bias)
        if kind == "roomy":
            model.resize_token_embeddings(VOCABULARY + 20, mean_resizing=False)
        model.save_pretrained(folder)
        trainkit.tokenizer().save_pretrained(folder)
    return folder


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def with_new(kind: str, **more: Any) -> BaseModel:
    return BaseModel(name=str(base_folder(kind)), new_tokens=NEW, **more)


def loaded(kind: str) -> Any:
    name = AUTO.get(kind, AutoModelForCausalLM).__name__
    return load_model(BaseModel(name=str(base_folder(kind))), name, torch.float32).eval()


def prepared(kind: str, config: Any) -> tuple[Any, Any]:
    """The base model with room for the new tokens, their tokenizer; nothing is injected yet."""
    base, model = with_new(kind), loaded(kind)
    tokenizer = load_tokenizer(base)
    tokens.make_room(model, tokenizer, config, base)
    return model, tokenizer


def adapter(folder: Path, kind: str, **settings: Any) -> tuple[Path, Any]:
    """The folder of an adapter with new tokens whose weights are random, and the model that it is in."""
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    config = LoraConfig(task_type=task, base_model_name_or_path=str(base_folder(kind)), **settings)
    model, tokenizer = prepared(kind, config)
    inject(model, config)
    randomise(model)
    save_adapter(model, config, folder)
    tokens.save_with_adapter(folder, tokenizer, with_new(kind))
    return folder, model.eval()


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(
        input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    ).logits.float()


# --- the chat template ------------------------------------------------------------------------------------------------


def test_chatml_over_a_tokenizer_that_has_its_marks() -> None:
    tokenizer: Any = load_tokenizer(BaseModel(name=str(trainkit.base_folder()), chat_template="chatml"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False).endswith("Yes.<|im_end|>\n")


def test_chatml_brings_its_marks_as_new_tokens(tmp_path: Path) -> None:
    base = saved(tmp_path, fast("llama"))
    marks = ["<|im_start|>", "<|im_end|>"]
    with pytest.raises(ModelError) as caught:
        load_tokenizer(BaseModel(name=str(base), chat_template="chatml"))
    assert caught.value.key == "base_model.chat_template"
    assert "<|im_start|> and <|im_end|>, which are not tokens of" in caught.value.message
    assert caught.value.hint == f"add what is missing: base_model.new_tokens: {marks}"
    with pytest.raises(ModelError, match=r"needs <\|im_end\|>, which is not a token") as caught:
        load_tokenizer(BaseModel(name=str(base), chat_template="chatml", new_tokens=marks[:1]))
    tokenizer: Any = load_tokenizer(BaseModel(name=str(base), chat_template="chatml", new_tokens=marks))
    ids = tokenizer.apply_chat_template(CHAT[:1])["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(marks)
    assert [each for each in ids if each in (start, end)] == [start, end]
    assert tokenizer.eos_token_id == end


@pytest.mark.parametrize("adds_bos", [True, False])
def test_chatml_writes_bos_where_the_model_is_used_to_it(tmp_path: Path, adds_bos: bool) -> None:
    base = saved(tmp_path, fast("gemma", adds_bos=adds_bos))
    spec = BaseModel(name=str(base), chat_template="chatml", new_tokens=["<|im_start|>", "<|im_end|>"])
    text = load_tokenizer(spec).apply_chat_template(CHAT[:1], tokenize=False)
    assert text == "<s>" * adds_bos + "<|im_start|>user\nHi<|im_end|>\n"


def test_chatml_does_not_drop_tools_in_silence() -> None:
    tokenizer: Any = load_tokenizer(BaseModel(name=str(trainkit.base_folder()), chat_template="chatml"))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages, more in (([CHAT[0], call], {}), (CHAT[:1], {"tools": [{"type": "function"}]})):
        with pytest.raises(Exception, match="ChatML has no words for tool"):
            tokenizer.apply_chat_template(messages, tokenize=False, **more)


def test_a_file_takes_the_place_of_the_template(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    file.write_text(text, encoding="utf-8-sig")
    tokenizer: Any = load_tokenizer(BaseModel(name=str(trainkit.base_folder()), chat_template=str(file)))
    assert tokenizer.chat_template == text
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Hi"
    assert tokenizer.eos_token_id == load_tokenizer(BaseModel(name=str(trainkit.base_folder()))).eos_token_id


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a\n{% for m in messages %}\n{{ m.content }\n{% endfor %}", 3, "unexpected '}'"),
        ("{% for m in messages %}", 1, "Unexpected end of template"),
        ("\n{{ messages | shout }}", 2, "No filter named 'shout'"),
        (" \n", None, "is empty"),
        (b"\xff\xfe", None, "cannot be read"),
        (None, None, "no such file"),
    ],
)
def test_a_bad_file_is_named_with_its_line_before_anything_is_loaded(
    tmp_path: Path, content: str | bytes | None, line: int | None, message: str
) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(BaseModel(name="no/such-model", chat_template=str(file)))
    found = caught.value
    assert (found.file, found.line, found.key) == (str(file), line, "base_model.chat_template")
    assert len(str(found).splitlines()) == 1


# --- new tokens -------------------------------------------------------------------------------------------------------


def test_new_tokens_come_last_and_stand_for_themselves() -> None:
    tokenizer: Any = load_tokenizer(with_new("llama"))
    assert tokenizer.convert_tokens_to_ids(NEW) == [VOCABULARY, VOCABULARY + 1]
    ids = tokenizer("red<tool> fox<done>")["input_ids"]
    assert [each for each in ids if each >= VOCABULARY] == [VOCABULARY, VOCABULARY + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red fox"
    assert tokenizer.backend_tokenizer.to_str() == load_tokenizer(with_new("llama")).backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (["<|im_end|>"], r"'<\|im_end\|>' is a token of .* already, number 2"),
        (["a"], "'a' is a token of .* already"),
    ],
)
def test_tokens_that_are_not_new_are_refused(new: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(BaseModel(name=str(trainkit.base_folder()), new_tokens=new))
    assert caught.value.key == "base_model.new_tokens"


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gemma", "phi", "t5"])
def test_the_vocabulary_grows_by_their_rows(kind: str) -> None:
    before, (model, tokenizer) = loaded(kind), prepared(kind, LoraConfig())
    assert model.config.vocab_size == len(tokenizer) == VOCABULARY + 2
    for old, new in zip(ends(before), ends(model), strict=True):
        assert new.weight.shape[0] == VOCABULARY + 2
        torch.testing.assert_close(new.weight[:VOCABULARY], old.weight, atol=0, rtol=0)
        mean = old.weight.mean(dim=0)
        torch.testing.assert_close(new.weight[VOCABULARY:], torch.stack([mean, mean]))
        if getattr(old, "bias", None) is not None:
            torch.testing.assert_close(new.bias[VOCABULARY:], old.bias.mean().expand(2))
    first, last = ends(model)
    assert (first.weight is last.weight) == (len({id(end.weight) for end in ends(before)}) == 1)
    torch.testing.assert_close(logits(model, IDS % 7)[..., :VOCABULARY], logits(before, IDS % 7))


def ends(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def test_rows_to_spare_are_used_and_start_as_the_mean_too() -> None:
    model, _ = prepared("roomy", config := LoraConfig())
    assert model.config.vocab_size == ends(model)[0].weight.shape[0] == VOCABULARY + 20
    assert config.trainable_token_indices == [VOCABULARY, VOCABULARY + 1]
    before, weight = ends(loaded("roomy"))[0].weight, ends(model)[0].weight
    torch.testing.assert_close(weight[VOCABULARY], before[:VOCABULARY].mean(dim=0))
    untouched = [row for row in range(len(before)) if row not in (VOCABULARY, VOCABULARY + 1)]
    assert torch.equal(weight[untouched], before[untouched])


NAMED: list[tuple[str, Any, dict[str, Any]]] = [
    *(
        (kind, LoraConfig(trainable_token_indices=given), {"trainable_token_indices": expected})
        for kind, given, expected in (
            ("llama_tied", None, [300, 301]),
            ("llama_tied", [5, 7], [5, 7, 300, 301]),
            ("llama_tied", {"embed_tokens": [5]}, [5, 300, 301]),
            ("llama", None, {"embed_tokens": [300, 301], "lm_head": [300, 301]}),
            ("llama", [5], {"embed_tokens": [5, 300, 301], "lm_head": [300, 301]}),
            ("llama", {"lm_head": [5, 300]}, {"lm_head": [5, 300, 301], "embed_tokens": [300, 301]}),
            ("gpt2", None, [300, 301]),
            ("t5", None, [300, 301]),
        )
    ),
    *(  # what trains in full needs no rows of its own
        (kind, LoraConfig(modules_to_save=saved, **more), {"trainable_token_indices": left})
        for kind, saved, more, left in (
            ("llama", ["embed_tokens", "lm_head"], {}, None),
            ("llama", ["embed_tokens"], {}, {"lm_head": [300, 301]}),
            ("llama_tied", ["embed_tokens", "lm_head"], {}, None),
            ("llama_tied", ["embed_tokens"], {"ensure_weight_tying": True}, None),
        )
    ),
    ("llama", IA3Config(modules_to_save=["embed_tokens", "lm_head"]), {}),
    *(
        (kind, TrainableTokensConfig(token_indices=[4]), {"token_indices": [4, 300, 301], "target_modules": targets})
        for kind, targets in (("llama", ["embed_tokens", "lm_head"]), ("llama_tied", ["embed_tokens"]))
    ),
]


@pytest.mark.parametrize(("kind", "config", "expected"), NAMED)
def test_the_config_names_the_rows(kind: str, config: Any, expected: dict[str, Any]) -> None:
    config = dataclasses.replace(config)
    prepared(kind, config)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gemma", "t5"])
def test_only_their_rows_train(kind: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear")
    model, _ = prepared(kind, config)
    inject(model, config)
    rows = {name: value for name, (_, _, value) in named_tensors(model).items() if "lora" not in name}
    assert {tuple(value.shape) for value in rows.values()} == {(2, 32)}
    assert len(rows) == (2 if kind == "llama" else 1)
    trained = {value for _, _, value in named_tensors(model).values()}
    assert {value for value in model.parameters() if value.requires_grad} == trained
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((value.grad.abs().sum(dim=1) > 0).all() for value in rows.values())


@pytest.mark.parametrize(
    ("kind", "config", "key", "message"),
    [
        ("llama", IA3Config(), "base_model.new_tokens", r"IA3 .* in model\.embed_tokens, lm_head"),
        ("llama", IA3Config(modules_to_save=["lm_head"]), "base_model.new_tokens", r"in model\.embed_tokens\n"),
        ("llama_tied", LoraConfig(modules_to_save=["embed_tokens"]), "base_model.new_tokens", "in lm_head"),
        ("llama", LoraConfig(target_modules=["q_proj", "lm_head"]), "target_modules", "names lm_head"),
        ("llama", LoraConfig(target_modules=r".*embed_tokens"), "target_modules", r"names model\.embed_tokens"),
    ],
)
def test_what_would_not_train_them_is_refused(kind: str, config: Any, key: str, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        prepared(kind, dataclasses.replace(config))
    assert caught.value.key == key
    assert "modules_to_save" in str(caught.value.hint)


def test_the_refusal_names_the_methods_that_can() -> None:
    can = [
        name
        for name, method in METHODS.items()
        for entry in dataclasses.fields(method.config_class())
        if entry.name == "trainable_token_indices" and not entry.metadata.get("unsupported")
    ]
    with pytest.raises(AdapterError) as caught:
        prepared("llama", IA3Config())
    assert str(caught.value.hint).endswith(f"method.type: {', '.join(can)} can train single rows")


def test_a_recipe_without_new_tokens_changes_nothing() -> None:
    base, model, config = BaseModel(name=str(base_folder("llama"))), loaded("llama"), LoraConfig()
    tokens.make_room(model, load_tokenizer(base), config, base)
    tokens.grow_for(model, load_tokenizer(base), base)
    assert ends(model)[0].weight.shape[0] == VOCABULARY
    assert config == LoraConfig()


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "t5"])
def test_it_works_out_on_a_model_without_weights(kind: str) -> None:
    base, config = with_new(kind), LoraConfig(target_modules="all-linear")
    model = empty_model(base, AUTO.get(kind, AutoModelForCausalLM).__name__)
    tokens.make_room(model, load_tokenizer(base), config, base)
    real, same = prepared(kind, LoraConfig(target_modules="all-linear"))[0], inject(model, config)
    assert same.trainable == inject(real, LoraConfig(**vars(config))).trainable


# --- the adapter's folder and its readers -----------------------------------------------------------------------------

READ: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama_tied", {}),
    ("gpt2", {}),
    ("gemma", {}),
    ("roomy", {}),
    ("t5", {}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"]}),
    ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
]


@pytest.mark.grid
@pytest.mark.parametrize(("kind", "settings"), READ)
def test_peft_reads_it(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder, model = adapter(tmp_path, kind, **settings)
    expected = logits(model)
    auto = peft.AutoPeftModelForSeq2SeqLM if kind == "t5" else peft.AutoPeftModelForCausalLM
    torch.testing.assert_close(logits(auto.from_pretrained(folder).eval()), expected, atol=1e-5, rtol=1e-5)
    base = loaded(kind)
    if kind != "roomy":
        base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    with silence():
        found = peft.PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)


def test_the_file_holds_only_the_new_rows(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path, "llama")
    held = {
        name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora" not in name
    }
    rows = "token_adapter.trainable_tokens_delta"
    assert set(held) == {f"base_model.model.model.embed_tokens.{rows}", f"base_model.model.lm_head.{rows}"}
    assert {tuple(value.shape) for value in held.values()} == {(2, 32)}


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(("kind", "settings"), [*READ, ("phi", {})])
def test_we_read_it_and_grow_the_base_model_ourselves(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder, model = adapter(tmp_path, kind, **settings)
    found, config = loaded(kind), config_from_dict(read_config(folder))
    rows = tokens.fit_adapter(found, config, read_header(find_weights(folder)))
    assert rows == (None if kind == "roomy" else VOCABULARY + 2)
    load_adapter(found, config, folder)
    torch.testing.assert_close(logits(found.eval()), logits(model), atol=1e-6, rtol=1e-6)
    tokenizer: Any = load_tokenizer(BaseModel(name=str(base_folder(kind))), folder)
    assert tokenizer("a<tool>")["input_ids"][-1] == VOCABULARY


@pytest.mark.grid
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("kind", "settings"), [*READ, ("phi", {})])
def test_the_merged_model_holds_them(
    tmp_path: Path, kind: str, settings: dict[str, Any], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = adapter(tmp_path / "adapter", kind, **settings)
    if whole:
        monkeypatch.setattr("peftcli.adapters.merge._stream", lambda *_: None)
    made = merge_adapter(str(folder), tmp_path / "merged")
    merged, report = AUTO.get(kind, AutoModelForCausalLM).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    torch.testing.assert_close(logits(merged.eval()), logits(model), atol=1e-4, rtol=1e-4)
    tied = len({id(end.weight) for end in ends(loaded(kind))}) == 1
    assert merged.config.vocab_size == VOCABULARY + (20 if kind == "roomy" else 2)
    assert (ends(merged)[0].weight is ends(merged)[1].weight, made["untied"]) == (tied, False)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a<tool>")["input_ids"][-1] == VOCABULARY


def test_shards_are_merged_one_by_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    trainkit.build("llama").save_pretrained(base, max_shard_size="40KB")
    trainkit.tokenizer().save_pretrained(base)
    folder, model = adapter(tmp_path / "adapter", "llama")
    made = merge_adapter(str(folder), tmp_path / "merged", base=str(base))
    assert made["shards"] == len(list(base.glob("*.safetensors"))) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)


def test_a_file_cannot_ask_for_any_number_of_rows(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path, "llama_tied")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | {"trainable_token_indices": [300, 10**12]}))
    model, config = loaded("llama_tied"), config_from_dict(read_config(folder))
    assert tokens.fit_adapter(model, config, read_header(find_weights(folder))) is None
    with pytest.raises(AdapterError, match="has the tokens 0 to 299, not 300"):
        load_adapter(model, config, folder)


@pytest.mark.parametrize("shape", [(2_000_000, 0), (2_000_000,), (0, 2_000_000), (2_000_000, 32, 0)])
def test_rows_that_the_file_does_not_hold_are_not_believed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model, config = loaded("llama"), LoraConfig(target_modules=["embed_tokens"])
    inject(model, config)
    save_adapter(model, config, tmp_path)
    name, file = "base_model.model.model.embed_tokens.base_layer.weight", tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.ones(shape, dtype=torch.uint8)}, file)
    fresh = loaded("llama")
    assert tokens.fit_adapter(fresh, config, read_header(find_weights(tmp_path))) is None
    assert fresh.get_input_embeddings().weight.shape[0] == VOCABULARY
    with pytest.raises(AdapterError, match=name):
        load_adapter(fresh, config, tmp_path)


def test_a_tokenizer_cannot_ask_for_any_number_of_rows(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path, "llama")
    model = loaded("llama")
    tokens.fit_tokenizer(model, load_tokenizer(BaseModel(name=str(trainkit.base_folder())), folder), folder)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 2
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"]["vocab"]["far"] = 20_000_000
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(AdapterError, match="has a token 20,000,000, far beyond the 302 rows of the base model"):
        tokens.fit_tokenizer(model, load_tokenizer(BaseModel(name=str(trainkit.base_folder())), folder), folder)


def test_an_adapter_without_rows_of_its_own_changes_nothing(tmp_path: Path) -> None:
    model, config = loaded("llama"), LoraConfig(modules_to_save=["lm_head"])
    inject(model, config)
    save_adapter(model, config, tmp_path)
    fresh = loaded("llama")
    assert (
        tokens.fit_adapter(fresh, config_from_dict(read_config(tmp_path)), read_header(find_weights(tmp_path))) is None
    )
    assert ends(fresh)[0].weight.shape[0] == VOCABULARY


def test_the_tokenizer_is_saved_where_it_is_not_the_base_models(tmp_path: Path) -> None:
    name = str(trainkit.base_folder())
    assert tokens.save_with_adapter(tmp_path, load_tokenizer(BaseModel(name=name)), BaseModel(name=name)) == []
    assert not list(tmp_path.iterdir())
    for number, base in enumerate((with_new("llama"), BaseModel(name=name, chat_template="chatml"))):
        folder, tokenizer = tmp_path / str(number), load_tokenizer(base)
        names = tokens.save_with_adapter(folder, tokenizer, base)
        assert names == sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        found: Any = load_tokenizer(BaseModel(name=str(trainkit.base_folder())), folder)
        assert found.chat_template == tokenizer.chat_template
        assert found.special_tokens_map == tokenizer.special_tokens_map
        text = "a red fox<tool><|im_end|> north"
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert not any(name in path.read_text() for path in folder.iterdir()), "no path of this machine"
        assert "local" not in (folder / "tokenizer_config.json").read_text()


def test_a_folder_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    described = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="cannot load"):
        load_tokenizer(BaseModel(name=str(trainkit.base_folder())), tmp_path)


def test_the_base_models_tokenizer_is_the_adapters_where_it_has_none(tmp_path: Path) -> None:
    spec = BaseModel(name=str(trainkit.base_folder()), new_tokens=["<a>"])
    assert len(load_tokenizer(spec, tmp_path)) == VOCABULARY + 1


# --- padding ----------------------------------------------------------------------------------------------------------


def unsaved(**settings: Any) -> Any:
    tokenizer = trainkit.tokenizer()
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("settings", "rows", "pad", "said"),
    [
        ({}, 300, "<|endoftext|>", None),
        ({"pad_token": "<|im_end|>"}, 300, "<|im_end|>", None),  # EOS itself
        ({"pad_token": None}, 300, "<|im_end|>", "has no pad token; <|im_end|> is used"),
        ({"pad_token": None, "eos_token": None, "unk_token": "a"}, 300, "a", "has no pad token; a is used"),
        ({"pad_token": None, "eos_token": None}, 300, "<|endoftext|>", "has no pad token; <|endoftext|> is used"),
        ({"unk_token": "a", "pad_token": "a"}, 300, "a", None),
        ({"pad_token": "~"}, 90, "<|im_end|>", "pads with token 96, of which the model has no row"),
    ],
)
def test_the_pad_token_is_one_that_the_model_has(settings: Any, rows: int, pad: str, said: str | None) -> None:
    tokenizer, model = unsaved(**settings), loaded("llama")
    model.set_input_embeddings(nn.Embedding(rows, 32))
    note = tokens.settle_pad(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert note is None if said is None else said in note
    assert tokens.settle_pad(tokenizer, model) is None


def causal_lm(tokenizer: Any) -> CausalLM:
    return CausalLM(task_settings.CausalLMSettings(), tokenizer, None)


def features(tokenizer: Any, rows: list[dict[str, Any]]) -> list[Example]:
    task = causal_lm(tokenizer)
    reader = task.read(Table(Source(train="rows"), "rows", tuple(rows[0])))
    outcomes = task.encode([Row(values, Place("rows", number)) for number, values in enumerate(rows, 1)], reader)
    return [outcome.examples[0] for outcome in outcomes]


@pytest.mark.parametrize("rows", [trainkit.MESSAGES[:3], trainkit.PROMPTS[:3]])
def test_eos_is_trained_where_it_pads_too(rows: list[dict[str, Any]]) -> None:
    tokenizer = unsaved(pad_token="<|im_end|>")
    encoded = features(tokenizer, rows)
    batch = causal_lm(tokenizer).collate(encoded, training=True)
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    assert (batch["labels"] == eos).sum(dim=1).tolist() == [1, 1, 1]
    for feature, labels, mask in zip(encoded, batch["labels"], batch["attention_mask"], strict=True):
        size = len(feature.arrays["labels"])
        assert labels[:size].tolist() == feature.arrays["labels"]
        assert (labels[size:] == -100).all()
        assert mask.tolist() == [1] * size + [0] * (len(labels) - size)
    task = causal_lm(tokenizer)
    packed = task.collate([task.join(encoded[:2]), task.join(encoded[2:])], training=True)
    assert (packed["labels"] == eos).sum(dim=1).tolist() == [2, 1]
    assert (packed["labels"][1, encoded[2].size :] == -100).all()
    assert packed["position_ids"][1, encoded[2].size] == 0, "padding is nobody's"


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>", "a"])
@pytest.mark.parametrize("configured", [None, 7])
def test_which_token_pads_changes_no_loss(pad: str, configured: int | None) -> None:
    model = loaded("llama")
    model.config.pad_token_id = configured
    task = causal_lm(unsaved())
    apart = [task.loss(model, task.collate([each], training=True)) for each in some()]
    batch = causal_lm(unsaved(pad_token=pad)).collate(some(), training=True)
    expected = sum(float(each.total.detach()) for each in apart)
    assert float(task.loss(model, batch).total.detach()) == pytest.approx(expected, rel=1e-5)


def some() -> list[dict[str, list[int]]]:
    return features(unsaved(), trainkit.MESSAGES[:4])


# --- BOS --------------------------------------------------------------------------------------------------------------


def fast(style: str, adds_bos: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """A small tokenizer that adds BOS in its post-processor: over bytes as Llama 3's, or over pieces as Gemma's."""
    special = ["<unk>", "<s>", "</s>", "<turn>", "</turn>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet: list[str] = []
    if style == "llama":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words = [text for pair in trainkit.PAIRS for text in pair] + ["user\nmodel\nassistant\n Hi Yes. So"]
    backend.train_from_iterator(words, trainer)
    if adds_bos:
        bos = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model folder, as far as tokenizers go."""
    shutil.copy(trainkit.base_folder() / "config.json", folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("style", ["llama", "gemma"])
@pytest.mark.parametrize("template", [WRITES_BOS, WRITES_BOS.replace("{{ bos_token }}", "")])
def test_a_conversation_has_the_bos_of_its_template(style: str, template: str) -> None:
    tokenizer = fast(style, template=template)
    (feature,) = features(tokenizer, trainkit.MESSAGES[:1])
    expected = int("bos_token" in template)
    assert feature.arrays["input_ids"].count(tokenizer.bos_token_id) == expected
    assert feature.arrays["input_ids"][:1] == [tokenizer.bos_token_id] or not expected


@pytest.mark.parametrize("style", ["llama", "gemma"])
@pytest.mark.parametrize("written", ["", "<s>"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_pair_has_one_bos_whether_its_text_begins_with_it_or_not(style: str, written: str, adds_bos: bool) -> None:
    tokenizer = fast(style, adds_bos)
    (feature,) = features(tokenizer, [{"prompt": f"{written}What follows?", "completion": " tea"}])
    ids, labels = feature.arrays["input_ids"], feature.arrays["labels"]
    assert ids.count(tokenizer.bos_token_id) == int(adds_bos or bool(written))
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id
    trained = [each for each in labels if each != -100]
    assert tokenizer.decode(trained) == " tea</s>"


def test_bias_of_a_head_is_kept_by_streaming(tmp_path: Path) -> None:
    """It stands in another shard than the head's weight."""
    base = tmp_path / "base"
    shutil.copytree(base_folder("phi"), base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = {key: f"model-0000{1 + (key == 'lm_head.bias')}-of-00002.safetensors" for key in tensors}
    for shard in set(index.values()):
        save_file({key: tensors[key] for key in tensors if index[key] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    folder, model = adapter(tmp_path / "adapter", "phi")
    assert merge_adapter(str(folder), tmp_path / "merged", base=str(base))["shards"] == 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)
