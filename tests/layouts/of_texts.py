"""Layouts of texts with classes, scores, tags, answers or neighbours: rows for an encoder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import contents as made
from files import write_csv, write_json, write_jsonl, write_parquet, write_text, write_workbook
from kinds import layout

CLASSES, TAGS, ANSWERS = "sequence_classification", "token_classification", "question_answering"
EMBEDS = "feature_extraction"
STARS = {1: -1, 2: -1, 3: 0, 4: 1, 5: 1}


def opinions(draw: random.Random, count: int = 240) -> list[tuple[str, int]]:
    """Reviews, and 1 for the good ones."""
    return [(made.opinion(draw, 1 if good else -1), good) for good in (draw.randrange(2) for _ in range(count))]


def stories(draw: random.Random, count: int = 320) -> list[tuple[str, str]]:
    """Sentences of newspapers, and their topics."""
    topics = sorted(made.TOPICS)
    return [(made.news(draw, topic), topic) for topic in (draw.choice(topics) for _ in range(count))]


@layout("IMDB 50K as a CSV of Kaggle", CLASSES, "encoder", {"text": "review", "label": "sentiment"}, data="IMDB.csv")
def imdb_csv(folder: Path, draw: random.Random) -> None:
    rows = [
        {"review": f"{text}<br /><br />{made.opinion(draw, 0)}", "sentiment": ("negative", "positive")[good]}
        for text, good in opinions(draw)
    ]
    write_csv(folder / "IMDB.csv", rows)


@layout("aclImdb, a text file a review", CLASSES, "encoder", {"text": "text", "label": "label"}, data="aclImdb/train")
def imdb_folders(folder: Path, draw: random.Random) -> None:
    for part in ("train", "test"):
        for at, (text, good) in enumerate(opinions(draw, 120)):
            name = f"{at}_{draw.randrange(7, 11) if good else draw.randrange(1, 5)}.txt"
            write_text(folder / "aclImdb" / part / ("neg", "pos")[good] / name, text)


@layout(
    "AG News as CSV",
    CLASSES,
    "encoder",
    {"text": "Description", "label": "Class Index"},
    {"text": "Title", "second": "Description", "label": "Class Index"},
    data="train.csv",
)
def ag_news_csv(folder: Path, draw: random.Random) -> None:
    for part in ("train", "test"):
        rows = [
            {
                "Class Index": sorted(made.TOPICS).index(topic) + 1,
                "Title": made.headline(draw, topic),
                "Description": text,
            }
            for text, topic in stories(draw)
        ]
        write_csv(folder / f"{part}.csv", rows)


@layout("SST-2 as GLUE's TSV", CLASSES, "encoder", {"text": "sentence", "label": "label"}, data="SST-2/train.tsv")
def sst2_tsv(folder: Path, draw: random.Random) -> None:
    for part in ("train", "dev"):
        rows = [{"sentence": text.lower() + " ", "label": good} for text, good in opinions(draw)]
        write_csv(folder / "SST-2" / f"{part}.tsv", rows, delimiter="\t")
    rows = [{"index": at, "sentence": text.lower()} for at, (text, _) in enumerate(opinions(draw, 60))]
    write_csv(folder / "SST-2" / "test.tsv", rows, delimiter="\t")


@layout(
    "MNLI of GLUE as JSON lines",
    CLASSES,
    "encoder",
    {"text": "premise", "second": "hypothesis", "label": "label"},
    data="train.jsonl",
)
def mnli_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(240):
        premise, follows = made.claim(draw)
        label = draw.randrange(3)
        rows.append({"premise": premise, "hypothesis": [*follows.values()][label], "label": label, "idx": at})
    write_jsonl(folder / "train.jsonl", rows)


@layout(
    "SNLI 1.0 as JSON lines",
    CLASSES,
    "encoder",
    {"text": "sentence1", "second": "sentence2", "label": "gold_label"},
    data="snli_1.0_train.jsonl",
)
def snli_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(240):
        premise, follows = made.claim(draw)
        label = draw.choice(sorted(follows))
        rows.append(
            {
                "annotator_labels": [label],
                "captionID": f"{at // 3}.jpg#{at % 3}",
                "gold_label": label,
                "pairID": f"{at // 3}.jpg#{at % 3}r1{label[0]}",
                "sentence1": premise,
                "sentence1_parse": f"(ROOT (S {premise}))",
                "sentence2": follows[label],
                "sentence2_parse": f"(ROOT (S {follows[label]}))",
            }
        )
    write_jsonl(folder / "snli_1.0_train.jsonl", rows)


def scored(draw: random.Random, count: int = 200) -> list[tuple[str, str, float]]:
    """Pairs of sentences, and how near they are: 0 to 5."""
    rows = []
    for _ in range(count):
        alike = draw.randrange(2)
        one, other = made.twin(draw, bool(alike))
        rows.append((one, other, round(draw.uniform(3.4, 5) if alike else draw.uniform(0, 1.4), 2)))
    return rows


@layout(
    "STS-B of GLUE as JSON lines",
    f"{CLASSES} {EMBEDS}",
    "encoder",
    {"text": "sentence1", "second": "sentence2", "label": "label"},
    {"text": "sentence1", "second": "sentence2", "score": "label"},
    data="stsb.jsonl",
)
def stsb_jsonl(folder: Path, draw: random.Random) -> None:
    rows = [
        {"sentence1": a, "sentence2": b, "label": score, "idx": at} for at, (a, b, score) in enumerate(scored(draw))
    ]
    write_jsonl(folder / "stsb.jsonl", rows)


@layout(
    "CoLA as published, without a header",
    CLASSES,
    "encoder",
    {"text": "column_4", "label": "column_2"},
    data="in_domain_train.tsv",
)
def cola_tsv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(240):
        words, fine = made.sentence(draw)[0], draw.randrange(2)
        if not fine:
            words = [words[-1], *words[:-1]]
        rows.append({"source": "gj04", "label": fine, "star": "" if fine else "*", "sentence": " ".join(words)})
    write_csv(folder / "in_domain_train.tsv", rows, delimiter="\t", header=False)


@layout("Yelp's review.json", CLASSES, "encoder", {"text": "text", "label": "stars"}, data="review.json")
def yelp_jsonl(folder: Path, draw: random.Random) -> None:
    rows: list[dict[str, Any]] = []
    for _ in range(300):
        stars = draw.randrange(1, 6)
        ids = {f"{name}_id": f"{draw.getrandbits(100):x}" for name in ("review", "user", "business")}
        votes = {name: draw.randrange(4) for name in ("useful", "funny", "cool")}
        text = made.opinion(draw, STARS[stars])
        rows.append({**ids, "stars": float(stars), **votes, "text": text, "date": f"2018-07-{draw.randrange(10, 30)}"})
    write_jsonl(folder / "review.json", rows)


TOXIC = {"toxic": made.EMOTIONS["anger"], "threat": made.EMOTIONS["fear"], "insult": ["idiot", "moron", "fool"]}


@layout(
    "Toxic Comment Classification of Kaggle",
    CLASSES,
    "encoder",
    {"text": "comment_text", "labels": [*TOXIC]},
    data="train.csv",
)
def toxic_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(300):
        labels = {name: int(draw.random() < 0.3) for name in TOXIC}
        said = [draw.choice(words) for name, words in TOXIC.items() if labels[name]]
        text = f'"{made.opinion(draw, 0)}\n\n{" ".join(said)} {draw.choice(made.manual())[:60]}"'
        rows.append({"id": f"{draw.getrandbits(64):016x}", "comment_text": text, **labels})
    write_csv(folder / "train.csv", rows)


@layout("GoEmotions as parquet", CLASSES, "encoder", {"text": "text", "labels": "labels"}, data="train.parquet")
def go_emotions_parquet(folder: Path, draw: random.Random) -> None:
    from datasets import ClassLabel, Features, List, Value

    names, rows = sorted(made.EMOTIONS), []
    for _ in range(240):
        some = draw.sample(names, 1 + (draw.random() < 0.3))
        labels = sorted(names.index(name) for name in some)
        rows.append({"text": made.feeling(draw, some), "labels": labels, "id": f"e{draw.getrandbits(28):x}"})
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=names)), "id": Value("string")})
    write_parquet(folder / "train.parquet", rows, features)


@layout(
    "Amazon reviews as TSV",
    CLASSES,
    "encoder",
    {"text": "review_body", "label": "star_rating"},
    {"text": "review_headline", "second": "review_body", "label": "star_rating"},
    data="amazon_reviews_us_Toys.tsv",
)
def amazon_reviews_tsv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(300):
        stars = draw.randrange(1, 6)
        rows.append(
            {
                "marketplace": "US",
                "customer_id": draw.randrange(10**7, 10**8),
                "review_id": f"R{draw.getrandbits(60):X}",
                "product_id": f"B{draw.getrandbits(36):X}",
                "product_parent": draw.randrange(10**8, 10**9),
                "product_title": f"{draw.choice(made.PLACES)} Toy {draw.randrange(10**4)}",
                "product_category": "Toys",
                "star_rating": stars,
                "helpful_votes": draw.randrange(4),
                "total_votes": draw.randrange(4, 9),
                "vine": "N",
                "verified_purchase": draw.choice("YN"),
                "review_headline": made.opinion(draw, STARS[stars]).split(",")[0],
                "review_body": made.opinion(draw, STARS[stars]),
                "review_date": f"2015-08-{draw.randrange(10, 31)}",
            }
        )
    write_csv(folder / "amazon_reviews_us_Toys.tsv", rows, delimiter="\t")


def messages(draw: random.Random) -> list[tuple[str, str]]:
    """Short messages, and ham or spam."""
    rows = []
    for _ in range(240):
        if draw.random() < 0.3:
            prize = f"{draw.choice(made.PLACES)} prize of £{draw.randrange(900)}"
            text = f"WINNER! Call 09{draw.randrange(10**8)} to claim your {prize}"
            rows.append((f"{text} {made.headline(draw, 'Business')}", "spam"))
        else:
            rows.append((f"{made.feeling(draw, ['joy'])} {draw.randrange(99)}", "ham"))
    return rows


@layout(
    "SMS Spam Collection of UCI", CLASSES, "encoder", {"text": "text", "label": "label"}, data="SMSSpamCollection.txt"
)
def sms_spam_txt(folder: Path, draw: random.Random) -> None:
    rows = [{"label": label, "text": text} for text, label in messages(draw)]
    write_csv(folder / "SMSSpamCollection.txt", rows, delimiter="\t", header=False)


@layout("SMS Spam of Kaggle: v1, v2, cp1252", CLASSES, "encoder", {"text": "v2", "label": "v1"}, data="spam.csv")
def sms_spam_csv(folder: Path, draw: random.Random) -> None:
    rows = [{"v1": label, "v2": text, "": "", " ": "", "  ": ""} for text, label in messages(draw)]
    write_csv(folder / "spam.csv", rows, encoding="cp1252", header=False)
    text = (folder / "spam.csv").read_bytes()
    (folder / "spam.csv").write_bytes(b"v1,v2,,,\n" + text)


@layout("fastText's cooking.stackexchange", CLASSES, "encoder", {"text": "text", "label": "label"}, data="cooking.txt")
def fasttext_txt(folder: Path, draw: random.Random) -> None:
    lines = []
    for _ in range(240):
        some = draw.sample(sorted(made.EMOTIONS), 1 + (draw.random() < 0.3))
        lines.append(" ".join([*(f"__label__{name}" for name in some), made.feeling(draw, some)]))
    write_text(folder / "cooking.txt", "\n".join(lines) + "\n")


@layout("Disaster Tweets of Kaggle", CLASSES, "encoder", {"text": "text", "label": "target"}, data="train.csv")
def disaster_tweets_csv(folder: Path, draw: random.Random) -> None:
    for part in ("train", "test"):
        rows = []
        for at in range(260):
            real = draw.randrange(2)
            text = made.news(draw, "World") if real else made.feeling(draw, ["joy"])
            place = draw.choice((*made.PLACES, "", ""))
            row = {"id": at * 3, "keyword": draw.choice(("ablaze", "crash", "fire", "")), "location": place}
            rows.append({**row, "text": f"{text} #{at}", **({"target": real} if part == "train" else {})})
        write_csv(folder / f"{part}.csv", rows)
    write_csv(folder / "sample_submission.csv", [{"id": at, "target": 0} for at in range(30)])


@layout("20 Newsgroups by date", CLASSES, "encoder", {"text": "text", "label": "label"}, data="20news-bydate-train")
def newsgroups_folders(folder: Path, draw: random.Random) -> None:
    groups = {"talk.politics.misc": "World", "rec.sport.hockey": "Sports", "sci.electronics": "Sci/Tech"}
    for part in ("train", "test"):
        for group, topic in groups.items():
            for _ in range(50):
                text = "\n".join(made.news(draw, topic) for _ in range(2))
                post = f"From: {draw.getrandbits(30):x}@example.org\nSubject: {made.headline(draw, topic)}\n\n{text}\n"
                write_text(folder / f"20news-bydate-{part}" / group / str(draw.randrange(10**5)), post, "latin-1")


@layout("Banking77 as CSV", CLASSES, "encoder", {"text": "text", "label": "category"}, data="train.csv")
def banking77_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for text, topic in stories(draw):
        rows.append({"text": f"{text}?", "category": f"ask_about_{topic.lower().replace('/', '_')}"})
    write_csv(folder / "train.csv", rows)


@layout(
    "Quora Question Pairs of Kaggle",
    f"{CLASSES} {EMBEDS}",
    "encoder",
    {"text": "question1", "second": "question2", "label": "is_duplicate"},
    {"text": "question1", "second": "question2", "score": "is_duplicate"},
    data="train.csv",
)
def quora_pairs_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(240):
        alike = draw.randrange(2)
        one, other = made.twin(draw, bool(alike))
        row = {"id": at, "qid1": 2 * at + 1, "qid2": 2 * at + 2}
        rows.append({**row, "question1": one, "question2": other, "is_duplicate": alike})
    write_csv(folder / "train.csv", rows)


@layout(
    "Davidson's hate speech and offensive language",
    CLASSES,
    "encoder",
    {"text": "tweet", "label": "class"},
    data="labeled_data.csv",
)
def offensive_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(300):
        kind = draw.randrange(3)
        votes = [draw.choice((0, 0, 1)) for _ in range(3)]
        votes[kind] = 3 - sum(votes[:kind] + votes[kind + 1 :])
        text = made.feeling(draw, [("anger", "fear", "joy")[kind]])
        columns = dict(zip(("hate_speech", "offensive_language", "neither"), votes, strict=True))
        rows.append({"": at, "count": 3, **columns, "class": kind, "tweet": f"!!! RT @user{at}: {text}"})
    write_csv(folder / "labeled_data.csv", rows)


@layout("CommonLit Readability of Kaggle", CLASSES, "encoder", {"text": "excerpt", "label": "target"}, data="train.csv")
def readability_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(200):
        hard = draw.random()
        words = [draw.choice(made.TOPICS["Sci/Tech"] if draw.random() < hard else made.PLACES) for _ in range(24)]
        error = round(draw.uniform(0.4, 0.6), 8)
        row = {"id": f"{draw.getrandbits(36):x}", "url_legal": "", "license": "", "excerpt": " ".join(words)}
        rows.append({**row, "target": round(3 * (0.5 - hard), 8), "standard_error": error})
    write_csv(folder / "train.csv", rows)


@layout("Label Studio, texts with a choice", CLASSES, "encoder", data="project-1-at-2024-05-01.json")
def label_studio_choices(folder: Path, draw: random.Random) -> None:
    tasks = []
    for at, (text, good) in enumerate(opinions(draw)):
        value = {"choices": [("Negative", "Positive")[good]]}
        result = {"value": value, "id": f"c{at}", "from_name": "sentiment", "to_name": "text", "type": "choices"}
        tasks.append({"id": at, "annotations": [studio(at, [result])], "data": {"text": text}, "project": 1})
    write_json(folder / "project-1-at-2024-05-01.json", tasks)


def studio(at: int, result: list[dict[str, Any]]) -> dict[str, Any]:
    """An annotation as Label Studio exports it."""
    return {"id": at, "completed_by": 1, "result": result, "was_cancelled": False, "lead_time": 3.1, "task": at}


@layout("Dataset.save_to_disk of IMDB", CLASSES, "encoder", {"text": "text", "label": "label"}, data="imdb")
def saved_to_disk(folder: Path, draw: random.Random) -> None:
    import datasets

    texts, labels = zip(*opinions(draw), strict=True)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": list(texts), "label": list(labels)}, features).save_to_disk(folder / "imdb")


@layout("A feather file of pandas", CLASSES, "encoder", {"text": "headline", "label": "section"}, data="news.feather")
def news_feather(folder: Path, draw: random.Random) -> None:
    import pyarrow
    import pyarrow.feather

    texts, topics = zip(*stories(draw), strict=True)
    table = pyarrow.table({"headline": list(texts), "section": list(topics)})
    pyarrow.feather.write_feather(table, folder / "news.feather")


@layout(
    "A workbook of support tickets", CLASSES, "encoder", {"text": "Message", "label": "Department"}, data="tickets.xlsx"
)
def tickets_xlsx(folder: Path, draw: random.Random) -> None:
    rows = []
    for at, (text, topic) in enumerate(stories(draw, 240)):
        rows.append({"Ticket": f"T-{at:05}", "Message": text, "Department": topic})
    write_workbook(folder / "tickets.xlsx", rows)


# Tags


@layout("CoNLL-2003", TAGS, "encoder", {"tokens": "tokens", "tags": "tags"}, data="conll2003")
def conll2003(folder: Path, draw: random.Random) -> None:
    for part, count in (("train", 160), ("valid", 40), ("test", 40)):
        lines = ["-DOCSTART- -X- -X- O", ""]
        for _ in range(count):
            words, tags = made.sentence(draw)
            kinds = ["NNP" if tag != "O" else "NN" for tag in tags]
            lines += [f"{word} {kind} B-NP {tag}" for word, kind, tag in zip(words, kinds, tags, strict=True)] + [""]
        write_text(folder / "conll2003" / f"{part}.txt", "\n".join(lines))


@layout("WNUT 17 as .bio", TAGS, "encoder", {"tokens": "tokens", "tags": "tags"}, data="wnut17train.bio")
def wnut_bio(folder: Path, draw: random.Random) -> None:
    lines = []
    for _ in range(200):
        words, tags = made.sentence(draw)
        lines += [f"{word}\t{tag.replace('PER', 'person')}" for word, tag in zip(words, tags, strict=True)] + [""]
    write_text(folder / "wnut17train.bio", "\n".join(lines))


@layout("OntoNotes 5 as JSON lines of TNER", TAGS, "encoder", {"tokens": "tokens", "tags": "tags"}, data="train.json")
def ontonotes_jsonl(folder: Path, draw: random.Random) -> None:
    names = {"O": 0, "B-PER": 1, "I-PER": 2, "B-ORG": 3, "B-LOC": 4}
    rows = []
    for _ in range(200):
        words, tags = made.sentence(draw)
        rows.append({"tokens": words, "tags": [names[tag] for tag in tags]})
    write_jsonl(folder / "train.json", rows)
    write_json(folder / "label.json", names)


@layout("Label Studio, entities", TAGS, "encoder", data="project-3.json")
def label_studio_entities(folder: Path, draw: random.Random) -> None:
    tasks = []
    for at in range(200):
        text, found = made.spans(*made.sentence(draw))
        result = [
            {
                "value": {"start": start, "end": end, "text": text[start:end], "labels": [kind]},
                "id": f"{at}-{start}",
                "from_name": "label",
                "to_name": "text",
                "type": "labels",
            }
            for start, end, kind in found
        ]
        tasks.append({"id": at, "annotations": [studio(at, result)], "data": {"text": text}, "meta": {}})
    write_json(folder / "project-3.json", tasks)


@layout("doccano, sequence labelling", TAGS, "encoder", data="all.jsonl")
def doccano_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(200):
        text, found = made.spans(*made.sentence(draw))
        rows.append({"id": at, "text": text, "label": [list(each) for each in found], "Comments": []})
    write_jsonl(folder / "all.jsonl", rows)


@layout("Prodigy's ner.manual", TAGS, "encoder", data="annotations.jsonl")
def prodigy_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(200):
        words, tags = made.sentence(draw)
        text, found = made.spans(words, tags)
        tokens, start = [], 0
        for place, word in enumerate(words):
            tokens.append({"text": word, "start": start, "end": start + len(word), "id": place, "ws": True})
            start += len(word) + 1
        spans = [
            {
                "start": first,
                "end": last,
                "token_start": next(each["id"] for each in tokens if each["start"] == first),
                "token_end": next(each["id"] for each in tokens if each["end"] == last),
                "label": kind,
            }
            for first, last, kind in found
        ]
        hashes = {"_input_hash": draw.getrandbits(31), "_task_hash": draw.getrandbits(31), "_view_id": "ner_manual"}
        rows.append({"text": text, **hashes, "tokens": tokens, "spans": spans, "answer": "accept", "_timestamp": at})
    write_jsonl(folder / "annotations.jsonl", rows)


@layout("spaCy's training data of version 2", TAGS, "encoder", data="train.json")
def spacy_json(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(200):
        text, found = made.spans(*made.sentence(draw))
        rows.append([text, {"entities": [list(each) for each in found]}])
    write_json(folder / "train.json", rows)


@layout("Annotated Corpus for NER of Kaggle, a word a row", TAGS, "encoder", data="ner_dataset.csv")
def ner_dataset_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(200):
        words, tags = made.sentence(draw)
        for place, (word, tag) in enumerate(zip(words, tags, strict=True)):
            name = "" if place else f"Sentence: {at + 1}"
            rows.append({"Sentence #": name, "Word": word, "POS": "NNP" if tag != "O" else "NN", "Tag": tag})
    write_csv(folder / "ner_dataset.csv", rows, encoding="cp1252")


# Questions about texts


def asked(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows of SQuAD."""
    rows = []
    for at in range(count):
        context, questions = made.passage(draw)
        question, answer = questions[draw.randrange(3)]
        found = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append({"id": f"{at:024x}", "title": "People", "context": context, "question": question, "answers": found})
    return rows


def squad(draw: random.Random, version: str, count: int) -> dict[str, Any]:
    """SQuAD's nested form."""
    articles = []
    for title in range(4):
        paragraphs = []
        for at in range(count):
            context, questions = made.passage(draw)
            qas: list[dict[str, Any]] = []
            for number, (question, answer) in enumerate(questions):
                gone = version == "v2.0" and number == at % 3
                answers = [] if gone else [{"text": answer, "answer_start": context.index(answer)}]
                asked = "Who sang there?" if gone else question
                row = {"question": asked, "id": f"{title}-{at}-{number}", "answers": answers}
                qas.append({**row, "is_impossible": gone} if version == "v2.0" else row)
            paragraphs.append({"qas": qas, "context": context})
        articles.append({"title": f"Article_{title}", "paragraphs": paragraphs})
    return {"version": version, "data": articles}


@layout(
    "SQuAD 1.1",
    ANSWERS,
    "encoder",
    {"question": "question", "context": "context", "answers": "answers"},
    data="train-v1.1.json",
)
def squad_json(folder: Path, draw: random.Random) -> None:
    write_json(folder / "train-v1.1.json", squad(draw, "1.1", 20))
    write_json(folder / "dev-v1.1.json", squad(draw, "1.1", 5))


@layout(
    "SQuAD 2.0, with questions without an answer",
    ANSWERS,
    "encoder",
    {"question": "question", "context": "context", "answers": "answers"},
    data="train-v2.0.json dev-v2.0.json",
)
def squad2_json(folder: Path, draw: random.Random) -> None:
    write_json(folder / "train-v2.0.json", squad(draw, "v2.0", 20))
    write_json(folder / "dev-v2.0.json", squad(draw, "v2.0", 5))


@layout(
    "SQuAD as parquet",
    ANSWERS,
    "encoder",
    {"question": "question", "context": "context", "answers": "answers"},
    data="train.parquet",
)
def squad_parquet(folder: Path, draw: random.Random) -> None:
    write_parquet(folder / "train.parquet", asked(draw, 200))


@layout(
    "SQuAD flattened to a CSV, without places",
    ANSWERS,
    "encoder",
    {"question": "question", "context": "context", "answers": "answer"},
    data="qa.csv",
)
def squad_csv(folder: Path, draw: random.Random) -> None:
    rows = [
        {"context": row["context"], "question": row["question"], "answer": row["answers"]["text"][0]}
        for row in asked(draw, 200)
    ]
    write_csv(folder / "qa.csv", rows)


# Neighbours


@layout(
    "AllNLI triplets of sentence-transformers",
    EMBEDS,
    "encoder",
    {"anchor": "anchor", "positive": "positive", "negative": "negative"},
    data="triplets.jsonl.gz",
)
def nli_triplets(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(160):
        premise, follows = made.claim(draw)
        rows.append({"anchor": premise, "positive": follows["entailment"], "negative": follows["contradiction"]})
    write_jsonl(folder / "triplets.jsonl.gz", rows)


@layout(
    "MS MARCO pairs: query and positive passage",
    EMBEDS,
    "encoder",
    {"anchor": "query", "positive": "positive"},
    data="msmarco.jsonl",
)
def msmarco_pairs(folder: Path, draw: random.Random) -> None:
    rows = []
    for _ in range(160):
        question, answer = made.enquiry(draw)
        rows.append({"query": question, "positive": f"{answer} {made.opinion(draw, 1)}"})
    write_jsonl(folder / "msmarco.jsonl", rows)


@layout(
    "STS benchmark of sentence-transformers",
    f"{EMBEDS} {CLASSES}",
    "encoder",
    {"text": "sentence1", "second": "sentence2", "score": "score"},
    {"text": "sentence1", "second": "sentence2", "label": "score"},
    data="sts.csv",
)
def sts_csv(folder: Path, draw: random.Random) -> None:
    rows = [{"sentence1": a, "sentence2": b, "score": round(score / 5, 3)} for a, b, score in scored(draw)]
    write_csv(folder / "sts.csv", rows)


@layout(
    "Quora duplicates of sentence-transformers, pairs",
    EMBEDS,
    "encoder",
    {"anchor": "anchor", "positive": "positive"},
    data="pair/train.parquet",
)
def quora_duplicates(folder: Path, draw: random.Random) -> None:
    pairs = [made.twin(draw, True) for _ in range(160)]
    write_parquet(folder / "pair" / "train.parquet", [{"anchor": one, "positive": other} for one, other in pairs])
