"""The rows of a dataset on the hub, at one commit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from peftcli.data.readers import table_rows
from peftcli.data.text_rows import cut, reason
from peftcli.errors import DataError, HubError, NetworkError, PeftcliError
from peftcli.schema import Source
from peftcli.system import hub_requests

_BATCH = 64
"""Rows held at once. A row may be large."""

T = TypeVar("T")


class HubRows:
    """A split of a dataset on the hub. Nothing is fetched before it is asked for."""

    def __init__(self, source: Source):
        self._source = source

    @cached_property
    def commit(self) -> str:
        """The commit that the revision means; without the hub, the one that is cached on this machine.

        Raises:
            NetworkError: the hub cannot be reached, and nothing is cached, or another revision.
            HubError: no such dataset or revision, or the hub refuses access.
        """
        from huggingface_hub import HfApi

        source, api = self._source, HfApi(endpoint=hub_requests.endpoint(), library_name="peftcli")
        try:
            with hub_requests.watched() as line:
                return self._tried(line, lambda: str(api.dataset_info(source.train, revision=source.revision).sha))
        except NetworkError as error:
            return self._cached(error)

    def rows(self) -> Iterator[dict[str, Any] | str]:
        """The rows, in order; for one that cannot be read, what is wrong with it.

        Raises:
            DataError: no such split or configuration, or not rows.
            NetworkError: the hub cannot be reached.
            HubError: the hub refuses access.
        """
        commit = self.commit
        with hub_requests.watched() as line:
            found, given = self._tried(line, lambda: self._opened(commit)), 0
            tables: Iterator[Any] | None = None

            def following() -> Any:
                """The next rows. A stream that broke is opened again where it did."""
                nonlocal tables
                if tables is None:
                    rest = (found.skip(given) if given else found).with_format("arrow")
                    tables = rest.iter(min(_BATCH, self._source.limit or _BATCH))
                try:
                    return next(tables, None)
                except Exception:
                    tables = None
                    raise

            while (table := self._tried(line, following)) is not None:
                given += table.num_rows
                yield from table_rows(table)

    def _opened(self, commit: str) -> Any:
        """The split as datasets reads it: fetched and prepared, or a stream."""
        source, builder = self._source, self._builder(commit)
        if builder.hash != commit:
            raise ConnectionError("the hub was there a moment ago, and datasets took to its cache")
        if source.streaming:
            return builder.as_streaming_dataset(source.split)
        builder.download_and_prepare()
        return builder.as_dataset(source.split)

    def _tried(self, line: hub_requests.Line, action: Callable[[], T]) -> T:
        """What ``action`` returns, tried again where the hub or the network failed."""
        source = self._source

        def attempt() -> T:
            try:
                return action()
            except PeftcliError:
                raise
            except Exception as error:  # of HTTP, of the hub, of the system; every builder raises its own kinds
                told = _told(error, source)
                if isinstance(told, NetworkError) or (
                    isinstance(told, DataError) and hub_requests.is_of_huggingface_hub(error)
                ):
                    raise
                raise told from error

        return line.tried(attempt, f"dataset {source.train}: no file of that name here; on the hub")

    def _builder(self, commit: str | None = None) -> Any:
        """What datasets reads it with. Where the hub fails, it takes the newest commit in its cache instead."""
        import datasets

        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it tells another host than the hub
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        return datasets.load_dataset_builder(self._source.train, self._source.name, revision=commit)

    def _cached(self, unreachable: NetworkError) -> str:
        """The commit in the cache, if that is the revision that is asked for."""
        from huggingface_hub.constants import HF_HUB_CACHE

        source, revision = self._source, self._source.revision
        if "/" not in source.train:  # perhaps a kind of file, as json: datasets would look for such files here
            raise unreachable
        try:
            with _offline():
                commit = str(self._builder().hash)
        except PeftcliError:  # as a signal, which is no fault of foreign code
            raise
        except Exception as error:
            if isinstance(told := _told(error, source), NetworkError):
                raise unreachable from None
            raise told from error
        if revision is None or (len(revision) >= 7 and commit.startswith(revision)):
            return commit
        ref = Path(HF_HUB_CACHE) / f"datasets--{source.train.replace('/', '--')}" / "refs" / revision
        if ref.is_file() and ref.read_text(encoding="utf-8").strip() == commit:
            return commit
        raise NetworkError(
            f"dataset {source.train}: the hub cannot be reached, and the cache holds commit {commit[:12]}, "
            f"which is not known to be {cut(revision)}",
            hint=f"To use what is cached: dataset: {{revision: {commit}}}",
        )


@contextmanager
def _offline() -> Iterator[None]:
    """Inside, datasets looks into its cache only."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, Any] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _told(error: Exception, source: Source) -> DataError | HubError | NetworkError:
    """What a failure of datasets or huggingface_hub means."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = [error]
    while isinstance(cause := causes[-1].__cause__ or causes[-1].__context__, Exception):
        causes.append(cause)

    def caused_by(*kinds: type[Exception]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    name, message = source.train, " ".join(str(error).split())
    status = next((code for each in causes if (code := _status(each))), 0)
    if caused_by(GatedRepoError) or "gated dataset" in message:
        hint = "Ask for access on its page, then log in: hf auth login."
        return HubError(f"the dataset {name} is gated", hint=hint)
    if caused_by(RevisionNotFoundError):
        return HubError(f"no revision {cut(str(source.revision))}", file=name, key="dataset.revision")
    if caused_by(RepositoryNotFoundError, DatasetNotFoundError):
        hint = "Check the name, or name a local file. A private dataset needs: hf auth login."
        return HubError("no such dataset on the hub, and no such file", file=name, hint=hint)
    if status in (401, 403):
        return HubError(f"{name}: the hub refuses access ({status})", hint="Log in with: hf auth login.")
    if "Unknown split" in message or "Bad split" in message:
        text = f"no split {cut(source.split)}: {reason(message, 300)}"
        return DataError(text, file=name, key="dataset.split")
    if any(words in message for words in ("Config name", "BuilderConfig", "for config", "configurations")):
        return DataError(reason(message, 300), file=name, key="dataset.name")
    unanswered = caused_by(HTTPError) and not caused_by(HfHubHTTPError)
    if unanswered or status >= 429 or caused_by(ConnectionError, TimeoutError, hub_requests.Unanswered):
        hint = "A local file needs no network; HF_HUB_OFFLINE=1 uses what is cached."
        return NetworkError(f"dataset {name}: no file of that name, and the hub cannot be reached", hint=hint)
    return DataError(f"cannot be loaded: {reason(error.__cause__ or message)}", file=name)


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
