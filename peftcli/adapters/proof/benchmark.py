"""Run tasks of lm-eval on an adapter and, beside it, on its base model.

lm-eval asks for log-probabilities and for text. Both come from the code by which peftcli trains and generates, so soft
prompts, new tokens, prefixes and the chat template are what they were in training.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from peftcli.adapters.benchmark_record import SCHEMA_VERSION, keep
from peftcli.adapters.generate import load_generator
from peftcli.adapters.load import find_adapter
from peftcli.adapters.proof.benchmark_tasks import harness_errors, load_tasks
from peftcli.core.inject import disabled
from peftcli.core.prompts.config import max_positions
from peftcli.core.prompts.inputs import soft_prompt
from peftcli.errors import DataError, UsageError
from peftcli.system import date
from peftcli.tasks.base import require_extra
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.log_probability import Scored, TokenPair, score_continuations
from peftcli.tasks.text.prompts import SLOT, prompt_ids, prompt_text
from peftcli.tasks.text.token_ids import pad_token_id

Tell = Callable[[str], None]
_DRAWS = 1000
"""Draws of lm-eval's bootstrap, for metrics whose standard error has no formula."""
_MAX_NEW_TOKENS = 256
"""Of an answer, where a task sets no limit; lm-eval's own."""
_GENERATION = {"until", "do_sample", "temperature", "top_p", "num_beams", "max_gen_toks", "max_new_tokens"}
"""Settings of a task's generation that are followed."""


@dataclass
class Scorer:
    """An adapter's language model, asked in the form of its training."""

    generator: TextGenerator
    batch_size: int
    tell: Tell
    truncated: int = 0
    """Requests whose context lost its start, because the model has too few positions."""
    what: str = ""
    """What answers now, for the log."""
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        model = self.generator.model
        prompt = soft_prompt(model)
        self.max_length = max_positions(model.config.get_text_config(), prompt.count if prompt else 0) or sys.maxsize

    @property
    def decoder_only(self) -> bool:
        """Whether a continuation follows its context in the same text."""
        return not self.generator.model.config.is_encoder_decoder

    def conversation(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation in the chat template, its questions as in training.

        Without ``add_generation_prompt`` the last turn is the start of the answer.
        """
        form, start = self.generator.form, ""
        if not add_generation_prompt:
            *turns, last = turns
            start = last["content"]
        asked = [
            {**turn, "content": form.template.replace(SLOT, turn["content"])} if turn["role"] == "user" else dict(turn)
            for turn in turns
        ]
        if asked and asked[0]["role"] != "system":
            asked = [*form.opening(), *asked]
        text, _ = prompt_text(asked, self.generator.tokenizer, decoder_only=self.decoder_only)
        return text + start

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text; a chat template has written its special ones."""
        chat = self.generator.form.chat
        return prompt_ids(text, self.generator.tokenizer, templated=chat, decoder_only=self.decoder_only)

    def asked(self, context: str) -> str:
        """Return a context in the form of the training rows. A conversation has it already."""
        form = self.generator.form
        return context if form.chat or not context else str(form.ask(context))

    def scores(self, pairs: Sequence[TokenPair]) -> list[Scored]:
        """Score continuations after their contexts, in batches."""
        fitted = [self._fitted(before, after) for before, after in pairs]
        pad = pad_token_id(self.generator.tokenizer)
        device = self.generator.model.device.type

        def score(batch: Sequence[TokenPair]) -> list[Scored]:
            with torch.autocast(device, torch.bfloat16, enabled=self.generator.bf16):
                return score_continuations(self.generator.model, batch, pad)

        return self._in_batches(fitted, lambda pair: len(pair[0]) + len(pair[1]), score)

    def texts(self, contexts: Sequence[str], settings: GenerationSettings, until: Sequence[str]) -> list[str]:
        """Answer contexts. An answer ends as in training, or before one of ``until``."""
        stops = self.generator.stop_tokens
        ends = tuple(dict.fromkeys((*stops.texts, *filter(None, until))))
        generator = replace(self.generator, stop_tokens=replace(stops, texts=ends))
        room = self.max_length - settings.max_new_tokens if self.decoder_only else self.max_length
        if room < 1:
            message = f"a task asks for {settings.max_new_tokens:,} tokens; the model has {self.max_length:,} positions"
            raise DataError(message, key="max_gen_toks")
        rows = [self.ids(context) for context in contexts]
        self.truncated += sum(len(row) > room for row in rows)

        def answer(batch: Sequence[list[int]]) -> list[str]:
            model = generator.model
            with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=generator.bf16):
                return [text for text, _, _ in generator.continued(batch, settings)]

        return self._in_batches([row[-room:] for row in rows], len, answer)

    def _fitted(self, before: Sequence[int], after: Sequence[int]) -> TokenPair:
        """Return a pair that the model has positions for: the context loses its start."""
        room = self.max_length + 1 - len(after) if self.decoder_only else self.max_length
        if not after or room < 1:
            raise DataError(f"a continuation of {len(after):,} tokens cannot be scored; positions: {self.max_length:,}")
        self.truncated += len(before) > room
        return before[-room:], after

    def _in_batches(self, rows: Sequence[Any], size: Callable[[Any], int], answer: Callable[[Any], list[Any]]) -> Any:
        """Answer rows, the longest first, and return the answers in the order of the rows."""
        order = sorted(range(len(rows)), key=lambda at: size(rows[at]), reverse=True)
        found, told = dict[int, Any](), 0
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found |= zip(chosen, answer([rows[at] for at in chosen]), strict=True)
            if 10 * len(found) // len(rows) > told:
                told = 10 * len(found) // len(rows)
                self.tell(f"{self.what}: {len(found):,}/{len(rows):,} requests")
        return [found[at] for at in range(len(rows))]


def harness_model(scorer: Scorer) -> Any:
    """Return the ``lm_eval.api.model.LM`` that asks ``scorer``."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class _Model(TemplateLM):  # type: ignore[misc]
        tokenizer = scorer.generator.tokenizer
        backend = "causal" if scorer.decoder_only else "seq2seq"
        max_length = scorer.max_length
        tokenizer_name = str(scorer.generator.tokenizer.name_or_path)

        @property
        def eot_token_id(self) -> int:
            return pad_token_id(self.tokenizer) if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                return scorer.ids(string)
            return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return scorer.conversation(chat_history, add_generation_prompt)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _encode_pair(self, context: str, continuation: str) -> Any:
            return super()._encode_pair(scorer.asked(context), continuation)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = scorer.scores([(before, after) for _, before, after in requests])
            return [(each[0], each[1]) for each in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            found = []
            for request in requests:
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                scores = scorer.scores(list(map(utils.make_disjoint_window, windows)))
                found.append(math.fsum(each.log_probability for each in scores))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for at, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(at)
            found = dict[int, str]()
            for places in groups.values():
                settings, until = _generation(requests[places[0]].args[1])
                contexts = [scorer.asked(requests[at].args[0]) for at in places]
                found |= zip(places, scorer.texts(contexts, settings, until), strict=True)
            return [found[at] for at in range(len(requests))]

    return _Model()


def _generation(given: Mapping[str, Any]) -> tuple[GenerationSettings, list[str]]:
    """Read the generation settings of a task: how answers are made, and where they end."""
    if unknown := sorted(given.keys() - _GENERATION):
        raise DataError("is not supported here", key=f"generation_kwargs.{unknown[0]}")
    until = given.get("until") or []
    temperature = float(given.get("temperature") or 0.0)
    sampled = bool(given.get("do_sample", temperature > 0))
    return GenerationSettings(
        max_new_tokens=int(given.get("max_gen_toks") or given.get("max_new_tokens") or _MAX_NEW_TOKENS),
        temperature=(temperature or 1.0) if sampled else 0.0,
        top_p=float(given.get("top_p") or 1.0),
        num_beams=int(given.get("num_beams") or 1),
    ), [until] if isinstance(until, str) else list(until)


def run_benchmark(
    adapter: str,
    tasks: str,
    base: str | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure an adapter and its base model, the adapter off, on tasks of lm-eval; see ``load_tasks`` for their names.

    The result is kept in the adapter's folder, if that is a folder of this machine.

    Raises:
        UsageError: lm-eval is missing, or knows no such task; or the adapter writes no text.
        DataError: a task or its dataset cannot be read.
        AdapterError: the adapter cannot be read or does not fit.
    """
    require_extra("lm_eval", "lm-eval", "--lm-eval", UsageError)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process, torch and all
    for name in ("lm_eval", "huggingface_hub"):  # they say what is said below, once
        logging.getLogger(name).setLevel(logging.ERROR)
    source = find_adapter(adapter, base)
    with redirect_stdout(io.StringIO()), date.fixed_date(source.day):
        loaded = load_tasks(tasks)
        generator = load_generator(adapter, base, as_evaluated=True, tell=tell)
        scorer = Scorer(generator, batch_size, tell)
        form = "in the chat template" if generator.form.chat else "as they are"
        tell(f"prompts are asked {form}, as the adapter was trained")
        both = {each: _measure(scorer, loaded, tasks, each, limit) for each in ("base model", "adapter")}
    if scorer.truncated:
        tell(f"warning: {scorer.truncated:,} contexts lost their start: the model has {scorer.max_length:,} positions")
    result = {
        "schema_version": SCHEMA_VERSION,
        "adapter": adapter,
        "base_model": {"name": source.base.name, "revision": source.base.revision},
        "lm_eval_version": version("lm_eval"),
        "limit": limit,
        "chat": generator.form.chat,
        "truncated": scorer.truncated,
        "tasks": _compared(both["base model"], both["adapter"]),
        "device": str(generator.model.device),
    }
    if Path(adapter).expanduser().is_dir() and base is None:
        tell(f"kept in {keep(source.folder, result)}")
    return result


def _measure(scorer: Scorer, loaded: dict[str, Any], name: str, what: str, limit: int | None) -> dict[str, Any]:
    """Run the tasks on the adapter, or on the base model below it."""
    from lm_eval.evaluator import evaluate

    scorer.what, scorer.truncated = what, 0
    model = scorer.generator.model
    chat = scorer.generator.form.chat
    with disabled(model) if what == "base model" else nullcontext(), harness_errors(name):
        set_seed(0)  # for answers that are sampled
        found: dict[str, Any] = evaluate(
            harness_model(scorer),
            loaded,
            limit=limit,
            bootstrap_iters=_DRAWS,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return found


def _compared(base: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of each task and group, base and adapter side by side."""
    return {name: _task_record(name, base, adapter) for name in adapter["results"]}


def _task_record(name: str, base: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    own, config = adapter["results"][name], adapter["configs"].get(name, {})
    for key, value in own.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        before, error = base["results"][name][key], f"{metric}_stderr,{kind}"
        metrics[metric if kind == "none" else key] = {
            "base": before,
            "base_stderr": _number(base["results"][name].get(error)),
            "adapter": value,
            "adapter_stderr": _number(own.get(error)),
            "difference": value - before,
            "difference_stderr": _paired_error(name, metric, kind, base, adapter),
        }
    return {
        "dataset": config.get("dataset_path"),
        "dataset_name": config.get("dataset_name"),
        "version": adapter["versions"].get(name),
        "fewshot": adapter["n-shot"].get(name),
        "samples": adapter["n-samples"].get(name, {}).get("effective"),
        "metrics": metrics,
    }


def _paired_error(name: str, metric: str, kind: str, base: dict[str, Any], adapter: dict[str, Any]) -> float | None:
    """Return the standard error of a difference of means over the same rows; None for what is no mean of numbers."""
    values = [
        [row[metric] for row in side.get("samples", {}).get(name, ()) if row["filter"] == kind and metric in row]
        for side in (base, adapter)
    ]
    if len(values[1]) < 2 or not all(isinstance(each, (int, float)) for each in (*values[0], *values[1])):
        return None
    mean = math.fsum(values[1]) / len(values[1])
    if not math.isclose(mean, adapter["results"][name][f"{metric},{kind}"], rel_tol=1e-9, abs_tol=1e-12):
        return None
    changes = torch.tensor(values[1], dtype=torch.float64) - torch.tensor(values[0], dtype=torch.float64)
    return float(changes.std() / math.sqrt(len(changes)))


def _number(value: Any) -> float | None:
    """Return a standard error; lm-eval writes N/A where it has none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
