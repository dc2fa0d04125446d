"""Image, text to text: answer a text with pictures, with a vision-language model (LLaVA, SmolVLM).

A row: ``{"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}],
"images": ["cat.png"]}``. Contents may be lists of parts, and ``image``, ``prompt`` and ``completion`` make one turn.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.layer import base_modules
from peftcli.core.targets import find_targets
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import AdapterError, DataError, ModelError
from peftcli.guard.files import one_line
from peftcli.models.tokens import save_processor, settle_pad
from peftcli.system.packages import installed_version
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, PredictOptions, Task, in_batches, model_inputs, on_device, table_of
from peftcli.tasks.files import File, errors_of_row, file_of
from peftcli.tasks.findings import SEEN
from peftcli.tasks.parts import Parts, RowScore, join, parts_of_sums
from peftcli.tasks.pictures import noise, open_image, opened_picture, orientation_of, shown_image
from peftcli.tasks.scores import as_computed
from peftcli.tasks.shown import Description, Shown, Text
from peftcli.tasks.text.chat import IGNORED, MarkedText, encode_marked, mark_chat, mark_pair
from peftcli.tasks.text.fast.losses import losses_under, output_head
from peftcli.tasks.text.findings import CUT_OFF, NO_TARGET, OVERLONG, Flag, record_findings
from peftcli.tasks.text.formats import ChatExample, ExampleReader, Message, PairExample
from peftcli.tasks.text.generated import PACKAGES, generated_metrics, own_metric_of, text_parts, with_texts
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.language_model import (
    CHAT_PACKAGES,
    fit_tokens,
    refuse_later_tokens,
    tokenizer_fingerprint,
)
from peftcli.tasks.text.pictured import MARK, PictureAudit, fold_pictures, marked_turns, pictures_of
from peftcli.tasks.text.prompts import PromptForm
from peftcli.tasks.text.spans import Template
from peftcli.tasks.text.stop_tokens import stop_tokens
from peftcli.tasks.text.token_ids import inner_model, next_tokens, pad_token_id, plain_losses, token_loss, token_metrics
from peftcli.tasks.text.token_text import TokenRenderer

_PICTURES_OVERLONG = "pictures longer than max_length"
_FEW = 8
"""Tokens of text by which the model's head is looked for."""
_TURNED = 5
"""EXIF orientations from this one exchange width and height."""


@dataclass(frozen=True)
class _Read:
    """A row as messages whose contents are texts with marks, and its pictures."""

    messages: list[Message]
    files: list[File]
    sizes: list[tuple[int, int]]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    """Positions of messages that say ``train: false``."""


@dataclass(frozen=True)
class _Expanded:
    """The tokens of a row, those of its pictures included."""

    ids: list[int]
    labels: list[int]
    end_of_pictures: int
    """Where the tokens of the last picture end; 0 without one."""
    text: str
    """What the processor gets."""
    suffix: str = ""
    """The answer, where the processor gets it apart."""


class ImageTextToText(Task[settings.ImageTextToTextSettings]):
    """The task ``image_text_to_text``."""

    name = "image_text_to_text"
    arguments = ("image", "prompt")
    unit = "tokens"
    sums_targets = True
    identity = ("input_ids", "seen")
    flags: ClassVar[Mapping[str, int]] = {"truncated": Flag.TRUNCATED}
    versions = (*CHAT_PACKAGES, "pillow")
    input_packages: ClassVar = {"PIL": "vision"}
    reads_files = True
    skips_parts = True

    def __init__(self, settings: settings.ImageTextToTextSettings, processor: Any, base: Any):
        super().__init__(settings, processor, base)
        self._runs: dict[tuple[int, int], list[int]] = {}
        self._compared = set[int]()
        self._audit: PictureAudit | None = None
        self._own = own_metric_of(settings)

    @property
    def columns(self) -> Mapping[str, Column]:
        texts = ("text", "pictures", "seen", *(("asked", "answer") if self._generates else ()))
        own = {"input_ids": Column(), "labels": Column(), "contents": Column("bytes"), "image_tokens": Column(shape=())}
        return own | dict.fromkeys((*texts, *(("suffix",) if self.takes_suffix else ())), Column("str"))

    @property
    def packages(self) -> Mapping[str, str]:
        return {PACKAGES[name]: "metrics" for name in self.settings.generate_metrics if name in PACKAGES}

    @property
    def reports(self) -> Sequence[str]:
        known = ("loss", "perplexity", "token_accuracy", *self.settings.generate_metrics)
        return (*known, "*") if self._own else known

    @property
    def _generates(self) -> bool:
        """Whether evaluation generates answers."""
        return bool(self.settings.generate_metrics or self._own)

    @property
    def main_metric(self) -> str:
        return next(iter(self.settings.generate_metrics), "loss")

    @cached_property
    def tokenizer(self) -> Any:
        """What makes tokens of a text: the processor's own, with the recipe's template and new tokens.

        Raises:
            ModelError: the processor does not read pictures with texts.
        """
        missing = [name for name in ("tokenizer", "image_processor") if not hasattr(self.processor, name)]
        if missing:
            message = f"the processor of {self.base.name} has no {missing[0]}: it does not read pictures with texts"
            raise ModelError(message, key="base_model")
        found, own = self.base.processor("tokenizer"), getattr(self.processor, "chat_template", None)
        if self.base.spec.chat_template is None and own:
            found.chat_template = own
        self.processor.tokenizer, self.processor.chat_template = found, found.chat_template
        return found

    @property
    def plain(self) -> bool:
        """Whether rows are a prompt and its answer in the processor's own form, since there is no chat template."""
        return not self.tokenizer.chat_template

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the processor takes the answer apart from a prompt, which the model reads in both directions."""
        return self.plain and "suffix" in inspect.signature(type(self.processor).__call__).parameters

    @cached_property
    def template(self) -> Template:
        """The chat template, which gets contents as lists of parts, or as texts if it reads those alone."""
        found = Template(self.tokenizer, self._form[1])
        found.markers = re.compile(rf"(?!{re.escape(MARK)})(?:{found.markers.pattern})")  # a row's own are of pictures
        return found

    @property
    def mark(self) -> str:
        """The token in the place of a picture, which the processor replaces.

        Raises:
            ModelError: the processor has no such token.
        """
        return self._form[0]

    @cached_property
    def _form(self) -> tuple[str, Callable[[list[Message]], list[Message]]]:
        """The token in the place of a picture, and how the chat template gets the contents of messages.

        Raises:
            ModelError: the processor has no such token, or the template does not write it.
        """
        names = ("image_token", "boi_token", "start_image_token")
        known = list(filter(None, (str(getattr(self.processor, name, None) or "") for name in names)))
        ways = [(mark, way) for way in (as_parts, as_texts) for mark in known]
        for mark, way in ways:
            form = partial(way, mark=mark)
            if self.plain:
                return mark, form
            with suppress(DataError):
                text = Template(self.tokenizer, form).render([{"role": "user", "content": f"{MARK}?"}])
                if text.count(mark) == 1:
                    return mark, form
        what = "its chat template writes" if known else "its processor has"
        raise ModelError(f"{what} no token for a picture", key="base_model")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "processor": json.loads(self.processor.to_json_string()),
            "image_processor": json.loads(self.processor.image_processor.to_json_string()),
            **({"answers": "generated"} if self._generates else {}),
        }

    @property
    def advice(self) -> Mapping[str, str]:
        return dict.fromkeys(
            (OVERLONG, _PICTURES_OVERLONG, CUT_OFF), f"Raise dataset.max_length, which is {self.settings.max_length}."
        )

    def record_findings(self, records: Records) -> list[Finding]:
        more = records.findings(SEEN["pictures_too_long"], records.with_outcome(_PICTURES_OVERLONG))
        return record_findings(records) + more

    def findings(self, view: View) -> list[Finding]:
        return self._audited(view).findings()

    def describe(self, view: View) -> Description:
        return self._audited(view).describe()

    def _audited(self, view: View) -> PictureAudit:
        """The audit of a view; that of the last one is kept."""
        if self._audit is None or self._audit.view is not view:
            self._audit = PictureAudit(view, self.tokenizer)
        return self._audit

    def read(self, table: Table, *, answered: bool = True) -> Reader:
        names: dict[str, Sequence[str]] = {
            "messages": ("messages", "conversations"),
            "images": ("images", "image", "file_name"),
            "prompt": ("prompt", "question"),
            "completion": ("completion", "answer"),
            "system": ("system",),
            "tools": ("tools",),
        }
        found = table.reader("messages", optional=tuple(names), **names)
        if "messages" not in found.names:
            needed = ("prompt", "completion") if answered else ("prompt",)
            optional = [name for name in names if name not in needed]
            found = table.reader("messages", optional=optional, **names)
        chat = [found.names[name] for name in ("messages", "system", "tools") if name in found.names]
        if chat and self.plain:
            message = f"{chat[0]!r} needs a chat template, which {self.base.name} does not have"
            hint = "Give rows with image, prompt and completion, or a template: base_model.chat_template."
            raise DataError(message, file=table.described, key="base_model", hint=hint)
        return found

    def _read(self, row: Row, reader: Reader, *, answered: bool = True) -> _Read:
        """Parse a row and look at its pictures.

        Raises:
            DataError: it has not as many marks as pictures, or one of them cannot be read.
        """
        found = row.values.get(reader.names.get("images", ""))
        given = pictures_of(found)
        if "messages" in reader.names and row.values.get(reader.names["messages"]):
            messages, pictures = marked_turns(reader.value(row, "messages"), given)
        else:
            text = reader.text(row, "prompt")
            text = text if MARK in text else MARK * len(given) + text
            messages, pictures = [{"role": "user", "content": text}], given
            if answered:
                messages.append({"role": "assistant", "content": reader.text(row, "completion", blank=False)})
        if not answered:
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
        # which checks roles and contents as those of texts; it looks for an answer
        turns = messages if answered else [*messages, {"role": "assistant", "content": "."}]
        own = [name for name in ("system", "tools") if name in reader.names]
        beside: dict[str, Any] = {name: row.values.get(reader.names[name]) for name in own}
        names = {name: reader.names.get(name, name) for name in ("messages", *beside)}
        values = {"messages": turns, **beside}
        values = {names[name]: value for name, value in values.items()}
        example = ExampleReader("messages", names)(replace(row, values=values))
        assert isinstance(example, ChatExample)
        marks = sum(str(turn.get("content") or "").count(MARK) for turn in example.messages)
        if marks != len(pictures):
            message = f"has {marks} marks {MARK} and {len(pictures)} pictures; each picture has one mark"
            raise row.place.error(message, key=reader.names.get("images", "messages"))
        files, sizes = [], []
        for picture in pictures:
            one = Reader("picture", {"image": reader.names.get("images", "messages")})
            file, content = file_of(replace(row, values={one.names["image"]: picture}), one, "image")
            with errors_of_row(row, one.names["image"]), opened_picture(content, file.path) as image:
                turned = orientation_of(image) >= _TURNED
                sizes.append(image.size[::-1] if turned else image.size)
                image.draft(None, (1, 1))
                image.load()
            files.append(file)
        if not files and self._needs_pictures:
            raise row.place.error("has no picture, without which the base model's processor reads no text")
        read = example.messages if answered else example.messages[:-1]
        return _Read(read, files, sizes, example.tools, example.untrained)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        read = self._read(row, reader)
        if self.plain:
            return self._plain_outcome(row, read)
        try:
            marked = mark_chat(
                ChatExample(read.messages, read.tools, read.untrained), self.template, self.settings.train_on
            )
        except DataError as error:
            raise row.place.error(error.message, key=error.key, hint=error.hint) from None
        return self._outcome(row, self._expanded(marked, read.sizes, row), marked, read)

    def _plain_outcome(self, row: Row, read: _Read) -> Outcome:
        """The outcome of a row that is a prompt and its answer.

        Raises:
            DataError: its prompt cannot be trained.
        """
        *asked, last = read.messages
        prompt, answer = self._prompt(asked, None), str(last["content"])
        marked = mark_pair(PairExample(prompt, answer), self.settings.train_on)
        if not self.takes_suffix:
            return self._outcome(row, self._expanded(marked, read.sizes, row), marked, read)
        if self.settings.train_on == "all":
            message = f"the prompts of {self.base.name} are read in both directions and cannot be trained"
            raise row.place.error(message, key="dataset.train_on", hint="Set dataset.train_on: answers.")
        found = self._processed(prompt, list(map(_blank, read.sizes)), answer)
        ids, of_answer = (found[name][0].tolist() for name in ("input_ids", "token_type_ids"))
        number = self.tokenizer.convert_tokens_to_ids(self.mark)
        last_picture = max(at for at, token in enumerate(ids) if token == number)
        labels = [token if own else IGNORED for token, own in zip(ids, of_answer, strict=True)]
        encoded = _Expanded(ids, labels, last_picture + 1, prompt, answer)
        return self._outcome(row, encoded, marked, read)

    def _expanded(self, marked: MarkedText, sizes: Sequence[tuple[int, int]], row: Row) -> _Expanded:
        """The tokens of a text, with those of pictures of these sizes in the place of their marks, and the labels."""
        (encoded,) = encode_marked([marked], self.tokenizer)
        number = self.tokenizer.convert_tokens_to_ids(self.mark)
        if encoded.input_ids.count(number) != len(sizes):
            raise row.place.error(f"its texts contain {self.mark}, which stands for a picture to the model")
        text = marked.text + (str(self.tokenizer.eos_token or "") if self.plain else "")
        ids, labels, rest, end = list[int](), list[int](), iter(sizes), 0
        for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
            run = self._run(next(rest)) if token == number else [token]
            ids += run
            labels += [IGNORED] * len(run) if token == number else [label]
            end = len(ids) if token == number else end
        if sizes and len(sizes) not in self._compared:
            self._compared.add(len(sizes))
            found = self._processed(text, list(map(_blank, sizes)))["input_ids"][0].tolist()
            if found[: len(ids)] != ids:
                message = "its processor does not replace each picture's token alone, so answers cannot be located"
                raise ModelError(message, key="base_model", hint="choose another base model")
        return _Expanded(ids, labels, end, text)

    def _run(self, size: tuple[int, int]) -> list[int]:
        """The tokens of a picture of this size."""
        if size not in self._runs:
            run = self._processed(self.mark, [_blank(size)], special=False)["input_ids"][0].tolist()
            number = self.tokenizer.convert_tokens_to_ids(self.mark)
            # a processor that gets the answer apart also puts the start of a text, and its end, beside the picture
            self._runs[size] = [token for token in run if token == number] if self.takes_suffix else run
        return self._runs[size]

    def _image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """How many tokens pictures of these sizes have together."""
        return sum(len(self._run(size)) for size in sizes)

    def _processed(
        self, text: str, pictures: Sequence[Any], suffix: str | None = None, *, special: bool | None = None
    ) -> Batch:
        """What the processor makes of a text and its pictures: all that the model reads.

        The tokenizer adds ``special`` tokens to a text that no template has written, unless the processor does.
        """
        options: dict[str, Any] = {"images": list(pictures)} if pictures else {}
        options |= {"suffix": [suffix]} if suffix else {}
        options["add_special_tokens"] = self.plain and not self.takes_suffix if special is None else special
        kind = "np" if self.takes_suffix else "pt"  # such a processor of transformers warns of its own way with tensors
        found = self.processor(text=[text], return_tensors=kind, **options)
        return {name: torch.as_tensor(value) for name, value in found.items() if name != "labels"}

    def _prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> str:
        """The text of turns up to the answer that the model gives."""
        if not self.plain:
            return self.template.render(list(messages), tools, prompt=True)
        return str(messages[-1]["content"]).replace(MARK, self.mark)

    def _outcome(self, row: Row, encoded: _Expanded, marked: MarkedText, read: _Read) -> Outcome:
        limit, ids, labels = self.settings.max_length, encoded.ids, encoded.labels
        outcome = Outcome(size=len(ids), flags=marked.flags)
        if len(ids) > limit:
            if self.settings.overlong == "error":
                message = f"has {len(ids)} tokens, more than dataset.max_length: {limit}"
                hint = "Raise dataset.max_length, or set dataset.overlong: truncate or drop."
                raise row.place.error(message, hint=hint)
            # one picture has its tokens before the cut or the row is left out
            if self.settings.overlong == "drop" or encoded.end_of_pictures > limit:
                outcome.reason = _PICTURES_OVERLONG if self._image_tokens(read.sizes) > limit else OVERLONG
                return outcome
            outcome.lost = sum(label != IGNORED for label in labels[limit:])
            outcome.flags |= Flag.TRUNCATED | (Flag.ANSWER_CUT if outcome.lost else 0)
            ids, labels = ids[:limit], labels[:limit]
        targets = sum(label != IGNORED for label in labels[1:])
        if not targets:
            outcome.reason = CUT_OFF if outcome.lost else NO_TARGET
            return outcome
        counted = {"image_tokens": self._image_tokens(read.sizes)}
        arrays = {"input_ids": ids, "labels": labels, **counted, **_stored(read.files, encoded.text)}
        arrays |= {"suffix": encoded.suffix} if self.takes_suffix else {}
        if self._generates:
            arrays |= self._asked(row, read)
        outcome.examples = [Example(arrays, len(ids), targets)]
        return outcome

    def _asked(self, row: Row, read: _Read) -> dict[str, str]:
        """The text of a row up to its last answer, and that answer, which evaluation compares.

        Raises:
            DataError: the last turn is no answer.
        """
        *asked, last = read.messages
        if last.get("role") != "assistant":
            message = f"ends with a turn of {last.get('role')}: there is no answer to compare"
            raise row.place.error(message, key="task.generate_metrics")
        return {"asked": self._prompt(asked, read.tools), "answer": str(last.get("content") or "")}

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        found = [self._inputs(each) for each in examples]
        lengths = [len(each.arrays["input_ids"]) for each in examples]
        for each, ids in zip(examples, found, strict=True):
            own, wanted = ids["input_ids"][0], torch.as_tensor(np.asarray(each.arrays["input_ids"], np.int64))
            if not torch.equal(own[: len(wanted)], wanted):
                raise DataError("the processor gives other tokens than when the rows were read", key="base_model")
        batch = self._joined(found, lengths, left=False)
        rows = [torch.as_tensor(np.asarray(each.arrays["labels"], np.int64)) for each in examples]
        batch["labels"] = torch.stack([F.pad(row, (0, max(lengths) - len(row)), value=IGNORED) for row in rows])
        if not training and self._generates:
            batch["_answer"] = [str(each.arrays["answer"]) for each in examples]
            changed = ({"text": each.arrays["asked"], "suffix": ""} for each in examples)
            batch["_asked"] = [
                replace(each, arrays=each.arrays | own) for each, own in zip(examples, changed, strict=True)
            ]
        return batch

    def _inputs(self, example: Example) -> Batch:
        pictures = [open_image(file.read(), file.path).convert("RGB") for file in _files(example)]
        suffix = str(example.arrays["suffix"]) if "suffix" in example.arrays else None
        return self._processed(str(example.arrays["text"]), pictures, suffix)

    @cached_property
    def _needs_pictures(self) -> bool:
        """Whether the processor reads no text without a picture."""
        try:
            self._processed("a text", [])
        except (IndexError, KeyError, TypeError, ValueError):
            return True
        return False

    @cached_property
    def _by_row(self) -> bool:
        """Whether the processor puts the pictures of a row together, in a tensor whose first side is that of rows."""
        found = self._processed(self.mark * 2, [_blank((32, 32))] * 2)
        return next((len(value) == 1 for name, value in found.items() if name.startswith("pixel_values")), False)

    def _joined(self, rows: Sequence[Batch], lengths: Sequence[int], *, left: bool) -> Batch:
        """Put what the processor gives of each row into one batch.

        What has the shape of ``input_ids`` is of tokens, and padded like them; all else is of pictures.
        """
        tokens = {name for row in rows for name, value in row.items() if value.shape == row["input_ids"].shape}
        width, batch = max(lengths), Batch()
        for name in sorted(tokens):
            filler = pad_token_id(self.tokenizer) if name == "input_ids" else 0
            values = [row[name][0, :length] for row, length in zip(rows, lengths, strict=True)]
            gaps = [(width - len(each), 0) if left else (0, width - len(each)) for each in values]
            batch[name] = torch.stack([F.pad(each, gap, value=filler) for each, gap in zip(values, gaps, strict=True)])
        for name in sorted({name for row in rows for name in row} - tokens):
            there = [row[name] for row in rows if name in row]
            edges = tuple(max(each.shape[at] for each in there) for at in range(1, there[0].ndim))
            if self._by_row:
                there = [row.get(name, there[0].new_zeros(1, *there[0].shape[1:])) for row in rows]
            batch[name] = torch.cat([_padded(each, edges) for each in there])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        given = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        targets = next_tokens(batch["labels"])
        inputs, text = as_computed(model, given), torch.arange(_FEW, device=targets.device)[None]
        head = output_head(inner_model(model), {"input_ids": text})  # for which no picture is cut
        if head is None:
            found = token_loss(plain_losses(model, inputs, targets))
        else:
            found = token_loss(losses_under(head, model, inputs, targets))
        return with_texts(
            found, batch.get("_answer"), lambda: [each["text"] for each in self._answers(model, batch["_asked"])]
        )

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        found = token_metrics(sums, num_targets)
        return generated_metrics(self.settings, self._own, outputs, found) if self._generates else found

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        found = parts_of_sums(rows, lambda sums, outputs, num_targets: token_metrics(sums, num_targets))
        if not self.settings.generate_metrics:
            return found
        return join(found, text_parts(self.settings.generate_metrics, [row.outputs[0] for row in rows]))

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        examples, _ = self._asking(rows, options.columns)
        yield from in_batches(examples, options.batch_size, lambda some: self._answers(model, some))

    def generator(self, model: nn.Module, columns: Mapping[str, str]) -> TextGenerator:
        def read(rows: Sequence[Row]) -> tuple[Batch, list[str]]:
            there = {name for row in rows for name in row.values}
            examples, asked = self._asking(rows, {name: each for name, each in columns.items() if each in there})
            return self._asked_inputs(model, examples), asked

        return replace(self._generator(model), read_rows=read)

    def _generator(self, model: Any) -> TextGenerator:
        settle_pad(self.tokenizer, model)
        stops = stop_tokens(self.tokenizer, chat=not self.plain)
        return TextGenerator(model, self.tokenizer, PromptForm(chat=True), stops)

    def _asking(self, rows: Sequence[Row], columns: Mapping[str, str]) -> tuple[list[Example], list[str]]:
        """Rows less the answer as examples, and the last words of each."""
        reader = self.read(table_of(rows, columns), answered=False)
        examples, asked = list[Example](), list[str]()
        for row in rows:
            read = self._read(row, reader, answered=False)
            text = self._prompt(read.messages, read.tools)
            examples.append(Example(_stored(read.files, text), len(text), 0))
            asked.append(str(read.messages[-1].get("content") or "").replace(MARK, "").strip() if read.messages else "")
        return examples, asked

    def _asked_inputs(self, model: Any, examples: Sequence[Example]) -> Batch:
        """The model's inputs of examples that are asked, padded on the left."""
        rows = [self._inputs(each) for each in examples]
        joined = self._joined(rows, [row["input_ids"].shape[1] for row in rows], left=True)
        return as_computed(model, on_device(joined, next(model.parameters()).device))

    @torch.inference_mode()
    def _answers(self, model: Any, examples: Sequence[Example]) -> list[dict[str, Any]]:
        settings = GenerationSettings(max_new_tokens=self.settings.max_new_tokens, num_beams=self.settings.num_beams)
        found = self._generator(model).answered(self._asked_inputs(model, examples), settings)
        return [{"text": text} for text, _, _ in found]

    def show(self, example: Example) -> Shown:
        ids, labels = (np.asarray(example.arrays[name]).tolist() for name in ("input_ids", "labels"))
        files = _files(example)
        opened = [open_image(file.read(), file.path) for file in files]
        images = [shown_image(each, file.path) for each, file in zip(opened, files, strict=True)]
        renderer = TokenRenderer(self.tokenizer)
        runs = [self._run(each.size) for each in opened]
        text = Text(fold_pictures(renderer.render(ids, [IGNORED, *labels[1:]]), runs))
        values = {"input_ids": ids, "labels": labels, "text": renderer.text(ids)}
        values |= {"images": [each.as_dict() for each in images]}
        return Shown([*images, text], values, f"{example.num_targets:,} trained")

    def probe(self) -> Batch:
        """Two texts with a picture of noise each."""
        return self._rows(f"{self.mark} a picture", f"{self.mark} a picture")

    def padded_probe(self, model: nn.Module) -> Batch:
        second = f"{self.mark} or" if self._needs_pictures else "a text"
        probe = self._rows(f"{self.mark} a picture", second, f"{self.mark} another picture")
        return as_computed(model, on_device(probe, inner_model(model).device))

    def check_model(self, model: nn.Module) -> None:
        try:
            refuse_later_tokens(model, as_computed(model, self.probe()))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            name = f"{type(model).__name__} of transformers {installed_version('transformers')}"
            message = f"{name} fails on a text with a picture: {one_line(str(error))}"
            raise ModelError(message, key="base_model", hint="try another release of transformers") from error

    def _rows(self, *texts: str) -> Batch:
        """A batch of texts with pictures of noise in the place of their marks."""
        rest, suffix = cycle(noise()), "an answer" if self.takes_suffix else None
        rows = [self._processed(text, [next(rest)] * text.count(self.mark), suffix) for text in texts]
        return self._joined(rows, [row["input_ids"].shape[1] for row in rows], left=False)

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        if getattr(config, "is_prompt_learning", False):
            message = "puts virtual tokens among those of pictures, for which models have no place"
            raise AdapterError(message, key="method.type", hint="Use a method that changes layers, as lora.")
        notes = fit_tokens(model, self.tokenizer, config, self.base.spec)
        if isinstance(config, TargetedConfig):
            vision, connector = _parts_of(model)
            if not connector and self.settings.connector != "frozen":
                message = f"{type(model).__name__} has no connector apart from its vision tower"
                raise ModelError(message, key="task.connector", hint="set connector: frozen, or vision: adapted")
            closed = (vision if self.settings.vision == "frozen" else []) + (
                connector if self.settings.connector != "adapted" else []
            )
            config.unreached = []
            if config.target_modules not in (None, "all-linear"):
                config.target_modules = _less(find_targets(model, config), closed) or config.target_modules
            said = f"vision tower {self.settings.vision}, connector {self.settings.connector}"
            config.unreached = closed
            self.adapts = f"language model adapted, {said}"
            if self.settings.connector == "trained":
                tops = [name for name in connector if not any(name.startswith(f"{other}.") for other in connector)]
                config.modules_to_save = [*(config.modules_to_save or ()), *tops]
        return notes

    def save(self, folder: Path) -> list[str]:
        found = {name: value for name, value in asdict(self.settings).items() if name not in settings.CODE}
        own = self.write_task(folder, settings=found, config={})
        return [own, *save_processor(folder, self.processor)]


def as_texts(messages: list[Message], mark: str) -> list[Message]:
    """Return messages whose contents are texts with the processor's own mark."""

    def text(content: Any) -> Any:
        return content.replace(MARK, mark) if isinstance(content, str) else content

    return [message | {"content": text(message.get("content"))} for message in messages]


def as_parts(messages: list[Message], mark: str = MARK) -> list[Message]:
    """Return messages whose contents, texts with marks, are lists of parts, as templates of such models read them."""

    def parts(content: Any) -> Any:
        if not isinstance(content, str):
            return content
        first, *others = content.split(MARK)
        texts = [[{"type": "image"}, {"type": "text", "text": text}] for text in others]
        found = [{"type": "text", "text": first}, *(part for pair in texts for part in pair)]
        return [part for part in found if part["type"] == "image" or part["text"]]

    return [message | {"content": parts(message.get("content"))} for message in messages]


def _stored(files: Sequence[File], text: str) -> dict[str, Any]:
    """A text and its pictures' files as columns of a store hold them."""
    described = [[file.path, file.digest.hex(), len(file.held)] for file in files]
    return {
        "text": text,
        "pictures": json.dumps(described),
        "seen": json.dumps([digest for _, digest, _ in described]),
        "contents": b"".join(file.held for file in files),
    }


def _files(example: Example) -> list[File]:
    """The files of an example's pictures."""
    found, start, contents = list[File](), 0, bytes(example.arrays["contents"])
    for path, digest, size in json.loads(str(example.arrays["pictures"])):
        found.append(File(path, contents[start : start + size], bytes.fromhex(digest)))
        start += size
    return found


def _blank(size: tuple[int, int]) -> Any:
    """A black picture."""
    from PIL import Image

    return Image.new("RGB", size)


def _padded(value: torch.Tensor, edges: tuple[int, ...]) -> torch.Tensor:
    """A tensor with zeros behind its values, up to these edges of all sides but the first."""
    gaps = [gap for at in range(len(edges), 0, -1) for gap in (0, edges[at - 1] - value.shape[at])]
    return F.pad(value, gaps)


def _less(named: list[str], closed: list[str]) -> list[str] | None:
    """Those that may be adapted of the modules that ``target_modules`` names; None: all of them.

    Raises:
        AdapterError: ``target_modules`` names no module that may be adapted.
    """
    kept = [name for name in named if name not in {*closed}]
    if not kept:
        message = f"matches only modules that task.vision and task.connector leave alone, as {named[0]}"
        raise AdapterError(message, key="method.target_modules")
    return kept if len(kept) < len(named) else None


def _parts_of(model: Any) -> tuple[list[str], list[str]]:
    """The names of the modules of the vision tower, and of those between it and the language model.

    Outside of the decoder and the head, what is below another PreTrainedModel is a tower; the rest is the connector.
    """
    from transformers import PreTrainedModel

    names = base_modules(model)
    decoder, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    beside = {name: module for name, module in names.items() if name and module not in decoder and module is not head}
    inner = set(model.base_model.modules()) - {model.base_model}
    around = {name for name in beside if any(module in decoder for module in names[name].modules())}
    towers = {name for name, each in beside.items() if isinstance(each, PreTrainedModel) and each in inner} - around
    vision = [name for name in beside if any(f"{name}.".startswith(f"{tower}.") for tower in towers)]
    return vision, [name for name in beside if name not in vision and name not in around]


TASK = ImageTextToText
