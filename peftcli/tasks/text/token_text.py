r"""Render token ids as text, token by token; characters that span several tokens stay whole.

A token of a byte-level tokenizer may contain part of a character. Decoded alone it would show U+FFFD, which is not in
the data. So tokens are joined until their bytes are text; bytes that never are (a row cut inside a character) are
written as ``\xe2\x82``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers.convert_slow_tokenizer import bytes_to_unicode

from peftcli.tasks.shown import TokenText
from peftcli.tasks.text.chat import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACED = re.compile("\ufffd+")
_SPACE = "\u2581"
"""How tokenizers in the manner of SentencePiece write a space."""
_WINDOW = 6
"""Tokens before one that may change how it is decoded."""


class TokenRenderer:
    """Renders token ids of one tokenizer as text that people can read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._added = {token: str(entry.content) for token, entry in tokenizer.added_tokens_decoder.items()}
        self._special = special_tokens(tokenizer)
        kinds = _decoders(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._spaces = not self._byte_level and bool(kinds & {"Metaspace", "ByteFallback"})
        self._alphabet = {mark: byte for byte, mark in bytes_to_unicode().items()}

    def text(self, ids: Sequence[int]) -> str:
        """Decode the ids, special tokens included."""
        decoded = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)

    def render(self, ids: Sequence[int], labels: Sequence[int] | None = None) -> list[TokenText]:
        """Render the ids token by token.

        A token whose label counts is trained; without ``labels`` every token is.
        """
        trained = [True] * len(ids) if labels is None else [label != IGNORED for label in labels]
        pieces = self._bytes(ids)
        if pieces is None:
            return [self._token(text, (token,), counts) for text, token, counts in self._windows(ids, trained)]
        rendered: list[TokenText] = []
        held, held_ids = b"", list[int]()
        for at, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
            held, held_ids = held + piece, [*held_ids, token]
            last = at + 1 == len(ids)
            closed = last or trained[at + 1] != trained[at] or token in self._added or ids[at + 1] in self._added
            if closed or not _ends_inside_a_character(held):
                rendered.append(self._token(held.decode("utf-8", "backslashreplace"), tuple(held_ids), trained[at]))
                held, held_ids = b"", []
        return rendered

    def _token(self, text: str, ids: tuple[int, ...], trained: bool) -> TokenText:
        return TokenText(text, ids, trained, ids[0] in self._special)

    def _bytes(self, ids: Sequence[int]) -> list[bytes] | None:
        """The bytes of each token; None if the tokenizer decodes by unknown rules."""
        if not (self._byte_level or self._spaces):
            return None
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        pieces = [self._bytes_of(token, name) for token, name in zip(ids, names, strict=True)]
        whole, decoded = b"".join(pieces).decode("utf-8", "replace"), self.text(ids)
        if _same(whole, decoded):
            return pieces
        if _same(whole.removeprefix(" "), decoded):  # some tokenizers put a space before a text
            first = next(at for at, piece in enumerate(pieces) if piece)
            pieces[first] = pieces[first].removeprefix(b" ")
            return pieces
        return None

    def _bytes_of(self, token: int, name: str) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if self._byte_level:
            try:
                return bytes(self._alphabet[mark] for mark in name)
            except KeyError:
                return name.encode()
        byte = _BYTE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.replace(_SPACE, " ").encode()

    def _windows(self, ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[str, int, bool]]:
        """The text that each token adds to the tokens before it."""
        out = []
        for at, token in enumerate(ids):
            start = max(0, at - _WINDOW)
            before, with_it = self.text(ids[start:at]), self.text(ids[start : at + 1])
            text = with_it[len(before) :] if with_it.startswith(before) else self.text([token])
            out.append((text, token, trained[at]))
        return out


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of tokens that mark something, such as BOS or the end of a turn, and are not text."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The kinds of decoding steps of a fast tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _same(one: str, other: str) -> bool:
    """Whether two texts are equal but for the number of U+FFFD in place of invalid bytes."""
    return _REPLACED.sub("\ufffd", one) == _REPLACED.sub("\ufffd", other)


def _ends_inside_a_character(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end == len(text) and error.reason == "unexpected end of data"
    return False
