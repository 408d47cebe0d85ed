"""The tokenizers of golden_tokenizers/ (see make_golden_tokenizers.py), as folders and as GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.gguf_file import read_gguf
from models.gguf_tokenizer import read_gguf_tokenizer
from models.tokenizer import ChatTokenizer
from models.tokenizer_folder import read_tokenizer_folder
from tests.models.tiny_checkpoint import write_checkpoint

FOLDER = Path(__file__).parent / "golden_tokenizers"
TEXTS: list[str] = json.loads((FOLDER / "texts.json").read_text("utf-8"))
GOLDEN: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted(FOLDER.glob("*.json"))
    if path.stem != "texts"
}
PRE_TOKENIZERS = {"gpt2": "gpt-2", "llama3": "llama-bpe", "qwen2": "qwen2"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_folder(folder: Path, style: str, **files: Any) -> Path:
    """The checkpoint folder of `style`; `files`, by name without ".json", come on top of it."""
    folder.mkdir(exist_ok=True)
    more = {f"{name}.json": value for name, value in files.items()}
    for name, value in (GOLDEN[style]["files"] | more).items():
        (folder / name).write_text(json.dumps(value), "utf-8")
    return folder


def read_golden(folder: Path, style: str) -> ChatTokenizer:
    tokenizer = read_tokenizer_folder(write_folder(folder, style))
    assert tokenizer is not None
    return tokenizer


def gguf_metadata(style: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of the tokenizer: byte-level, or with scores."""
    spec = GOLDEN[style]["files"]["tokenizer.json"]
    ids = dict(spec["model"]["vocab"])
    ids.update({token["content"]: token["id"] for token in spec["added_tokens"]})
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    types = [_type(token, special) for token in tokens]
    metadata = {
        "tokenizer.ggml.tokens": [
            token.replace("▁", " ") if kind == USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ],
        "tokenizer.ggml.token_type": types,
    }
    for name in ("bos", "eos"):
        token = GOLDEN[style]["files"]["tokenizer_config.json"].get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        metadata[f"tokenizer.ggml.{name}_token_id"] = None if text is None else ids[text]
    if style in PRE_TOKENIZERS:
        return metadata | {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": PRE_TOKENIZERS[style],
            "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        }
    return metadata | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_space_prefix": style != "gemma",
        "tokenizer.ggml.add_bos_token": False if style == "phi3" else None,
        "tokenizer.ggml.scores": [
            -float(index) if kind == NORMAL else -1000.0 for index, kind in enumerate(types)
        ],
    }


def read_golden_gguf(folder: Path, style: str, **metadata: Any) -> ChatTokenizer:
    """The tokenizer of a GGUF file of `style`; `metadata` overrides keys of tokenizer.ggml."""
    overrides = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    architecture = "phi3" if style == "phi3" else "llama"
    path = write_checkpoint(
        folder / f"{style}.gguf",
        architecture=architecture,
        metadata=gguf_metadata(style) | overrides,
    )
    return read_gguf_tokenizer(read_gguf(path))


def _type(token: str, special: dict[str, bool]) -> int:
    if token == "<unk>":
        return UNKNOWN
    if token in special:
        return CONTROL if special[token] else USER_DEFINED
    return BYTE if len(token) == 6 and token.startswith("<0x") else NORMAL
