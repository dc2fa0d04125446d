"""What the tests of every task's runs share: a small recipe of each task, and what is known of its answers."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from classifierkit import ROWS, classifier_base, segformer_config, write_pictures, write_scene
from detectionkit import boxed_scenes, detector_base
from diffusionkit import picture_files, pipeline_base
from maskedkit import TEXTS, choice_rows, masked_base
from PIL import Image
from soundkit import hearing_base, tone_rows, whisper_base
from trainkit import MESSAGES, PAIRS, PROMPTS, base_folder, scratch, write_rows
from visionkit import llava_base, picture_rows


@dataclass(frozen=True)
class Case:
    """One task over one tiny base model."""

    base: Callable[[], Path]
    task: dict[str, Any]
    """The recipe's ``task``."""
    rows: Callable[[], Sequence[dict[str, Any]]]
    """Makes the training rows; every third is an evaluation row too."""
    found: dict[str, Any]
    """The settings that the rows complete."""
    metrics: frozenset[str]
    """Names of eval_ metrics, without the prefix."""
    recompute: Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], dict[str, float]]
    """From evaluation rows and their answers: metrics that must be those of ``evaluate``."""
    targets: str = "all-linear"
    asked: Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]] = list
    """From evaluation rows: those that ``predict`` gets."""
    has_head: bool = True
    """Whether the adapter holds a new head."""
    slow: bool = False
    """Whether ``make test`` leaves it out: other tests make its promises there."""
    splits: Callable[[], tuple[str, ...]] = tuple
    """Settings under which a batch may be split: a norm whose weights train takes its statistics of a micro-batch."""

    @property
    def held_out(self) -> Sequence[dict[str, Any]]:
        """The evaluation rows."""
        return self.rows()[::3]

    def write(self, folder: Path) -> Path:
        """A recipe beside its data: LoRA, float32, 6 steps."""
        train = write_rows(folder / "train.jsonl", self.rows())
        held_out = write_rows(folder / "eval.jsonl", self.held_out)
        path = folder / "recipe.yaml"
        path.write_text(
            f"""\
base_model: {self.base()}
task: {self.task}
method: {{type: lora, r: 4, lora_alpha: 8, target_modules: {self.targets}}}
dataset: {{train: {train}, eval: {held_out}}}
training:
  output_dir: {folder}/out
  max_steps: 6
  learning_rate: 1e-2
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 3
  bf16: false
  eval_strategy: "no"
  save_strategy: "no"
  logging_steps: 1
  verify: false
"""
        )
        return path


def _entities(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    wanted, found = [row["ner_tags"] for row in rows], [answer["tags"] for answer in answers]
    of_types = f1_score(wanted, found, average=None, zero_division=0)
    return {
        "precision": precision_score(wanted, found, zero_division=0),
        "recall": recall_score(wanted, found, zero_division=0),
        "f1": f1_score(wanted, found, zero_division=0),
        "accuracy": accuracy_score(wanted, found),
        **dict(zip(("f1_LOC", "f1_PER"), of_types, strict=True)),
    }


_SENTENCES = [
    {"tokens": [*name.split(), "saw", place], "ner_tags": [*["B-PER", "I-PER"][: len(name.split())], "O", "B-LOC"]}
    for name in ("Ada", "Ada Lovelace", "Grace Hopper", "Alan")
    for place in ("Turin", "Oslo", "Lima")
]


def _answered(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of rows that have one answer or none."""
    exact, f1 = [], []
    for row, answer in zip(rows, answers, strict=True):
        found, wanted = (
            Counter(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))
            for text in (answer["answer"], *(row["answers"]["text"] or [""]))
        )
        exact.append(found == wanted)
        f1.append(2 * (found & wanted).total() / (found + wanted).total() if found and wanted else found == wanted)
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


_QUESTIONS = [
    {
        "question": question,
        "context": f"{name} met {other} in {place}.",
        "answers": {"text": [text] if text else [], "answer_start": [len(name) + 5] if text else []},
    }
    for name in ("ada", "grace", "alan")
    for other, place in (("kurt", "turin"), ("emmy", "oslo"))
    for question, text in ((f"who met {name}?", other), ("who sang?", ""))
]


def _rewarded(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The rewards of answers as ``predict`` writes them."""
    texts = [each["text"] for each in answers]
    has_letter = np.array(["e" in text for text in texts])
    same = np.array([text.strip() == row["answer"].strip() for text, row in zip(texts, rows, strict=True)])
    return {"reward_contains": float(has_letter.mean()), "reward_exact_match": float(same.mean())}


def of_classes(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of rows that have one label each."""
    from sklearn import metrics

    labels = list(answers[0]["scores"])
    wanted, found = [str(row["label"]) for row in rows], [answer["label"] for answer in answers]
    scores = np.array([[answer["scores"][name] for name in labels] for answer in answers])
    more = {}
    if len(labels) == 2:
        more["auc"] = metrics.roc_auc_score([name == labels[1] for name in wanted], scores[:, 1])
    if len(labels) > 5:
        places = [labels.index(name) for name in wanted]
        more["top5_accuracy"] = metrics.top_k_accuracy_score(places, scores, k=5, labels=range(len(labels)))
    return {
        "accuracy": metrics.accuracy_score(wanted, found),
        "macro_f1": metrics.f1_score(wanted, found, average="macro", zero_division=0),
        "micro_f1": metrics.f1_score(wanted, found, average="micro"),
        "matthews": metrics.matthews_corrcoef(wanted, found),
        **more,
    }


@functools.cache
def _pictures() -> Sequence[dict[str, Any]]:
    files = sorted(write_pictures(scratch() / "pictures").rglob("*.png"))
    return [{"image": str(path), "label": path.parent.name} for path in files]


def _classes(kind: str) -> Case:
    """A classification task over a kind of base model."""
    texts = kind in ("bert", "llama")
    return Case(
        base=lambda: classifier_base(kind),
        task={"type": "sequence_classification" if texts else "image_classification"},
        rows=(lambda: ROWS) if texts else _pictures,
        found={"labels": ["good", "bad"] if texts else ["blue", "red"], "problem_type": "single_label"},
        metrics=frozenset({"loss", "accuracy", "macro_f1", "auc"}),
        recompute=of_classes,
        targets="[convolution]" if kind == "resnet" else "all-linear",
    )


def _separately(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each answer of a row as a conversation."""
    return [{"messages": row["prompt"] + row[name]} for row in rows for name in ("chosen", "rejected")]


def _ranked(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    rewards = [answer["reward"] for answer in answers]
    gaps = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    return {"reward_accuracy": sum(gap > 0 for gap in gaps) / len(rows), "reward_margin": sum(gaps) / len(rows)}


PREFERRED = [
    {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": f"no {other}"}],
    }
    for (question, answer), (_, other) in zip(PAIRS, [*PAIRS[1:], PAIRS[0]], strict=True)
]
"""Conversations, and two answers to each."""
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
    for row in PREFERRED[:8]
    for name in ("chosen", "rejected")
]


@functools.cache
def _with_a_head() -> Path:
    """A SegFormer that has a decode head for the scenes' classes: the head stays frozen, but for what a recipe says."""
    folder, base = scratch() / "segformer-with-a-head", classifier_base("segformer")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.SegformerForSemanticSegmentation(segformer_config(num_labels=3))
    model.save_pretrained(folder)
    shutil.copy(base / "preprocessor_config.json", folder)
    return folder


def _mean_iou(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    from sklearn import metrics

    wanted, found = (
        np.stack([np.asarray(Image.open(each[key])) for each in those]).ravel()
        for key, those in (("annotation", rows), ("mask", answers))
    )
    of_classes = metrics.jaccard_score(wanted, found, average=None)
    return {
        "mean_iou": metrics.jaccard_score(wanted, found, average="macro"),
        "mean_accuracy": metrics.balanced_accuracy_score(wanted, found),
        "overall_accuracy": metrics.accuracy_score(wanted, found),
        **{f"iou_{name}": share for name, share in zip(("floor", "red", "blue"), of_classes, strict=True)},
    }


def coco_map(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What pycocotools says of rows and their answers."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = sorted(
        {*(name for row in rows for name in row["objects"]["category"])}
        | {each["label"] for answer in answers for each in answer["objects"]}
    )
    wanted, marks, found = COCO(), list[dict[str, Any]](), list[dict[str, Any]]()
    for at, (row, answer) in enumerate(zip(rows, answers, strict=True), start=1):
        objects = row["objects"]
        crowd = objects.get("iscrowd", [0] * len(objects["bbox"]))
        for box, name, many in zip(objects["bbox"], objects["category"], crowd, strict=True):
            place = {"image_id": at, "category_id": names.index(name), "bbox": box, "area": box[2] * box[3]}
            marks.append({"id": len(marks) + 1, "iscrowd": many, **place})
        for each in answer["objects"]:
            place = {"image_id": at, "category_id": names.index(each["label"]), "bbox": each["box"]}
            found.append({**place, "score": each["score"]})
    wanted.dataset = {
        "info": {},
        "images": [{"id": at} for at in range(1, len(rows) + 1)],
        "annotations": marks,
        "categories": [{"id": at, "name": name} for at, name in enumerate(names)],
    }
    with contextlib.redirect_stdout(None):
        wanted.createIndex()
        judge = COCOeval(wanted, wanted.loadRes(found) if found else COCO(), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(("map", "map_50", "map_75"), judge.stats[:3].tolist(), strict=True))


def _words(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    import jiwer

    wanted, found = [row["text"] for row in rows], [answer["text"] for answer in answers]
    return {"wer": jiwer.wer(wanted, found), "cer": jiwer.cer(wanted, found)}


def _texts(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    wanted = [row["messages"][-1]["content"] if "messages" in row else row["completion"] for row in rows]
    found = [answer["text"] for answer in answers]
    pairs = list(zip(wanted, found, strict=True))
    return {
        "exact_match": float(np.mean([one.strip() == other.strip() for one, other in pairs])),
        "bleu": sacrebleu.corpus_bleu(found, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(found, [wanted]).score,
        "rouge_l": float(np.mean([RougeScorer(["rougeL"]).score(*pair)["rougeL"].fmeasure for pair in pairs])),
    }


def _generated(task: str, kind: str, rows: Sequence[dict[str, Any]], **own: Any) -> Case:
    """A language model whose answers are measured."""
    measured = {"exact_match", "bleu", "chrf", "rouge_l"}
    return Case(
        base=lambda: base_folder(kind),
        task={"type": task, "generate_metrics": sorted(measured), "max_new_tokens": 12, **own},
        rows=lambda: rows,
        found={},
        metrics=frozenset({"loss", "perplexity", "token_accuracy", *measured}),
        recompute=_texts,
        has_head=False,
        slow=task == "causal_lm",  # it is trained in most of the other tests
    )


def _pictures_of_prompts(kind: str, shapes: tuple[tuple[int, int], ...] = ((32, 40),), **settings: Any) -> Case:
    """text_to_image over a kind of pipeline."""
    return Case(
        base=lambda: pipeline_base(kind),
        task={"type": "text_to_image", "num_inference_steps": 2, **settings},
        rows=lambda: [
            {"image": str(path), "text": ("a red dog", "a blue cat")[number % 2]}
            for number, path in enumerate(picture_files(12, shapes))
        ],
        found={"num_inference_steps": 2},
        metrics=frozenset({"loss"}),
        recompute=lambda rows, answers: {},  # pictures do not tell
        targets="null",
        has_head=False,
        slow=True,  # a process takes seconds to import diffusers
    )


_TOPICS = ("sun tea", "winter stone", "moon mill", "north seven")
_RETOLD = [
    {"anchor": f"{words} {number}", "positive": f"{number} {words}", "negative": f"{words} nine"}
    for words in _TOPICS
    for number in ("one", "two", "three")
]
_RETOLD.append({"anchor": "sun winter", "positive": "winter sun", "negative": "north nine"})
"""The last one leaves a step with fewer rows than processes."""


def _apart(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each text of a row as a row of its own."""
    return [{"text": row[name]} for row in rows for name in ("anchor", "positive", "negative")]


def _ranks(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

    found = np.array([answer["embedding"] for answer in answers])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    texts = [row["text"] for row in _apart(rows)]
    distinct = dict(zip(texts[1::3] + texts[2::3], [*found[1::3], *found[2::3]], strict=True))
    wanted = np.array([[row["positive"] == text for text in distinct] for row in rows])
    cosines, places = found[::3] @ np.stack([*distinct.values()]).T, wanted.argmax(axis=1)
    recalls = {
        f"recall_at_{most}": top_k_accuracy_score(places, cosines, k=most, labels=range(len(distinct)))
        for most in (1, 5, 10)
        if most < len(distinct)
    }
    return {"mrr": label_ranking_average_precision_score(wanted, cosines), **recalls}


_SORTED = [{"query": row["anchor"], "positive": row["positive"], "negative": row["negative"]} for row in _RETOLD]


def _sorting(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of rows whose positive is the first document asked."""
    from sklearn.metrics import ndcg_score

    lists = [sorted(answer["ranking"], key=lambda each: each["index"]) for answer in answers]
    scores = np.array([[each["score"] for each in one] for one in lists])
    places = 1 + np.array([[each["index"] for each in answer["ranking"]].index(0) for answer in answers])
    right = np.zeros(scores.shape)
    right[:, 0] = 1
    gains = ndcg_score(right, scores, k=10)
    return {"mrr": float((1 / places).mean()), "ndcg_at_10": gains, "recall_at_1": float((places == 1).mean())}


CASES: dict[str, Case] = {
    "causal_lm": _generated("causal_lm", "llama", MESSAGES),
    "distillation": Case(
        base=base_folder,
        task={"type": "distillation", "context": "Answer in capital letters."},
        rows=lambda: MESSAGES,
        found={},
        metrics=frozenset({"loss", "kl", "top1_agreement"}),
        recompute=lambda rows, answers: {},  # which compare with the teacher
        has_head=False,
    ),
    "seq2seq_lm": _generated("seq2seq_lm", "t5", PROMPTS, num_beams=2),
    "sequence_classification": _classes("bert"),
    "a decoder": _classes("llama"),
    "image_classification": _classes("vit"),
    "image_text_to_text": Case(
        base=llava_base,
        task={"type": "image_text_to_text", "generate_metrics": ["chrf", "exact_match"], "max_new_tokens": 4},
        rows=picture_rows,
        found={},
        metrics=frozenset({"loss", "perplexity", "token_accuracy", "chrf", "exact_match"}),
        recompute=lambda rows, answers: {name: _texts(rows, answers)[name] for name in ("chrf", "exact_match")},
        has_head=False,
    ),
    "norms with statistics": _classes("resnet"),
    "semantic_segmentation": Case(
        base=lambda: classifier_base("segformer"),
        task={"type": "semantic_segmentation", "labels": ["floor", "red", "blue"]},
        rows=lambda: [write_scene(scratch() / "scenes", number) for number in range(12)],
        found={"labels": ["floor", "red", "blue"], "ignore_index": 255, "reduce_labels": False},
        metrics=frozenset(
            {"loss", "mean_iou", "mean_accuracy", "overall_accuracy", "iou_floor", "iou_red", "iou_blue"}
        ),
        recompute=_mean_iou,
        splits=lambda: (f"base_model={_with_a_head()}", "method.modules_to_save=[decode_head.classifier]"),
    ),
    "object_detection": Case(
        base=lambda: detector_base("yolos"),
        task={"type": "object_detection", "threshold": 0.0},  # the metrics see all that is found
        rows=boxed_scenes,
        found={"labels": ["red", "blue"], "box_format": "xywh"},
        metrics=frozenset({"loss", "map", "map_50", "map_75"}),
        recompute=coco_map,
    ),
    "question_answering": Case(
        base=lambda: classifier_base("bert"),
        task={"type": "question_answering", "max_length": 48, "stride": 8},
        rows=lambda: _QUESTIONS,
        found={"unanswerable": True},
        metrics=frozenset({"loss", "exact_match", "f1"}),
        recompute=_answered,
    ),
    "feature_extraction": Case(
        base=lambda: classifier_base("bert"),
        task={"type": "feature_extraction", "mini_batch_size": 2},
        rows=lambda: _RETOLD,
        found={"loss": "contrastive", "pooling": "mean", "normalize": True},
        metrics=frozenset({"loss", "recall_at_1", "recall_at_5", "recall_at_10", "mrr"}),
        recompute=_ranks,
        asked=_apart,
        has_head=False,
    ),
    "reranker": Case(
        base=lambda: classifier_base("bert"),
        task={"type": "reranker"},
        rows=lambda: _SORTED,
        found={"loss": "cross_entropy", "labelled": False},
        metrics=frozenset({"loss", "mrr", "ndcg_at_10", "recall_at_1"}),
        recompute=_sorting,
        asked=lambda rows: [{"query": row["query"], "documents": [row["positive"], row["negative"]]} for row in rows],
    ),
    "multiple_choice": Case(
        base=lambda: masked_base("bert"),
        task={"type": "multiple_choice"},
        rows=choice_rows,
        found={"max_length": 1024},
        metrics=frozenset({"loss", "accuracy"}),
        recompute=lambda rows, answers: {
            "accuracy": float(np.mean([row["label"] == one["choice"] for row, one in zip(rows, answers, strict=True)]))
        },
    ),
    "masked_lm": Case(
        base=lambda: masked_base("bert"),
        task={"type": "masked_lm", "mlm_probability": 0.3},
        rows=lambda: [{"text": text} for text in TEXTS],
        found={"mlm_probability": 0.3},
        metrics=frozenset({"loss", "perplexity", "token_accuracy"}),
        recompute=lambda rows, answers: {},  # whose masks are other ones
        asked=lambda rows: [{"text": f"[MASK] {row['text']} [MASK]"} for row in rows],
        has_head=False,
    ),
    "preference": Case(
        base=base_folder,
        task={"type": "preference"},
        rows=lambda: PREFERRED,
        found={"reference": "base"},
        metrics=frozenset(
            {"loss", "reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "kl_chosen"}
        ),
        recompute=lambda rows, answers: {},  # generated answers do not tell
        has_head=False,
    ),
    "grpo": Case(
        base=base_folder,
        task={
            "type": "grpo",
            "rewards": [{"contains": "e", "weight": 0.5}, {"exact_match": "answer"}, {"length": {"max": 6}}],
            "group_size": 3,
            "max_new_tokens": 8,
            "beta": 0.1,
        },
        rows=lambda: [{"prompt": each["prompt"], "answer": each["completion"]} for each in PROMPTS],
        found={},
        metrics=frozenset(
            {
                *("loss", "reward", "reward_std", "kl", "answer_tokens", "answers_cut"),
                *("reward_contains", "reward_exact_match", "reward_length"),
            }
        ),
        recompute=_rewarded,
        has_head=False,
    ),
    "reward": Case(
        base=base_folder,
        task={"type": "reward"},
        rows=lambda: PREFERRED,
        found={"margin": None},
        metrics=frozenset({"loss", "reward_accuracy", "reward_margin"}),
        recompute=_ranked,
        asked=_separately,
    ),
    "token_classification": Case(
        base=lambda: classifier_base("bert"),
        task={"type": "token_classification"},
        rows=lambda: _SENTENCES,
        found={"labels": ["B-PER", "O", "B-LOC", "I-PER"], "scheme": "iob2"},
        metrics=frozenset({"loss", "precision", "recall", "f1", "accuracy", "f1_PER", "f1_LOC"}),
        recompute=_entities,
    ),
    "speech_recognition": Case(
        base=whisper_base,
        task={"type": "speech_recognition", "language": "en"},
        rows=tone_rows,
        found={"language": "en", "mode": "transcribe"},
        metrics=frozenset({"loss", "wer", "cer"}),
        recompute=_words,
        has_head=False,
    ),
    "letters of sounds": Case(
        base=lambda: hearing_base("hubert"),
        task={"type": "speech_recognition"},
        rows=tone_rows,
        found={"vocabulary": ["<pad>", "|", *sorted({*"lowhigh"})]},
        metrics=frozenset({"loss", "wer", "cer"}),
        recompute=_words,
    ),
    "audio_classification": Case(
        base=lambda: hearing_base("hubert"),
        task={"type": "audio_classification"},
        rows=lambda: [{"audio": row["audio"], "label": row["text"]} for row in tone_rows()],
        found={"labels": ["low", "high", "low high", "high low"], "problem_type": "single_label"},
        metrics=frozenset({"loss", "accuracy", "macro_f1", "micro_f1", "matthews"}),
        recompute=of_classes,
    ),
    "text_to_image": _pictures_of_prompts("sd"),
    "a transformer and texts": _pictures_of_prompts("sd3", train_text_encoder=True),
    "pictures of several shapes": _pictures_of_prompts(
        "sd",
        ((32, 32), (32, 64), (32, 32), (64, 32)),
        resolution=32,
        buckets=True,
        caption_dropout=0.3,
        snr_gamma=5.0,
        cache_latents=True,
    ),
}
EDITED = Case(
    base=lambda: pipeline_base("flux_kontext"),
    task={"type": "text_to_image", "num_inference_steps": 2, "resolution": 32, "random_flip": True},
    rows=lambda: [
        {"image": str(picture_files(12)[at - 1]), "instruction": "change it", "target": str(picture_files(12)[at])}
        for at in range(12)
    ],
    found={"num_inference_steps": 2},
    metrics=frozenset({"loss"}),
    recompute=lambda rows, answers: {},
    targets="null",
    has_head=False,
)
"""text_to_image of a base model that edits; its card shows no source."""
