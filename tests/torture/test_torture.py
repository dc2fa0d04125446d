"""A sample of every campaign; ``make torture`` runs them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from campaigns import Campaign, Trial, campaigns
from report import page

SAMPLES = [(campaign, trial) for campaign in campaigns() for trial in campaign.sampled()]


@pytest.mark.grid(each=lambda campaign: campaign.name)
@pytest.mark.filterwarnings("ignore:exclude_modules excludes none")  # a good adapter whose setting says nothing
@pytest.mark.parametrize(
    ("campaign", "trial"), SAMPLES, ids=[f"{campaign.name}: {trial.name}"[:100] for campaign, trial in SAMPLES]
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
