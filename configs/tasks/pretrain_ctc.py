"""Pretrain a small W2V-BERT that writes down, letter by letter, what two voices of flite say.

    python configs/tasks/pretrain_ctc.py data/spoken-phrases/phrases.npz models/ctc-flite   # 7 minutes on two cores

It is trained from nothing with CTC (https://doi.org/10.1145/1143844.1143891). The folder holds the model, its feature
extractor and its letters. A folder that exists is left alone.
"""

from __future__ import annotations

import json
import string
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import soxr
import torch
from torch.nn import functional as F
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2CTCTokenizer

from peftcli.demos.pretrain import fit

SEED = 0
EPOCHS = 8
BATCH = 32
LEARNING_RATE = 2e-3
HEARD, SPOKEN = 16_000, 8000
"""Samples of a second that the model hears, and that the clips have."""
BLANK, WORDS = "<pad>", "|"
OUTPUTS = [BLANK, WORDS, "'", *string.ascii_lowercase]
VOICES = ("slt", "rms")
"""A woman and a man: two voices are learnt in fewer steps than all four."""
BUCKET = 20
"""Batches whose clips are sorted by length together."""


def main() -> None:
    """Train, and save model, feature extractor and letters."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_ctc.py PHRASES.npz FOLDER")
    folder = Path(sys.argv[2])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    extractor = SeamlessM4TFeatureExtractor(sampling_rate=HEARD)
    features, labels = read(Path(sys.argv[1]), extractor)
    tell = partial(print, "pretrain:", flush=True)
    tell(f"{len(features)} clips")
    torch.manual_seed(SEED)
    model = Wav2Vec2BertForCTC._from_config(
        Wav2Vec2BertConfig(
            vocab_size=len(OUTPUTS),
            hidden_size=144,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=432,
            feature_projection_input_dim=extractor.feature_size * extractor.stride,
            conv_depthwise_kernel_size=15,
            position_embeddings_type="rotary",
            layerdrop=0.0,
            mask_time_prob=0.05,
            mask_feature_prob=0.1,
            mask_feature_length=10,
            pad_token_id=OUTPUTS.index(BLANK),
        ),
        attn_implementation="eager",  # the other takes longer for clips as short as these
    ).train()
    chosen = batches([len(each) for each in features])
    steps = EPOCHS * (len(features) // BATCH)

    def loss() -> torch.Tensor:
        batch = next(chosen)
        return loss_of(model, [features[at] for at in batch], [labels[at] for at in batch])

    fit(model.parameters(), loss, steps, LEARNING_RATE, 0.01, tell)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    tell(f"{model.num_parameters():,} parameters in {folder}")


def read(file: Path, extractor: SeamlessM4TFeatureExtractor) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Return the features (T, F) of each phrase, and the outputs that spell it."""
    phrases = np.load(file)
    sounds = np.split(phrases["sounds"], np.cumsum(phrases["lengths"])[:-1])
    chosen = np.flatnonzero(np.isin(phrases["voices"], VOICES))
    features = []
    for sound in (sounds[at] for at in chosen):
        heard = soxr.resample(sound.astype(np.float32) / 2**15, SPOKEN, HEARD)
        found = extractor(heard, sampling_rate=HEARD, return_tensors="pt")
        features.append(found.input_features[0, : int(found.attention_mask.sum())])
    texts = [text.replace(" ", WORDS) for text in phrases["texts"][chosen]]
    return features, [[OUTPUTS.index(each) for each in text] for text in texts]


def loss_of(model: Wav2Vec2BertForCTC, features: list[torch.Tensor], labels: list[list[int]]) -> torch.Tensor:
    """Return the loss of clips, divided by their letters."""
    lengths, letters = (torch.tensor([*map(len, each)]) for each in (features, labels))
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    there = torch.arange(padded.shape[1]) < lengths[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_features=padded, attention_mask=there.long()).logits
    spelled = torch.tensor([each for row in labels for each in row])
    chances = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(chances, spelled, lengths, letters, OUTPUTS.index(BLANK), reduction="sum") / letters.sum()


def batches(lengths: list[int]) -> Iterator[list[int]]:
    """Draw the numbers of the clips of each step, each clip once in an epoch; a batch has clips of similar length.

    The first epoch begins with the shortest, whose letters are found most easily.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[at : at + BATCH] for at in range(0, len(order) - BATCH + 1, BATCH))
    while True:
        order = torch.randperm(len(lengths)).tolist()
        grouped = []
        for start in range(0, len(order) - BATCH + 1, BUCKET * BATCH):
            near = sorted(order[start : start + BUCKET * BATCH], key=lengths.__getitem__)
            grouped += [near[at : at + BATCH] for at in range(0, len(near) - BATCH + 1, BATCH)]
        yield from (grouped[at] for at in torch.randperm(len(grouped)).tolist())


def tokenizer() -> Wav2Vec2CTCTokenizer:
    """Return the letters as transformers' tokenizer."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vocab.json"
        file.write_text(json.dumps({name: number for number, name in enumerate(OUTPUTS)}))
        others = dict.fromkeys(("unk_token", "bos_token", "eos_token"))
        return Wav2Vec2CTCTokenizer(str(file), pad_token=BLANK, word_delimiter_token=WORDS, **others)


if __name__ == "__main__":
    main()
