"""Which modules a config names."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_tiny import KINDS, tiny
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
)
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

from peftcli.core.config import READ_PAST_CALLS
from peftcli.core.inject import inject
from peftcli.core.linear import check_forward
from peftcli.core.targets import (
    as_pattern,
    find_targets,
    module_matches,
    pattern_value,
    shortest_names,
    targets,
)
from peftcli.errors import AdapterError, NoMatchingPeftModuleError, PeftWarning
from peftcli.guard import patterns
from peftcli.methods import METHODS
from peftcli.methods.frod import FrodConfig
from peftcli.methods.ia3 import IA3Config
from peftcli.methods.loha import LoHaConfig
from peftcli.methods.lora import LoraConfig
from peftcli.methods.oft import OFTConfig
from peftcli.methods.osf import OSFConfig
from peftcli.methods.trainable_tokens import TrainableTokensConfig
from peftcli.methods.vera import VeraConfig


def _found(kind: str, **settings: object) -> list[str]:
    return find_targets(tiny(kind), LoraConfig(**settings))  # type: ignore[arg-type]


def test_a_name_ends_at_a_dot() -> None:
    assert module_matches("model.layers.0.q_proj", "q_proj")
    assert module_matches("q_proj", "q_proj")
    assert module_matches("model.layers.0.q_proj", "0.q_proj")
    assert not module_matches("model.layers.0.xq_proj", "q_proj")
    assert not module_matches("model.layers.10.q_proj", "0.q_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_leaves_the_head_and_the_embeddings(kind: str) -> None:
    found = _found(kind, target_modules="all-linear")
    assert not any(name.split(".")[-1] in ("lm_head", "classifier", "wte", "embed_tokens", "shared") for name in found)
    assert len(found) >= 8


def test_a_family_outside_the_table_gets_every_linear_layer() -> None:
    model = tiny("llama")
    model.config.model_type = "brand_new"
    assert find_targets(model, LoraConfig()) == _found("llama", target_modules="all-linear")


def test_usual_modules_are_found_under_their_new_names() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = find_targets(ViTModel(ViTConfig(**sizes)), FrodConfig())
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "v_proj"}, "PEFT's query and value"


def test_the_order_is_the_models() -> None:
    assert _found("llama", target_modules=["v_proj", "q_proj"]) == _found("llama", target_modules=["q_proj", "v_proj"])
    assert [name.split(".")[2] for name in _found("llama", target_modules=["q_proj"])] == ["0", "1"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": 1}, ["1"]),
        ({"layers_to_transform": [0, 1]}, ["0", "1"]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, ["1"]),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, ["0"]),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "model.layers"]}, ["0"]),
        ({"layers_to_transform": [1], "layers_pattern": [*map(str, range(50_000)), "layers"]}, ["1"]),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, ["1"]),
        ({"exclude_modules": r".*\.1\..*"}, ["0"]),
    ],
)
def test_layers_and_exclusions(settings: dict[str, object], expected: list[str]) -> None:
    assert [name.split(".")[2] for name in _found("llama", target_modules=["q_proj"], **settings)] == expected


def test_all_linear_keeps_to_the_layers_too() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "layers": layers})
    config = LoraConfig(target_modules="all-linear", layers_to_transform=[0, 2])
    assert find_targets(model, config) == ["layers.0.up", "layers.2.up"]


def test_a_module_that_is_named_in_full_is_adapted_in_any_layer() -> None:
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    assert _found("llama", target_modules=[first, "v_proj"], layers_to_transform=[1]) == [first, second]


@pytest.mark.parametrize(
    ("lists", "layer"),
    [
        ([], 3),
        (["experts"], 7),
        (["experts", "layers"], 7),
        (["layers", "experts"], 3),
        (["3.experts"], 7),
        ([r"\d+\.experts"], 7),
        (["(layers|h)", "experts"], 3),
        (["expert", "ayers"], None),
    ],
)
def test_which_number_is_the_layers(lists: list[str], layer: int | None) -> None:
    model: nn.Module = nn.Linear(4, 4)
    for name in reversed(["layers", "3", "experts", "7", "up"]):
        model = nn.ModuleDict({name: model})
    for index in (3, 7):
        config = LoraConfig(target_modules=["up"], layers_to_transform=[index], layers_pattern=lists)
        if index == layer:
            assert find_targets(model, config) == ["layers.3.experts.7.up"]
        else:
            with pytest.raises(AdapterError, match=f"no target module in layer {index}"):
                find_targets(model, config)


def test_lists_of_layers_are_written_in_their_order() -> None:
    config = LoraConfig(target_modules=["v", "q"], layers_to_transform=[0], layers_pattern=["layers", "blocks"])
    written = config.file_dict()
    assert written["layers_pattern"] == ["layers", "blocks"], "the first that a name has counts"
    assert written["target_modules"] == ["q", "v"]


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_an_embedding_that_the_model_never_calls_is_refused(key: str) -> None:
    settings: dict[str, Any] = {"target_modules": ["q"], key: ["shared"]}
    with pytest.raises(AdapterError, match=r"never calls shared, .*\n.*encoder\.embed_tokens "):
        inject(tiny("t5"), LoraConfig(**settings))
    inject(tiny("t5"), LoraConfig(ensure_weight_tying=True, **settings))
    with pytest.warns(PeftWarning, match="never calls shared, so that an adapter there does nothing"):
        inject(tiny("t5"), LoraConfig(inference_mode=True, **settings))


_MAMBA = MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)
_WAVLM = WavLMConfig(
    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=[8, 8],
    conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
_HEARS = {"projection", "gru_rel_pos_linear", "intermediate_dense", "output_dense"}


class _Heard(nn.Module):
    """A model with another one in it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out_proj = WavLMModel(_WAVLM), nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("make", "kept", "named", "left_out"),
    [
        (lambda: MambaForCausalLM(_MAMBA), {"in_proj", "x_proj"}, "out_proj", "dt_proj, out_proj"),
        (lambda: WavLMForCTC(_WAVLM), _HEARS, "q_proj", "k_proj, kernel, out_proj, q_proj, v_proj"),
        (_Heard, {*_HEARS, "out_proj"}, "v_proj", "k_proj, kernel, out_proj, q_proj, v_proj"),
    ],
    ids=["mamba", "wavlm", "wavlm in another model"],
)
def test_what_a_model_reads_without_calling_it_is_left_out_or_refused(
    make: Callable[[], nn.Module], kept: set[str], named: str, left_out: str
) -> None:
    model = make()
    found = find_targets(model, LoraConfig(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in found} == kept
    message = rf"reads the weight of [\w.]+\.{named} without calling it.*\n.*leave out .*{left_out}"
    with pytest.raises(AdapterError, match=message):
        find_targets(model, LoraConfig(target_modules=[*kept, named]))
    loaded = LoraConfig(target_modules=[named], inference_mode=True)  # of a run that did call it
    assert find_targets(model, loaded)


def test_a_gate_that_the_method_cannot_adapt_is_left_out_unless_it_is_named() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"up": nn.Linear(8, 16), "shared_expert_gate": nn.Linear(8, 1)})

    assert list(inject(model(), OSFConfig()).layers) == ["up"]
    assert list(inject(model(), LoraConfig(target_modules="all-linear")).layers) == ["up", "shared_expert_gate"]
    with pytest.raises(AdapterError, match="0 of the 1 directions of shared_expert_gate"):
        inject(model(), OSFConfig(target_modules=["up", "shared_expert_gate"]))
    with pytest.raises(AdapterError, match="20 of the 8 directions of up"):  # the settings are wrong, not the layer
        inject(model(), OSFConfig(effective_rank=20))


@pytest.mark.parametrize("kind", [LoHaConfig, IA3Config, OFTConfig])
def test_the_output_projection_of_an_attention_is_left_out_of_methods_that_need_its_calls(kind: Any) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "out_proj": nn.Linear(32, 32)})

    assert list(inject(model(), LoraConfig(target_modules=["out_proj"])).layers) == ["attention.out_proj", "out_proj"]
    assert list(inject(model(), kind(target_modules="all-linear")).layers) == ["out_proj"]
    message = r"MultiheadAttention reads the weight of attention\.out_proj without calling it.*\n.*choose lora"
    with pytest.raises(AdapterError, match=message):
        inject(model(), kind(target_modules=["out_proj"]))


_KIN = """bailing_hybrid bamba glm5_next granitemoehybrid inkling inkling2 inkling2_loop kimi_linear lara_mini lfm2
lfm2_moe lfm3 longcat_flash olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next qwen4_exp recurrent_gemma zamba zamba2"""
_READ = re.compile(r"self\.(conv|conv1d|conv_1d|dt_proj|out_proj|classifier)\.weight\b")


def test_what_transformers_reads_without_calling_it_is_left_out() -> None:
    models, seen = Path(transformers.__file__).parent / "models", 0
    for kind in _KIN.split():
        code = models / kind / f"modeling_{kind}.py"
        if code.exists():  # older versions lack some
            read = _READ.findall(code.read_text(encoding="utf-8"))
            row = READ_PAST_CALLS.get(kind) or READ_PAST_CALLS[f"{kind}_text"]
            assert set(read) <= set(row), kind
            seen += len(read)
    assert seen


def test_a_linear_layer_of_a_class_of_its_own_is_adapted_where_it_gives_one_output() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).topk(1)

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-2, (-1, 2)) @ self.weight.view(2, -1, x.shape[-1]).mT

    model = nn.ModuleDict({"router": Router(4, 4), "grouped": Grouped(4, 4), "plain": FalconLinear(4, 4)})
    assert find_targets(model, LoraConfig(target_modules="all-linear")) == ["plain"]
    for name, kind in (("router", "Router"), ("grouped", "Grouped")):
        for config in (LoraConfig(target_modules=[name]), LoHaConfig(target_modules=[name])):
            with pytest.raises(AdapterError, match=f"{name} is a {kind}, "):
                inject(model, config)
    inject(model, LoraConfig(target_modules=["plain"], target_parameters=["router.weight"]))


class _Own(nn.Linear):
    """Computes the same as Linear, after ``before`` and before ``after``."""

    def __init__(self, before: Any = None, after: Any = None, size: int = 4) -> None:
        super().__init__(size, 6)
        self.before, self.after, self.branch = before, after, nn.Linear(size, 6, bias=False)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(self.before(x) if self.before else x)
        return self.after(self, x, y) if self.after else y


class _Rounded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.bfloat16(), self.bias.bfloat16()
        return nn.functional.linear(x.bfloat16(), weight, bias).to(x.dtype)


class _Ids(nn.Embedding):
    """Looks up ``ids + shift``."""

    shift = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids.long() + self.shift)


class _Shifted(_Ids):
    shift = 1


class _EndsPicture(nn.Embedding):  # as T5Gemma2's
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.end = nn.Parameter(torch.ones(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids[..., None] == 5, self.end, super().forward(ids))


class _Same(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous())


def _divided() -> Any:
    layer: Any = FalconLinear(4, 6)
    layer.weight.ds_shape = layer.weight.shape  # as DeepSpeed has it
    layer.weight.data = torch.empty(0)
    return layer


SAME: dict[str, Callable[[], nn.Module]] = {
    "shaped": lambda: _Own(after=lambda layer, x, y: y.view(*x.shape[:-1], layer.out_features)),
    "a branch that is not called": _Own,
    "rounded": lambda: _Rounded(4, 6),
    "few rows": lambda: _Ids(2, 4),
    "divided": _divided,
    "without values": lambda: FalconLinear(4, 6, device="meta"),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(6, 4, 0, 3.0),
    "scaled as BART's": lambda: BartScaledWordEmbedding(6, 4, 0, 3.0),
    "convolution": lambda: _Same(4, 4, 3),
    "groups": lambda: EfficientNetDepthwiseConv2d(8),
}
OTHER: dict[str, Callable[[], nn.Module]] = {
    "no bias": lambda: _Own(after=lambda layer, x, y: y - layer.bias, size=4096),
    "a branch": lambda: _Own(after=lambda layer, x, y: y + layer.branch(x)),
    "scale": lambda: _Own(after=lambda layer, x, y: y * 2),
    "shifted": lambda: _Shifted(6, 4),
    "decoupled": lambda: IdeficsDecoupledEmbedding(6, 1, 4),
    "end of a picture": _EndsPicture,
    "standardised": lambda: WeightStandardizedConv2d(4, 4, 3),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_a_layer_of_a_class_of_its_own_is_adapted_where_it_computes_the_same(make: Callable[[], nn.Module]) -> None:
    check_forward(make(), "own")


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_a_layer_that_computes_otherwise_is_refused(make: Callable[[], nn.Module]) -> None:
    own = make()
    configs: list[Any] = [LoraConfig(target_modules=["own"])]
    if isinstance(own, nn.Conv2d):
        configs += [kind(target_modules=["own"]) for kind in (LoHaConfig, IA3Config, OFTConfig)]
    elif isinstance(own, nn.Embedding):
        configs += [TrainableTokensConfig(token_indices=[1], target_modules=["own"])]
        configs += [LoraConfig(target_modules=["q_proj"], trainable_token_indices={"own": [1]})]
    for config in configs:
        with pytest.raises(AdapterError, match=f"own is a {type(own).__name__}, which computes otherwise"):
            inject(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "own": own}), config)


@pytest.mark.parametrize("values", [{"proj": 8, "body.proj": 16}, {"proj": 16, "body.proj": 8}, {"a.x": 8, "b.x": 8}])
def test_a_pattern_gives_each_module_its_value_though_one_name_ends_another(values: dict[str, float]) -> None:
    pattern = as_pattern(values, 8)
    assert {name: pattern_value(pattern, name, 8) for name in values} == values
    assert bool(pattern) == (set(values.values()) != {8})


def test_where_nothing_is_linear_the_error_names_what_the_method_adapts() -> None:
    def resnet() -> nn.Module:
        return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))

    with pytest.raises(NoMatchingPeftModuleError) as caught:
        inject(resnet(), LoraConfig())
    assert caught.value.hint == "name other layers, as in [convolution]"
    with pytest.raises(NoMatchingPeftModuleError, match=r"as in \[0, 1, 2, 3, 4, 5\], or 2 more"):
        inject(nn.Sequential(*(nn.Conv1d(2, 2, 1) for _ in range(8))), LoraConfig(target_modules="all-linear"))
    inject(resnet(), LoraConfig(target_modules=["convolution"]))
    with pytest.raises(NoMatchingPeftModuleError, match=r"no linear layer of .*\nchoose another method"):
        inject(resnet(), VeraConfig())
    with pytest.raises(NoMatchingPeftModuleError, match=r"as in \[convolution\]"):
        inject(resnet(), IA3Config(target_modules=["convolution"], feedforward_modules="all-linear"))


def test_a_file_may_exclude_or_set_what_the_model_lacks() -> None:
    """PEFT trains with such settings; the tensors say what was adapted."""
    settings: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "exclude_modules": ["v_porj"],
        "rank_pattern": {"k_porj": 4},
    }
    with pytest.raises(AdapterError, match="v_porj"):
        targets(tiny("llama"), LoraConfig(**settings))
    with pytest.warns(PeftWarning, match="excludes none"):
        found = targets(tiny("llama"), LoraConfig(**settings, inference_mode=True))
    assert found == _found("llama", target_modules=["q_proj"])


def test_a_typo_in_any_methods_pattern_is_an_error() -> None:
    found = []
    for method in METHODS.values():
        for entry in dataclasses.fields(method.config_class()):
            if entry.name.endswith("_pattern") and entry.default_factory is dict and entry.metadata.get("recipe", True):
                config = method.config_class()(target_modules=["q_proj"], **{entry.name: {"q_porj": 4}})
                with pytest.raises(AdapterError, match="matches 'q_porj'; closest: q_proj") as caught:
                    targets(tiny("llama"), config)
                assert caught.value.key == entry.name
                found.append(method.name)
    assert {"lora", "c3a", "delora", "fourierft", "osf", "waveft"} <= {*found}


def test_where_no_module_has_a_name_the_error_gives_none() -> None:
    with pytest.raises(AdapterError, match=r"rank_pattern: no adapted module matches 'x'$"):
        inject(nn.Linear(4, 4), LoraConfig(target_modules="all-linear", rank_pattern={"x": 2}))


def test_a_pattern_that_takes_too_long_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.05)
    slow = r"(?:(?:(?:.?){15}){15}){15}_"
    with pytest.raises(AdapterError, match=r"^'.*' takes too long to match"):
        targets(tiny("llama"), LoraConfig(alpha_pattern={slow: 4}))


def test_the_shortest_names_name_these_and_no_others() -> None:
    model = tiny("llama")
    every = _found("llama", target_modules=["q_proj"])
    assert shortest_names(model, every) == ["q_proj"]
    assert shortest_names(model, every[:1]) == ["0.self_attn.q_proj"]
    mixed = _found("llama", target_modules=["0.mlp.up_proj", "q_proj"])
    assert shortest_names(model, mixed) == ["0.mlp.up_proj", "q_proj"]
    t5 = tiny("t5")
    for names in (["encoder.block.0.layer.0.SelfAttention.q"], _found("t5", target_modules="all-linear")):
        chosen = shortest_names(t5, names)
        assert find_targets(t5, LoraConfig(target_modules=chosen)) == names


def test_the_weights_of_experts_are_named() -> None:
    """They are parameters of three dimensions, which neither all-linear nor a name of a layer adapts."""

    def mixtral() -> nn.Module:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        return MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=4, **sizes))

    there = ["experts.gate_up_proj", "experts.down_proj"]
    with pytest.warns(PeftWarning, match=r"target_parameters: \['experts.gate_up_proj', 'experts.down_proj'\]"):
        few = inject(mixtral(), LoraConfig(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_of_it = inject(mixtral(), LoraConfig(target_modules="all-linear", target_parameters=there))
    assert all_of_it.trainable > 5 * few.trainable
    for entry, other in (("w1", "there are: act_fn"), ("gate_proj", "closest: ")):
        with pytest.raises(NoMatchingPeftModuleError, match=f"matches '{entry}'; {other}") as caught:
            inject(mixtral(), LoraConfig(target_modules=["q_proj", entry]))
        assert caught.value.hint == f"the weights of experts are no layers here: target_parameters: {there}"
