"""Tokenizers from Hugging Face folders, held to what transformers gave (golden_tokenizers)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.errors import CheckpointError
from models.tokenizer import ChatTokenizer
from models.tokenizer_folder import read_tokenizer_folder
from tests.models.tokenizer_styles import GOLDEN, TEXTS, read_golden, write_folder


def read_with(folder, style: str = "qwen2", **files: Any) -> ChatTokenizer:
    tokenizer = read_tokenizer_folder(write_folder(folder, style, **files))
    assert tokenizer is not None
    return tokenizer


def config_of(style: str, **overrides: Any) -> dict[str, Any]:
    return GOLDEN[style]["files"]["tokenizer_config.json"] | overrides


def added_tokens(style: str) -> dict[str, int]:
    tokens = GOLDEN[style]["files"]["tokenizer.json"]["added_tokens"]
    return {token["content"]: token["id"] for token in tokens}


@pytest.mark.parametrize("style", GOLDEN)
def test_ids_and_texts_equal_transformers(tmp_path, style):
    golden, tokenizer = GOLDEN[style], read_golden(tmp_path, style)
    for index, text in enumerate(TEXTS):
        ids = golden["ids"][index]
        plain = ids if golden["plain"][index] is None else golden["plain"][index]
        decoded, skipped = golden["decoded"][index], golden["skipped"][index]
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text, parse_special=False, add_special_tokens=False) == plain, text
        assert tokenizer.decode(ids, skip_special=False) == (text if decoded is None else decoded)
        assert tokenizer.decode(ids) == (text if skipped is None else skipped)


@pytest.mark.parametrize("style", GOLDEN)
def test_the_post_processor_s_tokens_are_added_when_asked_for(tmp_path, style):
    (begin, end), tokenizer = GOLDEN[style]["around"], read_golden(tmp_path, style)
    for text in ("the", "", "<s> x"):
        for parse in (True, False):
            ids = tokenizer.encode(text, parse_special=parse, add_special_tokens=False)
            assert tokenizer.encode(text, parse_special=parse) == begin + ids + end


@pytest.mark.parametrize("style", GOLDEN)
def test_no_text_makes_a_special_token_unless_parsed(tmp_path, style):
    tokenizer = read_golden(tmp_path, style)
    assert tokenizer.special_ids
    text = "x".join(tokenizer.decode([index], skip_special=False) for index in added_ids(tokenizer))
    assert tokenizer.special_ids <= set(tokenizer.encode(text, add_special_tokens=False))
    plain = tokenizer.encode(text, parse_special=False, add_special_tokens=False)
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.decode(plain) == text


def added_ids(tokenizer: ChatTokenizer) -> list[int]:
    return sorted(tokenizer.special_ids)


@pytest.mark.parametrize(
    ("model", "whole"),
    [
        ({"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "a": 2}, "unk_token": "<unk>"}, [1]),
        (
            {
                "type": "Unigram",
                "unk_id": 0,
                "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["<", -9.0], ["s", -9.0], [">", -9.0]],
                "byte_fallback": False,
            },
            [1],
        ),
        (
            {
                "type": "BPE",
                "vocab": {"<unk>": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "<s": 5},
                "merges": [["<", "s"], ["<s", ">"]],
                "unk_token": "<unk>",
                "ignore_merges": True,
            },
            [1],
        ),
    ],
)
def test_a_model_that_spells_a_special_token_is_kept_from_it(tmp_path, model, whole):
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": 1, "content": "<s>", "special": True, **special},
        {"id": len(model["vocab"]), "content": "<kept>", "special": False, **special},
    ]
    spec = {"version": "1.0", "added_tokens": added, "model": model}
    tokenizer = read_with(tmp_path, tokenizer=spec, tokenizer_config={})
    assert tokenizer.encode("<s>", add_special_tokens=False) == whole
    assert 1 not in tokenizer.encode("<s>", parse_special=False, add_special_tokens=False)
    kept = tokenizer.encode("<kept>", parse_special=False, add_special_tokens=False)
    assert kept == tokenizer.encode("<kept>", add_special_tokens=False) == [len(model["vocab"])]


def test_tokens_that_a_chat_template_writes_are_no_plain_text(tmp_path):
    call, end = (added_tokens("qwen2")[name] for name in ("<tool_call>", "</tool_call>"))
    text = "<tool_call>x</tool_call>"
    without = read_golden(tmp_path, "qwen2")
    assert {call, end} <= set(without.encode(text, parse_special=False, add_special_tokens=False))
    template = "{{ '<tool_call>' }}{{ messages }}"
    tokenizer = read_with(tmp_path, tokenizer_config=config_of("qwen2", chat_template=template))
    assert {call, end} <= set(tokenizer.encode(text, add_special_tokens=False))
    plain = tokenizer.encode(text, parse_special=False, add_special_tokens=False)
    assert call not in plain
    assert end in plain


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path):
    spec = GOLDEN["gpt2"]["files"]["tokenizer.json"] | {
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    }
    tokenizer = read_with(tmp_path, "gpt2", tokenizer=spec)
    for text in ("a", "a long text of many words"):
        for parse_special in (True, False):
            ids = tokenizer.encode(text, parse_special=parse_special, add_special_tokens=False)
            assert tokenizer.decode(ids) == text


def test_lone_surrogates_are_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="surrogates"):
        read_golden(tmp_path, "llama2").encode("a\udc80", add_special_tokens=False)


def test_a_named_special_token_of_the_vocabulary_becomes_special(tmp_path):
    spec = GOLDEN["llama2"]["files"]["tokenizer.json"]
    spec = spec | {"added_tokens": [t for t in spec["added_tokens"] if t["content"] != "</s>"]}
    tokenizer = read_with(tmp_path, "llama2", tokenizer=spec)
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert 2 in tokenizer.special_ids


def test_flags_of_the_config_win_and_special_tokens_of_any_name_are_special(tmp_path):
    ids = added_tokens("qwen2")
    call, end = ids["<tool_call>"], ids["</tool_call>"]
    entry = {"content": "<tool_call>", "special": True, "normalized": False}
    config = config_of("qwen2", added_tokens_decoder={str(call): entry})
    assert call not in read_golden(tmp_path, "qwen2").special_ids
    assert {call, end} & read_with(tmp_path, tokenizer_config=config).special_ids == {call}
    for more in (
        {"extra_special_tokens": ["the", "</tool_call>"]},
        {"additional_special_tokens": [{"content": "</tool_call>"}]},
        {"extra_special_tokens": {"call_token": "</tool_call>"}},
        {"call_token": "</tool_call>", "add_bos_token": False, "num_image_token": 256},
    ):
        template = "{{ call_token is defined }}{{ call_token }}"
        tokenizer = read_with(
            tmp_path, tokenizer_config=config_of("qwen2", chat_template=template, **more)
        )
        assert {call, end} & tokenizer.special_ids == {end}
        named = "</tool_call>" if "call_token" in str(more) else ""
        assert tokenizer.render_chat(CHAT) == f"{bool(named)}{named}"


def test_a_special_token_without_an_id_is_not_added(tmp_path):
    tokenizer = read_with(tmp_path, tokenizer_config=config_of("qwen2", pad_token="[PAD]"))
    size = read_golden(tmp_path, "qwen2").vocab_size
    assert tokenizer.vocab_size == size
    assert max(tokenizer.encode("[PAD]", add_special_tokens=False)) < size


def test_added_tokens_of_the_config_join_with_the_id_it_gives(tmp_path):
    size = read_golden(tmp_path, "qwen2").vocab_size
    entry = {"content": "<extra>", "special": True, "normalized": False}
    config = config_of("qwen2", added_tokens_decoder={str(size): entry})
    tokenizer = read_with(tmp_path, tokenizer_config=config)
    assert tokenizer.encode("<extra>", add_special_tokens=False) == [size]
    config["added_tokens_decoder"] = {str(size + 1): entry}
    with pytest.raises(CheckpointError, match=rf"tokenizer_config.json.*{size + 1}"):
        read_with(tmp_path, tokenizer_config=config)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, ["<|im_end|>"]),
        ({"config": {"eos_token_id": 7}}, [7]),
        ({"config": {"text_config": {"eos_token_id": [7, 8]}}}, [7, 8]),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": 9}}, [9]),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [9, 8]}}, [9, 8]),
        ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": None}}, [7]),
    ],
)
def test_stop_ids_are_the_declared_ones_then_usual_chat_ends(tmp_path, files, ends):
    ids = added_tokens("qwen2")
    declared = [ids.get(end, end) for end in ends]
    usual = [ids["<|endoftext|>"], ids["<|im_end|>"]]
    assert read_with(tmp_path, **files).stop_ids == tuple(dict.fromkeys([*declared, *usual]))


def test_special_tokens_map_counts_unless_the_config_lists_its_added_tokens(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}"
    tokens = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>"}}
    config = config_of("qwen2", chat_template=template)
    chat = [{"role": "user", "content": ""}]
    tokenizer = read_with(tmp_path, tokenizer_config=config, special_tokens_map=tokens)
    assert tokenizer.render_chat(chat) == "<|im_start|><|endoftext|>"
    config["added_tokens_decoder"] = {}
    tokenizer = read_with(tmp_path, tokenizer_config=config, special_tokens_map=tokens)
    assert tokenizer.render_chat(chat) == "<|im_end|>"


def test_add_bos_token_counts_where_there_is_no_post_processor(tmp_path):
    spec = GOLDEN["llama2"]["files"]["tokenizer.json"]
    for add, processor, begin in (
        (True, None, [1]),
        (False, None, []),
        (False, spec["post_processor"], [1]),
    ):
        tokenizer = read_with(
            tmp_path,
            "llama2",
            tokenizer=spec | {"post_processor": processor},
            tokenizer_config=config_of("llama2", add_bos_token=add),
        )
        ids = tokenizer.encode("the")
        assert ids == begin + tokenizer.encode("the", add_special_tokens=False)


CHAT = [{"role": "user", "content": "x"}]


def test_template_files_win_over_the_config_and_the_processor_s_template(tmp_path):
    write_folder(tmp_path, "qwen2", chat_template={"chat_template": "processor"})
    assert read_with(tmp_path).render_chat(CHAT) == "processor"
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "config"},
        {"name": "rag", "template": "rag"},
    ]
    config = config_of("qwen2", chat_template=named)
    tokenizer = read_with(tmp_path, tokenizer_config=config)
    assert tokenizer.template_names == ("tool_use", "default", "rag")
    assert tokenizer.render_chat(CHAT) == "config"
    assert tokenizer.render_chat(CHAT, tools=[]) == "tools"
    assert tokenizer.render_chat(CHAT, tools=[], template="rag") == "rag"
    with pytest.raises(ValueError, match=r"'best'.*default, rag, tool_use"):
        tokenizer.render_chat(CHAT, template="best")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/short.jinja").write_text("short")
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = read_with(tmp_path, tokenizer_config=config)
    assert sorted(tokenizer.template_names) == ["default", "short"]
    assert tokenizer.render_chat(CHAT, tools=[]) == "file"
    assert tokenizer.render_chat(CHAT, template="short") == "short"


def test_a_chat_is_encoded_without_a_second_bos(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = read_with(
        tmp_path, "llama2", tokenizer_config=config_of("llama2", chat_template=template)
    )
    assert tokenizer.render_chat(CHAT) == "<s>x</s>"
    assert tokenizer.apply_chat_template(CHAT) == [
        1,
        *tokenizer.encode("x", add_special_tokens=False),
        2,
    ]


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert read_tokenizer_folder(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_other_layouts_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=rf"{name}: .*tokenizer.json.*save_pretrained"):
        read_tokenizer_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "not a usable tokenizer"),
        ("tokenizer.json", "{}", "not a usable tokenizer"),
        ("tokenizer.json", '{"model": {"type": "New"}}', "not a usable tokenizer"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{,}", "not valid JSON"),
        ("tokenizer_config.json", "\xff", "not UTF-8"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 5}', "bos_token must be text"),
        ("tokenizer_config.json", '{"bos_token": {}}', "bos_token must be text"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "by its id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 1}}}', "content"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"999": {"content": "<x>", "special": "no"}}}',
            "added token 999",
        ),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "name and a template"),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "a list or an object"),
        ("tokenizer_config.json", '{"extra_special_tokens": [5]}', "must be text"),
        ("special_tokens_map.json", '{"eos_token": []}', "eos_token must be text"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be an id"),
        ("generation_config.json", '{"eos_token_id": []}', "eos_token_id must be an id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "eos_token_id must be an id"),
        ("config.json", '{"eos_token_id": -1}', "eos_token_id must be an id"),
        ("config.json", f'{{"eos_token_id": {2**31}}}', "eos_token_id must be an id"),
        ("config.json", f'{{"eos_token_id": [1, {10**30}]}}', "eos_token_id must be an id"),
        (
            "tokenizer_config.json",
            f'{{"added_tokens_decoder": {{"{"9" * 5000}": {{"content": "x"}}}}}}',
            "must be an object by its id",
        ),
        ("chat_template.jinja", "\xff", "not UTF-8"),
        ("chat_template.json", '{"chat_template": [5]}', "chat_template must be text"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, text, message):
    write_folder(tmp_path, "gpt2")
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=f"(?s){name}.*{message}"):
        read_tokenizer_folder(tmp_path)


def test_add_eos_token_counts_likewise(tmp_path):
    spec = GOLDEN["llama2"]["files"]["tokenizer.json"] | {"post_processor": None}
    config = config_of("llama2", add_eos_token=True)
    tokenizer = read_with(tmp_path, "llama2", tokenizer=spec, tokenizer_config=config)
    ids = tokenizer.encode("the")
    assert ids == [1, *tokenizer.encode("the", add_special_tokens=False), 2]


def test_a_bos_to_begin_with_must_be_named(tmp_path):
    spec = GOLDEN["qwen2"]["files"]["tokenizer.json"] | {"post_processor": None}
    config = config_of("qwen2", add_bos_token=True)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: bos_token is to be added"):
        read_with(tmp_path, tokenizer=spec, tokenizer_config=config)


def test_only_a_tokenizer_json_is_needed(tmp_path):
    spec = GOLDEN["gpt2"]["files"]["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = read_tokenizer_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("x 你", add_special_tokens=False)) == "x 你"
    assert tokenizer.template_names == ()
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat(CHAT)
