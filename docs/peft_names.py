"""docs/peft.md: every public name of PEFT, and what became of it here. ``docs/generate.py`` writes the page.

``tests/docs/test_peft_names.py`` compares the lists with the installed PEFT, and with ``peftcli.peft_api``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

VERSION = "0.21"
"""The version of PEFT whose names these are."""

PUBLIC: dict[str, str] = {
    "peft": """
        AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig
        AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
        AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
        AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig
        C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig
        DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel
        GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig
        LNTuningConfig LNTuningModel LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig
        LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig
        MissModel MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit
        NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel PEFT_TYPE_TO_CONFIG_MAPPING
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel PeftConfig
        PeftError PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction
        PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
        PeftModelForTokenClassification PeftType PeftWarning PolyConfig PolyModel PrefixEncoder
        PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig PromptEncoderReparameterizationType
        PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig PveraModel
        RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel
        SupertuningConfig SupertuningModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType
        TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel
        VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig
        XLoraModel bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters
        convert_to_lora create_arrow_model find_kappa_target_modules get_base_model_state_dict
        get_eva_state_dict get_layer_status get_model_status get_peft_config get_peft_model
        get_peft_model_state_dict initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
        initialize_lora_eva_weights inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training
        preprocess_loraga prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora
        set_base_model_state_dict set_peft_model_state_dict shift_tokens_right
    """,
    "peft.helpers": """
        DoraCaching KappaTuneSelector MontecloraTrainerMixin check_if_peft_model disable_input_dtype_casting
        rescale_adapter_scale update_forward_signature update_generate_signature update_signature
    """,
    "peft.optimizers": """
        create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer
    """,
    "peft.functional": """
        cast_adapter_dtype delete_adapter set_adapter set_requires_grad
    """,
    "peft.utils": """
        ALLOWED_COMPUTE_DTYPES AuxiliaryTrainingWrapper CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND
        ModulesToSaveWrapper SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_ADAMSS_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_BOFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_DEFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_FROD_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_GRALORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_OFT_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_POLY_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_PSOFT_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_PVERA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_ROAD_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_SUPERTUNING_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_TINYLORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_UNILORA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
        TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING TrainableTokensWrapper UPCAST_DTYPES WEIGHTS_NAME
        get_gptqmodel_quant_linear get_quantization_config get_quantization_kwargs id_tensor_storage
        infer_device map_cache_to_layer_device_map quantization_extra_repr register_peft_method
        resolve_quantization_backend set_additional_trainable_modules transpose
    """,
    "peft.utils.hotswap": """
        check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict
        prepare_model_for_compiled_hotswap
    """,
    "peft.utils.merge_utils": """
        calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning
        magnitude_prune prune random_pruning reshape_weight_task_tensors task_arithmetic ties
    """,
    "peft.utils.loftq_utils": """
        loftq_init
    """,
    "peft.utils.other": """
        EMBEDDING_LAYER_NAMES fsdp_auto_wrap_policy starcoder_model_postprocess_past_key_value
    """,
    "peft.utils.integrations": """
        TpInfo check_deepspeed_zero3_enabled dequantize_bnb_weight dequantize_module_weight
        dtensor_from_local_like gather_params_ctx get_bnb_param_type get_layer_device_map init_empty_weights
        skip_init_on_device
    """,
    "peft.tuners": """
        MixedModel MultitaskPromptEmbedding
    """,
    "peft.tuners.lora": """
        Conv2d Conv3d Embedding GPTQLoraLinear Linear LoraLayer ParamWrapper
    """,
    "peft.tuners.tuners_utils": """
        BasePromptEncoder BaseTuner BaseTunerLayer check_adapters_to_merge check_target_module_exists
        clone_module find_parameter_name_by_module get_device_map inspect_matched_modules onload_layer
        replicate_layers
    """,
    "peft.config": """
        PeftConfigMixin
    """,
    "peft.peft_model": """
        TunerLayerStatus TunerModelStatus
    """,
    "peft.tuners.lora.corda": """
        CordaEigens calib_cov_distribution collect_eigens collect_eigens_for_layer crop_corda_eigens
        get_model_device preprocess_corda target_modules
    """,
    "peft.tuners.lora.loraga": """
        estimate_gradients get_target_modules
    """,
    "peft.tuners.lora.intruders": """
        reduce_intruder_dimension
    """,
    "peft.tuners.osf.utils": """
        decompose_weight_matrix project_gradient_to_orthogonal_space
    """,
}
"""Module -> what it offers: its ``__all__``, or what is defined in it. A name stands in the first that has it."""

INTRODUCTION = """\
# PEFT's names

`import peftcli.peft_api as peft` is the other import. This page has every public name of PEFT {version}, {total} of
them: what PEFT exports, what its reference documents, and what the modules that scripts import from define. A name is
where it is in PEFT: `peft.utils.hotswap.hotswap_adapter` is `peftcli.peft_api.utils.hotswap.hotswap_adapter`.
[Python](python.md) shows how they are used, and [what differs](python.md#what-differs-from-peft) in results.

What is inside PEFT's layers is PEFT's own. A layer here adapts one module by one adapter, and its weights are called
what the file calls them: `layer.lora_A.weight`, and not `layer.lora_A["default"].weight`. Several adapters are
several layers, one around the other.
"""

DIFFERS: dict[str, str] = {
    "PeftModel.state_dict": "the adapter's weights and what else trains, so that what Trainer and Accelerate save is "
    "small; `base_model.state_dict()` has everything",
    "checkpoints of Trainer": "`Trainer` goes on from those that it made with the same library: here it reads the "
    "adapter from `model.safetensors`, with PEFT from `adapter_model.safetensors`",
    "modules_to_save": "a name or the end of one after a dot; PEFT takes any ending, so that its `norm` is "
    "`post_attention_layernorm` too. In files of PEFT such modules are found, and names that PEFT would take for more "
    "are written in full. PEFT cannot read a part of the head that it adds by itself, as `classifier.dense`, nor "
    "can it read its own file of one",
    "ensure_weight_tying": "ties all modules that share the embedding's weight; PEFT ties none unless one that is "
    "named is called `embed_tokens` or `lm_head`. A file names all that are tied; one of PEFT that has tensors of one "
    "of them changes that alone",
    "`TrainableTokensConfig` on layers that share a weight": "all that share it have the rows, whichever is named, and "
    "the file names the input embedding; PEFT ties them to that alone. A file of PEFT's without rows of the input "
    "embedding, as for T5's `embed_tokens`, is read as it was trained",
    "target_modules='all-linear'": "every linear layer but the output head, `classifier` and `score` too, and "
    "layers of one output, as `shared_expert_gate`, that the method cannot adapt; where a "
    "model holds the weights of experts in parameters, a warning names them for `target_parameters`, which PEFT adapts "
    "by itself in Mixtral and Qwen-MoE; names that layers of experts had, as `w1`, are an error that names them too",
    "LoRA on dense layers or shared experts of a model with experts": "is read as it was trained; in Qwen3-Next, "
    "DeepSeek-V3, GLM-4-MoE, Laguna and others PEFT converts the names of these layers as those of older checkpoints "
    "and loads nothing there. `check --deep`, `train` and `save_pretrained` warn; `exclude_modules` leaves them out",
    "a new adapter": "is in the mode of its base model: call `model.train()`. PEFT's is in training mode, whatever the "
    "base model's is",
    "a loaded adapter with `is_trainable=True`": "puts the whole model into training mode, where AdaLoRA's penalty and "
    "dropout count; PEFT's leaves the base model in the mode that it is in",
    "the layers of other methods than LoRA, LoHa and LoKr": "have no class of PEFT's name, such as `IA3Layer`; "
    "`BaseTunerLayer` is the class of all of them",
    "a frozen BatchNorm": "keeps its running statistics in training too, unless it trains or is in a head that does",
    "many adapters": "each is a layer around the one before: some 200 on one module, and `set_adapter` takes longer "
    "than in PEFT",
    "init_lora_weights='lora_ga'": "scales as the paper has them; PEFT multiplies B by the gradient's singular "
    "values, and leaves A unscaled with `stable` and `weight_svd`",
    "the order of active adapters": "that in which they were added, whatever the order in `set_adapter`, which PEFT "
    "follows: it matters for BOFT, HRA, OFT, RoAd, and DoRA on embeddings",
    "BOFT with `boft_n_butterfly_factor` above 1": "trains and writes all factors; PEFT without its CUDA extension "
    "has one, and cannot read the file",
    "two MiSS adapters with `init_weights: bat` active together": "each adds to the base model's weight; PEFT's second "
    "adds to what the first has made",
    "several OFT adapters active together": "are applied in the order in which merging folds them in; PEFT's forward "
    "pass has another order than its merging",
    "PeftModel.add_weighted_adapter": "the exact weighted sum, where PEFT's default is not; `combination_type` "
    "selects the approximations, of one adapter too, where PEFT always takes `linear`",
    "autocast_adapter_dtype": "True, as usual, also keeps copies of `modules_to_save` and LN tuning's weights in "
    "float32; PEFT's stay in the base model's half precision",
    "PeftModel.disable_adapter": "adapters that were merged are merged again afterwards, and frozen ones stay frozen; "
    "PEFT leaves them unmerged, and lets the active ones train. `enable_adapters` of a layer leaves gradients as they "
    "are too; PEFT's switches them with the adapter",
    "PeftModel.merge_and_unload": "a name in `adapter_names` that no adapter has is an error; the `modules_to_save` of "
    "all the named adapters are merged, and in PEFT those of the active ones",
    "PeftModel.unload": "gives the base model exactly; PEFT's keeps the trained copies of `modules_to_save`",
    "PeftModel.delete_adapter": "of the active adapter makes one other active on all layers; PEFT's on each layer the "
    "first that is left there, so that parts of several may be",
    "`PeftModel.get_nb_trainable_parameters`, `print_trainable_parameters`": "count fixed tensors that PEFT has in "
    "buffers, or in a changed base weight, among all parameters: the projections of AdaMSS, FRoD, PSOFT, PVeRA, "
    "RandLoRA, TinyLoRA and VeRA, and the start that PiSSA, OLoRA, CorDA, LoRA-GA and KaSA subtract",
    "PeftModel.get_prompt": "gives the vectors of virtual tokens; of a prefix, where PEFT's gives a cache, it is an "
    "error: `get_prompt_embedding_to_save` has its keys and values",
    "PeftModel.load_adapter": "its `missing_keys` and `unexpected_keys` are empty: a file that does not fit is "
    "an error",
    "PeftMixedModel": "can be saved and has a status: each model here takes adapters of several methods",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "all methods, for the same reason",
    "DoraCaching": "a context: inside, the norms that DoRA divides by are computed once",
    "`preprocess_corda`, `preprocess_loraga`": "`cache_file` is in safetensors; PEFT's is a pickle, which is not read",
    "`initialize_lora_eva_weights`, `get_eva_state_dict`": "padding and labels are found in what the model is given, "
    "so there is no `prepare_model_inputs_fn` nor `prepare_layer_inputs_fn`; inputs of several processes are not "
    "gathered",
    "set_peft_model_state_dict": "tensors that are missing, unexpected, of another shape or not finite are one "
    "error, and nothing is changed",
    "WEIGHTS_NAME": "the name of the pickle, for scripts that look for it; it is neither read nor written",
}
"""Name -> what is not as in PEFT, and why."""

_INSIDES = "inside PEFT's layers, which are not those here"
_PARTS = "a part of the ways to combine tensors, which are here"
_COLLECTED = "a part of `preprocess_corda`, which is here"
_ENGINES = "sharded models are the engines' own: accelerate's and PyTorch's"
_NO_CACHE_LAYOUT = "for cache layouts that no version of transformers has that peftcli runs with"

ABSENT: dict[str, str] = {
    "Shadow*": "the method is not here: it trains a second model beside the base model, with a cache of its own",
    "PrefixEncoder": _INSIDES,
    "PromptEmbedding": _INSIDES,
    "PromptEncoder": _INSIDES,
    "MultitaskPromptEmbedding": _INSIDES,
    "CPTEmbedding": _INSIDES,
    "CartridgeEncoder": _INSIDES,
    "BasePromptEncoder": _INSIDES,
    "TrainableTokensWrapper": _INSIDES,
    "bloom_model_postprocess_past_key_value": _NO_CACHE_LAYOUT,
    "starcoder_model_postprocess_past_key_value": _NO_CACHE_LAYOUT,
    "TRANSFORMERS_MODELS_TO_*_TARGET_MODULES_MAPPING": "only LoRA's and (IA)^3's tables are names here: the other "
    "methods take LoRA's, but for the families in their rows of `methods/_families.py`; for one that no table has, all "
    "linear layers",
    "register_peft_method": "a method is a folder and a row here: see [add a method](add-a-method.md)",
    "EMBEDDING_LAYER_NAMES": "embeddings and heads are found by the model's own accessors, not by names",
    "ALLOWED_COMPUTE_DTYPES": _INSIDES,
    "UPCAST_DTYPES": _INSIDES,
    "get_gptqmodel_quant_linear": "kinds of quantised layers are told apart in `core/quantised.py`",
    "get_quantization_*": "kinds of quantised layers are told apart in `core/quantised.py`",
    "quantization_extra_repr": "kinds of quantised layers are told apart in `core/quantised.py`",
    "resolve_quantization_backend": "kinds of quantised layers are told apart in `core/quantised.py`",
    "id_tensor_storage": "a helper of PEFT's own writing of files",
    "map_cache_to_layer_device_map": "caches are placed by transformers",
    "set_additional_trainable_modules": _INSIDES,
    "transpose": _INSIDES,
    "magnitude_based_pruning": _PARTS,
    "random_pruning": _PARTS,
    "reshape_weight_task_tensors": _PARTS,
    "loftq_init": "a part of `replace_lora_weights_loftq`, which is here",
    "TpInfo": _ENGINES,
    "check_deepspeed_zero3_enabled": _ENGINES,
    "dtensor_from_local_like": _ENGINES,
    "gather_params_ctx": _ENGINES,
    "dequantize_*": "the core dequantises by itself: `core/quantised.py`",
    "get_bnb_param_type": "kinds of quantised layers are told apart in `core/quantised.py`",
    "get_layer_device_map": "caches are placed by transformers",
    "init_empty_weights": "`accelerate.init_empty_weights` is the function that PEFT wraps",
    "skip_init_on_device": _INSIDES,
    "MixedModel": "each model takes adapters of several methods",
    "GPTQLoraLinear": _INSIDES,
    "ParamWrapper": _INSIDES,
    "check_adapters_to_merge": _INSIDES,
    "check_target_module_exists": _INSIDES,
    "clone_module": _INSIDES,
    "find_parameter_name_by_module": _INSIDES,
    "get_device_map": _INSIDES,
    "inspect_matched_modules": "`model.targeted_module_names` says what was matched",
    "onload_layer": _INSIDES,
    "replicate_layers": "a part of the setting `layer_replication`, which is here",
    "CordaEigens": _COLLECTED,
    "calib_cov_distribution": _COLLECTED,
    "collect_eigens*": _COLLECTED,
    "crop_corda_eigens": _COLLECTED,
    "get_model_device": _COLLECTED,
    "target_modules": _COLLECTED,
    "estimate_gradients": "a part of `preprocess_loraga`, which is here",
    "get_target_modules": "a part of `preprocess_loraga`, which is here",
    "decompose_weight_matrix": _INSIDES,
    "project_gradient_to_orthogonal_space": _INSIDES,
}
"""Name, or pattern of names -> why it is not here."""

REFUSED: tuple[tuple[str, str], ...] = (
    ("`adapter_model.bin`, and `safe_serialization=False`", "a pickle can run code when it is read"),
    (
        "an entry of `target_modules`, `modules_to_save` or `layers_to_transform` that matches nothing, beside others "
        "that do",
        "a typo would train less than was asked for, in silence. In a file, whose tensors say what was trained, such "
        "entries of the first two are left out",
    ),
    ("a file that lacks a tensor, or has one too many", "the model would compute with weights that nobody trained"),
    (
        "a file with a LoRA for each expert, as of transformers 4, where the model has all experts in one parameter",
        "its tensors are not those of this model. PEFT converts Mixtral's and Qwen-MoE's: load it there, save it again",
    ),
    ("weights that are not finite, when they are written, loaded or merged", "every later result would be NaN"),
    ("a setting that the method does not know", "a typo would leave the default in place, in silence"),
    ("`exclude_modules` that matches nothing", "a typo would train what was to be left out"),
    (
        "`lora_alpha: 0`, `randlora_alpha: 0`, `delora_lambda: 0` with its `init_weights`, no token in "
        "`alora_invocation_tokens`, and an r that is far larger than the layer",
        "nothing would be learnt, or memory would be wasted",
    ),
    (
        "`add_adapter`, `load_adapter` and `add_weighted_adapter` while adapters are merged",
        "the new adapter would be put around weights that are changed; call `unmerge_adapter` first",
    ),
    (
        "prefix tuning where a layer keeps no keys and values, as in DeBERTa, or more than those, as in Bamba and "
        "DeepSeek-V3.2, or where layers are in two stacks, as in HRM-Text",
        "there is no place for a prefix: with PEFT it changes nothing, or the forward pass fails",
    ),
    (
        "virtual tokens with `guidance_scale`, or with images that `mm_token_type_ids` marks, as for Qwen2-VL",
        "the second prompt, or the positions of the images, would not count them",
    ),
    ("`bias` with `alora_invocation_tokens`", "a trained bias changes the tokens before the invocation too"),
    (
        "`inputs_embeds` alone with `alora_invocation_tokens`",
        "the invocation is not seen in embeddings; PEFT warns and leaves the adapter out",
    ),
    (
        "settings of an initialisation that is not chosen, such as `eva_config` without `init_lora_weights: eva`, and "
        "`density` for a combination that drops nothing",
        "they would do nothing, in silence; in a file they are left out",
    ),
    (
        "`use_dora` on a convolution with groups",
        "the update reads the channels of all groups, so there is no adapted weight to take the length of; PEFT takes "
        "that of other numbers",
    ),
    (
        "a linear layer, an embedding or a convolution whose class computes otherwise than torch's, as "
        "`OPTLearnedPositionalEmbedding`, the heads of Dory, the embeddings of Inkling, `WeightStandardizedConv2d` of "
        "BiT and the causal convolutions of audio models",
        "it changes its weight, its input or its output, so that an adapter there would be wrong, or could not be "
        "merged; PEFT's merged model answers otherwise than the one that was trained. A parameter in "
        "`target_parameters` may be of any class",
    ),
    (
        "`wavelet_family` of WaveFT, but for `db1` to `db10`, `sym2` and `sym3`",
        "the filters of the others are not here",
    ),
    (
        "`target_svd_config` of OSF, `rank_pattern` of HiRA",
        "PEFT's methods do not read them; of OSF `rank_pattern` is what works",
    ),
    (
        "two adapters of LN tuning on the same norm, active together",
        "one would replace the other; PEFT says so in the forward pass",
    ),
    (
        "`add_weighted_adapter` of adapters with `trainable_token_indices`, unless the weights add up to 1",
        "their rows replace the base model's, so only an average means something; PEFT leaves them out, in silence",
    ),
    (
        "`add_weighted_adapter` of DoRA adapters, or of some with a module in `modules_to_save` and some without",
        "lengths of weights and whole modules are no sums; PEFT gives the result others than those that were trained",
    ),
    (
        "a key of `rank_pattern` or `alpha_pattern` that matches no adapted module",
        "a typo would leave the default, in silence",
    ),
    (
        "`target_modules` that match something beside `target_parameters` that do not, or the other way round",
        "a typo would train less than was asked for; PEFT warns",
    ),
    (
        "new adapters on `shared` of T5, BART and their kin, without `ensure_weight_tying`",
        "encoder and decoder have embeddings of their own, `embed_tokens`, which share the weight: `shared` is never "
        "called, and an adapter there would change nothing. One in a file is loaded, with a warning",
    ),
    (
        "new adapters on `conv1d`, `out_proj` or `dt_proj` of Mamba's kin, such as Jamba, Bamba and Zamba 2, on the "
        "convolution of Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi Linear, LFM2 and their like, on the attention of WavLM, "
        "the router of LongCat-Flash, or the relative positions of LayoutLMv2 and LayoutLMv3",
        "the models read these weights without calling the layer, so most methods would change nothing",
    ),
    ("prefix tuning on a model that reads no token ids", "there is no place for virtual tokens"),
    (
        "prompt tuning and its kin on a model that looks token ids up in a second table, as DeepSeek-V4 does",
        "virtual tokens have no row there; PEFT's forward pass fails",
    ),
    (
        "`target_parameters` on what `torch.nn.utils.parametrize` computes",
        "there is no parameter of that name: name one of those that it is computed from",
    ),
    ("`megatron_config`", "Megatron-LM's layers are not known here"),
    (
        "LoRA's settings in AdaLoRA that its layers do not read, such as `use_rslora`",
        "they would do nothing, in silence",
    ),
    ("a part of an X-LoRA model that is called alone", "the mixture is computed in the whole model's forward pass"),
    ("biases in a state dict for an adapter without `bias`", "they would change the frozen base model"),
    ("`arrow_config` in an adapter's file", "a router has no weights; `create_arrow_model` makes it"),
    ("LoRA+ without A and B, LoRA-FA without LoRA on a linear layer", "there is nothing to speed up, or to freeze"),
    (
        "`get_peft_model` of a `PeftModel`",
        "it would be wrapped twice; PEFT warns. `add_adapter` and `unload` are there",
    ),
    (
        "an `nn.MultiheadAttention` and its `out_proj`, in one adapter or in two of a model",
        "the first adapts both; PEFT adds three deltas, and writes base weights into the file",
    ),
    (
        "`config._register_custom_module`, PEFT's experiment with LoRA layers of your own",
        "such a layer is written over PEFT's; here it is [a method](add-a-method.md)",
    ),
    ("an adapter name with `/`, or marks other than `-` and `_`", "its adapter is saved in a folder of that name"),
)
"""What PEFT accepts and peftcli refuses, and why."""


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern of ``ABSENT`` is about ``name``. The tables of LoRA and (IA)^3 are here."""
    return fnmatchcase(name, pattern) and not name.startswith(
        ("TRANSFORMERS_MODELS_TO_LORA", "TRANSFORMERS_MODELS_TO_IA3")
    )


def absent(name: str) -> str | None:
    """Return why PEFT's ``name`` is not here, or None where it is."""
    return next((why for pattern, why in ABSENT.items() if matches(name, pattern)), None)
