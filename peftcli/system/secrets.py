"""Keeps tokens and passwords out of all that is printed or written.

A secret is:

- a token of the Hugging Face hub, by its form (``hf_...``), and the one that the hub's login has stored;
- the user-info of a URL if it holds a password, or is so long that it may be a token: not the ``git`` of
  ``ssh://git@host``;
- the value of an environment variable whose name ends in TOKEN, KEY, SECRET or PASSWORD, and the password of a URL in
  any environment variable. Left alone is what much else is equal to: values of fewer than 8 characters, numbers, the
  path of a file or folder that exists, a model's special tokens (``EOS_TOKEN=<|im_end|>``), and for KEY words without a
  digit, since such a variable often names a column.

A secret is found as it is, and as URLs, JSON, Python's ``repr``, HTML and base64 write it; in base64 also behind a
user's name, as in ``Authorization: Basic``.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

_SHORTEST = 8
_CUT = 16
"""Characters of a longer secret that are enough to know it by: a message may have cut it."""
_HUB_TOKEN = r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[\w.-]{16,})"
_USER_INFO = (  # not the 80 of host:80/path@2
    r"""(?<=://)(?:[^/\s"<>@:]{0,200}:(?!\d+[/?#])[^\s"<>]{0,500}|[^/\s"<>@:]{16,500})(?=@)"""
)
_PASSWORD_OF_URL = re.compile(r"://(?P<user>[^/\s:@]*):(?!\d+[/?#])(?P<password>\S+)@")
_SPECIAL_TOKEN = re.compile(r"<\S*>|\[\S*\]")
_WORD = re.compile(r"[A-Za-z]+(?:[-_. ]+[A-Za-z]+)*")
SECRET_NAME = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
"""Names of environment variables that hold a secret."""
_PERCENT, _CODE = re.compile("%[0-9A-F]{2}"), re.compile(r"\\u[0-9a-f]{4}")
_IN_HTML = [str.maketrans({char: f"\\u{ord(char):04x}" for char in chars}) for chars in ("", "<>&", "<>&'")]
"""What JSON writes as codes, by itself and where it stands within HTML."""
_LAST_WORD = re.compile(r"(?<![!-~])[!-~]*\Z")
_URL_BEGUN = re.compile(r"""://[^\s"<>]{0,700}\Z""")


def redact(text: str) -> str:
    """``text`` with ``***`` for each secret."""
    return redactor()(text)


def redact_values(data: Any) -> Any:
    """``data`` with ``***`` for each secret, in every string in it and in the keys."""
    hide = redactor()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return hide(value)
        if isinstance(value, Mapping):
            return {walk(key): walk(inner) for key, inner in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return walk(data)


def redactor() -> Callable[[str], str]:
    """What ``redact`` does, for many texts: it looks up what is secret once."""
    return partial(_pattern(tuple(sorted(secrets()))).sub, "***")


def spans(text: str) -> list[tuple[int, int]]:
    """Where the secrets are in ``text``: start and end of each."""
    return [found.span() for found in _pattern(tuple(sorted(secrets()))).finditer(text)]


def settled(text: str) -> int:
    """How many characters of a text that is still growing can be shown: no secret ends, or may yet end, behind them."""
    known = tuple(sorted(secrets()))
    ends = [len(text), *(found.start() for each in (_LAST_WORD, _URL_BEGUN) if (found := each.search(text)))]
    ends += [len(text) - _begun(text, form) for form in _known_forms(known)]
    end = min(ends)
    return next((found.start() for found in _pattern(known).finditer(text) if found.end() > end), end)


def _begun(text: str, form: str) -> int:
    """How many of the last characters of the text are the first of ``form``, but not all of it."""
    return next((size for size in range(len(form) - 1, 0, -1) if text.endswith(form[:size])), 0)


def secrets() -> dict[str, str]:
    """The secrets that this process knows of, and where each of them stands."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        place = f"the environment variable {name}"
        if SECRET_NAME.search(name) and _is_secret(name, value.strip()):
            found.setdefault(value.strip(), place)
        if "://" in value and (url := _PASSWORD_OF_URL.search(value)):
            pair = f"{url['user']}:{url['password']}"
            found |= dict.fromkeys((pair, unquote(pair), url["password"], unquote(url["password"])), place)
    found |= dict.fromkeys(_stored_tokens(), "the hub's login")
    return {secret: place for secret, place in found.items() if len(secret) >= _SHORTEST}


def _is_secret(name: str, value: str) -> bool:
    if len(value) < _SHORTEST or _SPECIAL_TOKEN.fullmatch(value):
        return False
    if name.upper().endswith("KEY") and _WORD.fullmatch(value):
        return False
    with suppress(ValueError):
        float(value)
        return False
    with suppress(ValueError, OSError):
        return not (os.sep in value and Path(value).expanduser().exists())
    return True


def _stored_tokens() -> Iterator[str]:
    """The token of ``hf auth login``. huggingface_hub knows where it is, but is slow to import."""
    loaded = sys.modules.get("huggingface_hub.constants")
    path = getattr(loaded, "HF_TOKEN_PATH", None) or os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token"
    with suppress(OSError, ValueError, RuntimeError):
        file = Path(path).expanduser()
        if file.is_file():
            yield file.read_text(encoding="utf-8").strip()


def _hub_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")


@lru_cache(maxsize=1)
def _pattern(known: tuple[str, ...]) -> re.Pattern[str]:
    """Finds every secret; of the ``known`` the longest first, since one may be a part of another."""
    whole = map(re.escape, _known_forms(known))
    long = [secret for secret in known if len(secret) > _CUT]
    cut = [re.escape(secret[:_CUT]) + r"[^\s\"'<>]*" for secret in long if ":" not in secret]  # not a user's name first
    # the end of one, as of a long text that was shortened in its middle
    cut += [r"(?<=\.\.\.)[^\s\"'<>]{0,200}?" + re.escape(secret[-_CUT:]) for secret in long]
    return re.compile("|".join([*whole, *cut, _HUB_TOKEN, _USER_INFO]))


@lru_cache(maxsize=1)
def _known_forms(known: tuple[str, ...]) -> tuple[str, ...]:
    """All that the ``known`` secrets are written as, the longest first."""
    return tuple(sorted({form for secret in known for form in _forms(secret)}, key=len, reverse=True))


def _forms(secret: str) -> Iterator[str]:
    raw = os.fsencode(secret)
    yield secret
    for quoted in (quote(raw, safe=""), quote(raw), quote_plus(raw)):
        yield quoted
        yield _PERCENT.sub(lambda found: found[0].lower(), quoted)
    for in_ascii, mark, coded, slash in product((True, False), ('\\"', "\\u0022"), _IN_HTML, ("/", "\\/")):
        text = json.dumps(secret, ensure_ascii=in_ascii)[1:-1].replace('\\"', mark).translate(coded)
        yield text.replace("/", slash)
        yield _CODE.sub(lambda found: f"\\u{found[0][2:].upper()}", text).replace("/", slash)
    yield repr(secret)[1:-1]
    yield html.escape(secret)
    yield base64.b64encode(raw).decode().rstrip("=")
    for before in range(3):  # how many bytes share the first group of three with the secret
        known = base64.b64encode(bytes(before) + raw).decode()[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        yield known
        yield known.translate(str.maketrans("+/", "-_"))
