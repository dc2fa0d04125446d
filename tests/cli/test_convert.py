"""``peftcli convert``: adapters of other programs, made here by their own arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusionkit import pipeline_base
from jsonschema import Draft202012Validator
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from trainkit import base_folder, build, scratch

from peftcli.adapters.foreign import FORMATS
from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.cli.convert import Format
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import LoadedModel, open_base
from peftcli.output_schemas import output_schema
from peftcli.schema import BaseModel

R, SCALE = 4, 2.5


def folder(kind: str) -> Path:
    """The tiny model of a kind, as a folder."""
    path = scratch() / f"convert-{kind}"
    if not path.exists():
        tiny(kind).save_pretrained(path)
    return path


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(path: Path, tensors: Mapping[str, torch.Tensor], config: Any = None, file: str = "a.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / file)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def linears(model: nn.Module, *ends: str) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


@pytest.fixture
def converted(cli: Callable, tmp_path: Path) -> Callable[..., Any]:
    """Converts a folder and returns the base model with the adapter, and what the command said."""

    def converted(path: Path, base: Path | None, *more: object) -> Any:
        named = () if base is None else ("--base", base)
        ran = cli("convert", path, "--output", tmp_path / "out", *named, *more, "--json")
        assert ran.code == 0, ran.err
        source = find_adapter(str(tmp_path / "out"))
        opened = open_base(source.base)
        options = source.model_options(opened)
        loaded = opened.model(source.auto_class(lambda: opened.config), torch.float32, **options)
        apply_adapter(LoadedModel(loaded.model), source)
        said = json.loads(ran.out)
        assert not [*Draft202012Validator(output_schema("convert")).iter_errors(said)]
        return loaded.model.eval(), said

    return converted


# --- mlx-lm ---------------------------------------------------------------------------------------------------------


def mlx(path: Path, tensors: Mapping[str, torch.Tensor], base: Path | None, kind: str = "lora") -> Path:
    config = {"fine_tune_type": kind, "lora_parameters": {"rank": R, "scale": SCALE, "dropout": 0.0}}
    write(path, tensors, config | ({} if base is None else {"model": str(base)}), "adapters.safetensors")
    file = path / "adapters.safetensors"
    content, size = file.read_bytes(), int.from_bytes(file.read_bytes()[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(content[8 : 8 + size])}).encode()  # as MLX writes it
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    return path


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_adds_the_scaled_product(converted: Callable, tmp_path: Path, kind: str) -> None:
    model, tensors = tiny("llama"), {}
    for name, module in linears(model.model.layers[1], "q_proj", "up_proj").items():
        a, b = drawn(module.in_features, R), drawn(R, module.out_features)
        tensors |= {f"model.layers.1.{name}.lora_a": a, f"model.layers.1.{name}.lora_b": b}
        weight = module.weight.data + (SCALE * b.T) @ a.T  # y = x W^T + scale (x a) b
        if kind == "dora":
            tensors[f"model.layers.1.{name}.m"] = m = module.weight.data.norm(dim=1) + drawn(module.out_features)
            weight = m[:, None] / weight.norm(dim=1, keepdim=True) * weight
        module.weight.data = weight
    found, said = converted(mlx(tmp_path / "theirs", tensors, folder("llama"), kind), None)
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)
    assert (said["format"], said["method"], said["modules"]) == ("mlx", "lora", 2)
    assert {step["how"] for step in said["steps"]} <= {"carried", "translated"}
    assert "lora_alpha 10" in str(said["steps"])


def test_mlx_adapts_a_tied_head_with_its_embedding(converted: Callable, tmp_path: Path) -> None:
    model = tiny("llama_tied")
    a, b = drawn(96, R), drawn(R, 32)
    model.model.embed_tokens.weight.data += SCALE * a @ b
    tensors = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
    found, said = converted(mlx(tmp_path / "theirs", tensors, folder("llama_tied")), None)
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)
    assert "serves the head too" in str(said["steps"])


@pytest.mark.parametrize("theirs", ["mlx", "peft"])
def test_pairs_of_experts_become_pairs_of_parameters(converted: Callable, tmp_path: Path, theirs: str) -> None:
    """mlx-lm has a tensor for all experts of a projection, files of transformers 4 a pair for each expert."""
    model, tensors = tiny("mixtral"), {}
    experts = model.model.layers[0].mlp.experts
    count, width, hidden = experts.down_proj.shape[0], experts.down_proj.shape[2], experts.down_proj.shape[1]
    for part, old, (out, inner) in (
        ("gate_proj", "w1", (width, hidden)),
        ("up_proj", "w3", (width, hidden)),
        ("down_proj", "w2", (hidden, width)),
    ):
        a, b = drawn(count, R, inner, seed=len(part)), drawn(count, out, R, seed=len(old) + len(part))
        delta = SCALE * b @ a
        rows = {"gate_proj": slice(0, width), "up_proj": slice(width, None)}.get(part)
        weight = experts.down_proj if rows is None else experts.gate_up_proj
        weight.data[:, rows if rows else slice(None)] += delta
        if theirs == "mlx":
            above = f"model.layers.0.mlp.switch_mlp.{part}"
            tensors |= {f"{above}.lora_a": a, f"{above}.lora_b": b}
        for at in range(count if theirs == "peft" else 0):
            above = f"base_model.model.model.layers.0.block_sparse_moe.experts.{at}.{old}"
            tensors |= {f"{above}.lora_A.weight": a[at].clone(), f"{above}.lora_B.weight": b[at].clone()}
    base = folder("mixtral")
    if theirs == "mlx":
        path = mlx(tmp_path / "theirs", tensors, base)
    else:
        config = {"peft_type": "LORA", "r": R, "lora_alpha": SCALE * R, "target_modules": ["w1", "w2", "w3"]}
        path = write(tmp_path / "theirs", tensors, {**config, "base_model_name_or_path": str(base)})
    found, said = converted(path, None)
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)
    assert said["modules"] == 2


# --- PEFT's and Unsloth's layouts of experts ------------------------------------------------------------------------


def of_experts(path: Path, base: Path, *, turned: bool, grouped: bool, **config: Any) -> tuple[Path, torch.Tensor]:
    """A LoRA of down_proj in a layout, and what it adds to the weight: (E, out, in)."""
    e, out, inner = tiny("mixtral").model.layers[0].mlp.experts.down_proj.shape
    a, b = drawn(e, R, inner), drawn(e, out, R)
    delta = torch.einsum("eor,eri->eoi", b, a) * 2
    reads, gives = (b.permute(0, 2, 1), a.permute(0, 2, 1)) if turned else (a, b)
    columns = gives.permute(1, 0, 2) if grouped else gives.permute(1, 2, 0)  # (out, E, r) or (out, r, E)
    above = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{above}.lora_A.weight": reads.flatten(0, 1), f"{above}.lora_B.weight": columns.flatten(1)}
    given = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_parameters": ["layers.0.mlp.experts.down_proj"]}
    return write(path, tensors, {**given, "base_model_name_or_path": str(base), **config}), delta


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize(
    ("turned", "grouped", "config", "more"),
    [
        (True, False, {"peft_version": "0.18.1"}, ()),
        (True, False, {}, ()),  # 0.17, by the sides
        (False, True, {"peft_version": "0.19.1", "lora_B_layout": "grouped_by_expert"}, ()),
        (True, True, {"peft_version": "0.18.0", "auto_mapping": {"unsloth_fixed": True}}, ()),
        (False, True, {"peft_version": "0.20.0"}, ("--from", "unsloth")),
    ],
)
def test_layouts_of_experts(
    converted: Callable, tmp_path: Path, turned: bool, grouped: bool, config: Any, more: Any
) -> None:
    path, delta = of_experts(tmp_path / "theirs", folder("mixtral"), turned=turned, grouped=grouped, **config)
    found, _ = converted(path, None, *more)
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data += delta
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)


def test_a_layout_that_cannot_be_told_is_refused(cli: Callable, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    square = MixtralForCausalLM(MixtralConfig(**sides, num_local_experts=2, vocab_size=96, num_key_value_heads=2))
    square.save_pretrained(tmp_path / "base")
    above = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{above}.lora_A.weight": drawn(4, 32), f"{above}.lora_B.weight": drawn(32, 4)}
    config = {"peft_type": "LORA", "r": 2, "target_parameters": ["mlp.experts.down_proj"]}
    path = write(tmp_path / "theirs", tensors, {**config, "base_model_name_or_path": str(tmp_path / "base")})
    ran = cli("convert", path, "--output", tmp_path / "out")
    assert ran.code == 4
    assert "--from peft-0.18" in ran.err
    assert cli("convert", path, "--output", tmp_path / "old", "--from", "peft-0.18").code == 0
    assert cli("convert", path, "--output", tmp_path / "new", "--from", "peft-0.19.1").code == 4  # nothing to do
    theirs, ours = (load_file(each) for each in (path / "a.safetensors", tmp_path / "old/adapter_model.safetensors"))
    assert torch.equal(ours[f"{above}.lora_A.weight"][0], theirs[f"{above}.lora_B.weight"][:, 0])


# --- loralib and adapters -------------------------------------------------------------------------------------------


def test_loralib_with_a_part_for_each_projection(converted: Callable, tmp_path: Path) -> None:
    model, alpha = tiny("gpt2"), 8
    attention = model.transformer.h[0].attn.c_attn
    a, b = drawn(3 * R, 32), drawn(96, R)
    for part in range(3):
        rows = slice(32 * part, 32 * part + 32)
        attention.weight.data[:, rows] += (alpha / R * b[rows] @ a[R * part : R * part + R]).T
    last = model.transformer.h[1].mlp.c_fc
    c, d = drawn(R, 32), drawn(128, R)
    last.weight.data += alpha / R * (d @ c).T
    names = "transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"
    pairs = {names[0]: (a, b), names[1]: (c, d)}
    tensors = {f"{name}.{end}": pair[at] for name, pair in pairs.items() for at, end in enumerate(("lora_A", "lora_B"))}
    found, said = converted(write(tmp_path / "theirs", tensors), folder("gpt2"), "--alpha", alpha)
    torch.testing.assert_close(logits(found, batch("gpt2")), logits(model, batch("gpt2")), atol=1e-4, rtol=1e-4)
    assert said["format"] == "loralib"


@pytest.mark.parametrize("mode", ["add", "scale"])
def test_the_library_adapters(converted: Callable, tmp_path: Path, mode: str) -> None:
    """LoRA and (IA)^3 of GPT-2's queries and values, which are two thirds of a layer."""
    model, alpha = tiny("gpt2"), 6 if mode == "add" else 1
    layer = model.transformer.h[1].attn.c_attn
    a, b = drawn(2 * R, 32), drawn(64, R) if mode == "add" else 1 + drawn(64, 1)
    for at, rows in enumerate((slice(0, 32), slice(64, 96))):
        own = b[32 * at : 32 * at + 32]
        if mode == "add":
            layer.weight.data[:, rows] += (alpha / R * own @ a[R * at : R * at + R]).T
        else:
            layer.weight.data[:, rows] *= own.T
            layer.bias.data[rows] *= own[:, 0]
    above = "transformer.h.1.attn.c_attn.loras.mine"
    tensors = {f"{above}.lora_B": b} | ({f"{above}.lora_A": a} if mode == "add" else {})
    given = {"architecture": "lora", "composition_mode": mode, "alpha": alpha, "r": R if mode == "add" else 1}
    config = {"config": {**given, "attn_matrices": ["q", "v"]}, "model_type": "gpt2", "model_name": str(folder("gpt2"))}
    path = write(tmp_path / "theirs", tensors, config, "adapter.safetensors")
    shutil.copy(path / "adapter.safetensors", path / "model_head.safetensors")
    found, said = converted(path, None)
    torch.testing.assert_close(logits(found, batch("gpt2")), logits(model, batch("gpt2")), atol=1e-4, rtol=1e-4)
    assert said["method"] == ("lora" if mode == "add" else "ia3")
    assert [step["what"] for step in said["steps"] if step["how"] == "left out"] == ["model_head.safetensors"]


# --- models of pictures ---------------------------------------------------------------------------------------------

SGM = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
    "down_blocks_0_resnets_0": "input_blocks_1_0",
    "conv1": "in_layers_2",
}
"""diffusers' names of blocks of the tiny SDXL, one layer a block -> those of its first authors."""


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("spelling", ["kohya", "sgm", "diffusers", "notes"])
def test_files_of_pictures(converted: Callable, tmp_path: Path, spelling: str) -> None:
    kind = "sdxl" if spelling == "sgm" else "sd"
    base, tensors, expected, notes = pipeline_base(kind), dict[str, torch.Tensor](), {}, {}
    empty = open_base(BaseModel(name=str(base))).empty_model("DiffusionPipeline", train_text_encoder=True)
    ends = ("to_q", "q_proj") if spelling != "sgm" else ("to_q", "down_blocks.0.resnets.0.conv1", "q_proj")
    for name, module in linears(empty, *ends).items():
        part, _, path = name.partition(".")
        weight = module.weight
        a, b = drawn(2, *weight.shape[1:]), drawn(len(weight), 2, *[1] * (weight.ndim - 2), seed=len(name))
        strength = {"kohya": 1.5, "sgm": 1.5, "diffusers": 1.0, "notes": 3.0}[spelling]
        expected[name] = strength * torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).view(weight.shape)
        full = f"text_model.{path.removeprefix('text_model.')}" if part.startswith("text") else path
        if spelling in ("kohya", "sgm"):
            joined = full.replace(".", "_")
            for ours, theirs in SGM.items() if spelling == "sgm" else ():
                joined = joined.replace(ours, theirs)
            prefix = {"unet": "lora_unet", "text_encoder": "lora_te1" if kind == "sdxl" else "lora_te"}
            above = f"{prefix.get(part, 'lora_te2')}_{joined}"
            tensors |= {
                f"{above}.lora_down.weight": a,
                f"{above}.lora_up.weight": b,
                f"{above}.alpha": torch.tensor(3.0),
            }
        else:
            tensors |= {f"{part}.{full}.lora_A.weight": a, f"{part}.{full}.lora_B.weight": b}
            notes |= {f"{part}.r": 2, f"{part}.lora_alpha": 6}
    path = tmp_path / "theirs.safetensors"
    given = {"lora_adapter_metadata": json.dumps(notes)} if spelling == "notes" else {}
    save_file(tensors, path, given)
    model, said = converted(path, base)
    layers = adapter_layers(model)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.delta().detach(), expected[name], atol=1e-5, rtol=1e-5)
    assert said["format"] == "diffusers"
    files = {each.name for each in (tmp_path / "out").iterdir()}
    assert {"task.json", "pytorch_lora_weights.safetensors", "unet", "text_encoder"} <= files


def test_names_that_diffusers_knows(converted: Callable, tmp_path: Path) -> None:
    """Flux, whose first authors keep queries, keys and values of a block in one layer."""
    base = pipeline_base("flux")
    empty = open_base(BaseModel(name=str(base))).empty_model("DiffusionPipeline")
    layer = empty.transformer.transformer_blocks[0].attn.to_q
    inner, out = layer.in_features, layer.out_features
    a, b = drawn(2, inner), drawn(3 * out, 2)
    above = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{above}.lora_down.weight": a, f"{above}.lora_up.weight": b, f"{above}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    model, said = converted(tmp_path / "theirs.safetensors", base)
    layers = adapter_layers(model)
    for at, part in enumerate(("to_q", "to_k", "to_v")):
        delta = layers[f"transformer.transformer_blocks.0.attn.{part}"].delta().detach()
        torch.testing.assert_close(delta, 0.5 * b[out * at : out * at + out] @ a, atol=1e-5, rtol=1e-5)
    assert "lora_state_dict" in str(said["steps"])


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def gguf_file(path: Path, architecture: str, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    given = {"general.type": "adapter", "adapter.type": "lora", **settings}
    for key, value in given.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, value in tensors.items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_rotates_neighbours(converted: Callable, tmp_path: Path) -> None:
    """Row 2 i of a head of llama.cpp is row i of transformers, row 2 i + 1 the row i of the second half."""
    model, tensors, size = tiny("llama"), {}, 8
    layer = model.model.layers[1]
    for name, part, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        module = getattr(layer.self_attn, part)
        a, b = drawn(R, module.in_features), drawn(module.out_features, R)
        module.weight.data += 8 / R * b @ a
        theirs = b.clone()
        for head in range(heads):
            for at in range(size // 2):
                theirs[head * size + 2 * at] = b[head * size + at]
                theirs[head * size + 2 * at + 1] = b[head * size + size // 2 + at]
        tensors |= {f"blk.1.{name}.weight.lora_a": a, f"blk.1.{name}.weight.lora_b": theirs}
    a, b = drawn(96, R), drawn(32, R)
    model.model.embed_tokens.weight.data += 8 / R * a @ b.T
    tensors |= {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}
    found, said = converted(gguf_file(tmp_path / "a.gguf", "llama", tensors), folder("llama"))
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)
    assert (said["format"], said["modules"]) == ("gguf", 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("damaged", "damaged, or no GGUF file"),
        ("cut", "damaged, or no GGUF file"),
        ("model", "holds no LoRA"),
        ("other", "is for a model of the architecture 'qwen2'"),
        ("unknown", "1 of its tensors are not of"),
    ],
)
def test_gguf_files_that_are_refused(cli: Callable, tmp_path: Path, name: str, found: str) -> None:
    pair = {f"blk.0.attn_v.weight.lora_{end}": drawn(16, 32) for end in "ab"}
    more = {"general.type": "model"} if name == "model" else {}
    tensors = {"blk.9.attn_v.weight.lora_a": drawn(2, 2)} if name == "unknown" else pair
    path = gguf_file(tmp_path / "a.gguf", "qwen2" if name == "other" else "llama", tensors, **more)
    if name in ("damaged", "cut"):
        path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 64 if name == "damaged" else path.read_bytes()[:200])
    ran = cli("convert", path, "--base", folder("llama"), "--output", tmp_path / "out")
    assert (ran.code, found in ran.err, (tmp_path / "out").exists()) == (4, True, False), ran.err


@pytest.mark.parametrize("form", ["gguf", "mlx"])
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_exported_adapter_comes_back(
    cli: Callable, converted: Callable, tmp_path: Path, form: str, kind: str
) -> None:
    """What ``peftcli export`` writes for these programs changes each weight as before, bit by bit in float32."""
    base, model = base_folder(kind), build(kind)
    modules = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn"]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    inject(model, config)
    randomise(model)
    save_adapter(model, config, tmp_path / "ours")
    ran = cli("export", tmp_path / "ours", "--form", form, "--output", tmp_path / "theirs")
    assert ran.code == 0, ran.err
    found, _ = converted(tmp_path / "theirs", base)
    before, after = adapter_layers(model), adapter_layers(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(layer.delta(), after[name].delta()) for name, layer in before.items())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_formats_are_those_of_the_command() -> None:
    assert get_args(Format) == tuple(FORMATS)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "holds no file of tensors"),
        ("pickle.pt", "is a pickle"),
        ("text.txt", "is no .safetensors or .gguf file"),
        ("two", "holds several files of tensors: a.safetensors, b.safetensors"),
        ("damaged.safetensors", "damaged"),
        ("strange", "is of no format that is known"),
        ("no_base", "does not name its base model"),
        ("other_base", "1 of the 1 adapted modules are not in"),
        ("full", "holds the weights of a whole model"),
        ("quantised", "holds weights that are quantised for mlx"),
        ("no_scale", "lora_parameters.scale: expected a number"),
        ("half", "lacks one of lora_a and lora_b"),
        ("wrong_size", "shape"),
        ("nan", "NaN"),
        ("loralib", "do not hold lora_alpha"),
        ("prefix", "'prefix_tuning' computes what no method here does"),
        ("lycoris", "no pair of a LoRA"),
        ("peft", "which peftcli reads as it is"),
    ],
)
def test_what_cannot_be_read_is_refused(cli: Callable, tmp_path: Path, name: str, found: str) -> None:
    path, q = tmp_path / name, "model.layers.0.self_attn.q_proj"
    pair = {f"{q}.lora_a": drawn(32, R), f"{q}.lora_b": drawn(R, 32)}
    base = folder("llama")
    match name:
        case "empty":
            path.mkdir()
        case "pickle.pt" | "text.txt" | "damaged.safetensors":
            path.write_bytes(b"\x80\x02}q\x00.")
        case "two":
            write(path, pair, file="b.safetensors")
            write(path, pair)
        case "strange":
            write(path, {"weight": drawn(2, 2)})
        case "no_base":
            mlx(path, pair, None)
        case "other_base":
            mlx(path, {f"other.{key.rpartition('.')[2]}": value for key, value in pair.items()}, base)
        case "full":
            mlx(path, pair, base, "full")
        case "quantised":
            base = tmp_path / "base"
            shutil.copytree(folder("llama"), base)
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
            mlx(path, pair, base)
        case "no_scale":
            write(path, pair, {"lora_parameters": {"rank": 4, "alpha": 8}, "model": str(base)})
        case "half":
            mlx(path, dict(list(pair.items())[:1]), base)
        case "wrong_size":
            mlx(path, {**pair, f"{q}.lora_a": drawn(31, R)}, base)
        case "nan":
            mlx(path, {**pair, f"{q}.lora_a": drawn(32, R) / 0}, base)
        case "loralib":
            write(path, {f"{q}.lora_A": drawn(R, 32), f"{q}.lora_B": drawn(32, R)})
        case "prefix":
            write(path, {"prefix": drawn(2)}, {"config": {"architecture": "prefix_tuning"}, "model_type": "llama"})
        case "lycoris":
            write(path, {"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": drawn(2, 2)})
            base = pipeline_base("sd")
        case "peft":
            tensors = {f"base_model.model.{q}.lora_{end}.weight": drawn(32, 32) for end in "AB"}
            write(path, tensors, {"peft_type": "LORA", "r": 32, "base_model_name_or_path": str(base)})
    named = () if name == "no_base" else ("--base", base)
    ran = cli("convert", path, "--output", tmp_path / "out", *named)
    assert ran.code == 4, ran.err
    assert found in ran.err
    said = [line for line in ran.err.splitlines() if not line.startswith(str(path))]
    assert len(said) <= 6
    assert not (tmp_path / "out").exists()


def test_the_answer_names_what_is_next(cli: Callable, tmp_path: Path) -> None:
    q = "model.layers.0.self_attn.q_proj"
    path = mlx(tmp_path / "theirs", {f"{q}.lora_a": drawn(32, R), f"{q}.lora_b": drawn(R, 32)}, base_folder())
    ran = cli("convert", path, "--output", tmp_path / "out", "--quiet")
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert ran.out.splitlines()[0] == "carried: 1 pair of A and B, transposed"
    assert ran.out.endswith(f"next:\n  peftcli info {tmp_path}/out\n")
    again = cli("convert", path, "--output", tmp_path / "out")
    assert (again.code, "not empty" in again.err) == (2, True)


# --- written by the programs themselves -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_file_that_mlx_lm_wrote(converted: Callable, tmp_path: Path, kind: str) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    base = base_folder()
    model, _ = load_model(base)
    given = {"rank": R, "scale": SCALE, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, 2, given, use_dora=kind == "dora")
    names = dict(tree_flatten(model.trainable_parameters()))
    assert names
    model.load_weights(
        [(name, value + 0.1 * mx.random.normal(value.shape)) for name, value in names.items()], strict=False
    )
    path = tmp_path / "theirs"
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": given, "model": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    model.eval()
    ids = [[5, 17, 40, 41, 9]]
    theirs = torch.tensor(model(mx.array(ids)).tolist())
    found, _ = converted(path, None)
    assert mlx_lm.__version__
    torch.testing.assert_close(found(input_ids=torch.tensor(ids)).logits.detach(), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_computes_the_same_from_the_same_file(converted: Callable, tmp_path: Path, kind: str) -> None:
    """A file of kohya's, which diffusers reads by its own code, and what it saves of it."""
    import diffusers

    base, tensors = pipeline_base(kind), dict[str, torch.Tensor]()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base)
    for name, module in linears(pipeline.unet, "to_q", "to_v").items():
        above = f"lora_unet_{name.replace('.', '_')}"
        pair = drawn(2, module.in_features), drawn(module.out_features, 2, seed=len(name))
        tensors |= {f"{above}.lora_down.weight": pair[0], f"{above}.lora_up.weight": pair[1]}
        tensors[f"{above}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "theirs.safetensors")
    pipeline.load_lora_weights(tmp_path / "theirs.safetensors")
    width = pipeline.unet.config.cross_attention_dim
    given: dict[str, Any] = {"encoder_hidden_states": drawn(1, 7, width)}
    if kind == "sdxl":
        inner = pipeline.unet.config.projection_class_embeddings_input_dim
        times = pipeline.unet.config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": drawn(1, inner - 6 * times), "time_ids": torch.ones(1, 6)}
    noisy = drawn(1, 4, 8, 8)
    theirs = pipeline.unet(noisy, 5, **given).sample
    model, _ = converted(tmp_path / "theirs.safetensors", base)
    torch.testing.assert_close(model.unet(noisy, 5, **given).sample, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_checkpoint_that_loralib_wrote(converted: Callable, tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib")
    model = tiny("gpt2")
    for block in model.transformer.h:
        for owner, name, parts in ((block.attn, "c_attn", 3), (block.mlp, "c_fc", 1)):
            old = getattr(owner, name)
            sides, given = old.weight.shape, {"r": R, "lora_alpha": 8, "merge_weights": False}
            new = loralib.MergedLinear(*sides, enable_lora=[True] * parts, **given) if parts > 1 else None
            new = new or loralib.Linear(*sides, **given)
            new.weight.data, new.bias.data = old.weight.data.T.contiguous(), old.bias.data
            new.lora_B.data = drawn(*new.lora_B.shape)
            setattr(owner, name, new)
    write(tmp_path / "theirs", loralib.lora_state_dict(model))
    found, _ = converted(tmp_path / "theirs", folder("gpt2"), "--alpha", 8)
    torch.testing.assert_close(logits(found, batch("gpt2")), logits(model, batch("gpt2")), atol=1e-4, rtol=1e-4)
