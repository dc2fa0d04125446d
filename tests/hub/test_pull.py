from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trainkit
from hub_folders import REPO, write_config
from hub_server import TOKEN, Answer, Commit, Hub, Repo
from opened import load_config, load_model

from peftcli.adapters.load import SHARED_FILES, adapter_folder
from peftcli.adapters.push import push
from peftcli.errors import (
    AdapterError,
    HubError,
    ModelError,
    NetworkError,
    PeftcliError,
    PeftWarning,
    UsageError,
)
from peftcli.models import hub_files
from peftcli.models.open import open_base
from peftcli.peft_api.adding import find_by_options
from peftcli.peft_api.config import PeftConfig
from peftcli.schema import BaseModel

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def pushed(hub: Hub, folder: Path) -> Hub:
    push(folder, REPO)
    hub.requests.clear()
    return hub


def test_a_folder_is_returned_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapter_folder(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert adapter_folder(f"~/{folder.name}") == folder


def test_the_round_trip_is_byte_identical(pushed: Hub, folder: Path) -> None:
    pulled = adapter_folder(REPO)
    for name in ("adapter_config.json", "adapter_model.safetensors", "loss.png", "tokenizer.json"):
        assert (pulled / name).read_bytes() == (folder / name).read_bytes()


def test_only_shared_files_are_pulled(pushed: Hub) -> None:
    files = dict(pushed.repos[REPO].refs["main"][-1].files)
    pushed.repos[REPO].refs["main"].append(
        Commit("more", {**files, "optimizer.pt": b"x", "code.py": b"y", "sub/README.md": b""})
    )
    pulled = adapter_folder(REPO)
    assert {path.name for path in pulled.rglob("*")} == set(files)
    assert set(files) <= set(SHARED_FILES)


def test_a_config_alone_is_pulled(pushed: Hub, folder: Path, tmp_path: Path) -> None:
    write_config(folder, r=4)
    push(folder, REPO, revision="second")
    inside = {"sub/adapter_config.json": (folder / "adapter_config.json").read_bytes()}
    pushed.repos[REPO].refs["main"].append(Commit("more", {**pushed.repos[REPO].refs["main"][-1].files, **inside}))
    cache = tmp_path / "another cache"
    assert PeftConfig.from_pretrained(REPO, cache_dir=cache).r == 8
    assert PeftConfig.from_pretrained(REPO, revision="second").r == 4
    assert PeftConfig.from_pretrained(REPO, subfolder="sub", token=None).r == 4
    assert {path.name for path in cache.rglob("snapshots/*/*")} == {"adapter_config.json"}
    with pytest.warns(PeftWarning, match="ignored: r, trust_remote_code;"):  # PEFT ignores them in silence
        assert PeftConfig.from_pretrained(REPO, r=99, trust_remote_code=True, inference_mode=False).r == 8
    with pytest.raises(ValueError, match=r"alice/other"):  # as PEFT's, by which code for it asks
        PeftConfig.from_pretrained("alice/other")


def test_a_revision(pushed: Hub, folder: Path) -> None:
    (folder / "loss.png").write_bytes(b"other")
    push(folder, REPO, revision="second")
    assert (adapter_folder(REPO, "second") / "loss.png").read_bytes() == b"other"
    assert (adapter_folder(REPO) / "loss.png").read_bytes() != b"other"
    assert adapter_folder(f"{REPO}@second") == adapter_folder(REPO, "second")
    with pytest.raises(HubError, match="no such revision"):
        adapter_folder(REPO, "third")


@pytest.mark.parametrize("trouble", ["offline", "down", "refused", "unreachable"])
def test_a_cached_adapter_needs_no_hub(pushed: Hub, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    from huggingface_hub import constants

    first = adapter_folder(REPO)
    if trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "down":
        pushed.fail("info", 503, times=5)
    elif trouble == "refused":
        pushed.fail("info", 403)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert adapter_folder(REPO) == first


def test_a_part_in_the_cache_is_no_whole(pushed: Hub, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT and transformers fetch what they need file by file."""
    import torch
    from huggingface_hub import constants, hf_hub_download

    def cache(repo: str, *names: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in names:
            hf_hub_download(repo, name, endpoint=pushed.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    cache(REPO, "adapter_config.json")
    with pytest.warns(PeftWarning, match="may lack files"), pytest.raises(NetworkError, match="a part of it only"):
        adapter_folder(REPO)
    cache(REPO, "adapter_model.safetensors")
    assert (adapter_folder(REPO) / "adapter_model.safetensors").is_file()
    assert PeftConfig.from_pretrained(REPO).r == 8
    cache(base, "tokenizer.json")
    with pytest.warns(PeftWarning, match="may lack files"), pytest.raises(NetworkError, match=r"base_model: .* a part"):
        open_base(BaseModel(name=base))
    cache(base, "config.json")
    with pytest.raises(NetworkError, match=r"base_model: .* a part of it only"):
        load_model(BaseModel(name=base), "AutoModelForCausalLM", torch.float32)
    cache(base, "model.safetensors")
    hub_files._folders.clear()
    load_model(BaseModel(name=base), "AutoModelForCausalLM", torch.float32)


def test_the_list_of_files_says_what_the_cache_lacks(pushed: Hub, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, snapshot_download

    pushed.repos[base].refs["main"][-1].files["LICENSE.txt"] = b"free"
    pushed.repos[base].refs["main"][-1].files.pop("adapter_config.json")
    for repo, left in ((REPO, "tokenizer.json"), (base, "generation_config.json"), (base, "LICENSE.txt")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        folder = Path(snapshot_download(repo, endpoint=pushed.url))
        (folder / left).unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if left == "LICENSE.txt":  # transformers does not read it, and so does not cache it
            assert open_base(BaseModel(name=repo)).folder == folder
            continue
        with pytest.raises(NetworkError, match="not all of it"):
            adapter_folder(repo) if repo == REPO else open_base(BaseModel(name=repo))


@pytest.mark.filterwarnings("error::peftcli.errors.PeftWarning")
def test_a_list_that_cannot_be_kept_is_one_all_the_same(pushed: Hub, base: str) -> None:
    from huggingface_hub import constants

    for repo, left in ((REPO, "adapter_model.safetensors"), (base, "config.json")):
        del pushed.repos[repo].refs["main"][-1].files[left]
        trees = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "trees"
        trees.parent.mkdir(parents=True)
        trees.touch()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors in .* on the hub"):
        adapter_folder(REPO)
    with pytest.raises(ModelError, match="is not a model: it has no config"):
        open_base(BaseModel(name=base))


@pytest.mark.parametrize("endpoint", ["info", "tree", "resolve"])
def test_passing_faults_are_survived(pushed: Hub, endpoint: str) -> None:
    pushed.fail(endpoint, 503)
    pushed.drop(endpoint)
    assert (adapter_folder(REPO) / "adapter_model.safetensors").is_file()


def test_a_failure_of_xet_is_one_of_the_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    import huggingface_hub

    def fails(*args: object, **options: object) -> str:
        raise ConnectionError("Network error: Request error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(NetworkError, match="Network error"):
        adapter_folder(REPO)
    assert len(slept) == 4


def test_a_fresh_process_without_a_terminal_prints_nothing(pushed: Hub, tmp_path: Path) -> None:
    import subprocess

    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "other")}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    code = f"from peftcli.adapters.load import adapter_folder; print(adapter_folder({REPO!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stderr == ""
    assert (Path(done.stdout.strip()) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("endpoint", ["info", "tree"])
def test_a_lasting_fault_ends_after_five_tries(pushed: Hub, endpoint: str) -> None:
    pushed.drop(endpoint, times=5)
    with pytest.raises(NetworkError):
        adapter_folder(REPO)
    assert len(pushed.asked(endpoint)) == 5


def test_no_network_and_no_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="cannot reach"):
        adapter_folder(REPO)
    assert slept == []


@pytest.mark.parametrize(
    ("variable", "value", "kind", "says"),
    [
        ("HF_ENDPOINT", "hub.example", UsageError, "HF_ENDPOINT: 'hub.example' is not the URL of a hub"),
        ("HF_TOKEN", "hf_\u00e9" + "aB3dE6gH9jK2mN5pQ8s", HubError, "the token contains characters that are not ASCII"),
        ("http_proxy", "http://127.0.0.1:9", NetworkError, "check the network, the proxy of HTTP_PROXY, and"),
    ],
)
def test_a_wrong_variable_is_named_at_once(
    pushed: Hub,
    monkeypatch: pytest.MonkeyPatch,
    slept: list[float],
    variable: str,
    value: str,
    kind: type[PeftcliError],
    says: str,
) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv(variable, value)
    with pytest.raises(kind) as caught:
        adapter_folder(REPO)
    assert says in str(caught.value)
    assert "aB3dE6gH9jK2mN5pQ8s" not in str(caught.value)
    assert slept == []


def test_offline_and_no_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        adapter_folder(REPO)


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"no folder alice/nothing here.*no such repository"):
        adapter_folder("alice/nothing")
    assert len(hub.asked("info")) == 1


@pytest.mark.parametrize(("status", "says"), [(401, "does not accept the token"), (403, "does not permit this")])
def test_a_refusal_ends_the_pull_at_once(pushed: Hub, status: int, says: str, slept: list[float]) -> None:
    pushed.fail("info", status, body={"error": f"{TOKEN}"})
    with pytest.raises(HubError, match=says) as caught:
        adapter_folder(REPO)
    assert TOKEN not in str(caught.value)
    assert slept == []


@pytest.mark.parametrize("adapter", ["nowhere", "/no/such/folder", "outputs/run/best", "./run", "~/run", ""])
def test_what_is_neither_a_folder_nor_a_hub_id(hub: Hub, adapter: str) -> None:
    with pytest.raises(AdapterError, match="neither a folder nor a hub id"):
        adapter_folder(adapter)
    assert hub.requests == []


def test_a_pickled_adapter_is_refused(hub: Hub, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="safe_serialization"):
        adapter_folder(str(folder))
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].refs["main"].append(Commit("old", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}))
    with pytest.raises(AdapterError, match="safe_serialization"):
        adapter_folder(REPO)
    assert not any(request.path.endswith(".bin") for request in hub.requests)
    hub.repos[REPO].refs["main"].append(Commit("none", {"adapter_config.json": b"{}"}))
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors") as caught:
        adapter_folder(REPO)
    assert caught.value.hint is None


# What came is not believed.

WEIGHTS = {"method": "GET", "path": "adapter_model.safetensors"}


def content(change: Callable[[bytes], bytes]) -> Callable[[Answer], Answer]:
    return lambda answer: dataclasses.replace(answer, content=change(answer.content))


OTHERS = {
    "short": content(lambda data: data[:-1]),
    "long": content(lambda data: data + b"more"),
    "flipped": content(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_bytes_than_announced_are_fetched_again(pushed: Hub, folder: Path, other: str) -> None:
    pushed.alter("resolve", OTHERS[other], **WEIGHTS)
    pulled = adapter_folder(REPO)
    assert (pulled / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert len(pushed.asked("resolve", **WEIGHTS)) == 2


@pytest.mark.parametrize("other", OTHERS)
def test_other_bytes_are_never_taken_for_the_adapter(pushed: Hub, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    pushed.alter("resolve", OTHERS[other], times=5, **WEIGHTS)
    with pytest.raises(NetworkError, match="differs from the hub's"):
        adapter_folder(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="cannot reach"):
        adapter_folder(REPO)


def test_other_bytes_are_not_left_when_the_try_fails_elsewhere(pushed: Hub, folder: Path) -> None:
    pushed.alter("resolve", OTHERS["flipped"], **WEIGHTS)
    pushed.fail("resolve", 403, path="loss.png")
    with pytest.raises(HubError):
        adapter_folder(REPO)
    pulled = adapter_folder(REPO)
    assert (pulled / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("header", ["ETag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../escaped", "..", "a/b", ""])
def test_a_hash_that_is_a_path_is_refused(pushed: Hub, tmp_path: Path, header: str, value: str) -> None:
    def change(answer: Answer) -> Answer:
        return dataclasses.replace(answer, headers={**answer.headers, header: value})

    pushed.alter("resolve", change, method="HEAD", path="adapter_config.json")
    with pytest.raises(HubError, match="does not respond like a hub"):
        adapter_folder(REPO)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    ("endpoint", "answer"),
    [
        *(("info", answer) for answer in ("{}", "[{}]", "null", "7", "{", "[" * 100_000, "<html>")),
        *(("tree", answer) for answer in ("[{}]", "7", "[", "<html>")),
    ],
)
def test_what_no_hub_answers_is_refused_at_once(pushed: Hub, slept: list[float], endpoint: str, answer: str) -> None:
    pushed.fail(endpoint, 200, body=answer)
    with pytest.raises(HubError, match="does not respond like a hub"):
        adapter_folder(REPO)
    assert slept == []


def test_a_circle_is_refused_at_once(pushed: Hub, slept: list[float]) -> None:
    pushed.fail("info", 302, headers={"Location": f"/api/models/{REPO}"}, times=21)
    with pytest.raises(HubError, match="does not respond like a hub"):
        adapter_folder(REPO)
    assert slept == []


@pytest.fixture
def base(hub: Hub) -> str:
    """A base model on the hub, where somebody left the config of an adapter."""
    files = {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()}
    hub.repos["acme/tiny"] = Repo(False, {"main": [Commit("base", {**files, "adapter_config.json": b"{}"})]})
    return "acme/tiny"


def test_an_adapters_config_is_no_part_of_a_base_model(base: str) -> None:
    import torch

    model = load_model(BaseModel(name=base), "AutoModelForCausalLM", torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model, "peft_config")


def test_what_was_fetched_as_an_adapter_is_no_base_model(base: str) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        adapter_folder(base)
    with pytest.raises(ModelError, match="contains an adapter"):
        load_config(BaseModel(name=base))


def test_a_file_of_a_base_model_is_fetched_or_missing_or_refused(hub: Hub, base: str) -> None:
    hub.fail("resolve", 403, path="generation_config.json")
    with pytest.raises(HubError, match="does not permit this"):
        open_base(BaseModel(name=base)).file("generation_config.json")
    found = open_base(BaseModel(name=base)).file("generation_config.json")
    assert found is not None
    assert found.read_bytes() == (trainkit.base_folder() / "generation_config.json").read_bytes()
    assert open_base(BaseModel(name=base)).file("nothing.json") is None


def test_options_of_huggingface_hub(pushed: Hub, tmp_path: Path) -> None:
    files = dict(pushed.repos[REPO].refs["main"][-1].files)
    inside = {f"best/one/{name}": content for name, content in files.items()}
    pushed.repos[REPO].refs["main"].append(Commit("more", {**files, **inside}))
    with pytest.raises(NetworkError, match="local_files_only is set"):
        adapter_folder(REPO, None, "best/one", local_files_only=True, cache_dir=tmp_path)
    pulled = adapter_folder(REPO, None, "best/one", cache_dir=tmp_path)
    assert tmp_path in pulled.parents
    assert (pulled / "adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]
    before = len(pushed.requests)
    assert adapter_folder(REPO, None, "best/one", cache_dir=tmp_path, local_files_only=True) == pulled
    assert len(pushed.requests) == before
    for wrong in ("../one", "best/*"):
        with pytest.raises(AdapterError, match="not a folder of a repository"):
            adapter_folder(REPO, None, wrong)
    with pytest.raises(HubError, match="the hub does not accept the token"):
        adapter_folder(REPO, None, None, token="hf_other", cache_dir=tmp_path / "empty")
    with pytest.warns(PeftWarning, match="changes nothing") as warned:
        find_by_options(
            REPO, {"revision": "", "repo_type": "model", "user_agent": "x", "local_dir": tmp_path, "proxies": {}}
        )
    assert len(warned) == 2
    with pytest.raises(AdapterError, match="repo_type: adapters are read from repositories of type model"):
        find_by_options(REPO, {"repo_type": "dataset"})
