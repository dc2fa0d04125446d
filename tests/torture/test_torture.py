"""A sample of every campaign; ``make torture`` runs them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, Trial, campaigns
from report import page

ELSEWHERE = {
    "A full disk": "train/test_train_folder.py: test_a_full_disk",
    "damaged checkpoints": "train/test_train_folder.py: test_a_damaged_checkpoint_is_set_aside",
    "signals while training": "train/test_train_folder.py: test_a_signal_stops_with_a_checkpoint_and_...",
    "divergence": "train/test_train_loop.py: test_the_last_checkpoint_stands_after_a_divergence",
    "hub faults under push": "hub/test_push.py: test_a_refusal_ends_the_push_at_once and those that follow it",
    "hub faults under pulls": "hub/test_pull.py: the same of pulls",
    "out of memory": "train/test_train_loop.py: test_too_little_memory_names_the_batch_and_what_to_change",
}
"""Campaigns of which ``make test`` has a cheaper test, that keeps the same promise."""
SAMPLES = [(campaign, trial) for campaign in campaigns() for trial in campaign.sampled()]


@pytest.mark.grid(each=lambda campaign: campaign.name)
@pytest.mark.filterwarnings("ignore:exclude_modules excludes none")  # a good adapter whose setting says nothing
@pytest.mark.parametrize(
    ("campaign", "trial"),
    [
        pytest.param(
            campaign,
            trial,
            id=f"{campaign.name}: {trial.name}"[:100],
            marks=[pytest.mark.slow] if campaign.name in ELSEWHERE else [],
        )
        for campaign, trial in SAMPLES
    ],
)
def test_a_sample(campaign: Campaign, trial: Trial, tmp_path: Path) -> None:
    del campaign  # its name is the test's
    trial.run(tmp_path)


@pytest.mark.parametrize("campaign", campaigns(), ids=lambda campaign: campaign.name)
def test_a_campaign_has_as_many_trials_as_it_must(campaign: Campaign) -> None:
    names = [trial.name for trial in campaign.trials()]
    assert len(names) == len(set(names)), "two trials have one name"
    assert len(names) >= campaign.least


def test_the_page_says_what_was_not_as_promised() -> None:
    campaign = Campaign("kills", "Nothing is lost.", list, least=2, sample=1)
    found: dict[str, Any] = {
        "kills": {"trials": 2, "failures": [{"trial": "second", "failure": "it was lost\nwholly"}], "seconds": 60},
        "compare: others": {"counts": {"trials": 3, "resumed_silently": 2}, "seconds": 1},
    }
    text = page(found, [campaign], {"system": "a machine", "packages": "torch"})
    assert "| kills | Nothing is lost. | 2 | 1 | 1.0 |" in text
    assert "- kills: second: it was lost\n" in text
    assert "| others | trials 3, resumed silently 2 |" in text
