"""What a run would fail by is found before it: ``examine`` and the run say the same."""

from __future__ import annotations

import json
import shutil
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainkit
import transformers
from classifierkit import classifier_base
from safetensors.torch import load_file
from taskkit import CASES

from peftcli.cli.app import main
from peftcli.errors import ModelError, PeftcliError, PeftWarning, StorageError
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.tasks import open_task
from peftcli.tasks.text.language_model import refuse_later_tokens
from peftcli.train.examine import examine
from peftcli.train.preview import preview


def says_so(recipe: Path, *settings: str) -> str:
    """What the check says, whose first error the run has too."""
    errors = examine(load_recipe(recipe, list(settings))).errors
    with pytest.raises(PeftcliError) as caught:
        trainkit.run_recipe(recipe, *settings)
    assert caught.value.message in errors[0].message
    return str(errors[0])


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize("name", CASES)
def test_a_task_knows_the_names_of_its_metrics(name: str, tmp_path: Path) -> None:
    task = {**CASES[name].task, **CASES[name].found}
    recipe = load_recipe(CASES[name].write(tmp_path), [f"task={json.dumps(task)}"])
    reports = open_task(recipe, open_base(recipe.base_model)).reports
    for metric in CASES[name].metrics:
        assert any(fnmatchcase(metric, known) for known in reports), metric
    assert not any(fnmatchcase("other", known) for known in reports)


@pytest.mark.parametrize(
    ("name", "settings", "there", "not_there"),
    [
        ("sequence_classification", "problem_type: regression", "mse", "accuracy"),
        ("sequence_classification", "problem_type: multi_label", "auc", "matthews"),
        ("sequence_classification", "labels: [a, b]", "auc", "top5_accuracy"),
        ("sequence_classification", "labels: [a, b, c]", "matthews", "auc"),
        ("sequence_classification", "labels: [a, b, c, d, e, f]", "top5_accuracy", "auc"),
        ("token_classification", "scheme: none", "macro_f1", "f1"),
        ("token_classification", "labels: [O, B-LOC, I-LOC], scheme: iob2", "f1_LOC", "f1_PER"),
        ("feature_extraction", "loss: cosine", "spearman", "mrr"),
        ("preference", "loss: kto", "kl", "nll"),
        ("preference", "loss: orpo", "nll", "kl_chosen"),
        ("preference", "loss: simpo", "loss", "kl_chosen"),
    ],
)
def test_the_names_are_those_of_the_settings(
    name: str, settings: str, there: str, not_there: str, tmp_path: Path
) -> None:
    recipe = load_recipe(CASES[name].write(tmp_path), [f"task={{type: {name}, {settings}}}"])
    reports = open_task(recipe, open_base(recipe.base_model)).reports
    assert there in reports
    assert not_there not in reports


@pytest.mark.parametrize(
    "settings",
    [
        ("training.metric_for_best_model=wer",),
        ("gates={eval_wer: <= 1}",),
        ("training.load_best_model_at_end=true", "training.metric_for_best_model=wer", "training.save_strategy=epoch"),
    ],
)
def test_a_metric_that_no_evaluation_reports_is_refused(settings: tuple[str, ...], recipe: Path) -> None:
    assert "evaluation reports eval_loss, eval_perplexity, eval_token_accuracy, not eval_wer" in says_so(
        recipe, "training.eval_strategy=epoch", *settings
    )
    assert not (recipe.parent / "out/metrics.jsonl").exists()


def test_a_schedule_without_room_is_found_before_the_first_step(recipe: Path) -> None:
    said = says_so(recipe, "method={type: adalora, tinit: 200, tfinal: 100}", "training.max_steps=10")
    assert "tinit + tfinal leave no step of 10" in said


def test_rows_that_are_longer_than_the_model_are_refused(recipe: Path) -> None:
    trainkit.write_rows(recipe.parent / "train.jsonl", [{"text": "word " * 400}] * 4)
    said = says_so(recipe, "dataset.max_length=4000", "dataset.eval=null")
    assert "dataset.max_length: the longest example has" in said
    assert "dataset.overlong" in said


def test_an_encoder_is_no_language_model(recipe: Path, tmp_path: Path) -> None:
    base = tmp_path / "encoder"
    shutil.copytree(classifier_base("bert"), base)
    transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(base)).save_pretrained(base)
    trainkit.write_rows(recipe.parent / "train.jsonl", [{"text": "some words"}] * 4)
    said = says_so(recipe, f"base_model={base}", "dataset.eval=null")
    assert "base_model: bert is an encoder" in said
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    others: dict[str, transformers.PreTrainedConfig] = {
        "bert-generation is an encoder": transformers.BertGenerationConfig(vocab_size=300, **small),
        "says causal: true in its config": transformers.XLMConfig(vocab_size=300, emb_dim=16, n_layers=1, n_heads=2),
        "xlnet is an encoder": transformers.XLNetConfig(vocab_size=300, d_model=16, n_layer=1, n_head=2, d_inner=16),
    }
    for expected, config in others.items():
        config.save_pretrained(base)
        (error, *_) = examine(load_recipe(recipe, [f"base_model={base}", "dataset.eval=null"])).errors
        assert expected in str(error)


def test_a_model_of_sounds_in_a_prompt_is_no_encoder_decoder(tmp_path: Path) -> None:
    base = shutil.copytree(trainkit.base_folder("t5"), tmp_path / "base")
    transformers.VoxtralConfig().save_pretrained(base)
    assert "is not an encoder-decoder" in says_so(CASES["seq2seq_lm"].write(tmp_path), f"base_model={base}")


@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_a_model_that_sees_the_tokens_that_it_would_predict_is_not_trained(task: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = transformers.Gemma3TextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        use_bidirectional_attention=True,
    )
    transformers.Gemma3ForCausalLM(config).save_pretrained(base)
    trainkit.tokenizer().save_pretrained(base)
    with pytest.raises(ModelError, match="base_model: Gemma3ForCausalLM sees the tokens that it would have to predict"):
        trainkit.run_recipe(CASES[task].write(tmp_path), f"base_model={base}")


def test_the_probe_of_later_tokens_runs_without_a_cache_as_training_does() -> None:
    config = transformers.xLSTMConfig(vocab_size=300, hidden_size=32, num_heads=2, num_hidden_layers=2)
    model = transformers.xLSTMForCausalLM(config)  # whose cache, made anew, has not the shape of its heads
    refuse_later_tokens(model, {"input_ids": torch.randint(300, (2, 8))})


def test_weights_that_transformers_looks_for_elsewhere_are_named(tmp_path: Path) -> None:
    recipe = CASES["question_answering"].write(tmp_path)
    assert "transformers looks for transformer in a LlamaForQuestionAnswering" in says_so(
        recipe, f"base_model={trainkit.base_folder()}"
    )


def test_a_pooler_that_the_base_model_lacks_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(classifier_base("bert"), tmp_path / "base")
    transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(base)).save_pretrained(base)
    recipe, settings = CASES["sequence_classification"].write(tmp_path), [f"base_model={base}"]
    assert main(["check", "--deep", str(recipe), *settings]) == 0
    assert "training in full: classifier, bert.pooler\n" in capsys.readouterr().out
    would = preview(load_recipe(recipe, settings))
    done = trainkit.run_recipe(recipe, *settings, "training.max_steps=1").run
    assert would["parameters"] == {name: done["parameters"][name] for name in ("trainable", "all")}
    assert would["training_in_full"] == ["classifier", "bert.pooler"]


def test_a_token_that_pads_cannot_end_the_texts_of_an_encoder_decoder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trainkit.base_folder("t5"), base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": settings["eos_token"]}))
    recipe = CASES["sequence_classification"].write(tmp_path)
    assert "with which its tokenizer pads too" in says_so(recipe, f"base_model={base}")


def test_a_method_that_loraplus_says_nothing_about_is_named(recipe: Path) -> None:
    said = says_so(recipe, "method={type: ia3}", "training.loraplus_lr_ratio=4")
    assert "training.loraplus_lr_ratio: LoRA+ needs layers with A and B" in said


@pytest.mark.parametrize(("strategy", "odd"), [("steps", True), ("epoch", False)])
def test_evaluations_without_data_are_named(recipe: Path, strategy: str, odd: bool) -> None:
    settings = ["dataset.eval=null", f"training.eval_strategy={strategy}"]
    found = examine(load_recipe(recipe, settings)).would["warnings"]
    assert any("there is no evaluation data" in text for text in found) is odd


def test_a_row_is_named_with_its_column_and_what_to_do(recipe: Path) -> None:
    trainkit.write_rows(recipe.parent / "train.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
    (found, *_) = examine(load_recipe(recipe, ["dataset.eval=null"])).errors
    assert "train.jsonl:2: completion: missing" in found.message
    trainkit.write_rows(recipe.parent / "train.jsonl", [{"data": "a"}, {"data": 1}])
    columns = ["dataset.eval=null", "dataset.columns={text: data}", "dataset.format=text"]
    (found, *_) = examine(load_recipe(recipe, columns)).errors
    assert "train.jsonl:2: data: expected text" in found.message
    trainkit.write_rows(recipe.parent / "train.jsonl", [{"other": "a"}])
    (found, *_) = examine(load_recipe(recipe, ["dataset.eval=null"])).errors
    assert "In the recipe: dataset: {format: " in found.message


def test_noise_on_tokens_is_refused_where_there_are_none(tmp_path: Path) -> None:
    said = says_so(CASES["image_classification"].write(tmp_path), "training.neftune_noise_alpha=5")
    assert "there is no embedding of tokens in the model" in said


@pytest.mark.parametrize(("steps", "longer"), [(3, False), (4, True)])
def test_a_warmup_as_long_as_the_run_is_named(steps: int, longer: bool, recipe: Path) -> None:
    settings = ["training.max_steps=4", f"training.warmup_steps={steps}"]
    told = f"the warm-up takes {steps} steps and the run has 4: it ends below training.learning_rate"
    found = examine(load_recipe(recipe, settings)).would["warnings"]
    assert [text for text in found if "warm-up" in text] == [told] * longer
    assert (told in trainkit.run_recipe(recipe, *settings).warnings) is longer


def test_a_disk_without_room_for_the_checkpoints_is_found_before_the_model_is_loaded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("training.save_strategy=steps", "training.save_steps=1", f"training.output_dir={tmp_path}/run")
    assert main(["train", str(recipe), "--dry-run", "--json", *settings]) == 0
    disk = json.loads(capsys.readouterr().out)["disk"]
    checkpoints = sorted((trainkit.run_recipe(recipe, *settings).folder / "checkpoints").iterdir())
    files = [load_file(checkpoints[0] / name) for name in ("adapter_model.safetensors", "optimizer.safetensors")]
    assert disk["checkpoint"] == pytest.approx(sum(each.nbytes for file in files for each in file.values()), rel=0.01)
    assert disk["checkpoints"] == len(checkpoints) + 1
    shutil.rmtree(tmp_path / "run")
    for lacks in (1, 0):
        free = SimpleNamespace(free=disk["peak"] - lacks, total=1 << 30)
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: free)
        assert main(["train", str(recipe), "--dry-run", *settings]) == lacks * StorageError.exit_code
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0, total=1 << 30))
    monkeypatch.delattr("peftcli.train.setup.adapted_model")
    trainkit.reset_accelerate()
    with pytest.raises(StorageError, match=r"a run needs 0\.\d MB there, and 0\.0 MB are free"):
        trainkit.run_recipe(recipe, *settings)


def test_layers_that_peft_takes_for_experts_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": 300, "head_dim": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2}
    config = transformers.Glm4MoeConfig(**sizes, **counts, num_experts_per_tok=1, first_k_dense_replace=1)
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    trainkit.tokenizer().save_pretrained(tmp_path / "base")
    recipe = trainkit.write_recipe(tmp_path, tmp_path / "base")
    told = r"PEFT, .* 6 .* glm4_moe, .* model\.layers\.0\.mlp\.gate_proj; .*\[down_proj, gate_proj, up_proj\]"
    with pytest.warns(PeftWarning, match=told):
        assert not examine(load_recipe(recipe)).errors
    with pytest.warns(PeftWarning, match=told):
        trainkit.run_recipe(recipe, "training.max_steps=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        names = "exclude_modules: [down_proj, gate_proj, up_proj], target_parameters: [experts.down_proj]"
        method = f"method={{type: lora, target_modules: all-linear, {names}}}"
        assert not examine(load_recipe(recipe, [method])).errors
