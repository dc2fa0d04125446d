"""The base of causal_lm and seq2seq_lm: a tokenizer, two columns of token ids, and the loss over target tokens."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.layer import base_modules
from peftcli.core.prompts.config import PrefixConfig, max_positions
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError, ModelError, UsageError
from peftcli.models import tokens
from peftcli.models.probe import deviation, probing
from peftcli.schema import BaseModel
from peftcli.system import date
from peftcli.tasks.base import Batch, Loss, Task, on_device
from peftcli.tasks.parts import Parts, RowScore, join, parts_of_sums
from peftcli.tasks.settings import CausalLMSettings, Seq2SeqLMSettings
from peftcli.tasks.shown import Description, Shown, Text
from peftcli.tasks.text.answers import text_reader
from peftcli.tasks.text.audit import TextAudit
from peftcli.tasks.text.encode import CausalEncoder, Seq2SeqEncoder, flag_unread
from peftcli.tasks.text.fast.losses import Redo, losses_under, output_head, states_under
from peftcli.tasks.text.findings import CUT_OFF, FINDINGS, OVERLONG, Flag, record_findings
from peftcli.tasks.text.formats import ExampleReader
from peftcli.tasks.text.generated import PACKAGES, generated_metrics, own_metric_of, text_parts, with_texts
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import PromptForm, prompt_and_answer, prompt_ids, prompt_start, prompt_text
from peftcli.tasks.text.stop_tokens import StopTokens, configured_stops, has_token, missing_stops, stop_tokens
from peftcli.tasks.text.token_ids import (
    Losses,
    inner_model,
    is_half_precision,
    no_cache,
    pad_labelled,
    pad_token_id,
    plain_losses,
    target_logits,
    token_metrics,
)
from peftcli.tasks.text.token_text import TokenRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.models.open import OpenBase

T = TypeVar("T")
Encoder = Callable[[Sequence[Row]], list[Outcome | DataError]]
Settings = TypeVar("Settings", bound=CausalLMSettings | Seq2SeqLMSettings)
CHAT_PACKAGES = ("transformers", "tokenizers", "jinja2")
"""Packages whose version decides which ids a text or a conversation gets."""
_EXACT, _ROUNDED = 1e-4, 0.05
"""How far a token's logits may be off by rounding where a later token is another one, in float32 and in less, relative
to the logits' spread. Seen of models that see later tokens was 0.01 and more, before any training."""


class LanguageModel(Task[Settings]):
    """A task whose examples are token ids with labels."""

    unit = "tokens"
    sums_targets = True
    flags: ClassVar = {
        "truncated": Flag.TRUNCATED,
        "split": Flag.SPLIT,
        "pieces_left_out": Flag.PIECES_LEFT_OUT,
    }

    target_reports: ClassVar[Sequence[str]] = ("loss", "perplexity", "token_accuracy")
    identity: ClassVar[Sequence[str]] = ("input_ids",)
    versions: ClassVar[Sequence[str]] = CHAT_PACKAGES

    prompt_form: PromptForm
    """The form of the training rows' prompts. ``trained_on`` sets it."""
    encoder: ClassVar[type[CausalEncoder] | type[Seq2SeqEncoder]]

    def __init__(self, settings: Settings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self._encoders: dict[Any, Encoder] = {}
        self._audit: TextAudit | None = None
        self._stops: dict[bool, StopTokens] = {}
        self._own = own_metric_of(settings)
        if self.generates and getattr(settings, "overlong", "") == "split":
            raise DataError("generated answers are those of whole rows; choose truncate, drop or error", key="overlong")

    @property
    def generates(self) -> bool:
        """Whether evaluation generates answers."""
        return bool(self.settings.generate_metrics or self.settings.metric_code)

    @property
    def columns(self) -> Mapping[str, Column]:
        own = {"input_ids": Column(), "labels": Column()}
        return own | (
            {"prompt": Column(), "answer": Column("str"), "chat": Column("bool", ())} if self.generates else {}
        )

    @property
    def packages(self) -> Mapping[str, str]:
        return {PACKAGES[name]: "metrics" for name in self.settings.generate_metrics if name in PACKAGES}

    @cached_property
    def renderer(self) -> TokenRenderer:
        """Renders token ids as text that people can read."""
        return TokenRenderer(self.processor)

    @property
    def advice(self) -> Mapping[str, str]:
        raised = f"Raise dataset.max_length, which is {self.settings.max_length}."
        return {OVERLONG: raised, CUT_OFF: raised}

    @property
    def notes(self) -> Sequence[str]:
        notes = date_notes(self.processor)
        if getattr(self.base.config.get_text_config(), "output_router_logits", False):
            notes = (*notes, "the balance loss of the base model's routers (output_router_logits) is not trained")
        return notes

    def fingerprint(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tokenizer": tokenizer_fingerprint(self.processor)}
        if self.generates:  # whose prompts leave room for an answer
            found |= {"max_new_tokens": self.settings.max_new_tokens, "positions": self._positions}
        return found

    def record_findings(self, records: Records) -> list[Finding]:
        raw = records.findings(FINDINGS["chat_model_without_template"], records.with_flag(Flag.RAW), of_used=True)
        return record_findings(records) + raw

    def read(self, table: Table) -> ExampleReader:
        return text_reader(table, whole=self.settings.train_on == "all")

    def encode(self, rows: Sequence[Row], reader: Any) -> list[Outcome | DataError]:
        key = (reader.name, *reader.names.items())
        if key not in self._encoders:
            self._encoders[key] = self.encoder_of(reader)
        outcomes = flag_unread(self._encoders[key](rows), rows, reader)
        return list(map(self._with_prompt, outcomes, rows, repeat(reader))) if self.generates else outcomes

    def encoder_of(self, reader: Any) -> Encoder:
        """What encodes the rows of a reader."""
        return self.encoder(reader, self.processor, self.settings)  # type: ignore[arg-type]

    def shared(self, row: Row, reader: Any) -> Any:
        return prompt_start(reader(row))

    def _with_prompt(self, outcome: Outcome | DataError, row: Row, reader: Any) -> Outcome | DataError:
        """Add the prompt and the answer, which evaluation compares, to the outcome of a row."""
        if isinstance(outcome, DataError) or not outcome.examples:
            return outcome
        (example,) = outcome.examples
        decoder_only = not self.base.config.is_encoder_decoder
        try:
            prompt, answer = prompt_and_answer(reader(row))
            if decoder_only:
                text, templated = prompt_text(prompt, self.processor, decoder_only=True, trained=True)
                ids = prompt_ids(text, self.processor, templated=templated, decoder_only=True)
            else:
                ids = example.arrays["input_ids"]  # as it is trained, also where it was cut
        except (DataError, UsageError) as error:
            return row.place.error(error.message, key=error.key, hint=error.hint)
        positions = self._positions
        if positions and decoder_only and len(ids) + self.settings.max_new_tokens > positions:
            message = (
                f"the prompt's {len(ids)} tokens and {self.settings.max_new_tokens} new ones are more than the base"
            )
            return row.place.error(f"{message} model's {positions:,} positions{self._aside}", key="task.max_new_tokens")
        chat = self._form_of(reader.name, {}).chat
        stops = self._stops_of(chat)
        thinks = answer.lstrip().startswith(stops.thinking) or has_token(self.processor, stops.lead)
        if thinks and stops.lead in answer:
            answer = answer.partition(stops.lead)[2].strip()
        example.arrays |= {"prompt": ids, "answer": answer, "chat": chat}
        return outcome

    def _form_of(self, format: str, shared: Mapping[str, str]) -> PromptForm:
        has_template, decoder_only = bool(self.processor.chat_template), not self.base.config.is_encoder_decoder
        return PromptForm.of_rows(format, shared, has_template=has_template, decoder_only=decoder_only)

    def trained_on(self, format: str, shared: Mapping[str, str]) -> None:
        self.prompt_form = self._form_of(format, shared)

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch = pad_labelled(examples, pad_token_id(self.processor))
        if training or not self.generates:
            return batch
        return batch | {f"_{name}": [each.arrays[name] for each in examples] for name in ("prompt", "answer", "chat")}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        found = self.loss_of_targets(model, batch)
        return with_texts(found, batch.get("_answer"), lambda: self._answers(model, batch))

    @abstractmethod
    def loss_of_targets(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of a batch over its target tokens."""

    def _answers(self, model: Any, batch: Batch) -> list[str]:
        """Generate answers to the prompts of a batch, as ``predict`` does."""
        settings = GenerationSettings(max_new_tokens=self.settings.max_new_tokens, num_beams=self.settings.num_beams)
        found = dict[int, str]()
        chats = list(map(bool, batch["_chat"]))
        for chat in dict.fromkeys(chats):
            generator = TextGenerator(model, self.processor, PromptForm(chat), self._stops_of(chat))
            chosen = [at for at, each in enumerate(chats) if each == chat]
            rows = [np.asarray(batch["_prompt"][at]).tolist() for at in chosen]
            found |= zip(chosen, (text for text, _, _ in generator.continued(rows, settings)), strict=True)
        return [found[at] for at in range(len(chats))]

    def _stops_of(self, chat: bool) -> StopTokens:
        if chat not in self._stops:
            self._stops[chat] = stop_tokens(self.processor, chat=chat)
        return self._stops[chat]

    def target_metrics(self, sums: Mapping[str, np.ndarray], num_targets: int) -> dict[str, float]:
        """Compute the metrics of target tokens, those of ``target_reports``."""
        return token_metrics(sums, num_targets)

    @property
    def reports(self) -> Sequence[str]:
        known = (*self.target_reports, *self.settings.generate_metrics)
        return (*known, "*") if self._own else known

    @property
    def main_metric(self) -> str:
        return next(iter(self.settings.generate_metrics), "loss")

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"loss": math.log(self.base.config.get_text_config().vocab_size)}

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        found = self.target_metrics(sums, num_targets)
        if not self.generates:
            return found
        return generated_metrics(self.settings, self._own, outputs, found)

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        found = parts_of_sums(rows, lambda sums, outputs, num_targets: self.target_metrics(sums, num_targets))
        if not self.settings.generate_metrics:
            return found
        return join(found, text_parts(self.settings.generate_metrics, [row.outputs[0] for row in rows]))

    def findings(self, view: View) -> list[Finding]:
        return self._audited(view).findings()

    def describe(self, view: View) -> Description:
        return self._audited(view).describe()

    def _audited(self, view: View) -> TextAudit:
        """The audit of a view; that of the last one is kept."""
        if self._audit is None or self._audit.rows.view is not view:
            self._audit = TextAudit(view, self.processor, aligned=self.targets_in_size)
        return self._audit

    def show(self, example: Example) -> Shown:
        ids, labels = (np.asarray(example.arrays[name]).tolist() for name in ("input_ids", "labels"))
        values = {"input_ids": ids, "labels": labels, "text": self.renderer.text(ids)}
        return Shown(self.texts(ids, labels), values, f"{example.num_targets:,} trained")

    @abstractmethod
    def texts(self, ids: list[int], labels: list[int]) -> list[Text]:
        """Render the texts of an example for ``inspect``."""

    def probe(self) -> dict[str, torch.Tensor]:
        """Random tokens (2, 16)."""
        config = self.base.config.get_text_config()
        ids = torch.randint(config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if self.base.config.is_encoder_decoder else {})

    def refuse_size(self, largest: int, *, of_target: bool = False) -> None:
        # the decoder of an encoder-decoder has the targets, and a prefix; its encoder has any other virtual tokens
        beside = not self.base.config.is_encoder_decoder or of_target == isinstance(self.method, PrefixConfig)
        positions = self._positions if beside else max_positions(self.base.config.get_text_config())
        if positions and largest > positions:
            aside = self._aside if beside else ""
            raise DataError(
                f"the longest example has {largest:,} tokens, and the base model {positions:,} positions{aside}",
                key="dataset.max_length",
                hint=f"set dataset.max_length: {positions}, or less; dataset.overlong says what becomes of longer rows",
            )

    @property
    def _positions(self) -> int | None:
        """How many tokens of a row the base model has positions for; None: any number."""
        return max_positions(self.base.config.get_text_config(), self.virtual_tokens)

    @property
    def _aside(self) -> str:
        return f" besides those of {self.virtual_tokens} virtual tokens" if self.virtual_tokens else ""

    def fit_model(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        """Give the model rows for the recipe's new tokens, and the tokenizer a pad token that the model knows."""
        if config is not None:
            _refuse_encoder(self.base.config)
        return fit_tokens(model, self.processor, config, self.base.spec)

    def save(self, folder: Path) -> list[str]:
        limits = {name: getattr(self.settings, name) for name in ("max_new_tokens", "num_beams")}
        own = self.write_task(folder, generation=limits, prompt=self.prompt_form)
        return [own, *self.save_processor(folder)]

    def save_processor(self, folder: Path) -> list[str]:
        """Write what the adapter's tokenizer has beside the base model's, and return the files' names."""
        return tokens.save_with_adapter(folder, self.processor, self.base.spec)

    def stops(self, model: nn.Module) -> list[int]:
        return missing_stops(self.processor, configured_stops(model), chat=self.prompt_form.chat)


def target_losses(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor, temperature: float = 1.0
) -> Losses:
    """Return the losses that ``plain_losses`` describes, by the fast way where the model's head lets it."""
    head = output_head(inner_model(model), inputs)
    if head is None:
        return plain_losses(model, inputs, targets, temperature)
    return losses_under(head.at(temperature), model, inputs, targets)


def with_states(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    compute: Callable[[torch.Tensor, Redo], T],
) -> T:
    """Run a model; return what ``compute`` makes of its states (N, ...) at the targets (B, T) that count, row by row.

    It also gets what makes logits (n, V) of them. States are hidden ones (N, D), or the logits themselves where these
    are not what a module makes of each position's hidden state.
    """
    head = output_head(inner_model(model), inputs)
    if head is None:
        return compute(target_logits(model, inputs, targets), lambda logits: logits)
    return states_under(head, model, inputs, targets, lambda states, _: compute(states, head.logits))


def fit_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, config: AdapterConfig | None, base: BaseModel
) -> list[str]:
    """Give a model rows for the recipe's new tokens, and the tokenizer a pad token that the model knows.

    ``config`` is that of an adapter that will train the rows; None: none will. It learns what of the model texts never
    reach. Returns what the user should know.
    """
    if config is None:
        tokens.grow_for(model, tokenizer, base)
    else:
        tokens.make_room(model, tokenizer, config, base)
    if isinstance(config, TargetedConfig):
        config.unreached = _beside_decoder(model)
    note = tokens.settle_pad(tokenizer, model)
    return [note] if note else []


def _beside_decoder(model: Any) -> list[str]:
    """The modules that stand beside the decoder in a model of several towers, where no text comes: their names."""
    if model.config.is_encoder_decoder or model.config.get_text_config() is model.config:
        return []
    beside = set(model.base_model.modules()) - set(model.get_decoder().modules())
    return [name for name, module in base_modules(model).items() if module in beside]


def date_notes(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Return a note about a chat template that writes the date."""
    if not date.writes_date(tokenizer.chat_template):
        return ()
    return (f"the chat template can write the date: rows are rendered as on {date.today()}",)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets. A template that writes the date gives another one each day."""
    settings = ("split_special_tokens", "truncation_side", "model_input_names")
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "tokenizer": _described(tokenizer),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "settings": {name: getattr(tokenizer, name, None) for name in settings},
        "template": tokenizer.chat_template,
        "date": date.today().isoformat() if date.writes_date(tokenizer.chat_template) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _described(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Describe a tokenizer, without the settings of its last call."""
    if tokenizer.is_fast:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        return {name: value for name, value in described.items() if name not in ("truncation", "padding")}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_vocabulary(scratch)
        files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return [hashes, tokenizer.get_vocab(), tokenizer.init_kwargs]


def _refuse_encoder(config: Any) -> None:
    """Raise ModelError if a model reads texts in both directions, though it has a head for the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    hint = "name a model that generates text"
    setting = "is_decoder" if hasattr(config, "is_decoder") else "causal"  # the latter is XLM's
    is_decoder = getattr(config, setting, None) is not False or config.is_encoder_decoder
    if not is_decoder and config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"):
        hint += f"; one whose weights are a decoder's says {setting}: true in its config"
    elif config.model_type not in ("cpmant", "xlnet"):
        return
    message = f"{config.model_type} is an encoder, which sees the tokens that it would have to predict"
    raise ModelError(message, key="base_model", hint=hint)


def refuse_later_tokens(model: Any, probe: Batch) -> None:
    """Raise ModelError if the logits before the last token of a probe depend on it, which they would have to predict.

    Leaves the modules' modes and the random state as they were.
    """
    given = on_device(probe, model.device)
    given |= no_cache(model, given)  # as in training
    other = given["input_ids"].clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    with probing(model, model.device):
        one, two = (model(**given | {"input_ids": ids}).logits[:, :-1].float() for ids in (given["input_ids"], other))
    if deviation(two, one) > (_ROUNDED if is_half_precision(model) else _EXACT):
        message = f"{type(model).__name__} sees the tokens that it would have to predict"
        raise ModelError(message, key="base_model", hint="name a model that reads texts in one direction")
