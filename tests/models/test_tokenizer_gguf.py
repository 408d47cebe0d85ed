"""Tokenizers from GGUF metadata: the same ids as the model's own tokenizer.json gives."""

from __future__ import annotations

import pytest

from models.errors import CheckpointError
from models.gguf_pre_tokenizers import PRE_TOKENIZERS
from tests.models.tokenizer_styles import (
    FOLDER,
    GOLDEN,
    TEXTS,
    gguf_metadata,
    read_golden,
    read_golden_gguf,
    write_folder,
)

# A GGUF file cannot say that only a text's first piece gets a prefix space, as mistral's does.
STYLES = [style for style in GOLDEN if style != "mistral"]


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_texts_equal_transformers(tmp_path, style):
    golden, tokenizer = GOLDEN[style], read_golden_gguf(tmp_path, style)
    for index, text in enumerate(TEXTS):
        ids, decoded = golden["ids"][index], golden["decoded"][index]
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == (text if decoded is None else decoded)
        skipped = golden["skipped"][index]
        assert tokenizer.decode(ids) == (text if skipped is None else skipped)
        plain = golden["plain"][index]
        assert tokenizer.encode(text, parse_special=False, add_special_tokens=False) == (
            ids if plain is None else plain
        )


@pytest.mark.parametrize("style", STYLES)
def test_texts_begin_as_transformers_lets_them(tmp_path, style):
    begin, end = GOLDEN[style]["around"]
    tokenizer = read_golden_gguf(tmp_path, style)
    ids = tokenizer.encode("the")
    assert ids == begin + tokenizer.encode("the", add_special_tokens=False) + end


@pytest.mark.parametrize(("style", "begins"), [("llama2", True), ("llama3", True), ("gpt2", False)])
def test_the_file_says_whether_texts_begin_with_bos(tmp_path, style, begins):
    for add in (None, True, False):
        tokenizer = read_golden_gguf(tmp_path, style, add_bos_token=add)
        begun = tokenizer.encode("x") != tokenizer.encode("x", add_special_tokens=False)
        assert begun == (begins if add is None else add)
    tokenizer = read_golden_gguf(tmp_path, style, add_bos_token=True, add_eos_token=True)
    assert len(tokenizer.encode("")) == 2
    with pytest.raises(CheckpointError, match="bos_token is to be added"):
        read_golden_gguf(tmp_path, style, add_bos_token=True, bos_token_id=None)


def test_a_file_may_do_without_a_prefix_space(tmp_path):
    tokenizer = read_golden_gguf(tmp_path, "llama2", add_space_prefix=False)
    assert tokenizer.encode(" the", add_special_tokens=False) == read_golden(
        tmp_path, "llama2"
    ).encode("the", add_special_tokens=False)
    for text in ("the", " the", "  the"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_an_id_of_minus_one_is_none(tmp_path):
    tokenizer = read_golden_gguf(tmp_path, "llama2", padding_token_id=2**32 - 1)
    assert tokenizer.stop_ids == (2,)


def test_every_declared_end_stops(tmp_path):
    tokenizer = read_golden_gguf(tmp_path, "llama3", eot_token_id=5, eom_token_id=6)
    special = GOLDEN["llama3"]["files"]["tokenizer.json"]["added_tokens"]
    ids = {token["content"]: token["id"] for token in special}
    assert tokenizer.stop_ids == (ids["<|eot_id|>"], 5, 6, ids["<|end_of_text|>"])


def test_templates_of_other_names_are_read(tmp_path):
    metadata = {"tokenizer.chat_template": "d", "tokenizer.chat_template.tool_use": "t"}
    overrides = {key.removeprefix("tokenizer."): value for key, value in metadata.items()}
    assert set(overrides) == {"chat_template", "chat_template.tool_use"}
    from models.gguf_file import read_gguf
    from models.gguf_tokenizer import read_gguf_tokenizer
    from tests.models.tiny_checkpoint import write_checkpoint

    path = write_checkpoint(tmp_path / "t.gguf", metadata=gguf_metadata("gpt2") | metadata)
    tokenizer = read_gguf_tokenizer(read_gguf(path))
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(chat) == "d"
    assert tokenizer.render_chat(chat, tools=[]) == "t"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 12345 a\n\n b", ["It", "'s", " 12345", " a", "\n\n", " b"]),
        ("smollm", "It's 123 ab", ["It", "'s", " ", "1", "2", "3", " ab"]),
        ("llama-bpe", "IT'S 12345!\n\nx", ["IT", "'S", " ", "123", "45", "!\n\n", "x"]),
        ("dbrx", "IT'S 12345!\n\nx", ["IT", "'S", " ", "123", "45", "!\n\n", "x"]),
        ("qwen2", "it's 12.x\n  y", ["it", "'s", " ", "1", "2", ".x", "\n", " ", " y"]),
        ("qwen35", "ke\u0327y 12", ["ke\u0327y", " ", "1", "2"]),
        ("qwen2", "kx\u0327y", ["kx", "\u0327y"]),
        ("tekken", "HelloWorld it's /a//\n", ["Hello", "World", " it", "'s", " /", "a", "//\n"]),
        ("gpt-4o", "HelloWorld it's 1234", ["Hello", "World", " it's", " ", "123", "4"]),
        ("deepseek-coder", "a b,\n12", ["a", " b", ",", "\n", "1", "2"]),
        ("deepseek-v3", "a1234,\nx_y 你a", ["a", "123", "4", ",\n", "x", "_y", " ", "你", "a"]),
        ("falcon", "a, 12345=`b", ["a", ",", " ", "123", "45", "=`", "b"]),
        ("default", "a, 12345b", ["a", ",", " ", "123", "45", "b"]),
    ],
)  # fmt: skip
def test_text_is_cut_as_the_pre_tokenizer_of_that_name_does(tmp_path, pre, text, words):
    tokenizer = read_golden_gguf(tmp_path, "gpt2", pre=pre)
    pre_tokenizer = tokenizer._backend.pre_tokenizer
    pieces = [text[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == words


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_every_character(tmp_path, pre):
    tokenizer = read_golden_gguf(tmp_path, "gpt2", pre=pre)
    import unicodedata

    for text in TEXTS:
        kept = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].compose else text
        assert (
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special=False)
            == kept
        )


UNSUPPORTED = [
    ({"pre": "kimi-k2"}, "pre-tokenizer 'kimi-k2' is not supported"),
    ({"pre": None}, "does not say how text is cut"),
    ({"model": "t5"}, "tokenizer 't5' is not supported"),
]


@pytest.mark.parametrize(("metadata", "message"), UNSUPPORTED)
def test_other_kinds_are_refused_unless_a_tokenizer_json_is_beside(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=rf"{message}.*tokenizer\.json into the same folder"):
        read_golden_gguf(tmp_path, "qwen2", **metadata)
    write_folder(tmp_path, "qwen2")
    tokenizer = read_golden_gguf(tmp_path, "qwen2", **metadata)
    for text, ids in zip(TEXTS, GOLDEN["qwen2"]["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
    stop = [tokenizer.decode([index], skip_special=False) for index in tokenizer.stop_ids]
    assert stop == ["<|im_end|>", "<|endoftext|>"]
    for other in ("llama2", "llama3"):  # more tokens, fewer tokens
        write_folder(tmp_path, other)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: belongs to another model"):
            read_golden_gguf(tmp_path, "qwen2", **metadata)


def test_a_tokenizer_json_beside_is_left_alone_where_the_file_s_own_will_do(tmp_path):
    write_folder(tmp_path, "llama2")
    tokenizer = read_golden_gguf(tmp_path, "qwen2")
    assert (
        tokenizer.encode(" the", add_special_tokens=False)
        == GOLDEN["qwen2"]["ids"][TEXTS.index(" the")]
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"scores": None}, "scores is missing; put the model's tokenizer.json"),
        ({"scores": [0.0]}, "tokens but 1 scores"),
        ({"token_type": None}, "token_type is missing; put"),
        ({"remove_extra_whitespaces": 1}, "remove_extra_whitespaces is not supported; put"),
        ({"eos_token_id": 10_000}, "outside the vocabulary"),
        ({"add_eos_token": True, "eos_token_id": None}, "eos_token is to be added"),
        ({"tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 0.0],
          "bos_token_id": 0, "eos_token_id": 0}, "no token <0x00> for a byte"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "a token twice"),
        ({"tokens": ["a"], "token_type": [1, 1]}, "1 tokens but 2 token types"),
    ],
)  # fmt: skip
def test_inconsistent_metadata_is_refused(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        read_golden_gguf(tmp_path, "llama2", **metadata)


def test_golden_data_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
