"""Push adapter folders to the hub, and pull them from it.

What happens when the hub or the network fails:

- 401, 403, 404 and other refusals: HubError at once.
- 409, 412 (somebody else changed the repository): its state is read again, one retry, then HubError.
- 429, 5xx, dropped and slow connections: at most 5 tries in all, then NetworkError.
- the hub cannot be reached at all: NetworkError after the first try.
- an answer lost after the hub accepted the commit: the commit is found there and not made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftcli import card
from peftcli.core.header import CONFIG_FILE, WEIGHTS_FILE, checked_config, read_header, weights_file
from peftcli.errors import AdapterError, HubError, NetworkError, PeftcliError, StorageError, UsageError
from peftcli.redact import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

CARD_FILE = "README.md"
SHARED_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CARD_FILE,
    "loss.png",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "target.spm",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""The only files that are pushed or pulled. recipe.yaml and run.json name paths of the machine; the card says what
matters of them."""

_WRITTEN_FILES = {CONFIG_FILE, "tokenizer_config.json", *(name for name in SHARED_FILES if name.endswith(".jinja"))}
"""Those that a person writes in part, and so may have left a token in. Of the card, which is one of them too, it is
taken out."""

DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds to wait before each further try."""
LONGEST_WAIT = 120.0
"""The longest ``Retry-After``, in seconds, that is waited for."""
CONNECT_TIMEOUT = 10.0
ANSWER_TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as dead."""

_PICKLED = "an adapter_model.bin is a pickle and is not read: load it in PEFT, save it with safe_serialization=True"

T = TypeVar("T")


@dataclass(frozen=True)
class Pushed:
    """What a push made, or with ``dry_run`` would make."""

    url: str
    """Page of the repository, or of the pull request."""
    commit: str | None
    """Id of the commit; None after a dry run."""
    files: list[str]
    bytes: int
    private: bool
    """Whether the repository is private. An existing one keeps its visibility."""


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    base_model_id: str | None = None,
) -> Pushed:
    """Upload an adapter folder to the hub as one commit; the repository and the branch are made if missing.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors. Only ``SHARED_FILES`` leave it.
        repo_id: ``user/name`` on the hub.
        private: Visibility of a repository that this call creates.
        revision: Branch to push to; by default main.
        create_pr: Open a pull request instead of committing to the branch.
        message: The commit's first line.
        dry_run: Only say what would be uploaded; nothing is sent.
        base_model_id: Hub id of the base model, for an adapter that names a folder of this machine. It is written
            into the uploaded copies of the config and the card.

    Raises:
        AdapterError: the folder holds no adapter that others could load.
        UsageError: an id that is none, or a base model that others do not have.
        HubError: the hub refused.
        NetworkError: the hub cannot be reached.
    """
    _check_repo_id(repo_id, "REPO_ID")
    for what, text in (("--revision", revision), ("--message", message)):
        _refuse_secret(text or "", what)
    contents = _contents(folder, repo_id, base_model_id)
    job = _Push(repo_id, contents, private, revision, create_pr, message or "Upload adapter")
    return job.result(f"{_endpoint()}/{repo_id}", None, private) if dry_run else _retried(job.run, repo_id)


def local_folder(adapter: str, revision: str | None = None) -> Path:
    """The folder that holds ``adapter``: itself, or a copy of the hub's in the cache.

    Works offline with a copy that is already in the cache.

    Raises:
        AdapterError: neither a folder nor a hub id, or an adapter that is a pickle.
        HubError: the hub has no such repository, or refuses it.
        NetworkError: the hub cannot be reached, and the cache has no copy.
    """
    folder = Path(adapter)
    if adapter and folder.is_dir():
        if (folder / "adapter_model.bin").is_file() and not (folder / WEIGHTS_FILE).is_file():
            raise AdapterError(f"no {WEIGHTS_FILE} here", file=adapter, hint=_PICKLED)
        return folder
    if not _is_repo_id(adapter):
        raise AdapterError(f"{adapter!r} is neither a folder nor a hub id of the form user/name")
    folder = _pulled(adapter, revision)
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"no {WEIGHTS_FILE} in {adapter} on the hub", hint=_PICKLED)
    return folder


def _contents(folder: Path, repo_id: str, base_model_id: str | None) -> dict[str, Path | bytes]:
    """What is uploaded: name in the repository -> local file, or changed content."""
    config = checked_config(folder)
    read_header(weights_file(folder))
    files: dict[str, Path | bytes] = {name: folder / name for name in SHARED_FILES if (folder / name).is_file()}
    base = base_model_id or config.get("base_model_name_or_path")
    if base_model_id:
        _check_repo_id(base_model_id, "--base-model-id")
        config = {**config, "base_model_name_or_path": base_model_id}
        files[CONFIG_FILE] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    elif isinstance(base, str) and (card.is_local(base) or card.was_local(folder)):
        raise UsageError(
            f"the adapter's base model is {base!r}, which exists on this machine only",
            key="base_model_name_or_path",
            file=str(folder / CONFIG_FILE),
            hint="say what it is on the hub with --base-model-id USER/NAME",
        )
    for name in _WRITTEN_FILES & files.keys():
        _refuse_secret(_text(files[name]), str(folder / name))
    files[CARD_FILE] = card.for_hub(folder, repo_id, base_model_id).encode()
    return files


def _refuse_secret(text: str, what: str) -> None:
    if redact(text) != text:
        raise UsageError(f"{what} holds what looks like a token or password; nothing was uploaded")


def _text(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")


def _shown(text: str) -> str:
    """``text`` of the hub or the network in a message: without secrets, on one line."""
    return "".join(char if char.isprintable() else " " for char in redact(text))


def _check_repo_id(repo_id: str, what: str) -> None:
    if not _is_repo_id(repo_id):
        raise UsageError(f"{what}: {repo_id!r} is no hub id of the form user/name")


def _is_repo_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        return "/" in text
    return False


def _endpoint() -> str:
    """Base URL of the hub. Read at each call: huggingface_hub reads HF_ENDPOINT once, when imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


@dataclass
class _Push:
    """One push. ``run`` may be called again after a failure: what was done stays done."""

    repo_id: str
    contents: dict[str, Path | bytes]
    private: bool
    revision: str | None
    create_pr: bool
    message: str
    sent: bool = False
    """Whether a commit may have reached the hub."""

    def run(self) -> Pushed:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint(), library_name="peftcli")
        head = self._head(api)
        private = bool(head.private)
        if self.sent and (found := self._found(api, head)):
            return self.result(*found, private)
        with contextlib.ExitStack() as files:
            self.sent = True
            made = api.create_commit(
                self.repo_id,
                [_addition(name, content, files) for name, content in self.contents.items()],
                commit_message=self.message,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=head.sha,
            )
        return self.result(made.pr_url or f"{_endpoint()}/{self.repo_id}", made.oid, private)

    def result(self, url: str, commit: str | None, private: bool) -> Pushed:
        size = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.contents.values())
        return Pushed(_shown(url), commit, list(self.contents), size, private)

    def _head(self, api: HfApi) -> ModelInfo:
        """The state of the branch. Makes the repository and the branch if they are missing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            return api.model_info(self.repo_id, revision=self.revision)
        except RepositoryNotFoundError:
            api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        except RevisionNotFoundError:
            pass
        if self.revision and self._may_branch():
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        return api.model_info(self.repo_id, revision=self.revision)

    def _may_branch(self) -> bool:
        return not self.create_pr and not str(self.revision).startswith("refs/")

    def _found(self, api: HfApi, head: ModelInfo) -> tuple[str, str] | None:
        """Page and id of the commit that an earlier try made, though its answer was lost."""
        page = f"{_endpoint()}/{self.repo_id}"
        if not self.create_pr:
            return (page, str(head.sha)) if self._is_at(api, self.revision) else None
        for request in api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open"):
            ref = f"refs/pr/{request.num}"
            if request.title == self.message and self._is_at(api, ref):
                commit = api.model_info(self.repo_id, revision=ref).sha
                return f"{page}/discussions/{request.num}", str(commit)
        return None

    def _is_at(self, api: HfApi, revision: str | None) -> bool:
        """Whether the files at ``revision`` are those of this push."""
        from huggingface_hub.hf_api import RepoFile

        entries = api.get_paths_info(self.repo_id, list(self.contents), revision=revision)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return all(name in there and _equal(there[name], content) for name, content in self.contents.items())


def _addition(name: str, content: Path | bytes, files: contextlib.ExitStack) -> Any:
    """The upload of one file, as an open file: so it goes by HTTP, where this module sees and limits every request.

    Paths would go through Xet where hf_xet is installed, which has retries of its own and needs a hub with Xet.
    """
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(name, content if isinstance(content, bytes) else files.enter_context(content.open("rb")))


def _equal(entry: Any, content: Path | bytes) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if entry.lfs:
        return bool(entry.lfs.sha256 == sha256(data).hexdigest())
    return bool(entry.blob_id == sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _pulled(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    def download(local_files_only: bool = False) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(SHARED_FILES),
                endpoint=_endpoint(),
                local_files_only=local_files_only,
                library_name="peftcli",
            )
        )

    try:
        return _retried(download, f"no folder {repo_id} here; on the hub: {repo_id}", downloads=True)
    except NetworkError:
        with contextlib.suppress(OSError):
            return download(local_files_only=True)
        raise


class _Unanswered(Exception):
    """A request that may be tried again. Raised inside huggingface_hub, so that its own retries end."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


@dataclass
class _Line:
    """What is known of the connection to the hub."""

    downloads: bool
    """Whether no request is made twice in one try, so that a second one is a retry."""
    answered: bool = False
    """Whether the hub ever answered."""
    open: set[tuple[str, str]] = field(default_factory=set)
    """Requests without an answer so far."""

    def on_request(self, request: Any) -> None:
        limits = {"connect": CONNECT_TIMEOUT, "read": ANSWER_TIMEOUT, "write": ANSWER_TIMEOUT, "pool": ANSWER_TIMEOUT}
        request.extensions = {**request.extensions, "timeout": limits}
        name = (request.method, str(request.url))
        if name in self.open:
            raise _Unanswered("the connection was dropped, or no answer came")
        self.open.add(name)

    def on_response(self, response: Any) -> None:
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        self.answered = True
        if not self.downloads:
            self.open.discard((response.request.method, str(response.request.url)))
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise _Unanswered(f"the hub answers {status}", _wait_asked(response.headers))
        if status == 409 and b"conflicting operation" in response.read():
            hf_raise_for_status(response)  # create_repo itself would ask again for ever


def _wait_asked(headers: Any) -> float:
    """Seconds that the answer asks to wait: ``Retry-After: 3``, or ``RateLimit: "api";r=0;t=3``."""
    found = re.fullmatch(r"\s*(\d+)\s*", headers.get("Retry-After", "")) or re.search(
        r"\br=0;\s*t=(\d+)", headers.get("RateLimit", "")
    )
    return float(found[1]) if found else 0.0


@contextlib.contextmanager
def _watched(downloads: bool) -> Iterator[_Line]:
    """huggingface_hub's HTTP client with time limits, and without retries and log lines of its own.

    Progress bars are left to terminals.
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
    line, factory, verbosity = _Line(downloads), _http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()

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
    set_client_factory(build)
    logging.set_verbosity(ERROR)
    if hide_bars:
        disable_progress_bars()
    try:
        yield line
    finally:
        if hide_bars:
            enable_progress_bars()
        logging.set_verbosity(verbosity)
        set_client_factory(factory)


@dataclass(frozen=True)
class _Fault:
    """A failure, as the user sees it if it is final."""

    error: PeftcliError
    retries: int = 0
    """How often this kind of failure is tried again."""
    wait: float = 0.0


def _retried(action: Callable[[], T], what: str, *, downloads: bool = False) -> T:
    """What ``action`` returns, tried again as the module's docstring says."""
    seen: Counter[int] = Counter()
    with _watched(downloads) as line:
        for delay in (*DELAYS, None):
            line.open.clear()
            try:
                return action()
            except PeftcliError:
                raise
            except Exception as error:
                fault = _fault(error, line, what)
                if fault is None:
                    raise
            seen[fault.retries] += 1
            if delay is None or seen[fault.retries] > fault.retries or fault.wait > LONGEST_WAIT:
                # Without its cause: huggingface_hub's messages repeat URLs and what the server said, secrets included.
                raise fault.error from None
            time.sleep(max(delay, fault.wait))
    raise AssertionError("unreachable")


def _fault(error: BaseException, line: _Line, what: str) -> _Fault | None:
    """What a failure of huggingface_hub means; None when it is a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    if isinstance(error, ValueError) and CARD_FILE in str(error):
        return _Fault(HubError(_shown(f"{what}: the hub refuses the model card. {error}"), file=CARD_FILE))
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            hint = "unset HF_HUB_OFFLINE to reach the hub"
            return _Fault(NetworkError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set", hint=hint))
        if isinstance(cause, _Unanswered):
            return _dropped(what, cause.reason, cause.wait)
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, what)
        if isinstance(cause, HTTPError):  # httpx's or httpx2's, whichever this huggingface_hub uses
            if not line.answered and type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                message = f"{what}: cannot reach {_endpoint()} ({cause})"
                return _Fault(NetworkError(_shown(message), hint="check the network, and HF_ENDPOINT if it is set"))
            return _dropped(what, f"{type(cause).__name__} {cause}")
        if isinstance(cause, (ConnectionError, TimeoutError)):  # hf_xet's
            return _dropped(what, str(cause))
    if isinstance(error, json.JSONDecodeError):
        return _Fault(HubError(_shown(f"{_endpoint()} does not answer as a hub does")))
    if isinstance(error, OSError) and error.errno is not None:
        return _Fault(StorageError(_shown(f"{what}: {error.strerror}"), file=error.filename))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _dropped(what: str, reason: str, wait: float = 0.0) -> _Fault:
    hint = f"wait {wait:.0f} seconds, then run the same command again" if wait else "run the same command again later"
    return _Fault(NetworkError(_shown(f"{what}: {reason}"), hint=hint), retries=len(DELAYS), wait=wait)


def _refusal(error: Any, what: str) -> _Fault:
    """The hub's answer below 500, in words."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status, said = error.response.status_code, (error.server_message or "").strip()
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if status == 401:
        message = "the hub does not accept the token" if get_token() else "the hub asks for a token"
        hint = f"{login} to a valid token of https://huggingface.co/settings/tokens"
    elif isinstance(error, GatedRepoError):
        message, hint = "access to this repository must be granted first", "ask for it on the repository's page"
    elif status == 403:
        message = "the token may not do this"
        hint = "use a token with write access to this name: https://huggingface.co/settings/tokens"
    elif isinstance(error, RevisionNotFoundError):
        message, hint = "no such revision", "check --revision"
    elif status == 404:
        message = "no such repository, or the token may not see it"
        hint = f"check the name; for a private repository {login}"
    elif status in (409, 412):
        message, hint = "somebody else is changing this repository", "run the same command again"
    else:
        message, hint = "the hub refuses", ""
    text = _shown(f"{what}: {message} ({status})") + (f": {_shown(said)[:300]}" if said else "")
    return _Fault(HubError(text, hint=hint or None), retries=1 if status in (409, 412) else 0)
