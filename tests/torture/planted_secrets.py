"""Planted secrets, which no command may print, write or send.

A secret is searched for in all that a command prints and in each file that it leaves, as it is and as JSON, HTML, URLs,
Python and base64 write it, and by its parts.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock
from urllib.parse import quote, quote_plus

import trainkit
from campaigns import Campaign, Trial
from hub_server import Hub
from in_process import Ran, inputs, peftcli, places
from tables import rows

HUB_TOKEN = "hf_" + "kQ3vT8mZ1xR6pW9sB4nL7cJ2dF5gH0yA"
LOGIN = "hf_" + "Wd4Kp9Yt2Nb7Xs1Rv6Mc3Gz8Hj5Lf0Qe"
API_KEY = "7f3c9a1e5b8d2460f7e3c1a9b5d8e2f406c3a7b1"
PASSWORD = 'Tr0ub4dor&3 "x\\y<z>'
OF_URL = "Sw0rdf1sh+1"
ENVIRONMENT = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": API_KEY,
    "DB_PASSWORD": PASSWORD,
    "HTTPS_PROXY": f"http://worker:{quote(OF_URL)}@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}
SECRETS = (HUB_TOKEN, LOGIN, API_KEY, PASSWORD, OF_URL)
_KINDS = {"a hub token": HUB_TOKEN, "an API key": API_KEY, "a password": PASSWORD, "a password in a URL": OF_URL}


def forms(secret: str) -> set[bytes]:
    """How a secret may be written, and parts of it that tell much of it."""
    raw = secret.encode()
    written = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret), quote(secret, safe="")}
    written |= {quote(secret), quote_plus(secret), secret[:9], secret[-9:]}
    for lead in (b"", b" ", b"  "):  # base64 depends on where in the text the secret begins
        whole = base64.b64encode(lead + raw)[len(lead) * 2 : -4]
        written |= {whole.decode(), whole.decode().translate(str.maketrans("+/", "-_"))}
    return {form.encode() for form in written}


def find(content: bytes, where: str) -> list[str]:
    """The secrets in a content."""
    hits = [secret for secret in SECRETS if any(form in content for form in forms(secret))]
    return [f"{where} holds {secret!r}" for secret in hits]


def search(folder: Path, *rans: Ran, skipped: Sequence[str] = ("in",)) -> None:
    """Fails if a secret is in what was printed, or in a file below ``folder`` or its name.

    Args:
        folder: All of it is searched but for the hub login's own file.
        rans: What was printed.
        skipped: Folders in it that are not searched: ``in``, which the user wrote.
    """
    found: list[str] = []
    for ran in rans:
        found += find(ran.out, "stdout") + find(ran.err, "stderr")
        assert ran.code != 1, f"a bug: {ran.err.decode(errors='replace')[-2000:]}"
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if name.parts[0] not in skipped and name != Path("hf/token"):
            found += find(os.fsencode(name), f"the name {name}")
            found += find(path.read_bytes(), str(name)) if path.is_file() else []
    assert not found, "\n".join(found) + "".join(f"\n{ran.out.decode()}\n{ran.err.decode()}" for ran in rans)


@contextlib.contextmanager
def planted(folder: Path, *, hub: Hub | None = None) -> Iterator[dict[str, str]]:
    """Inside, somebody is logged in. Gives an environment with secrets, and with that hub."""
    from huggingface_hub import constants

    (folder / "in").mkdir(exist_ok=True)
    (folder / "hf").mkdir(exist_ok=True)
    (folder / "hf" / "token").write_text(LOGIN)
    env = {**ENVIRONMENT, "HF_HOME": f"{folder}/hf", "PEFTCLI_CACHE": f"{folder}/cache"}
    changed = {"HF_TOKEN_PATH": f"{folder}/hf/token", "HF_HUB_CACHE": f"{folder}/hub"}
    if hub is not None:
        hub.token = None  # the user-info of the URL is sent instead
        env["HF_ENDPOINT"] = hub.url.replace("://", f"://worker:{quote(OF_URL)}@")
        changed["HF_HUB_OFFLINE"] = False
    with mock.patch.multiple(constants, **changed), mock.patch("time.sleep"):
        yield env


_ROWS = rows("planted_secrets")
COMMANDS, NAMED = _ROWS["succeeding"], _ROWS["failing"]
"""Commands that succeed, and commands that fail over what they were given."""


def _args(words: list[str], folder: Path, secret: str = "") -> list[str]:
    known = {"<HUB_TOKEN>": HUB_TOKEN, "<PASSWORD>": PASSWORD}
    texts = [word.format(folder=folder, secret=secret, **places()) for word in words]
    return [re.sub("<[A-Z_]+>", lambda found: known[found[0]], text) for text in texts]


def succeed(name: str, option: str, folder: Path) -> None:
    """A command that succeeds in an environment with secrets."""
    args = _args(COMMANDS[name], folder)
    with Hub() as hub, planted(folder, hub=hub if args[0] == "push" else None) as env:
        ran = peftcli(*args, *([option] if option else []), cwd=folder, env=env)
        assert ran.code == 0, ran.err.decode()
        search(folder, ran)
        search_hub(hub)


def fail(name: str, secret: str, folder: Path) -> None:
    """A command that fails over an argument with a secret in it, three times: in plain text, in JSON, and traced."""
    args = _args(NAMED[name], folder, secret)
    with planted(folder) as env:
        rans = [peftcli(*args, *options, cwd=folder, env=env) for options in ([], ["--json"], ["--debug"])]
        assert all(ran.code != 0 for ran in rans), f"it ended with {[ran.code for ran in rans]}"
        assert b"Traceback" in rans[2].err or args[0] == "check", rans[2].err.decode()
        search(folder, *rans)


def search_hub(hub: Hub) -> None:
    """Fails if a secret is in what a hub was sent, but for the header that proves who sent it."""
    found = []
    for request in hub.requests:
        sent = repr((request.path, request.query, request.body))
        found += find(sent.encode(), f"the request {request.path}")
    for name, repo in hub.repos.items():
        contents = [file for commits in repo.refs.values() for commit in commits for file in commit.files.items()]
        found += [hit for path, content in contents for hit in find(content, f"{name}/{path}")]
    assert not found, "\n".join(found)


def _options(name: str) -> list[str]:
    silent = name.startswith(("--", "schema", "train on", "train --dry-run"))
    return ["", "--debug"] if silent else ["", "--json"]


def recipe_with(line: str, secret: str, folder: Path) -> None:
    """A recipe with a secret in it is refused, and nothing is made."""
    with planted(folder) as env:
        recipe = folder / "in" / "recipe.yaml"
        text = inputs().recipe.read_text()
        key = line.split(":")[0].strip()
        kept = [each for each in text.splitlines() if not each.strip().startswith(f"{key}:")]
        at = kept.index("training:") + 1 if line.startswith(" ") else 0
        kept.insert(at, line.replace("SECRET", json.dumps(secret)[1:-1]))
        recipe.write_text("\n".join(kept))
        for args in (["train"], ["check"], ["check", "--deep"], ["inspect"], ["train", "--dry-run"]):
            ran = peftcli(args[0], recipe, *args[1:], "--debug", cwd=folder, env=env)
            assert ran.code == 2, f"{args} ended with {ran.code}: {ran.err.decode()}"
            search(folder, ran)
        assert not (folder / "out").exists()


def adapter_with(name: str, words: list[str], folder: Path) -> None:
    """An adapter whose config names its base model with a password."""
    with Hub() as hub, planted(folder, hub=hub if name.startswith("push") else None) as env:
        adapter = folder / "in" / "adapter"
        shutil.copytree(inputs().adapter, adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = f"https://worker:{OF_URL}@host/acme/{HUB_TOKEN}"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "README.md").write_text(f"# Mine\n\nIts base is https://worker:{OF_URL}@host/ with {PASSWORD}\n")
        args = [str(adapter) + word.removeprefix("{adapter}") if word[:9] == "{adapter}" else word for word in words]
        rans = [peftcli(*_args(args, folder), *option, cwd=folder, env=env) for option in ([], ["--debug"])]
        search(folder, *rans)
        search_hub(hub)


def data_with(name: str, words: list[str], folder: Path) -> None:
    """Rows with secrets in them, good ones and bad ones."""
    with planted(folder) as env:
        said = f"The token is {HUB_TOKEN} and the key {API_KEY}, the password {PASSWORD}, see http://me:{OF_URL}@host/"
        chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        good, bad = {"messages": chat, "note": said}, {"messages": [{"role": said, "content": said}], HUB_TOKEN: said}
        data = folder / "in" / "data.jsonl"
        trainkit.write_rows(data, [*trainkit.MESSAGES[:4], good, bad, good, {"messages": said}])
        trainkit.write_rows(folder / "in" / "prompts.jsonl", [{"prompt": said}, {"messages": chat}])
        rans = []
        for option in ([], ["dataset.on_bad_row=skip"]) if "{recipe}" in words else ([], ["--debug"]):
            more = [f"dataset.train={data}", f"dataset.eval={data}", "dataset.max_length=200"]
            args = _args(words, folder) + (more if "{recipe}" in words else [])
            rans.append(peftcli(*args, *option, "--debug", cwd=folder, env=env))
        search(folder, *rans, skipped=("in", "cache"))  # the cache keeps the rows themselves, as token ids


def train_that_fails(settings: list[str], code: int, folder: Path) -> None:
    """A run that fails after its folder was made."""
    with planted(folder) as env:
        args = ["train", inputs().recipe, f"training.output_dir={folder}/out", *settings, "--debug"]
        ran = peftcli(*args, cwd=folder, env=env)
        assert ran.code == code, f"it ended with {ran.code}: {ran.err.decode()}"
        assert (folder / "out" / "run.json").exists()
        search(folder, ran)


def raised_by_a_library(where: str, words: list[str], folder: Path) -> None:
    """An exception of another library whose text holds every secret."""
    text = f"401 for https://worker:{quote(OF_URL)}@host/ with Bearer {HUB_TOKEN}; {API_KEY}; {PASSWORD!r}; {LOGIN}"
    with planted(folder) as env, mock.patch(where, side_effect=RuntimeError(text)):
        rans = [peftcli(*_args(words, folder), *option, cwd=folder, env=env) for option in ([], ["--debug"])]
        assert all(ran.code != 0 for ran in rans)
        found = [hit for ran in rans for hit in find(ran.out + ran.err, "the output")]
        assert not found, "\n".join(found)
        assert any(b"***" in ran.err for ran in rans), rans[0].err.decode()
        assert all(ran.messages for ran in rans)
        for path in (folder / "out").rglob("*"):
            assert not (path.is_file() and find(path.read_bytes(), str(path))), f"{path} holds a secret"


_RAISED = {
    "train, its model": ("peftcli.models.open.OpenBase.processor", COMMANDS["train"]),
    "train, a step": ("peftcli.train.training_loop.fit", COMMANDS["train"]),
    "merge": ("peftcli.adapters.merge.write_file", COMMANDS["merge"]),
    "generate": ("peftcli.tasks.text.generation.TextGenerator.generate", COMMANDS["generate a file"]),
    "inspect": ("peftcli.inspection.report.audit", COMMANDS["inspect"]),
    "combine": ("peftcli.adapters.combine.combine", COMMANDS["combine"]),
    "transformers, the config": ("transformers.AutoConfig.from_pretrained", COMMANDS["merge"]),
    "push": ("huggingface_hub.HfApi.model_info", COMMANDS["push"]),
}


def hub_that_says(endpoint: str, status: int, folder: Path) -> None:
    """A hub that refuses, and repeats what it was sent."""
    with Hub() as hub, planted(folder, hub=hub) as env:
        said = f"Bearer {HUB_TOKEN} of {API_KEY} may not; https://worker:{quote(OF_URL)}@host/ {LOGIN}"
        hub.fail(endpoint, status, times=9, body={"error": said}, headers={"X-Error-Message": said})
        args = [*COMMANDS["push"], "--debug"]
        ran = peftcli(*_args(args, folder), cwd=folder, env=env)
        assert ran.code in (5, 6), f"it ended with {ran.code}: {ran.err.decode()}"
        search(folder, ran)
        search_hub(hub)


def nobody_answers(words: list[str], folder: Path) -> None:
    """The endpoint's URL has a password, and nobody listens there."""
    with Hub() as hub:
        pass
    with planted(folder, hub=hub) as env:
        ran = peftcli(*_args(words, folder), "--debug", cwd=folder, env=env)
        assert ran.code == 5, f"it ended with {ran.code}: {ran.err.decode()}"
        search(folder, ran)


_REFUSALS = (("info", 401), ("preupload", 403), ("commit", 400), ("commit", 500), ("lfs_batch", 429))


def libraries_that_talk(words: list[str], code: int, folder: Path) -> None:
    """A process of its own, in which every library logs all that it can."""
    talk = ["HF_HUB", "TRANSFORMERS", "DATASETS", "DIFFUSERS"]
    script = (
        "import logging, sys\n"
        "logging.getLogger().setLevel('DEBUG'), logging.lastResort.setLevel('DEBUG')\n"
        "from peftcli.cli.app import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with Hub() as hub, planted(folder, hub=hub) as env:
        more = {f"{name}_VERBOSITY": "debug" for name in talk} | {"HF_DEBUG": "1", "ACCELERATE_LOG_LEVEL": "debug"}
        offline = "0" if words[0] == "push" else "1"
        done = subprocess.run(
            [sys.executable, "-c", script, *_args(words, folder), "--debug"],
            env={**os.environ, **env, **more, "HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": f"{folder}/hub"},
            cwd=folder,
            capture_output=True,
            timeout=120,
        )
        ran = Ran(done.returncode, done.stdout, done.stderr)
        assert ran.code == code, f"it ended with {ran.code}: {ran.err.decode()}"
        assert ran.err.count(b"\n") > 50, f"little was logged, so this shows nothing: {ran.err.decode()}"
        search(folder, ran)
        search_hub(hub)


def _trials() -> Sequence[Trial]:
    trials = [
        Trial(f"{name} {option}".strip(), functools.partial(succeed, name, option))
        for name in COMMANDS
        for option in _options(name)
    ]
    trials += [
        Trial(f"{kind} given to {name}", functools.partial(fail, name, secret))
        for name in NAMED
        for kind, secret in _KINDS.items()
    ]
    trials += [
        Trial(f"{kind} in {where} of a recipe", functools.partial(recipe_with, line, secret))
        for where, line in _ROWS["lines of a recipe"].items()
        for kind, secret in _KINDS.items()
    ]
    trials += [
        Trial(f"an adapter's base model, {n}", functools.partial(adapter_with, n, w))
        for n, w in _ROWS["of adapters"].items()
    ]
    trials += [
        Trial(f"rows of data, {name}", functools.partial(data_with, name, w)) for name, w in _ROWS["of data"].items()
    ]
    trials += [
        Trial(f"a run that fails: {name}", functools.partial(train_that_fails, settings, code))
        for name, settings, code in (
            ("it diverges", ["training.learning_rate=1e6", "training.max_grad_norm=0"], 9),
            ("a gate", ["gates={eval_loss: < 0.001}", "training.eval_strategy=steps", "training.eval_steps=4"], 12),
        )
    ]
    trials += [
        Trial(f"an exception with secrets, {name}", functools.partial(raised_by_a_library, where, words))
        for name, (where, words) in _RAISED.items()
    ]
    trials += [
        Trial(f"the hub refuses {endpoint} with {status}", functools.partial(hub_that_says, endpoint, status))
        for endpoint, status in _REFUSALS
    ]
    trials += [
        Trial(f"nobody answers {name}", functools.partial(nobody_answers, words))
        for name, words in (
            ("push", COMMANDS["push"]),
            ("info", ["info", "acme/none"]),
            ("diff", ["diff", "a/b", "a/c"]),
        )
    ]
    trials += [
        Trial(f"libraries that log all, {name}", functools.partial(libraries_that_talk, COMMANDS[name], 0))
        for name in ("push", "train", "merge")
    ]
    return trials


CAMPAIGNS = [
    Campaign(
        "planted secrets",
        "No secret is in what a command prints, writes or sends, whether it succeeds or fails.",
        _trials,
        least=250,
        sample=3,
    )
]
