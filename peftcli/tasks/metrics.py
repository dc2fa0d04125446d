"""The metrics that evaluation reports, in words: for ``peftcli explain`` and the reference. Readable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """What a metric measures, and which values of it are good."""

    name: str
    """Without the prefix ``eval_``; a pattern where the data gives a part of it."""
    scale: str
    """The values that it may have, and which of them are better."""
    summary: str
    """What it measures: a sentence."""


_SCALES = {
    "share": "0 to 1; more is better",
    "error": "from 0; less is better",
    "amount": "from 0; neither way is better",
    "both": "-1 to 1; more is better",
    "percent": "0 to 100; more is better",
    "up": "any number; more is better",
    "down": "any number; less is better",
    "near": "any number; nearer to 0 is nearer to the reference",
}
_TABLE = """
loss error The mean of what training makes smaller, over the targets of the evaluation rows.
perplexity error e to the power of the loss: among how many tokens the model hesitates, on average.
token_accuracy share The share of trained tokens that are the likeliest, each after the right tokens before it.
exact_match share The share of answers that are right to the letter, as the task compares them.
bleu percent Sequences of one to four words that generated and wanted texts share, by sacrebleu.
chrf percent Sequences of letters that generated and wanted texts share, by sacrebleu.
rouge_l share The longest sequence of words that generated and wanted text share, as F1, by rouge-score.
accuracy share The share of rows, or of words in token_classification, whose label is right.
macro_f1 share The F1 of each class, then their mean: rare classes count as much as frequent ones.
micro_f1 share The F1 over all decisions together: frequent classes count most.
matthews both The correlation of right and given labels (MCC): 0 is what guessing reaches, also with uneven classes.
auc share The chance that a row of the class gets a higher score than one of another: 0.5 is guessing.
top5_accuracy share The share of rows whose label is among the five likeliest.
mse error The mean of the squared difference between the right number and the model's.
pearson both How nearly the model's numbers lie on a straight line over the right ones.
spearman both How nearly the order of the model's numbers is the right order.
precision share Of the entities that the model finds, the share that is right in type, beginning and end.
recall share Of the entities that are there, the share that the model finds whole.
f1 share Precision and recall in one number; in question_answering, of the words of the answer.
f1_* share The F1 of the entities of one type.
recall_at_1 share The share of anchors whose own text is the nearest of all texts of the evaluation rows.
recall_at_5 share The share of anchors whose own text is among the five nearest.
recall_at_10 share The share of anchors whose own text is among the ten nearest.
mrr share The mean of 1 / place of each anchor's own text, among all sorted by nearness.
ndcg_at_10 share Of each query 1 / log2(1 + place) of its positive among its documents, 0 beyond ten; the mean.
wer error Wrong, missing and surplus words, as a share of the words that were said; it can exceed 1.
cer error Wrong, missing and surplus letters, as a share of the letters that were said; it can exceed 1.
mean_iou share For each class, the pixels that mask and answer share, as a share of those in either; the mean of all.
mean_accuracy share For each class, the share of its pixels that are found; the mean of all.
overall_accuracy share The share of all pixels whose class is right.
iou_* share The pixels of one class that mask and answer share, as a share of those in either.
map share The precision of boxes, averaged over recalls, classes and ten overlaps from 0.5 to 0.95, as COCO defines it.
map_50 share The same where half of their union must be shared by a box and its object.
map_75 share The same where three quarters of their union must be shared.
reward_accuracy share The share of pairs whose chosen answer gets the higher reward; 0.5 is guessing.
reward_margin up By how much the chosen answer's reward exceeds the rejected one's, on average.
reward_chosen up The mean reward of chosen answers: how much likelier training made them than the reference does.
reward_rejected down The mean reward of rejected answers.
reward up What an answer is given by the rewards of grpo, each with its weight, on average.
reward_std amount The standard deviation of the rewards of the evaluation rows.
answer_tokens amount The mean number of tokens of an answer, its end included.
answers_cut error The share of answers that max_new_tokens has cut off.
reward_* up What an answer is given by one of the rewards of grpo, without its weight, on average.
nll error The loss of the chosen answers as texts, which orpo adds to that of the pairs.
kl error How far the answers are from the reference's, as kto and grpo estimate it; in distillation the forward KL.
top1_agreement share The share of trained tokens at which student and teacher have the same likeliest token.
kl_chosen near How far the model has moved from the reference on the chosen answers.
"""
METRICS = {
    name: Metric(name, _SCALES[scale], summary)
    for name, scale, summary in (line.split(" ", 2) for line in _TABLE.strip().splitlines())
}
"""Name, or pattern -> the metric."""


def find_metric(name: str) -> Metric | None:
    """Return the metric that a gate or ``run.json`` calls ``name``, with or without ``eval_``."""
    bare = name.removeprefix("eval_")
    found = METRICS.get(bare)
    return found or next((row for row in METRICS.values() if "*" in row.name and fnmatchcase(bare, row.name)), None)
