"""Labels, losses and metrics of the classification tasks."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import encoded, open_task, scanned, table_of
from torch import nn

from peftcli.data.rows import truth_columns
from peftcli.errors import DataError
from peftcli.tasks import TASKS
from peftcli.tasks.labels import joined_labels


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"row {number}", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "settings", "found"),
    [
        (["spam", "ham", "spam", "eggs"], {}, ["spam", "ham", "eggs"]),
        ([5, 1, 3], {}, ["5", "1", "3"]),
        ([1, 1], {"classes": {"label": ("ham", "spam")}}, ["ham", "spam"]),
        (["ham", "spam"], {"labels": ["spam", "ham", "other"]}, ["spam", "ham", "other"]),
    ],
)
def test_names_are_those_given_or_declared_or_in_the_order_of_first_sight(
    labels: list[Any], settings: dict[str, Any], found: list[str]
) -> None:
    task = scanned(rows(*labels), **settings)
    assert task.labels == tuple(found)
    assert task.model_options() == {
        "num_labels": len(found),
        "id2label": dict(enumerate(found)),
        "label2id": {name: at for at, name in enumerate(found)},
        "problem_type": "single_label_classification",
    }
    assert not open_task(labels=found, problem_type="single_label").needs_scan


def test_blanks_around_a_name_make_no_other_class() -> None:
    values = [{"text": "a", "label": label} for label in ("spam", "spam ", " ham", "ham")]
    assert scanned(values).labels == ("spam", "ham")
    for labels in (["spam", "ham"], ["spam ", "ham"]):
        task = open_task(labels=labels, problem_type="single_label")
        assert [int(each.arrays["label"][0]) for each in encoded(task, values)] == [0, 0, 1, 1]
    task = open_task(labels=["spam ", "ham"], problem_type="multi_label")
    [example] = encoded(task, [{"text": "a", "label": ["spam "]}])
    assert list(example.arrays["label"]) == [1, 0]
    task = open_task("token_classification", labels=["O", "B-PER "])
    [example] = encoded(task, [{"tokens": ["a", "b"], "tags": ["O", "B-PER "]}])
    assert list(example.arrays["tags"]) == [0, 1]


def test_names_numbers_and_class_labels_give_one_mapping() -> None:
    names = ("ham", "spam", "eggs")
    by_name = scanned(rows("ham", "spam", "eggs", "spam"))
    by_class_label = scanned(rows(2, 1, 1, 0), classes={"label": names})
    by_number = scanned(rows(2, 1, 1, 0))
    assert by_name.labels == by_class_label.labels == names
    assert by_number.labels == ("0", "1", "2")
    for task, values, classes in (
        (by_name, rows("spam", "eggs"), None),
        (by_class_label, rows(1, 2), {"label": names}),
        (by_number, rows(1, 2), None),
    ):
        found = encoded(task, values, classes=classes)
        assert [list(each.arrays["label"]) for each in found] == [[1.0], [2.0]]


@pytest.mark.parametrize("numbers", [(1, 0), ("1", "0")])
def test_numbers_count_given_names_and_those_of_a_class_label(numbers: tuple[Any, Any]) -> None:
    names = ("ham", "spam")
    given, declared = scanned(rows(*numbers), labels=list(names)), scanned(rows(0, 1), classes={"label": names})
    for task in (given, declared):
        assert task.labels == names
        assert [list(each.arrays["label"]) for each in encoded(task, rows(*numbers))] == [[1.0], [0.0]]
    for task in (scanned(rows("ham", "spam")), open_task(labels=["1", "2"], problem_type="single_label")):
        [bad] = encoded(task, rows(0))  # the order of first sight says nothing, and 0 would be the name 1
        assert "the label '0' is not one of the classes" in bad.message


def test_numbers_count_no_names_of_lists_and_none_that_another_source_declares() -> None:
    assert not scanned(rows(["ham"], ["spam"]), labels=["ham", "spam"]).settings.labels_by_number
    declared, plain = table_of(rows(0, 1), classes={"label": ("ham", "spam")}), table_of(rows("ham", "spam"))
    for tables, by_number in (([declared], True), ([declared, plain], False)):
        found = open_task().scan((table, iter(values)) for table, values in tables)
        assert found.labels_by_number is by_number


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["a", "b"], "single_label"),
        ([0, 1, 1], "single_label"),
        ([True, False], "single_label"),
        ([0.5, 2.0], "regression"),
        (["0.5", "2", "7.25"], "regression"),
        (["1", "2"], "single_label"),
        ([["a"], ["b", "a"], []], "multi_label"),
    ],
)
def test_the_labels_say_what_kind_of_problem_it_is(labels: list[Any], kind: str) -> None:
    assert scanned(rows(*labels)).settings.problem_type == kind


def test_decimal_commas_are_refused_unless_they_are_classes() -> None:
    with pytest.raises(DataError, match="'0,5' may be numbers with a decimal comma"):
        scanned(rows("0,5", "1", "2,25"))
    assert scanned(rows("0,5", "1"), problem_type="single_label").labels == ("0,5", "1")
    assert scanned(rows("0,5", "1", "x")).labels == ("0,5", "1", "x")


def test_numbers_are_targets_of_a_regression() -> None:
    task = open_task(problem_type="regression")
    assert not task.needs_scan
    assert [list(each.arrays["label"]) for each in encoded(task, rows(0.5, 3, "2.5", -1))] == [[0.5], [3], [2.5], [-1]]
    assert task.model_options() == {"num_labels": 1, "problem_type": "regression"}
    assert "expected a number" in encoded(task, rows("much"))[0].message


def test_lists_are_several_classes() -> None:
    task = scanned(rows(["red"], ["blue", "red"], []))
    found = encoded(task, rows(["blue"], [], ["red", "blue"]))
    assert [list(each.arrays["label"]) for each in found] == [[0, 1], [0, 0], [1, 1]]
    assert "expected a list of classes" in encoded(task, rows("red"))[0].message


def test_lists_may_be_json_in_a_text() -> None:
    """As CSV files have them."""
    task = scanned(rows('["red"]', '["blue", "red"]', "[]"))
    assert (task.labels, task.settings.problem_type) == (("red", "blue"), "multi_label")
    found = encoded(task, rows('["blue"]', "[]", ["red"]))
    assert [list(each.arrays["label"]) for each in found] == [[0, 1], [0, 0], [1, 0]]
    assert scanned(rows("[UNK]", "[SEP]")).labels == ("[UNK]", "[SEP]")
    [bad] = encoded(task, rows("['red', 'blue']"))
    assert (bad.key, "is a list that is not JSON" in bad.message) == ("label", True)


def test_labels_in_one_text_are_split_at_the_separator() -> None:
    values = rows("b|a", "a | c|", "", None, "c")
    task = scanned(values, label_separator="|")
    assert (task.labels, task.settings.problem_type) == (("b", "a", "c"), "multi_label")
    assert [list(each.arrays["label"]) for each in encoded(task, values)] == [
        [1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a|b", "b|a", "c"], ["a|b", "b|a"]),
        (["a", "b", "a; b"], ["a; b"]),
        (["red,big", "red", "big,blue", "blue,rare"], ["red,big", "big,blue"]),
        (["Trucks, vans", "Cars", "Boats, ships"], []),
        (["Food, fresh", "Food, frozen", "Cars, used"], []),
        (["Portland, OR", "Portland, ME", "Augusta, ME", "Salem, OR", "Reno, NV", "Boise, ID"], []),
    ],
)
def test_names_whose_parts_recur_are_joined_labels(names: list[str], joined: list[str]) -> None:
    assert joined_labels(names)[1] == joined


def test_columns_of_0_and_1_are_labels() -> None:
    values = [
        {"text": "a", "id": 7, "toxic": 1, "insult": "0"},
        {"text": "b", "id": 8, "toxic": False, "insult": 1.0},
        {"text": "c", "id": 9, "toxic": 0, "insult": 0},
        {"text": "d", "id": 9, "toxic": -1, "insult": 0},
    ]
    columns = {"labels": ["insult", "toxic"]}
    table, given = table_of(values, columns=columns)
    task = TASKS["sequence_classification"].open(open_task().scan([(table, iter(given))]), open_task().base)
    assert (task.labels, task.settings.problem_type) == (("insult", "toxic"), "multi_label")
    *found, error = encoded(task, values, columns=columns)
    assert [list(each.arrays["label"]) for each in found] == [[0, 1], [1, 0], [0, 0]]
    assert (error.message, error.key) == ("expected 0 or 1, found -1", "toxic")
    table, given = table_of(values[:3])
    with pytest.raises(DataError, match=r"dataset: \{columns: \{labels: \[toxic, insult\]\}\}"):
        task.read(replace(table, truths=truth_columns(given)))
    for wrong in ({"labels": "toxic"}, {"label": ["toxic"]}):
        with pytest.raises(DataError, match="lists are given as labels"):
            task.read(table_of(values, columns=wrong)[0])


@pytest.mark.parametrize("missing", [None, "", " ", -1, -100, float("nan")])
def test_a_row_without_a_label_is_an_error_with_its_place(missing: Any) -> None:
    task = scanned(rows("a", "b", missing))
    assert task.labels == ("a", "b")
    good, bad = encoded(task, rows("a", missing))
    assert list(good.arrays["label"]) == [0]
    assert isinstance(bad, DataError)
    assert (bad.file, bad.line, bad.key) == ("a.jsonl", 2, "label")


@pytest.mark.parametrize("labels", [([0, 0, 1], [1, 0, 0]), ([1, 0], [0, 1]), ([True, False], [False, True])])
def test_lists_of_a_number_for_each_class_are_refused(labels: Any) -> None:
    """Or else each row would have all classes, and be answered without a mistake."""
    with pytest.raises(DataError, match="a 0 or 1 for each class"):
        scanned(rows(*labels))
    task = open_task(labels=["a", "b"], problem_type="multi_label")
    [bad] = encoded(task, [{"text": "x", "label": ["a", "a"]}])
    assert "names a class twice" in bad.message


def test_a_number_below_0_is_a_class_where_task_labels_names_it() -> None:
    with pytest.raises(DataError, match=r"name all classes in task\.labels, '-1' among them"):
        raise encoded(scanned(rows(-1, 0, 1)), rows(-1))[0]
    task = scanned(rows(-1, 0, 1), labels=["-1", "0", "1"])
    assert [list(each.arrays["label"]) for each in encoded(task, rows(-1, 0, 1))] == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize(
    ("known", "label", "message"),
    [
        (("ham", "spam"), "eggs", "the label 'eggs' is not one of the classes: ham, spam"),
        ((0, 1), 2, "2 is not the number of a class"),
    ],
)
def test_a_label_that_training_lacks_is_an_error(known: tuple[Any, Any], label: Any, message: str) -> None:
    classes = {"label": ("ham", "spam")} if known == (0, 1) else None
    [bad] = encoded(scanned(rows(*known), classes=classes), rows(label), classes=classes)
    assert bad.message.startswith(message)
    assert ("task.labels" in (bad.hint or "")) == (label == "eggs")


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(DataError, match="all training rows have the label 'ham'"):
        scanned(rows("ham", "ham"))
    with pytest.raises(DataError, match=r"were left out\. The first: .*label") as caught:
        scanned([*rows("ham", "ham"), {"text": "b"}])
    assert "all training rows have the label 'ham'" in caught.value.message
    with pytest.raises(DataError, match="names one class, 'ham'") as caught:
        scanned(rows("ham", "spam"), labels=["ham"])
    assert caught.value.key == "task.labels"
    table, found = table_of(rows("ham", "ham"))
    limited = replace(table, source=replace(table.source, limit=2))
    with pytest.raises(DataError, match=r"label 'ham'.*\n?.*dataset\.limit takes the first rows"):
        open_task().scan([(limited, iter(found))])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"labels": ["a", "a"]}, "task.labels"),
        ({"problem_type": "regression", "labels": ["a", "b"]}, "task.labels"),
        ({"problem_type": "regression", "class_weights": {"a": 2.0}}, "task.class_weights"),
        ({"labels": ["a", "b"], "class_weights": {"c": 2.0}}, "task.class_weights"),
        ({"labels": ["a", "b"], "class_weights": {"a": 0.0, "b": 0.0}}, "task.class_weights"),
        ({"label_separator": ""}, "task.label_separator"),
        ({"label_separator": "|", "problem_type": "single_label"}, "task.label_separator"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(DataError) as caught:
        open_task(**settings)
    assert caught.value.key == key


class Fixed(nn.Module):
    """A model that gives the same logits."""

    def __init__(self, logits: Any):
        super().__init__()
        self.logits = torch.as_tensor(logits, dtype=torch.float32)
        self.eval()

    def forward(self, **_inputs: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def measured(task: Any, values: list[dict[str, Any]], logits: Any) -> dict[str, float]:
    """The metrics of a model with these logits."""
    found = encoded(task, values)
    loss = task.loss(Fixed(logits), task.collate(found, training=False))
    sums = {name: value.numpy() for name, value in loss.sums.items()}
    return task.metrics(sums, list(loss.outputs), len(found))


def one_hot(task: Any, labels: list[str]) -> torch.Tensor:
    return 20.0 * torch.eye(len(task.labels))[[task.labels.index(label) for label in labels]]


def test_a_perfect_classifier() -> None:
    labels = ["a", "b", "b", "a", "b"]
    task = scanned(rows(*labels))
    metrics = measured(task, rows(*labels), one_hot(task, labels))
    assert metrics.pop("loss") == pytest.approx(0, abs=1e-6)
    assert metrics == dict.fromkeys(["accuracy", "macro_f1", "micro_f1", "matthews", "auc"], 1.0)


def test_of_one_class_that_rows_may_lack_its_own_f1_is_measured() -> None:
    values = rows(["a"], [], ["a"], [])
    found = [measured(scanned(values), values, logits) for logits in ([[-1.0]] * 4, [[1.0], [-1], [-1], [-1]])]
    assert [(each["macro_f1"], each["micro_f1"]) for each in found] == [(0, 0), (pytest.approx(2 / 3),) * 2]


@pytest.mark.parametrize(
    ("values", "size"),
    [(rows("a", "b"), 2), (rows("a", "b", "c"), 3), (rows(["a", "b"], ["a"]), 2), (rows(0.5, 1.5), 1)],
    ids=["two classes", "three", "several of a row", "regression"],
)
def test_a_classifier_that_diverged_has_no_metrics(values: list[dict[str, Any]], size: int) -> None:
    metrics = measured(scanned(values), values, np.full((len(values), size), np.nan))
    assert len(metrics) > 3
    assert np.isnan(list(metrics.values())).all()


def test_a_random_classifier() -> None:
    random = np.random.default_rng(0)
    labels = ["a" if draw < 0.8 else "b" for draw in random.random(2000)]
    task = scanned(rows("a", "b"), labels=["a", "b"])
    metrics = measured(task, rows(*labels), random.normal(size=(2000, 2)))
    assert metrics["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert metrics["micro_f1"] == metrics["accuracy"]
    assert metrics["macro_f1"] == pytest.approx((2 * 0.8 * 0.5 / 1.3 + 2 * 0.2 * 0.5 / 0.7) / 2, abs=0.05)
    assert metrics["matthews"] == pytest.approx(0, abs=0.06)
    assert metrics["auc"] == pytest.approx(0.5, abs=0.05)
    sure = measured(task, rows("a", "b", "a", "b"), [[-9.0, 9.0], [-10.0, 10.0], [-9.0, 8.5], [-12.0, 12.0]])
    assert sure["auc"] == 1.0


def test_many_classes_have_the_accuracy_of_the_best_five() -> None:
    labels = [f"c{number}" for number in range(20)]
    task = scanned(rows(*labels))
    metrics = measured(task, rows(*labels), one_hot(task, labels))
    assert metrics["top5_accuracy"] == metrics["accuracy"] == 1
    assert "auc" not in metrics
    random = np.random.default_rng(0)
    metrics = measured(task, rows(*labels * 100), random.normal(size=(2000, 20)))
    assert metrics["top5_accuracy"] == pytest.approx(0.25, abs=0.05)
    assert metrics["accuracy"] == pytest.approx(0.05, abs=0.03)


def test_perfect_and_random_predictions_of_several_classes() -> None:
    random = np.random.default_rng(0)
    held = random.random((1000, 3)) < 0.5
    values = rows(*([name for name, is_in in zip("abc", row, strict=True) if is_in] for row in held))
    task = scanned(values, labels=["a", "b", "c"])
    perfect = measured(task, values, 20.0 * (2 * held - 1))
    assert {perfect[name] for name in ("accuracy", "macro_f1", "micro_f1", "auc")} == {1.0}
    guessed = measured(task, values, random.normal(size=(1000, 3)))
    assert guessed["accuracy"] == pytest.approx(1 / 8, abs=0.04)
    assert {round(guessed[name], 1) for name in ("macro_f1", "micro_f1", "auc")} == {0.5}
    assert guessed["loss"] > 0.6


def test_perfect_and_random_predictions_of_numbers() -> None:
    random = np.random.default_rng(0)
    numbers = random.normal(size=1000)
    values = rows(*numbers.tolist())
    task = scanned(values)
    perfect = measured(task, values, numbers[:, None])
    assert perfect["mse"] == pytest.approx(perfect["loss"]) == pytest.approx(0, abs=1e-9)
    assert perfect["pearson"] == pytest.approx(1)
    assert perfect["spearman"] == pytest.approx(1)
    guessed = measured(task, values, random.normal(size=(1000, 1)))
    assert guessed["mse"] == pytest.approx(2, abs=0.3)
    assert guessed["pearson"] == pytest.approx(0, abs=0.1)
    assert guessed["spearman"] == pytest.approx(0, abs=0.1)
    assert measured(task, values, np.zeros((1000, 1)))["pearson"] == 0


def test_the_loss_is_that_of_transformers() -> None:
    import transformers

    random = torch.Generator().manual_seed(0)
    for values, settings in (
        (rows("a", "b", "c", "b"), {}),
        (rows(["a"], [], ["b", "c"], ["c"]), {"labels": ["a", "b", "c"]}),
        (rows(0.5, 1.5, -2.0, 0.0), {}),
    ):
        task = scanned(values, **settings)
        batch = task.collate(encoded(task, values), training=True)
        config = transformers.AutoConfig.from_pretrained(task.base.name, **task.model_options())
        torch.manual_seed(int(torch.randint(100, (1,), generator=random)))
        model = transformers.AutoModelForSequenceClassification.from_config(config).train()
        loss = task.loss(model, batch)
        assert loss.outputs == ()
        assert loss.total.item() / 4 == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_class_weights_scale_the_loss_of_their_rows() -> None:
    values = rows("a", "b", "b")
    logits = [[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]]
    plain, weighed = (scanned(values, class_weights=weights) for weights in (None, {"b": 3.0}))
    each = [-torch.log_softmax(torch.tensor(row), 0)[at].item() for row, at in zip(logits, (0, 1, 1), strict=True)]
    assert measured(plain, values, logits)["loss"] == pytest.approx(sum(each) / 3)
    assert measured(weighed, values, logits)["loss"] == pytest.approx((each[0] + 3 * each[1] + 3 * each[2]) / 3)


def test_balanced_weights_count_each_class_alike() -> None:
    task = scanned(rows("a", "b", "b", "b"), class_weights="balanced")
    assert task.settings.class_weights == {"a": 2.0, "b": pytest.approx(2 / 3)}
    named = scanned(rows(1, 1, 1, 0), labels=["a", "b"], class_weights="balanced")
    assert named.settings.class_weights == {"a": 2.0, "b": pytest.approx(2 / 3)}


def test_answers() -> None:
    task = scanned(rows("ham", "spam"))
    answer = task._answer(torch.tensor([0.0, math.log(3)]))
    assert answer["label"] == "spam"
    assert answer["score"] == answer["scores"]["spam"] == pytest.approx(0.75)
    assert list(answer["scores"]) == ["ham", "spam"]
    several = scanned(rows(["a"], ["b"]))._answer(torch.tensor([1.0, -1.0]))
    assert several["labels"] == ["a"]
    assert several["scores"]["a"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert scanned(rows(0.5, 1.5))._answer(torch.tensor([2.5])) == {"value": 2.5}


def test_a_source_may_call_its_columns_otherwise() -> None:
    task = scanned(rows("a", "b"))
    values = [{"mail": "x", "kind": "b"}]
    [example] = encoded(task, values, columns={"text": "mail", "label": "kind"})
    assert list(example.arrays["label"]) == [1]
    table, _ = table_of(values)
    with pytest.raises(DataError, match="no column 'text'"):
        task.read(table)
