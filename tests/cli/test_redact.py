from __future__ import annotations

import base64
import html
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from peftcli.cli import console
from peftcli.system.secrets import redact, redact_values, secret_spans

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"


@pytest.mark.parametrize("name", ["APP_TOKEN", "APP_KEY", "APP_SECRET", "APP_PASSWORD", "app_password"])
def test_the_value_of_a_secret_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact("it is xK9 mL2pQ7.") == "it is xK9 mL2pQ7."
    monkeypatch.setenv(name, " xK9 mL2pQ7\n")
    assert redact("it is xK9 mL2pQ7.") == "it is ***."


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_TOKEN", "true"),
        ("APP_PASSWORD", "short12"),
        ("APP_PASSWORD", "12345678"),
        ("APP_SECRET", "0.12345678"),
        ("APP_KEY", "/usr/bin/env"),
        ("APP_KEY", "completion"),
        ("APP_KEY", "user-messages"),
        ("APP_KEY", "datasets/train-v2.jsonl"),
        ("APP_KEY", "/projects/cache-1"),
        ("APP_KEY", "./data/a1b-2"),
        ("APP_KEY", "wikitext-103-raw-v1/train"),
        ("EOS_TOKEN", "<|endoftext|>"),
        ("MASK_TOKEN", "[MASKED-1]"),
        ("APP_KEYS", "xK9mL2pQ7"),
        ("KEYBOARD", "xK9mL2pQ7"),
    ],
)
def test_a_value_that_is_no_secret(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("APP_KEY", "glc_eyJvIjoiMTIzNDU2/LCJuIjoi", "glc_eyJvIjoiMTIzNDU2/LCJuIjoi"),
        ("APP_KEY", "4/0AeanS0ZqV8_kT-3uX", "4/0AeanS0ZqV8_kT-3uX"),
        ("APP_KEY", "s3cr3t-user/Tr0ub4dor_3/xyz", "s3cr3t-user/Tr0ub4dor_3/xyz"),
        ("APP_URL", "redis://me:qwertyuiopasdfghjkl@h", "qwertyuiopasdfghjkl"),
        ("APP_URL", "redis://:hunterab@h", "hunterab"),
    ],
    ids=["two parts", "a short part", "a user", "a long password", "no user"],
)
def test_what_only_looks_like_words_or_a_path(
    name: str, value: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {secret} b") == "a *** b"


def test_a_word_is_a_password_but_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_PASSWORD", "sunshine")
    monkeypatch.setenv("DATABASE_URL", "postgres://app:postgres@db/x")
    monkeypatch.setenv("APP_KEY", "wJalrXUt/K7MDENG+bPxRfiCY")
    assert redact("sunshine, app:postgres, postgres, wJalrXUt/K7MDENG+bPxRfiCY") == "***, ***, postgres, ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"with {TOKEN}", "with ***"),
        (f"run_{TOKEN}/x", "run_***/x"),
        ("hf_oauth_eyJhbGciOi.J9-x_y.zzzzzzzz", "***"),
        ("hf_hub_download and hf_transfer", "hf_hub_download and hf_transfer"),
        ("https://me:pa55@host/x", "https://***@host/x"),
        ("https://:pa55@host/x", "https://***@host/x"),
        ("https://me:p@55/x@host/x", "https://***@host/x"),
        ("https://0123456789abcdef@host/x", "https://***@host/x"),
        ("ssh://git@github.com/x", "ssh://git@github.com/x"),
        ("http://localhost:8080/path@2", "http://localhost:8080/path@2"),
        ('{"a": "s3://x", "b": "c@d"}', '{"a": "s3://x", "b": "c@d"}'),
    ],
    ids=lambda text: str(
        len(text)
    ),  # pytest puts the name of a test into the environment, where a URL's password is a secret
)
def test_what_is_secret_by_its_form(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def test_each_form_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'a"b\\c<d>&é/1'
    monkeypatch.setenv("APP_PASSWORD", secret)
    for text in (
        secret,
        quote(secret),
        quote(secret, safe=""),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        html.escape(secret),
        base64.b64encode(secret.encode()).decode().rstrip("="),
        re.sub("%..", lambda found: found[0].lower(), quote(secret, safe="")),
        json.dumps(secret, ensure_ascii=False)[1:-1],
        json.dumps(secret)[1:-1].replace("/", "\\/"),
        json.dumps(secret)[1:-1].replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    ):
        assert redact(f"x{text}x") == "x***x", text


def test_a_secret_with_spaces_in_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_PASSWORD", "correct horse 7+")
    assert redact("p=correct+horse+7%2B&q") == "p=***&q"
    assert redact("p=correct%20horse%207%2b&q") == "p=***&q"


@pytest.mark.parametrize("user", ["", "m", "me", "you", "them:"])
def test_basic_authorization(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_PASSWORD", "xK9?mL2>pQ7~")
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        header = encode(f"{user}:xK9?mL2>pQ7~".encode()).decode()
        shown = redact(f"Authorization: Basic {header}").removeprefix("Authorization: Basic ")
        assert "***" in shown
        assert len(shown) < len(header) - 8


def test_the_end_of_a_secret_behind_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_KEY", "0123456789abcdef" * 4)
    assert redact("found '...89abcdef0123456789abcdef'") == "found '...***'"


def test_the_password_of_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass%2Fword1@proxy:3128")
    assert redact("pass/word1, pass%2Fword1") == "***, ***"
    basic = base64.b64encode(b"me:pass/word1").decode()
    assert redact(f"Proxy-Authorization: Basic {basic}").rstrip("=") == "Proxy-Authorization: Basic ***"


@pytest.mark.parametrize("loaded", [False, True])
def test_the_token_of_the_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text("an-old-token-7\n")
    if loaded:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    else:
        monkeypatch.delitem(sys.modules, "huggingface_hub.constants")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact("an-old-token-7") == "***"
    (tmp_path / "token").unlink()
    assert redact("an-old-token-7") == "an-old-token-7"


def test_of_two_secrets_the_longer_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret-1")
    monkeypatch.setenv("B_TOKEN", "secret-1-and-2")
    assert redact("secret-1-and-2 secret-1") == "*** ***"


def test_a_secret_that_a_message_has_cut(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.setenv("APP_KEY", "0123456789abcdef" * 4)
    assert redact("found 'x 0123456789abcdef0123...'") == "found 'x ***'"
    assert redact("0123456789abcdef" * 4 + "/a") == "***/a"
    assert redact("0123456789abcde") == "0123456789abcde"
    ran = cli("check", "a" * 20 + "0123456789abcdef" * 4)
    assert "0123" not in ran.out + ran.err


def test_each_line_of_a_private_key(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "-----BEGIN PRIVATE KEY-----",
        "MIIEvQIBADANBgkqhkiG9w0BAQEF",
        "AASCBKcwggSjAgEAAoIBAQDx",
        "-----END PRIVATE KEY-----",
    ]
    monkeypatch.setenv("DEPLOY_KEY", "\n".join(lines))
    assert [redact(line) for line in lines[1:3]] == ["***", "***"]
    assert redact("\n".join(lines)) == "***"
    harmless = '"auth_uri": "https://accounts.google.com/o/oauth2/auth",'
    account = json.dumps({"private_key": "\n".join(lines)}, indent=2)
    monkeypatch.setenv("DEPLOY_KEY", account.replace("{", f"{{\n  {harmless}"))
    assert [redact(line) for line in (harmless, *lines)] == [harmless, lines[0], "***", "***", lines[3]]


def test_values_and_keys_in_data() -> None:
    data = {"a": [TOKEN, 1, None, (TOKEN, 2.5)], TOKEN: {"b": f"x {TOKEN}"}, "n": True}
    assert redact_values(data) == {"a": ["***", 1, None, ["***", 2.5]], "***": {"b": "x ***"}, "n": True}
    assert data["a"][0] == TOKEN


def test_where_secrets_are() -> None:
    assert secret_spans(f"ab {TOKEN} {TOKEN}") == [(3, 30), (31, 58)]
    assert secret_spans("ab") == []


def test_a_hostile_text_takes_no_time() -> None:
    started = time.thread_time()
    for text in ("://a:" * 40_000, "://" + "a" * 200_000, "hf_" * 60_000, "://" * 60_000):
        redact(text)
    assert time.thread_time() - started < 5


def test_json_stays_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_PASSWORD", 'x"},\n"y": 7')
    console.print_json({"said": 'it is x"},\n"y": 7!', "n": 1})
    assert json.loads(capsys.readouterr().out) == {"said": "it is ***!", "n": 1}


def test_other_libraries_write_through_it(capsys: pytest.CaptureFixture[str]) -> None:
    with console.redacted_streams():
        print(f"out {TOKEN}")
        print(f"err {TOKEN}", file=sys.stderr)
        sys.stderr.writelines([f"{TOKEN}\n", "b\n"])
        assert not sys.stdout.isatty()
    print(TOKEN)
    assert capsys.readouterr() == (f"out ***\n{TOKEN}\n", "err ***\n***\nb\n")


def test_a_streamed_answer_hides_what_comes_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    from peftcli.cli.console import streamed_output

    with streamed_output() as write:
        for part in ("Say ", TOKEN[:9], TOKEN[9:], ", please\nor 你", "好", " not"):
            write(part)
    assert capsys.readouterr().out == "Say ***, please\nor 你好 not\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_streamed_secret_with_spaces(
    size: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftcli.cli.console import streamed_output

    monkeypatch.setenv("APP_PASSWORD", "correct horse 7")
    text = "It is correct horse 7, or correct horse 8, or https://me:correct horse@x, or correct"
    with streamed_output() as write:
        for start in range(0, len(text), size):
            write(text[start : start + size])
    assert capsys.readouterr().out == redact(text) + "\n"


def test_what_is_streamed_is_shown_soon(capsys: pytest.CaptureFixture[str]) -> None:
    from peftcli.cli.console import streamed_output

    with streamed_output() as write:
        write("One two three ")
        assert capsys.readouterr().out == "One two three "
        write("four")
        assert capsys.readouterr().out == ""


def test_a_message(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    monkeypatch.setenv("APP_TOKEN", "not-for-you-1")
    for option in ("--json", "--debug"):
        ran = cli("explain", "not-for-you-1", option)
        assert ran.code == 2
        assert "***" in ran.err
        assert "not-for-you-1" not in ran.out + ran.err
