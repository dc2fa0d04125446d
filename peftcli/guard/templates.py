"""Chat templates with limits: a template is a program, and an untrusted one may loop or grow without end.

transformers' sandbox keeps a template from reaching anything but the conversation, but lets it compute forever. So
transformers is given a template of one call. It takes transformers' sandbox and variables, and renders the real
template in the same sandbox with limits: each pass of a loop, operator, call and filter looks at the clock, and what it
makes is counted. What can make very much of little (``'x' * 10**10``) is estimated before. Nothing that is made is
larger, with all that it holds, than may be made, so that each step ends soon. What the template writes stays the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache, wraps
from itertools import chain
from typing import Any

from jinja2 import Undefined, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_CHARACTERS = 1_000_000
_SECONDS, _SECONDS_EACH = 4.0, 20e-6
"""Processor time of one rendering, and as much more for each character of the conversation."""
_SIZE, _SIZE_EACH = 100_000_000, 1000
"""The same for the characters and bytes that it makes, those that it throws away among them."""
_BITS = 100_000
"""Of a number."""
_LIST = 80
"""Bytes of a list without its items, which take 8 each."""
_WIDTHS = re.compile(r"%(?:\([^()]*\))?[-+ #0]*([0-9]+)?(?:\.([0-9]+))?|\{[^{}]*:[^{}0-9]*([0-9]+)(?:\.([0-9]+))?")
_GIVEN_WIDTH = re.compile(r"%[^%]*\*|\{[^{}]*\{")
"""A format that takes a width from the values."""
_GROWING = frozenset((
    "batch", "center", "expandtabs", "generate_lorem_ipsum", "indent", "join", "ljust", "replace", "rjust", "round",
    "slice", "to_bytes", "tojson", "translate", "zfill",
))  # fmt: skip
"""Filters and methods that give no more than the product of the sizes of all that they are given."""
_FORMATS = frozenset(("format", "format_map"))
_BY_ITEM = frozenset((
    "batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "slice",
    "sort", "sum", "unique",
))  # fmt: skip
"""Filters that do something with each item."""
_CONTAINERS: tuple[type, ...] = (list, tuple, dict, set, type({}.keys()), type({}.values()), type({}.items()))


class TooMuch(Exception):
    """A rendering takes too long or makes too much."""


class _Budget:
    """What one rendering has used of what it may."""

    def __init__(self, given: Any):
        self.given, self.made, self.max_size = given, 0, _SIZE
        self.began, self.max_seconds = 0.0, _SECONDS
        self.deadline = time.monotonic() + _SECONDS

    def look(self) -> None:
        """Raise TooMuch once the time is used up: processor time, since the thread may have been kept waiting."""
        if time.monotonic() < self.deadline:
            return
        now = time.thread_time()
        if not self.began:
            self.began = now
            self.max_seconds += _SECONDS_EACH * _size(self.given)
        left = self.began + self.max_seconds - now
        if left <= 0:
            raise TooMuch(f"it computes for more than {self.max_seconds:.0f} seconds")
        self.deadline = time.monotonic() + left

    def check(self, count: int) -> None:
        """Raise TooMuch if this is more than may be made."""
        if count > self.max_size == _SIZE:
            self.max_size += _SIZE_EACH * _size(self.given)
        if count > self.max_size:
            raise TooMuch(f"it makes more than {self.max_size:,} characters")


_budget: ContextVar[_Budget] = ContextVar("budget")


@lru_cache(32)
def limited(text: str, *functions: Callable[..., Any]) -> Any:
    """Return a template that transformers takes in place of its text, and that raises TooMuch beyond the limits.

    ``functions`` are module-level ones, in place of those that the sandbox has under their names.

    Raises:
        TooMuch: the text is too long.
    """
    if len(text) > _MAX_CHARACTERS:
        raise TooMuch(f"it is {len(text):,} characters long; at most {_MAX_CHARACTERS:,} are read")
    render, *others = [nodes.ImportedName(f"{each.__module__}.{each.__name__}") for each in (_render, *functions)]
    return nodes.Template([nodes.Output([nodes.Call(render, [nodes.Const(text), *others], [], None, None)])], lineno=1)


@pass_context
def _render(context: Context, text: str, *functions: Callable[..., Any]) -> str:
    sandbox = context.environment
    given = {name: value for name, value in context.parent.items() if value is not sandbox.globals.get(name, _budget)}
    token = _budget.set(_Budget(given))
    try:
        return _compiled(sandbox, text, *functions).render(given)
    finally:
        _budget.reset(token)


@lru_cache(32)
def _compiled(sandbox: Any, text: str, *functions: Callable[..., Any]) -> Any:
    limits = sandbox.overlay(optimized=False, finalize=_text)
    limits.__class__ = _Limits
    limits.filters = {name: _limited_filter(name, function) for name, function in sandbox.filters.items()}
    limits.filters |= {_made.__name__: _made, _passes.__name__: _passes}
    limits.globals = sandbox.globals | {each.__name__: each for each in functions}
    # namespaces can hold one another, so they are not written out
    limits.globals["namespace"] = type("Namespace", (sandbox.globals["namespace"],), {"__repr__": object.__repr__})
    return limits.from_string(_Watched().visit(limits.parse(text)))


class _Watched(NodeTransformer):
    """Puts filters of ours where jinja2's sandbox has no hooks."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through(_passes, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through(_made, each) for each in node.nodes]
        return node

    def _visit_made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through(_made, node)

    visit_List = visit_Dict = visit_Compare = visit_Test = _visit_made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._visit_made(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._visit_made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)


def _through(function: Callable[[Any], Any], node: Any) -> nodes.Expr:
    return nodes.Filter(node, function.__name__, [], [], None, None, lineno=node.lineno)


class _Limits(ImmutableSandboxedEnvironment):
    """The sandbox's hooks, with limits."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        return "".join(map(_made, parts))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().look()
        if args or kwargs:
            _budget.get().check(_size((args, kwargs)))
        name, value = getattr(function, "__name__", None), getattr(function, "__self__", None)
        if name in _FORMATS and hasattr(function, "__wrapped__"):
            value = function.__wrapped__.__self__
        elif name == "generate_lorem_ipsum":
            value = "x" * 1000
        if isinstance(value, (str, bytes, int)) and name in _GROWING | _FORMATS:
            args = tuple(map(_held, args))
            _check_growth(name, value, args, kwargs)
        return _made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return _made(left + right)
        _budget.get().look()
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, int):
                    _check_bits(times.bit_length() + value.bit_length())
                elif isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    _budget.get().check(times * len(value) * (1 if isinstance(value, (str, bytes)) else 8))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", left, [right], {})
        return _made(super().call_binop(context, operator, left, right))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    place = int(hasattr(function, "jinja_pass_arg"))  # jinja2 gives those a first argument of its own

    @wraps(function)
    def limited_filter(*args: Any, **kwargs: Any) -> Any:
        _budget.get().look()
        before, value, args = args[:place], args[place], args[place + 1 :]
        if name in _GROWING:
            value = _held(value)
        _check_growth(name, value, args, kwargs)
        if name in _BY_ITEM and isinstance(value, Iterable) and value:
            value = _passes(value)
        return _made(function(*before, value, *args, **kwargs))

    return limited_filter


def _made(value: Any) -> Any:
    """Count a value that was made, and return it."""
    budget = _budget.get()
    if isinstance(value, (str, bytes)):
        budget.made += len(value)
        if budget.made > budget.max_size:
            budget.check(budget.made)
        return value
    budget.look()
    if isinstance(value, _CONTAINERS):
        budget.made += _LIST + 8 * len(value)  # type: ignore[arg-type]
        budget.check(max(budget.made, _size(value)))
    elif isinstance(value, Iterator):
        return map(_made, value)
    return value


def _text(value: Any) -> str:
    """Return what is written of a value."""
    return value if isinstance(value, str) else _made(str(value))


def _passes(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items, and look at the clock at each."""
    budget = _budget.get()
    for item in items:
        budget.look()
        yield item


def _held(value: Any) -> Any:
    """Return a value whose items can be counted."""
    counted = not isinstance(value, Iterable) or isinstance(value, (str, bytes, *_CONTAINERS, Undefined))
    return value if counted else list(map(_made, value))


def _check_bits(bits: int) -> None:
    if bits > _BITS:
        raise TooMuch(f"it computes a number of more than {_BITS:,} bits")


def _check_growth(name: str, value: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    """Refuse a filter or method that may make very much of what it is given, or copy it very often."""
    budget, arguments = _budget.get(), [*args, *kwargs.values()]
    if name in _GROWING:
        product = _size(value)
        for each in arguments:
            product *= max(1, abs(each) if isinstance(each, int) else _size(each))
        budget.check(product)
    elif name in _FORMATS:
        form = str(value)
        values = list(chain.from_iterable(each if isinstance(each, tuple) else [each] for each in arguments))
        values += [each for value in values if isinstance(value, dict) for each in value.values()]
        widths = [int(width) for found in _WIDTHS.findall(form) for width in found if width]
        if _GIVEN_WIDTH.search(form):
            widths += [abs(each) for each in values if isinstance(each, int)]
        budget.check(max(1, form.count("%") + form.count("{")) * (max(widths, default=0) + _size(values)))
    elif name == "wordwrap":  # copies what is left of a word for each line
        width = kwargs.get("width", arguments[0] if arguments else 79)
        longest = max(map(len, str(value).splitlines()), default=0)
        budget.check(longest**2 // max(1, width if isinstance(width, int) else 1))
    elif name == "striptags":  # some versions copy all for each tag
        budget.check(_size(value) * str(value).count("<"))
    elif name == "pprint":  # writes all again for each level
        budget.check(100 * _size(value))


def _size(value: Any) -> int:
    """Return the characters of a value and how many values it holds, those of what it holds among them."""
    if isinstance(value, (str, bytes)):
        return len(value)
    size, budget = 1, _budget.get()
    left: list[Any] = [value] if isinstance(value, _CONTAINERS) else []
    while left and size <= budget.max_size:
        budget.look()
        value = left.pop()
        size += len(value)
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            if isinstance(item, (str, bytes)):
                size += len(item)
            elif isinstance(item, _CONTAINERS):
                left.append(item)
    return size
