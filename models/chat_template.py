"""Chat templates: Jinja programs that write a chat as the one string a model was trained on.

They see what `transformers` shows them in `apply_chat_template` (5.23, `chat_template_utils.py`):
the same globals, filters, tags and treatment of messages. A template comes with a checkpoint and is
not trusted: it runs in Jinja's sandbox, within the bounds of `models.template_limits` on time and
memory, and is given plain data only.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

DEFAULT = "default"
TOOL_USE = "tool_use"
"""The name of the template that is taken in place of the default one when there are tools."""

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Names for an assistant's reasoning; the first is the one that most templates read."""

TEMPLATE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a template can raise besides Jinja's own errors, also when Python compiles it."""

MOST_SOURCE = 100_000  # characters, which take seconds to compile; published ones have 30,000
MOST_TIME_FORMAT = 1000


class ChatTemplates:
    """The chat templates of one checkpoint, by name; most have one, named "default".

    Args:
      sources: Jinja source of each template; may be empty.
      special_tokens: variables that every template sees ("bos_token" and so on).
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]):
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        return self._special_tokens

    def source(self, name: str | None = None) -> str:
        """What the template `name`, or the default one, is written as; ValueError for none."""
        return self._sources[self._choose(name, None)]

    def write(self, token: str) -> bool:
        """Whether `token` stands in a template as text; white space is text like any other."""
        return not token.isspace() and any(token in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Message],
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat as one string, by the template `name`.

        Without a name it is "tool_use" when there are `tools` and such a template, else "default".
        Keys of a message whose value is None are left out. `variables` win over special tokens.
        Raises ValueError when there is no such template, when something given is not text, numbers,
        lists and mappings of them, when the template refuses it, and when it takes more time or
        memory than `models.template_limits` allows.
        """
        import jinja2

        from models.template_limits import limited

        name = self._choose(name, tools)
        if not messages:
            raise ValueError("the chat template needs at least one message")
        try:
            visible = {
                **self._special_tokens,
                **_plain(variables or {}),
                "messages": [_plain_message(message) for message in messages],
                "tools": _plain_mappings("tools", tools),
                "documents": _plain_mappings("documents", documents),
                "add_generation_prompt": add_generation_prompt,
            }
        except RecursionError as error:
            raise ValueError("the messages are nested too deeply for a chat template") from error
        try:
            with limited(visible):
                return self._compile(name).render(visible)
        except (jinja2.TemplateError, *TEMPLATE_ERRORS) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def _choose(self, name: str | None, tools: object) -> str:
        if not self._sources:
            raise ValueError("this checkpoint carries no chat template")
        if name is None:
            name = TOOL_USE if tools is not None and TOOL_USE in self._sources else DEFAULT
        if name not in self._sources:
            known = ", ".join(sorted(self._sources))
            raise ValueError(f"no chat template is named {name!r}; this checkpoint has: {known}")
        return name

    def _compile(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            source = self._sources[name]
            if len(source) > MOST_SOURCE:
                raise ValueError(f"it has {len(source):,} characters; {MOST_SOURCE:,} are read")
            self._compiled[name] = _environment().from_string(source)
        return self._compiled[name]


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes

    from models.template_limits import LimitedEnvironment

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %}` marks an answer for training; here it only groups."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.limit_filters()
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > MOST_TIME_FORMAT:
        raise ValueError(f"strftime_now takes {MOST_TIME_FORMAT} characters, got {len(format):,}")
    return datetime.datetime.now().strftime(format)


def _plain_message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be a mapping with a role and a content, got {message!r}")
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    for name in REASONING_NAMES:
        if name in plain:
            return {"thinking": plain[name], **plain, "reasoning_content": plain[name]}
    return plain


def _plain_mappings(
    what: str, values: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    for value in values:
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} must be mappings (a tool is its JSON schema), got {value!r}")
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """`value` of JSON's types alone, whose methods the sandbox knows."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(
        f"a chat template takes text, numbers, lists and mappings, got {type(value).__name__}"
    )
