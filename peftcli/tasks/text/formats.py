"""Formats of text rows: the columns that each needs, and what each column must contain."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from peftcli.data.rows import Reader, Row, Table, listed
from peftcli.data.text_rows import first_line, json_kind, parse_json
from peftcli.errors import DataError

Message = dict[str, Any]
"""One turn: ``role``, ``content``, and what else the chat template reads (``tool_calls``, ``reasoning_content``)."""


@dataclass(frozen=True)
class TextExample:
    """A text that is trained whole."""

    text: str


@dataclass(frozen=True)
class PairExample:
    """A prompt and the completion that is trained. They are joined with nothing between them."""

    prompt: str
    completion: str
    system: str = ""
    """What the prompt begins with."""


@dataclass(frozen=True)
class ChatExample:
    """A conversation with at least one assistant turn."""

    messages: list[Message]
    tools: list[Any] | None = None
    untrained: frozenset[int] = frozenset()
    """Positions of messages that say ``train: false``."""
    no_prompt: bool = False
    """Whether this is an answer to compare, and no turn but the system's comes before it."""


@dataclass(frozen=True)
class AlpacaExample:
    """An instruction, optionally with an input, and the output that is trained."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns: what the user said, and what the assistant answered."""

    def request(self) -> str:
        """The user's text: the instruction, a blank line, the input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    def source(self) -> str:
        """Return an encoder's input: the system prompt, the earlier turns and the request, with blank lines between."""
        return "\n\n".join(filter(None, [self.system, *chain(*self.history), self.request()]))

    def chat(self) -> ChatExample:
        """The example as a conversation, for a model with a chat template."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        pairs = [*self.history, (self.request(), self.output)]
        turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(_ASKED, pair, strict=True)]
        return ChatExample(system + turns)

    def pair(self) -> PairExample:
        """The example with the headings of the Alpaca form, for a model without a chat template.

        Of the answers only the output is trained.
        """
        parts = [self.system]
        for asked, answer in self.history:
            parts += [f"### Instruction:\n{asked}", f"### Response:\n{answer}"]
        parts.append(f"### Instruction:\n{self.instruction}")
        if self.input:
            parts.append(f"### Input:\n{self.input}")
        return PairExample("\n\n".join([*filter(None, parts), "### Response:\n"]), self.output)


_ASKED = ("user", "assistant")
ParsedRow = TextExample | PairExample | ChatExample | AlpacaExample


def shareable_texts(example: ParsedRow) -> dict[str, str]:
    """Return the texts that all rows may share, and a prompt then gets: ``system``, ``instruction``.

    An instruction can be one for all rows where each has an input of its own.
    """
    first = example.messages[0] if isinstance(example, ChatExample) else {}
    system = first.get("content") if first.get("role") == "system" else getattr(example, "system", "")
    instruction = example.instruction if isinstance(example, AlpacaExample) and example.input else ""
    return {name: str(text) for name, text in (("system", system), ("instruction", instruction)) if text}


@dataclass(frozen=True)
class Format:
    """A kind of row: the columns that it needs, and those that it also reads."""

    needs: tuple[str, ...]
    build: Callable[[dict[str, Any]], ParsedRow]
    reads: tuple[str, ...] = ()


class _Fault(Exception):
    """What is wrong with a row, and under which key."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key, self.message = key, message


@dataclass(frozen=True)
class ExampleReader(Reader):
    """Reads rows of one format, whose columns may have other names."""

    verdict: str | None = None
    """A column that is not read and says of each row whether its completion is a good one."""

    def __call__(self, row: Row) -> ParsedRow:
        """Parse a row.

        Raises:
            DataError: the row does not contain what its format needs.
        """
        chosen, values = FORMATS[self.name], row.values
        for key in chosen.needs:
            self.value(row, key)
        try:
            return chosen.build({key: values[name] for key, name in self.names.items() if name in values})
        except _Fault as fault:
            top = re.split(r"[.\[]", fault.key, maxsplit=1)[0]
            raise row.place.error(fault.message, key=self.names.get(top, top) + fault.key[len(top) :]) from None

    def drops_turns(self, row: Row) -> bool:
        """Return whether a column that is not read holds turns whose texts no column that is read repeats.

        Beside a whole conversation only ``history`` does: another one is another conversation, as in ``rejected``.
        """
        names, is_whole = {*self.names.values()}, self.name in ("messages", "sharegpt")
        columns = [name for name in row.values if name not in names and (name == "history" or not is_whole)]
        unread = [text for name in columns for text in _texts_of_turns(row.values[name], pairs=name == "history")]
        read = json.dumps([row.values.get(name) for name in names], default=str) if unread else ""
        return any(json.dumps(text.strip())[1:-1] not in read for text in unread)


def example_reader(table: Table) -> ExampleReader:
    """Return the reader of the rows of a source, whose settings name the format, or ``auto``, and the columns.

    Raises:
        DataError: the columns fit no format, or not the given one.
    """
    renamed, name = dict(table.source.renamed()), str(table.source.format)
    table.refuse_columns(list(dict.fromkeys(key for each in FORMATS.values() for key in (*each.needs, *each.reads))))
    known_as = (*renamed, *(each for each in table.columns if each not in {*renamed, *renamed.values()}))
    implied = dict[str, str]()
    if not renamed and (found := implied_format(table)) and name in ("auto", found[0]):
        name, implied = found
        renamed, known_as = implied, (*implied, *known_as)
    elif name == "auto":
        name = _detected(table, known_as)
    chosen = FORMATS[name]
    known = (*chosen.needs, *chosen.reads)
    table.refuse_columns(known)
    if missing := [key for key in chosen.needs if key not in known_as]:
        raise DataError(
            f"format {name} needs {' and '.join(missing)}; the columns are: {listed(known_as)}",
            file=table.described,
            key="dataset.format",
            hint=_columns_hint([name], known_as),
        )
    names = without_odd(table, {key: renamed.get(key, key) for key in known})
    said = ", ".join(f"{column} as {key}" for key, column in implied.items())
    return ExampleReader(name, names, implied=f"{said} (format {name})" if said else "")


def _detected(table: Table, columns: Sequence[str]) -> str:
    try:
        return detect_format(columns)
    except DataError as error:
        objects = {column: value for column, value in table.first.items() if isinstance(value, dict)}
        keys = listed(f"{column}.{key}" for column, value in objects.items() for key in value)
        hint = f"{error.hint}\nKeys of objects are columns too: {keys}." if objects else error.hint
        raise DataError(error.message, file=table.described, key=error.key, hint=hint) from None


_NOT_IMPLIED = {"context", "label", "content", "sentence"}
"""Names that may as well stand for something else: they leave a choice."""


def implied_format(table: Table) -> tuple[str, dict[str, str]] | None:
    """Return the one format that the columns fit under other names, and the column of each of its own names.

    None if they fit a format as they are, none, or several, or if two columns may be one of a format's.
    """
    lowered = {column.lower(): column for column in table.columns}
    is_other = {"chosen", "rejected"} <= lowered.keys() or len(lowered) < len(table.columns)
    if is_other or any({*each.needs} <= {*table.columns} for each in FORMATS.values()):
        return None
    found = {name: names for name in FORMATS if (names := _implied(name, lowered, table.first))}
    most = {name: {*names.values()} for name, names in found.items()}
    largest = [name for name in found if not any(most[name] < other for other in most.values())]
    if len(largest) != 1:
        return None
    return largest[0], {key: column for key, column in found[largest[0]].items() if key != column}


def _implied(name: str, lowered: Mapping[str, str], first: Mapping[str, Any]) -> dict[str, str] | None:
    """Find the column for each name of a format; None if a needed one is missing or two columns fit."""
    chosen, found = FORMATS[name], dict[str, str]()
    if name == "alpaca" and "instruction" not in lowered:  # a question with its answer is no instruction
        return None
    for key in (*chosen.needs, *chosen.reads):
        others = [key] if key in lowered else [each for each in _OTHER_NAMES.get(key, ()) if each in lowered]
        there = [lowered[each] for each in others if lowered[each] not in found.values()]
        if key in chosen.needs and (len(there) != 1 or (there[0] in _NOT_IMPLIED and len(lowered) > 1)):
            return None
        if len(there) == 1:
            found[key] = there[0]
    turns = first.get(found.get("messages", found.get("conversations", "")), [{}])
    keys = turns[0].keys() if isinstance(turns, list) and turns and isinstance(turns[0], dict) else ()
    wanted = {"messages": "role", "sharegpt": "from"}.get(name)
    is_text_alone = name != "text" or len(lowered) == 1
    return found if is_text_alone and (wanted is None or wanted in keys) else None


def without_odd(table: Table, names: Mapping[str, str]) -> dict[str, str]:
    """Return the columns without ``system`` and ``history`` where the first row holds something else under that name.

    ``system`` is a text, ``history`` a list. What the recipe names is read in any case.
    """
    system, history = table.first.get("system"), table.first.get("history")
    is_list = isinstance(history, list | None) or (isinstance(history, str) and history.strip()[:1] in ("", "["))
    odd = {"system": not isinstance(system, str | None), "history": not is_list}
    return {key: name for key, name in names.items() if key in table.source.columns or not odd.get(key)}


def detect_format(columns: Iterable[str]) -> str:
    """Find the one format whose columns are all present.

    Raises:
        DataError: no format fits, or several do.
    """
    columns = tuple(columns)
    fitting = [name for name, each in FORMATS.items() if set(each.needs) <= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        most = max(fitting, key=lambda name: len(FORMATS[name].needs))
        raise DataError(
            f"the columns {listed(columns)} fit the formats {' and '.join(fitting)}",
            key="dataset.format",
            hint=f"Choose one in the recipe: dataset: {{format: {most}}}",
        )
    needed = "; ".join(f"{name}: {', '.join(each.needs)}" for name, each in FORMATS.items())
    pairs = {"chosen", "rejected"} <= {*columns}
    todo = "Answers to compare are for task: preference, or reward." if pairs else _columns_hint(FORMATS, columns)
    raise DataError(
        f"no format fits the columns: {listed(columns)}",
        key="dataset.format",
        hint=f"What a format needs: {needed}\n{todo}",
    )


_OTHER_NAMES = {
    "prompt": (
        *("question", "query", "input", "inputs", "source", "problem"),
        *("document", "article", "dialogue", "context"),
    ),
    "completion": (
        *("answer", "response", "output", "target", "targets"),
        *("summary", "highlights", "solution", "label"),
    ),
    "messages": ("conversation", "chat", "dialog", "dialogue", "turns"),
    "instruction": ("question", "prompt", "query"),
    "output": ("response", "answer", "completion", "target"),
    "input": ("context",),
    "system": ("system_prompt",),
    "conversations": ("conversation", "dialog"),
    "text": ("content", "document", "body", "sentence"),
}
"""Other names of the formats' columns in datasets. They are read where they leave no choice, else suggested."""
_UNKNOWN = "YOUR_COLUMN"


def _columns_hint(formats: Iterable[str], columns: Sequence[str]) -> str:
    """The recipe's setting that names the columns, for the one of the formats that they are closest to."""
    guesses = {name: _guess(name, columns) for name in formats}
    name = max(guesses, key=lambda each: (guesses[each].keys() >= {*FORMATS[each].needs}, len(guesses[each])))
    name = name if guesses[name] or len(guesses) == 1 else "prompt_completion"
    guess = dict.fromkeys(FORMATS[name].needs, _UNKNOWN) | guesses[name]
    others = {key: column for key, column in guess.items() if key != column}
    near = "".join(f"Closest to {key}: {column}. " for key, column in others.items() if column != _UNKNOWN)
    written = ", ".join(f"{key}: {column}" for key, column in others.items())
    return f"{near}In the recipe: dataset: {{format: {name}, columns: {{{written}}}}}"


def _guess(name: str, columns: Sequence[str]) -> dict[str, str]:
    """The columns of a format -> those that are there and are called so, or nearly so."""
    keys, found = (*FORMATS[name].needs, *FORMATS[name].reads), dict[str, str]()
    for key in keys:
        others = [column for column in columns if column not in {*keys, *found.values()}]
        if near := key if key in columns else near_column(key, others):
            found[key] = near
    return found


def near_column(key: str, columns: Sequence[str]) -> str | None:
    """Return the column whose name is most likely another one of a format's; None: no such."""
    lowered = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(key, lowered, n=1, cutoff=0.75)
    found = near[0] if near else next((name for name in _OTHER_NAMES.get(key, ()) if name in lowered), None)
    return lowered[found] if found else None


def _string(row: dict[str, Any], key: str, *, where: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _Fault(where + key, f"expected text, found {json_kind(value)}")
    return value


def _answer(row: dict[str, Any], key: str, *, where: str = "") -> str:
    value = _string(row, key, where=where)
    if not value.strip():
        raise _Fault(where + key, "is empty; there is nothing to train on")
    return value


def _optional(row: dict[str, Any], key: str) -> str:
    return "" if row.get(key) is None else _string(row, key)


def _pair(row: dict[str, Any]) -> ParsedRow:
    system, prompt = _optional(row, "system"), _string(row, "prompt")
    if not system or not prompt:
        return PairExample(prompt, _answer(row, "completion"))
    return PairExample(f"{system}\n\n{prompt}", _answer(row, "completion"), system)


def _alpaca(row: dict[str, Any]) -> ParsedRow:
    asked, answer = _string(row, "instruction"), _answer(row, "output")
    return AlpacaExample(asked, answer, _optional(row, "input"), _optional(row, "system"), _history(row))


def _history(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The earlier turns of an instruction, as LLaMA-Factory's rows have them: a list of pairs of texts."""
    pairs = _list_of(row, "history") if row.get("history") else []
    for index, pair in enumerate(pairs):
        if not _is_pair(pair):
            raise _Fault(f"history[{index}]", "expected two texts: what the user said, and the answer")
        _answer({"1": pair[1]}, "1", where=f"history[{index}].")
    return tuple((asked, answer) for asked, answer in pairs)


SYSTEM_ROLES = ("system", "developer")
_ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


PICTURE_PARTS = ("image", "image_url")
"""Types of the parts of a content that are pictures: those of templates, and OpenAI's."""


def _sharegpt(row: dict[str, Any]) -> ParsedRow:
    given, turns = _turns(row, "conversations"), []
    if given and all("role" in turn and not {"from", "value"} & {*turn} for turn in given):  # messages
        return _conversation(row, "conversations", given)
    for index, turn in enumerate(given):
        where = f"conversations[{index}]."
        role = _role(turn, "role" if "role" in turn and "from" not in turn else "from", SHAREGPT_ROLES, where)
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        content = turn.get("content") if turn.get("value") is None else turn["value"]
        turns.append({**others, "role": SHAREGPT_ROLES[role], "content": content})
    return _conversation(row, "conversations", turns, content="value")


def turns_in(value: Any) -> Any:
    """The turns that a text holds as JSON, as CSV files have them; any other value as it is.

    Raises:
        ValueError: the text begins with [ and is not a list in JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    found, fault = parse_json(value)
    if fault:
        raise ValueError(fault)
    return found


def _is_pair(value: Any) -> bool:
    """Whether a value is two texts."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _texts_of_turns(value: Any, *, pairs: bool) -> list[str]:
    """The texts of the turns that a value of a row is; none where it is something else.

    Turns are objects of role and content, or of from and value, or ``pairs`` of texts.
    """
    if not isinstance(value, str | list) or not value:
        return []
    with suppress(ValueError):
        value = turns_in(value)
    texts = list[Any]()
    for turn in value if isinstance(value, list) else ():
        key = next((key for key, role in _TURN_KEYS if isinstance(turn, dict) and {key, role} <= turn.keys()), None)
        if key is None and not (pairs and _is_pair(turn)):
            return []
        texts += turn if key is None else [joined_parts(turn[key])]
    return [text for text in texts if isinstance(text, str)]


_TURN_KEYS = (("content", "role"), ("value", "from"))
"""The text of a turn and whose it is, in messages and in sharegpt's rows."""


def _list_of(row: dict[str, Any], column: str) -> list[Any]:
    try:
        turns = turns_in(row[column])
    except ValueError as error:
        problem = "is not JSON" if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise _Fault(column, problem) from None
    if not isinstance(turns, list):
        raise _Fault(column, f"expected a list of turns, found {json_kind(turns)}")
    return turns


def _turns(row: dict[str, Any], column: str) -> list[Message]:
    turns = _list_of(row, column)
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _Fault(f"{column}[{index}]", f"expected an object, found {json_kind(turn)}")
    return turns


def _role(turn: Message, key: str, known: Iterable[str], where: str) -> str:
    role = turn.get(key)
    if not isinstance(role, str) or role not in known:
        found = repr(role[:40]) if isinstance(role, str) else json_kind(role)
        there = "" if key in turn else f"; the turn has: {listed(turn)}"
        raise _Fault(where + key, f"unknown role: {found}; known are {', '.join(known)}{there}")
    return role


def _conversation(row: dict[str, Any], column: str, turns: list[Message], content: str = "content") -> ChatExample:
    tools, system = _tools(row), _optional(row, "system")
    begins = turns[0].get("role") if turns else None
    messages: list[Message] = [{"role": "system", "content": system}] if system and begins not in SYSTEM_ROLES else []
    shift = len(messages)
    untrained = set()
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]."
        role = _role(turn, "role", _ROLES, where)
        turn = turn | {"content": joined_parts(turn.get("content"))}
        for key in turn:
            if key not in _KEYS and difflib.get_close_matches(key, ("train",), cutoff=0.75):
                raise _Fault(where + key, "unknown key; did you mean train?")
            if key in _OTHER_KEYS and turn[key] is not None:
                raise _Fault(where + key, f"unknown key; did you mean {_OTHER_KEYS[key]}?")
        _check_content(turn, role, content, where)
        if not isinstance(turn.get("train", True), bool | None):
            raise _Fault(where + "train", f"expected true or false, found {json_kind(turn['train'])}")
        if turn.get("train") and role != "assistant":
            raise _Fault(where + "train", f"a {role} turn is never trained")
        if turn.get("weight") not in (None, 0, 1):
            raise _Fault(where + "weight", "expected 0 or 1: whether the turn is trained")
        if turn.get("train") is False or turn.get("weight") == 0:
            untrained.add(index + shift)
        kept = {key: value for key, value in turn.items() if key not in ("train", "weight") and value is not None}
        if "tool_calls" in kept:
            kept["tool_calls"] = [_parsed_call(call, f"{where}tool_calls") for call in kept["tool_calls"]]
            _check_json(kept["tool_calls"], f"{where}tool_calls")
        messages.append(kept)
    if not any(message["role"] == "assistant" for message in messages):
        raise _Fault(column, "contains no assistant turn; there is nothing to train on")
    return ChatExample(messages, tools, frozenset(untrained))


_KEYS = ("role", "content", "train", "weight", "tool_calls", "name", "reasoning_content", "thinking", "reasoning")
_OTHER_KEYS = {"loss": "train", "function_call": "tool_calls: [{function: {name, arguments}}]"}
"""Keys of other tools -> ours."""


def joined_parts(content: Any) -> Any:
    """The text of a content that is a list of parts, as OpenAI writes them, if all of them are text."""
    parts = content if isinstance(content, list) else []
    known = (part for part in parts if isinstance(part, dict) and part.get("type", "text") == "text")
    texts = [part["text"] for part in known if isinstance(part.get("text"), str)]
    return "".join(texts) if texts and len(texts) == len(parts) else content


def _parsed_call(call: dict[str, Any], key: str) -> dict[str, Any]:
    """Parse a tool call's arguments where they are JSON in a string: templates expect an object."""
    arguments = call.get("function", call).get("arguments")
    if isinstance(arguments, str):
        try:
            found, fault = parse_json(arguments)
        except ValueError:
            return call
        if isinstance(found, dict):
            if fault:
                raise _Fault(key, f"arguments: {fault}")
            return with_function(call, arguments=found)
    return call


def with_function(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tool call with another name or other arguments of its function, which may stand in the call itself."""
    return call | ({"function": call["function"] | changes} if "function" in call else changes)


def _check_content(turn: Message, role: str, key: str, where: str) -> None:
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise _Fault(where + "tool_calls", "expected a list of {function: {name, arguments}}")
    if calls and role == "assistant":
        if turn.get("content") is not None:
            _string(turn | {key: turn["content"]}, key, where=where)
        return
    read = _answer if role == "assistant" else _string
    read({key: turn.get("content")}, key, where=where)


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = _parsed_tool(row.get("tools"))
    if isinstance(tools, list):
        tools = list(map(_parsed_tool, tools))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _Fault("tools", f"expected a list of objects, found {json_kind(tools)}")
    _check_json(tools, "tools")
    return tools or None


def _parsed_tool(value: Any) -> Any:
    """A value of the column of tools, parsed where it is JSON in a text."""
    if not isinstance(value, str) or not value:
        return value
    try:
        found, fault = parse_json(value)
    except ValueError:
        raise _Fault("tools", "is not JSON") from None
    if fault:
        raise _Fault("tools", fault)
    return found


def _check_json(value: Any, key: str) -> None:
    """Refuse what a table may contain and a template cannot write, such as dates."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _Fault(key, f"is not JSON: {first_line(error)}") from None


FORMATS = {
    "text": Format(("text",), lambda row: TextExample(_answer(row, "text"))),
    "prompt_completion": Format(("prompt", "completion"), _pair, ("system",)),
    "messages": Format(
        ("messages",), lambda row: _conversation(row, "messages", _turns(row, "messages")), ("system", "tools")
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "sharegpt": Format(("conversations",), _sharegpt, ("system", "tools")),
}
"""Every format of text rows."""
