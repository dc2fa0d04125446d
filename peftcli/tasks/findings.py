"""Every finding that a dataset can have, whatever its task: the names that ``dataset.allow`` may hold.

Readable without numpy and torch.
"""

from __future__ import annotations

from peftcli.data import findings as generic
from peftcli.tasks.text import findings as text

FINDINGS = generic.FINDINGS | text.FINDINGS
