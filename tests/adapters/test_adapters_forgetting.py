from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trainkit
from trainkit import run_recipe, write_recipe

from peftcli.adapters.generate import load_for_task
from peftcli.adapters.load import find_adapter
from peftcli.adapters.proof import forgetting
from peftcli.adapters.proof.forgetting import measure_forgetting, shipped_texts
from peftcli.core.inject import disabled
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks.text import drift

SHARES = {"english": 90, "code": 26, "chat": 30}
LEARNT = "training.learning_rate=0.05"  # what was learnt shows
CASES = {
    "lora": ("llama", "{type: lora, r: 4, target_modules: all-linear}", ""),
    "a trained head": ("llama", "{type: lora, r: 4, target_modules: [q_proj], modules_to_save: [lm_head]}", ""),
    "a trained embedding": ("llama", "{type: lora, r: 4, target_modules: [embed_tokens, lm_head]}", ""),
    "new tokens": ("llama", "{type: lora, r: 4, target_modules: [q_proj]}", ", new_tokens: [<a>, <b>]"),
    "a method that starts from the weights": ("llama", "{type: lora, r: 4, init_lora_weights: pissa}", ""),
    "prompt_tuning": ("llama", "{type: prompt_tuning, num_virtual_tokens: 5}", ""),
    "p_tuning": ("gpt2", "{type: p_tuning, num_virtual_tokens: 5, encoder_hidden_size: 16}", ""),
    "prefix_tuning": ("llama", "{type: prefix_tuning, num_virtual_tokens: 5}", ""),
    "cartridge": ("llama", "{type: cartridge, num_virtual_tokens: 5}", ""),
    "adaption_prompt": ("llama", "{type: adaption_prompt, adapter_len: 4, adapter_layers: 2}", ""),
    "an encoder-decoder": ("t5", "{type: lora, r: 4, target_modules: all-linear}", ""),
    "virtual tokens of one": ("bart", "{type: prompt_tuning, num_virtual_tokens: 5}", ""),
}


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_a_hand_written_loop_measures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, more = CASES[name]
    encodes = kind in ("t5", "bart")
    texts = [each for each in shipped_texts() if each[0] != "chat"][:9]
    monkeypatch.setattr(forgetting, "shipped_texts", lambda: texts)
    base = f"base_model={{name: {trainkit.base_folder(kind)}{more}}}"
    rows = trainkit.PROMPTS if encodes else trainkit.MESSAGES
    settings = ["task=seq2seq_lm"] if encodes else []
    path = write_recipe(tmp_path, rows=rows)
    rate = "training.learning_rate=1" if name == "adaption_prompt" else LEARNT  # its gates start at 0
    done = run_recipe(path, base, f"method={method}", rate, "training.measure_forgetting=true", *settings)
    source = find_adapter(str(done.folder))
    opened = open_base(BaseModel(name=str(trainkit.base_folder(kind))))
    task = source.open_task(opened)
    model = load_for_task(source, opened, task, torch.float32).model.eval()
    plain = opened.model(source.auto_class(lambda: opened.config), torch.float32).model.eval()
    longest = (64 if kind == "bart" else 256) - 5 * ("num_virtual_tokens" in method)
    sums = np.zeros(5)
    for _, text in texts:
        inputs, targets = _by_hand(text, task.processor, plain if encodes else None, longest)
        with torch.no_grad():
            after = model(**inputs).logits[0, -len(targets) - (not encodes) :][: len(targets)].double().log_softmax(-1)
            if more:  # the base model has no rows for them
                with disabled(model):
                    logits = model(**inputs).logits
            else:
                logits = plain(**inputs).logits
            first = logits[0, : len(targets)].double().log_softmax(-1)
        wanted = torch.tensor(targets)
        losses = [float(F.nll_loss(each, wanted, reduction="sum")) for each in (first, after)]
        kl = float(F.kl_div(after, first, log_target=True, reduction="sum"))
        sums += [len(targets), *losses, kl, int((first.argmax(-1) == after.argmax(-1)).sum())]
    found = done.run["forgetting"]
    assert found["tokens"] == sums[0]
    values = ("base_loss", "adapter_loss", "kl", "kept_tokens")
    assert [found[value] for value in values] == pytest.approx(list(sums[1:] / sums[0]), abs=3e-5)
    assert found["loss"] == pytest.approx((sums[2] - sums[1]) / sums[0], abs=3e-5)
    assert abs(found["kl"]) > 1e-3, "too little was learnt to see a mistake"


def _by_hand(text: str, tokenizer: Any, encodes: Any, longest: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The inputs of one text, and its targets."""
    if encodes is None:
        ids = tokenizer(text)["input_ids"][:longest]
        return {"input_ids": torch.tensor([ids])}, ids[1:]
    middle = text.find(" ", len(text) // 2)
    middle = middle if middle > 0 else len(text) // 2
    one, two = (tokenizer(part)["input_ids"][:longest] for part in (text[:middle], text[middle:].strip()))
    shifted = encodes.prepare_decoder_input_ids_from_labels(torch.tensor([two]))
    return {"input_ids": torch.tensor([one]), "decoder_input_ids": shifted}, two


def test_logits_made_at_once_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model is divided, or its head is not one module."""
    texts = shipped_texts()[:9]
    done = run_recipe(write_recipe(tmp_path), LEARNT)
    source = find_adapter(str(done.folder))
    opened = open_base(BaseModel(name=str(trainkit.base_folder())))
    task = source.open_task(opened)
    model = load_for_task(source, opened, task, torch.float32).model
    monkeypatch.setattr(drift, "_ROWS", {"cpu": 7})
    parts, whole = (drift.drift(model, task, [text for _, text in texts], divided=each) for each in (False, True))
    assert torch.allclose(parts, whole, rtol=1e-5)


def test_conversations_go_through_the_base_models_own_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    counts = {}
    for name in ("its own", "of the recipe", "none"):
        base = BaseModel(name=str(trainkit.base_folder(chat=name != "none")))
        recipe = write_recipe(tmp_path / name.replace(" ", "-"), rows=trainkit.PROMPTS)
        source = find_adapter(str(run_recipe(recipe, f"base_model={base.name}", "training.max_steps=1").folder))
        spec = BaseModel(name=base.name, chat_template="chatml" if name == "of the recipe" else None)
        task = source.open_task(open_base(spec))
        counts[name] = len(drift._read_text(turns, task)[0])
    tokenizer = trainkit.tokenizer()
    plain = len(tokenizer("user: Hi\nassistant: Hello")["input_ids"])
    assert counts == {
        "its own": len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)),
        "of the recipe": plain,
        "none": plain,
    }


def test_the_texts_are_what_the_documentation_says() -> None:
    texts = shipped_texts()
    counts = {group: [each for each, _ in texts].count(group) for group, _ in texts}
    languages = {group: count for group, count in counts.items() if group not in SHARES}
    assert counts | SHARES == counts
    assert set(languages.values()) == {6}
    assert len(languages) == 9
    assert len({json.dumps(text) for _, text in texts}) == len(texts) == 200
    assert {group for group, _ in texts[:24]} == counts.keys(), "the first ones spread over all groups"
    head = json.loads(forgetting._TEXTS.read_text(encoding="utf-8").splitlines()[0])
    assert head["licence"] == "CC0-1.0"


def test_auto_reads_as_many_texts_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text takes a second here."""
    now = [0.0]

    def read(model: Any, task: Any, texts: list[Any], divided: bool) -> torch.Tensor:
        now[0] += len(texts)
        return torch.tensor([[10.0, 30.0, 31.0, 0.5, 9.0]] * len(texts), dtype=torch.float64)

    monkeypatch.setattr(forgetting, "drift", read)
    monkeypatch.setattr(forgetting.time, "perf_counter", lambda: now[0])
    model: Any = None
    counts = [measure_forgetting(model, model, seconds=seconds).get("texts") for seconds in (None, 30.0, 24.0, 1e9)]
    assert counts == [200, 24, 24, 200]
    skipped = measure_forgetting(model, model, seconds=20.0)
    assert skipped == {"skipped": "it would take about 24 s, more than a tenth of the run (20 s)"}
    assert "signal" in measure_forgetting(model, model, seconds=1e9, stopping=lambda: True)["skipped"]
    whole = measure_forgetting(model, model)
    assert (whole["loss"], whole["low"], whole["high"], whole["kl"], whole["kept_tokens"]) == (0.1, 0.1, 0.1, 0.05, 0.9)
    assert whole["groups"]["other_languages"] == {"texts": 54, "loss": 0.1, "kl": 0.05, "kept_tokens": 0.9}
    assert whole["groups"]["german"]["texts"] == 6
