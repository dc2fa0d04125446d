from __future__ import annotations

import json

from peftcli.recipe import json_schema


def test_schema_is_printed(cli) -> None:
    ran = cli("schema")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == json_schema()
