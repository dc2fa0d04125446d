"""The table of tasks. Readable without torch: a task's module is imported when the task is opened.

A new task is one file with a subclass of ``tasks.base.Task``, a settings class, and one row here.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from peftcli.methods import METHODS
from peftcli.schema import Recipe
from peftcli.tasks import settings
from peftcli.tasks.settings import TASK_FILE as TASK_FILE

if TYPE_CHECKING:
    from peftcli.core.config import AdapterConfig
    from peftcli.models.open import OpenBase, ProcessorKind
    from peftcli.tasks.base import Task

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""Beside an adapter of a pipeline: the same LoRA as diffusers reads it."""
PIPELINE_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
"""Folders beside an adapter of a pipeline: of each adapted part the same adapter, as PEFT reads it."""


@dataclass(frozen=True)
class Variant:
    """What is different in a task's row for base models that another auto class of transformers loads."""

    auto_class: str
    setting: str
    """A setting of the task that the adapters of such base models have, and no others."""
    module: str
    processor: ProcessorKind
    usage: tuple[str, ...]


@dataclass(frozen=True)
class TaskRow:
    """One row of the table."""

    task_type: str | None
    """PEFT's name of the task, as adapter_config.json holds it; None: PEFT has none."""
    auto_class: str
    """transformers' auto class that loads the base model, or diffusers' for a pipeline."""
    settings: type
    """The dataclass of the task's settings, from ``tasks.settings``."""
    module: str
    """Module below peftcli.tasks, whose TASK is the subclass of ``Task``."""
    processor: ProcessorKind | None
    """What the base model's inputs are made with: tokenizer, image_processor, feature_extractor, processor."""
    reads: tuple[tuple[str, ...], ...]
    """Columns by which rows are known to be of this task: one of these sets must be there. What is in ``truths`` holds
    true or false."""
    pipeline_tag: str
    """The hub's name of what such a model does."""
    summary: str
    usage: tuple[str, ...]
    """Lines of Python that use a loaded ``model`` and processor once, for the model card; in them
    ``"path/to/this/adapter"`` is the adapter, and ``"<name>"`` or ``"<name: default>"`` the value of the task's setting
    of that name; a line without default is left out where that is unset."""
    asking: tuple[str, ...] = ()
    """Lines before these that make the ``inputs`` of a model that answers a text, where the form of its prompts is not
    known."""
    loading: tuple[str, ...] = ()
    """Lines of Python that load base model and adapter, where no class of PEFT does; ``"path/to/the/base/model"`` is
    the base model."""
    form: str = ""
    """A file in the form of another library, which stands beside the adapters of some methods."""
    form_loading: tuple[str, ...] = ()
    """Lines of Python that load that file."""
    example: str = '"Hello"'
    """What ``peftcli predict`` answers, on a command line; ``"<name: default>"`` is as in ``usage``."""
    truths: tuple[str, ...] = ()
    """Columns of ``reads`` that hold true or false."""
    needs: Mapping[frozenset[str], Mapping[str, Any]] = field(default_factory=dict)
    """Sets of ``reads`` -> the settings that rows of these columns need."""
    precedes_tasks: bool = False
    """Whether a base model of the task's architectures is usually the beginning of another task."""
    rate_factor: float = 1.0
    """What ``learning_rate: auto`` multiplies a method's rate with; see ``recipe.rates``."""
    variants: tuple[Variant, ...] = ()
    """For base models that ``auto_class`` does not load, and the task trains too."""

    @property
    def peft_class(self) -> str:
        """PEFT's class that loads base model and adapter."""
        if self.task_type is None:
            return "AutoPeftModel"
        return f"AutoPeft{self.auto_class.removeprefix('Auto')}" + "ForFeatureExtraction" * (
            self.auto_class == "AutoModel"
        )

    @property
    def auto_classes(self) -> tuple[str, ...]:
        """Every auto class that loads base models of the task."""
        return (self.auto_class, *(each.auto_class for each in self.variants))

    def of(self, config: Any) -> TaskRow:
        """The row for the base model of this config: that of the first auto class that knows its type."""
        return next((self._as(each) for each in self.variants if loads(each.auto_class, config)), self)

    def _as(self, variant: Variant) -> TaskRow:
        given = {each.name: getattr(variant, each.name) for each in fields(variant) if each.name != "setting"}
        return replace(self, **given, variants=())

    def filled(self, settings: Mapping[str, Any]) -> TaskRow:
        """The row of an adapter with these settings, with their values in ``usage`` and ``example``."""
        if variant := next((each for each in self.variants if settings.get(each.setting)), None):
            return self._as(variant).filled(settings)
        lines = [_filled(line, settings, partial(json.dumps, ensure_ascii=False)) for line in self.usage]
        example = _filled(self.example, settings, lambda value: shlex.quote(" ".join(str(value).split())))
        return replace(self, usage=tuple(line for line in lines if line is not None), example=example or "")

    def command(self, adapter: str) -> str:
        """A command line that uses an adapter of the task once."""
        if self.pipeline_tag == "text-generation":
            return f'peftcli generate {adapter} --prompt "Hello"'
        if self.sees:
            return f'peftcli generate {adapter} --image FILE --prompt "Hello"'
        return f"peftcli predict {adapter} {self.example}"

    @property
    def writes_text(self) -> bool:
        """Whether the model continues or answers a text: ``peftcli generate``."""
        return self.auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")

    @property
    def sees(self) -> bool:
        """Whether the model answers a text with pictures: ``peftcli generate --image``."""
        return self.auto_class == "AutoModelForImageTextToText"

    def settings_of(self, recipe: Recipe) -> Any:
        """The settings that a recipe gives, under ``task`` or under ``dataset``."""
        given = {name: value for name, value in (recipe.task or {}).items() if name != "type"}
        names = {each.name for each in fields(self.settings)}
        also = {name: getattr(recipe.dataset, name) for name in settings.UNDER_DATASET if name in names}
        return self.settings(**also | given)

    def open(self, settings: Any, base: OpenBase, method: AdapterConfig | None = None) -> Task[Any]:
        """Bind the task to its settings and to the base model's processor. Imports torch.

        Virtual tokens of the method leave fewer of the base model's positions to a row.
        """
        row = self.of(base.config) if self.variants else self
        task = cast("type[Task[Any]]", importlib.import_module(f"peftcli.tasks.{row.module}").TASK)
        opened = task(settings, base.processor(row.processor) if row.processor else None, base)
        opened.method, opened.virtual_tokens = method, int(getattr(method, "num_virtual_tokens", 0))
        return opened


def loads(auto_class: str, config: Any) -> bool:
    """Whether an auto class of transformers builds a model of this config."""
    import transformers

    mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", None)
    return mapping is not None and type(config) in mapping


def _filled(line: str, settings: Mapping[str, Any], quote: Callable[[Any], str]) -> str | None:
    """The line with the value of the setting that it names; None if that is unset, and no default is named."""
    if (named := re.search(r'"<(\w+)(?:: (.+))?>"', line)) is None:
        return line
    value = settings.get(named[1]) or named[2]
    return None if value is None else line.replace(named[0], quote(value))


def row_of(recipe: Recipe) -> TaskRow:
    """The row of a recipe's task, which must be known."""
    assert recipe.task is not None
    return TASKS[recipe.task["type"]]


def open_task(recipe: Recipe, base: OpenBase) -> Task[Any]:
    """Open the recipe's task, which must be known."""
    row, method = row_of(recipe), dict(recipe.method)
    config = METHODS[method.pop("type")].config_class().unchecked(**method)
    return row.open(row.settings_of(recipe), base, config)


def task_record(task: Task[Any], recipe: Recipe) -> dict[str, Any]:
    """The recipe's task as run.json holds it: ``type``, and every setting."""
    return {"type": (recipe.task or {})["type"], **asdict(task.settings)}


_ASK = (
    'inputs = tokenizer("Hello", return_tensors="pt")',
    "if tokenizer.chat_template:",
    '    messages = [{"role": "user", "content": "Hello"}]',
    "    inputs = tokenizer.apply_chat_template(",
    '        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
    "    )",
)
_GENERATE = (
    "tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
    'print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)
_ANSWERED = (("prompt", "completion"), ("messages",), ("instruction", "output"), ("conversations",))
# What sources usually call a task's columns, the likeliest first.
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "pos_tags", "upos")
TRANSCRIPTS = ("text", "sentence", "transcription", "transcript")
SOUNDS = ("audio", "file_name")
CAPTIONS = ("text", "caption", "prompt")
INSTRUCTIONS = ("instruction", "edit_prompt", "edit")
SOURCE_PICTURES = ("source", "input_image", "original_image")
EDITED_PICTURES = ("target", "edited_image", "output_image")
PICTURES = ("image", "file_name", "img", "image_file_name")
LABELS = ("label", "labels")
SCORES = ("label", "score")
CHOICES = ("choices", "options", "endings")
CHOSEN = ("label", "answer", "answerKey", "answer_key")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("question", "passage")),
)

TASKS: dict[str, TaskRow] = {
    "causal_lm": TaskRow(
        task_type="CAUSAL_LM",
        auto_class="AutoModelForCausalLM",
        settings=settings.CausalLMSettings,
        module="causal_lm",
        processor="tokenizer",
        reads=(("text",), *_ANSWERED),
        pipeline_tag="text-generation",
        summary="continue or answer a text (GPT, Llama, Qwen)",
        asking=_ASK,
        usage=_GENERATE,
    ),
    "distillation": TaskRow(
        task_type="CAUSAL_LM",
        auto_class="AutoModelForCausalLM",
        settings=settings.DistillationSettings,
        module="distillation",
        processor="tokenizer",
        reads=(),
        pipeline_tag="text-generation",
        summary="answer as a teacher does: a larger model, an adapter, or the model itself after a prompt",
        asking=_ASK,
        usage=_GENERATE,
    ),
    "seq2seq_lm": TaskRow(
        task_type="SEQ_2_SEQ_LM",
        auto_class="AutoModelForSeq2SeqLM",
        settings=settings.Seq2SeqLMSettings,
        module="seq2seq_lm",
        processor="tokenizer",
        reads=_ANSWERED,
        pipeline_tag="text-generation",
        summary="turn one text into another (T5, BART)",
        asking=('inputs = tokenizer("Hello", return_tensors="pt")',),
        usage=(
            "tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ),
    ),
    "sequence_classification": TaskRow(
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        settings=settings.SequenceClassificationSettings,
        module="sequence_classification",
        processor="tokenizer",
        reads=tuple((*texts, label) for texts in (("text",), ("sentence",), *PAIRS) for label in LABELS),
        pipeline_tag="text-classification",
        summary="put a text, or a pair of texts, into classes or on a scale (BERT, Qwen)",
        usage=(
            'inputs = tokenizer("Hello", return_tensors="pt")',
            "logits = model(**inputs).logits[0]",
            "print(model.config.id2label[int(logits.argmax())])",
        ),
        rate_factor=4,
    ),
    "token_classification": TaskRow(
        task_type="TOKEN_CLS",
        auto_class="AutoModelForTokenClassification",
        settings=settings.TokenClassificationSettings,
        module="token_classification",
        processor="tokenizer",
        reads=(*((tokens, tags) for tokens in TOKENS for tags in TAGS), ("text", "entities"), ("text", "spans")),
        pipeline_tag="token-classification",
        summary="give each word of a text a tag: names, parts of speech (BERT, RoBERTa)",
        usage=(
            'inputs = tokenizer("Ada lives in Turin", return_tensors="pt")',
            "tags = model(**inputs).logits[0].argmax(-1)",
            "print([model.config.id2label[int(tag)] for tag in tags])",
        ),
        rate_factor=4,
    ),
    "question_answering": TaskRow(
        task_type="QUESTION_ANS",
        auto_class="AutoModelForQuestionAnswering",
        settings=settings.QuestionAnsweringSettings,
        module="question_answering",
        processor="tokenizer",
        reads=(("question", "context", "answers"), ("question", "context", "answer")),
        pipeline_tag="question-answering",
        summary="find the answer to a question in a text (BERT, RoBERTa)",
        example='"Where does Ada live?" "Ada lives in Turin."',
        usage=(
            'inputs = tokenizer("Where does Ada live?", "Ada lives in Turin.", return_tensors="pt")',
            "outputs = model(**inputs)",
            "first, last = int(outputs.start_logits.argmax()), int(outputs.end_logits.argmax())",
            'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
        ),
        rate_factor=4,
    ),
    "feature_extraction": TaskRow(
        task_type="FEATURE_EXTRACTION",
        auto_class="AutoModel",
        settings=settings.FeatureExtractionSettings,
        module="feature_extraction",
        processor="tokenizer",
        reads=(("anchor", "positive"), ("query", "positive"), ("sentence1", "sentence2", "score")),
        pipeline_tag="sentence-similarity",
        summary="embed texts, so that those that belong together are close (MiniLM, BGE, E5, Qwen)",
        usage=(
            'inputs = tokenizer("Hello", return_tensors="pt")',
            'tokens = inputs["input_ids"].shape[1]',
            "hidden = model(**inputs).last_hidden_state[0, -tokens:]  # virtual tokens stand before them",
            'ways = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}',
            'pooled = ways["<pooling>"]',
            "print(pooled / pooled.norm())",
        ),
    ),
    "reranker": TaskRow(
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        settings=settings.RerankerSettings,
        module="reranker",
        processor="tokenizer",
        reads=tuple(("query", "document", label) for label in SCORES),
        pipeline_tag="text-ranking",
        summary="score a document for a query, to sort what a search has found (BERT, MiniLM, Qwen)",
        example='"Close a file." "def close(file): ..."',
        usage=(
            'inputs = tokenizer("Close a file.", "def close(file): ...", return_tensors="pt")',
            "print(float(model(**inputs).logits[0, 0].sigmoid()))",
        ),
        rate_factor=4,
    ),
    "masked_lm": TaskRow(
        task_type=None,
        auto_class="AutoModelForMaskedLM",
        settings=settings.MaskedLMSettings,
        module="masked_lm",
        processor="tokenizer",
        reads=(("text",),),
        pipeline_tag="fill-mask",
        summary="fill in masked words, to learn the language of a field (BERT, RoBERTa, ModernBERT, ESM)",
        example='"Ada lives in [MASK]."',
        usage=(
            'inputs = tokenizer(f"Ada lives in {tokenizer.mask_token}", return_tensors="pt")',
            "logits = model(**inputs).logits[0]",
            'at = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id) - inputs["input_ids"].shape[1]',
            "print(tokenizer.decode(logits[at].argmax()))",
        ),
        precedes_tasks=True,
    ),
    "multiple_choice": TaskRow(
        task_type=None,
        auto_class="AutoModelForMultipleChoice",
        settings=settings.MultipleChoiceSettings,
        module="multiple_choice",
        processor="tokenizer",
        reads=tuple(("question", choices, label) for choices in CHOICES for label in CHOSEN),
        pipeline_tag="multiple-choice",
        summary="choose one of several answers to a question (BERT, RoBERTa, DeBERTa)",
        example='"Where is Turin?" \'["in Italy", "in Peru"]\'',
        usage=(
            'choices = ["in Italy", "in Peru"]',
            'pairs = tokenizer(["Where is Turin?"] * len(choices), choices, padding=True, return_tensors="pt")',
            "inputs = {name: each.unsqueeze(0) for name, each in pairs.items()}  # one row of two choices",
            "print(choices[int(model(**inputs).logits[0].argmax())])",
        ),
        rate_factor=4,
    ),
    "preference": TaskRow(
        task_type="CAUSAL_LM",
        auto_class="AutoModelForCausalLM",
        settings=settings.PreferenceSettings,
        module="preference",
        processor="tokenizer",
        reads=(("chosen", "rejected"), ("prompt", "completion", "label")),
        truths=("label",),
        needs={frozenset({"prompt", "completion", "label"}): {"loss": "kto"}},
        pipeline_tag="text-generation",
        summary="prefer chosen answers to rejected ones: DPO, IPO, ORPO, SimPO, KTO (Llama, Qwen)",
        asking=_ASK,
        usage=_GENERATE,
        rate_factor=0.1,
    ),
    "grpo": TaskRow(
        task_type="CAUSAL_LM",
        auto_class="AutoModelForCausalLM",
        settings=settings.GrpoSettings,
        module="grpo",
        processor="tokenizer",
        reads=(),
        pipeline_tag="text-generation",
        summary="write answers that get rewards which a program checks: GRPO (Llama, Qwen)",
        asking=_ASK,
        usage=_GENERATE,
    ),
    "reward": TaskRow(
        task_type="SEQ_CLS",
        auto_class="AutoModelForSequenceClassification",
        settings=settings.RewardSettings,
        module="reward",
        processor="tokenizer",
        reads=(("chosen", "rejected"),),
        pipeline_tag="text-classification",
        summary="score answers, the better ones higher, from pairs of a chosen and a rejected one (Llama, Qwen, BERT)",
        usage=(
            'inputs = tokenizer("Hello", return_tensors="pt")',
            "print(float(model(**inputs).logits[0, 0]))",
        ),
    ),
    "image_classification": TaskRow(
        task_type=None,
        auto_class="AutoModelForImageClassification",
        settings=settings.ImageClassificationSettings,
        module="image_classification",
        processor="image_processor",
        reads=tuple((image, label) for image in PICTURES for label in LABELS),
        pipeline_tag="image-classification",
        summary="put pictures into classes (ViT, ResNet, EfficientNet)",
        example="FILE",
        usage=(
            "from PIL import Image",
            "",
            'inputs = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt").to(model.dtype)',
            "logits = model(**inputs).logits[0]",
            "print(model.config.id2label[int(logits.argmax())])",
        ),
        rate_factor=4,
    ),
    "image_text_to_text": TaskRow(
        task_type=None,
        auto_class="AutoModelForImageTextToText",
        settings=settings.ImageTextToTextSettings,
        module="image_text_to_text",
        processor="processor",
        reads=(
            *((turns, image) for turns in ("messages", "conversations") for image in ("images", "image")),
            *(
                (image, *asked)
                for image in ("image", "images")
                for asked in (("prompt", "completion"), ("question", "answer"))
            ),
        ),
        pipeline_tag="image-text-to-text",
        summary="answer a text with pictures (LLaVA, SmolVLM)",
        usage=(
            "from PIL import Image",
            "",
            'parts = [{"type": "image"}, {"type": "text", "text": "Hello"}]',
            'text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)',
            'inputs = processor(text=text, images=[Image.new("RGB", (64, 64))], return_tensors="pt")',
            "tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
            'print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ),
        example="FILE Hello",
    ),
    "semantic_segmentation": TaskRow(
        task_type=None,
        auto_class="AutoModelForSemanticSegmentation",
        settings=settings.SemanticSegmentationSettings,
        module="semantic_segmentation",
        processor="image_processor",
        reads=tuple(
            (image, f"{mask}{ending}")
            for image in PICTURES
            for mask in ("annotation", "mask", "label")
            for ending in ("", "_file_name")
        ),
        pipeline_tag="image-segmentation",
        summary="put each pixel of a picture into a class (SegFormer, DPT, UPerNet)",
        example="FILE",
        usage=(
            "from PIL import Image",
            "",
            'inputs = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt").to(model.dtype)',
            "logits = model(**inputs).logits[0]  # (classes, height / 4, width / 4)",
            "print([model.config.id2label[int(each)] for each in logits.argmax(0).unique()])",
        ),
        rate_factor=4,
    ),
    "audio_classification": TaskRow(
        task_type=None,
        auto_class="AutoModelForAudioClassification",
        settings=settings.AudioClassificationSettings,
        module="audio_classification",
        processor="feature_extractor",
        reads=tuple((audio, label) for audio in SOUNDS for label in LABELS),
        pipeline_tag="audio-classification",
        summary="put sounds into classes (wav2vec2, HuBERT, AST, Whisper's encoder)",
        example="FILE",
        usage=(
            "# instead of numbers: the samples of a clip, as soundfile reads them",
            'inputs = feature_extractor([0.1, -0.1] * 8000, sampling_rate=16000, return_tensors="pt").to(model.dtype)',
            "logits = model(**inputs).logits[0]",
            "print(model.config.id2label[int(logits.argmax())])",
        ),
        rate_factor=4,
    ),
    "object_detection": TaskRow(
        task_type=None,
        auto_class="AutoModelForObjectDetection",
        settings=settings.ObjectDetectionSettings,
        module="object_detection",
        processor="image_processor",
        reads=tuple((image, "objects") for image in PICTURES),
        pipeline_tag="object-detection",
        summary="find the things on a picture, each with its class and a box (DETR, RT-DETR, YOLOS)",
        example="FILE",
        usage=(
            "from PIL import Image",
            "",
            'inputs = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt").to(model.dtype)',
            'outputs = model(pixel_values=inputs["pixel_values"])',
            "print(image_processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(64, 64)]))",
        ),
        rate_factor=4,
    ),
    "speech_recognition": TaskRow(
        task_type=None,
        auto_class="AutoModelForSpeechSeq2Seq",
        settings=settings.SpeechRecognitionSettings,
        module="speech_recognition",
        processor="processor",
        reads=tuple((audio, text) for audio in SOUNDS for text in TRANSCRIPTS),
        pipeline_tag="automatic-speech-recognition",
        summary="write down what is said, or what it means in English (Whisper, wav2vec2)",
        example="FILE",
        usage=(
            "from transformers import GenerationConfig",
            "",
            "# instead of numbers: the samples of a clip, as soundfile reads them",
            'inputs = processor([0.1, -0.1] * 8000, sampling_rate=16000, return_tensors="pt").to(model.dtype)',
            'settings = GenerationConfig.from_pretrained("path/to/this/adapter")',
            'inputs["prompt_ids"] = processor.get_prompt_ids("<prompt>", return_tensors="pt")',
            "tokens = model.generate(**inputs, generation_config=settings)",
            "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
        ),
        rate_factor=2,
        variants=(
            Variant(
                auto_class="AutoModelForCTC",
                setting="vocabulary",
                module="ctc",
                processor="feature_extractor",
                usage=(
                    "from transformers import AutoTokenizer",
                    "",
                    "# instead of numbers: the samples of a clip, as soundfile reads them",
                    'inputs = feature_extractor([0.1, -0.1] * 8000, sampling_rate=16000, return_tensors="pt")',
                    "letters = model(**inputs.to(model.dtype)).logits[0].argmax(-1)",
                    'text = AutoTokenizer.from_pretrained("path/to/this/adapter").decode(letters)',
                    'print({"text": text})',
                ),
            ),
        ),
    ),
    "text_to_image": TaskRow(
        task_type=None,
        auto_class="DiffusionPipeline",
        settings=settings.TextToImageSettings,
        module="text_to_image",
        processor=None,
        reads=(
            *((image, text) for image in PICTURES for text in CAPTIONS),
            *product((*PICTURES, *SOURCE_PICTURES), (*INSTRUCTIONS, *CAPTIONS), EDITED_PICTURES),
        ),
        pipeline_tag="text-to-image",
        summary="make pictures from texts: DreamBooth, captioned pictures (Stable Diffusion, Flux, Qwen-Image)",
        example='"<instance_prompt: a photo of sks dog>"',
        loading=(
            "from pathlib import Path",
            "",
            "from diffusers import DiffusionPipeline",
            "from peft import PeftModel",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("path/to/the/base/model")',
            'for folder in Path("path/to/this/adapter").iterdir():',
            "    if hasattr(pipeline, folder.name):  # unet, transformer, text_encoder",
            "        model = getattr(pipeline, folder.name)",
            "        setattr(pipeline, folder.name, PeftModel.from_pretrained(model, folder))",
        ),
        form=DIFFUSERS_FILE,
        form_loading=(
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("path/to/the/base/model")',
            'pipeline.load_lora_weights("path/to/this/adapter")',
        ),
        usage=(
            'picture = pipeline(prompt="<instance_prompt: a photo of sks dog>").images[0]',
            'picture.save("picture.png")',
            "print(picture)",
        ),
        rate_factor=0.5,
    ),
}
