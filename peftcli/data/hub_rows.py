"""The rows of a dataset on the hub, at one commit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib.util import find_spec
from logging import LogRecord
from logging.handlers import BufferingHandler
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from peftcli.data.readers import class_names, table_rows
from peftcli.data.text_rows import first_line, quote
from peftcli.errors import DataError, HubError, NetworkError, PeftcliError, StorageError, causes
from peftcli.schema import Source
from peftcli.system import hub_requests
from peftcli.system.disk import write_file

_BATCH = 64
"""Rows held at once. A row may be large."""

T = TypeVar("T")


class HubRows:
    """A split of a dataset on the hub. Nothing is fetched before it is needed."""

    def __init__(self, source: Source):
        self._source = source
        self._found: str | None = None
        """The commit that the hub has for the revision."""

    @cached_property
    def commit(self) -> str:
        """The commit of the revision; if the hub cannot be reached, the cached one.

        Raises:
            NetworkError: the hub cannot be reached, and the revision is not cached.
            HubError: the dataset or revision does not exist, or the hub refuses access.
        """
        from huggingface_hub import HfApi

        source, api = self._source, HfApi(endpoint=hub_requests.endpoint(), library_name="peftcli")
        try:
            with hub_requests.hub_session() as session:
                found = self._retry(session, lambda: str(api.dataset_info(source.train, revision=source.revision).sha))
        except NetworkError as error:
            return self._cached_commit(error)
        self._found = found
        self._note_commit()
        return found

    @property
    def _cache(self) -> Path:
        """The dataset's folder in the cache of huggingface_hub."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE) / f"datasets--{self._source.train.replace('/', '--')}"

    @property
    def _ref(self) -> Path:
        """Where huggingface_hub notes the commit of a branch or tag."""
        return self._cache / "refs" / (self._source.revision or "main")

    def _note_commit(self) -> None:
        """Note what the hub has for the revision, if files of that commit are in huggingface_hub's cache."""
        found = self._found
        if found and found != self._source.revision and (self._cache / "snapshots" / found).is_dir():
            with suppress(StorageError):  # of a cache that is read-only
                write_file(self._ref, found.encode())

    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of classes that the dataset declares, by column.

        Raises:
            DataError: no such split or configuration.
            NetworkError: the hub cannot be reached.
            HubError: the hub refuses access.
        """
        commit = self.commit
        with hub_requests.hub_session() as session:
            features = self._retry(session, lambda: self._open(commit)).features
        return class_names(features.to_dict() if features else {})

    def rows(self) -> Iterator[dict[str, Any] | str]:
        """Yield the rows in order; for a row that cannot be read, a message about it.

        Raises:
            DataError: the split or configuration does not exist, or the files do not contain rows.
            NetworkError: the hub cannot be reached.
            HubError: the hub refuses access.
        """
        commit = self.commit
        with hub_requests.hub_session() as session:
            found, given = self._retry(session, lambda: self._open(commit)), 0
            tables: Iterator[Any] | None = None

            def next_table() -> Any:
                """Return the next rows. After an error, the next call reopens the stream at the same row."""
                nonlocal tables
                if tables is None:
                    rest = (found.skip(given) if given else found).with_format("arrow")
                    tables = rest.iter(min(_BATCH, self._source.limit or _BATCH))
                try:
                    return next(tables, None)
                except Exception:
                    tables = None
                    raise

            while (table := self._retry(session, next_table)) is not None:
                given += table.num_rows
                for row in table_rows(table):
                    yield self._retry(session, partial(_with_bytes, row))

    def _open(self, commit: str) -> Any:
        """Open the split with datasets: downloaded and prepared, or as a stream."""
        source, builder = self._source, self._builder(commit)
        if builder.hash != commit:
            raise ConnectionError("the connection was lost, and datasets used its cache")
        if not source.streaming:
            builder.download_and_prepare()
        self._note_commit()
        if source.streaming:
            stream = builder.as_streaming_dataset(source.split)
            if stream.features is None:  # the first rows cannot be read; reading one says why
                next(iter(stream), None)
            return stream.decode(False)
        return builder.as_dataset(source.split)

    def _retry(self, session: hub_requests.HubSession, action: Callable[[], T]) -> T:
        """Return the result of ``action``, retried when the hub or the network fails."""
        source = self._source

        def attempt() -> T:
            try:
                with _no_torchcodec(), _captured_log() as log:
                    return action()
            except PeftcliError:
                raise
            except Exception as error:  # every builder of datasets raises its own kinds
                ours = _translate(error, source)
                logged = "".join(record.getMessage() for record in log)
                if named := re.search(r"(?:file|from) '[^']*[0-9a-f]{40}/([^']+)' with error", logged):
                    ours.file = f"{source.train}/{named[1]}"
                if isinstance(ours, NetworkError) or (
                    isinstance(ours, DataError) and hub_requests.raised_by_huggingface_hub(error)
                ):
                    raise
                raise ours from error

        return session.retry(attempt, f"dataset {source.train}: no file of that name here; on the hub")

    def _builder(self, commit: str | None = None) -> Any:
        """Return the builder of datasets. If the hub fails, its cache is used, without ``commit`` the newest in it."""
        import datasets

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # that request goes to another host than the hub
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        found = datasets.load_dataset_builder(self._source.train, self._source.name, revision=commit)
        if commit in _cached_commits(found) - {found.hash}:  # datasets takes the newest, whatever the revision
            version = str(found.config.version)
            own = {"dataset_name": found.dataset_name, "config_name": found.config.name, "version": version}
            found = type(found)(repo_id=self._source.train, hash=commit, **own)
        return found

    def _cached_commit(self, unreachable: NetworkError) -> str:
        """Return the commit in the cache that is the revision of the source; without one, raise ``unreachable``."""
        source, revision = self._source, self._source.revision
        if "/" not in source.train:  # for the name of a builder, such as json, datasets would look for local files
            raise unreachable
        try:
            with _offline(), _captured_log():
                builder = self._builder()
        except PeftcliError:  # a signal
            raise
        except Exception as error:
            if isinstance(ours := _translate(error, source), NetworkError):
                raise unreachable from None
            raise ours from error
        cached, commit = _cached_commits(builder), str(builder.hash)
        noted = self._ref.read_text(encoding="utf-8").strip() if self._ref.is_file() else None
        if noted in cached:
            return noted
        if revision is None:
            return commit
        if len(revision) >= 7 and len(found := [each for each in cached if each.startswith(revision)]) == 1:
            return found[0]
        raise NetworkError(
            f"dataset {source.train}: the hub cannot be reached, and the cache contains commit {commit[:12]}, "
            f"which may differ from {quote(revision)}",
            hint=f"To use the cached commit: dataset: {{revision: {commit}}}",
        )


def _cached_commits(builder: Any) -> set[str]:
    """The commits in the cache of datasets that have the configuration of ``builder``."""
    found = Path(builder.cache_dir).parent.glob("*")  # while datasets prepares one, its name is longer
    return {path.name for path in found if re.fullmatch("[0-9a-f]{40}", path.name)}


def _with_bytes(row: dict[str, Any] | str) -> dict[str, Any] | str:
    """A row of a stream with the bytes of its files, of which it has the addresses."""
    from datasets.utils.file_utils import xopen

    for value in row.values() if isinstance(row, dict) else ():
        if isinstance(value, dict) and not value.get("bytes") and "hf://" in str(value.get("path")):
            with xopen(value["path"], "rb") as file:
                value["bytes"] = file.read()
    return row


@contextmanager
def _no_torchcodec() -> Iterator[None]:
    """Inside, datasets keeps paths and bytes of sounds without torchcodec, which it would only decode with."""
    name = "torchcodec.encoders"
    if name in sys.modules or find_spec("torchcodec"):
        yield
        return
    sys.modules[name] = ModuleType(name)
    sys.modules[name].AudioEncoder = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _captured_log() -> Iterator[list[LogRecord]]:
    """Hold what datasets logs until the block ends without an error; yield it: only that log names a damaged file."""
    import datasets

    logger, held = datasets.logging.get_logger(), BufferingHandler(sys.maxsize)
    logger.handlers, before = [held], logger.handlers
    try:
        yield held.buffer
    finally:
        logger.handlers = before
    for record in held.buffer:
        for handler in before:
            if record.levelno >= handler.level:
                handler.handle(record)


@contextmanager
def _offline() -> Iterator[None]:
    """Let datasets use only its cache in the block."""
    import datasets
    from huggingface_hub import constants

    modules: tuple[Any, Any] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _translate(error: Exception, source: Source) -> DataError | HubError | NetworkError:
    """Translate an exception of datasets or huggingface_hub."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    led_to_it = causes(error)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(each, kinds) for each in led_to_it)

    name, message = source.train, " ".join(str(error).split())
    status = next((code for each in led_to_it if (code := _status(each))), 0)
    if caused_by(GatedRepoError) or "gated dataset" in message:
        hint = "Request access on its page, then log in: hf auth login."
        return HubError(f"the dataset {name} is gated", hint=hint)
    if caused_by(RevisionNotFoundError):
        return HubError(f"no revision {quote(str(source.revision))}", file=name, key="dataset.revision")
    if caused_by(RepositoryNotFoundError, DatasetNotFoundError):
        hint = "Check the name, or name a local file. A private dataset needs: hf auth login."
        return HubError("no such dataset on the hub, and no such file", file=name, hint=hint)
    if status in (401, 403):
        return HubError(f"{name}: the hub refuses access ({status})", hint="Log in with: hf auth login.")
    if "Unknown split" in message or "Bad split" in message:
        text = f"no split {quote(source.split)}: {first_line(message, 300)}"
        return DataError(text, file=name, key="dataset.split")
    if caused_by(StopIteration):
        return DataError(f"the split {quote(source.split)} contains no rows", file=name)
    if "scripts are no longer supported" in message:
        hint = "Many have a copy: dataset: {revision: refs/convert/parquet}, without name. Or convert it to parquet."
        return DataError("has a loading script; datasets with one cannot be loaded", file=name, hint=hint)
    if any(words in message for words in ("Config name", "BuilderConfig", "for config", "configurations")):
        return DataError(first_line(message, 300), file=name, key="dataset.name")
    no_response = caused_by(HTTPError) and not caused_by(HfHubHTTPError)
    if no_response or status >= 429 or caused_by(ConnectionError, TimeoutError, hub_requests.RetryableError):
        hint = "A local file needs no network; HF_HUB_OFFLINE=1 uses the cache."
        return NetworkError(f"dataset {name}: no file of that name, and the hub cannot be reached", hint=hint)
    cause = error.__cause__ or error
    reason = first_line(
        cause if isinstance(cause, RecursionError) else " ".join(str(cause).split()) or repr(cause), 300
    )
    hint = "The files of a split need the same columns: download those to train on, and name them."
    return DataError(f"cannot be loaded: {reason}", file=name, hint=hint if "column names" in reason else None)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
