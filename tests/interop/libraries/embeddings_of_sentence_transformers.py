"""The losses of sentence-transformers over peftcli's batches, and the folder of a merged adapter in it.

Prints what tests/tasks/test_feature_extraction.py holds.
"""

import json
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from classifierkit import classifier_base, encoded, open_task
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from taskkit import CASES
from trainkit import run_recipe
from transformers import AutoModel

from peftcli.adapters.merge import merge_adapter
from peftcli.adapters.predict import load_predictor
from peftcli.adapters.proof.verify import verify_adapter
from peftcli.errors import AdapterError
from peftcli.tasks import feature_extraction
from peftcli.tasks.feature_extraction import Pooling

ROWS = CASES["feature_extraction"].rows()[:4]
SCORED = [
    {"sentence1": row["anchor"], "sentence2": row["positive"], "score": score}
    for row, score in zip(ROWS, (0.1, 0.9, -0.5, 0.4), strict=True)
]


def of_theirs(kind: str) -> float:
    model = SentenceTransformer(str(classifier_base("bert")), device="cpu")
    rows, names = (SCORED, ("sentence1", "sentence2")) if kind == "cosine" else (ROWS, tuple(ROWS[0]))
    features = [model.preprocess([row[name] for row in rows]) for name in names]
    if kind == "cosine":
        labels = torch.tensor([row["score"] for row in rows])
        return float(losses.CosineSimilarityLoss(model)(features, labels))
    if kind == "triplet":
        cosine = losses.TripletDistanceMetric.COSINE
        return float(losses.TripletLoss(model, distance_metric=cosine, triplet_margin=0.5)(features, None))
    return float(losses.MultipleNegativesRankingLoss(model, scale=20.0)(features, None))


def of_ours(kind: str) -> float:
    task, model = open_task("feature_extraction", loss=kind), AutoModel.from_pretrained(classifier_base("bert")).train()
    batch = task.collate(encoded(task, SCORED if kind == "cosine" else ROWS), training=True)
    return float(task.loss(model, batch).total / len(ROWS))


def check_merged(folder: Path, pooling: str, normalize: bool) -> None:
    """An adapter's merged folder is a model of sentence-transformers, which gives the embeddings of ``predict``."""
    case = CASES["feature_extraction"]
    (folder / "run").mkdir(parents=True)
    run = run_recipe(case.write(folder / "run"), f"task.pooling={pooling}", f"task.normalize={json.dumps(normalize)}")
    merge_adapter(str(run.folder), folder / "merged")
    texts = [row["positive"] for row in case.rows()] + ["sun " * 100]
    expected = [each["embedding"] for each in answers(run.folder, texts)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SentenceTransformer(str(folder / "merged"), device="cpu")
    np.testing.assert_allclose(model.encode(texts), np.array(expected), atol=1e-5)
    assert verify_adapter(str(run.folder), readers=["sentence-transformers"])["readers"]["sentence-transformers"] < 1e-4
    other = Pooling("max" if pooling != "max" else "mean", normalize)
    with (
        mock.patch.object(feature_extraction, "Pooling", return_value=other),
        pytest.raises(AdapterError, match=r"task.json: .*loaded by sentence-transformers, .*: pooling or norm"),
    ):
        verify_adapter(str(run.folder), readers=["sentence-transformers"])
    model.save_pretrained(str(folder / "saved"))  # by this release, whose files say it in other words
    task = open_task("feature_extraction", folder / "saved")
    assert (task.settings.pooling, task.settings.normalize, task.max_length) == (pooling, normalize, 64)
    loaded = SentenceTransformer(str(classifier_base("bert")), device="cpu")
    loaded.load_adapter(str(run.folder))
    if pooling == "mean" and not normalize:
        np.testing.assert_allclose(loaded.encode(texts), np.array(expected), atol=1e-5)


def answers(adapter: Path, texts: list[str]) -> list[dict[str, list[float]]]:
    predictor = load_predictor(str(adapter))
    return predictor.answer(predictor.rows(texts))


if __name__ == "__main__":
    for loss in ("contrastive", "cosine", "triplet"):
        theirs = of_theirs(loss)
        print(f'    "{loss}": {theirs:.6f},')
        assert abs(of_ours(loss) - theirs) < 1e-5, (loss, of_ours(loss), theirs)
    for at, (mode, unit) in enumerate(
        (("mean", False), ("mean", True), ("cls", False), ("last", False), ("max", True))
    ):
        check_merged(Path(tempfile.mkdtemp()) / str(at), mode, unit)
