"""Recipes that are wrong, through ``check`` and ``train``; valid ones that look odd; mutations of those in configs/."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unicodedata import category

from bad_recipe_cases import CLASSES, GOOD, Case
from campaigns import Campaign, Trial
from good_recipe_cases import Valid, valid_recipes
from in_process import Ran, peftcli

from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.recipe.settings import Setting, branches, kinds, method_settings, sections, settings
from peftcli.schema import Recipe, Source

CONFIGS = Path(__file__).parents[2] / "configs"
LONGEST_MESSAGE = 1000
MOST_OUTPUT = 200_000
SECONDS = 2.0
SLOWEST_MUTATION = 5.0
GROUP = 20
MUTATIONS = 2000


# --- bad recipes


def bad_recipes() -> list[Trial]:
    by_hand = [
        Trial(f"{of}: {name}", partial(refused, case)) for of, cases in CLASSES.items() for name, case in cases.items()
    ]
    return [*by_hand, *(Trial(name, partial(refused, case)) for name, case in generated())]


def refused(case: Case, folder: Path) -> None:
    """``check`` and ``train`` refuse a recipe, and say what is wrong with it and where."""
    path = folder / "recipe.yaml"
    path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode("utf-8", "surrogatepass"))
    case.setup(folder)
    before = listing(folder)
    if not case.args:
        checked = timed("check", path.name, "--json", cwd=folder, env=case.env)
        assert checked.code == 2, f"check ended with {checked.code}: {checked.err[-500:]!r}"
        assert checked.err == b"", checked.err[:500]
        _judge(case, json.loads(checked.out)["errors"], path.name)
        plain = timed("check", path.name, cwd=folder, env=case.env)
        assert plain.code == 2
        assert plain.out.decode().splitlines()[-1].startswith(f"{path.name}: ")
        for ran in (checked, plain):
            harmless(ran, case.secret)
    trained = timed("train", path.name, *case.args, "--json", cwd=folder, env=case.env)
    harmless(trained, case.secret)
    assert trained.code == 2, f"train ended with {trained.code}: {trained.err[-500:]!r}"
    assert len(trained.messages) == 1, trained.err[:500]
    error = json.loads(trained.out)["error"]
    assert error["exit_code"] == 2
    problems = error.get("problems") or [error]
    _judge(case, problems, "command line" if case.args else path.name)
    assert listing(folder) == before, "something was made"


def _judge(case: Case, problems: Sequence[dict[str, Any]], file: str) -> None:
    assert problems
    for problem in problems:
        text = f"{problem['message']} {problem.get('suggestion') or ''}"
        assert len(text) <= LONGEST_MESSAGE, f"{len(text)} characters: {text[:200]}"
        assert problem["message"].strip()
        assert problem["file"] or problem.get("hint"), problem
        located = problem["line"] is not None or problem["key"] is not None
        assert located or problem["file"] in (file, "command line", None) or len(problems) > 1, problem
    meant = [problem for problem in problems if _is_meant(case, problem)]
    told = "\n".join(
        f"{each['file']}:{each['line']}: {each['key']}: {each['message']}; {each.get('suggestion')}"
        for each in problems
    )
    assert meant, f"none of these is about key {case.key!r} in line {case.line} and says {case.says!r}:\n{told[:2000]}"


def _is_meant(case: Case, problem: dict[str, Any]) -> bool:
    words = f"{problem['message']}; did you mean {problem.get('suggestion')!r}?"
    key = problem["key"] or ""
    return (
        case.says in words
        and (case.key is None or key == case.key or key.startswith((f"{case.key}.", f"{case.key}[")))
        and (case.line is None or problem["line"] in (case.line, None if "at most" in case.says else case.line))
    )


def timed(*args: object, **options: Any) -> Ran:
    start = time.monotonic()
    cpu = time.process_time()
    ran = peftcli(*args, **options)
    wall, used = time.monotonic() - start, time.process_time() - cpu
    assert min(wall, used) < SECONDS, f"{args[0]} took {wall:.1f} s, {used:.1f} s of computing"
    return ran


def harmless(ran: Ran, secret: str | None = None) -> None:
    """What was printed is text that no terminal acts on, not long, and holds neither a traceback nor a secret."""
    for output in (ran.out, ran.err):
        text = output.decode("utf-8")
        assert len(text) <= MOST_OUTPUT, f"{len(text)} characters are printed"
        assert "Traceback" not in text, text[-2000:]
        steering = {
            char for char in text if char not in "\n\u200c\u200d" and category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        }
        assert not steering, f"{steering} is printed"
        assert secret is None or secret not in text, "the secret is printed"


@contextlib.contextmanager
def _inside(folder: Path, env: dict[str, str]) -> Iterator[None]:
    before, variables = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ.update(env)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- one of every setting, of a kind that it does not take

WRONG = {
    "a list": "[x, 1.5, [y]]",
    "a mapping": "{x: {y: z}}",
    "text": "no-such-thing",
    "a truth value": "true",
    "a fraction": "0.12345",
    "NaN": ".nan",
    "infinity": "-.inf",
    "a huge number": "9" * 30,
    "nothing": "null",
}
TURNS = 3
"""Kinds that each setting of a section is given; one of a method is given one."""


def generated() -> Iterator[tuple[str, Case]]:
    """Recipes in which one setting has a value of another kind."""
    turn = 0
    for key, owner, setting, section in _all_settings():
        wrong, turns = [name for name in WRONG if not _takes(setting, name)], 1 if owner in METHODS else TURNS
        for name in dict.fromkeys(wrong[(turn + step) % len(wrong)] for step in range(turns)):
            text = with_section(key.partition(".")[0], section(setting.name, WRONG[name]))
            yield f"generated: {key} of {owner} is {name}", Case(text, "", key)
        turn += turns


def _all_settings() -> Iterator[tuple[str, str, Setting, Callable[[str, str], str]]]:
    """Key, what it is a setting of, and what writes the section that holds it."""
    required = {"base_model": {"name": "a/b"}, "dataset": {"train": "a/b"}, "training": {"output_dir": "out"}}
    for section, cls in sections().items():
        for setting in settings(cls).values():
            yield f"{section}.{setting.name}", section, setting, partial(_mapping, required.get(section, {}))
    for setting in settings(Source).values():
        yield f"dataset.mix[0].{setting.name}", "dataset.mix", setting, partial(_mixed, {"train": "a/b"})
    for method in METHODS:
        for setting in method_settings(method).values():
            yield f"method.{setting.name}", method, setting, partial(_mapping, {"type": method})


def _mapping(given: dict[str, str], name: str, value: str) -> str:
    return "{" + ", ".join(f"{key}: {text}" for key, text in (given | {name: value}).items()) + "}"


def _mixed(given: dict[str, str], name: str, value: str) -> str:
    return f"{{mix: [{_mapping(given, name, value)}]}}"


def with_section(section: str, written: str) -> str:
    """The good recipe with another section."""
    lines = GOOD.replace(
        "training:\n  output_dir: out\n  learning_rate: 1e-4\n", "training: {output_dir: out}\n"
    ).splitlines()
    kept = [line for line in lines if not line.startswith(f"{section}:")]
    return "\n".join([*kept, f"{section}: {written}", ""])


def _takes(setting: Setting, wrong: str) -> bool:
    """Whether the setting takes a value like this one."""
    accepted = kinds(setting.hint)
    text = str in accepted and any(branch is str for branch in branches(setting.hint))
    if wrong in ("a list", "a mapping"):
        return wrong == "a mapping" and "Any" in str(setting.hint)  # or else what they hold is wrong
    if wrong == "nothing":
        return bool(accepted & {type(None), list, dict})
    if wrong == "a truth value":
        return bool in accepted
    return text or (wrong in ("a fraction", "a huge number") and float in accepted)


# --- valid recipes


def good_recipes() -> list[Trial]:
    return [Trial(name, partial(accepted, valid)) for name, valid in valid_recipes().items()]


def accepted(valid: Valid, folder: Path) -> None:
    """``check`` finds nothing, and what is asked of the recipe holds."""
    path = folder / "recipe.yaml"
    path.write_bytes(valid.text if isinstance(valid.text, bytes) else valid.text.encode())
    valid.setup(folder)
    if valid.args:
        with _inside(folder, valid.env):
            recipe = load_recipe(path, valid.args)
    else:
        ran = timed("check", path.name, "--json", cwd=folder, env=valid.env)
        assert ran.code == 0, ran.out.decode()[:2000]
        warnings = json.loads(ran.out)["warnings"]
        assert not [each for each in warnings if each["key"] != "training.learning_rate"], warnings  # odd ones are told
        with _inside(folder, valid.env):
            recipe = load_recipe(path)
    for key, value in valid.means.items():
        found = _value(recipe, key)
        assert found == value, f"{key} is {found!r}"
        assert type(found) is type(value), f"{key} is {found!r}"


def _value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


# --- mutations


def mutated_recipes() -> list[Trial]:
    return [
        Trial(f"mutations {start} to {start + GROUP - 1}", partial(unshaken, start))
        for start in range(0, MUTATIONS, GROUP)
    ]


def unshaken(start: int, folder: Path) -> None:
    """``check`` accepts or refuses each of some mutated recipes, and does nothing else."""
    path = folder / "recipe.yaml"
    for name, of in {
        "configs": CONFIGS,
        "lora.yaml": CONFIGS / "methods/lora.yaml",
    }.items():  # what they extend and name
        (folder / name).symlink_to(of)
    (folder / "quickstart.yaml").symlink_to(CONFIGS / "quickstart.yaml")
    for number in range(start, start + GROUP):
        text = mutated(number)
        path.write_bytes(text)
        began = time.process_time()
        ran = peftcli("check", path.name, "--json", cwd=folder)
        assert time.process_time() - began < SLOWEST_MUTATION, number
        assert ran.code in (0, 2), f"mutation {number} ended with {ran.code}: {ran.err[-500:]!r}"
        errors = json.loads(ran.out)["errors"]
        assert bool(errors) == (ran.code == 2), number
        harmless(ran)
        for error in errors:
            assert error["file"], number
            assert len(error["message"]) <= LONGEST_MESSAGE, number


TOKENS = re.compile(rb"[A-Za-z0-9_.-]+|\s+|.", re.DOTALL)
STRANGE = [
    b"null",
    b"1e999",
    b".nan",
    b"-1",
    b"0",
    b"${X}",
    b"${HOME",
    b"*a",
    b"&a ",
    b"!!int ",
    b"!!python/name:os.system ",
    b"<<: ",
    b"? ",
    b"- ",
    b"---\n",
    b"...\n",
    b"%YAML 1.2\n",
    b"|\n",
    b">-\n",
    b"\t",
    b"\0",
    b"\x1b[31m",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"'",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b": ",
    b"# ",
    b"@",
    b"`",
    b"\r",
    b"\\ud800",
    b"9" * 50,
    b"[" * 70,
    b"true",
    b"~",
    b"''",
]


@cache
def _configs() -> list[bytes]:
    return [path.read_bytes() for path in sorted(CONFIGS.rglob("*.yaml"))]


def mutated(number: int) -> bytes:
    """A recipe of configs/ with some of its bytes, words or lines changed."""
    rng = random.Random(f"recipe {number}")
    text = rng.choice(_configs())
    for _ in range(rng.choice([1, 1, 2, 4])):
        text = rng.choice([_in_bytes, _in_words, _in_lines])(text, rng) or b"\n"
    return text


def _in_bytes(text: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(text)), rng.choice([1, 2, 9])
    return rng.choice(
        [
            text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
            text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :],
            text[:at] + text[at + size :],
            text[:at] + text[at : at + size * 4] * rng.randrange(2, 40) + text[at:],
            text[:at] + rng.choice(STRANGE) + text[at:],
            text[:at],
        ]
    )


def _in_words(text: bytes, rng: random.Random) -> bytes:
    words = TOKENS.findall(text)
    one, other = rng.randrange(len(words)), rng.randrange(len(words))
    change = rng.randrange(4)
    if change == 0:
        words[one], words[other] = words[other], words[one]
    elif change == 1:
        words[one] = rng.choice(STRANGE)
    elif change == 2:
        words[one:one] = [words[other]] * rng.choice([1, 2, 50])
    else:
        del words[one]
    return b"".join(words)


def _in_lines(text: bytes, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    change = rng.randrange(5)
    if change == 0:
        lines[one:one] = [lines[other]]
    elif change == 1:
        del lines[one]
    elif change == 2:
        lines[one], lines[other] = lines[other], lines[one]
    elif change == 3:
        lines[one] = b" " * rng.randrange(1, 4) + lines[one]
    else:
        lines = rng.choice(_configs()).splitlines(keepends=True)[other:] + lines[one:]
    return b"".join(lines)


CAMPAIGNS = [
    Campaign(
        "bad recipes",
        "`check` and `train` end with exit code 2 within 2 seconds, one message that names file and line or key, no "
        "traceback, no terminal escape, no secret, and make nothing.",
        bad_recipes,
        least=1000,
        sample=30,
    ),
    Campaign(
        "valid recipes",
        "`check` accepts what is odd and in order, and every setting means what it says.",
        good_recipes,
        least=180,
        sample=12,
    ),
    Campaign(
        "mutated recipes",
        f"`check` accepts or refuses each of {GROUP} mutations of a recipe in configs/: never exit 1, an exception, or "
        "5 seconds of computing.",
        mutated_recipes,
        least=MUTATIONS // GROUP,
        sample=1,
    ),
]
