"""Requests to the hub, with retries, and downloads of its files.

What happens when the hub or the network fails:

- 401, 403, 404 and other refusals: HubError at once.
- 409, 412 (somebody else changed the repository): read its state again, retry once, then HubError.
- 429, 5xx, dropped and slow connections, files whose size or hash differs from the hub's: at most 5 attempts, then
  NetworkError.
- the hub cannot be reached at all: NetworkError after the first attempt.
- responses that do not come from a hub: HubError at once.
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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from logging import ERROR
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from peftcli.errors import HubError, NetworkError, PeftcliError, PeftWarning, StorageError, UsageError, causes
from peftcli.system import signals
from peftcli.system.secrets import redact

RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each retry."""
_MAX_WAIT = 120.0
"""The longest ``Retry-After``, in seconds, that a retry waits for."""
_CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as dead."""

_OFFICIAL = "https://huggingface.co"
"""Where mirrors redirect requests for files that they do not have."""
_POLL = 0.2
"""Seconds between checks for a signal."""
_PROGRESS = 1 << 20
"""A dropped download that received at least this many bytes continues without counting as a retry."""
_HASH = re.compile(r"\w[\w.+=-]{0,127}")
"""A commit or an ETag. huggingface_hub uses them as file names in its cache."""

DOWNLOAD_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "headers", "user_agent")
"""Options of huggingface_hub's downloads that callers may give."""
UNUSED_OPTIONS = {
    "etag_timeout": "each request has a time limit",
    "library_name": "the hub sees peftcli",
    "library_version": "the hub sees peftcli",
    "local_dir": "files are kept in the cache; see cache_dir",
    "proxies": "HTTP_PROXY and HTTPS_PROXY name them",
    "resume_download": "every download is resumed",
}
"""Options of older or other downloads of huggingface_hub that change nothing -> why."""

_listed: set[Path] = set()
"""Folders of the cache whose files the hub has listed to this process, also where the list could not be written."""

T = TypeVar("T")


def endpoint() -> str:
    """Return the base URL of the hub. Read at each call: huggingface_hub reads HF_ENDPOINT only when imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def is_repo_id(text: str) -> bool:
    """Return whether ``text`` is a valid repository name: ``user/name``, or an old ``name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        return True
    return False


def full_repo_id(repo_id: str, token: str | bool | None) -> str:
    """Return the repository's name, with that of the token's user before one without a namespace.

    Raises:
        HubError: the hub does not accept the token.
        NetworkError: the hub cannot be reached.
    """
    if "/" in repo_id or not is_repo_id(repo_id):
        return repo_id
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint(), token=token, library_name="peftcli")
    return f"{retry(api.whoami, repo_id)['name']}/{repo_id}"


def raised_by_huggingface_hub(error: BaseException) -> bool:
    """Return whether huggingface_hub raised the error. On an unexpected response it may raise any exception."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules]
    return next((p == "huggingface_hub" for p in reversed(packages) if p in ("huggingface_hub", "peftcli")), False)


def clean_line(text: str) -> str:
    """Return text from the hub or the network for a message: without secrets, on one line."""
    return "".join(char if char.isprintable() else " " for char in redact(text))


@contextlib.contextmanager
def _checked(repo_id: str, cache_dir: str | None) -> Iterator[None]:
    """Remove the files downloaded inside whose hash is wrong, and raise RetryableError: a later try would use them."""
    from huggingface_hub import constants

    blobs = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    before, damaged = _complete_blobs(blobs), list[Path]()
    try:
        yield
    finally:
        for blob in _complete_blobs(blobs) - before:
            if not _matches_hash(blob):
                blob.unlink(missing_ok=True)
                damaged.append(blob)
    if damaged:
        raise RetryableError("the hash of a downloaded file differs from the hub's")


def download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``download_files`` among ``given``, whose others may mean something else.

    Warns of those that change nothing.
    """
    for name in [name for name in UNUSED_OPTIONS if given.get(name) is not None]:
        warnings.warn(f"{name} changes nothing: {UNUSED_OPTIONS[name]}", PeftWarning, stacklevel=4)
    return {name: given[name] for name in DOWNLOAD_OPTIONS if given.get(name) is not None}


def download_files(
    repo_id: str,
    patterns: Sequence[str],
    revision: str | None = None,
    *,
    ignored: Sequence[str] = (),
    needed: Sequence[str] = (),
    what: str = "",
    **options: Any,
) -> Path:
    """Download the files of a model repository into the cache; return their folder.

    If the hub cannot be reached, the copy in the cache is used, unless it is known to lack a file of ``needed``, by
    default of ``patterns``; if that is not known, with a warning. The folder may contain other files. ``what`` is how
    messages name the repository; ``options`` are others of ``snapshot_download``: token, cache_dir, ...

    Raises:
        HubError: the repository does not exist, or the hub refuses access.
        NetworkError: the hub cannot be reached, and the cache has no copy, or a part of one.
        StorageError: the cache cannot be written.
    """
    from huggingface_hub import errors, snapshot_download

    settings = {"revision": revision or None, "ignore_patterns": list(ignored) or None, "library_name": "peftcli"}
    download: Any = partial(snapshot_download, repo_id, endpoint=endpoint(), **{**settings, **options})
    cached = partial(download, allow_patterns=[*(needed or patterns)], local_files_only=True, force_download=False)

    def fetch() -> Path:
        with _checked(repo_id, options.get("cache_dir")):
            return Path(download(allow_patterns=[*patterns]))

    try:
        if options.get("local_files_only"):
            found = Path(cached())
        else:
            with hub_session(downloads=True) as session:
                found = session.retry(fetch, what or repo_id)
            if session.listed:
                _listed.add(found)
    except errors.LocalEntryNotFoundError:
        message = f"{what or repo_id}: not in the cache, or not all of it, and local_files_only is set"
        raise NetworkError(message) from None
    except NetworkError as error:
        try:
            found = Path(cached())
        except OSError:
            raise error from None
    if not _is_listed(found) and not all((found / name).is_file() for name in needed or patterns):
        _warn_of_partial_copy(repo_id, found)
    return found


@cache
def _warn_of_partial_copy(repo_id: str, folder: Path) -> None:
    """Warn once of each folder in the cache that may be incomplete."""
    message = f"{repo_id}: the copy in the cache was downloaded file by file, and may lack files that the hub has"
    warnings.warn(message, PeftWarning, stacklevel=3)


def listed_files(folder: Path) -> set[str] | None:
    """Return the files that the hub has at the commit whose files are in ``folder`` of the cache.

    huggingface_hub notes them, and then finds out itself what the cache lacks. None: they are not known, because each
    of the folder's files was downloaded alone, as by PEFT.
    """
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return {*json.loads((folder.parents[1] / "trees" / f"{folder.name}.json").read_bytes())["files"]}
    return None


def _is_listed(folder: Path) -> bool:
    return folder in _listed or listed_files(folder) is not None


def refuse_partial_copy(folder: Path, what: str, key: str | None = None) -> None:
    """Raise NetworkError if it is not known whether the hub has a file that ``folder`` of the cache lacks."""
    if not _is_listed(folder):
        message = f"{what}: the cache has a part of it only, and the hub cannot be reached"
        raise NetworkError(message, key=key, hint="run the same command again where the hub can be reached")


def _complete_blobs(folder: Path) -> set[Path]:
    return {path for path in folder.glob("*") if path.is_file() and path.suffix != ".incomplete"}


def _matches_hash(blob: Path) -> bool:
    """Return whether the content of a cached file matches its name, which is the hash that the hub gave.

    The hash is SHA-256, or git's hash for small files, or SHA-1 on some mirrors. Other names are not hashes.
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


class RetryableError(Exception):
    """A request failed and may be retried. Raised inside huggingface_hub, to end its own retries."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class _NotAHubResponse(Exception):
    """The response does not come from a hub. Raised in the HTTP hook, before huggingface_hub parses it."""


@dataclass
class HubSession:
    """The state of the requests that huggingface_hub makes."""

    downloads: bool
    """Whether one attempt makes each request once, so that a second equal request is a retry of huggingface_hub's."""
    answered: bool = False
    """Whether the hub has ever responded."""
    listed: bool = False
    """Whether this attempt got the list of a model repository's files from the hub."""
    pending: dict[tuple[str, str], int] = field(default_factory=dict)
    """Requests without a (for downloads: complete) response, with the byte of the file at which each began."""
    streams: list[Any] = field(default_factory=list)
    """The open connections."""
    stopped: bool = False
    """Whether a signal has ended the command, and all requests with it."""
    last: dict[int, tuple[tuple[str, str], int, Any]] = field(default_factory=dict)
    """The last request of each thread, the byte at which it began, and its response, which may be incomplete."""

    def retry(self, action: Callable[[], T], what: str) -> T:
        """Return the result of ``action``, retried as the module's docstring says. Messages call it ``what``."""
        seen: Counter[int] = Counter()
        for delay in (*RETRY_DELAYS, None):
            self.pending.clear()
            self.last.clear()
            self.listed = False
            try:
                return action()
            except PeftcliError:
                raise
            except Exception as error:
                failure = _classify(error, self, what)
                if failure is None:
                    raise
            seen[failure.retries] += 1
            if delay is None or seen[failure.retries] > failure.retries or failure.wait > _MAX_WAIT:
                # Without its cause: huggingface_hub's messages repeat URLs and the server's text, secrets included.
                raise failure.error from None
            time.sleep(max(delay, failure.wait))
        raise AssertionError("unreachable")

    def on_request(self, request: Any) -> None:
        limits = {"connect": _CONNECT_TIMEOUT, "read": READ_TIMEOUT, "write": READ_TIMEOUT, "pool": READ_TIMEOUT}
        request.extensions = {**request.extensions, "timeout": limits, "trace": self.on_event}
        if self.stopped:
            raise RetryableError("stopped")
        if _origin(str(request.url)) not in (_origin(endpoint()), _origin(_OFFICIAL)):
            request.headers.pop("Authorization", None)  # the hub may name any host for the check of an upload
        name = (request.method, str(request.url))
        part = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(part[1]) if part else 0
        if name in self.pending and start < self.pending[name] + _PROGRESS:
            raise RetryableError("the connection was dropped, or the hub did not respond")
        before, begun, response = self.last.pop(threading.get_ident(), ((), 0, None))
        if name == before and start < begun + _PROGRESS and _is_incomplete(response):
            raise RetryableError("the connection was dropped in the middle of a response")
        self.pending[name] = start

    def on_event(self, event: str, info: Any) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.streams.append(info["return_value"])
            if self.stopped:
                self.close()

    def close(self) -> None:
        """End all requests, in every thread."""
        self.stopped = True
        for stream in self.streams:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def on_response(self, response: Any) -> None:
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        self.answered = True
        status = response.status_code
        name = (response.request.method, str(response.request.url))
        self.last[threading.get_ident()] = (name, self.pending.get(name, 0), response)
        if not self.downloads or 300 <= status < 400:
            self.pending.pop(name, None)
        if status in (408, 429) or status >= 500:
            raise RetryableError(f"the hub responded with status {status}", _retry_after(response.headers))
        if status == 409 and b"conflicting operation" in response.read():
            hf_raise_for_status(response)  # create_repo itself would retry for ever
        _check_hashes(response)
        if re.search("/api/models/.+/tree/", response.request.url.path):
            self.listed = status == 200


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _is_incomplete(response: Any) -> bool:
    """Return whether fewer bytes arrived than the response announced."""
    length = response.headers.get("Content-Length", "") if response.request.method != "HEAD" else ""
    return bool(length.isdecimal() and response.num_bytes_downloaded < int(length))


def _check_hashes(response: Any) -> None:
    """Raise ``_NotAHubResponse`` for malformed hashes: huggingface_hub makes paths of them, even of ``../``."""
    path = response.request.url.path
    if "/resolve/" in path or "/api/resolve-cache/" in path:  # where the hub sends on who asks for a small file
        headers = ("X-Repo-Commit", "X-Linked-Etag", "ETag")
        hashes = [response.headers.get(header, "x").removeprefix("W/").strip('"') for header in headers]
        if not all(map(_HASH.fullmatch, hashes)):
            raise _NotAHubResponse("a malformed hash")
    elif "/api/" in path and response.status_code == 200:
        with contextlib.suppress(ValueError, RecursionError):
            data = json.loads(response.read())
            commit = data.get("sha") if isinstance(data, dict) else None
            if commit is not None and not (isinstance(commit, str) and _HASH.fullmatch(commit)):
                raise _NotAHubResponse("a malformed commit")


def _retry_after(headers: Any) -> float:
    """Return the seconds to wait, from ``Retry-After: 3`` or ``RateLimit: "api";r=0;t=3``."""
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"\br=0;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def hub_session(downloads: bool = False) -> Iterator[HubSession]:
    """Give huggingface_hub's HTTP client time limits in the block, and turn off its own retries and log lines.

    Progress bars are drawn on terminals only. ``downloads``: see ``HubSession``.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        _http,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    # No public function returns the factory, and a user may have set one for a proxy or a certificate.
    session, factory, verbosity = HubSession(downloads), _http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()

    def build() -> Any:
        client = factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], session.on_request],
            "response": [*hooks["response"], session.on_response],
        }
        return client

    undecided = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    hide_bars = undecided and not sys.stderr.isatty()
    done = threading.Event()
    threading.Thread(target=_close_on_signal, args=(session, done), daemon=True).start()
    set_client_factory(build)
    logging.set_verbosity(ERROR)
    if hide_bars:
        disable_progress_bars()
    try:
        yield session
    finally:
        done.set()
        if hide_bars:
            enable_progress_bars()
        logging.set_verbosity(verbosity)
        set_client_factory(factory)


def _close_on_signal(session: HubSession, done: threading.Event) -> None:
    """Close the session after a signal: huggingface_hub would wait for its download threads."""
    while not done.wait(_POLL):
        stop = signals.current()
        if stop.signal and stop.at_once:
            session.close()
            return


@dataclass(frozen=True)
class _Failure:
    """A failed request: the error for the user, and how often to retry first."""

    error: PeftcliError
    retries: int = 0
    wait: float = 0.0


def retry(action: Callable[[], T], what: str) -> T:
    """Return the result of ``action``, retried as the module's docstring says. Messages call it ``what``."""
    with hub_session() as session:
        return session.retry(action, what)


def _classify(error: BaseException, session: HubSession, what: str) -> _Failure | None:
    """Translate an exception of huggingface_hub; return None if it is a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    for cause in causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            message = f"{what}: not in the cache, or not all of it, and HF_HUB_OFFLINE is set"
            return _Failure(NetworkError(message, hint="unset HF_HUB_OFFLINE to reach the hub"))
        if isinstance(cause, RetryableError):
            return _network_failure(what, cause.reason, cause.wait)
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, what, reading=session.downloads)
        if isinstance(cause, _NotAHubResponse) or type(cause).__name__ == "TooManyRedirects":
            return _not_a_hub(what, cause)
        if isinstance(cause, UnicodeEncodeError) and str(cause.object).startswith("Bearer "):
            message = f"{what}: the token contains characters that are not ASCII, as no token of the hub does"
            return _Failure(HubError(message, hint="copy it again: into HF_TOKEN if that is set, or `hf auth login`"))
        if isinstance(cause, HTTPError):  # httpx's or httpx2's, whichever this huggingface_hub uses
            if _origin(endpoint())[0] not in ("http", "https"):
                message = clean_line(f"{endpoint()!r} is not the URL of a hub")
                return _Failure(UsageError(message, key="HF_ENDPOINT", hint="begin it with https:// or http://"))
            if not session.answered and type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                message = clean_line(f"{what}: cannot reach {endpoint()} ({cause})")
                hint = f"check the network, {_proxy_variable()}and HF_ENDPOINT if it is set"
                return _Failure(NetworkError(message, hint=hint))
            return _network_failure(what, f"{type(cause).__name__} {cause}")
        if isinstance(cause, (ConnectionError, TimeoutError)):  # hf_xet's
            return _network_failure(what, str(cause))
    if isinstance(error, OSError) and error.errno is not None:
        return _Failure(StorageError(clean_line(f"{what}: {error.strerror}"), file=error.filename))
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return _network_failure(what, "the size of a downloaded file differs from the hub's")
    return _not_a_hub(what, error) if raised_by_huggingface_hub(error) else None


def _proxy_variable() -> str:
    """Return the variable whose proxy requests to the hub go through, for a list in a sentence; empty without one."""
    scheme, host, _ = _origin(endpoint())
    from urllib.request import getproxies, proxy_bypass  # which every command would wait for

    proxies = {} if proxy_bypass(host or "") else getproxies()
    return next((f"the proxy of {name.upper()}_PROXY, " for name in (scheme, "all") if name in proxies), "")


def _network_failure(what: str, reason: str, wait: float = 0.0) -> _Failure:
    hint = f"wait {wait:.0f} seconds, then run the same command again" if wait else "run the same command again later"
    return _Failure(NetworkError(clean_line(f"{what}: {reason}"), hint=hint), retries=len(RETRY_DELAYS), wait=wait)


def _not_a_hub(what: str, error: BaseException) -> _Failure:
    is_ours = isinstance(error, _NotAHubResponse)
    reason = str(error) if is_ours else " ".join(f"{type(error).__name__}: {error}".split())
    text = f"{clean_line(what)}: {clean_line(endpoint())} does not respond like a hub ({clean_line(reason)[:200]})"
    return _Failure(
        HubError(text, hint="check HF_ENDPOINT if it is set; a login page of the network may have answered")
    )


def _refusal(error: Any, what: str, *, reading: bool) -> _Failure:
    """Describe a response of the hub with a status from 400 to 499."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, said = error.response.status_code, (error.server_message or "").strip()
    has_token = "Authorization" in error.response.request.headers
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if status == 401:
        message = "the hub does not accept the token" if has_token else "the hub requires a token"
        hint = f"{login} to a valid token from https://huggingface.co/settings/tokens"
    elif isinstance(error, GatedRepoError):
        message, hint = "access to this repository must be granted first", "request access on the repository's page"
    elif status == 403:
        message = "the token does not permit this"
        access = "read access to this repository" if reading else "write access to this name"
        hint = f"use a token with {access}: https://huggingface.co/settings/tokens"
    elif isinstance(error, RevisionNotFoundError):
        message, hint = "no such revision", "check the revision"
    elif isinstance(error, EntryNotFoundError):
        message, hint = "a file that the repository lists is missing", "contact its owner"
    elif status == 404:
        message = "no such repository, or the token does not give access to it"
        hint = f"check the name; for a private repository {login}"
    elif status in (409, 412):
        message, hint = "somebody else is changing this repository", "run the same command again"
    else:
        message, hint = "the hub refuses", ""
    text = clean_line(f"{what}: {message} ({status})") + (f": {clean_line(said)[:300]}" if said else "")
    return _Failure(HubError(text, hint=hint or None), retries=1 if status in (409, 412) else 0)
