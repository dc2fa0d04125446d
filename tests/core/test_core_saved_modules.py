"""What trains in full beside an adapter: new heads whatever they are called, their attributes and their buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from models_tiny import batch, ids, labelled, logits, tiny
from oracle import saved_by_peft, silence
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter, write_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, load_training_state, training_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig

PIXELS = (2, 3, 32, 32)


def _segformer(kind: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
    rates = dict.fromkeys(("hidden_dropout_prob", "classifier_dropout_prob", "drop_path_rate"), 0.0)
    return kind(SegformerConfig(**sizes, **rates, decoder_hidden_size=8, num_labels=3))


def _vit(kind: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3))


def _efficientnet() -> Any:
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, dropout_rate=0.0,
            drop_connect_rate=0.0, num_labels=3,
        )
    )  # fmt: skip


def _resnet() -> Any:
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))


def _loaded(kind: Any, body: nn.Module, folder: Path) -> tuple[Any, list[str]]:
    """A model of another head than the checkpoint's, and what the loader says is new in it."""
    body.save_pretrained(folder)  # type: ignore[operator]
    with torch.random.fork_rng([]):
        torch.manual_seed(len(list(folder.iterdir())))
        model, said = kind.from_pretrained(folder, num_labels=3, output_loading_info=True)
    return model.eval(), sorted(said["missing_keys"])


def _body(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter)
    return model


HEADS: dict[str, tuple[Any, Callable[[], Any], str, list[str]]] = {
    "vit": (ViTForImageClassification, lambda: _vit(ViTModel), "q_proj", ["classifier"]),
    "segformer": (
        SegformerForSemanticSegmentation,
        lambda: _segformer(SegformerForImageClassification),
        "q_proj",
        ["decode_head"],
    ),
    "bert": (
        BertForSequenceClassification,
        lambda: BertForMaskedLM(tiny("bert").config),
        "query",
        ["bert.pooler", "classifier"],
    ),
}


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    return batch("bert") if kind == "bert" else {"pixel_values": torch.randn(PIXELS)}


@pytest.mark.grid(keep=3)
@pytest.mark.filterwarnings("ignore")  # transformers' of new weights
@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", HEADS)
def test_what_the_loader_reports_as_new_trains_and_is_saved(kind: str, task_type: str | None, tmp_path: Path) -> None:
    cls, make, target, heads = HEADS[kind]
    (model, new), inputs = _loaded(cls, _body(make), tmp_path / "base"), _inputs(kind)
    assert new
    config = LoraConfig(r=2, target_modules=[target], task_type=task_type)
    inject(model, config, initialised=new)
    assert config.modules_to_save == heads
    _train(model, inputs)
    save_adapter(model, config, tmp_path / "adapter")
    again, new = _loaded(cls, _body(make), tmp_path / "base")
    assert not torch.equal(_logits(again, inputs), _logits(model, inputs))
    load_adapter(again, config_from_dict(read_config(tmp_path / "adapter")), tmp_path / "adapter", initialised=new)
    torch.testing.assert_close(_logits(again, inputs), _logits(model, inputs), rtol=1e-5, atol=1e-6)
    base, _ = _loaded(cls, _body(make), tmp_path / "base")
    with silence():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(_logits(theirs, inputs), _logits(model, inputs))
    merge(model, config)
    torch.testing.assert_close(_logits(model, inputs), _logits(again, inputs))


@pytest.mark.filterwarnings("ignore")
def test_a_new_head_that_the_adapter_lacks_is_refused(tmp_path: Path) -> None:
    model, new = _loaded(ViTForImageClassification, _body(lambda: _vit(ViTModel)), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    inject(model, config)
    save_adapter(model, config, tmp_path / "adapter")
    again, new = _loaded(ViTForImageClassification, _body(lambda: _vit(ViTModel)), tmp_path / "base")
    read = config_from_dict(read_config(tmp_path / "adapter"))
    with pytest.raises(
        AdapterError, match=r"modules_to_save: the adapter was saved without classifier, .* stay random"
    ):
        load_adapter(again, read, tmp_path / "adapter", initialised=new)


def test_the_modules_are_the_smallest_that_hold_what_is_new() -> None:
    model = tiny("bert")
    for new, expected in (
        (["classifier.bias"], ["classifier"]),
        (["bert.encoder.layer.1.output.LayerNorm.weight", "a.buffer"], ["bert.encoder.layer.1.output.LayerNorm"]),
        ([name for name, _ in model.named_parameters() if ".layer.1." in name], ["bert.encoder.layer.1"]),
    ):
        config = LoraConfig(r=2, target_modules=["layer.0.attention.self.query"])
        inject(copy.deepcopy(model), config, initialised=new)
        assert config.modules_to_save == expected
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    inject(model, config, initialised=["classifier.weight", "classifier.bias"])
    assert config.modules_to_save == ["classifier"]


def test_a_new_parameter_beside_old_modules_is_refused(tmp_path: Path) -> None:
    model = _body(lambda: _vit(ViTForImageClassification))
    with pytest.raises(AdapterError, match=r"vit.embeddings.cls_token is not in the base model's checkpoint"):
        inject(model, LoraConfig(r=2, target_modules=["query"]), initialised=["vit.embeddings.cls_token"])


def _train(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int = 3) -> None:
    """A few steps in training mode, on other inputs of the same kind."""
    set_trainable(model, True)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        seen = {name: 2 * value + 1 if value.is_floating_point() else value for name, value in inputs.items()}
        model(**seen).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


CONVNETS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "resnet": (_resnet, ["layer.0.convolution"]),
    "efficientnet": (_efficientnet, ["squeeze_excite.reduce", "top_conv"]),
}


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("kind", CONVNETS)
def test_training_moves_no_buffer_that_the_adapter_does_not_hold(kind: str, bias: Any, tmp_path: Path) -> None:
    make, targets = CONVNETS[kind]
    model, inputs = _body(make), {"pixel_values": torch.randn(PIXELS)}
    before = {name: value.clone() for name, value in model.named_buffers()}
    plain = model(**inputs).logits
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"], bias=bias)
    inject(model, config)
    _train(model, inputs)
    assert any(".running_mean" in name for name in before)
    assert all(torch.equal(value, before[name.replace("base_layer.", "")]) for name, value in model.named_buffers())
    save_adapter(model, config, tmp_path)
    again = _body(make)
    load_adapter(again, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(plain, model(**inputs).logits)
    with disabled(model):
        assert torch.equal(model(**inputs).logits, plain)


def test_norms_use_their_statistics_until_their_weights_train() -> None:
    model = _body(_resnet)
    inject(model, LoraConfig(r=2, target_modules=["layer.0.convolution"]))
    norm, twin = (each.train().resnet.embedder.embedder.normalization for each in (model, copy.deepcopy(model)))
    x = torch.randn(2, 8, 4, 4)
    for each in (norm, twin):
        mean = each.running_mean.clone()
        each(x)
        assert torch.equal(each.running_mean, mean)
    norm.train().requires_grad_(True)
    norm(x)
    assert not torch.equal(norm.running_mean, mean)


class _Net(nn.Module):
    """A body, and a head with running statistics that is called by keyword and read."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        self.lm_head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.body(x)).sum(-1) + F.linear(self.body(x), self.lm_head.weight).sum(-1)


def _net() -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return _Net()


def _trained_net() -> tuple[Any, LoraConfig, torch.Tensor]:
    torch.manual_seed(0)
    model, config = _net(), LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "lm_head"])
    inject(model, config)
    set_trainable(model, True)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.01)
    x = torch.randn(6, 4)
    for _ in range(3):
        model.train()(2 * x + 1).square().mean().backward()
        optimizer.step()
    return model.eval(), config, x


def test_the_buffers_of_a_saved_module_are_saved(tmp_path: Path) -> None:
    model, config, x = _trained_net()
    save_adapter(model, config, tmp_path / "ours")
    names = {f"base_model.model.head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert names < adapter_state(model).keys()
    again = _net().eval()
    load_adapter(again, config_from_dict(read_config(tmp_path / "ours")), tmp_path / "ours")
    assert torch.equal(again(x), model(x))
    with silence():
        theirs = peft.PeftModel.from_pretrained(_net(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs.get_submodule("base_model.model.head")(x), model.head(x))
    saved_by_peft(theirs, tmp_path / "theirs")
    back = _net().eval()
    load_adapter(back, config_from_dict(read_config(tmp_path / "theirs")), tmp_path / "theirs")
    assert torch.equal(back(x), model(x))
    other = _net().eval()
    inject(other, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "lm_head"]))
    load_training_state(other, training_state(model))
    assert torch.equal(other(x), model(x))
    expected = model(x)
    with disabled(model):
        assert torch.equal(model(x), _net().eval()(x))
    merge(model, config)
    torch.testing.assert_close(model(x), expected)


def test_the_statistics_of_a_head_that_trains_are_those_of_its_data() -> None:
    """Also of a norm without weights; those of the body stay, until no adapter is left."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False)), nn.ReLU())
    body, head = model[1], model[2]
    head.append(nn.Linear(4, 2))
    inject(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    model.train()(torch.randn(8, 4) + 3)
    assert not body.running_mean.any()
    assert not head[0].running_mean.any()
    assert model[2].copy[0].running_mean.any()
    set_trainable(model, False)
    before = model[2].copy[0].running_mean.clone()
    model.train()(torch.randn(8, 4) + 9)
    assert torch.equal(model[2].copy[0].running_mean, before)
    unload(model)
    model.train()(torch.randn(8, 4) + 3)
    assert body.running_mean.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_statistics_of_a_head_are_float32_over_a_bfloat16_base(autocast: bool) -> None:
    model = _net().bfloat16()
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.train()(torch.randn(8, 4).bfloat16()).sum().backward()
    assert model.head.copy[0].running_mean.dtype == torch.float32
    merge(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    assert model.head[0].running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("lib", [peft, peftcli], ids=["peft", "peftcli"])
def test_modules_that_peft_finds_by_an_ending_are_read(lib: Any, tmp_path: Path) -> None:
    """PEFT looks at no dots: "norm" is also the end of "post_attention_layernorm"."""
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    with silence():
        model.save_pretrained(tmp_path)
    expected = logits(model.eval(), batch("llama"))
    again = peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(again, batch("llama")), expected)


def test_an_ending_of_what_is_adapted_is_not_saved_by_it(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.proj = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.q_proj(x))

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["proj"])
    inject(model := Both(), config)
    save_adapter(model, config, tmp_path)
    load_adapter(Both(), config_from_dict(read_config(tmp_path)), tmp_path)


def test_a_file_of_which_a_target_is_not_there_is_read(tmp_path: Path) -> None:
    """PEFT writes its own default targets and any modules_to_save, whether the model has them or not."""
    targets, saved = ["q_proj", "of_another_model"], ["lm_head", "wte"]
    with silence():
        config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
        model = peft.get_peft_model(tiny("llama"), config)
        model.save_pretrained(tmp_path)
    again = peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits(again, batch("llama")), logits(model.eval(), batch("llama")))
    with pytest.raises(AdapterError, match="of_another_model"):
        peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2, target_modules=targets))


def test_a_file_without_the_buffers_is_read_with_a_warning(tmp_path: Path) -> None:
    model, config, _ = _trained_net()
    tensors = {name: value for name, value in adapter_state(model).items() if "running" not in name}
    tensors = {name: value for name, value in tensors.items() if "tracked" not in name}
    write_adapter(tensors, config, tmp_path)
    again = _net().eval()
    with pytest.warns(UserWarning, match=r"saved without base_model.model.head.0.running_mean"):
        load_adapter(again, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(again.head.copy[1].weight, model.head.copy[1].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_that_a_loss_reads_is_the_trained_one(dtype: torch.dtype) -> None:
    model = tiny("llama").to(dtype)
    base = model.lm_head.weight
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    set_trainable(model, True)
    own = model.lm_head.copy.weight
    hidden = model.model(ids(2, 6)).last_hidden_state
    F.linear(hidden, model.lm_head.weight).square().mean().backward()
    assert own.grad is not None
    assert base.grad is None
    assert model.lm_head.weight.dtype == dtype
    with torch.no_grad():
        own.add_(1)
    torch.testing.assert_close(model.lm_head(hidden), F.linear(hidden, model.lm_head.weight), rtol=0.05, atol=0.05)
    with disabled(model):
        assert model.lm_head.weight is base
    assert model.lm_head.in_features == 32


def test_a_saved_module_takes_and_returns_parts_in_the_base_models_dtype() -> None:
    class Sum(nn.Linear):
        def forward(self, parts: list[torch.Tensor], *, scale: torch.Tensor) -> BaseModelOutput:  # type: ignore[override]
            return BaseModelOutput(super().forward(parts[0] + parts[1]) * scale, (parts[0],))

    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": Sum(4, 3)}).to(torch.bfloat16)
    inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    y = model["head"]([x, x], scale=x[:, :1])
    assert type(y) is BaseModelOutput
    assert y.last_hidden_state.dtype == y["hidden_states"][0].dtype == torch.bfloat16
    assert y.attentions is None


def test_the_figures_of_a_merged_tied_head_stay() -> None:
    model, config = tiny("llama_tied"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    inject(model, config)
    with torch.no_grad():
        model.lm_head.copy.weight.add_(0.1)
    expected = logits(model, labelled("llama"))
    assert merge(model, config)
    torch.testing.assert_close(logits(model, labelled("llama")), expected)


@pytest.mark.parametrize("container", [nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"0": nn.Linear(4, 4)})])
def test_a_container_is_refused_and_the_modules_in_it_train(container: nn.Module) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "heads": container})
    kind = type(container).__name__
    with pytest.raises(TypeError, match=f"modules_to_save cannot be applied to modules of type {kind}; name"):
        inject(model, LoraConfig(target_modules=["body"], modules_to_save=["heads"], r=2))
    inject(model, LoraConfig(target_modules=["body"], modules_to_save=["heads.0"], r=2))
    head = model.get_submodule("heads.0")
    assert torch.equal(head(input=torch.ones(1, 4)), head(torch.ones(1, 4)))


def test_a_module_without_weights_is_refused_and_left_out_of_a_file_of_pefts(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["act_fn", "norm"]}
    with pytest.raises(AdapterError, match=r"modules_to_save: .*act_fn has nothing to train"):
        inject(tiny("llama"), LoraConfig(**settings))
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**settings))
    with silence():
        model.save_pretrained(tmp_path)
    again = peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert torch.equal(logits(again, batch("llama")), logits(model.eval(), batch("llama")))
