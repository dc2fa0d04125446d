"""Keep tokens and passwords out of everything that is printed or written.

A secret is:

- a token of the Hugging Face hub, by its form (``hf_...``), and the one that the hub's login has stored;
- the user-info of a URL if it contains a password, or is long enough to be a token: not the ``git`` of
  ``ssh://git@host``;
- the value of an environment variable whose name ends in TOKEN, KEY, SECRET or PASSWORD, and the password of a URL in
  any environment variable. Values that are likely to occur elsewhere are not secrets: fewer than 8 characters, numbers,
  paths that exist, a model's special tokens (``EOS_TOKEN=<|im_end|>``), and for KEY words without a digit and paths,
  since such a variable often names a column or an object of a store. A URL's password of at most 8 letters is one only
  after its user's name.

Of a secret of several lines, such as a private key, each line that looks like a part of a key is one too. A secret is
found as it is, and as escaped in URLs, JSON, Python's ``repr``, HTML and base64; in base64 also after a user name, as
in ``Authorization: Basic``.
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

_MIN_LENGTH = 8
PART = 16
"""Characters that identify a longer secret: a message may contain only its beginning or end."""
_HUB_TOKEN = r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{16,}|(?:oauth|jwt)_[\w.-]{16,})"
_USER_INFO = (  # not the 80 of host:80/path@2
    r"""(?<=://)(?:[^/\s"<>@:]{0,200}:(?!\d+[/?#])[^\s"<>]{0,500}|[^/\s"<>@:]{16,500})(?=@)"""
)
_PASSWORD_OF_URL = re.compile(r"://(?P<user>[^/\s:@]*):(?!\d+[/?#])(?P<password>\S+)@")
_SPECIAL_TOKEN = re.compile(r"<\S*>|\[\S*\]")
_WORD = re.compile(r"[A-Za-z]+(?:[-_. ]+[A-Za-z]+)*")
_PATH = re.compile(
    r"(?=.*[-_.])(?=\.{0,2}/|.*\.[a-z]\w{1,4}$|(?!.*(?:[A-Za-z]\d+[A-Za-z]|[A-Za-z\d]{16})))[\w.-]*(?:/[\w.-]+)+/?"
)
"""Base64 contains either ``/`` or ``-`` and ``_``. A token of two parts begins with no slash, ends in no file's suffix,
and has digits between letters or a part without a break."""
_END_OF_LINE = re.compile(r"\s*(?:\n|\\n)\s*")
"""JSON writes it with a backslash, and so do many a private key."""
_KEY_LINE = re.compile(r"[A-Za-z\d+/=]{16,}|.*[A-Za-z\d+]{16,}.*")
"""URLs contain long runs with ``/`` too."""
SECRET_NAME = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
"""Names of environment variables that contain a secret."""
_PERCENT, _CODE = re.compile("%[0-9A-F]{2}"), re.compile(r"\\u[0-9a-f]{4}")
_IN_HTML = [str.maketrans({char: f"\\u{ord(char):04x}" for char in chars}) for chars in ("", "<>&", "<>&'")]
"""What JSON escapes, by itself and within HTML."""
_LAST_WORD = re.compile(r"(?<![!-~])[!-~]*\Z")
_URL_BEGUN = re.compile(r"""://[^\s"<>]{0,700}\Z""")


def redact(text: str) -> str:
    """Replace each secret in ``text`` by ``***``."""
    return redactor()(text)


def redact_values(data: Any) -> Any:
    """Replace each secret by ``***``, in every string of ``data`` and in its keys."""
    hide = redactor()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return hide(value)
        if isinstance(value, Mapping):
            return {walk(key): walk(inner) for key, inner in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return walk(data)


def redactor() -> Callable[[str], str]:
    """Return a function like ``redact`` for many texts: it looks the secrets up once."""
    return partial(_pattern(tuple(sorted(known_secrets()))).sub, "***")


def secret_spans(text: str) -> list[tuple[int, int]]:
    """Return start and end of each secret in ``text``."""
    return [found.span() for found in _pattern(tuple(sorted(known_secrets()))).finditer(text)]


def safe_length(text: str) -> int:
    """Return how many characters of a growing text can be printed: no secret can reach from them into the rest."""
    known = tuple(sorted(known_secrets()))
    ends = [len(text), *(found.start() for each in (_LAST_WORD, _URL_BEGUN) if (found := each.search(text)))]
    ends += [len(text) - _partial_length(text, form) for form in _known_forms(known)]
    end = min(ends)
    return next((found.start() for found in _pattern(known).finditer(text) if found.end() > end), end)


def _partial_length(text: str, form: str) -> int:
    """Return the length of the longest proper prefix of ``form`` that ``text`` ends with."""
    return next((size for size in range(len(form) - 1, 0, -1) if text.endswith(form[:size])), 0)


def known_secrets() -> dict[str, str]:
    """Return the secrets that this process knows -> where each comes from."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        origin = f"the environment variable {name}"
        if SECRET_NAME.search(name) and _is_secret(name, value.strip()):
            lines = filter(_KEY_LINE.fullmatch, _END_OF_LINE.split(value.strip()))
            found = dict.fromkeys((value.strip(), *lines), origin) | found
        if "://" in value and (url := _PASSWORD_OF_URL.search(value)):
            pair, password = f"{url['user']}:{url['password']}", url["password"]
            is_common = url["user"] and password.isalpha() and len(password) <= _MIN_LENGTH
            alone = () if is_common else (password, unquote(password))
            found |= dict.fromkeys((pair, unquote(pair), *alone), origin)
    found |= dict.fromkeys(_login_token(), "the hub's login")
    return {secret: origin for secret, origin in found.items() if len(secret) >= _MIN_LENGTH}


def _is_secret(name: str, value: str) -> bool:
    if len(value) < _MIN_LENGTH or _SPECIAL_TOKEN.fullmatch(value):
        return False
    if name.upper().endswith("KEY") and (_WORD.fullmatch(value) or _PATH.fullmatch(value)):
        return False
    with suppress(ValueError):
        float(value)
        return False
    with suppress(ValueError, OSError):
        return not (os.sep in value and Path(value).expanduser().exists())
    return True


def _login_token() -> Iterator[str]:
    """Yield the token of ``hf auth login``. Importing huggingface_hub, which knows its file, would be slow."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")
    loaded = sys.modules.get("huggingface_hub.constants")
    path = getattr(loaded, "HF_TOKEN_PATH", None) or os.environ.get("HF_TOKEN_PATH") or home / "token"
    with suppress(OSError, ValueError, RuntimeError):
        file = Path(path).expanduser()
        if file.is_file():
            yield file.read_text(encoding="utf-8").strip()


@lru_cache(maxsize=1)
def _pattern(known: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern of every secret; of the ``known`` ones the longest first, since one may contain another."""
    whole = map(re.escape, _known_forms(known))
    long = [secret for secret in known if len(secret) > PART]
    # without those that begin with a user's name
    parts = [re.escape(secret[:PART]) + r"[^\s\"'<>]*" for secret in long if ":" not in secret]
    # the end of a secret, in a text that was shortened in the middle
    parts += [r"(?<=\.\.\.)[^\s\"'<>]{0,200}?" + re.escape(secret[-PART:]) for secret in long]
    return re.compile("|".join([*whole, *parts, _HUB_TOKEN, _USER_INFO]))


@lru_cache(maxsize=1)
def _known_forms(known: tuple[str, ...]) -> tuple[str, ...]:
    """Return every form of the ``known`` secrets, the longest first."""
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
