"""Every method x model x promise of the conformance table."""

from __future__ import annotations

from pathlib import Path

import pytest
from promises import MODELS, PROMISES, NotApplicable, is_refused, why_not

from peftcli.methods import METHODS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("promise", PROMISES, ids=lambda title: title.split(",")[0].replace(" ", "-"))
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_promise(method: str, kind: str, promise: str, tmp_path: Path) -> None:
    if reason := why_not(method, kind):
        is_refused(method, kind)
        pytest.skip(reason)
    try:
        PROMISES[promise](method, kind, tmp_path)
    except NotApplicable as reason:
        pytest.skip(str(reason))
