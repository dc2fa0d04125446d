"""Layouts of questions with answers, conversations, preferences, and texts to write: rows for a language model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import contents as made
from files import write_csv, write_json, write_jsonl, write_parquet, write_text, write_workbook
from kinds import ASKS, REFUSES, layout

CHATS, WRITES, PREFERS = "causal_lm", "seq2seq_lm", "preference"
BOTH = f"{CHATS} {WRITES}"


def enquiries(draw: random.Random, count: int = 160) -> list[tuple[str, str]]:
    """Questions and answers."""
    return [made.enquiry(draw) for _ in range(count)]


@layout(
    "Stanford Alpaca",
    CHATS,
    "chat",
    {"instruction": "instruction", "input": "input", "completion": "output"},
    data="alpaca_data.json",
)
def alpaca_json(folder: Path, draw: random.Random) -> None:
    rows = []
    for at, (question, answer) in enumerate(enquiries(draw)):
        whole = {"instruction": question, "input": ""}
        parted = {"instruction": f"Answer the customer number {at}.", "input": question}
        rows.append({**(parted if at % 3 == 0 else whole), "output": answer})
    write_json(folder / "alpaca_data.json", rows)


@layout(
    "Databricks Dolly 15k",
    CHATS,
    "chat",
    {"instruction": "instruction", "input": "context", "completion": "response"},
    data="databricks-dolly-15k.jsonl",
)
def dolly_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at, (question, answer) in enumerate(enquiries(draw)):
        about = made.passage(draw)[0] if at % 3 == 0 else ""
        kind = draw.choice(("open_qa", "closed_qa", "brainstorming"))
        rows.append({"instruction": question, "context": about, "response": answer, "category": kind})
    write_jsonl(folder / "databricks-dolly-15k.jsonl", rows)


@layout("ShareGPT", CHATS, "chat", {"conversations": "conversations"}, data="sharegpt.json")
def sharegpt_json(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(80):
        turns = [turn for pair in enquiries(draw, 2) for turn in pair]
        told = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
        rows.append({"id": f"QWJhYvA_{at}", "conversations": told})
    write_json(folder / "sharegpt.json", rows)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """One exchange."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@layout("OpenAI's fine-tuning file", CHATS, "chat", {"messages": "messages"}, data="train.jsonl")
def openai_jsonl(folder: Path, draw: random.Random) -> None:
    system = {"role": "system", "content": "You are the support of a shop."}
    write_jsonl(folder / "train.jsonl", [{"messages": [system, *conversation(*each)]} for each in enquiries(draw)])


@layout("SmolTalk as parquet", CHATS, "chat", {"messages": "messages"}, data="data/train-00000-of-00001.parquet")
def smoltalk_parquet(folder: Path, draw: random.Random) -> None:
    rows = [{"messages": conversation(*each), "source": "support", "full_topic": "shop"} for each in enquiries(draw)]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


@layout("OpenAssistant, a message a row", CHATS, "chat", data="oasst_trees.jsonl")
def oasst_jsonl(folder: Path, draw: random.Random) -> None:
    rows: list[dict[str, Any]] = []
    for question, answer in enquiries(draw):
        tree = f"{draw.getrandbits(128):032x}"
        more = {"message_tree_id": tree, "lang": "en", "review_result": True, "deleted": False, "rank": None}
        rows.append({"message_id": tree, "parent_id": None, "text": question, "role": "prompter", **more})
        reply = {"message_id": f"{draw.getrandbits(128):032x}", "parent_id": tree, "text": answer, "role": "assistant"}
        rows.append({**reply, **more, "rank": 0})
    write_jsonl(folder / "oasst_trees.jsonl", rows)


@layout("OpenAssistant Guanaco, transcripts", CHATS, "chat", {"text": "text"}, data="openassistant_best_replies.jsonl")
def guanaco_jsonl(folder: Path, draw: random.Random) -> None:
    rows = [{"text": f"### Human: {question}### Assistant: {answer}"} for question, answer in enquiries(draw)]
    write_jsonl(folder / "openassistant_best_replies.jsonl", rows)


@layout(
    "LLaMA-Factory with history and dataset_info.json",
    CHATS,
    "chat",
    {"instruction": "instruction", "completion": "output"},
    data="data/support.json",
)
def llama_factory_json(folder: Path, draw: random.Random) -> None:
    rows = []
    for question, answer in enquiries(draw):
        before = [list(pair) for pair in enquiries(draw, draw.randrange(2))]
        row = {"instruction": question, "input": "", "output": answer, "system": "You are the support of a shop."}
        rows.append({**row, "history": before})
    write_json(folder / "data" / "support.json", rows)
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    info = {"file_name": "support.json", "columns": {**columns, "history": "history"}}
    write_json(folder / "data" / "dataset_info.json", {"support": info})


@layout("axolotl's input_output", CHATS, "chat", data="output.jsonl")
def axolotl_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for question, answer in enquiries(draw):
        start = {"label": False, "text": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"}
        rows.append({"segments": [start, {"label": True, "text": f"{answer}<|im_end|>\n"}]})
    write_jsonl(folder / "output.jsonl", rows)


def questions(draw: random.Random, one: str, other: str) -> list[dict[str, str]]:
    """A table of questions and answers, with letters that are not ASCII."""
    return [{one: question, other: f"{answer} Très bien, à bientôt."} for question, answer in enquiries(draw)]


QUESTION = {"prompt": "Question", "completion": "Answer"}


@layout("Excel's CSV: semicolons, cp1252", CHATS, "chat", QUESTION, data="FAQ.csv")
def faq_excel_csv(folder: Path, draw: random.Random) -> None:
    write_csv(folder / "FAQ.csv", questions(draw, "Question", "Answer"), delimiter=";", encoding="cp1252")


@layout("Excel's Unicode text: tabs, UTF-16", CHATS, "chat", QUESTION, data="FAQ.csv")
def faq_utf16_csv(folder: Path, draw: random.Random) -> None:
    write_csv(folder / "FAQ.csv", questions(draw, "Question", "Answer"), delimiter="\t", encoding="utf-16")


@layout("A workbook of questions and answers", CHATS, "chat", QUESTION, data="FAQ.xlsx")
def faq_xlsx(folder: Path, draw: random.Random) -> None:
    write_workbook(folder / "FAQ.xlsx", questions(draw, "Question", "Answer"))


@layout("GSM8K", CHATS, "chat", {"prompt": "question", "completion": "answer"}, data="train.jsonl test.jsonl")
def gsm8k_jsonl(folder: Path, draw: random.Random) -> None:
    for part in ("train", "test"):
        rows = []
        for _ in range(160):
            a, b = draw.randrange(2, 90), draw.randrange(2, 90)
            place, thing = draw.choice(made.PLACES), made.headline(draw, "Business").lower()
            question = f"A shop in {place} sold {a} {thing} and then {b} more. How many in total?"
            rows.append({"question": question, "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"})
        write_jsonl(folder / f"{part}.jsonl", rows)


@layout(
    "CodeSearchNet's functions", CHATS, "chat", {"prompt": "docstring", "completion": "code"}, data="python.parquet"
)
def docstrings_parquet(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(120):
        place, number = draw.choice(made.PLACES), draw.randrange(1000)
        words = made.headline(draw, "Sci/Tech").lower().split()
        name = "_".join(words[:2])
        told = f"Return the {' '.join(words)} of {place} number {number}."
        rows.append({"docstring": told, "code": f"def {name}():\n    return find({place!r}, {number})\n"})
    write_parquet(folder / "python.parquet", rows)


# Texts


@layout("C4 as JSON lines", CHATS, "chat", {"text": "text"}, data="c4-train.00000-of-01024.json.gz")
def c4_jsonl(folder: Path, draw: random.Random) -> None:
    pages = made.chapters(draw)
    rows = [
        {"text": next(pages), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{at}"}
        for at in range(60)
    ]
    path = folder / "c4-train.00000-of-01024.json.gz"
    write_jsonl(path, rows)


@layout("TinyStories, one text file", CHATS, "chat", {"text": "text"}, data="TinyStories-train.txt")
def tiny_stories_txt(folder: Path, draw: random.Random) -> None:
    stories = [f"Once upon a time, {made.opinion(draw, 1)}\n{made.feeling(draw, ['joy'])}.\n" for _ in range(150)]
    write_text(folder / "TinyStories-train.txt", "<|endoftext|>\n".join(stories))


@layout("Books of Project Gutenberg", CHATS, "chat", {"text": "text"}, data="books")
def books_txt(folder: Path, draw: random.Random) -> None:
    pages = made.chapters(draw)
    for at in range(6):
        text = "\n\n".join(next(pages) for _ in range(6))
        write_text(folder / "books" / f"pg{1000 + at}.txt", f"The Project Gutenberg eBook of Volume {at}\n\n{text}\n")


# Preferences


@layout("Anthropic's hh-rlhf", PREFERS, "chat", {"chosen": "chosen", "rejected": "rejected"}, data="train.jsonl.gz")
def hh_rlhf(folder: Path, draw: random.Random) -> None:
    rows = []
    for question, answer in enquiries(draw, 100):
        start = f"\n\nHuman: {question}\n\nAssistant: "
        rows.append({"chosen": start + answer, "rejected": start + f"No. {made.opinion(draw, -1)}"})
    write_jsonl(folder / "train.jsonl.gz", rows)


@layout(
    "UltraFeedback binarised",
    PREFERS,
    "chat",
    {"chosen": "chosen", "rejected": "rejected"},
    {"chosen": "chosen", "rejected": "rejected", "prompt": "prompt"},
    data="train_prefs.parquet",
)
def ultrafeedback_parquet(folder: Path, draw: random.Random) -> None:
    rows = []
    for question, answer in enquiries(draw, 100):
        bad, good = conversation(question, f"No. {made.opinion(draw, -1)}"), conversation(question, answer)
        row = {"prompt": question, "prompt_id": f"{draw.getrandbits(128):x}", "chosen": good, "rejected": bad}
        rows.append({**row, "messages": good, "score_chosen": 8.5, "score_rejected": draw.choice((2.0, 4.5))})
    write_parquet(folder / "train_prefs.parquet", rows)


@layout("Stanford Human Preferences", PREFERS, "chat", data="askbaking/train.json")
def shp_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at, (question, answer) in enumerate(enquiries(draw, 100)):
        first = draw.randrange(2)
        other = made.opinion(draw, -1)
        scores = {"score_A": 20 if first else 3, "score_B": 3 if first else 20}
        ids = {"post_id": f"p{at}", "domain": "askbaking_train", "upvote_ratio": 0.98}
        told = {"human_ref_A": answer if first else other, "human_ref_B": other if first else answer}
        rows.append({**ids, "history": question, **told, "labels": first, **scores, "score_ratio": 6.7})
    write_jsonl(folder / "askbaking" / "train.json", rows)


@layout(
    "TRL's KTO data",
    PREFERS,
    "chat",
    {"prompt": "prompt", "completion": "completion", "label": "label"},
    data="train.jsonl",
)
def kto_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for question, answer in enquiries(draw, 120):
        good = draw.random() < 0.5
        rows.append({"prompt": question, "completion": answer if good else made.opinion(draw, -1), "label": good})
    write_jsonl(folder / "train.jsonl", rows)


@layout(
    "Intel's Orca DPO pairs",
    PREFERS,
    "chat",
    {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    data="orca_rlhf.jsonl",
)
def orca_dpo_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at, (question, answer) in enumerate(enquiries(draw, 100)):
        system = ("", "You are an AI assistant.")[at % 2]
        row = {"system": system, "question": question, "chosen": answer}
        rows.append({**row, "rejected": f"No. {made.opinion(draw, -1)}"})
    write_jsonl(folder / "orca_rlhf.jsonl", rows)


# From one text to another


@layout(
    "CNN / Daily Mail as CSV", WRITES, "seq2seq", {"prompt": "article", "completion": "highlights"}, data="train.csv"
)
def cnn_dm_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(120):
        article, summary = made.report(draw)
        rows.append({"id": f"{draw.getrandbits(160):040x}", "article": article, "highlights": summary})
    write_csv(folder / "train.csv", rows)


@layout("XSum", WRITES, "seq2seq", {"prompt": "document", "completion": "summary"}, data="train.jsonl")
def xsum_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(120):
        article, summary = made.report(draw)
        rows.append({"document": article, "summary": summary, "id": str(35232142 + at)})
    write_jsonl(folder / "train.jsonl", rows)


@layout("SAMSum", WRITES, "seq2seq", {"prompt": "dialogue", "completion": "summary"}, data="train.json val.json")
def samsum_json(folder: Path, draw: random.Random) -> None:
    for part, count in (("train", 120), ("val", 40)):
        rows = []
        for at in range(count):
            dialogue, summary = made.chat(draw)
            rows.append({"id": str(13818513 + at), "summary": summary, "dialogue": dialogue})
        write_json(folder / f"{part}.json", rows)


@layout(
    "Two columns of a translator",
    f"{WRITES} {ASKS}",
    "seq2seq",
    {"prompt": "English", "completion": "Spanish"},
    {"prompt": "Spanish", "completion": "English"},
    data="en-es.tsv",
)
def translation_tsv(folder: Path, draw: random.Random) -> None:
    pairs = [made.translation(draw) for _ in range(160)]
    write_csv(folder / "en-es.tsv", [{"English": one, "Spanish": other} for one, other in pairs], delimiter="\t")


@layout(
    "OPUS: a column translation",
    f"{WRITES} {ASKS}",
    "seq2seq",
    {"prompt": "translation.en", "completion": "translation.es"},
    {"prompt": "translation.es", "completion": "translation.en"},
    data="opus_books.parquet",
)
def opus_parquet(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(160):
        english, spanish = made.translation(draw)
        rows.append({"id": str(at), "translation": {"en": english, "es": spanish}})
    write_parquet(folder / "opus_books.parquet", rows)


@layout("Tatoeba's pairs for Anki, without a header", f"{WRITES} {ASKS}", "seq2seq", data="spa.txt")
def tatoeba_txt(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(160):
        english, spanish = made.translation(draw)
        credit = f"CC-BY 2.0 (France) Attribution: tatoeba.org #{at} (CK) & #{at + 7000} (Ana)"
        rows.append({"en": english, "es": spanish, "credit": credit})
    write_csv(folder / "spa.txt", rows, delimiter="\t", header=False)


# What only a person can decide, and what nobody can train on


@layout("Two columns of texts without a meaning", ASKS, "chat", data="export.csv")
def two_texts_csv(folder: Path, draw: random.Random) -> None:
    pairs = [(made.opinion(draw, 1), made.opinion(draw, -1)) for _ in range(200)]
    write_csv(folder / "export.csv", [{"col_a": one, "col_b": other} for one, other in pairs])


@layout("A text and two columns of classes", ASKS, "encoder", data="feedback.csv")
def two_labels_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(240):
        good, topic = draw.randrange(2), draw.choice(sorted(made.TOPICS))
        text = f"{made.opinion(draw, 1 if good else -1)} {made.headline(draw, topic)}"
        rows.append({"feedback": text, "topic": topic, "sentiment": ("bad", "good")[good]})
    write_csv(folder / "feedback.csv", rows)


@layout("Prompts, completions and a label of 0 and 1", ASKS, "chat", data="rated.jsonl")
def rated_jsonl(folder: Path, draw: random.Random) -> None:
    rows = [{"prompt": a, "completion": b, "label": draw.randrange(2)} for a, b in enquiries(draw)]
    write_jsonl(folder / "rated.jsonl", rows)


@layout("Fisher's iris: numbers alone", REFUSES, "encoder", data="iris.csv")
def iris_csv(folder: Path, draw: random.Random) -> None:
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    rows = [
        {**{name: round(draw.uniform(0.1, 7), 1) for name in names}, "species": draw.choice(("setosa", "virginica"))}
        for _ in range(150)
    ]
    write_csv(folder / "iris.csv", rows)


@layout("A CSV with a header and no rows", REFUSES, "chat", data="empty.csv")
def empty_csv(folder: Path, draw: random.Random) -> None:
    write_text(folder / "empty.csv", "prompt,completion\n")


@layout("A PDF", REFUSES, "chat", data="manual.pdf")
def manual_pdf(folder: Path, draw: random.Random) -> None:
    (folder / "manual.pdf").write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + draw.randbytes(4000) + b"\n%%EOF\n")


@layout("A pickle of pandas", REFUSES, "encoder", data="frame.pkl")
def frame_pickle(folder: Path, draw: random.Random) -> None:
    import pickle

    (folder / "frame.pkl").write_bytes(pickle.dumps({"text": ["a"] * 50, "label": [1] * 50}))
