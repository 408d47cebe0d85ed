"""Writes golden_tokenizers/*.json and golden_chats.json: what transformers makes of tricky texts.

Run it only to change the texts, the tokenizers or the chats, in an environment of its own with
transformers (5.23.0, and tokenizers 0.23.3, jinja2 3.1.6), from the repository's root:

    PYTHONPATH=. python tests/models/make_golden_tokenizers.py

Each tokenizer is trained here, on `TRAINING`, and put together like those of the family it is named
after. The merges of those in SentencePiece's style are what transformers' converter recovers from a
vocabulary with scores, here minus the ids. Its folder is loaded by `AutoTokenizer`.

golden_tokenizers/texts.json: the texts. golden_tokenizers/NAME.json: "files" of the folder by name;
for text i `ids[i]`, `plain[i]` (special tokens split, null where it is the same) and `decoded[i]`
and `skipped[i]` (without special tokens), null where that is the text itself; `around`, the ids
before and behind a text with special tokens added. golden_chats.json: by template and case the
rendered chat, null where transformers raises.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_base import generate_merges

from models.gguf_pre_tokenizers import CL100K, QWEN2
from tests.models.chat_cases import CASES, SPECIAL_TOKENS, TEMPLATES

HERE = Path(__file__).parent
FOLDER = HERE / "golden_tokenizers"
SPACE = "▁"
TRAINING = [
    "The library is open from Tuesday to Saturday, and it's closed on public holidays. We'll see "
    "the other readers there; they don't think that the weather is the reason for the thing.",
    "the then there these those this that than with which when where what who how why while "
    "reading writing thinking nothing something interesting information station nation ration",
    "Die Bücherei hat von Dienstag bis Samstag geöffnet. L'été, le café est ouvert; naïve déjà vu.",
    "def read(self, path: str) -> int:\n    return self.total + 1  # the rest\n\nfor i in range(9):"
    "\n        print(i, x[i], y == 0)\n\n\n",
    "你好,世界。你好,我是图书馆。 Привет, мир. مرحبا بالعالم 123 456 7890 2024 1000 99.5%",
] * 3
TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    " the",
    "the",
    "   the library  is   open   ",
    "tabs\tand\nnewlines\r\n\r\n  mixed \t \n\n\n end\n",
    "Hello, world! It's we've I'LL they'd 'tis 'S don't DON'T",
    "0 12 123 1234 0123456789 3.14159 1,000,000 -42 1e-5 0xDEADBEEF v2.0.1",
    "١٢٣ ４５６ ²³ ½ Ⅷ 三十",  # noqa: RUF001
    "naïve café Ångström e\u0301a\u0323\u0302 ﬁ ß İ \u017f '\u017f",
    "你好,世界。こんにちは 안녕하세요 Привет שלום مرحبا नमस्ते",
    "👩‍💻🇩🇪👍🏽 ❤️ 🫠👨‍👩‍👧‍👦",
    "zero\u200bwidth\u00a0nbsp\u3000wide\ufeffbom\u2028line\u0085next",
    "control \x00\x01\x1f\x7f\x80\x9f bytes\x00",
    "def f(x):\n    return x**2 if x>=0 else -x  # don't\n\n\nclass A:\n\tpass",
    "if (a && b || !c) { x[i]->y = &z; } // ~^%",
    "https://example.org/a_b-c?d=%20e#f@g snake_case camelCase SCREAMING_CASE",
    "<s>hi</s> <s>the</s>  the<unk>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> the<|eot_id|>the  <|end|>\n\n the",
    "<bos>the<start_of_turn>user\nthe<end_of_turn>\n[INST] the [/INST]the",
    "<|im_start| im_end|> < s> <0x41> <0xFF> <|begin_of_text|><tool_call></tool_call>",
    f"{SPACE}the {SPACE}{SPACE} Ġthe Ċ \ufffd",
    "a" * 70,
    "the " * 12,
    " " * 33 + "x" + "\n" * 17,
    "!?" * 20 + "=" * 33 + "." * 9,
    "\U0001f600\U00010348\U0001d11e\U0010ffff\ue000",
]
END, PAD = "<|im_end|>", "<|endoftext|>"


def byte_level(
    normalizer: Any, pre_tokenizer: Any, special: list[str], whole_words: bool
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TRAINING, trainer)
    spec = json.loads(backend.to_str())
    spec["model"]["ignore_merges"] = whole_words
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(special)
    return backend


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(special: list[str], user_defined: Iterable[str] = ()) -> models.Model:
    """BPE with byte fallback, its merges recovered from the vocabulary as a converter would."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    reserved = [*special, *user_defined, *in_bytes]
    trainer = trainers.BpeTrainer(
        vocab_size=len(reserved) + 260,
        show_progress=False,
        special_tokens=reserved,
    )
    trained.train_from_iterator(TRAINING, trainer)
    vocab = trained.get_vocab()
    pieces = {
        token: -float(index)
        for token, index in sorted(vocab.items(), key=lambda item: item[1])
        if token not in reserved
    }
    merges = generate_merges(vocab, pieces)
    return models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")


def spaced(model: models.Model, normalizer: Any, pre_tokenizer: Any, strip: bool) -> Any:
    backend = tokenizers.Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1, right=0)] if strip else steps
    )
    return backend


def begin(backend: tokenizers.Tokenizer, token: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, backend.token_to_id(token))]
    )


def gpt2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = byte_level(None, pre_tokenizers.ByteLevel(add_prefix_space=False), [PAD], False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {"bos_token": PAD, "eos_token": PAD, "unk_token": PAD}


def llama3() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
    backend = byte_level(None, split(CL100K), special, True)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), begin(backend, special[0])]
    )
    return backend, {"bos_token": special[0], "eos_token": special[2]}


def qwen2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backend = byte_level(normalizers.NFC(), split(QWEN2), [PAD, "<|im_start|>", END], False)
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False)
            for token in ("<tool_call>", "</tool_call>")
        ]
    )
    return backend, {
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": False,
        "split_special_tokens": False,
    }


def llama2() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    prepend = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    special = ["<unk>", "<s>", "</s>"]
    backend = spaced(sentencepiece(special), prepend, None, True)
    backend.add_special_tokens(special)
    backend.post_processor = begin(backend, "<s>")
    return backend, {
        "add_bos_token": True,
        **{
            name: {"__type": "AddedToken", "content": token, "lstrip": False, "rstrip": False}
            for name, token in zip(("unk_token", "bos_token", "eos_token"), special, strict=True)
        },
    }


def mistral() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    first = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend = spaced(sentencepiece(special), None, first, True)
    backend.add_special_tokens(special)
    backend.post_processor = begin(backend, "<s>")
    return backend, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def phi3() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    prepend = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    special = ["<unk>", "<s>", "</s>", PAD, "<|user|>", "<|end|>"]
    backend = spaced(sentencepiece(special), prepend, None, True)
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(
                token, normalized=False, rstrip=token not in ("<unk>", "<s>", PAD)
            )
            for token in special
        ]
    )
    return backend, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": PAD}


def gemma() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tags = ["\n", "\n\n", "\n\n\n", "\t", "<b>", "  ", "   "]
    backend = spaced(
        sentencepiece(special, tags),
        normalizers.Replace(" ", SPACE),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        False,
    )
    backend.add_special_tokens(special)
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in tags])
    backend.post_processor = begin(backend, "<bos>")
    return backend, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


STYLES = (gpt2, llama3, qwen2, llama2, mistral, phi3, gemma)


def record(files: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        for name, value in files.items():
            Path(folder, name).write_text(json.dumps(value))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    plain = [
        tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        for text in TEXTS
    ]
    decoded = [tokenizer.decode(each) for each in ids]
    skipped = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    word = tokenizer.encode("the", add_special_tokens=False)
    both = tokenizer.encode("the", add_special_tokens=True)
    begin_at = next(i for i in range(len(both)) if both[i : i + len(word)] == word)
    return {
        "files": files,
        "around": [both[:begin_at], both[begin_at + len(word) :]],
        "ids": ids,
        "plain": [None if a == b else b for a, b in zip(ids, plain, strict=True)],
        "decoded": [None if a == b else b for a, b in zip(TEXTS, decoded, strict=True)],
        "skipped": [None if a == b else b for a, b in zip(TEXTS, skipped, strict=True)],
    }


def rendered(template: str, case: dict[str, Any]) -> str | None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(models.BPE()), **SPECIAL_TOKENS
    )
    arguments = {"add_generation_prompt": True, **case}
    try:
        text = tokenizer.apply_chat_template(
            arguments.pop("messages"), tokenize=False, chat_template=template, **arguments
        )
    except Exception as error:  # of any kind that a template brings about
        print(f"refused: {error}")
        return None
    assert isinstance(text, str)
    return text


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    print(path.name, path.stat().st_size)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write(FOLDER / "texts.json", TEXTS)
    for style in STYLES:
        backend, config = style()
        files = {
            "tokenizer.json": json.loads(backend.to_str()),
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **config},
        }
        write(FOLDER / f"{style.__name__}.json", record(files))
    write(
        HERE / "golden_chats.json",
        {
            name: {case: rendered(template, CASES[case]) for case in CASES}
            for name, template in TEMPLATES.items()
        },
    )


if __name__ == "__main__":
    main()
