"""The settings of each task, which recipes give under ``task``. Imported without torch.

``NOT_ENCODED`` marks a setting that does not change how rows are encoded: the cache's key leaves it out. ``MAY_DIFFER``
marks one in which adapters that are combined may differ: it decides what is learnt, or how long a row may be, and not
what an input or an output means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FRACTION, INSIDE_0_1, SHARE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

NOT_ENCODED: dict[str, Any] = {"encodes": False}
MAY_DIFFER: dict[str, Any] = {"may_differ": True}
TASK_FILE = "task.json"
"""Beside an adapter: its task and the settings that the training data completed."""
CTC_BLANK = "<pad>"
"""In a complete ``vocabulary``: the output that stands for no letter."""
UNDER_DATASET = ("max_length", "overlong", "packing", "train_on")
"""Settings that recipes may also give under ``dataset``."""
CODE = ("metric_code", "trust_metric_code", "trust_reward_code")
"""Settings that are neither recorded nor read with an adapter, which names no code to run."""


class TaskSettings:
    """Settings of a task: a dataclass."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained``: none."""
        return {}

    def files(self) -> list[str]:
        """Files, and folders of media, that a run reads besides its data, as the settings name them."""
        return []

    def problems(self) -> Iterable[tuple[str, str]]:
        """What is wrong in a recipe with values of the right types: pairs of a setting and what is wrong with it."""
        return ()


@dataclass(frozen=True, kw_only=True)
class GeneratedSettings(TaskSettings):
    """Settings of language models whose answers are measured."""

    generate_metrics: list[Literal["exact_match", "bleu", "chrf", "rouge_l"]] = field(
        default_factory=list, metadata=NOT_ENCODED
    )
    """Metrics of generated answers in each evaluation: the share that equals the row's answer, BLEU, chrF, ROUGE-L."""
    metric_code: str | None = field(default=None, metadata=NOT_ENCODED)
    """A metric of your own, as ``metrics.py:score``: a function of a Python file that is called with the generated
    texts and the rows' answers, two lists of strings, and returns a number or a mapping of numbers by name."""
    trust_metric_code: bool = field(default=False, metadata=NOT_ENCODED)
    """Run the code of metric_code."""
    max_new_tokens: int = field(default=256, metadata=NOT_ENCODED | AT_LEAST_1)
    """Longest generated answer, in tokens, in ``predict`` too."""
    num_beams: int = field(default=1, metadata=NOT_ENCODED | AT_LEAST_1)
    """Number of beams when an answer is generated, in ``predict`` too; 1: greedy decoding. Other settings of the base
    model's generation_config.json still apply, such as min_length, repetition_penalty and no_repeat_ngram_size:
    bart-large-cnn writes no answer of fewer than 56 tokens."""

    def files(self) -> list[str]:
        """The file of metric_code."""
        return [self.metric_code.rpartition(":")[0]] if self.metric_code else []


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings(GeneratedSettings):
    """Settings of causal_lm. max_length, overlong, packing and train_on may also stand under ``dataset``."""

    max_length: int = 1024
    """Maximum length of an example, in tokens."""
    overlong: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, stop with an error, or split them into
    pieces that are separate examples. They are counted in any case."""
    packing: bool = field(default=False, metadata=NOT_ENCODED)
    """Put several examples into each row of a batch, up to max_length. Attention stays within an example."""
    train_on: Literal["answers", "last_answer", "all", "middle"] = "answers"
    """Which tokens count in the loss. answers: the text of each assistant turn and its end-of-turn token; last_answer:
    the same of the last assistant turn; all: every token; middle: a part of each text, which the model sees after the
    text's beginning and end, between tokens of its own (fill-in-the-middle, for models of code)."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(CausalLMSettings):
    """Settings of distillation. max_length, overlong, packing and train_on may also stand under ``dataset``."""

    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with longer examples, as the student reads them: truncate them at the end, drop them, or stop with an
    error. They are counted in any case."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """At which tokens student and teacher are compared. answers: the text of each assistant turn and its end-of-turn
    token; last_answer: the same of the last assistant turn; all: every token."""
    teacher: str | None = field(default=None, metadata=NOT_ENCODED)
    """The teacher: a base model or the folder of an adapter, with the same vocabulary. Unset: the base model, without
    the adapter that trains; nothing is loaded twice."""
    context: str | None = None
    """A system prompt that the teacher sees and the student does not. A row's own system prompt stands after it."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = field(default="forward_kl", metadata=NOT_ENCODED)
    """How far the student's distribution p over the next token is from the teacher's q. forward_kl: KL(q || p), which
    covers all that the teacher may say; reverse_kl: KL(p || q), which keeps to what it says most; jsd: the mean of the
    KL of both to their mean."""
    temperature: float = field(default=1.0, metadata=NOT_ENCODED | ABOVE_0)
    """What divides the logits of both in the loss; above 1, unlikely tokens count more."""
    on_policy: float = field(default=0.0, metadata=NOT_ENCODED | FRACTION)
    """Share of a step's rows whose last answer the student writes, of at most max_new_tokens tokens, and is compared
    on. It is sampled by seed, step and row."""


@dataclass(frozen=True, kw_only=True)
class ImageTextToTextSettings(GeneratedSettings):
    """Settings of image_text_to_text. max_length, overlong and train_on may also stand under ``dataset``."""

    max_length: int = 1024
    """Maximum length of an example, in tokens, those of its pictures included."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, or stop with an error. The tokens of a
    picture are never cut: a row in which they do not fit is dropped."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens count in the loss. answers: the text of each assistant turn and its end-of-turn token; last_answer:
    the same of the last assistant turn; all: every token but those of pictures."""
    vision: Literal["frozen", "adapted"] = field(default="frozen", metadata=NOT_ENCODED)
    """Whether the method adapts the vision tower too."""
    connector: Literal["frozen", "trained", "adapted"] = field(default="frozen", metadata=NOT_ENCODED)
    """What becomes of the layers between vision tower and language model: frozen, trained in full and saved with the
    adapter, or adapted by the method."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLMSettings(GeneratedSettings):
    """Settings of seq2seq_lm. max_length, overlong and train_on may also stand under ``dataset``."""

    max_length: int = 1024
    """Maximum length of the source and of the target, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, or stop with an error. They are counted in
    any case."""
    train_on: Literal["answers", "last_answer"] = "answers"
    """Which tokens count in the loss: with either value, the tokens of the target."""
    source_language: str | None = None
    """The language of the sources, under the tokenizer's code, such as de_DE (mBART), deu_Latn (NLLB) or de (M2M100).
    Required for models of many languages."""
    target_language: str | None = None
    """The language of the targets and of the answers, likewise."""


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(TaskSettings):
    """Settings of every classification task."""

    labels: list[str] | None = None
    """Names of the classes, in the order of the model's outputs. Unset: the names in the training rows, in the order of
    their ClassLabel, else of first appearance."""
    labels_by_number: bool = field(default=True, metadata=MAY_DIFFER)
    """Whether a row's label may be the index of its class in ``labels``, from 0, if no class is named by a number.
    Training sets it to false if it finds the names in the rows, since their order means nothing."""
    problem_type: Literal["single_label", "multi_label", "regression"] | None = None
    """What the label of a row is: one class, a list of classes, or a number to predict. Unset: found in the training
    rows."""
    label_separator: str | None = field(default=None, metadata=MAY_DIFFER)
    """Separator of several labels in one text, as "|" in `spam|urgent` (multi_label). An empty text has no label.
    Unset: the whole text is the name of one class."""
    class_weights: dict[str, float] | Literal["balanced"] | None = field(
        default=None, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0
    )
    """Factors of the loss for rows of a class, as in {spam: 3}; 1 for the other classes. They are not normalised:
    factors above 1 enlarge the loss and the gradients. balanced: the training rows, divided by the number of classes
    and by the rows of the class, so that each class counts as much as the others."""

    @classmethod
    def of_model(cls, config: Any, num_labels: int | None) -> Self:
        """The settings of another tool's model, as far as its config names its outputs.

        ``num_labels``: outputs of the head; None: as many as the config says.
        """
        num_labels = int(num_labels or config.num_labels)
        if num_labels == 1:
            return cls(problem_type="regression")
        several = getattr(config, "problem_type", None) == "multi_label_classification"
        return cls(labels=_label_names(config, num_labels), problem_type="multi_label" if several else "single_label")

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for these classes."""
        if self.problem_type == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        return {**_label_options(self.labels or []), "problem_type": f"{self.problem_type}_classification"}


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationSettings(ClassificationSettings):
    """Settings of sequence_classification."""

    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest row, in tokens, within what the base model can read; the end of a longer one is cut. May stand under
    ``dataset`` as well."""


@dataclass(frozen=True, kw_only=True)
class ImageClassificationSettings(ClassificationSettings):
    """Settings of image_classification."""


@dataclass(frozen=True, kw_only=True)
class AudioClassificationSettings(ClassificationSettings):
    """Settings of audio_classification."""

    max_seconds: float | None = field(default=None, metadata=MAY_DIFFER | ABOVE_0)
    """Longest clip, in seconds; the end of a longer one is not heard. Unset: as long as the model hears, which for
    Whisper is 30 seconds."""


@dataclass(frozen=True, kw_only=True)
class TokenClassificationSettings(TaskSettings):
    """Settings of token_classification."""

    labels: list[str] | None = None
    """Names of the tags, in the order of the model's outputs; or types of entities, as in [PER, ORG], which stand for O
    and B- and I- of each. Unset: the tags in the training rows, in the order of their ClassLabel, else of first
    appearance."""
    labels_by_number: bool = field(default=True, metadata=MAY_DIFFER)
    """Whether a row's tag may be its index in ``labels``, from 0, if no tag is named by a number. Training sets it to
    false if it finds the tags in the rows, since their order means nothing."""
    scheme: Literal["iob2", "none"] | None = None
    """What the tags mean. iob2: B-PER begins an entity, I-PER continues it, O is outside; whole entities are measured,
    and tags of BILOU, IOBES and BMES are converted. none: each word has its own class, such as a part of
    speech. Unset: found in the training rows."""
    label_all_pieces: bool = False
    """Count every piece of a word in the loss, not only the first; after the first piece of a word with a B- tag, the
    pieces get the I- tag."""
    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest row, in tokens, within what the base model can read; the end of a longer one is cut, and its words count
    as not found. May stand under ``dataset`` as well."""

    @classmethod
    def of_model(cls, config: Any, num_labels: int | None) -> Self:
        """The settings of another tool's model, whose config names its outputs.

        ``num_labels``: outputs of the head; None: as many as the config says.
        """
        labels = _label_names(config, int(num_labels or config.num_labels))
        return cls(labels=labels, scheme="iob2" if all(map(is_iob2, labels)) else "none")

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for these tags."""
        return _label_options(self.labels or [])


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringSettings(TaskSettings):
    """Settings of question_answering."""

    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest example, in tokens, within what the base model can read: the question and the part of the context that
    fits. A longer context becomes several windows. May stand under ``dataset`` as well."""
    stride: int = field(default=128, metadata=AT_LEAST_0)
    """Tokens that two windows of a context share."""
    unanswerable: bool | None = None
    """Whether the answer may be missing in the context. Unset: found in the training rows."""
    max_answer_length: int = field(default=30, metadata=NOT_ENCODED | AT_LEAST_1)
    """Longest answer that is searched for, in tokens."""
    n_best: int = field(default=20, metadata=NOT_ENCODED | AT_LEAST_1)
    """Number of most likely starts and ends that are combined."""
    null_threshold: float = field(default=0.0, metadata=NOT_ENCODED)
    """By how much the score of no answer must exceed the best answer's to be given, if answers may be missing."""


@dataclass(frozen=True, kw_only=True)
class MaskedLMSettings(TaskSettings):
    """Settings of masked_lm."""

    mlm_probability: float = field(default=0.15, metadata=MAY_DIFFER | INSIDE_0_1)
    """Share of a text's tokens that the model has to find: of these, 80 % are replaced by the mask token, 10 % by a
    random one, and 10 % stay. Which ones they are is drawn anew at each step, and in evaluation always the same."""
    whole_words: bool = field(default=False, metadata=MAY_DIFFER)
    """Mask all pieces of a word together, for which the tokenizer has to know places in the text."""
    max_length: int = field(default=512, metadata=MAY_DIFFER)
    """Longest example, in tokens, within what the base model can read; a longer text becomes several examples. May
    stand under ``dataset`` as well."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceSettings(TaskSettings):
    """Settings of multiple_choice."""

    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest choice with its question and context, in tokens, within what the base model can read; the end of a longer
    context is cut, the same for all choices of a row. May stand under ``dataset`` as well."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings(TaskSettings):
    """Settings of reward. Recipes may also give max_length and overlong under ``dataset``."""

    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest answer with its prompt, in tokens, within what the base model can read."""
    overlong: Literal["truncate", "drop", "error"] = field(default="truncate", metadata=MAY_DIFFER)
    """What to do with a pair if one of its answers is longer: truncate it at the end, drop the pair, or stop with an
    error. Such pairs are counted in any case."""
    margin: str | None = field(default=None, metadata=MAY_DIFFER)
    """Column of numbers: the margin by which the chosen answer's reward should be higher at least. Unset: the column
    ``margin``, if the rows have it."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained``: one number."""
        return {"num_labels": 1}


@dataclass(frozen=True, kw_only=True)
class SemanticSegmentationSettings(TaskSettings):
    """Settings of semantic_segmentation."""

    labels: list[str] | None = None
    """Names of the classes, in the order of their values in the masks, from 0, or from 1 with reduce_labels. Unset:
    the values of the training rows' masks."""
    ignore_index: int = field(default=255, metadata={"most": 65_535})  # the largest of a PNG
    """Pixels with this value in the masks count neither in the loss nor in the metrics."""
    binary_masks: bool = False
    """Whether masks have two classes, as masks of 0 and 255: values up to 127 are class 0, those above it class 1."""
    reduce_labels: bool = False
    """Whether 0 in the masks means no class and does not count either; the first label is then 1."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for these classes."""
        return _label_options(self.labels or [])


@dataclass(frozen=True, kw_only=True)
class ObjectDetectionSettings(TaskSettings):
    """Settings of object_detection."""

    labels: list[str] | None = None
    """Names of the classes, in the order of the model's outputs. Unset: the names in the training rows, in the order of
    COCO's categories or of their ClassLabel, else of first appearance."""
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """The numbers of a row's box, in pixels. xywh: left, top, width, height, as in COCO; xyxy: left, top, right,
    bottom."""
    resolution: int | None = field(default=None, metadata=NOT_ENCODED | AT_LEAST_1)
    """Side of the square into which a picture is scaled, in pixels. Unset: the height and width of the base model's
    image processor; where that has none, a square of its shortest edge."""
    augment: list[Literal["flip", "crop"]] = field(default_factory=list, metadata=NOT_ENCODED | MAY_DIFFER)
    """How training pictures are changed at each step, with their boxes. flip: mirror a random half of them; crop: cut a
    random part out of a random half of them, without the objects whose middle is outside."""
    threshold: float = field(default=0.5, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0 | {"below": 1.0})
    """Score above which predict reports an object. The metrics look at all of them."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for these classes."""
        return _label_options(self.labels or [])


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(TaskSettings):
    """Settings of preference. Recipes may also give max_length and overlong under ``dataset``."""

    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = field(default="dpo", metadata=NOT_ENCODED | MAY_DIFFER)
    """What is learnt from a row. dpo and ipo compare the answers' log-probabilities with a reference model's; orpo and
    simpo need no reference; kto learns from single answers, good or bad, and uses a reference too."""
    beta: float = field(default=0.1, metadata=NOT_ENCODED | MAY_DIFFER | ABOVE_0)
    """dpo, kto: how little the model may move away from the reference; ipo: the same, its margin is 1 / (2 beta);
    orpo: the weight of the comparison, relative to the chosen answer's own loss; simpo: the scale of the rewards."""
    label_smoothing: float = field(default=0.0, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0 | {"below": 0.5})
    """dpo, simpo: the assumed share of pairs with the two answers swapped, below 0.5."""
    simpo_gamma: float = field(default=0.5, metadata=NOT_ENCODED | MAY_DIFFER)
    """simpo: the least difference that the rewards should have."""
    desirable_weight: float = field(default=1.0, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0)
    """kto: factor of the loss of good answers, to make up for their number."""
    undesirable_weight: float = field(default=1.0, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0)
    """kto: factor of the loss of bad answers."""
    reference: Literal["base", "start"] | None = field(default=None, metadata=NOT_ENCODED | MAY_DIFFER)
    """What dpo, ipo and kto compare with. base: the base model, without the adapter; start: the adapter as it was
    before training, which evaluate finds only for training.init_adapter_from. Unset: base if the adapter has no effect
    at the start."""
    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest answer with its prompt, in tokens, within what the base model can read."""
    overlong: Literal["truncate", "drop", "error"] = field(default="truncate", metadata=MAY_DIFFER)
    """What to do with a row if an answer is longer: truncate it at the end, drop the row, or stop with an error. Such
    rows are counted in any case."""


@dataclass(frozen=True, kw_only=True)
class AnswerReward:
    """What gives an answer a reward of grpo: one of exact_match, contains, regex, json_schema, length and python."""

    exact_match: str | None = None
    """Column of the wanted answers: 1 if the answer is the same text, white space around both aside; else 0."""
    contains: str | None = None
    """Text: 1 if it is in the answer, else 0."""
    regex: str | None = None
    """Regular expression in the syntax of Python: 1 if it matches somewhere in the answer, else 0."""
    json_schema: dict[str, Any] | str | None = None
    """JSON Schema, or a .json file that contains it, or the column of the rows' own schemas: 1 if the answer is JSON
    that fits it, else 0."""
    length: dict[Literal["min", "max"], int] | None = None
    """Number of tokens of an answer, its end included, as in {min: 5, max: 40}: 1 within these bounds, else 0."""
    python: str | None = None
    """A function of your own, as ``rewards.py:score``: it is called with a list of answers, and each column of their
    rows as a list under its name, and returns one number for each answer. It needs trust_reward_code."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    name: str | None = None
    """Name in logs and metrics. Unset: the kind, or the name of the function; a second one of a name gets a number."""

    @property
    def kind(self) -> str:
        """What it looks at; empty where that is not one thing."""
        given = [name for name in REWARD_KINDS if getattr(self, name) is not None]
        return given[0] if len(given) == 1 else ""


REWARD_KINDS = ("exact_match", "contains", "regex", "json_schema", "length", "python")


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(TaskSettings):
    """Settings of grpo."""

    rewards: list[AnswerReward] = field(default_factory=list, metadata=NOT_ENCODED | MAY_DIFFER)
    """What gives an answer its reward: the weighted sum of all of them."""
    trust_reward_code: bool = field(default=False, metadata=NOT_ENCODED | MAY_DIFFER)
    """Run the code of rewards of the kind python."""
    group_size: int = field(default=8, metadata=NOT_ENCODED | MAY_DIFFER | {"least": 2})
    """Number of answers that are sampled to each prompt and compared with each other."""
    max_new_tokens: int = field(default=256, metadata=MAY_DIFFER | AT_LEAST_1)
    """Longest answer, in tokens, in evaluation and ``predict`` too."""
    temperature: float = field(default=1.0, metadata=NOT_ENCODED | MAY_DIFFER | ABOVE_0)
    """Of sampling in training; the loss is that of the distribution that is sampled from. Evaluation is greedy."""
    beta: float = field(default=0.0, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0)
    """Weight of the KL divergence from the base model, which is the model without its adapter."""
    scale_rewards: bool = field(default=True, metadata=NOT_ENCODED | MAY_DIFFER)
    """Divide a group's rewards, less their mean, by their standard deviation, and each answer's loss by its tokens.
    false: do neither, and divide by max_new_tokens (Dr. GRPO)."""
    mask_truncated_completions: bool = field(default=False, metadata=NOT_ENCODED | MAY_DIFFER)
    """Learn nothing from answers that max_new_tokens cut off. Their rewards count in the group's mean in any case."""

    def __post_init__(self) -> None:
        rewards = [AnswerReward(**each) if isinstance(each, dict) else each for each in self.rewards]
        object.__setattr__(self, "rewards", rewards)

    def files(self) -> list[str]:
        """The files of schemas and functions."""
        schemas = [each.json_schema for each in self.rewards if str(each.json_schema).endswith(".json")]
        return [*map(str, schemas), *(each.python.rpartition(":")[0] for each in self.rewards if each.python)]

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.rewards:
            yield "rewards", "is required: what gives an answer its reward, as [{exact_match: COLUMN}]"
        for at, each in enumerate(self.rewards):
            if not each.kind:
                yield f"rewards[{at}]", f"expected one of {', '.join(REWARD_KINDS)}"
            if each.length is not None and (
                not each.length
                or min(each.length.values()) < 0
                or each.length.get("min", 0) > each.length.get("max", 1e9)
            ):
                yield f"rewards[{at}].length", "expected bounds such as {min: 5, max: 40}"


@dataclass(frozen=True, kw_only=True)
class FeatureExtractionSettings(TaskSettings):
    """Settings of feature_extraction."""

    loss: Literal["contrastive", "cosine", "triplet"] | None = field(default=None, metadata=MAY_DIFFER)
    """What is learnt from a row. contrastive: its positive is closer to its anchor than the positives and negatives of
    the other rows of the batch; cosine: the cosine of two texts is their score; triplet: the positive is closer than
    the row's own negatives. Unset: cosine where rows have scores, else contrastive."""
    score_range: list[float] | None = field(default=None, metadata=MAY_DIFFER)
    """cosine: the lowest and the highest score of the rows, as [0, 5], which become 0 and 1. Unset: scores are cosines,
    from -1 to 1."""
    temperature: float = field(default=0.05, metadata=NOT_ENCODED | MAY_DIFFER | ABOVE_0)
    """contrastive: divisor of the cosines; the smaller it is, the more the hardest negatives count."""
    triplet_margin: float = field(default=0.5, metadata=NOT_ENCODED | MAY_DIFFER | ABOVE_0)
    """triplet: the least amount by which the cosine of the positive should be higher."""
    pooling: Literal["mean", "cls", "last", "max"] | None = field(default=None, metadata=NOT_ENCODED)
    """How the hidden states of a text become one embedding: their mean, the first, the last, or the largest value of
    each dimension. Unset: as the base model's folder tells sentence-transformers, else mean for encoders and last for
    decoders."""
    normalize: bool | None = field(default=None, metadata=NOT_ENCODED)
    """Whether output embeddings have length 1; losses and metrics compare cosines in any case. Unset: as the
    base model's folder tells sentence-transformers, else true."""
    mini_batch_size: int | None = field(default=None, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_1)
    """Number of texts in the model at once, for batches that are too large for memory: each part is computed twice, and
    the result is the same. Unset: the rows of the batch."""
    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest text, in tokens, within what the base model can read; the end of a longer one is cut. May stand under
    ``dataset`` as well."""


@dataclass(frozen=True, kw_only=True)
class RerankerSettings(TaskSettings):
    """Settings of reranker."""

    loss: Literal["cross_entropy", "bce", "mse"] | None = field(default=None, metadata=MAY_DIFFER)
    """What is learnt from a row. cross_entropy: a query's positive has a higher score than its negatives; bce: each
    document by itself, the positive as 1 and the negatives as 0, or as the row's label says; mse: the score, before the
    sigmoid, is the label. Unset: cross_entropy where rows have a positive, bce where their labels are from 0 to 1,
    else mse."""
    labelled: bool | None = None
    """Whether a row is one document with a label, and not a positive with its negatives. Unset: found in the columns of
    the training rows."""
    negatives: Literal["rows", "mined"] = field(default="rows", metadata=MAY_DIFFER)
    """Where negatives are from. rows: the rows' own; mined: rows without one get those documents of all rows that an
    embedding model finds nearest to their query."""
    miner: str | None = field(default=None, metadata=MAY_DIFFER)
    """mined: the embedding model, a base model or an adapter of feature_extraction. Unset: the base model."""
    num_negatives: int = field(default=4, metadata=MAY_DIFFER | AT_LEAST_1)
    """mined: the number of negatives of a training query."""
    mining: Literal["spread", "nearest"] = field(default="spread", metadata=MAY_DIFFER)
    """mined: which documents become a training query's negatives. spread: the nearest, the farthest, and some between,
    most of them near; nearest: the nearest ones, of which only a model learns that ranks well already."""
    eval_negatives: int = field(default=20, metadata=MAY_DIFFER | AT_LEAST_1)
    """mined: the number of negatives of an evaluation query. They are the nearest documents whatever mining_margin
    says: what a search by the miner would find, to be sorted."""
    mining_margin: float | None = field(default=0.05, metadata=MAY_DIFFER | SHARE)
    """mined: the share of the positive's cosine by which that of a training query's negative must be lower. What is
    nearer is left out: it may be right as well. null: nothing is left out but what rows say is right, where each query
    is sure to have one right document."""
    max_length: int = field(default=1024, metadata=MAY_DIFFER)
    """Longest query with its document, in tokens, within what the base model can read; the end of the longer of the two
    is cut. May stand under ``dataset`` as well."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained``: one number."""
        return {"num_labels": 1}


@dataclass(frozen=True, kw_only=True)
class SpeechRecognitionSettings(TaskSettings):
    """Settings of speech_recognition."""

    language: str | None = None
    """The spoken language, as ``de`` or ``german``. Required for Whisper models of several languages; English-only
    models do not use it."""
    mode: Literal["transcribe", "translate"] = "transcribe"
    """What the text of a row is: a transcript, or a translation into English. For Whisper models of several
    languages."""
    timestamps: bool = False
    """Whether texts and answers contain the times at which each part begins and ends, as in
    ``<|0.00|> Hello.<|1.20|>``. For Whisper models."""
    prompt: str | None = None
    """Text that the model reads before each answer, in training too, as if it had been said before: with names and
    words in their right spelling. It does not become a part of answers. For Whisper models."""
    num_beams: int = field(default=1, metadata=NOT_ENCODED | AT_LEAST_1)
    """Number of beams when an answer is generated; 1: greedy decoding, within the base model's generation_config.json
    (repetition_penalty, min_length)."""
    normalize_text: bool = field(default=False, metadata=NOT_ENCODED | MAY_DIFFER)
    """In evaluation, compare texts as Whisper's authors do: in lower case, without punctuation, English numbers and
    spellings in one form. Training uses the texts unchanged."""
    vocabulary: list[str] | None = None
    """The letters that a CTC model writes, as wav2vec2 does, without the blank; other models write tokens of their own.
    Unset: those of the base model, where it writes letters already, else those in the training rows."""

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained`` for the letters: as many outputs, of which one stands for no letter."""
        known = self.vocabulary or []
        return {"vocab_size": len(known), "pad_token_id": known.index(CTC_BLANK)} if CTC_BLANK in known else {}


@dataclass(frozen=True, kw_only=True)
class TextToImageSettings(TaskSettings):
    """Settings of text_to_image."""

    instance_prompt: str | None = field(default=None, metadata=MAY_DIFFER)
    """Caption of the rows without one, as in ``a photo of sks dog``; in DreamBooth of all rows."""
    class_prompt: str | None = field(default=None, metadata=NOT_ENCODED | MAY_DIFFER)
    """The kind of thing on the pictures, as in ``a photo of a dog``. Each picture is trained together with one of this
    kind from the base model, so that the model does not forget the others (prior preservation,
    https://arxiv.org/abs/2208.12242)."""
    class_data_dir: str | None = field(default=None, metadata=NOT_ENCODED | MAY_DIFFER)
    """Folder of pictures for class_prompt. Unset: the base model makes them, once for a prompt and seed, and they are
    cached."""
    num_class_images: int = field(default=100, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_1)
    """Number of pictures of class_prompt that the base model makes."""
    prior_loss_weight: float = field(default=1.0, metadata=NOT_ENCODED | MAY_DIFFER | AT_LEAST_0)
    """Weight of these pictures, relative to the pictures of the rows."""
    train_text_encoder: bool = field(default=False, metadata=NOT_ENCODED)
    """Also adapt CLIP's text encoders: pictures are truer to one thing, and training takes more memory."""
    resolution: int | None = field(default=None, metadata=AT_LEAST_1)
    """Side of the pictures in training and in answers, in pixels. Unset: the base model's."""
    center_crop: bool = field(default=True, metadata=NOT_ENCODED | MAY_DIFFER)
    """Crop squares from the middle; false: from a random place at each step."""
    random_flip: bool = field(default=False, metadata=NOT_ENCODED | MAY_DIFFER)
    """Mirror a random half of the pictures at each step."""
    buckets: bool = False
    """Keep each picture's shape instead of a square: it is cut to the size that is nearest to its shape, of about the
    area of ``resolution`` squared. A batch has pictures of one size."""
    caption_dropout: float = field(default=0.0, metadata=NOT_ENCODED | MAY_DIFFER | SHARE)
    """Share of captions that are left out in training, so that pictures can be made with guidance."""
    snr_gamma: float | None = field(default=None, metadata=NOT_ENCODED | MAY_DIFFER | ABOVE_0)
    """Min-SNR weighting (https://arxiv.org/abs/2303.09556): steps with little noise count less in the loss. 5 is usual.
    Of base models that predict a flow it is refused."""
    cache_latents: bool = field(default=False, metadata=NOT_ENCODED | MAY_DIFFER)
    """Keep the pictures' latents in the cache on disk, for later runs with the same autoencoder, pictures and size."""
    sample_prompts: list[str] = field(default_factory=list, metadata=NOT_ENCODED | MAY_DIFFER)
    """Prompts for sample pictures at each evaluation, always from the same noise; they are in ``samples/`` of the run
    folder."""
    num_inference_steps: int | None = field(default=None, metadata=NOT_ENCODED | AT_LEAST_1)
    """Number of denoising steps for a picture. Unset: the pipeline's default."""
    guidance_scale: float | None = field(default=None, metadata=NOT_ENCODED | AT_LEAST_0)
    """How closely a picture follows its prompt. Unset: the pipeline's default."""

    def files(self) -> list[str]:
        """The folder of class_data_dir."""
        return [self.class_data_dir] if self.class_data_dir else []

    def model_options(self) -> dict[str, Any]:
        """Options of the loader: which parts may be adapted."""
        return {"train_text_encoder": self.train_text_encoder}


def is_iob2(tag: str) -> bool:
    """Whether a tag says where an entity begins or goes on, or that there is none."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def _label_names(config: Any, count: int) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[number]) if len(names) == count else f"LABEL_{number}" for number in range(count)]


def _label_options(labels: list[str]) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }
