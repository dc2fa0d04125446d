"""The language of texts, by their script and their commonest words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_SCRIPTS = (
    ("ja", "\u3040-\u30ff"),
    ("ko", "\uac00-\ud7af\u1100-\u11ff"),
    ("zh", "\u3400-\u9fff"),
    ("ar", "\u0600-\u06ff"),
    ("hi", "\u0900-\u097f"),
    ("he", "\u0590-\u05ff"),
    ("th", "\u0e00-\u0e7f"),
    ("el", "\u0370-\u03ff"),
    ("ru", "\u0400-\u04ff"),
)
"""Language -> the letters of its script; of Cyrillic and Arabic ones the language with the most speakers."""
_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in _SCRIPTS}
_WORDS = {
    "en": "the of and to in is that it for was on with as this are be you have not but they i my at so what",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an ich sehr war",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il je très",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más pero muy",
    "it": "di e il la che in un a per è una sono con non si da del le dei come più ma nel molto",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas muito",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij ik zeer",
    "pl": "i w na z się nie do to że jest o jak po co ale od za przez dla był bardzo",
    "sv": "och i att en det som på är av för med den till inte har om ett var men jag mycket",
    "tr": "ve bir bu da için ile çok olarak ne daha gibi olan kadar ama ben en değil var",
}
_KNOWN = {name: frozenset(words.split()) for name, words in _WORDS.items()}
_MOST = 200_000


def language_of(texts: Iterable[str]) -> str | None:
    """Return the code of the language of most of the texts, or None if it is not found."""
    some, size = list[str](), 0
    for text in texts:
        some.append(text[:2000])
        size += len(some[-1])
        if size > _MOST:
            break
    whole = " ".join(some)
    letters = sum(char.isalpha() for char in whole)
    for name, found in _LETTERS.items():
        if letters and len(found.findall(whole)) > (0.1 if name == "ja" else 0.4) * letters:
            return name
    words = Counter(re.findall(r"[^\W\d_]+", whole.lower()))
    total = sum(words.values())
    scores = {name: sum(words[word] for word in known) for name, known in _KNOWN.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if total >= 20 and scores[best] > 0.1 * total else None
