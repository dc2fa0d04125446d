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
)
"""Those of the classification tasks."""

FINDINGS = generic.FINDINGS | text.FINDINGS | CLASSES
