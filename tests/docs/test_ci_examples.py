"""The pipelines of docs/ci: valid for the servers that they are for, and their commands run as they stand."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import junitparser
import kubernetes_validate
import pytest
import trainkit
import yaml
from ci_machine import BASE, PATIENCE, Machine
from docs_pages import ROOT
from hub_server import TOKEN

CI = ROOT / "docs/ci"
GITHUB, GITLAB, SLURM, KUBERNETES = (
    CI / name for name in ("github-actions.yml", "gitlab-ci.yml", "train.sbatch", "job.yaml")
)
RECIPE = f"""\
base_model: {BASE}
task: causal_lm
method: {{type: lora, r: 4, target_modules: all-linear}}
dataset: {{train: data/train.jsonl, eval: data/eval.jsonl, max_length: 128}}
training:
  output_dir: outputs/run
  max_steps: 40
  per_device_train_batch_size: 4
  bf16: false
  eval_strategy: steps
  eval_steps: 1000
  save_strategy: "no"
  logging_steps: 1
  verify: false
gates: {{eval_loss: "<= 100"}}
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A checkout with a recipe and its data, on a machine that reaches a hub."""
    machine = Machine(tmp_path / "checkout")
    (machine.folder / "data").mkdir()
    trainkit.write_rows(machine.folder / "data/train.jsonl", trainkit.MESSAGES[:10])
    trainkit.write_rows(machine.folder / "data/eval.jsonl", trainkit.MESSAGES[10:])
    (machine.folder / "recipe.yaml").write_text(RECIPE)
    yield machine
    machine.close()


def attempts(machine: Machine) -> list[str]:
    return [attempt["reason"] for attempt in trainkit.read_run(machine.folder / "outputs/run")["attempts"]]


def assert_reported(machine: Machine, **said: str) -> None:
    """The newest report holds these cases; ``passed`` or the kind of an error."""
    [suite] = junitparser.JUnitXml.fromfile(str(machine.folder / "report.xml"))
    found = {case.name: case.result[0].type if case.result else "passed" for case in suite}
    assert found == {name.replace("eval_loss", "eval_loss <= 100"): text for name, text in said.items()}


def assert_published(machine: Machine) -> None:
    """The adapter is on the hub, and no file of the machine holds the token."""
    stored = machine.hub.repos["acme/my-adapter"]
    weights = (machine.folder / "outputs/run/adapter_model.safetensors").read_bytes()
    assert stored.private
    assert stored.at("main").files["adapter_model.safetensors"] == weights
    for path in machine.folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def assert_only_push_sees_the_token(machine: Machine) -> None:
    holders = {args[0] for args, env in zip(machine.calls, machine.environments, strict=True) if TOKEN in env.values()}
    assert holders == {"push"}


# --- GitHub Actions -------------------------------------------------------------------------------------------------


class Actions:
    """Runs the steps of a job as a runner would."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.workflow = yaml.safe_load(GITHUB.read_text())
        self.known = {
            "github.workspace": str(machine.folder),
            "github.ref": "refs/heads/main",
            "github.token": "the job's",
            "secrets.HF_TOKEN": TOKEN,
        }

    def run(self, **changes: str) -> str:
        """The job's conclusion: success or failure. ``changes`` are to the workflow's variables."""
        self.failed, self.outputs, self.uses = False, dict[str, str](), list[dict[str, Any]]()
        job = self.workflow["jobs"]["train"]
        for number, step in enumerate(job["steps"]):
            if not self.wants(step.get("if", "success()")):
                continue
            if "uses" in step:
                self.uses.append(step)
                continue
            files = {name: self.machine.folder.parent / f"{name}-{number}" for name in ("OUTPUT", "STEP_SUMMARY")}
            env = {name: self.filled(value) for name, value in {**self.workflow["env"], **step.get("env", {})}.items()}
            env |= {f"GITHUB_{name}": str(path) for name, path in files.items()}
            env |= {"GITHUB_REF_NAME": "main", "GITHUB_SHA": "0123abc", **changes}
            self.failed |= bool(self.machine.run(step["run"], env))
            written = files["OUTPUT"].read_text() if files["OUTPUT"].exists() else ""
            self.outputs |= {
                f"steps.{step.get('id')}.outputs.{name}": value
                for name, _, value in (line.partition("=") for line in written.splitlines())
            }
            if files["STEP_SUMMARY"].exists():
                self.summary = files["STEP_SUMMARY"].read_text()
        return "failure" if self.failed else "success"

    def wants(self, condition: str) -> bool:
        """Whether a step runs."""
        names = re.sub(r"steps\.[\w.]+", lambda found: repr(self.outputs.get(found[0], "")), condition)
        value = eval(names.replace("&&", " and "), {"always": lambda: True, "success": lambda: not self.failed})
        return bool(value) and ("always()" in condition or not self.failed)

    def filled(self, value: str) -> str:
        return re.sub(r"\$\{\{ ([\w.]+) \}\}", lambda found: self.known[found[1]], value)


def test_github_is_valid() -> None:
    assert_valid_for("vendor.github-workflows", GITHUB)
    workflow = yaml.safe_load(GITHUB.read_text())
    steps = workflow["jobs"]["train"]["steps"]
    assert [step for step in steps if "${{" in step.get("run", "")] == [], "what others name would be run"
    limit = {"h": 60, "m": 1}
    granted = sum(int(count) * limit[unit] for count, unit in re.findall(r"(\d+)([hm])", workflow["env"]["MAX_TIME"]))
    assert granted + 30 <= workflow["jobs"]["train"]["timeout-minutes"] < 360
    assert {step["uses"].partition("@")[0] for step in steps if "uses" in step} == {
        "actions/checkout", "actions/setup-python", "actions/cache", "actions/cache/restore", "actions/cache/save",
        "actions/upload-artifact",
    }  # fmt: skip


def test_github_stops_and_goes_on(machine: Machine) -> None:
    actions = Actions(machine)
    machine.stops = [signal.SIGTERM]
    assert actions.run() == "success"
    assert actions.outputs == {"steps.train.outputs.code": "75"}
    assert machine.log[-1] == "gh workflow run fine-tune.yml --ref main with a token"
    assert "interrupted" in actions.summary
    assert_reported(machine, run="Interrupted")
    saved = [step["with"]["path"] for step in actions.uses if step["uses"].startswith("actions/cache/save")]
    assert saved == ["outputs/run"]

    assert actions.run() == "success"  # the job that gh has started
    assert attempts(machine) == ["interrupted", "complete"]
    assert "complete" in actions.summary
    assert_reported(machine, eval_loss="passed")
    assert [args[0] for args in machine.calls] == ["check", "train", "status", "check", "train", "status", "push"]
    assert len([line for line in machine.log if line.startswith("gh ")]) == 1
    assert_published(machine)
    assert_only_push_sees_the_token(machine)
    run = machine.environments[1]
    assert run["PEFTCLI_CACHE"].startswith(f"{machine.folder}/.cache")
    assert run["HF_HOME"].startswith(f"{machine.folder}/.cache")


@pytest.mark.slow
def test_github_where_a_gate_does_not_hold(machine: Machine) -> None:
    edit(machine, '"<= 100"', '"<= 0.1"')
    actions = Actions(machine)
    assert actions.run() == "failure"
    assert actions.outputs == {"steps.train.outputs.code": "12"}
    assert [args[0] for args in machine.calls] == ["check", "train", "status"]
    assert [step["uses"] for step in actions.uses][-1].startswith("actions/upload-artifact")


def test_github_where_the_recipe_is_wrong(machine: Machine) -> None:
    edit(machine, "max_steps", "max_stesp")
    actions = Actions(machine)
    assert actions.run() == "failure"
    assert [args[0] for args in machine.calls] == ["check"]
    assert len(actions.uses) == 2  # checkout and Python


# --- GitLab CI ------------------------------------------------------------------------------------------------------


class Pipeline:
    """Runs the jobs of a pipeline, stage by stage, as a runner would."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.config = yaml.safe_load(GITLAB.read_text())
        self.tries: list[tuple[str, int]] = []

    def run(self, branch: str = "main") -> bool:
        """Whether it passed."""
        stages = self.config["stages"]
        jobs = {name: job for name, job in self.config.items() if isinstance(job, dict) and "script" in job}
        assert sorted(jobs, key=lambda name: stages.index(jobs[name]["stage"])) == list(jobs)
        for name, job in jobs.items():
            only_main = any(rule["if"] == "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH" for rule in job.get("rules", []))
            if only_main and branch != "main":
                continue
            if not self.job(name, job):
                return False
        return True

    def job(self, name: str, job: dict[str, Any]) -> bool:
        known = {"CI_PROJECT_DIR": str(self.machine.folder), "CI_COMMIT_SHA": "0123abc", "HF_TOKEN": TOKEN}
        env = dict(known)
        for key, value in self.config["variables"].items():
            env[key] = re.sub(r"\$(\w+)", lambda found: known[found[1]], value)
        lines = [*self.config["default"]["before_script"], *job["script"]]
        retry = job.get("retry", {"max": 0, "exit_codes": []})
        for _ in range(1 + retry["max"]):
            code = self.machine.run("\n".join(lines), env)
            self.tries.append((name, code))
            if code == 0:
                return True
            if code not in retry["exit_codes"]:
                return False
        return False


def test_gitlab_is_valid() -> None:
    assert_valid_for("vendor.gitlab-ci", GITLAB)


@pytest.mark.slow
def test_gitlab_stops_and_goes_on(machine: Machine) -> None:
    pipeline = Pipeline(machine)
    machine.stops = [signal.SIGUSR1, signal.SIGTERM]
    assert pipeline.run()
    assert pipeline.tries == [("check", 0), ("train", 75), ("train", 75), ("train", 0), ("publish", 0)]
    assert attempts(machine) == ["interrupted", "interrupted", "complete"]
    assert_reported(machine, eval_loss="passed")
    assert_published(machine)


@pytest.mark.slow
def test_gitlab_gives_up_and_the_button_goes_on(machine: Machine) -> None:
    pipeline = Pipeline(machine)
    machine.stops = [signal.SIGTERM] * 3
    assert not pipeline.run("feature")
    assert [code for _, code in pipeline.tries] == [0, 75, 75, 75]
    assert pipeline.run("feature")
    assert [code for _, code in pipeline.tries][4:] == [0, 0]  # and nothing is published
    assert machine.hub.requests == []


@pytest.mark.slow
def test_gitlab_where_a_gate_does_not_hold(machine: Machine) -> None:
    edit(machine, '"<= 100"', '"<= 0.1"')
    pipeline = Pipeline(machine)
    assert not pipeline.run()
    assert pipeline.tries == [("check", 0), ("train", 12)]


# --- Slurm ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    # Options of sbatch, and what each may be given.
    "job-name": r"[\w-]+", "nodes": r"\d+", "ntasks": r"\d+", "cpus-per-task": r"\d+", "gpus-per-node": r"\d+",
    "mem": r"\d+[MG]", "time": r"(\d+-)?\d+:\d\d:\d\d", "output": r"[\w.%-]+", "open-mode": "append|truncate",
    "requeue": "", "signal": r"(B:)?(SIG)?(USR1|USR2|TERM)@\d+",
}  # fmt: skip


def test_slurm_is_valid() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    lines = SLURM.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH")]
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < first for line in directives), "sbatch stops to look at the first command"
    for line in directives:
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert found, line
        assert re.fullmatch(OPTIONS[found[1]], found[2] or ""), line
    commands = "\n".join(line for line in lines if not line.startswith("#"))
    assert set(re.findall(r"\bSLURM_\w+", commands)) <= {"SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CPUS_PER_TASK"}


@pytest.fixture
def slurm(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script as the job of a cluster, and signals it like the cluster; gives the job's exit code."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    cache = machine.folder / ".cache/huggingface/hub"
    huggingface_hub.snapshot_download(BASE, cache_dir=cache, endpoint=machine.public.url)  # on the login node
    machine.public.repos.clear()

    def slurm(number: int | None = None, restarts: int = 0) -> int:
        env = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts), "SLURM_CPUS_PER_TASK": "2"}
        before = machine.logged()
        process = machine.start(["bash", str(SLURM)], env)
        if number is not None:
            deadline = time.monotonic() + PATIENCE
            while machine.logged() <= before:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)  # the shell's alone: B:
        out, err = process.communicate(timeout=PATIENCE)
        print(out, err)
        return process.returncode

    return slurm


@pytest.mark.slow
def test_slurm_goes_back_into_the_queue(machine: Machine, slurm: Callable[..., int]) -> None:
    assert slurm(signal.SIGUSR1) == 75
    assert machine.log == [
        "srun --cpus-per-task=2 peftcli train recipe.yaml --junit report.xml",
        "scontrol requeue 4711",
    ]
    assert attempts(machine) == ["interrupted"]
    assert slurm(restarts=1) == 0
    assert attempts(machine) == ["interrupted", "complete"]
    assert len(machine.log) == 3  # and it is not put back again
    assert_reported(machine, eval_loss="passed")
    assert slurm() == 0  # complete: nothing to do
    assert attempts(machine) == ["interrupted", "complete"]


@pytest.mark.slow
def test_slurm_does_not_go_on_for_ever(machine: Machine, slurm: Callable[..., int]) -> None:
    assert slurm(signal.SIGUSR1, restarts=20) == 75
    assert not any(line.startswith("scontrol") for line in machine.log)


@pytest.mark.slow
def test_slurm_stops_where_the_same_again_would_fail_again(machine: Machine, slurm: Callable[..., int]) -> None:
    edit(machine, '"<= 100"', '"<= 0.1"')
    assert slurm() == 12
    edit(machine, "max_steps", "max_stesp")
    assert slurm() == 2
    assert len(machine.log) == 1  # the first one's srun


# --- Kubernetes -----------------------------------------------------------------------------------------------------


class Cluster:
    """Runs the pods of a job, and replaces them as the job's controller would."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.job = yaml.safe_load(KUBERNETES.read_text())
        (machine.folder / "recipe").mkdir()
        (machine.folder / "recipe.yaml").rename(machine.folder / "recipe/recipe.yaml")
        self.pods: list[list[int]] = []
        self.failures = 0
        """Of pods, those that count for the job's limit."""

    def run(self) -> str:
        """``Complete``, or why the job failed."""
        self.failures = 0
        while True:
            codes = self.pod()
            self.pods.append(codes)
            if codes[-1] == 0:
                return "Complete"
            action = self.action(codes[-1])
            if action == "FailJob":
                return "PodFailurePolicy"
            self.failures += action == "Count"
            if self.failures > self.job["spec"]["backoffLimit"]:
                return "BackoffLimitExceeded"

    def pod(self) -> list[int]:
        """The exit codes of its containers, up to the first that fails."""
        codes: list[int] = []
        spec = self.job["spec"]["template"]["spec"]
        for container in [*spec["initContainers"], *spec["containers"]]:
            assert container["workingDir"] == "/work"
            env = {each["name"]: each.get("value", TOKEN) for each in container.get("env", [])}
            env = {name: value.replace("/work", str(self.machine.folder)) for name, value in env.items()}
            codes.append(self.machine.run(container["command"], env))
            if codes[-1]:
                break
        return codes

    def action(self, code: int) -> str:
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
                assert rule["onExitCodes"]["operator"] == "In"
                return rule["action"]
        return "Count"


def test_kubernetes_is_valid() -> None:
    job = yaml.safe_load(KUBERNETES.read_text())
    kubernetes_validate.validate(job, "1.37", strict=True)
    spec = job["spec"]["template"]["spec"]
    assert spec["restartPolicy"] == "Never", "a failure policy needs it"
    mounted = {mount["name"] for container in spec["initContainers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.slow
def test_kubernetes_replaces_pods_that_were_stopped(machine: Machine) -> None:
    cluster = Cluster(machine)
    machine.stops = [signal.SIGTERM, signal.SIGTERM]
    assert cluster.run() == "Complete"
    assert cluster.pods == [[0, 75], [0, 75], [0, 0, 0]]
    assert cluster.failures == 0
    assert attempts(machine) == ["interrupted", "interrupted", "complete"]
    assert_published(machine)
    assert_only_push_sees_the_token(machine)


@pytest.mark.slow
def test_kubernetes_where_the_hub_refuses_at_first(machine: Machine) -> None:
    machine.hub.token = "another"
    cluster = Cluster(machine)
    assert cluster.run() == "PodFailurePolicy"
    assert cluster.pods == [[0, 0, 6]]
    machine.hub.token = TOKEN
    assert cluster.run() == "Complete"
    assert attempts(machine) == ["complete"]  # the second pod had nothing to train
    assert_published(machine)


@pytest.mark.slow
def test_kubernetes_where_a_gate_does_not_hold(machine: Machine) -> None:
    edit(machine, '"<= 100"', '"<= 0.1"')
    cluster = Cluster(machine)
    assert cluster.run() == "PodFailurePolicy"
    assert cluster.pods == [[0, 12]]


# --------------------------------------------------------------------------------------------------------------------


def test_every_pipeline_is_on_the_page() -> None:
    page = (ROOT / "docs/ci.md").read_text()
    assert re.findall(r"<!-- include: docs/ci/(\S+) -->", page) == [p.name for p in (GITHUB, GITLAB, SLURM, KUBERNETES)]
    assert {path.name for path in CI.iterdir()} == {p.name for p in (GITHUB, GITLAB, SLURM, KUBERNETES)}


def test_the_exit_codes_that_the_pipelines_name_are_those_of_the_page() -> None:
    page = (ROOT / "docs/ci.md").read_text()
    again = {75, 143, 5, 10, 11}
    rows = re.findall(r"^\| ([\d, ]+) \| (goes on|runs|stops)", page, re.M)
    listed = {int(code): does for codes, does in rows for code in codes.split(",")}
    assert {code for code, does in listed.items() if does == "runs"} == again
    assert set(yaml.safe_load(GITLAB.read_text())["train"]["retry"]["exit_codes"]) == again
    rules = yaml.safe_load(KUBERNETES.read_text())["spec"]["podFailurePolicy"]["rules"]
    final = {code for rule in rules if rule["action"] == "FailJob" for code in rule["onExitCodes"]["values"]}
    assert final == {code for code, does in listed.items() if does == "stops"} - {1, 130}


def edit(machine: Machine, old: str, new: str) -> None:
    path = machine.folder / "recipe.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def assert_valid_for(schema: str, path: Path) -> None:
    words = ["--builtin-schema", schema, "--output-format", "json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *words], capture_output=True, text=True, check=False
    )
    assert json.loads(done.stdout)["status"] == "ok", done.stdout
