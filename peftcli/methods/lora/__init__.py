"""LoRA: Low-Rank Adaptation of Large Language Models (https://arxiv.org/abs/2106.09685).

``layers.wrap`` is the door, and lora.py is plain LoRA on every kind of layer; fused.py and joined.py compute the same
in less time. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from peftcli.core.config import BOOKKEEPING, UNSUPPORTED, AdapterConfig, ExcludingConfig, LayeredConfig
from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems, problems_of_sections
from peftcli.methods.lora.initialisations import (
    FAST_PISSA,
    ON_EVERY_LAYER,
    SECTIONS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    Name,
    is_residual,
)
from peftcli.methods.lora.variants import (
    VARIANTS,
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

_MAX_LAYERS = 500
_PAST_CALLS = ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices")
"""Fields that let layers read weights past the calls of their modules, beside those that switch a variant on."""


@dataclass
class LoraRuntimeConfig:
    """PEFT's settings of how LoRA runs. They change no result and are not saved."""

    ephemeral_gpu_offload: bool = False
    """Changes nothing here: what DoRA needs of an offloaded weight is computed where the weight is."""


@dataclass(kw_only=True)
class LoraConfig(ExcludingConfig, LayeredConfig):
    """Settings of LoRA, under PEFT's names."""

    peft_type = "LORA"
    always_written: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias")
    penalty_in_loss: ClassVar[bool] = False
    adapts_attention: ClassVar[bool] = True

    r: int = field(default=8, metadata=AT_LEAST_1)
    """Size of the bottleneck. Parameters and memory grow linearly with it."""
    lora_alpha: float = field(default=8, metadata=ABOVE_0)
    """Strength of the update: it is multiplied by lora_alpha / r."""
    lora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead, which keeps large r stable (https://arxiv.org/abs/2312.03732)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model train too: none, all, or those of the adapted layers."""
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata=AT_LEAST_1)
    """Other values of r for some layers: name ending or regular expression -> r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=ABOVE_0)
    """Other values of lora_alpha for some layers: name ending or regular expression -> lora_alpha."""
    use_dora: bool = False
    """Train the magnitude of each output's weights apart from their direction (DoRA, https://arxiv.org/abs/2402.09353):
    better at a small r, but slower, since each step computes the norm of the adapted weight."""
    lora_bias: bool = False
    """Give B a bias. For adapters that were extracted from a fully fine-tuned model."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids with embeddings that train in full besides LoRA: a list for the input embedding, or a mapping of module
    names to lists. A head that shares the embedding's weight follows it."""
    target_parameters: list[str] | None = None
    """Names or name endings of parameters to adapt that are not the weight of a layer, such as the fused weights of
    experts: mlp.experts.gate_up_proj. If target_modules is unset, nothing else is adapted."""
    layer_replication: list[list[int]] | None = None
    """Build a deeper model from the base model's layers, each copy with its own LoRA: [[0, 4], [2, 5]] gives the layers
    0 1 2 3 2 3 4. The base weights are shared."""
    ensure_weight_tying: bool = False
    """Let a head that shares its weight with the input embedding share the embedding's adapter too."""
    alora_invocation_tokens: list[int] | str | None = None
    """Token ids, or a text, that turn the adapter on (aLoRA, https://arxiv.org/abs/2504.12397), such as the start of an
    answer. The adapter is on from their last occurrence in a row. Before it, only the base model computes, so its cache
    can be used. The file has the ids. Rows without them train nothing."""
    use_bdlora: BdLoraConfig | None = None
    """Block-diagonal A or B (BD-LoRA, https://arxiv.org/abs/2510.23346), for servers that split layers over devices."""
    use_qalora: bool = False
    """Let A read averages of inputs (QA-LoRA, https://arxiv.org/abs/2309.14717), on a base model of GPTQ or AWQ."""
    qalora_group_size: int = field(default=16, metadata=AT_LEAST_1)
    """Inputs that use_qalora averages."""
    arrow_config: ArrowConfig | None = field(default=None, metadata={"recipe": False})
    """The router of ``create_arrow_model`` (Arrow, https://arxiv.org/abs/2405.11157)."""
    kasa_config: KasaConfig | None = None
    """Replace the weakest directions of the base weight (KaSA, https://arxiv.org/abs/2412.06071)."""
    monteclora_config: MontecloraConfig | None = None
    """Train on random samples around A (MonteCLoRA, https://arxiv.org/abs/2411.04358), which guards against
    overfitting."""
    velora_config: VeloraConfig | None = None
    """Train A from compressed inputs, which saves memory (VeLoRA, https://arxiv.org/abs/2405.17991)."""
    init_lora_weights: bool | Name | str = True
    """How A and B start. true: A Kaiming uniform, B zero. gaussian: A normal with deviation 1/r, B zero. orthogonal:
    both random, their product zero. pissa, olora: the strongest directions of the base weight, which learns faster;
    pissa_niter_16: an approximation that takes seconds. mica: B the weakest directions of the base weight, frozen, and
    A zero. eva, corda, lora_ga: from the training data, before the first step. loftq: the error of a quantised base.
    false: both random, for tests. The base model never changes, and the file is a plain LoRA, of 2r for pissa, olora,
    corda and lora_ga; not with a loftq_config, and mica keeps its name."""
    eva_config: EvaConfig | None = None
    """Settings of init_lora_weights: eva (https://arxiv.org/abs/2410.07170)."""
    corda_config: CordaConfig | None = None
    """Settings of init_lora_weights: corda (https://arxiv.org/abs/2406.05223)."""
    lora_ga_config: LoraGAConfig | None = None
    """Settings of init_lora_weights: lora_ga (https://arxiv.org/abs/2407.05000)."""
    loftq_config: LoftQConfig | None = None
    """For init_lora_weights: loftq (https://arxiv.org/abs/2310.08659) over a base model that is not quantised: the
    adapted layers compute with rounded weights. The adapter belongs to these, and its readers must round the base
    model's weights again. Leave it out if base_model.quantization is set."""
    fan_in_fan_out: bool = field(default=False, metadata={"recipe": False})
    """Whether the adapted weights are stored (in, out), as GPT-2's are. Found from the layer itself."""
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata={**BOOKKEEPING, "file": False}
    )
    """PEFT's settings that are not saved."""
    subtracts_start: bool = field(default=False, metadata={**BOOKKEEPING, "file": False}, repr=False, compare=False)
    """Whether layers in a model subtract what they started from, so that the adapter's file is one of twice the r."""
    megatron_config: Any = field(default=None, metadata=UNSUPPORTED)
    """Not supported: layers of Megatron."""
    megatron_core: str | None = field(default="megatron.core", metadata=UNSUPPORTED)
    """Not supported: layers of Megatron."""

    @property
    def learning_rate(self) -> float:
        """Less for a LoRA that starts with an effect of its own: its first steps are large already."""
        return 2e-4 if is_residual(self.init_lora_weights) else 5e-4

    @property
    def variant_key(self) -> str | None:
        """The field that switches a variant of LoRA on, or None."""
        return next((key for key in VARIANTS if getattr(self, key)), None)

    def normalise(self) -> None:
        if isinstance(self.target_parameters, str):
            raise AdapterTypeError("must be a list of names", key="target_parameters")
        init = str(self.init_lora_weights).lower()
        self.init_lora_weights = init if init in get_args(Name) else self.init_lora_weights  # OLoRA, as PEFT takes it
        self.loftq_config = self.loftq_config or None  # PEFT writes {}
        if self.inference_mode:  # in PEFT's files, none and a model as it is; they may be trained on, and saved
            self.trainable_token_indices = self.trainable_token_indices or None
            self.layer_replication = self.layer_replication or None
        super().normalise()

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.target_parameters:  # enough to adapt
            found = [problem for problem in found if problem != ("target_modules", "names no module")]
        found += _own_problems(self) + _init_problems(self) + _variant_problems(self)
        return found + problems_of_sections(self)

    def prepare(self, load_tokenizer: Callable[..., Any]) -> None:
        if isinstance(text := self.alora_invocation_tokens, str):
            self.alora_invocation_tokens = load_tokenizer(None)(text, add_special_tokens=False)["input_ids"]

    def packing_problem(self) -> str | None:
        return "finds alora_invocation_tokens only once per row" if self.alora_invocation_tokens else None

    def reads_batches(self) -> bool:
        return self.velora_config is not None and self.velora_config.init_type != "random"

    def reads_past_calls(self) -> bool:
        more = any(getattr(self, name) for name in (*VARIANTS, *_PAST_CALLS))
        return more or self.bias != "none" or is_residual(self.init_lora_weights)

    def merge_problem(self) -> str | None:
        if self.arrow_config:
            return "Cannot merge an active Arrow router adapter: each token has weights of its own"
        if self.alora_invocation_tokens:
            return "aLoRA cannot be merged: the tokens before the invocation need the base weights"
        return None

    def usual_targets(self, model_type: str) -> list[str] | str:
        return [] if self.target_parameters else super().usual_targets(model_type)

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: str | None = None, **options: Any) -> AdapterConfig:
        if values.get("arrow_config"):
            reason = "is not supported in a file: a router has no weights, and create_arrow_model makes it"
            raise AdapterError(reason, key="arrow_config", file=file)
        init = values.get("init_lora_weights")  # PEFT writes the settings of other initialisations too
        others = {section for name, section in SECTIONS.items() if name != init}
        corda = values.get("corda_config") if init == "corda" and file else None
        for key in ("cache_file", "covariance_file"):
            if isinstance(corda, dict) and corda.get(key):
                raise AdapterError("is not supported in an adapter's file", key=f"corda_config.{key}", file=file)
        return super().from_dict({key: value for key, value in values.items() if key not in others}, file, **options)

    def file_dict(self) -> dict[str, Any]:
        plain = self.plain()
        # who trains a mica adapter on leaves B alone
        init = "mica" if self.init_lora_weights == "mica" else plain.init_lora_weights
        return {**super(LoraConfig, plain).file_dict(), "init_lora_weights": init}

    def plain(self) -> LoraConfig:
        """Return the plain LoRA that computes the same: with a residual initialisation, one of twice the r.

        With a ``loftq_config`` there is none, whatever ``init_lora_weights`` is by now.
        """
        if self.loftq_config:
            return replace(self, init_lora_weights="loftq")
        nothing: Any = dict.fromkeys(SECTIONS.values())
        same = replace(self, init_lora_weights=True, subtracts_start=False, **nothing)
        return same.doubled() if self.subtracts_start or is_residual(self.init_lora_weights) else same

    def as_saved(self) -> LoraConfig:
        return self.plain() if self.subtracts_start else self

    def doubled(self) -> LoraConfig:
        """Return the config of twice the r and the same strength."""
        more = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            r=2 * self.r,
            lora_alpha=more * self.lora_alpha,
            rank_pattern={name: 2 * r for name, r in self.rank_pattern.items()},
            alpha_pattern={name: more * alpha for name, alpha in self.alpha_pattern.items()},
        )


def _own_problems(config: LoraConfig) -> Problems:
    """Return the problems of all settings but ``init_lora_weights`` and the variant's: ``(key, message)`` each."""
    found = _conflicts(config)
    if (wanted := config.trainable_token_indices) is not None:
        lists = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
        wrong = [f"token ids count from 0, not {token}" for tokens in lists for token in tokens if token < 0]
        found += [("trainable_token_indices", message) for message in (wrong if any(lists) else ["names no token"])]
    if config.alora_invocation_tokens in ([], "") and not config.inference_mode:  # in PEFT's files, a plain LoRA
        found.append(("alora_invocation_tokens", "names no token"))
    if (ranges := config.layer_replication) is not None:
        wrong = [
            f"each range is [first layer, last layer + 1], not {pair}"
            for pair in ranges
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]
        ]
        if not wrong and sum(end - start for start, end in ranges) > _MAX_LAYERS:
            wrong = [f"makes more than {_MAX_LAYERS} layers, the most that is accepted"]
        found += [("layer_replication", message) for message in (wrong if ranges else ["names no layer"])]
    return found


def _conflicts(config: LoraConfig) -> Problems:
    """Return settings that exclude each other."""
    found: Problems = []
    if config.lora_bias and config.use_dora:
        found.append(("lora_bias", "does not go with use_dora"))
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        found.append(("lora_bias", "needs init_lora_weights: true or false"))
    if config.use_dora and config.init_lora_weights == "mica":
        found.append(("use_dora", "does not go with init_lora_weights: mica"))
    if config.use_dora and config.ensure_weight_tying:
        found.append(("use_dora", "does not go with ensure_weight_tying: an embedding's lengths are not its head's"))
    for key in ("lora_dropout", "use_dora", "lora_bias"):
        if config.target_parameters and getattr(config, key):
            found.append((key, "does not go with target_parameters: their modules multiply by themselves"))
    return found


def _init_problems(config: LoraConfig) -> Problems:
    """Return what does not go with ``init_lora_weights``."""
    init, names = config.init_lora_weights, get_args(Name)
    found: Problems = []
    if not isinstance(init, bool) and init not in names and not FAST_PISSA.fullmatch(init):
        return [("init_lora_weights", f"{init!r} is not supported; true, false, {', '.join(names)}")]
    for name, section in SECTIONS.items():
        if init != name and getattr(config, section) is not None:
            found.append((section, f"means nothing without init_lora_weights: {name}"))
    if init == "orthogonal" and any(r % 2 for r in (config.r, *config.rank_pattern.values())):
        found.append(("r", "must be even for init_lora_weights: orthogonal"))
    if config.target_parameters and init not in ON_EVERY_LAYER:
        found.append(("target_parameters", f"does not go with init_lora_weights: {init}"))
    if config.use_dora and init == "loftq":
        found.append(("use_dora", "does not go with init_lora_weights: loftq"))
    return found


def _variant_problems(config: LoraConfig) -> Problems:
    """Return what does not go with the config's variant."""
    on = [key for key in (*VARIANTS, "use_dora") if getattr(config, key)]
    if not on or on == ["use_dora"]:
        return []
    key, init = on[0], config.init_lora_weights
    if len(on) > 1:
        return [(key, f"does not go with {on[1]}: a layer has one variant")]
    found: Problems = []
    if is_residual(init) or init == "mica":
        found.append((key, f"does not go with init_lora_weights: {init}"))
    if config.target_parameters:
        found.append((key, "does not go with target_parameters: it adapts linear layers"))
    if key in ("use_bdlora", "use_qalora"):  # whose A or B has another shape
        if not isinstance(init, bool) and not config.inference_mode:
            found.append((key, f"needs init_lora_weights: true or false, not {init}"))
        if config.lora_bias:
            found.append((key, "does not go with lora_bias"))
    if key == "alora_invocation_tokens":
        ids = config.alora_invocation_tokens if isinstance(config.alora_invocation_tokens, list) else []
        found += [(key, f"token ids count from 0, not {token}") for token in ids if token < 0]
        if config.task_type not in (None, "CAUSAL_LM"):
            found.append((key, f"needs a causal language model, not {config.task_type}"))
        if config.bias != "none":
            found.append((key, "does not go with bias: that changes the tokens before the invocation too"))
    return found
