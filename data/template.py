"""Chat templates: somebody else's Jinja program, run in a sandbox with a budget."""

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MAX_TEMPLATE = 100_000  # characters; the longest published templates have about 20,000
MAX_STEPS = 250_000  # loop iterations and calls in one rendering
MAX_PRODUCT = 1_000_000  # characters or bits that one `*` or `**` may make
DATE = datetime.datetime(2025, 1, 1)  # what strftime_now says: the same chat gives the same tokens tomorrow


class Rendered(NamedTuple):
    """A chat as text, and the character spans that the template marked with `{% generation %}`."""

    text: str
    generated: tuple[tuple[int, int], ...]


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model says; found again by two marks in the output."""

    tags = frozenset(["generation"])  # pyright: ignore[reportAssignmentType] - jinja2 only asks what is in it

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        environment = self.environment
        assert isinstance(environment, _Environment)
        begin, end = environment.marks
        return begin + caller() + end


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses, with a count of steps: the sandbox alone lets nested loops run for ever."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self._local = threading.local()
        self.filters["tojson"] = _to_json
        self.filters["_counted"] = self._counted
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = DATE.strftime

    @property
    def marks(self) -> tuple[str, str]:
        return self._local.marks

    def start(self, marks: tuple[str, str]) -> None:
        self._local.steps, self._local.marks = 0, marks

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def _step(self) -> None:
        self._local.steps += 1
        if self._local.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"the template took more than {MAX_STEPS} steps")

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._step()
            yield value

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._step()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = _size(left) * (abs(right) if operator == "**" and isinstance(right, int) else _size(right))
        if size > MAX_PRODUCT and not (operator == "*" and isinstance(left, int) and isinstance(right, int)):
            raise jinja2.TemplateRuntimeError(f"`{operator}` in the template would make a value of size {size}")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    """A length for text and lists; as a factor, the number itself."""
    return len(value) if isinstance(value, str | list | tuple) else abs(int(value))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)
    # The noncharacters U+FDD0..U+FDEF are marks (see unused_characters) and stay themselves.
    return re.sub(r"\\u(fd[de][0-9a-f])", lambda match: chr(int(match[1], 16)), text)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> tuple[_Environment, jinja2.Template]:
    if len(source) > MAX_TEMPLATE:
        raise ValueError(
            f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE}; use another tokenizer"
        )
    environment = _Environment()
    try:
        return environment, environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the chat template is not valid Jinja ({error}); repair it or use another tokenizer"
        ) from error


def render(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> Rendered:
    """Render `messages` with the Jinja program `source`; `variables` are its others (bos_token, tools, ...).

    The template can read its arguments and nothing else, and stops after MAX_STEPS steps. Memory is not bounded: a
    hostile template that doubles a string can still exhaust it, so load tokenizers from people you trust.
    Raises ValueError with the template's own message if it refuses the conversation.
    """
    environment, template = _compile(source)
    content = json.dumps({**variables, "messages": list(messages)}, ensure_ascii=False, default=dict)
    begin, end = unused_characters(content + source, 2)
    environment.start((begin, end))
    try:
        marked = template.render(json.loads(content))
    except (jinja2.TemplateError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return _without_marks(marked, begin, end)


def unused_characters(text: str, count: int) -> str:
    """`count` Unicode noncharacters that `text` does not contain, to mark places in it."""
    free = "".join(chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text)
    if len(free) < count:
        raise ValueError("the text holds nearly all of the noncharacters U+FDD0..U+FDEF; remove them from it")
    return free[:count]


def _without_marks(marked: str, begin: str, end: str) -> Rendered:
    pieces, spans, length = [], [], 0
    for number, piece in enumerate(marked.replace(end, begin).split(begin)):
        if number % 2:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))
