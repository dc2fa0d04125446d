from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit
from examplekit import plain
from trainkit import MESSAGES, PROMPTS, base_folder, write_recipe, write_rows

from peftcli.cli import console
from peftcli.tasks.causal_lm import CausalLM
from peftcli.train.data import load_data

ESCAPE = "\x1b"
IGNORED = -100


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def look(cli: Callable, *args: object, code: int = 0) -> dict[str, Any]:
    ran = cli("inspect", *args, "--json")
    assert ran.code == code, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_a_folder_of_files_is_told_file_by_file(cli: Callable, tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in MESSAGES[:5]]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("\n".join(rows[:2]))
    (tmp_path / "rows/b.jsonl").write_text("\n".join(rows[2:]))
    told = cli("inspect", write_recipe(tmp_path), f"dataset.train={tmp_path}/rows").out
    for name, count in (("a.jsonl", 2), ("b.jsonl", 3)):
        assert re.search(rf"rows/{name} +{count} +{count} .* 1\.00\n", told), told


# --- what is shown is what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_train_sees_the_ids_and_labels_that_inspect_shows(
    cli: Callable, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path, rows=[*MESSAGES[:9], chat("Tell all.", "winter tea " * 60), *MESSAGES[9:]])
    settings = ["dataset.overlong=split", f"dataset.packing={str(packing).lower()}"]
    shown = look(cli, path, *settings, "--rows", 100)["rows"]
    trained: list[tuple[list[int], list[int]]] = []
    collate = CausalLM.collate

    def note(self: CausalLM, examples: Any, *, training: bool) -> Any:
        for feature in map(plain, examples if training else ()):
            ends = [at for at, position in enumerate(feature.get("position_ids", [0])) if position == 0]
            for start, end in zip(ends, [*ends[1:], len(feature["input_ids"])], strict=True):
                trained.append((feature["input_ids"][start:end], feature["labels"][start:end]))
        return collate(self, examples, training=training)

    monkeypatch.setattr(CausalLM, "collate", note)
    trainkit.reset_accelerate()
    ran = cli("train", path, *settings, "training.max_steps=-1", "training.num_train_epochs=1", "--quiet")
    assert ran.code == 0, ran.err
    # nothing is predicted before the first token, so its label never counts
    assert Counter(_counted(*row) for row in trained) == Counter(_counted(r["input_ids"], r["labels"]) for r in shown)
    assert len(shown) > 10


def _counted(ids: list[int], labels: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(ids), (IGNORED, *labels[1:])


def test_rows_are_the_examples_of_train_by_their_number(cli: Callable, recipe: Path) -> None:
    from peftcli.models.open import open_base
    from peftcli.recipe import load_recipe
    from peftcli.tasks import open_task

    settings = load_recipe(recipe, [])
    task = open_task(settings, open_base(settings.base_model))
    data = load_data(settings, task)
    for row in look(cli, recipe, "--rows", 4)["rows"]:
        assert {"input_ids": row["input_ids"], "labels": row["labels"]} == plain(data.train[row["index"]])
        assert row["text"] == task.processor.decode(row["input_ids"])


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_json_is_the_contract(cli: Callable, recipe: Path) -> None:
    found = look(cli, recipe)
    assert list(found) == ["rows", "audit", "findings"]
    assert [list(row) for row in found["rows"]] == [["index", "input_ids", "labels", "text"]] * 3
    assert [row["index"] for row in found["rows"]] == [0, 4, 9]
    assert list(found["audit"]) == ["train", "eval", "train_in_eval", "batches"]
    assert found["audit"]["train"]["rows"] == 10
    assert found["audit"]["eval"]["rows"] == 3
    assert found["audit"]["train_in_eval"] == {"rows": 0, "prompts": 0}


def test_steps_and_tokens_are_those_of_the_run(cli: Callable, recipe: Path) -> None:
    settings = ["training.max_steps=-1", "training.num_train_epochs=2"]
    audit = look(cli, recipe, *settings)["audit"]
    trainkit.reset_accelerate()
    run = json.loads(cli("train", recipe, *settings, "--json").out)
    batches = audit["batches"]
    assert (batches["steps"], batches["steps_per_epoch"]) == (run["steps"]["total"], 3)
    assert batches["tokens_per_epoch"] == run["data"]["tokens"] == audit["train"]["tokens"]
    assert audit["train"]["targets"] == run["data"]["targets"]
    assert 0 < batches["efficiency"]["padded"] < batches["efficiency"]["packed"] <= 1


def test_findings_are_named_with_their_rows(cli: Callable, tmp_path: Path) -> None:
    rows = [*MESSAGES[:5], MESSAGES[2], *MESSAGES[5:9], MESSAGES[4], *MESSAGES[11:]]
    found = {each.pop("name"): each for each in look(cli, write_recipe(tmp_path, rows=rows))["findings"]}
    for name, split, line in (("exact_duplicates", "train", 6), ("train_in_eval", "eval", 1)):
        rows = [f"{tmp_path}/{split}.jsonl:{line}"]
        assert found[name] == {"level": "warning", "count": 1, "rows": rows, "split": split}


def test_an_error_gives_the_report_and_exit_code_3(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=[*MESSAGES[:3], chat("Why?", " "), {"messages": 4}, *MESSAGES[3:]])
    found = look(cli, path, code=3)
    assert {(each["name"], each["level"], each["count"]) for each in found["findings"]} >= {("bad_rows", "error", 2)}
    assert [bad["row"] for bad in found["audit"]["train"]["bad_rows"]] == [
        f"{tmp_path}/train.jsonl:4",
        f"{tmp_path}/train.jsonl:5",
    ]
    ran = cli("inspect", path)
    assert ran.code == 3
    assert "bad_rows: 2 of 10 rows cannot be used" in ran.err
    assert len(ran.err.split("error: ")[1].splitlines()) <= 6
    assert f"  {tmp_path}/train.jsonl:4: " in ran.out
    assert "next:" not in ran.out
    trainkit.reset_accelerate()
    assert cli("train", path).code == 3
    assert look(cli, path, "dataset.on_bad_row=skip")["findings"][0]["level"] == "warning"


def test_what_the_recipe_allows_stops_neither(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=[chat(f"Tell {n}.", "winter tea " * (20 + n)) for n in range(13)])
    settings = ["dataset.max_length=64"]
    finding = look(cli, path, *settings, code=3)["findings"][0]
    assert (finding["name"], finding["level"], finding["count"]) == ("answers_cut", "error", 10)
    trainkit.reset_accelerate()
    assert cli("train", path, *settings).code == 3
    allowed = [*settings, "dataset.allow=[answers_cut]"]
    ran = cli("inspect", path, *allowed)
    assert ran.code == 0, ran.err
    assert "error (allowed): answers_cut" in ran.out
    trainkit.reset_accelerate()
    ran = cli("train", path, *allowed, f"training.output_dir={tmp_path}/allowed")
    assert ran.code == 0, ran.err


def test_errors_before_the_data_is_read(cli: Callable, recipe: Path) -> None:
    ran = cli("inspect", recipe, "dataset.max_lenght=3", "--json")
    assert ran.code == 2
    assert "did you mean 'max_length'" in ran.err
    assert json.loads(ran.out)["error"]["kind"] == "RecipeError"
    (recipe.parent / "train.jsonl").unlink()
    assert cli("inspect", recipe).code == 2


# --- plain text -----------------------------------------------------------------------------------------------------


def test_trained_text_is_marked_and_newlines_are_seen(cli: Callable, recipe: Path) -> None:
    ran = cli("inspect", recipe, "--rows", 1, "--quiet")
    assert ran.code == 0
    assert ran.err == ""
    question, answer = (turn["content"] for turn in MESSAGES[0]["messages"])
    assert f"<|im_start|>user\u23ce\n{question}<|im_end|>\u23ce\n<|im_start|>assistant\u23ce\n" in ran.out
    assert f"[[{answer}<|im_end|>]]\u23ce\n" in ran.out
    assert ran.out.count("[[") == 2  # the legend's
    assert f"=== {recipe.parent}/train.jsonl:1 (example 0): " in ran.out
    assert ESCAPE not in ran.out


def test_the_audit_is_printed(cli: Callable, recipe: Path) -> None:
    out = cli("inspect", recipe, "--rows", 0).out
    assert "===" not in out
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert ["data", "train", "eval"] in lines
    assert ["rows", "10", "3"] in lines
    assert any(line[0] == "last trained token" and line[1] == "'<|im_end|>' 100%" for line in lines)
    assert re.search(r"^ +\d+ - \d+  #+ \d+$", out, re.MULTILINE)
    assert out.endswith(f"next:\n  peftcli train {recipe}\n")


def test_progress_is_on_stderr(cli: Callable, recipe: Path) -> None:
    ran = cli("inspect", recipe)
    assert "reading the data" in ran.err
    assert "looking at 10 examples" in ran.err
    assert "reading the data" not in ran.out


def test_foreign_text_cannot_steer_the_terminal(cli: Callable, tmp_path: Path) -> None:
    hostile = "\x1b]0;x\x07\u202eevil [[not trained]] \x9b31m"
    path = write_recipe(tmp_path, rows=[chat(hostile, hostile), *MESSAGES])
    out = cli("inspect", path, "--rows", 1).out
    assert "\\x1b]0;x\\x07\\u202eevil \\[[not trained\\]] \\x9b31m" in out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)


def test_borders_of_tokens_on_request(cli: Callable, recipe: Path) -> None:
    plain, bordered = (cli("inspect", recipe, "--rows", 1, *more).out for more in ((), ("--tokens",)))
    assert "\u00a6" not in plain
    assert "<|im_start|>\u00a6" in bordered
    assert bordered.replace("\u00a6", "") == plain


def test_a_cut_row_says_what_it_lost(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=[chat("Tell all.", "winter tea " * 60), *MESSAGES])
    out = cli("inspect", path, "--rows", 1).out
    found = re.search(r"--- cut here: (\d+) tokens are missing, (\d+) of them trained ---", out)
    assert found
    assert int(found[1]) > int(found[2]) > 0


def test_a_split_row_says_which_part_it_is(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=[chat("Tell all.", "winter tea " * 60), *MESSAGES])
    out = cli("inspect", path, "dataset.overlong=split", "--row", f"{tmp_path}/train.jsonl:1").out
    heads = [line for line in out.splitlines() if line.startswith("===")]
    assert [re.search(r"part (\d) of (\d)", line).groups() for line in heads] == [
        (str(at + 1), str(len(heads))) for at in range(len(heads))
    ]
    assert len(heads) > 1


def test_a_very_long_row_is_shortened_in_its_middle(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftcli.cli.inspect_output._MAX_TOKENS", 10)
    path = write_recipe(tmp_path, rows=[chat("sun " * 30 + "?", "tea"), *MESSAGES])
    out = cli("inspect", path, "--rows", 1).out
    assert re.search(r"^--- \d+ tokens are not shown; ", out, re.MULTILINE)
    assert "[[tea<|im_end|>]]" in out


@pytest.mark.parametrize("place", ["{folder}/train.jsonl:2", "train.jsonl:2", "1"])
def test_one_row_by_its_place_or_number(cli: Callable, recipe: Path, place: str) -> None:
    found = look(cli, recipe, "--row", place.format(folder=recipe.parent))
    assert [row["index"] for row in found["rows"]] == [1]
    assert MESSAGES[1]["messages"][0]["content"] in found["rows"][0]["text"]


def test_a_row_by_its_line_or_by_its_number(cli: Callable, recipe: Path) -> None:
    one, two, three = map(json.dumps, MESSAGES[:3])
    (recipe.parent / "rows.json").write_text(f"[{one}, {two},\n{three}]")
    for place, number in {"rows.json row 2": 1, "rows.json:2": 2}.items():
        found = look(cli, recipe, f"dataset.train={recipe.parent}/rows.json", "--row", place)
        assert [row["index"] for row in found["rows"]] == [number]


def test_an_evaluation_row_by_its_place(cli: Callable, recipe: Path) -> None:
    out = cli("inspect", recipe, "--row", "eval.jsonl:2").out
    assert "eval.jsonl:2 (evaluation example 1): " in out
    assert MESSAGES[11]["messages"][0]["content"] in out


def test_a_file_of_that_very_name_comes_before_one_whose_name_ends_so(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, rows in (("old", MESSAGES[:2]), ("new", MESSAGES[3:6]), (".", MESSAGES[6:9])):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = "dataset: {mix: [old/rows.jsonl, new/rows.jsonl], eval: %s}\ntraining: {output_dir: out}\n"
    for name, places in (("rows.jsonl", {"rows.jsonl:2": 7, "old/rows.jsonl:2": 1}), ("null", {"rows.jsonl:3": 5})):
        Path("recipe.yaml").write_text(f"base_model: {base_folder()}\nmethod: {{type: lora}}\n" + dataset % name)
        for place, number in places.items():
            assert MESSAGES[number]["messages"][0]["content"] in cli("inspect", "recipe.yaml", "--row", place).out
    assert (
        "rows.jsonl:2 may be of new/rows.jsonl, old/rows.jsonl"
        in cli("inspect", "recipe.yaml", "--row", "rows.jsonl:2").err
    )


def test_a_row_that_is_not_there_or_not_used(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, rows=[MESSAGES[0], {"messages": 4}, *MESSAGES[1:]])
    for place, message in {
        "train.jsonl:99": "no row train.jsonl:99",
        "none.jsonl:1": "no row none.jsonl:1",
        "99": "no example 99: there are 9",
        "first": "'first' is neither",
        "9" * 5000: "99' is neither",
        "train.jsonl:" + "9" * 5000: "99' is neither",
        "train.jsonl:2": "messages: expected a list",
    }.items():
        ran = cli("inspect", path, "dataset.on_bad_row=skip", "--row", place)
        assert ran.code == 2, place
        assert message in ran.err


def test_an_encoder_decoder_shows_input_and_answer(cli: Callable, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, base_folder("t5", chat=False), PROMPTS)
    path.write_text(path.read_text().replace("causal_lm", "seq2seq_lm"))
    ran = cli("inspect", path, "--rows", 1)
    assert ran.code == 0, ran.err
    prompt, completion = PROMPTS[0].values()
    assert f"input:\n{prompt}" in ran.out
    assert re.search(rf"answer:\n\[\[{completion}.*\]\]", ran.out)
    assert "the same with packing" not in ran.out
    found = look(cli, path)
    assert found["audit"]["batches"]["efficiency"]["packed"] is None
    assert found["audit"]["batches"]["tokens_per_epoch"] == found["audit"]["train"]["tokens"]
    assert found["audit"]["train"]["targets"] == sum(
        len(row["labels"]) for row in look(cli, path, "--rows", 99)["rows"]
    )


def test_several_sources_are_listed(cli: Callable, recipe: Path) -> None:
    write_rows(recipe.parent / "more.jsonl", MESSAGES[:4])
    text = recipe.read_text().replace(
        f"train: {recipe.parent}/train.jsonl",
        f"mix: [{{train: {recipe.parent}/train.jsonl}}, {{train: {recipe.parent}/more.jsonl}}]",
    )
    recipe.write_text(text)
    out = cli("inspect", recipe, "--rows", 0).out
    assert re.search(rf"{recipe.parent}/more.jsonl +4 +4 ", out)
    assert "exact_duplicates: 4 of 14 rows" in out


def test_colours_on_a_terminal(cli: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    def drawn(stderr: bool = False) -> Console:
        return Console(stderr=stderr, force_terminal=True, color_system="standard", highlight=False, width=100)

    monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setattr(console, "rich_console", drawn)
    out = cli("inspect", recipe, "--rows", 1).out
    # the style of each piece begins and ends with it
    trained = "".join(re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out.split("===")[1]))
    assert trained == MESSAGES[0]["messages"][1]["content"]
    assert "\x1b[1;7;32m<|im_end|>\x1b[0m" in out
    assert "\x1b[2;7m<|im_start|>\x1b[0m" in out
    assert "\u2588" in out
    assert "[[" not in out


@pytest.mark.parametrize("name", ["recipe.yaml", ".", "page"])
def test_a_page_replaces_nothing_that_is_no_page(cli: Callable, recipe: Path, name: str) -> None:
    before = recipe.read_bytes()
    ran = cli("inspect", recipe, "--html", recipe.parent / name)
    assert ran.code == 2
    assert "name a file that ends in .html" in ran.err
    assert recipe.read_bytes() == before
