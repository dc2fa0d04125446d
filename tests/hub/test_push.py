from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_folders import REPO, make_folder, safetensors_bytes, write_config
from hub_server import TOKEN, Commit, Hub, Repo
from models_tiny import ids, tiny

import peftcli
from peftcli.adapters import push as hub_module
from peftcli.adapters.benchmark_record import keep
from peftcli.adapters.load import adapter_folder
from peftcli.adapters.push import push
from peftcli.errors import AdapterError, HubError, NetworkError, UsageError
from peftcli.system import hub_requests

# huggingface_hub 2.4 hands a file to httpx2 in the way that httpx2 is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

PUSHED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png", "tokenizer.json"]
TRIES = 5


def test_a_new_repository_gets_one_private_commit_of_the_shared_files(hub: Hub, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pushed = push(folder, REPO, message="First try")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    repo = hub.repos[REPO]
    head = repo.refs["main"][-1]
    assert repo.private
    assert repo.commits == 1
    assert sorted(head.files) == PUSHED
    assert head.message == "First try"
    assert head.files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert head.files["adapter_config.json"] == (folder / "adapter_config.json").read_bytes()
    assert pushed.url == f"{hub.url}/{REPO}"
    assert (pushed.commit, sorted(pushed.files), pushed.private) == (head.oid, PUSHED, True)
    assert pushed.bytes == sum(len(content) for content in head.files.values())
    card = head.files["README.md"].decode()
    assert f"peftcli generate {REPO}" in card
    assert "base_model: acme/tiny-base\n" in card


def test_a_card_that_somebody_wrote_is_pushed_as_it_is(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(folder, REPO)
    assert hub.repos[REPO].refs["main"][-1].files["README.md"] == (folder / "README.md").read_bytes()


def test_public_when_asked(hub: Hub, folder: Path) -> None:
    assert not push(folder, REPO, private=False).private
    assert not hub.repos[REPO].private


def test_an_existing_repository_keeps_its_visibility_and_other_files(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].refs["main"].append(Commit("notes", {"notes.txt": b"mine"}))
    pushed = push(folder, REPO)
    assert not hub.asked("create_repo")
    assert not pushed.private
    assert not hub.repos[REPO].private
    assert hub.repos[REPO].refs["main"][-1].files["notes.txt"] == b"mine"


def test_several_large_files_are_one_commit(hub: Hub, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"many pieces")
    push(folder, REPO)
    assert hub.repos[REPO].commits == 1
    assert len(hub.asked("lfs_put")) == 2
    assert hub.repos[REPO].refs["main"][-1].files["tokenizer.model"] == b"many pieces"


def test_the_same_files_again_make_no_commit(hub: Hub, folder: Path) -> None:
    first = push(folder, REPO)
    assert push(folder, REPO).commit == first.commit
    assert hub.repos[REPO].commits == 1


def test_a_revision_is_a_branch_that_is_made(hub: Hub, folder: Path) -> None:
    push(folder, REPO, revision="second")
    assert hub.repos[REPO].refs["main"][-1].files == {}
    assert sorted(hub.repos[REPO].refs["second"][-1].files) == PUSHED
    (folder / "loss.png").write_bytes(b"other")
    push(folder, REPO, revision="second")
    assert len(hub.repos[REPO].refs["second"]) == 3


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = Repo(private=True)
    pushed = push(folder, REPO, create_pr=True, message="Please take it")
    assert pushed.url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repos[REPO].pull_requests == ["Please take it"]
    assert len(hub.repos[REPO].refs["main"]) == 1
    assert sorted(hub.repos[REPO].refs["refs/pr/1"][-1].files) == PUSHED


def test_a_push_to_a_pull_request_makes_no_branch(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = Repo(private=True)
    push(folder, REPO, create_pr=True)
    (folder / "loss.png").write_bytes(b"other")
    push(folder, REPO, revision="refs/pr/1")
    assert hub.repos[REPO].refs["refs/pr/1"][-1].files["loss.png"] == b"other"
    with pytest.raises(HubError, match="no such revision"):
        push(folder, REPO, revision="refs/pr/2")
    assert not hub.asked("create_branch")


def test_results_on_benchmarks_of_the_hub_are_pushed(hub: Hub, folder: Path) -> None:
    from huggingface_hub import parse_eval_result_entries

    def task(dataset: str | None) -> dict[str, Any]:
        metric = {"base": 0.4, "adapter": 0.5, "difference": 0.1}
        return {"dataset": dataset, "dataset_name": None, "fewshot": 0, "metrics": {"acc": metric}}

    facts = {"base_model": {}, "lm_eval_version": "0.4.13", "chat": True}
    names = {"arc": "acme/arc", "own": None, "file": "json", "../odd": "acme/odd"}
    keep(folder, {**facts, "limit": 4, "tasks": {"part": task("acme/part")}})
    keep(folder, {**facts, "limit": None, "tasks": {name: task(dataset) for name, dataset in names.items()}})
    pushed = push(folder, REPO)
    files = hub.repos[REPO].refs["main"][-1].files
    assert sorted(files) == sorted(pushed.files) == [".eval_results/arc.yaml", *PUSHED]
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/arc.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("acme/arc", "default", 0.5)
    assert "acc of the task arc of lm-eval 0.4.13, 0-shot" in str(entry.notes)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(5))
    assert sorted(push(folder, REPO, dry_run=True).files) == PUSHED, "the results are of other weights"


def test_a_dry_run_asks_nothing(hub: Hub, folder: Path) -> None:
    pushed = push(folder, REPO, dry_run=True)
    assert pushed.card.startswith("---\nbase_model: acme/tiny-base\n")
    assert (sorted(pushed.files), pushed.commit, pushed.private) == (PUSHED, None, True)
    assert hub.requests == []


@pytest.mark.parametrize(
    "base", ["/data/models/secret-place/llama", r"C:\models\llama", "./llama", "models/a/llama", "here"]
)
def test_a_local_base_is_not_pushed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    folder = make_folder(tmp_path / "run", base_model_name_or_path=base)
    with pytest.raises(UsageError, match="--base-model-id"):
        push(folder, REPO)
    assert hub.requests == []


def test_a_mixture_of_local_adapters_is_not_pushed(hub: Hub, folder: Path) -> None:
    write_config(folder, adapters={"0": "acme/first", "1": "outputs/second/run"})
    with pytest.raises(UsageError, match="mixes 'outputs/second/run', which exists on this machine only"):
        push(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize(
    "card", [None, "---\nbase_model: /data/secret/llama\ntags: [a]\n---\nOn /data/secret/llama.\n"]
)
def test_base_model_id_replaces_a_local_base_in_the_uploaded_copies(hub: Hub, tmp_path: Path, card: str | None) -> None:
    folder = make_folder(tmp_path / "run", base_model_name_or_path="/data/secret/llama")
    if card:
        (folder / "README.md").write_text(card)
    push(folder, REPO, base_model_id="acme/llama")
    files = hub.repos[REPO].refs["main"][-1].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "acme/llama"
    assert b"base_model: acme/llama\n" in files["README.md"]
    assert not any(b"secret" in content for content in files.values())
    assert "/data/secret/llama" in (folder / "adapter_config.json").read_text()


def test_a_base_that_was_a_folder_is_not_pushed_from_elsewhere(hub: Hub, folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"identity": {"base_model": "0" * 64}}))
    with pytest.raises(UsageError, match="--base-model-id"):
        push(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_with_a_token_is_not_pushed(hub: Hub, folder: Path, name: str) -> None:
    if name == "adapter_config.json":
        write_config(folder, base_model_name_or_path=f"acme/{TOKEN}")
    else:
        (folder / name).write_text(f"{{# {TOKEN} #}}")
    with pytest.raises(UsageError, match=f"{name} contains what looks like a token") as caught:
        push(folder, REPO)
    assert TOKEN not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("what", ["message", "revision"])
def test_a_token_is_no_message_and_no_branch(hub: Hub, folder: Path, what: str) -> None:
    with pytest.raises(UsageError, match=f"--{what} contains what looks like a token"):
        push(folder, REPO, **{what: f"with-{TOKEN}"})
    assert hub.requests == []


def test_a_card_is_pushed_without_its_token(hub: Hub, folder: Path) -> None:
    head = "---\nlicense: mit\n---\n"
    (folder / "README.md").write_text(f"{head}export HF_TOKEN={TOKEN}\n")
    push(folder, REPO)
    assert hub.repos[REPO].refs["main"][-1].files["README.md"].decode() == f"{head}export HF_TOKEN=***\n"


def test_an_invalid_folder_is_refused_before_anything_is_asked(hub: Hub, folder: Path) -> None:
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for damaged in (b"", weights[:-1], weights + b"x", b"\xff" * 64, weights.replace(b"data_offsets", b"data_offsetz")):
        (folder / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(AdapterError, match="damaged"):
            push(folder, REPO)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safe_serialization"):
        push(folder, REPO)
    for text in ("{", "[]", "{}", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            push(folder, REPO)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="not an adapter folder"):
        push(folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["", "alone", "a/b/c", "a/b--c", "/etc", "a/ b", "alice/x.git"])
def test_an_invalid_repo_id_is_refused_before_anything_is_asked(hub: Hub, folder: Path, repo_id: str) -> None:
    with pytest.raises(UsageError, match="REPO_ID"):
        push(folder, repo_id)
    assert hub.requests == []


# Refusals.


@pytest.mark.parametrize(
    ("endpoint", "status", "says"),
    [
        ("info", 401, "does not accept the token"),
        ("info", 403, "does not permit this"),
        ("preupload", 403, "does not permit this"),
        ("preupload", 404, "no such repository"),
        ("lfs_batch", 403, "does not permit this"),
        ("lfs_put", 403, "does not permit this"),
        ("commit", 401, "does not accept the token"),
        ("commit", 403, "does not permit this"),
        ("commit", 404, "no such repository"),
        ("commit", 400, "the hub refuses"),
        ("commit", 413, "the hub refuses"),
        ("commit", 422, "the hub refuses"),
    ],
)
def test_a_refusal_ends_the_push_at_once(
    hub: Hub, folder: Path, slept: list[float], endpoint: str, status: int, says: str
) -> None:
    hub.repos[REPO] = Repo(private=True)
    hub.fail(endpoint, status, body={"error": f"because of {TOKEN} \x1b[31m"})
    with pytest.raises(HubError, match=says) as caught:
        push(folder, REPO)
    assert str(status) in str(caught.value)
    assert "because of ***" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert len(hub.asked(endpoint)) == 1
    assert hub.repos[REPO].commits == 0
    assert slept == []


def test_a_bad_token_or_none(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotthetokenatall")
    with pytest.raises(HubError, match="hf auth login") as caught:
        push(folder, REPO)
    assert "thisisnot" not in str(caught.value)
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="requires a token"):
        push(folder, REPO)


def test_somebody_elses_name(hub: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match=r"write access[^ ]*|rights to create") as caught:
        push(folder, "bob/theirs")
    assert "403" in str(caught.value)
    assert len(hub.asked("create_repo")) == 1


def test_a_card_that_the_hub_refuses(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit]\n---\n")
    with pytest.raises(HubError, match=r"README\.md.*\"license\" must be a string"):
        push(folder, REPO)
    assert hub.repos[REPO].commits == 0


def test_what_is_no_hub(hub: Hub, folder: Path) -> None:
    hub.fail("info", 200, body="<html>welcome</html>", headers={"Content-Type": "text/html"})
    with pytest.raises(HubError, match="does not respond like a hub"):
        push(folder, REPO)


@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [("info", "{}"), ("info", "[]"), ("preupload", "{}"), ("lfs_batch", '{"objects": 3}'), ("commit", "{}")],
)
def test_what_no_hub_answers_is_refused_at_once(
    hub: Hub, folder: Path, slept: list[float], endpoint: str, answer: str
) -> None:
    hub.repos[REPO] = Repo(private=True)
    hub.fail(endpoint, 200, body=answer)
    with pytest.raises(HubError, match="does not respond like a hub"):
        push(folder, REPO)
    assert slept == []
    assert hub.repos[REPO].commits == 0


def test_a_gated_repository_is_not_made_anew(hub: Hub, folder: Path) -> None:
    hub.fail("info", 403, headers={"X-Error-Code": "GatedRepo"})
    with pytest.raises(HubError, match="must be granted first"):
        push(folder, REPO)
    assert not hub.asked("create_repo")


def test_another_host_does_not_see_the_token(hub: Hub, folder: Path) -> None:
    """huggingface_hub has an upload verified wherever the hub says."""
    with Hub() as other:
        other.token, other.blobs, other.unverified = None, hub.blobs, hub.unverified
        urls = (hub.url.encode(), other.url.encode())
        hub.alter("lfs_batch", lambda answer: replace(answer, content=answer.content.replace(*urls)))
        push(folder, REPO)
        assert [(request.endpoint, request.token) for request in other.requests] == [
            ("lfs_put", None),
            ("lfs_verify", None),
        ]
    assert hub.repos[REPO].commits == 1


# Conflicts.


@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict_is_tried_once_more(hub: Hub, folder: Path, status: int) -> None:
    hub.fail("commit", status, times=2)
    with pytest.raises(HubError, match=f"somebody else.*{status}"):
        push(folder, REPO)
    assert (len(hub.asked("commit")), hub.repos[REPO].commits) == (2, 0)
    hub.fail("commit", status)
    push(folder, REPO)
    assert (len(hub.asked("commit")), hub.repos[REPO].commits) == (4, 1)


def test_a_commit_of_somebody_else_in_between_is_kept(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = repo = Repo(private=True)
    read_again = hub_module._Push._head

    def theirs_first(self: hub_module._Push, api):
        head = read_again(self, api)
        if len(repo.refs["main"]) == 1:
            repo.refs["main"].append(Commit("theirs", {"theirs.txt": b"1"}, head.sha))
        return head

    monkeypatch.setattr(hub_module._Push, "_head", theirs_first)
    push(folder, REPO)
    assert [commit.message for commit in repo.refs["main"]] == ["initial commit", "theirs", "Upload adapter"]
    assert "theirs.txt" in repo.refs["main"][-1].files


def test_a_busy_namespace_does_not_loop(hub: Hub, folder: Path) -> None:
    hub.fail("create_repo", 409, times=2, body="Cannot create repo: another conflicting operation is in progress")
    with pytest.raises(HubError, match="409"):
        push(folder, REPO)
    assert len(hub.asked("create_repo")) == 2


# Faults that pass.

STEPS = ["info", "create_repo", "validate_yaml", "preupload", "lfs_batch", "lfs_put", "lfs_verify", "commit"]


@pytest.mark.grid(each="endpoint")
@pytest.mark.parametrize("endpoint", STEPS)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_fault_is_survived_at_every_step(hub: Hub, folder: Path, endpoint: str, status: int) -> None:
    hub.fail(endpoint, status, times=2)
    push(folder, REPO)
    assert sorted(hub.repos[REPO].refs["main"][-1].files) == PUSHED
    assert hub.repos[REPO].commits == 1


@pytest.mark.parametrize("endpoint", STEPS)
def test_a_dropped_connection_is_survived_at_every_step(hub: Hub, folder: Path, endpoint: str) -> None:
    hub.drop(endpoint, times=2)
    push(folder, REPO)
    assert hub.repos[REPO].commits == 1


@pytest.mark.parametrize("endpoint", STEPS)
def test_a_lost_answer_at_any_step_leaves_one_commit(hub: Hub, folder: Path, endpoint: str) -> None:
    hub.lose_answer(endpoint)
    pushed = push(folder, REPO)
    assert hub.repos[REPO].commits == 1
    assert pushed.commit == hub.repos[REPO].refs["main"][-1].oid


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("endpoint", ["info", "create_repo", "preupload", "lfs_batch", "lfs_put", "commit"])
@pytest.mark.parametrize("fault", ["500", "drop"])
def test_a_lasting_fault_ends_after_five_tries(
    hub: Hub, folder: Path, slept: list[float], endpoint: str, fault: str
) -> None:
    if fault == "drop":
        hub.drop(endpoint, times=TRIES)
    else:
        hub.fail(endpoint, 500, times=TRIES)
    with pytest.raises(NetworkError, match="run the same command again"):
        push(folder, REPO)
    assert len(hub.asked(endpoint)) == TRIES
    assert [wait for wait in slept if wait in hub_requests.RETRY_DELAYS][:1] == [1.0]
    assert REPO not in hub.repos or hub.repos[REPO].commits == 0


def test_different_faults_share_the_five_tries(hub: Hub, folder: Path, slept: list[float]) -> None:
    hub.fail("info", 500, times=2)
    hub.drop("commit")
    hub.fail("preupload", 429, times=1)
    hub.fail("commit", 503, times=1)
    with pytest.raises(NetworkError):
        push(folder, REPO)
    assert slept == list(hub_requests.RETRY_DELAYS)


def test_a_slow_answer_counts_as_none(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "READ_TIMEOUT", 0.1)
    hub.delay("commit", seconds=30, times=1)
    push(folder, REPO)
    assert hub.repos[REPO].commits == 1


def test_retry_after_is_obeyed_but_an_hour_is_not_waited_for(hub: Hub, folder: Path, slept: list[float]) -> None:
    hub.fail("commit", 429, headers={"Retry-After": "3600"})
    with pytest.raises(NetworkError, match="wait 3600 seconds"):
        push(folder, REPO)
    assert slept == []
    for headers in ({"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=7'}):
        hub.fail("commit", 429, headers=headers)
        push(folder, REPO)
        (folder / "loss.png").write_bytes(b"other")
    assert slept == [7.0, 7.0]


def test_a_lost_answer_of_a_pull_request_opens_no_second_one(hub: Hub, folder: Path) -> None:
    hub.repos[REPO] = Repo(private=True)
    push(make_folder(folder.parent / "other", r=99), REPO, create_pr=True)
    hub.lose_answer("commit")
    pushed = push(folder, REPO, create_pr=True)
    assert len(hub.repos[REPO].pull_requests) == 2
    assert pushed.url == f"{hub.url}/{REPO}/discussions/2"
    assert pushed.commit == hub.repos[REPO].refs["refs/pr/2"][-1].oid


def test_a_lost_answer_after_which_the_hub_is_down(hub: Hub, folder: Path) -> None:
    hub.lose_answer("commit")
    hub.fail("paths_info", 500, times=3)
    push(folder, REPO)
    assert len(hub.asked("commit")) == 1


# No network.


def test_nobody_listens(folder: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:passw0rd@127.0.0.1:{port}")
    with pytest.raises(NetworkError, match="cannot reach http") as caught:
        push(folder, REPO)
    assert "passw0rd" not in str(caught.value)
    assert slept == []


def test_the_name_is_not_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, slept: list[float]) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NetworkError, match=r"cannot reach https://hub\.invalid"):
        push(folder, REPO)
    assert slept == []


def test_offline_mode(folder: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        push(folder, REPO)
    assert hub.requests == []


# What a user sees.


def test_the_users_client_is_as_before(hub: Hub, folder: Path) -> None:
    from huggingface_hub.utils import _http, logging

    factory, verbosity = _http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()
    push(folder, REPO)
    hub.fail("info", 403)
    with pytest.raises(HubError):
        push(folder, REPO)
    assert (_http._GLOBAL_CLIENT_FACTORY, logging.get_verbosity()) == (factory, verbosity)


def test_the_hubs_own_log_is_silent_and_the_token_is_nowhere(
    hub: Hub, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.drop("preupload")
    hub.fail("commit", 503)
    push(folder, REPO)
    shown = "".join(capfd.readouterr())
    assert "thrown while" not in shown
    assert TOKEN not in shown + caplog.text


def test_xet_is_not_needed(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert is_xet_available()
    push(folder, REPO)
    assert sorted(hub.repos[REPO].refs["main"][-1].files) == PUSHED
    assert not hub.asked("unknown")


def test_the_command(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peftcli.cli.app import main

    assert main(["push", str(folder), REPO, "--dry-run"]) == 0
    assert "would upload 5 files" in capsys.readouterr().out
    assert hub.requests == []
    assert main(["push", str(folder), REPO, "--message", "Hi", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["url"], shown["private"]) == (f"{hub.url}/{REPO}", True)
    assert hub.repos[REPO].refs["main"][-1].message == "Hi"
    hub.fail("info", 403)
    assert main(["push", str(folder), REPO]) == 6
    hub.fail("info", 500, times=TRIES)
    assert main(["push", str(folder), REPO]) == 5
    write_config(folder, base_model_name_or_path="/data/llama")
    assert main(["push", str(folder), REPO]) == 2
    assert main(["push", str(folder / "checkpoints"), REPO]) == 4
    assert main(["push", str(folder), REPO, "--base-model-id", "acme/llama", "--create-pr"]) == 0
    assert hub.repos[REPO].pull_requests == ["Upload adapter"]
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err


def test_a_model_is_pushed_with_the_message_branch_and_token_that_python_gives(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(base_model_name_or_path="acme/tiny-base"))
    model.push_to_hub(REPO, commit_message="Third epoch", token=TOKEN, revision="epoch-3", private=False)
    repo = hub.repos[REPO]
    assert repo.refs["epoch-3"][-1].message == "Third epoch"
    assert not repo.private
    assert "adapter_model.safetensors" in repo.refs["epoch-3"][-1].files
    model.add_adapter("second", peftcli.LoraConfig(base_model_name_or_path="acme/tiny-base"))
    more = {"commit_description": "It answers.", "tags": ["mine"], "max_shard_size": "1GB"}
    model.push_to_hub(REPO.partition("/")[2], token=TOKEN, **more)  # of the token's user
    assert hub.asked("commit")[-1].body[0]["value"]["description"] == "It answers."
    files = repo.refs["main"][-1].files
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(files) == {"README.md", *names, *(f"second/{name}" for name in names)}
    assert b"\n- mine\n" in files["README.md"]
    assert adapter_folder(REPO, subfolder="second", token=TOKEN).name == "second"
    with pytest.raises(TypeError, match="unexpected keyword argument 'commit_mesage'"):
        model.push_to_hub(REPO, commit_mesage="Third epoch")


def test_a_config_is_pushed_alone(hub: Hub, tmp_path: Path) -> None:
    config = peftcli.LoraConfig(r=3, target_modules=["q_proj"])
    config.push_to_hub(REPO, token=TOKEN)
    config.save_pretrained(tmp_path)
    files = hub.repos[REPO].refs["main"][-1].files
    assert files["adapter_config.json"] == (tmp_path / "adapter_config.json").read_bytes()
    assert hub.repos[REPO].private


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_trainer_pushes_the_adapter_with_its_card(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard, constants
    from transformers import Trainer, TrainingArguments
    from transformers.utils import hub as transformers_hub

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # Trainer's client does not ask the environment
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(task_type="CAUSAL_LM", r=4))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        hub_model_id="alice/my-adapter",
        push_to_hub=True,
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": one, "labels": one} for one in ids(4, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    at = hub.repos["alice/my-adapter"].at("main")
    assert at is not None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert at.files[name] == (tmp_path / "run" / name).read_bytes()
    card = ModelCard(at.files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"lora", "generated_from_trainer"} <= set(card.data.tags)
