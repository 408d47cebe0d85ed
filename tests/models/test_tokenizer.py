"""Tokenizer and chat template on a tiny vocabulary (the real one: test_smollm2_parity.py)."""

from __future__ import annotations

import threading
import time

import pytest

from models.gguf_file import read_gguf
from models.gguf_tokenizer import read_gguf_tokenizer
from models.tokenizer import ChatTokenizer
from tests.models.tiny_checkpoint import CHAT_TEMPLATE, write_checkpoint

BEGIN, END, HE = 257, 258, 256


def make_tokenizer(tmp_path, **metadata) -> ChatTokenizer:
    names = {
        "template": "tokenizer.chat_template",
        "pre": "tokenizer.ggml.pre",
        "types": "tokenizer.ggml.token_type",
    }
    overrides = {names[name]: value for name, value in metadata.items()}
    return read_gguf_tokenizer(read_gguf(write_checkpoint(tmp_path / "t.gguf", metadata=overrides)))


@pytest.mark.parametrize("text", ["he said: hé\n\n  12", "😀\x00\u200d", "", "a<s>b"])
def test_any_text_survives_a_round_trip(tmp_path, text):
    tokenizer = make_tokenizer(tmp_path)
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids, skip_special=False) == text


def test_merges_apply_and_special_tokens_are_parsed_unless_asked_not_to(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert tokenizer.encode("he")[0] == HE
    assert tokenizer.encode("<s>he</s>") == [BEGIN, HE, END]
    plain = tokenizer.encode("<s>he</s>", parse_special=False)
    assert HE in plain
    assert not {BEGIN, END} & set(plain)
    assert tokenizer.decode([BEGIN, HE, END]) == "he"


def test_user_defined_tokens_are_parsed_but_not_skipped(tmp_path):
    tokenizer = make_tokenizer(tmp_path, types=[1] * 257 + [4, 3])
    assert tokenizer.encode("<s>he") == [BEGIN, HE]
    assert tokenizer.decode([BEGIN, HE, END]) == "<s>he"
    assert tokenizer.special_ids == {END}


def test_broken_bytes_decode_to_replacement_characters(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode("é")
    assert len(ids) == 2
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_lone_surrogates_are_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        make_tokenizer(tmp_path).encode("\ud800")


def test_declared_end_tokens_stop_generation(tmp_path):
    assert make_tokenizer(tmp_path).stop_ids == (END,)


def test_what_begins_and_ends_a_text_is_known_where_the_checkpoint_names_it(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (BEGIN, END)
    nameless = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos")}
    path = write_checkpoint(tmp_path / "nameless.gguf", metadata=nameless)
    tokenizer = read_gguf_tokenizer(read_gguf(path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.template_source() == CHAT_TEMPLATE
    with pytest.raises(ValueError, match="none"):
        tokenizer.template_source("none")


def test_chat_is_rendered_by_the_file_s_template(tmp_path):
    tokenizer = make_tokenizer(
        tmp_path,
        template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token }}{% endif %}",
    )
    messages = [{"role": "user", "content": "he"}]
    assert tokenizer.render_chat(messages) == "<s>he</s>"
    assert tokenizer.apply_chat_template(messages) == [BEGIN, HE, END]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == [BEGIN, HE]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenize", False),
        ("return_tensors", "np"),
        ("chat_template", "{{ x }}"),
        ("padding", True),
    ],
)
def test_arguments_of_transformers_are_no_variables(tmp_path, name, value):
    tokenizer = make_tokenizer(tmp_path, template="{{ messages[0].content }}")
    with pytest.raises(TypeError, match=f"{name} is no argument here: "):
        tokenizer.apply_chat_template([{"role": "user", "content": "he"}], **{name: value})


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for x in range(999999999) %}{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[0]['missing'] + 'x' }}",
        "{% if %}",
        None,
    ],
)
def test_templates_that_fail_or_escape_their_sandbox_are_value_errors(tmp_path, template):
    tokenizer = make_tokenizer(tmp_path, template=template)
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.render_chat([{"role": "user", "content": "he"}])


def test_other_threads_go_on_while_a_long_text_is_tokenised(tmp_path):
    """A second of it would stall everybody who is served by the same process."""
    tokenizer = make_tokenizer(tmp_path)
    text = "he said hello, and then some more. " * 40_000
    begun, ended, ticks = threading.Event(), threading.Event(), []

    def tick():
        begun.wait()
        while not ended.is_set():
            ticks.append(time.monotonic())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.monotonic()
    begun.set()
    ids = tokenizer.encode(text)
    seconds = time.monotonic() - began
    ended.set()
    thread.join()
    assert tokenizer.decode(ids) == text
    assert seconds > 0.1, "too short a text to tell"
    assert sum(began < at < began + seconds for at in ticks) > 10
