"""Let the teacher of a recipe of distillation answer questions: the base model, after the recipe's context.

    python configs/tasks/answer_with_context.py configs/tasks/docstring_context.yaml data/docstrings data/answers

Reads train.jsonl and eval.jsonl of the second folder, rows of ``prompt`` as messages, as many as the recipe's
``dataset.limit``, and writes the same files into the third one, rows of ``messages``: the prompt and the teacher's
answer. Training answers are sampled, by row; those of evaluation are the likeliest ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from peftcli.models.open import open_base
from peftcli.models.tokens import settle_pad
from peftcli.recipe import load_recipe
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import PromptForm, prompt_ids, prompt_text
from peftcli.tasks.text.stop_tokens import stop_tokens

_AT_ONCE, _TOKENS = 16, 40
"""Rows in a batch, and the longest answer. A longer one is left out: it would teach the model to stop in a sentence."""


def main() -> None:
    """Write the answers to the questions of a folder."""
    path, questions, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    given = {part: questions / f"{part}.jsonl" for part in ("train", "eval")}
    recipe = load_recipe(path, [f"dataset.{part}={file}" for part, file in given.items()])
    task = recipe.task or {}
    with open_base(recipe.base_model) as base:
        tokenizer = base.processor("tokenizer")
        model = base.model("AutoModelForCausalLM", torch.float32).model.eval()
    settle_pad(tokenizer, model)
    generator = TextGenerator(model, tokenizer, PromptForm(chat=True), stop_tokens(tokenizer, chat=True))
    target.mkdir(parents=True, exist_ok=True)
    for part, temperature in (("train", 1.0), ("eval", 0.0)):
        lines = given[part].read_text(encoding="utf-8").splitlines()[: recipe.dataset.limit]
        rows = list(map(json.loads, lines))
        prompts = [[{"role": "system", "content": task["context"]}, *row["prompt"]] for row in rows]
        texts = [prompt_text(prompt, tokenizer, decoder_only=True)[0] for prompt in prompts]
        asked = [prompt_ids(text, tokenizer, templated=True, decoder_only=True) for text in texts]
        order = sorted(range(len(rows)), key=lambda at: len(asked[at]))
        settings, found = GenerationSettings(max_new_tokens=_TOKENS, temperature=temperature), dict[int, str]()
        for start in range(0, len(order), _AT_ONCE):
            some = order[start : start + _AT_ONCE]
            with torch.inference_mode():
                answers = generator.write([asked[at] for at in some], settings, some)
            found |= {at: each.text for at, (each,) in zip(some, answers, strict=True) if each.ended and each.text}
            print(f"{part}: {start + len(some)} of {len(order)}", flush=True)
        lines = [
            json.dumps({"messages": [*row["prompt"], {"role": "assistant", "content": found[at]}]}) + "\n"
            for at, row in enumerate(rows)
            if at in found
        ]
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{part}.jsonl: {len(lines)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
