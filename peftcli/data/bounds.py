"""Chat templates that come to an end: a template is a program, and a foreign one may loop or grow without bound.

transformers' sandbox keeps a template from reaching anything but the conversation, and lets it compute for ever. So the
sandbox is given the template's syntax tree instead of its text, with steps of ours in it: each pass of a loop and each
call looks at the clock, and whatever makes text, lists or numbers counts them, before it makes them where one step can
make very many. What the template writes stays the same.

A step is written as a floor division, ``step // (value, ...)``: jinja2 compiles an operator to itself, and a call in a
sandbox to something ten times as slow.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial, reduce
from itertools import chain
from types import BuiltinMethodType, FunctionType
from typing import Any, cast

from jinja2 import Undefined, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from peftcli.data import day

LONGEST = 1_000_000
"""Characters of a template."""
_SECONDS, _SECONDS_EACH = 4.0, 20e-6
"""Of this thread's computing that one rendering may take, and as much more for each character of the conversation."""
_SIZE, _SIZE_EACH = 100_000_000, 1000
"""The same for the characters, list items and digits that it makes, those that it throws away among them."""
_BITS = 100_000
"""Of a number."""
_WIDTHS = re.compile(r"%(?:\([^()]*\))?[-+ #0]*([0-9]+)?(?:\.([0-9]+))?|\{[^{}]*:[^{}0-9]*([0-9]+)(?:\.([0-9]+))?")
_GIVEN_WIDTH = re.compile(r"%[^%]*\*|\{[^{}]*\{")
"""A format that takes a width from the values."""


class TooMuch(Exception):
    """A rendering that takes too long or makes too much."""


class _Spent:
    """What the rendering that runs has used. There is one at a time."""

    __slots__ = ("allowed_size", "allowed_time", "began", "deadline", "given", "made")

    def __init__(self) -> None:
        self.start(None, math.inf, math.inf)

    def start(self, given: Any, seconds: float, size: float) -> None:
        self.given, self.made, self.allowed_size = given, 0, size
        self.allowed_time = seconds
        self.began: float | None = None
        self.deadline = time.monotonic() + seconds

    def look(self) -> None:
        """Called when the clock has passed the deadline. The thread may have been kept waiting, so then it counts."""
        now = time.thread_time()
        if self.began is None:
            self.began, self.allowed_time = now, self.allowed_time + _SECONDS_EACH * _size(self.given)
        left = self.began + self.allowed_time - now
        if left <= 0:
            raise TooMuch(f"it computes for more than {self.allowed_time:.0f} seconds")
        self.deadline = time.monotonic() + left

    def make(self, count: int) -> None:
        """Counts what is made."""
        self.made += count
        if self.made > self.allowed_size:
            self.check(self.made)

    def check(self, count: int) -> None:
        """Refuses what would be too much."""
        if count > self.allowed_size == _SIZE:
            self.allowed_size += _SIZE_EACH * _size(self.given)
        if count > self.allowed_size:
            raise TooMuch(f"it makes more than {self.allowed_size:,} characters")


_spent = _Spent()
_one_at_a_time = threading.RLock()


class Limits:
    """Inside, a template that ``bounded`` gave raises TooMuch when it uses too much for this conversation."""

    def __init__(self, given: Any):
        self.given = given

    def __enter__(self) -> None:
        _one_at_a_time.acquire()
        _spent.start(self.given, _SECONDS, _SIZE)

    def __exit__(self, *error: object) -> None:
        _spent.start(None, math.inf, math.inf)
        _one_at_a_time.release()


@lru_cache(maxsize=32)
def bounded(text: str) -> Any:
    """A template as a syntax tree, which transformers takes in place of its text.

    Raises:
        TooMuch: it is too long.
        jinja2.TemplateSyntaxError: it is no template.
    """
    if len(text) > LONGEST:
        raise TooMuch(f"it is {len(text):,} characters long; at most {LONGEST:,} are read")
    tree = _parser.parse(text)
    _Steps(tree).visit(tree)
    return tree.set_environment(_parser)


class _Generation(Extension):
    """The block that transformers knows, for masks of its own. It changes nothing in the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# As transformers' own, but for what the sandbox forbids at run time.
_parser = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
)
_context = nodes.EvalContext(_parser)

_NO_TEXT = frozenset((
    "abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length", "random",
))  # fmt: skip
"""Filters that neither make nor compare text."""
_AGAIN = frozenset(("list", "reverse"))
"""Filters that make another list or text of all items."""
_NO_GROWTH = frozenset(("capitalize", "lower", "safe", "string", "title", "trim", "upper", "wordcount"))
"""Filters that make no more text than they are given."""
_EACH = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))
"""Filters that do something with an item when it is asked for."""
_GROWTH = frozenset((
    "batch", "center", "format", "indent", "join", "replace", "round", "slice", "striptags", "sum", "truncate",
    "urlize", "wordwrap", "xmlattr",
))  # fmt: skip
"""Filters that can make very much of little."""
_GROWTH_METHODS = frozenset((
    "center", "expandtabs", "join", "ljust", "replace", "rjust", "to_bytes", "translate", "zfill",
))  # fmt: skip
_NO_GROWTH_METHODS = frozenset((
    "count", "endswith", "find", "get", "index", "items", "keys", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "rfind", "rpartition", "rstrip", "startswith", "strip", "upper", "values",
))  # fmt: skip
_MOST_UNWATCHED = 100
"""Of those, and of such filters, that a template may have without each looking at the clock."""
_FUNCTIONS = frozenset(("format", "format_map", "generate_lorem_ipsum"))
"""What jinja2 has written in Python that can make very much of little."""
_BLOCK = "_peftcli_block"


class _Steps(NodeTransformer):
    """Puts our steps into a tree."""

    def __init__(self, tree: nodes.Template):
        names = tree.find_all(nodes.Name)
        # whether the name of the function that gives the date means that function
        self._dated = not any(each.name == day.FUNCTION and each.ctx != "load" for each in names)
        plain = [each for each in tree.find_all((nodes.Filter, nodes.Call)) if _is_plain(each)]
        self._watched = len(plain) > _MOST_UNWATCHED

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if node.name == day.FUNCTION and self._dated:
            return nodes.ImportedName(f"{day.__name__}.{day.FUNCTION}", lineno=node.lineno)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._with_pass(node)
        node.test = node.test and nodes.And(_step("passes"), node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [each if _is_counted(each) else _step("shown", each) for each in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        terms: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):
            terms.append(self.visit(first.right))
            first = first.left
        return _step("added", self.visit(first), *reversed(terms))

    def visit_Mul(self, node: nodes.Mul) -> nodes.Node:
        return _step("multiplied", self.visit(node.left), self.visit(node.right))

    def visit_Pow(self, node: nodes.Pow) -> nodes.Node:
        return _step("raised", self.visit(node.left), self.visit(node.right))

    def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
        return _step("formatted", self.visit(node.left), self.visit(node.right))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _step("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if not any(isinstance(each, nodes.Const) for each in (node.expr, *(each.expr for each in node.ops))):
            node.expr = _step("walked", node.expr)
            for each in node.ops:
                each.expr = _step("walked", each.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if any(not isinstance(each, nodes.Const) for each in node.args or ()):
            node.node, node.args = _step("walked", node.node), [_step("walked", each) for each in node.args]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _step("walked", node) if node.items else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _step("walked", node) if node.items else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _step("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Getattr) or node.node.attr in _GROWTH_METHODS | _FUNCTIONS:
            node.node = _step("called", node.node)
        elif node.node.attr in _NO_GROWTH_METHODS:
            return self._plain(node)
        return _step("made", node)

    def _plain(self, node: nodes.Expr) -> nodes.Expr:
        return _step("clocked", node) if self._watched else node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._with_pass(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._with_pass(node)

    def _with_pass(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step("passes"), lineno=node.lineno))
        return cast(nodes.Node, node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        call = node.call
        node.call = nodes.Call(nodes.Const(None), [], [], None, None)
        self.generic_visit(node)
        self.generic_visit(call)
        call.node, node.call = _step("called", call.node), call
        node.body.insert(0, nodes.ExprStmt(_step("passes"), lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is None:  # the block that it stands at gives it its value
            node.node = nodes.Name(_BLOCK, "load", lineno=node.lineno)
        if node.name in _NO_TEXT:
            return node
        if node.name in _EACH:
            node.node = _step("timed", node.node)
            return node
        if node.name in _AGAIN:
            node.node = _step("copied", node.node)
            return node
        if node.name not in _GROWTH:
            node.node = _step("walked", node.node)
            if node.name in _NO_GROWTH:
                return self._plain(node)
            node.args = [_step("small", each) for each in node.args]
            for each in node.kwargs:
                each.value = _step("small", each.value)
            return _step("made", node)
        given = nodes.Dict([nodes.Pair(nodes.Const(each.key), each.value) for each in node.kwargs])
        more = [each or nodes.Const(None) for each in (node.dyn_args, node.dyn_kwargs)]
        return _step("filtered", nodes.Const(node.name), node.node, nodes.Tuple(node.args, "load"), given, *more)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> list[nodes.Node]:
        self.generic_visit(node)
        return [_block(node), nodes.Output([node.filter], lineno=node.lineno)]

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node | list[nodes.Node]:
        self.generic_visit(node)
        if node.filter is None:
            return node
        return [_block(node), nodes.Assign(node.target, node.filter, lineno=node.lineno)]


def _is_plain(node: nodes.Expr) -> bool:
    """Whether it is a filter or method that makes no more text than it is given."""
    if isinstance(node, nodes.Filter):
        return node.name in _NO_GROWTH
    return (
        isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in _NO_GROWTH_METHODS
    )


def _is_counted(node: nodes.Expr) -> bool:
    """Whether a value that is written is a text that was counted when it was made, or stands in the template."""
    if isinstance(node, nodes.FloorDiv) and isinstance(node.left, nodes.ImportedName):
        name, values = node.left.importname.rpartition(".")[2], node.right.items  # type: ignore[attr-defined]
        return name == "joined" or (name == "added" and any(_is_text(each) for each in values))
    return isinstance(node, (nodes.Const, nodes.TemplateData))


def _is_text(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _block(node: Any) -> nodes.Node:
    """What a filter of a block is given, under a name."""
    return nodes.AssignBlock(nodes.Name(_BLOCK, "store"), None, node.body, lineno=node.lineno)


def _step(name: str, *values: nodes.Expr) -> nodes.Expr:
    return nodes.FloorDiv(nodes.ImportedName(f"{__name__}.{name}"), nodes.Tuple(list(values), "load"))


# --- the steps, as the compiled template imports them


def _as_step(function: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    return type(function.__name__, (), {"__floordiv__": function})()


@_as_step
def passes(_: Any, nothing: tuple[Any, ...]) -> bool:
    """A pass of a loop."""
    if time.monotonic() > _spent.deadline:
        _spent.look()
    return True


@_as_step
def clocked(_: Any, values: tuple[Any, ...]) -> Any:
    """What one of very many small steps gave."""
    if time.monotonic() > _spent.deadline:
        _spent.look()
    return values[0]


@_as_step
def shown(_: Any, values: tuple[Any, ...]) -> Any:
    """What is written."""
    value = values[0]
    _spent.make(len(value)) if type(value) is str else _walk(value)
    return value


@_as_step
def made(_: Any, values: tuple[Any, ...]) -> Any:
    """What a filter, a call or a slice gave."""
    value = values[0]
    if type(value) in (str, list, bytes):
        _spent.make(len(value))
    return value


@_as_step
def walked(_: Any, values: tuple[Any, ...]) -> Any:
    """What is compared or made into text, with all that it holds."""
    _walk(values[0])
    return values[0]


@_as_step
def added(_: Any, terms: tuple[Any, ...]) -> Any:
    """The terms of a sum."""
    for term in terms:
        if type(term) is not str:
            return reduce(_add, terms)
    text = "".join(terms)
    _spent.made += len(text)
    if _spent.made > _spent.allowed_size:
        _spent.check(_spent.made)
    return text


@_as_step
def joined(_: Any, parts: tuple[Any, ...]) -> str:
    """What stands between ``~``."""
    for part in parts:
        _spent.make(len(part)) if type(part) is str else _walk(part)
    return "".join(map(str, parts))


@_as_step
def multiplied(_: Any, factors: tuple[Any, ...]) -> Any:
    """A product, or a sequence several times."""
    one, other = factors
    if isinstance(one, int) and isinstance(other, int):
        _check_bits(one.bit_length() + other.bit_length())
    for times, sequence in ((one, other), (other, one)):
        if isinstance(times, int) and isinstance(sequence, (str, bytes, list, tuple)):
            _spent.make(max(0, times) * len(sequence))
    return one * other


@_as_step
def raised(_: Any, values: tuple[Any, ...]) -> Any:
    """A power."""
    base, exponent = values
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        _check_bits(base.bit_length() * abs(exponent))
    return base**exponent


@_as_step
def formatted(_: Any, values: tuple[Any, ...]) -> Any:
    """A remainder, or a format filled in."""
    form, given = values
    if isinstance(form, str):
        _check_format(form, given)
    return form % given


@_as_step
def timed(_: Any, values: tuple[Any, ...]) -> Any:
    """What a filter takes item by item."""
    items = values[0]
    return _timed(items) if items and isinstance(items, Iterable) else items


@_as_step
def copied(_: Any, values: tuple[Any, ...]) -> Any:
    """What a list is made of, or the same backwards."""
    value = values[0]
    if isinstance(value, Iterator):
        return _timed(value)
    if isinstance(value, (str, bytes, list, tuple, dict, range)):
        _spent.make(8 * len(value))
    return value


@_as_step
def small(_: Any, values: tuple[Any, ...]) -> Any:
    """What says, among other things, how far JSON is indented."""
    if isinstance(values[0], (int, str)):
        _check_growth(1000, values)
    return values[0]


@_as_step
def called(_: Any, functions: tuple[Any, ...]) -> Any:
    """What is called, or that after a look at what it is given."""
    function = functions[0]
    if type(function) is BuiltinMethodType:
        if function.__name__ in _GROWTH_METHODS and isinstance(function.__self__, (str, bytes, int)):
            return partial(_method, function)
    elif type(function) is FunctionType and function.__name__ in _FUNCTIONS:
        return partial(_function, function)
    return function


@_as_step
def filtered(_: Any, what: tuple[Any, ...]) -> Any:
    """What one of the filters gives that can make very much of little."""
    name, value, args, kwargs, more, named = what
    args, kwargs = [*args, *(more or ())], {**kwargs, **(named or {})}
    value = _held(value)
    _walk(value)
    if name == "format":
        _check_format(str(value), [*args, kwargs])
    elif name == "sum":
        _spent.check(_size(value) * len(value))
    elif name == "wordwrap":  # a word that is too long is copied once for each line that it gives
        width = kwargs.get("width", args[0] if args else 79)
        longest = max(map(len, str(value).splitlines()), default=0)
        _spent.check(longest**2 // max(1, width if isinstance(width, int) else 1))
    elif name == "striptags":  # some versions copy all for each
        _spent.check(_size(value) * str(value).count("<"))
    else:
        if name in ("batch", "slice") and isinstance(value, (str, list, tuple, dict)):
            _spent.make(80 * len(value))  # a list for each item
        _check_growth(_size(value), [*args, *kwargs.values()])
    result = _parser.call_filter(name, value, args, kwargs, eval_ctx=_context)
    if isinstance(result, str):
        _spent.make(len(result))
    return result


def _method(method: Any, *args: Any, **kwargs: Any) -> Any:
    args = tuple(map(_held, args))
    _check_growth(_size(method.__self__), [*args, *kwargs.values()])
    return method(*args, **kwargs)


def _function(function: Any, *args: Any, **kwargs: Any) -> Any:
    if function.__name__ == "generate_lorem_ipsum":
        _check_growth(1000, [*args, *kwargs.values()])
    else:
        _check_format(str(function.__wrapped__.__self__), [*args, kwargs])
    return function(*args, **kwargs)


def _add(one: Any, other: Any) -> Any:
    if isinstance(one, (str, bytes, list, tuple)):
        _spent.make(len(one))
    return one + other


def _held(value: Any) -> Any:
    """A value whose items can be counted."""
    known = not isinstance(value, Iterable) or isinstance(value, (str, bytes, list, tuple, dict, Undefined))
    return value if known else list(_timed(value))


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        if time.monotonic() > _spent.deadline:
            _spent.look()
        _spent.make(len(item) if type(item) is str else 8)
        yield item


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise TooMuch(f"it computes a number of more than {_BITS:,} bits")


def _check_growth(size: int, arguments: Iterable[Any]) -> None:
    """Refuses a step that may make very much of a value of this size: each part as much as the largest argument."""
    for each in arguments:
        _walk(each)
        _spent.check(size * (abs(each) if isinstance(each, int) else _size(each)))


def _check_format(form: str, given: Any) -> None:
    """Refuses a format that writes very much: values very wide, or a large one very often."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    values += [each for value in values if isinstance(value, dict) for each in value.values()]
    widths = [int(width) for found in _WIDTHS.findall(form) for width in found if width]
    if _GIVEN_WIDTH.search(form):
        widths += [abs(each) for each in values if isinstance(each, int)]
    _walk(values)
    _spent.check(max(1, form.count("%") + form.count("{")) * (max(widths, default=0) + _size(values)))


def _walk(value: Any) -> None:
    """Counts all that a value holds, as often as it holds it."""
    if type(value) not in (list, tuple, dict):
        return
    stack = [value]
    while stack:
        value = stack.pop()
        _spent.make(8 * len(value))
        if time.monotonic() > _spent.deadline:
            _spent.look()
        for item in chain(value, value.values()) if type(value) is dict else value:
            if type(item) is str:
                _spent.make(len(item))
            elif type(item) in (list, tuple, dict):
                stack.append(item)


def _size(value: Any) -> int:
    """Characters of a value, and how many values it holds. It must be one that can be walked."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(each) + 1 for each in chain(value, value.values()))
    return sum(_size(each) + 1 for each in value) if isinstance(value, (list, tuple)) else 1
