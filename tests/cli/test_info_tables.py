from __future__ import annotations

import json
import struct
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import trainkit
from packaging.version import Version
from peft import LoraConfig

from peftcli.cli.info import USES
from peftcli.methods import METHODS
from peftcli.system import packages
from peftcli.tasks import TASKS


def test_methods_and_tasks(cli) -> None:
    lines = cli("info", "methods").out.splitlines()
    assert lines[0].split() == ["method", "peft_type", "summary", "paper"]
    assert [line.split()[0] for line in lines[1:]] == list(METHODS)
    assert [row["method"] for row in json.loads(cli("info", "methods", "--json").out)["methods"]] == list(METHODS)
    assert [row["task"] for row in json.loads(cli("info", "tasks", "--json").out)["tasks"]] == list(TASKS)


def test_env(cli) -> None:
    facts = json.loads(cli("info", "env", "--json").out)
    assert {"python", "torch", "transformers", "devices"} <= set(facts)
    printed = cli("info").out
    assert printed.startswith("python: ")
    assert [line.split()[0] for line in printed.splitlines() if line.split()[1:2] == ["missing"]] == [
        name for name, lacks in facts["extras"].items() if lacks
    ]
    wanted = {(each["by"].split()[0], each["package"]): each["wanted"] for each in facts["misfits"]}
    assert ("warning: transformers" in printed) == (("transformers", "peft") in wanted)


def test_what_transformers_demands_of_peft_is_what_it_checks() -> None:
    """As transformers itself says it, imported, and does it."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.peft import MIN_PEFT_VERSION

    found = {each.package: each.wanted for each in packages.misfits(["transformers"])}
    if Version(version("peft")) >= Version(MIN_PEFT_VERSION):
        assert "peft" not in found
        return
    assert found["peft"] == f">={MIN_PEFT_VERSION}"
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    with pytest.raises(ValueError, match=MIN_PEFT_VERSION):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))


def test_versions_that_do_not_fit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"a": "1.0", "b": "2.0", "c": "1.0"}
    needs = {"a": ["b>=2.1", "c>=1", "d>=1", 'b>=9; extra == "x"', 'c>=2; python_version < "3"'], "peftcli": []}

    def requires(name: str) -> list[str]:
        return needs[name]

    monkeypatch.setattr(packages, "requires", requires)
    monkeypatch.setattr(packages, "installed_version", there.get)
    assert packages.misfits(["a", "e"]) == [packages.Misfit("a 1.0", "b", ">=2.1", "2.0")]
    needs["peftcli"] = ['b>=2; extra == "one"', 'd>=1; extra == "one"', 'c; extra == "two"', 'd; extra == "dev"', "b"]
    assert packages.extras() == {"one": ["d>=1"], "two": []}


def test_every_extra_says_which_tasks_need_it() -> None:
    assert packages.extras().keys() - {"all"} == USES.keys()
    for name, row in TASKS.items():
        task = import_module(f"peftcli.tasks.{row.module}").TASK
        for needed in (task.packages, task.input_packages):
            for extra in needed.values() if isinstance(needed, dict) else ():
                assert name in USES[extra].replace(";", ",").split(", "), (name, extra)


CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "org/model",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["score"],
}


def adapter(folder: Path, config: object = CONFIG, *, more: bool = True, other: str | None = None) -> Path:
    """An adapter folder: LoRA on two modules, and with ``more`` one trained bias and one module saved whole."""
    at = "base_model.model.layers.0"
    shapes = {
        f"{at}.q_proj.lora_A.weight": [2, 8],
        f"{at}.q_proj.lora_B.weight": [8, 2],
        f"{at}.v_proj.lora_A.weight": [2, 8],
        f"{at}.v_proj.lora_B.weight": [4, 2],
    }
    if more:
        shapes |= {f"{at}.norm.bias": [8], "base_model.model.score.weight": [3, 8]}
    if other is not None:
        shapes[f"{at}.{other}"] = [8]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter(cli, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "run")
    facts = json.loads(cli("info", folder, "--no-updates", "--json").out)
    assert facts == {
        "adapter": str(folder),
        "method": "lora",
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model": "org/model",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["score"],
        "modules_adapted": 2,
        "parameters": 16 + 16 + 16 + 8 + 8 + 24,
        "tensors": 6,
        "dtypes": ["F32"],
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "servers": [],
    }
    assert "target_modules: q_proj, v_proj\n" in cli("info", folder).out
    (folder / "run.json").write_text('{"parameters": {"trainable": 80, "all": 800}}')
    assert "parameters: 80\n" in cli("info", folder).out, "the file holds what is shared, and buffers, besides"
    (folder / "run.json").write_text('{"parameters": {"trainable": true}}')
    assert "parameters: 88\n" in cli("info", folder).out
    (folder / "run.json").write_text("damaged")
    assert "parameters: 88\n" in cli("info", folder).out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"modules_to_save": ["lm_head"]}, "vllm reads no modules_to_save, llama.cpp reads no modules_to_save"),
        ({"use_dora": True}, "vllm reads no use_dora, llama.cpp reads no use_dora"),
        ({"rank_pattern": {"q_proj": 4}}, "vllm reads no rank_pattern"),
        ({"use_rslora": True}, "llama.cpp reads no use_rslora"),
        ({"lora_bias": True}, "vllm reads no lora_bias, llama.cpp reads no lora_bias"),
        ({"layer_replication": [[0, 1]]}, "vllm reads no layer_replication, llama.cpp reads no layer_replication"),
        ({"alora_invocation_tokens": [3]}, "vllm reads no alora_invocation_tokens"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "vllm reads no IA3, llama.cpp reads no IA3"),
    ],
)
def test_what_servers_do_not_read_is_said(cli, tmp_path: Path, changed: dict[str, object], said: str | None) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "modules_to_save"} | {"task_type": "CAUSAL_LM"}
    if "peft_type" in changed:
        config = {name: value for name, value in config.items() if name not in ("r", "lora_alpha")}
    out = cli("info", adapter(tmp_path, config | changed, more=False), "--no-updates").out
    assert (f"servers: {said}\n" in out) if said else ("servers:" not in out)


@pytest.mark.parametrize(("tensor", "servers"), [("q_proj.base_layer.bias", 2), ("embed_tokens.base_layer.weight", 1)])
def test_a_tensor_that_servers_do_not_read_is_named(cli, tmp_path: Path, tensor: str, servers: int) -> None:
    config = {name: value for name, value in CONFIG.items() if name != "modules_to_save"} | {"task_type": "CAUSAL_LM"}
    out = cli("info", adapter(tmp_path, config, more=False, other=tensor), "--no-updates").out
    said = [f"{server} reads no {tensor}" for server in ("vllm", "llama.cpp")]
    assert f"servers: {', '.join(said[:servers])}\n" in out


def test_what_modules_share_and_a_module_saved_by_a_dotted_name_are_not_adapted(cli, tmp_path: Path) -> None:
    config = CONFIG | {"modules_to_save": ["model.norm"]}
    folder = adapter(tmp_path, config, more=False, other="norm.weight")
    names = {
        "base_model.vera_A": 4,
        "base_model.model.model.norm.weight": 4,
        "base_model.model.model.q.vera_lambda_d": 4,
    }
    raw = {
        name: {"dtype": "F32", "shape": [size], "data_offsets": [16 * at, 16 * at + 16]}
        for at, (name, size) in enumerate(names.items())
    }
    head = json.dumps(raw).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(48))
    assert json.loads(cli("info", folder, "--no-updates", "--json").out)["modules_adapted"] == 1


def test_soft_prompts_adapt_no_module(cli, tmp_path: Path) -> None:
    folder = adapter(tmp_path, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2})
    raw = json.dumps({"prompt_embeddings": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(32))
    facts = json.loads(cli("info", folder, "--json").out)
    assert (facts["modules_adapted"], facts["parameters"], facts["dtypes"]) == (0, 16, ["BF16"])
    printed = [line.partition(":")[0] for line in cli("info", folder).out.splitlines()]
    there = ["num_virtual_tokens", "parameters", "tensors", "updates"]
    assert printed == ["adapter", "method", *there], "no line for what is not there"


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (b"{", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b"\xff\xfe", None, "adapter_config.json:1: not UTF-8 text"),
        (b"[]", None, "holds no JSON object"),
        (b'{"peft_type": 3}', None, "adapter_config.json: peft_type: no method is called 3"),
        (b" " * (1 << 20) + b"{}", None, "it has 1,048,578 bytes"),
        (None, b"", "damaged"),
        (None, b"\x05\0\0\0\0\0\0\0{}", "damaged"),
        (None, struct.pack("<Q", 1 << 40), "damaged: its header is larger than 16 MB"),
    ],
)
def test_damaged_adapters(cli, tmp_path: Path, config: bytes | None, weights: bytes | None, message: str) -> None:
    folder = adapter(tmp_path)
    if config is not None:
        (folder / "adapter_config.json").write_bytes(config)
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    ran = cli("info", folder)
    assert (ran.code, ran.out) == (4, "")
    assert message in ran.err


def test_what_is_no_adapter(cli, tmp_path: Path) -> None:
    assert "this is not an adapter folder" in cli("info", tmp_path).err
    (tmp_path / "run.json").touch()
    assert f"peftcli status {tmp_path}" in cli("info", tmp_path).err, "a run that was stopped"
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").touch()
    assert "save it again with safe_serialization" in cli("info", folder).err
    ran = cli("info", "no such thing")
    assert ran.code == 4
    assert "neither a folder nor a hub id" in ran.err
