"""Push adapter folders to the hub.

``peftcli.system.hub_requests`` says which faults are retried. When the answer is lost after the hub accepted a commit,
the commit is found there and not made again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.adapters import card
from peftcli.adapters.benchmark_record import hub_results
from peftcli.adapters.load import SHARED_FILES, is_hub_id
from peftcli.errors import HubError, UsageError
from peftcli.guard.adapter_folder import CONFIG_FILE, find_weights, read_header, read_method_config
from peftcli.system import hub_requests
from peftcli.system.hub_requests import clean_line, endpoint
from peftcli.system.secrets import redact
from peftcli.tasks import TASK_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

CARD_FILE = "README.md"
_WRITTEN_FILES = (CONFIG_FILE, TASK_FILE, "tokenizer_config.json", ".jinja")
"""How those end that a person writes in part, and so may have left a token in. Of the card, which is one of them too,
it is taken out."""


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
    card: str
    """The model card, as it is uploaded."""


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    description: str | None = None,
    dry_run: bool = False,
    base_model_id: str | None = None,
    token: str | bool | None = None,
    tags: Sequence[str] = (),
    subfolders: Sequence[str] = (),
) -> Pushed:
    """Upload an adapter folder to the hub as one commit; the repository and the branch are made if missing.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors. Only ``SHARED_FILES`` leave it, and results
            of lm-eval on datasets of the hub, as ``.eval_results`` files.
        repo_id: ``user/name`` on the hub.
        private: Visibility of a repository that this call creates.
        revision: Branch to push to; by default main.
        create_pr: Open a pull request instead of committing to the branch.
        message: The commit's first line.
        description: The rest of its message.
        dry_run: Only say what would be uploaded; nothing is sent.
        base_model_id: Hub id of the base model, for an adapter that names a folder of this machine. It is written
            into the uploaded copies of the config and the card.
        token: Of the hub. None: the one that this machine is logged in with.
        tags: Added to those of the card.
        subfolders: Folders in ``folder`` that hold other adapters, which are uploaded too, without their cards.

    Raises:
        AdapterError: the folder holds no adapter that others could load.
        UsageError: an invalid id, or a base model that others cannot load.
        HubError: the hub refused.
        NetworkError: the hub cannot be reached.
    """
    _check_repo_id(repo_id, "REPO_ID")
    for what, text in (("--revision", revision), ("--message", message), ("the description", description)):
        _refuse_secret(text or "", what)
    contents = _contents(folder, repo_id, base_model_id, tags) | hub_results(folder)
    for inside in subfolders:
        others = _contents(folder / inside, repo_id, base_model_id)
        contents |= {f"{inside}/{name}": content for name, content in others.items() if name != CARD_FILE}
    job = _Push(repo_id, contents, private, revision, create_pr, message or "Upload adapter", description, token)
    return job.result(f"{endpoint()}/{repo_id}", None, private) if dry_run else hub_requests.retry(job.run, repo_id)


def _contents(
    folder: Path, repo_id: str, base_model_id: str | None, tags: Sequence[str] = ()
) -> dict[str, Path | bytes]:
    """Return what is uploaded: name in the repository -> local file, or changed content."""
    config = read_method_config(folder)
    read_header(find_weights(folder))
    files: dict[str, Path | bytes] = {name: folder / name for name in SHARED_FILES if (folder / name).is_file()}
    base = base_model_id or config.get("base_model_name_or_path")
    if base_model_id:
        _check_repo_id(base_model_id, "--base-model-id")
        for name in [name for name in files if name.endswith(CONFIG_FILE)]:  # a pipeline's parts have their own
            values = {**read_method_config((folder / name).parent), "base_model_name_or_path": base_model_id}
            files[name] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    elif isinstance(base, str) and (card.is_local(base) or card.was_local(folder)):
        raise UsageError(
            f"the adapter's base model is {base!r}, which exists on this machine only",
            key="base_model_name_or_path",
            file=str(folder / CONFIG_FILE),
            hint="say what it is on the hub with --base-model-id USER/NAME",
        )
    experts = config.get("adapters")  # of a mixture
    for place in experts.values() if isinstance(experts, dict) else ():
        if isinstance(place, str) and card.is_local(place):
            raise UsageError(
                f"the adapter mixes {place!r}, which exists on this machine only",
                key="adapters",
                file=str(folder / CONFIG_FILE),
                hint="push that first, and write its hub id in its place",
            )
    for name, content in files.items():
        if not name.endswith(_WRITTEN_FILES):
            continue
        written = content if isinstance(content, bytes) else content.read_bytes()
        _refuse_secret(written.decode(errors="replace"), str(folder / name))
    files[CARD_FILE] = card.for_hub(folder, repo_id, base_model_id, tags).encode()
    return files


def _refuse_secret(text: str, what: str) -> None:
    if redact(text) != text:
        raise UsageError(f"{what} contains what looks like a token or password; nothing was uploaded")


def _check_repo_id(repo_id: str, what: str) -> None:
    if not is_hub_id(repo_id):
        raise UsageError(f"{what}: {repo_id!r} is not a hub id of the form user/name")


@dataclass
class _Push:
    """One push. ``run`` may be called again after a failure: what was done stays done."""

    repo_id: str
    contents: dict[str, Path | bytes]
    private: bool
    revision: str | None
    create_pr: bool
    message: str
    description: str | None
    token: str | bool | None
    sent: bool = False
    """Whether a commit may have reached the hub."""

    def run(self) -> Pushed:
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(endpoint=endpoint(), token=self.token, library_name="peftcli")
        head = self._head(api)
        private = bool(head.private)
        if self.sent and (found := self._found(api, head)):
            return self.result(*found, private)
        with contextlib.ExitStack() as files:
            self.sent = True
            try:
                made = api.create_commit(
                    self.repo_id,
                    # as open files they go by HTTP, where this module sees and limits every request: paths would go
                    # through Xet where hf_xet is installed, which has retries of its own and needs a hub with Xet
                    [
                        CommitOperationAdd(
                            name, each if isinstance(each, bytes) else files.enter_context(each.open("rb"))
                        )
                        for name, each in self.contents.items()
                    ],
                    commit_message=self.message,
                    commit_description=self.description,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=head.sha,
                )
            except ValueError as error:  # the hub looks at the card before it takes a commit
                if CARD_FILE not in str(error):
                    raise
                text = clean_line(f"{self.repo_id}: the hub refuses the model card. {error}")
                raise HubError(text, file=CARD_FILE) from None
        return self.result(made.pr_url or f"{endpoint()}/{self.repo_id}", made.oid, private)

    def result(self, url: str, commit: str | None, private: bool) -> Pushed:
        size = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.contents.values())
        written = self.contents[CARD_FILE]
        text = (written if isinstance(written, bytes) else written.read_bytes()).decode(errors="replace")
        return Pushed(clean_line(url), commit, list(self.contents), size, private, text)

    def _head(self, api: HfApi) -> ModelInfo:
        """The state of the branch. Makes the repository and the branch if they are missing."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            return api.model_info(self.repo_id, revision=self.revision)
        except GatedRepoError:  # a kind of RepositoryNotFoundError to huggingface_hub
            raise
        except RepositoryNotFoundError:
            api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        except RevisionNotFoundError:
            pass
        if self.revision and not self.create_pr and not self.revision.startswith("refs/"):
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        return api.model_info(self.repo_id, revision=self.revision)

    def _found(self, api: HfApi, head: ModelInfo) -> tuple[str, str] | None:
        """Page and id of the commit that an earlier try made, though its answer was lost."""
        page = f"{endpoint()}/{self.repo_id}"
        if not self.create_pr:
            return (page, str(head.sha)) if self._is_at(api, self.revision) else None
        for request in api.get_repo_discussions(self.repo_id, discussion_type="pull_request", discussion_status="open"):
            ref = f"refs/pr/{request.num}"
            if request.title == self.message and self._is_at(api, ref):
                commit = api.model_info(self.repo_id, revision=ref).sha
                return f"{page}/discussions/{request.num}", str(commit)
        return None

    def _is_at(self, api: HfApi, revision: str | None) -> bool:
        """Return whether the files at ``revision`` are those of this push."""
        from huggingface_hub.hf_api import RepoFile

        entries = api.get_paths_info(self.repo_id, list(self.contents), revision=revision)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return all(name in there and _equal(there[name], content) for name, content in self.contents.items())


def _equal(entry: Any, content: Path | bytes) -> bool:
    data = content if isinstance(content, bytes) else content.read_bytes()
    if entry.lfs:
        return bool(entry.lfs.sha256 == sha256(data).hexdigest())
    return bool(entry.blob_id == sha1(b"blob %d\0" % len(data) + data).hexdigest())
