"""50,000 conversations, each about a small picture in a file: the start of a run, and the memory of its steps.

The pictures, a tiny LLaVA and a file of rows are made in ``--folder`` once. ``make quickstart`` fetches the tokenizer.
Each measurement prints a JSON object: seconds, CPU seconds of this process and its workers, memory of all of them.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/conversations.py --folder /tmp/images start
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/conversations.py --folder /tmp/images memory
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import TOKENIZER
from images import CLASSES, IMAGES, SIDE, first_steps, resident_with_workers, train, write_images

EARLY, LATE = 50, 500
"""Steps after which memory is measured."""
IMAGE = "<image>"
TASK = {"type": "image_text_to_text", "connector": "trained"}
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'image' %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_rows(folder: Path) -> Path:
    """A conversation about each picture."""
    pictures, rows = write_images(folder / "images", IMAGES, SIDE), folder / "conversations.jsonl"
    if not rows.exists():
        with rows.open("w", encoding="utf-8") as file:
            for number in range(IMAGES):
                path = pictures / f"class{number % CLASSES}/{number:05}.jpg"
                asked = [{"type": "image", "image": str(path)}, {"type": "text", "text": f"What is picture {number}?"}]
                answer = [{"type": "text", "text": f"It is of class {number % CLASSES}."}]
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
    return rows


def write_base(folder: Path) -> Path:
    """A LLaVA of two layers on either side; 16 tokens a picture."""
    import transformers

    if (folder / "config.json").exists():
        return folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(image_size=32, patch_size=8, vision_use_head=False, **sizes),
        text_config=transformers.LlamaConfig(
            vocab_size=len(tokenizer), tie_word_embeddings=True, num_key_value_heads=4, **sizes
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def start(folder: Path) -> dict[str, float]:
    """When the first step is done: with an empty cache, then with what the first run left there."""
    figures = dict[str, float]()
    for which, spans in first_steps(write_base(folder / "llava"), write_rows(folder), TASK):
        for name, span in zip(("data read", "model loaded, first step"), spans, strict=True):
            figures |= {
                f"{which}: {name}, {unit}": round(took, 1) for unit, took in zip(("s", "CPU s"), span, strict=True)
            }
    return figures


def memory(folder: Path) -> dict[str, float]:
    """Resident memory of this process and its workers, in MiB, early and late."""
    from peftcli.train.events import Stepped

    figures = dict[str, float]()

    def note(event: Any) -> None:
        if isinstance(event, Stepped) and event.result.step in (EARLY, LATE):
            figures[f"MiB after step {event.result.step}"] = round(resident_with_workers() / 2**20, 1)

    base, rows = write_base(folder / "llava"), write_rows(folder)
    train(base, rows, note, TASK, max_steps=LATE + 1, per_device_train_batch_size=8)
    return figures


def main() -> None:
    """Run one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=["start", "memory"])
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    print(json.dumps({"start": start, "memory": memory}[options.measure](options.folder)))


if __name__ == "__main__":
    main()
