"""Encoder-decoders of many languages: texts are marked with those of the recipe, and answers are in the target's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifierkit import encoded, open_task
from trainkit import PROMPTS, base_folder, multilingual_base, run_recipe, write_recipe, write_rows

from peftcli.adapters.generate import load_generator
from peftcli.core.prompts.generate import generate
from peftcli.errors import DataError
from peftcli.tasks.text import generation
from peftcli.tasks.text.generated import METRICS
from peftcli.tasks.text.generation import _answer_start as answer_start

NAME = "seq2seq_lm"
CODES = {"mbart": ("de_DE", "fr_XX"), "mbart50": ("de_DE", "fr_XX"), "nllb": ("deu_Latn", "fra_Latn")}
ROW = {"prompt": "hallo", "completion": "salut"}


def languages(kind: str) -> dict[str, str]:
    return dict(zip(("source_language", "target_language"), CODES[kind], strict=True))


@pytest.mark.parametrize("kind", CODES)
def test_texts_are_marked_with_their_languages(kind: str) -> None:
    task = open_task(NAME, multilingual_base(kind), **languages(kind))
    [example] = encoded(task, [ROW])
    source, target = (task.processor.convert_ids_to_tokens(example.arrays[name]) for name in ("input_ids", "labels"))
    at = -1 if kind == "mbart" else 0
    assert (source[at], target[at]) == CODES[kind]
    start = "decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id"
    assert answer_start(task.processor) == {start: example.arrays["labels"][at]}


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["mbart", "nllb"])
def test_answers_are_in_the_target_language_wherever_the_adapter_is_asked(
    cli: Callable, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{name: text.lower() for name, text in row.items()} for row in PROMPTS]
    recipe = write_recipe(tmp_path, multilingual_base(kind), rows)
    task = {"type": NAME, "generate_metrics": ["chrf"], "max_new_tokens": 12, **languages(kind)}
    run = run_recipe(recipe, f"task={json.dumps(task)}", "dataset.max_length=60", "training.eval_strategy=epoch")
    (run.folder / "run.json").unlink()  # as on the hub
    asked, answers = write_rows(tmp_path / "asked.jsonl", rows[10:]), tmp_path / "answers.jsonl"
    generator = load_generator(str(run.folder))
    assert (generator.tokenizer.src_lang, generator.tokenizer.tgt_lang) == CODES[kind]
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(generation, "generate", lambda model, **given: seen.append(given) or generate(model, **given))
    cli("generate", run.folder, "--input", asked, "--output", answers, "--max-new-tokens", 12)
    cli("generate", run.folder, "--prompt", "hallo", "--max-new-tokens", 2, "--no-adapter")
    assert seen
    assert all(given.items() >= answer_start(generator.tokenizer).items() for given in seen)
    texts = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    measured = METRICS["chrf"]([row["completion"] for row in rows[10:]], texts)
    assert run.run["eval"]["last"]["eval_chrf"] == pytest.approx(measured)


def test_languages_that_are_missing_or_unknown_are_named() -> None:
    many, none = multilingual_base("nllb"), base_folder("t5")
    for base, given, key, words in (
        (many, {}, "source_language", "several languages"),
        (many, {"source_language": "deu_Latn"}, "target_language", "several languages"),
        (many, {"source_language": "deu_Latin"}, "source_language", "'deu_Latin' is not a language"),
        (many, {"target_language": "a"}, "target_language", "is not a language"),
        (none, {"source_language": "de"}, "source_language", "has no languages"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            encoded(open_task(NAME, base, **given), [ROW])
        assert caught.value.key == f"task.{key}"
