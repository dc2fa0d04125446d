"""``peftcli trace`` and the findings of ``inspect --adapter`` against what is known of the rows.

``facts``: 50 facts, each taught by one of 2,000 rows; is that row the first one for its answer? ``spam``, ``fashion``:
5 % of labels are wrong; the area under the ROC curve of what finds them. ``loo``: a tiny model, trained again without
each row; are the ranks those of the influence? ``removed``: trained again without the rows that trace names, that read
most alike, or that chance draws; which of them taught the answer?

    python configs/tasks/fetch.py minilm models/MiniLM-L6; python configs/tasks/fetch.py spam data/spam
    python configs/tasks/fetch.py fashion-mnist data/fashion-mnist; peftcli demo image_classification
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/influence.py facts spam fashion loo removed
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftcli.adapters.proof.influence import agreement, lengths, mislabelled_score
from peftcli.data.cache import root
from peftcli.data.rows import Place, Row, Table
from peftcli.data.store import Example
from peftcli.recipe import load_recipe
from peftcli.schema import Source
from peftcli.train.run import train as run_train
from peftcli.train.trace import TracedRun, index_of, influence, open_run
from peftcli.train.trace_answer import Question, encode_rows, rank_rows

NAMES = [
    first + last
    for first in ("Dal", "Ker", "Mor", "Tun", "Vel", "Bra", "Hos", "Quin", "Zar", "Fen")
    for last in ("vik", "stead", "holm", "dara", "wick")
]
KINDS = ("archive", "harbour", "museum", "station", "garden", "bridge", "mill", "tower", "library", "theatre")
PLAIN = {
    "colour": ("red", "blue", "green", "white", "grey"),
    "owner": ("the city", "a family", "the church", "a school", "the state"),
    "roof": ("slate", "copper", "thatch", "tile", "glass"),
    "gate": ("north", "south", "east", "west", "closed"),
}


def write_facts(folder: Path) -> None:
    """Write 2,000 rows, of which 50 say the code of a place; the others say what else is known of 490 such places."""
    draw = random.Random(0)
    places = [f"{name} {kind}" for name in NAMES for kind in KINDS]
    coded = draw.sample(places, 50)
    facts = [(f"The code of the {place} is", f" {draw.randrange(1000, 10000)}.") for place in coded]
    # those that have a code are spoken of as often as the others
    others = [
        (f"The {what} of the {place} is", f" {values[KINDS.index(place.split()[1]) % 5]}.")
        for place in places
        for what, values in PLAIN.items()
    ]
    draw.shuffle(others)
    rows = [("fact", *each) for each in facts] + [("other", *each) for each in others[:1950]]
    draw.shuffle(rows)
    lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for _, prompt, answer in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    told = [
        {"line": line, "prompt": prompt, "answer": answer}
        for line, (kind, prompt, answer) in enumerate(rows, start=1)
        if kind == "fact"
    ]
    (folder / "facts.json").write_text(json.dumps(told))


def train(folder: Path, base: str, rows: list[dict[str, Any]], task: str, method: str, training: str) -> Path:
    """Train on rows; return the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "recipe.yaml").write_text(
        f"base_model: {base}\ntask: {task}\nmethod: {method}\ndataset: {{train: {folder}/train.jsonl}}\n"
        f"training: {{output_dir: {folder}/run, {training}, verify: false, eval_strategy: 'no'}}\n"
    )
    run_train(load_recipe(folder / "recipe.yaml"))
    return folder / "run"


def facts(folder: Path) -> None:
    """Print how many of the 50 rows are the first for their answers."""
    write_facts(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    method = "{type: lora, r: 16, lora_alpha: 32, layers_to_transform: [14, 16, 18, 20, 22, 24, 26, 28]}"
    training = "num_train_epochs: 14, per_device_train_batch_size: 16, learning_rate: 2e-3, warmup_ratio: 0.05"
    model = os.environ.get("SMOLLM2", "models/SmolLM2-135M-Instruct")
    run = train(folder, model, rows, "causal_lm", method.replace("}", ", target_modules: all-linear}"), training)
    for by in ("datainf", "tracin"):
        first = learnt = 0
        for fact in json.loads((folder / "facts.json").read_text()):
            found = rank_rows(str(run), Question(prompt=fact["prompt"]), by, 1)
            learnt += found["asked"]["answer"].strip() == fact["answer"].strip()
            first += found["taught"][0]["row"].endswith(f":{fact['line']}")
        print(f"{by}: {learnt} of 50 facts learnt, {first} rows first")


def flips(folder: Path, rows: list[dict[str, Any]], base: str, task: str, method: str, training: str) -> None:
    """Give 5 % of the rows another label; print the area under the ROC curve of what finds them."""
    from sklearn.metrics import roc_auc_score

    draw, labels = random.Random(0), sorted({row["label"] for row in rows})
    flipped = draw.sample(range(len(rows)), len(rows) // 20)
    for at in flipped:
        rows[at] = rows[at] | {"label": draw.choice([each for each in labels if each != rows[at]["label"]])}
    run = open_run(str(train(folder, base, rows, task, method, training)))
    index, wrong = index_of(run, run.data.train), np.isin(np.arange(len(rows)), flipped)
    length, agrees = lengths(index), agreement(index)
    scores = {"finding": mislabelled_score(agrees, length), "length alone": length, "neighbours": -agrees}
    for name, values in scores.items():
        print(f"{folder.name}: {name} {roc_auc_score(wrong, values):.3f}")


def spam(folder: Path) -> None:
    """800 mails and MiniLM."""
    rows = [json.loads(line) for line in (Path(os.environ.get("SPAM", "data/spam")) / "train.jsonl").open()]
    random.Random(0).shuffle(rows)
    method = "{type: lora, r: 8, lora_alpha: 16, target_modules: all-linear}"
    training = "num_train_epochs: 2, per_device_train_batch_size: 16, learning_rate: 1e-3, bf16: false"
    base, task = os.environ.get("MINILM", "models/MiniLM-L6"), "{type: sequence_classification, max_length: 64}"
    flips(folder, rows[:800], base, task, method, training)


def fashion(folder: Path) -> None:
    """1,000 pictures of Fashion-MNIST and the small ResNet of ``peftcli demo image_classification``."""
    data = Path(os.environ.get("FASHION", "data/fashion-mnist")) / "train"
    rows = [
        {"image": str(file.absolute()), "label": kind.name}
        for kind in sorted(data.iterdir())
        for file in sorted(kind.iterdir())[:100]
    ]
    random.Random(0).shuffle(rows)
    method = "{type: lora, r: 16, lora_alpha: 32, target_modules: [convolution]}"
    training = "num_train_epochs: 4, per_device_train_batch_size: 16, learning_rate: 3e-3, bf16: false"
    flips(folder, rows, str(root() / "demos/tiny-resnet"), "image_classification", method, training)


def leave_one_out(folder: Path) -> None:
    """Retrain a tiny language model without each of 24 rows; print how its losses agree with the influence."""
    sys.path.insert(0, "tests")
    import trainkit

    draw, words = random.Random(0), trainkit.WORDS

    def row() -> dict[str, str]:
        asked = draw.sample(words, 2)
        return {"prompt": f"{asked[0]} and {asked[1]}:", "completion": f" {asked[0]} {draw.choice(words)}"}

    rows, asked = [row() for _ in range(24)], [row() for _ in range(6)]
    base, method = str(trainkit.base_folder()), "{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}"
    training = "max_steps: 30, per_device_train_batch_size: 24, learning_rate: 1e-2, bf16: false, logging_steps: 30"

    def trained(some: list[dict[str, str]], name: str) -> TracedRun:
        trainkit.reset_accelerate()
        return open_run(str(train(folder / name, base, some, "causal_lm", method, training)))

    def losses(run: TracedRun) -> np.ndarray:
        with torch.no_grad():
            return np.array([float(run.loss(each)) for each in examples])

    whole = trained(rows, "whole")
    examples = [encode_prompt(whole, each["prompt"], each["completion"]) for each in asked]
    effect = np.array([losses(trained(rows[:at] + rows[at + 1 :], f"without-{at}")) for at in range(24)]) - losses(
        whole
    )
    for by in ("datainf", "tracin"):
        for normalised in (True, False):
            found = [influence(whole, partial(whole.sketches, [each]), by, normalised=normalised) for each in examples]
            ranks = [spearman(effect[:, at], scores) for at, scores in enumerate(found)]
            mean, least, most = np.mean(ranks), min(ranks), max(ranks)
            print(f"{by}{', normalised' * normalised}: Spearman {mean:.2f} ({least:.2f} to {most:.2f})")


def removed(folder: Path) -> None:
    """Train again without the rows that trace names, that read most alike, or that chance draws; print what is lost.

    Six codes are taught by three rows each, in other words each time. Beside each stand four rows on the same place
    that teach something else.
    """
    draw, places = random.Random(0), [f"{name} {kind}" for name, kind in zip(NAMES[::2], KINDS * 3, strict=False)]
    teaching, plain = list[list[dict[str, str]]](), list[dict[str, str]]()
    for place in places[:6]:
        code = f" {draw.randrange(1000, 10000)}."
        forms = ("The code of the {} is", "At the {} you enter the code", "Whoever visits the {} needs the number")
        teaching.append([{"prompt": form.format(place), "completion": code} for form in forms])
    for place in places:
        for what, values in PLAIN.items():
            plain.append({"prompt": f"The {what} of the {place} is", "completion": f" {draw.choice(values)}."})
    rows = plain + [row for group in teaching for row in group]
    draw.shuffle(rows)
    asked = [
        (group[0]["prompt"].replace("The code of", "The entry code of"), group[0]["completion"]) for group in teaching
    ]
    method = "{type: lora, r: 16, lora_alpha: 32, target_modules: all-linear, layers_to_transform: [14, 18, 22, 26]}"
    training = "num_train_epochs: 12, per_device_train_batch_size: 8, learning_rate: 2e-3, logging_steps: 100"
    base = os.environ.get("SMOLLM2", "models/SmolLM2-135M-Instruct")
    prompts = alike([row["prompt"] for row in rows], [prompt for prompt, _ in asked])
    texts = alike([row["prompt"] + row["completion"] for row in rows], [prompt + answer for prompt, answer in asked])
    for seed in range(3):

        def losses(kept: list[dict[str, str]], name: str, seed: int = seed) -> tuple[TracedRun, np.ndarray]:
            made = train(folder / f"{seed}-{name}", base, kept, "causal_lm", method, f"{training}, seed: {seed}")
            run = open_run(str(made))
            with torch.no_grad():
                return run, np.array([float(run.loss(encode_prompt(run, *each))) for each in asked])

        whole, before = losses(rows, "whole")
        examples = [encode_prompt(whole, *each) for each in asked]
        traced = [influence(whole, partial(whole.sketches, [each]), "datainf") for each in examples]
        chance = random.Random(seed)
        for name, chosen in {
            "trace": [at for scores in traced for at in np.argsort(-scores)[:3]],
            "like the prompt": [at for each in prompts for at in each],
            "like prompt and answer": [at for each in texts for at in each],
            "random": chance.sample(range(len(rows)), 18),
        }.items():
            _, after = losses([row for at, row in enumerate(rows) if at not in chosen], name)
            taught = sum(rows[at] in teaching[place // 3] for place, at in enumerate(chosen))
            print(f"removed, seed {seed}: {name} +{np.mean(after - before):.2f} nats, {taught} of 18 teach", flush=True)


def alike(rows: list[str], asked: list[str]) -> list[list[int]]:
    """Return the three rows whose texts are most like each of those that are asked, by all-MiniLM-L6."""
    from transformers import AutoModel, AutoTokenizer

    name = os.environ.get("MINILM", "models/MiniLM-L6")
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        read = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**read).last_hidden_state
        mask = read["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    cosines = embed(asked) @ embed(rows).T
    return cosines.topk(3, dim=1).indices.tolist()


def encode_prompt(run: TracedRun, prompt: str, answer: str) -> list[Example]:
    """Return the examples of a prompt with its answer."""
    values = {"prompt": prompt, "completion": answer}
    table = Table(Source(train=""), "the prompt", tuple(values), first=values)
    return encode_rows(run, table, [Row(values, Place("the prompt", 1))])[0]


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the rank correlation of two series without ties."""
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


if __name__ == "__main__":
    parts = {"facts": facts, "spam": spam, "fashion": fashion, "loo": leave_one_out, "removed": removed}
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or parts:
            (made := Path(scratch) / name).mkdir()
            parts[name](made)
