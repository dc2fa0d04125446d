"""Requests to the hub, and the files that come of them.

What happens when the hub or the network fails:

- 401, 403, 404 and other refusals: HubError at once.
- 409, 412 (somebody else changed the repository): its state is read again, one retry, then HubError.
- 429, 5xx, dropped and slow connections, files of another size or hash than the hub says: at most 5 tries in all, then
  NetworkError.
- the hub cannot be reached at all: NetworkError after the first try.
- answers that no hub gives: HubError at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import ERROR
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from peftcli.errors import HubError, NetworkError, PeftcliError, StorageError
from peftcli.system import signals
from peftcli.system.secrets import redact

DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each further try."""
LONGEST_WAIT = 120.0
"""The longest ``Retry-After``, in seconds, that is waited for."""
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as dead."""

_OFFICIAL = "https://huggingface.co"
"""Where mirrors send for what they do not have."""
_POLL = 0.2
"""Seconds between looks for a signal."""
_PROGRESS = 1 << 20
"""Bytes of a file that must have come before its connection dropped for the next request to be no new try."""
_NAME = re.compile(r"\w[\w.+=-]{0,127}")
"""Of a commit or a file's content. The cache makes file names of them."""

T = TypeVar("T")


def endpoint() -> str:
    """Base URL of the hub. Read at each call: huggingface_hub reads HF_ENDPOINT once, when imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def is_repo_id(text: str) -> bool:
    """Whether ``text`` could be the name of a repository, ``user/name`` or an old ``name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        return True
    return False


def is_of_huggingface_hub(error: BaseException) -> bool:
    """Whether an error was raised there. Of an answer that it does not expect, it raises anything."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    return next((p == "huggingface_hub" for p in reversed(packages) if p in ("huggingface_hub", "peftcli")), False)


def shown(text: str) -> str:
    """``text`` of the hub or the network in a message: without secrets, on one line."""
    return "".join(char if char.isprintable() else " " for char in redact(text))


def fetched(
    repo_id: str, patterns: Sequence[str], revision: str | None = None, *, ignored: Sequence[str] = (), what: str = ""
) -> Path:
    """A model repository's files in the cache, fetched if need be.

    Without the hub, a copy that is in the cache already serves.

    Args:
        repo_id: its name on the hub.
        patterns: of the names of the files that are wanted. The folder may hold others.
        revision: branch, tag or commit; by default main.
        ignored: patterns of names that are not wanted after all.
        what: what messages call it, by default its name.

    Raises:
        HubError: the hub has no such repository, or refuses it.
        NetworkError: the hub cannot be reached, and the cache has no whole copy.
        StorageError: the cache cannot be written.
    """
    from huggingface_hub import constants, snapshot_download

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    held = _files(blobs)

    def download(local_files_only: bool = False) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored) or None,
                endpoint=endpoint(),
                local_files_only=local_files_only,
                library_name="peftcli",
            )
        )

    def fetch() -> Path:
        damaged: list[Path] = []
        try:
            folder = download()
        finally:  # a later try or command would take them for whole
            for blob in _files(blobs) - held:
                if not _is_whole(blob):
                    blob.unlink(missing_ok=True)
                    damaged.append(blob)
        if damaged:
            raise Unanswered("what came of a file has another hash than the hub says")
        return folder

    try:
        return retried(fetch, what or repo_id, downloads=True)
    except NetworkError:
        with contextlib.suppress(OSError):
            return download(local_files_only=True)
        raise


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.glob("*") if path.is_file() and path.suffix != ".incomplete"}


def _is_whole(blob: Path) -> bool:
    """Whether a file of the cache has the content that its name says, which is the hash that the hub gave for it.

    That is SHA-256, or git's hash of small files; of some mirrors SHA-1. Other names say nothing.
    """
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    digests = [hashlib.sha256()] if len(blob.name) == 64 else [hashlib.sha1(), git]
    with blob.open("rb") as file:
        while block := file.read(1 << 20):
            for digest in digests:
                digest.update(block)
    return blob.name in {digest.hexdigest() for digest in digests}


class Unanswered(Exception):
    """A request that may be tried again. Raised inside huggingface_hub, so that its own retries end."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _NoHub(Exception):
    """An answer that no hub gives. Raised inside huggingface_hub, before it is believed."""


@dataclass
class Line:
    """What is known of the connection to the hub."""

    downloads: bool
    """Whether no request is made twice in one try, so that a second one is a retry."""
    answered: bool = False
    """Whether the hub ever answered."""
    open: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests without an answer so far, of downloads without a whole one, and at which byte of the file each began."""
    streams: list[Any] = field(default_factory=list)
    """Its connections."""
    stopped: bool = False
    """Whether a signal has ended the command, and all requests with it."""
    last: dict[int, tuple[tuple[str, str], int, Any]] = field(default_factory=dict)
    """Of each thread the last request, where it began, and its answer, which may still be on its way."""

    def tried(self, action: Callable[[], T], what: str) -> T:
        """What ``action`` returns, tried again as the module's docstring says. Messages call it ``what``."""
        seen: Counter[int] = Counter()
        for delay in (*DELAYS, None):
            self.open.clear()
            self.last.clear()
            try:
                return action()
            except PeftcliError:
                raise
            except Exception as error:
                fault = _fault(error, self, what)
                if fault is None:
                    raise
            seen[fault.retries] += 1
            if delay is None or seen[fault.retries] > fault.retries or fault.wait > LONGEST_WAIT:
                # Without its cause: huggingface_hub's messages repeat URLs and what the server said, secrets included.
                raise fault.error from None
            time.sleep(max(delay, fault.wait))
        raise AssertionError("unreachable")

    def on_request(self, request: Any) -> None:
        limits = {"connect": CONNECT_TIMEOUT, "read": ANSWER_TIMEOUT, "write": ANSWER_TIMEOUT, "pool": ANSWER_TIMEOUT}
        request.extensions = {**request.extensions, "timeout": limits, "trace": self.on_event}
        if self.stopped:
            raise Unanswered("stopped")
        if _origin(str(request.url)) not in (_origin(endpoint()), _origin(_OFFICIAL)):
            request.headers.pop("Authorization", None)  # huggingface_hub verifies uploads wherever the hub says
        name = (request.method, str(request.url))
        part = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(part[1]) if part else 0
        if name in self.open and start < self.open[name] + _PROGRESS:
            raise Unanswered("the connection was dropped, or no answer came")
        before, begun, answer = self.last.pop(threading.get_ident(), ((), 0, None))
        if name == before and start < begun + _PROGRESS and _was_cut(answer):
            raise Unanswered("the connection was dropped in the middle of an answer")
        self.open[name] = start

    def on_event(self, event: str, info: Any) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.streams.append(info["return_value"])
            if self.stopped:
                self.hang_up()

    def hang_up(self) -> None:
        """Ends all requests, of whatever thread."""
        self.stopped = True
        for stream in self.streams:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def on_response(self, response: Any) -> None:
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        self.answered = True
        status = response.status_code
        name = (response.request.method, str(response.request.url))
        self.last[threading.get_ident()] = (name, self.open.get(name, 0), response)
        if not self.downloads or 300 <= status < 400:
            self.open.pop(name, None)
        if status in (408, 429) or status >= 500:
            raise Unanswered(f"the hub answers {status}", _wait_asked(response.headers))
        if status == 409 and b"conflicting operation" in response.read():
            hf_raise_for_status(response)  # create_repo itself would ask again for ever
        _check_names(response)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _was_cut(response: Any) -> bool:
    """Whether less of an answer came than it said."""
    length = response.headers.get("Content-Length", "") if response.request.method != "HEAD" else ""
    return bool(length.isdecimal() and response.num_bytes_downloaded < int(length))


def _check_names(response: Any) -> None:
    """Raises ``_NoHub`` for hashes that are none: huggingface_hub makes paths of them, ``../`` and all."""
    path = response.request.url.path
    if "/resolve/" in path:
        headers = ("X-Repo-Commit", "X-Linked-Etag", "ETag")
        names = [response.headers.get(header, "x").removeprefix("W/").strip('"') for header in headers]
        if not all(map(_NAME.fullmatch, names)):
            raise _NoHub("a hash that is none")
    elif "/api/" in path and response.status_code == 200:
        with contextlib.suppress(ValueError, RecursionError):
            told = json.loads(response.read())
            commit = told.get("sha") if isinstance(told, dict) else None
            if commit is not None and not (isinstance(commit, str) and _NAME.fullmatch(commit)):
                raise _NoHub("a commit that is none")


def _wait_asked(headers: Any) -> float:
    """Seconds that the answer asks to wait: ``Retry-After: 3``, or ``RateLimit: "api";r=0;t=3``."""
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"\br=0;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def watched(downloads: bool = False) -> Iterator[Line]:
    """Inside, huggingface_hub's HTTP client has time limits, and neither retries nor log lines of its own.

    Progress bars are left to terminals.

    Args:
        downloads: whether no request is made twice in one try, so that a second one is a retry of huggingface_hub's.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        _http,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    # No public function gives the factory back, and a user may have set one for a proxy or a certificate.
    line, factory, verbosity = Line(downloads), _http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()

    def build() -> Any:
        client = factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], line.on_request],
            "response": [*hooks["response"], line.on_response],
        }
        return client

    undecided = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    hide_bars = undecided and not sys.stderr.isatty()
    done = threading.Event()
    threading.Thread(target=_hang_up_when_stopped, args=(line, done), daemon=True).start()
    set_client_factory(build)
    logging.set_verbosity(ERROR)
    if hide_bars:
        disable_progress_bars()
    try:
        yield line
    finally:
        done.set()
        if hide_bars:
            enable_progress_bars()
        logging.set_verbosity(verbosity)
        set_client_factory(factory)


def _hang_up_when_stopped(line: Line, done: threading.Event) -> None:
    """huggingface_hub fetches in threads, and waits for them though a signal has ended the command."""
    while not done.wait(_POLL):
        stop = signals.current()
        if stop.signal and stop.at_once:
            return line.hang_up()
    return None


@dataclass(frozen=True)
class _Fault:
    """A failure, as the user sees it if it is final."""

    error: PeftcliError
    retries: int = 0
    """How often this kind of failure is tried again."""
    wait: float = 0.0


def retried(action: Callable[[], T], what: str, *, downloads: bool = False) -> T:
    """What ``action`` returns, tried again as the module's docstring says. Messages call it ``what``."""
    with watched(downloads) as line:
        return line.tried(action, what)


def _fault(error: BaseException, line: Line, what: str) -> _Fault | None:
    """What a failure of huggingface_hub means; None when it is a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            hint = "unset HF_HUB_OFFLINE to reach the hub"
            return _Fault(NetworkError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set", hint=hint))
        if isinstance(cause, Unanswered):
            return _dropped(what, cause.reason, cause.wait)
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, what, reading=line.downloads)
        if isinstance(cause, _NoHub) or type(cause).__name__ == "TooManyRedirects":
            return _no_hub(what, cause)
        if isinstance(cause, HTTPError):  # httpx's or httpx2's, whichever this huggingface_hub uses
            if not line.answered and type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                message = f"{what}: cannot reach {endpoint()} ({cause})"
                return _Fault(NetworkError(shown(message), hint="check the network, and HF_ENDPOINT if it is set"))
            return _dropped(what, f"{type(cause).__name__} {cause}")
        if isinstance(cause, (ConnectionError, TimeoutError)):  # hf_xet's
            return _dropped(what, str(cause))
    if isinstance(error, OSError) and error.errno is not None:
        return _Fault(StorageError(shown(f"{what}: {error.strerror}"), file=error.filename))
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return _dropped(what, "what came of a file has another size than the hub says")
    return _no_hub(what, error) if is_of_huggingface_hub(error) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _dropped(what: str, reason: str, wait: float = 0.0) -> _Fault:
    hint = f"wait {wait:.0f} seconds, then run the same command again" if wait else "run the same command again later"
    return _Fault(NetworkError(shown(f"{what}: {reason}"), hint=hint), retries=len(DELAYS), wait=wait)


def _no_hub(what: str, error: BaseException) -> _Fault:
    reason = str(error) if isinstance(error, _NoHub) else " ".join(f"{type(error).__name__}: {error}".split())
    text = f"{shown(what)}: {shown(endpoint())} does not answer as a hub does ({shown(reason)[:200]})"
    return _Fault(HubError(text, hint="check HF_ENDPOINT if it is set; or a page of the network came in between"))


def _refusal(error: Any, what: str, *, reading: bool) -> _Fault:
    """The hub's answer below 500, in words."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, said = error.response.status_code, (error.server_message or "").strip()
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if status == 401:
        message = "the hub does not accept the token" if get_token() else "the hub asks for a token"
        hint = f"{login} to a valid token of https://huggingface.co/settings/tokens"
    elif isinstance(error, GatedRepoError):
        message, hint = "access to this repository must be granted first", "ask for it on the repository's page"
    elif status == 403:
        message = "the token may not do this"
        access = "read access to this repository" if reading else "write access to this name"
        hint = f"use a token with {access}: https://huggingface.co/settings/tokens"
    elif isinstance(error, RevisionNotFoundError):
        message, hint = "no such revision", "check the revision"
    elif isinstance(error, EntryNotFoundError):
        message, hint = "a file that it lists is missing", "ask its owner"
    elif status == 404:
        message = "no such repository, or the token may not see it"
        hint = f"check the name; for a private repository {login}"
    elif status in (409, 412):
        message, hint = "somebody else is changing this repository", "run the same command again"
    else:
        message, hint = "the hub refuses", ""
    text = shown(f"{what}: {message} ({status})") + (f": {shown(said)[:300]}" if said else "")
    return _Fault(HubError(text, hint=hint or None), retries=1 if status in (409, 412) else 0)
