"""The losses of sentence-transformers' CrossEncoder over peftcli's batches, and merged rerankers opened by it.

Prints the losses, of the scores of tests/tasks/test_reranker.py, that this test holds.
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from classifierkit import encoded, open_task
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses
from taskkit import CASES
from tasks.test_reranker import LABELLED, ROWS, SCORES, told
from torch import nn
from trainkit import base_folder, run_recipe

from peftcli.adapters.merge import merge_adapter
from peftcli.adapters.predict import load_predictor
from peftcli.adapters.proof.verify import verify_adapter


class Scored(CrossEncoder):
    """A CrossEncoder that gives these scores, the next ones each time."""

    def __init__(self, scores: list[float]):
        nn.Module.__init__(self)
        self.given = list(scores)

    num_labels, device = 1, torch.device("cpu")

    def preprocess(self, pairs: list[tuple[str, str]], **_: object) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(len(pairs))}

    def forward(self, features: dict[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        count = int(features["count"])
        now, self.given = self.given[:count], self.given[count:]
        return {"scores": torch.tensor(now)[:, None]}


def of_theirs(loss: str, labelled: bool) -> float:
    """A mean over targets, as their losses are; of lists one after another, since their lengths differ."""
    if labelled or loss == "bce":
        labels = [float(row["label"]) for row in LABELLED] if labelled else [1.0, 0.0, 0.0, 1.0, 0.0]
        kind = {"bce": losses.BinaryCrossEntropyLoss, "mse": losses.MSELoss}[loss]
        texts = ["q"] * len(labels), ["d"] * len(labels)
        return float(kind(Scored(SCORES))(texts, torch.tensor(labels)))
    found, start = [], 0
    for size in (3, 2):
        model = Scored(SCORES[start : start + size])
        listwise = losses.MultipleNegativesRankingLoss(model, num_negatives=0, scale=1.0, activation_fn=nn.Identity())
        found.append(float(listwise([["q"], *[["d"]] * size], torch.zeros(0))))
        start += size
    return float(np.mean(found))


def of_ours(loss: str, labelled: bool) -> float:
    task = open_task("reranker", loss=loss, labelled=labelled)
    examples = encoded(task, LABELLED if labelled else ROWS)
    pairs = sum(len(each.arrays["sizes"]) for each in examples)
    total = task.loss(told(SCORES[:pairs]), task.collate(examples, training=True)).total
    return float(total) / sum(each.num_targets for each in examples)


def check_merged(folder: Path, base: Path, *settings: str) -> None:
    """A merged folder is a CrossEncoder with the scores of ``predict``, its trained head among its weights."""
    folder.mkdir(parents=True)
    run = run_recipe(CASES["reranker"].write(folder), f"base_model={base}", *settings)
    merge_adapter(str(run.folder), folder / "merged")
    documents = [*(row["positive"] for row in CASES["reranker"].rows()), "sun " * 100, "a"]
    predictor = load_predictor(str(run.folder))
    rows = predictor.rows([text for document in documents for text in ("sun tea", document)])
    expected = [each["score"] for each in predictor.answers(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = CrossEncoder(str(folder / "merged"), device="cpu")
    found = model.predict([("sun tea", document) for document in documents])
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)
    assert np.ptp(found) > 1e-3, "a head that answers"
    difference = verify_adapter(str(run.folder), readers=["sentence-transformers"])["readers"]["sentence-transformers"]
    assert difference < 1e-4
    model.save_pretrained(str(folder / "saved"))  # by this release, as its own files say it
    again = CrossEncoder(str(folder / "saved"), device="cpu").predict([("sun tea", each) for each in documents])
    np.testing.assert_allclose(again, found, atol=1e-6)


if __name__ == "__main__":
    for case in (("cross_entropy", False), ("bce", False), ("bce", True), ("mse", True)):
        theirs = of_theirs(*case)
        print(case, f"{theirs:.6f}")
        assert abs(of_ours(*case) - theirs) < 1e-5, (case, of_ours(*case), theirs)
    scratch = Path(tempfile.mkdtemp())
    check_merged(scratch / "bert", CASES["reranker"].base())
    check_merged(scratch / "llama", base_folder("llama"))
    check_merged(scratch / "chat", base_folder("llama", chat=True))  # whose template must not be applied
    check_merged(scratch / "again", scratch / "bert/merged", "training.max_steps=2")  # with a head, which stays
