"""A hub with datasets on 127.0.0.1: the endpoints that datasets and huggingface_hub read, commits in memory."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]

_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/.*)?")
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class DatasetHub:
    """The server. ``repos`` holds the commits of each dataset, the newest last."""

    def __init__(self) -> None:
        self.repos: dict[str, list[Files]] = {}
        self.sent: list[str] = []
        """Files that were sent, a path for each part."""
        self.status: int | None = None
        """Answer everything with this,"""
        self.headers: dict[str, str] = {}
        """and with these."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, repo: str, files: Files) -> str:
        """A new commit, and its id."""
        self.repos.setdefault(repo, []).append(files)
        return commit_id(files)


def commit_id(files: Files) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.hub.status is not None:
            return self._answer(self.hub.status, headers=self.hub.headers)
        if found := _FILE.fullmatch(path):
            return self._file(*found.groups())
        if found := _API.fullmatch(path):
            return self._api(body, *found.groups())
        return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_GET = do_POST = do_HEAD = _handle

    def _api(self, body: bytes, repo: str, what: str | None, revision: str | None) -> None:
        files = self._at(repo, revision or "main")
        if files is None:
            return None
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            about = {"id": repo, "sha": commit_id(files), "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self._answer(200, {**about, "gated": False, "siblings": siblings})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40} for path, content in files.items()
        ]
        wanted = json.loads(body)["paths"] if what == "paths-info" and body.startswith(b"{") else None
        if what == "paths-info" and wanted is None:
            wanted = [unquote(part.split("=", 1)[1]) for part in body.decode().split("&") if part.startswith("paths=")]
        return self._answer(200, [entry for entry in entries if wanted is None or entry["path"] in wanted])

    def _file(self, repo: str, revision: str, path: str) -> None:
        files = self._at(repo, revision)
        if files is None:
            return None
        if path not in files:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        content = files[path]
        etag = hashlib.sha1(content).hexdigest()
        headers = {"X-Repo-Commit": commit_id(files), "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.hub.sent.append(path)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), int(part[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            return self._answer(206, content[start : end + 1], headers)
        return self._answer(200, content, headers)

    def _at(self, repo: str, revision: str) -> Files | None:
        if repo not in self.hub.repos:
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        commits = self.hub.repos[repo]
        found = commits[-1] if revision == "main" else next((f for f in commits if commit_id(f) == revision), None)
        if found is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        return found

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
