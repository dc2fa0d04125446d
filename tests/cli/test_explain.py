from __future__ import annotations


def test_a_setting(cli) -> None:
    assert cli("explain", "dataset.overlong").out == (
        "dataset.overlong (setting)\n"
        "  What to do with longer examples: truncate them at the end, drop them, stop with an error, or split them "
        "into pieces that are separate examples. They are counted in any case.\n"
        "  type: truncate, drop, error or split\n"
        "  default: truncate\n"
        "  allowed: truncate, drop, error, split\n"
        "\n"
        "  dataset:\n"
        "    overlong: truncate\n"
    )


def test_a_method(cli) -> None:
    lines = cli("explain", "lora").out.splitlines()
    assert lines[0] == "lora (method)"
    assert "  paper: https://arxiv.org/abs/2106.09685" in lines
    assert any(line.split()[:2] == ["r", "8"] for line in lines)


def test_an_unknown_key(cli) -> None:
    ran = cli("explain", "lora_rank")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines() == [
        "error: unknown name: 'lora_rank'",
        "did you mean 'method.r'?",
    ]
