"""A hub for tests: huggingface_hub's endpoints on 127.0.0.1, repositories in memory, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"
USER = "alice"

_REPO = r"(?P<repo>(?:models|datasets)/[^/]+/[^/]+)"
_FILE = r"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"
_SMALL_FILE = rf"/api/resolve-cache/{_REPO}/(?P<rev>[^/]+)/(?P<path>.+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/{_REPO}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"/api/{_REPO}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"/api/{_REPO}/branch/(?P<rev>[^/]+)", "create_branch"),
    ("POST", rf"/api/{_REPO}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("GET", rf"/api/{_REPO}/discussions", "discussions"),
    ("GET", rf"/api/{_REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("GET", rf"/api/{_REPO}/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"/api/{_REPO}", "info"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("HEAD", _FILE, "resolve"),
    ("GET", _FILE, "resolve"),
    ("HEAD", _SMALL_FILE, "resolve_cache"),
    ("GET", _SMALL_FILE, "resolve_cache"),
]


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]
    parent: str | None = None

    @property
    def oid(self) -> str:
        text = json.dumps([self.message, self.parent, {k: _sha256(v) for k, v in sorted(self.files.items())}])
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", {})]})
    pull_requests: list[str] = field(default_factory=list)
    """Title of each; number n is at ref ``refs/pr/n``."""

    def at(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((c for commits in self.refs.values() for c in commits if c.oid == revision), None)

    @property
    def commits(self) -> int:
        """How many commits were made since the repository was created, wherever."""
        return len({c.oid for commits in self.refs.values() for c in commits}) - 1


@dataclass(frozen=True)
class Answer:
    status: int
    content: bytes
    headers: dict[str, str]


@dataclass
class Fault:
    """What happens to the next ``times`` requests of an endpoint instead of, or to, the right answer."""

    kind: str
    times: int
    method: str | None = None
    """Only to requests with this method,"""
    path: str = ""
    """and whose path ends so."""
    change: Callable[[Answer], Answer] = lambda answer: answer
    seconds: float = 0.0

    def concerns(self, request: Request) -> bool:
        return self.times > 0 and self.method in (None, request.method) and request.path.endswith(self.path)


@dataclass(frozen=True)
class Request:
    endpoint: str
    method: str
    path: str
    query: dict[str, list[str]]
    body: Any
    token: str | None = None
    """What it was authorized with."""


class Hub:
    """The server, its repositories, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.unverified: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Request] = []
        self.token: str | None = TOKEN
        self.closing = threading.Event()
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(
        self, endpoint: str, status: int, *, headers: dict[str, str] | None = None, body: Any = "", **when: Any
    ) -> None:
        """Answer with ``status`` and do nothing.

        Args:
            endpoint: the last column of ``_ROUTES``.
            status: of HTTP.
            headers: of the answer.
            body: of the answer.
            when: ``times``, ``method`` and ``path`` of a ``Fault``.
        """
        answer = Answer(status, _encoded(body), headers or {})
        self._add(endpoint, Fault("refuse", change=lambda right: answer, **_once(when)))

    def drop(self, endpoint: str, **when: Any) -> None:
        """Close the connection without an answer and do nothing."""
        self._add(endpoint, Fault("drop", **_once(when)))

    def lose_answer(self, endpoint: str, **when: Any) -> None:
        """Do what is asked, then close the connection without an answer."""
        self._add(endpoint, Fault("lose", **_once(when)))

    def delay(self, endpoint: str, seconds: float, **when: Any) -> None:
        """Wait, then close the connection without an answer."""
        self._add(endpoint, Fault("drop", seconds=seconds, **_once(when)))

    def cut(self, endpoint: str, seconds: float = 0.0, **when: Any) -> None:
        """Do what is asked, send the first half of the answer, wait, and close the connection."""
        self._add(endpoint, Fault("cut", seconds=seconds, **_once(when)))

    def alter(self, endpoint: str, change: Callable[[Answer], Answer], **when: Any) -> None:
        """Do what is asked, and send ``change(answer)``."""
        self._add(endpoint, Fault("alter", change=change, **_once(when)))

    def asked(self, endpoint: str, method: str | None = None, path: str = "") -> list[Request]:
        return [
            request
            for request in self.requests
            if request.endpoint == endpoint and method in (None, request.method) and request.path.endswith(path)
        ]

    def _add(self, endpoint: str, fault: Fault) -> None:
        assert endpoint in {name for _, _, name in _ROUTES}
        self.faults.setdefault(endpoint, []).append(fault)

    def next_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults.get(request.endpoint, []):
                if fault.concerns(request):
                    fault.times -= 1
                    return fault
        return None

    @property
    def faults_left(self) -> int:
        """Faults that were asked for and did not happen: a test that leaves one tested nothing."""
        return sum(fault.times for faults in self.faults.values() for fault in faults)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Refusal(Exception):
    def __init__(self, status: int, body: Any = "", headers: dict[str, str] | None = None):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = self._chunks()
        found = (
            (re.fullmatch(pattern, parts.path), name) for method, pattern, name in _ROUTES if method == self.command
        )
        match, endpoint = next(((match, name) for match, name in found if match), (None, ""))
        if match is None:
            self.hub.requests.append(Request("unknown", self.command, parts.path, {}, content))
            return self._answer(404, {"error": "no such endpoint"})
        values = {name: unquote(value or "") for name, value in match.groupdict().items()}
        if "repo" in values:
            values["repo"] = values["repo"].removeprefix("models/")
        body = _decoded(content, self.headers.get("Content-Type", ""))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(endpoint, self.command, parts.path, parse_qs(parts.query), body, token)
        self.hub.requests.append(request)
        return self._serve(request, values)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _serve(self, request: Request, values: dict[str, str]) -> None:
        fault = self.hub.next_fault(request) or Fault("none", 0)
        if fault.kind == "drop":
            self.hub.closing.wait(fault.seconds)
            return self._hang_up()
        answer = Answer(0, b"", {}) if fault.kind == "refuse" else self._right_answer(request, values)
        if fault.kind == "lose":
            return self._hang_up()
        answer = fault.change(answer)
        if fault.kind != "cut":
            return self._answer(answer.status, answer.content, answer.headers)
        half = answer.content[: len(answer.content) // 2]
        self._answer(answer.status, half, {"Content-Length": str(len(answer.content)), **answer.headers})
        self.wfile.flush()
        self.hub.closing.wait(fault.seconds)
        return self._hang_up()

    def _right_answer(self, request: Request, values: dict[str, str]) -> Answer:
        try:
            if self.hub.token and request.endpoint != "lfs_put":
                self._check_token()
            status, body, headers = getattr(self, f"_{request.endpoint}")(request, **values)
        except _Refusal as refusal:
            status, body, headers = refusal.status, refusal.body, refusal.headers
        return Answer(status, _encoded(body), headers)

    def _answer(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = _encoded(body)
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refusal(
                401,
                {"error": "Invalid username or password."},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )

    def _repo(self, repo: str) -> Repo:
        if repo not in self.hub.repos:
            raise _Refusal(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self.hub.repos[repo]

    def _at(self, repo: str, rev: str) -> Commit:
        commit = self._repo(repo).at(rev)
        if commit is None:
            raise _Refusal(404, {"error": f"Invalid rev id: {rev}"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # One method an endpoint: (status, answer, headers).

    def _whoami(self, request: Request):
        return 200, {"name": USER, "type": "user"}, {}

    def _create_repo(self, request: Request):
        name = f"{request.body['organization'] or USER}/{request.body['name']}"
        if request.body["organization"] not in (None, USER):
            raise _Refusal(403, {"error": "You don't have the rights to create a model under this namespace"})
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        self.hub.repos[name] = Repo(private=_is_private(request.body))
        return 200, {"url": url, "name": name}, {}

    def _validate_yaml(self, request: Request):
        import yaml

        text = request.body["content"]
        front = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
        if front is None:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        if "license" in front and not isinstance(front["license"], str):
            return 400, {"errors": [{"message": '"license" must be a string'}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _preupload(self, request: Request, repo: str, rev: str):
        files = self._at(repo, rev).files
        modes = []
        for entry in request.body["files"]:
            lfs = _is_lfs(entry["path"])
            mode = {"path": entry["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if entry["path"] in files:
                mode["oid"] = _sha256(files[entry["path"]]) if lfs else _git_sha(files[entry["path"]])
            modes.append(mode)
        return 200, {"files": modes}, {}

    def _lfs_batch(self, request: Request, repo: str):
        self._repo(repo)
        objects = []
        for entry in request.body["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _lfs_put(self, request: Request, oid: str):
        assert _sha256(request.body) == oid
        self.hub.unverified[oid] = request.body
        return 200, "", {"ETag": f'"{oid}"'}

    def _lfs_verify(self, request: Request, oid: str):
        if oid not in self.hub.unverified:
            raise _Refusal(404, {"error": "object not found"})
        self.hub.blobs[oid] = self.hub.unverified[oid]
        return 200, {}, {}

    def _commit(self, request: Request, repo: str, rev: str):
        head = self._at(repo, rev)
        header, *operations = request.body
        as_pull_request = request.query.get("create_pr") == ["1"]
        parent = header["value"].get("parentCommit")
        if parent and parent != head.oid and not as_pull_request:
            raise _Refusal(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files.pop(value["path"])
        commit = Commit(header["value"]["summary"], files, head.oid)
        stored = self._repo(repo)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}
        if as_pull_request:
            stored.pull_requests.append(commit.message)
            number = len(stored.pull_requests)
            stored.refs[f"refs/pr/{number}"] = [*stored.refs[rev], commit]
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        else:
            stored.refs[rev].append(commit)
        return 200, answer, {}

    def _create_branch(self, request: Request, repo: str, rev: str):
        refs = self._repo(repo).refs
        if rev in refs:
            return 409, {"error": "Reference already exists"}, {}
        refs[rev] = list(refs["main"])
        return 200, {}, {}

    def _info(self, request: Request, repo: str, rev: str = "main"):
        commit = self._at(repo, rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self._repo(repo).private
        return 200, {"id": repo, "modelId": repo, "sha": commit.oid, "private": private, "siblings": siblings}, {}

    def _tree(self, request: Request, repo: str, rev: str, path: str = ""):
        files = self._at(repo, rev).files
        inside = [name for name in sorted(files) if not path or name.startswith(f"{path}/")]
        return 200, [_entry(name, files[name]) for name in inside], {}

    def _paths_info(self, request: Request, repo: str, rev: str):
        files = self._at(repo, rev).files
        paths = request.body["paths"] if isinstance(request.body, dict) else parse_qs(request.body.decode())["paths"]
        return 200, [_entry(path, files[path]) for path in paths if path in files], {}

    def _discussions(self, request: Request, repo: str):
        titles = self._repo(repo).pull_requests if request.query.get("p", ["0"]) == ["0"] else []
        found = [
            {
                "num": number,
                "title": title,
                "status": "open",
                "isPullRequest": True,
                "author": {"name": USER},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "repo": {"name": repo, "type": "model"},
            }
            for number, title in enumerate(titles, start=1)
        ]
        return 200, {"discussions": found, "count": len(found), "start": 0}, {}

    def _resolve(self, request: Request, repo: str, rev: str, path: str):
        commit = self._at(repo, rev)
        if path not in commit.files:
            raise _Refusal(404, "", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
        content = commit.files[path]
        lfs = _is_lfs(path)
        etag = _sha256(content) if lfs else _git_sha(content)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        elif request.endpoint == "resolve":
            kind = "" if repo.startswith("datasets/") else "models/"
            return 307, b"", {**headers, "Location": f"/api/resolve-cache/{kind}{repo}/{commit.oid}/{quote(path)}"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], headers
        return 200, content, headers

    _resolve_cache = _resolve


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".model"))


def _is_private(body: dict[str, Any]) -> bool:
    """Newer clients send ``visibility``, older ones ``private``."""
    return body.get("visibility") == "private" or body.get("private") is True


def _once(when: dict[str, Any]) -> dict[str, Any]:
    return {"times": 1, **when}


def _encoded(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def _decoded(content: bytes, content_type: str) -> Any:
    if "ndjson" in content_type:
        return [json.loads(line) for line in content.splitlines()]
    return json.loads(content) if "json" in content_type and content else content


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_sha(content)}
    if _is_lfs(path):
        pointer = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
        entry |= {"oid": _git_sha(str(pointer).encode()), "lfs": pointer}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
