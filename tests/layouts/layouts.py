"""The table of layouts: name -> files, the task and the columns that a person would name."""

from __future__ import annotations

import of_chats
import of_media
import of_texts
from kinds import ASKS, LAYOUTS, REFUSES, Columns, Layout

__all__ = ["ASKS", "LAYOUTS", "REFUSES", "SOME", "Columns", "Layout", "of_chats", "of_media", "of_texts"]

SOME = (
    *("imdb_csv", "sst2_tsv", "toxic_csv", "wnut_bio", "prodigy_jsonl", "squad_csv", "dolly_jsonl", "faq_excel_csv"),
    *("orca_dpo_jsonl", "ljspeech", "kaggle_labels_csv", "images_and_masks", "two_texts_csv", "iris_csv"),
)
"""Those that the fast tests read: each way of reading once."""
