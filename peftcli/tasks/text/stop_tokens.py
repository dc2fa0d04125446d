"""Stop tokens: what training has taught the model to end its answers with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.errors import DataError
from peftcli.tasks.text.formats import Message
from peftcli.tasks.text.spans import Template, common_length

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_ASKED, _THOUGHT, _SAID = "Xq7Asked", "Xq7Thought", "Xq7Said"


@dataclass(frozen=True)
class StopTokens:
    """The ends of an answer, besides those in the base model's generation config, and the text before it."""

    ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    """Ends of turns in the chat template that are not special tokens."""
    lead: str = ""
    """After this, which the chat template writes before an answer's text, and after thinking if it has any, the text
    begins; empty: at once."""
    thinking: tuple[str, ...] = ()
    """What thinking begins with that ends with the lead."""

    def before(self, answer: str) -> int | None:
        """Return how many characters stand before an answer's text; None: the answer has to go on to say so."""
        begun, heads = answer.lstrip(), (self.lead, *self.thinking)
        if not begun.startswith(heads):
            return None if any(head.startswith(begun) for head in heads) else 0
        return answer.index(self.lead) + len(self.lead) if self.lead in answer else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> StopTokens:
    """Return what ends the answers of a model that was trained on conversations in the ``chat`` template, or not."""
    eos = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    if not chat:
        return StopTokens(eos)
    try:
        template = Template(tokenizer)
    except DataError:  # no conversation was trained with such a template
        return StopTokens(eos)
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    thinking, found, texts = _thinking(template), list[list[int]](), list[str]()
    inside = "".join(after for _, after in thinking)
    for closing in template.closings:
        marks = [number for number in tokenizer.encode(closing, add_special_tokens=False) if number in special]
        found += [marks] if marks else []
        texts += [] if marks else [closing]
    sure = [[number for number in marks if special[number] not in inside] for marks in found]
    firsts = {marks[0] for marks in sure if marks} or {marks[0] for marks in found}
    lead = template.lead
    for _, after in thinking:
        shared = lead[len(lead) - common_length(lead[::-1], after.rstrip()[::-1]) :]
        if shared[:1].isspace() or has_token(tokenizer, shared):  # not the end of a word
            lead = shared.lstrip()
    if not lead:  # an answer without thinking begins at once
        lead = next((after.strip() for _, after in thinking if has_token(tokenizer, after)), "")
    ended = [head for head, after in thinking if lead and after.rstrip().endswith(lead)]
    heads = (head for head in dict.fromkeys(ended) if head or has_token(tokenizer, lead))
    return StopTokens(eos | firsts, tuple(texts), lead, tuple(heads))


def has_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether the text contains a special or added token, which no word of an answer is."""
    return any(token in text for token in tokenizer.get_added_vocab() if token.strip())


def all_stops(stops: StopTokens, configured: int | list[int] | None) -> list[int]:
    """Return the ids that end an answer, sorted: these and those of a generation config's ``eos_token_id``."""
    named: Iterable[int] = configured if isinstance(configured, list) else () if configured is None else (configured,)
    return sorted(stops.ids.union(named))


def configured_stops(model: nn.Module) -> int | list[int] | None:
    """Return the ids that end an answer by the model's generation config, if it has one."""
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def missing_stops(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None, *, chat: bool) -> list[int]:
    """Return all ids that end an adapter's answers; none if ``configured`` names them already."""
    stops = all_stops(stop_tokens(tokenizer, chat=chat), configured)
    return [] if stops == all_stops(StopTokens(), configured) else stops


def _thinking(template: Template) -> list[tuple[str, str]]:
    """What the template writes before an answer's thinking, and between it and the text.

    The latter is no end, though it may look like one.
    """
    found = []
    question: Message = {"role": "user", "content": _ASKED}
    for key in ("reasoning_content", "reasoning", "thinking"):
        answer: Message = {"role": "assistant", "content": _SAID, key: _THOUGHT}
        try:
            text, prompt = template.render([question, answer]), template.render([question], prompt=True)
        except DataError:
            continue
        if text.find(_THOUGHT) < text.find(_SAID) and _THOUGHT in text:
            before, _, after = text.partition(_THOUGHT)
            if prompt.startswith(before) and prompt.rstrip() != before.rstrip():
                continue  # the prompt has ended it
            opening = before[common_length(before, prompt) :].strip()
            special = template.markers.match(opening)  # other channels than thinking's begin so too
            found.append((special.group() if special else opening, after.partition(_SAID)[0]))
    return found
