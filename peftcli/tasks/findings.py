"""Every finding that a dataset can have, whatever its task: the names that ``dataset.allow`` may hold.

Readable without numpy and torch.
"""

from __future__ import annotations

from peftcli.data import findings as generic
from peftcli.data.findings import Kind, by_name
from peftcli.tasks.text import findings as text

CLASSES = by_name(
    Kind(
        "unbalanced_classes",
        "warning",
        "are of one class",
        "A model can be right that often without learning. Add rows of the other classes, or set task.class_weights.",
    ),
    Kind(
        "missing_classes",
        "warning",
        "are of other classes than",
        "Add rows of these classes, or leave their names out of task.labels.",
    ),
    Kind(
        "joined_labels",
        "warning",
        "have a label that seems to be several ones, and is trained as one class of its own",
        "Set task.label_separator, unless these are the names of classes.",
    ),
    Kind(
        "converted_tags",
        "warning",
        "have tags of BILOU, IOBES or BMES, which are turned into those of IOB2",
        "Where each tag should be a class of its own, set task.scheme to none.",
    ),
    Kind(
        "parts_of_words",
        "warning",
        "have an entity that is a part of a word; the whole word is trained, and answers have whole words",
        "Check where these entities begin and end.",
    ),
)
"""Those of the classification tasks."""

ANSWERS = by_name(
    Kind(
        "several_places",
        "warning",
        "have an answer without its place that is in the context more than once; the first place is trained",
        "Give the place of each answer: answers: {text: [...], answer_start: [...]}.",
    ),
)
"""Those of question_answering."""

MASKS = by_name(
    Kind(
        "binary_masks",
        "warning",
        "have a mask of 0 and 255 only, and 255 does not count",
        "Where 255 stands for 1, set task.binary_masks: true. As they are, nothing but 0 is learnt.",
        error_above=0.5,
    ),
    Kind(
        "unbalanced_masks",
        "warning",
        "have masks that together are nearly all of one class",
        "A model can be right that often without learning: look at eval_mean_iou, or add pictures of others.",
    ),
)
"""Those of semantic segmentation."""

BOXES = by_name(
    Kind(
        "boxes_are_corners",
        "error",
        "have boxes that fit as left, top, right, bottom too; those of other rows fit only so",
        "Set task.box_format: xyxy, unless the boxes are left, top, width, height.",
    ),
)
"""Those of object_detection."""

SOUND = by_name(
    # Without the words that are cut off with the sound, the rows would be right; nobody knows where they end.
    Kind(
        "clips_too_long",
        "warning",
        "are longer than the model hears at once and are left out",
        "Cut the clips, and their transcripts, into pieces of at most 30 seconds.",
        error_above=0.5,
    ),
    Kind(
        "silent_clips",
        "warning",
        "are clips without sound: a model that is trained on them says what nobody said",
        "Remove these rows.",
        error_above=0.5,
    ),
)
"""Those of speech_recognition."""

SOUND_CLASSES = by_name(
    Kind(
        "clips_without_sound",
        "warning",
        "are clips without sound, whose class nobody can hear",
        "Remove these rows, unless silence is a class.",
    ),
)
"""Those of audio_classification."""

EMBEDDINGS = by_name(
    Kind(
        "positive_is_anchor",
        "warning",
        "have a positive that is the anchor itself: every model embeds them alike",
        "Remove these rows: nothing is learnt from them.",
    ),
    Kind(
        "negative_is_positive",
        "warning",
        "have a negative that is their anchor or their positive",
        "Give these rows another negative.",
    ),
    # As of pairs that contradict one another.
    Kind(
        "pairs_with_label",
        "warning",
        "have a label or score, which is not read: every pair is trained as texts that belong together",
        "Keep only the rows whose texts belong together, or train on scored pairs: sentence1, sentence2 and score.",
    ),
    # Within a batch, such rows are no negatives of one another; in other words, they may be.
    Kind(
        "repeated_texts",
        "info",
        "share their anchor or their positive with an earlier row, and are no negatives of it",
        "Check whether other rows say the same in other words: these count as negatives.",
        warning_above=0.1,
    ),
    Kind(
        "anchors_in_eval",
        "info",
        "have an anchor that is also a training anchor, with another positive",
        "Check whether the metrics should measure that.",
        warning_above=0.1,
    ),
)
"""Those of feature_extraction."""

RANKED = by_name(
    Kind(
        "positive_is_negative",
        "warning",
        "have a positive that is also one of their negatives: its score is to be higher than itself",
        "Give these rows other negatives.",
    ),
    Kind(
        "documents_contradict",
        "warning",
        "have a document that is a positive of the query in one row and a negative of it in another",
        "Decide which of the two it is, and remove it from the other row.",
    ),
)
"""Those of reranker."""

MASKED = by_name(
    # A tokenizer of another language or alphabet, or texts in lower case where it knows capitals alone.
    Kind(
        "nothing_to_mask",
        "warning",
        "hold nothing but special tokens, and are left out",
        "Check whether the base model's tokenizer knows these texts: it writes what it does not know as one token.",
        error_above=0.5,
    ),
    Kind(
        "unknown_tokens",
        "warning",
        "consist for a tenth or more of what the tokenizer does not know, which is never masked",
        "Check the alphabet of these texts, and whether the tokenizer tells capitals from small letters.",
        error_above=0.5,
    ),
)
"""Those of masked_lm."""


CHOICES = by_name(
    Kind(
        "choice_twice",
        "warning",
        "have a choice that stands twice: one of the two is wrong to the loss, though both are the same",
        "Remove one of them, and count the place of the right choice again.",
    ),
)
"""Those of multiple_choice."""


PICTURES = by_name(
    Kind(
        "small_pictures",
        "warning",
        "are pictures smaller than the resolution, which are enlarged: what is made will be as blurred",
        "Use larger pictures, or a smaller task.resolution.",
    ),
    Kind(
        "no_caption",
        "warning",
        "have no caption, and are trained without a prompt",
        "Write captions, or set task.instance_prompt.",
        error_above=0.5,
    ),
    Kind(
        "captions_cut",
        "warning",
        "have a caption that is longer than every encoder of texts reads: its end is not trained",
        "Shorten these captions: CLIP reads 77 tokens, some 50 words.",
    ),
)
"""Those of text_to_image."""

SEEN = by_name(
    Kind(
        "pictures_too_long",
        "warning",
        "have pictures of more tokens than max_length, and are left out",
        "Raise dataset.max_length, or make the pictures smaller.",
        error_above=0.5,
    ),
    # Several captions of a picture are as good as one.
    Kind(
        "answers_differ",
        "info",
        "have the same pictures and the same question as another row, and another answer",
        "Check which answer is right, unless the question has several, as a picture has captions.",
        warning_above=0.05,
    ),
    Kind(
        "no_picture",
        "info",
        "have no picture",
        "Nothing needs to be done, if answers to texts alone should be learnt too.",
    ),
)
"""Those of image_text_to_text."""

REWARDED = by_name(
    Kind(
        "constant_reward",
        "warning",
        "want the same answer of every row, so that a reward is constant over the data",
        "A model that always gives this answer is always right. Check the column, or leave the reward out.",
    ),
)
"""Those of grpo."""

INFLUENCE = by_name(
    Kind(
        "looks_mislabelled",
        "warning",
        "look mislabelled: the adapter has not learnt them, and what they teach is against rows like them",
        "Check their labels or answers, the first ones first.",
    ),
    Kind(
        "hurts_evaluation",
        "info",
        "made the evaluation rows worse, far more than others",
        "Check them, and train without them to see whether evaluation gets better.",
    ),
    Kind(
        "without_influence",
        "info",
        "have nearly no gradient: what they say is known",
        "They may be left out: the adapter would be nearly the same.",
    ),
)
"""Those of ``inspect --adapter``, from the gradients of rows. None stops a run."""

FINDINGS = (
    generic.FINDINGS
    | text.FINDINGS
    | CLASSES
    | ANSWERS
    | MASKS
    | BOXES
    | PICTURES
    | SOUND
    | SOUND_CLASSES
    | EMBEDDINGS
    | SEEN
    | RANKED
    | MASKED
    | CHOICES
    | REWARDED
    | INFLUENCE
)
