"""Chat templates, held to what transformers renders (golden_chats.json), and their sandbox."""

from __future__ import annotations

import datetime
import enum
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.chat_template import ChatTemplates
from tests.models.chat_cases import CASES, SPECIAL_TOKENS, TEMPLATES

GOLDEN = json.loads((Path(__file__).parent / "golden_chats.json").read_text("utf-8"))
CHAT = [{"role": "user", "content": "x"}]
DEEP = functools.reduce(lambda inner, _: [inner], range(100_000), [])


def render(source: str, messages=CHAT, **variables) -> str:
    return ChatTemplates({"default": source}, {}).render(messages, variables=variables)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_equals_transformers(template, case):
    arguments = dict(CASES[case])
    given = {
        name: arguments.pop(name)
        for name in ("messages", "add_generation_prompt", "tools", "documents")
        if name in arguments
    }
    templates = ChatTemplates({"default": TEMPLATES[template]}, SPECIAL_TOKENS)
    expected = GOLDEN[template][case]
    if expected is None:
        with pytest.raises(ValueError, match="chat template cannot render"):
            templates.render(**given, variables=arguments)
    else:
        assert templates.render(**given, variables=arguments) == expected


def test_the_golden_file_covers_every_case():
    assert {name: set(cases) for name, cases in GOLDEN.items()} == {
        name: set(CASES) for name in TEMPLATES
    }


def test_time_is_now():
    before = datetime.datetime.now().replace(microsecond=0)
    shown = datetime.datetime.fromisoformat(render("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"))
    assert before <= shown <= datetime.datetime.now()


def test_messages_are_not_changed_by_a_template_or_its_preparation():
    message = {"role": "assistant", "content": "x", "name": None, "reasoning": "r"}
    assert render("{{ messages[0].thinking }}{{ messages[0] | length }}", [message]) == "r5"
    assert message == {"role": "assistant", "content": "x", "name": None, "reasoning": "r"}


def test_subclasses_of_plain_types_are_made_plain():
    class Role(enum.StrEnum):
        USER = "user"

    source = "{{ messages[0].role }} {{ messages[0].n + 1 }} {{ messages[0].parts | length }}"
    message = {"role": Role.USER, "n": True, "parts": (1.5, 2)}
    assert render(source, [message]) == "user 2 2"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "at least one message"),
        (["x"], {}, "must be a mapping"),
        ([{"role": "user", "content": b"x"}], {}, "got bytes"),
        ([{"role": "user", "content": [object()]}], {}, "got object"),
        ([{"role": "user", "content": DEEP}], {}, "nested too deeply"),
        (CHAT, {"tools": [len]}, "tools must be mappings"),
        (CHAT, {"documents": ["text"]}, "documents must be mappings"),
        (CHAT, {"variables": {"file": sys.stdout}}, "text, numbers"),
        (CHAT, {"name": "rag"}, "'rag'; this checkpoint has: default"),
    ],
)
def test_what_no_template_can_take_is_refused(messages, options, message):
    templates = ChatTemplates({"default": "{{ messages }}"}, {})
    with pytest.raises(ValueError, match=message):
        templates.render(messages, **options)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.sys }}",
        "{{ messages.append(1) }}{{ messages[0].update(role='system') }}",
        "{{ dict.mro() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) | attr('__class__') }}{{ missing.x }}",
        "{% for x in range(999999999) %}{% endfor %}",
        "{{ 1 // 0 }}",
        "{{ 'x'.index('y') }}",
        "{{ 'x' | int('y') + [] }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | tojson(indent=[]) }}{{ missing | tojson }}",
        "{% generation %}",
        "{% include 'other' %}",
        "{% unknown %}",
    ],
)
def test_templates_that_fail_or_leave_their_sandbox_are_value_errors(source):
    with pytest.raises(ValueError, match="chat template"):
        render(source)


def test_a_template_s_tokens_are_found_in_its_text_but_white_space_is_not():
    templates = ChatTemplates({"a": "x", "b": "{{ '<call>' }}\n\n"}, {})
    assert templates.write("<call>")
    assert not templates.write("</call>")
    assert not templates.write("\n\n")


@pytest.mark.slow
def test_models_can_be_imported_without_tokenizers_and_jinja():
    script = (
        "import sys, models, models.tokenizer, models.tokenizer_folder, models.gguf_tokenizer;"
        "sys.exit(bool({'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 0
