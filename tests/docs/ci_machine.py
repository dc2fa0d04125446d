"""A machine that runs the shell steps of a pipeline: a folder, a PATH with stand-ins, and ``peftcli`` itself.

``peftcli`` on its PATH is a small script that asks the test's process for a child (trainkit's, forked from a process
that has imported everything), passes signals on to it, and ends with its exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trainkit
from hub_server import Commit, Hub, Repo

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the recipe names. A tiny model has that name on the machine's hub."""
PATIENCE = 200.0
"""Seconds that a command may take on a busy machine."""
_CLIENT = """\
import json, os, signal, socket, sys
passed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
with socket.socket(socket.AF_UNIX) as server, server.makefile("rw") as file:
    server.connect(os.environ["CI_MACHINE"])
    file.write(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}) + "\\n")
    file.flush()
    child = int(file.readline())
    for number in passed_on:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    ended = json.loads(file.readline())
sys.stdout.write(ended["out"])
sys.stderr.write(ended["err"])
sys.exit(ended["code"])
"""
_STAND_INS = {
    "pip": 'echo "pip $*" >> "$CI_LOG"',
    "gh": 'echo "gh $* ${GH_TOKEN:+with a token}" >> "$CI_LOG"',
    "scontrol": 'echo "scontrol $*" >> "$CI_LOG"',
    "srun": 'echo "srun $*" >> "$CI_LOG"; while [[ $1 == -* ]]; do shift; done; exec "$@"',
}


class Machine:
    """Where a pipeline's commands run."""

    def __init__(self, folder: Path):
        self.folder = folder
        # one hub in two: who reads needs no token, who writes does
        self.public, self.hub = Hub(), Hub()
        self.public.token = None
        files = {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()}
        self.hub.repos["acme/my-adapter"] = Repo(private=True)
        self.public.repos[BASE] = Repo(False, {"main": [Commit("the base model", files)]})
        self.calls: list[list[str]] = []
        """The command lines of ``peftcli``."""
        self.environments: list[dict[str, str]] = []
        """The environment of each."""
        self.stops: list[int] = []
        """Signals: each is sent to one of the next ``train``, after some steps."""
        self._tools = Path(tempfile.mkdtemp(prefix="ci-"))  # a socket's path must be short
        self._log = self._tools / "log"
        self._log.touch()
        for name, line in _STAND_INS.items():
            self._install(name, f"#!/bin/bash\n{line}\n")
        self._install("peftcli", f"#!{sys.executable} -IS\n{_CLIENT}")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._tools / "socket"))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # ends accept, which close does not
        self._thread.join()
        self._server.close()
        self.hub.close()
        self.public.close()
        shutil.rmtree(self._tools)

    def start(self, script: str | list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a script of bash, or a command, in the machine's folder."""
        words = (
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script] if isinstance(script, str) else script
        )
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env={
                "CI_MACHINE": str(self._tools / "socket"),
                "CI_LOG": str(self._log),
                "PATH": self._path,
                **(env or {}),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str | list[str], env: Mapping[str, str] | None = None) -> int:
        """Run one to its end. What it printed stands in the test's output."""
        process = self.start(script, env)
        out, err = process.communicate(timeout=PATIENCE)
        print(f"$ {script if isinstance(script, str) else shlex.join(script)}\n{out}{err}-> {process.returncode}")
        return process.returncode

    @property
    def log(self) -> list[str]:
        """The calls of the stand-ins."""
        return self._log.read_text().splitlines()

    def logged(self) -> int:
        """Lines of the run's metrics."""
        path = self.folder / "outputs/run/metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def _path(self) -> str:
        return f"{self._tools}:/usr/local/bin:/usr/bin:/bin"

    def _install(self, name: str, text: str) -> None:
        path = self._tools / name
        path.write_text(text)
        path.chmod(0o755)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:  # shut down
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, client.makefile("rw") as file:
            asked = json.loads(file.readline())
            self.calls.append(asked["args"])
            self.environments.append(asked["env"])
            steps = self.logged()
            stop = self.stops.pop(0) if asked["args"][0] == "train" and self.stops else None
            hub = self.hub if asked["args"][0] == "push" else self.public
            prepare = partial(_prepare, asked["cwd"], hub.url)
            with tempfile.TemporaryDirectory() as output:
                env = {"HF_HUB_OFFLINE": "0", "HF_HOME": f"{asked['cwd']}/.home", **asked["env"]}
                child = trainkit.Child(Path(output), *asked["args"], env=env, before=prepare)
                file.write(f"{child.process.pid}\n")
                file.flush()
                if stop:
                    child.until(lambda: self.logged() > steps + 1, PATIENCE)
                    child.signal(stop)
                code = child.wait(PATIENCE)
                file.write(json.dumps({"code": code, "out": child.out, "err": child.err}) + "\n")
                file.flush()


def _prepare(folder: str, hub_url: str) -> None:
    """In the child: what a process that starts there reads from its environment when it imports these libraries."""
    import huggingface_hub
    from huggingface_hub import constants

    os.chdir(folder)
    constants.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"] == "1"
    constants.HF_HUB_CACHE = f"{os.environ['HF_HOME']}/hub"
    constants.ENDPOINT = huggingface_hub.hf_api.api.endpoint = hub_url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub_url + "/{repo_id}/resolve/{revision}/{filename}"
    os.environ["HF_ENDPOINT"] = hub_url
