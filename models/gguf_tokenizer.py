"""The tokenizer and chat templates that a GGUF file carries.

Two kinds are built from the file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE
("llama"). For any other, a tokenizer.json beside the file is used. It is not used where the file's
own will do: that one came with the weights, while a folder of downloads may hold a tokenizer.json
of another model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from models.chat_template import DEFAULT, ChatTemplates
from models.errors import CheckpointError
from models.gguf_file import GGUFFile
from models.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from models.tokenizer import ChatTokenizer
from models.tokenizer_folder import TOKENIZER, load_backend, put_around_texts

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""

SPACE = "▁"  # as SentencePiece spells a space
NO_TOKEN = 2**32 - 1  # an id of -1 as some files write it
END_TOKENS = ("eos", "eot", "eom")
TEMPLATE_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
"""What a chat template calls a token, and what the file's metadata calls its id."""

TEMPLATE = "tokenizer.chat_template"

STRIPPING = "phi3"
"""The architecture whose special tokens take the white space behind them, as llama.cpp knows."""
NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """`tokens[i]` is the text of id i, `types[i]` its type."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def read_gguf_tokenizer(file: GGUFFile) -> ChatTokenizer:
    """The tokenizer in `file`'s metadata, or that of a tokenizer.json beside the file.

    Raises CheckpointError when the metadata is inconsistent, or of a kind that is not supported
    while the tokenizer.json beside is missing or belongs to another model.
    """
    vocabulary = _read_vocabulary(file)
    special_tokens = {
        name: vocabulary.tokens[index]
        for name, key in TEMPLATE_TOKENS.items()
        if (index := _token_id(file, key, vocabulary)) is not None
    }
    ends = [_token_id(file, key, vocabulary) for key in END_TOKENS]
    return ChatTokenizer(
        _backend(file, vocabulary, special_tokens),
        stop_ids=[index for index in ends if index is not None],
        templates=ChatTemplates(_templates(file), special_tokens),
    )


def _read_vocabulary(file: GGUFFile) -> _Vocabulary:
    tokens = file.require_list("tokenizer.ggml.tokens")
    types = [NORMAL] * len(tokens)
    if "tokenizer.ggml.token_type" in file.metadata:
        types = file.require_list("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: the vocabulary holds a token twice")
    return _Vocabulary(tokens, types)


def _backend(
    file: GGUFFile, vocabulary: _Vocabulary, special_tokens: Mapping[str, str]
) -> tokenizers.Tokenizer:
    if reason := _why_unsupported(file, vocabulary):
        return _backend_beside(file, vocabulary, reason)
    if file.require("tokenizer.ggml.model") == "llama":
        backend, begins = _sentencepiece(file, vocabulary), True
    else:
        pre = PRE_TOKENIZERS[file.require("tokenizer.ggml.pre")]
        backend, begins = _byte_level(file, vocabulary, pre), pre.begins
    usual = {"bos_token": begins and "bos_token" in special_tokens, "eos_token": False}
    asked = [name for name in usual if file.metadata.get(f"tokenizer.ggml.add_{name}", usual[name])]
    put_around_texts(backend, asked, special_tokens, file.path)
    return backend


def _why_unsupported(file: GGUFFile, vocabulary: _Vocabulary) -> str | None:
    kind = file.require("tokenizer.ggml.model")
    if kind == "llama":
        return _why_unsupported_pieces(file, vocabulary)
    if kind != "gpt2":
        return f"tokenizer {kind!r} is not supported, only 'gpt2' and 'llama'"
    pre = file.metadata.get("tokenizer.ggml.pre")
    if isinstance(pre, str) and pre in PRE_TOKENIZERS:
        return None
    known = ", ".join(sorted(PRE_TOKENIZERS))
    if pre is None:
        return f"the file does not say how text is cut before BPE (tokenizer.ggml.pre: {known})"
    return f"pre-tokenizer {pre!r} is not supported, only {known}"


def _why_unsupported_pieces(file: GGUFFile, vocabulary: _Vocabulary) -> str | None:
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if file.metadata.get(f"tokenizer.ggml.{key}"):
            return f"tokenizer.ggml.{key} is not supported"
    for key in ("token_type", "scores"):
        if f"tokenizer.ggml.{key}" not in file.metadata:
            return f"tokenizer.ggml.{key} is missing"
    missing = {f"<0x{byte:02X}>" for byte in range(256)}.difference(vocabulary.tokens)
    return f"the vocabulary holds no token {min(missing)} for a byte" if missing else None


def _backend_beside(file: GGUFFile, vocabulary: _Vocabulary, reason: str) -> tokenizers.Tokenizer:
    path = file.path.parent / TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{file.path}: {reason}; put the model's {TOKENIZER} into the same folder, which is "
            "then used in its place"
        )
    backend = load_backend(path)
    if backend.get_vocab_size() > len(vocabulary.tokens):
        raise CheckpointError(
            f"{path}: belongs to another model than {file.path.name}: it has "
            f"{backend.get_vocab_size()} tokens, expected {len(vocabulary.tokens)}"
        )
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == NORMAL and backend.id_to_token(index) != token:
            raise CheckpointError(
                f"{path}: belongs to another model than {file.path.name}: token {index} is "
                f"{backend.id_to_token(index)!r}, expected {token!r}"
            )
    return backend


def _byte_level(file: GGUFFile, vocabulary: _Vocabulary, pre: PreTokenizer) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    merges = file.require_list("tokenizer.ggml.merges")
    if not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges are not all text")
    merges = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary.tokens)},
            merges=merges,
            ignore_merges=pre.whole_words,
        )
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{file.path}: inconsistent BPE merges: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if pre.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
                for pattern in pre.splits
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocabulary.of_type(CONTROL), special=True)
    _add_tokens(backend, vocabulary.of_type(USER_DEFINED), special=False)
    return backend


def _sentencepiece(file: GGUFFile, vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """BPE over a whole text whose spaces are letters; characters without a piece become bytes."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    # A space in a user-defined token is a space, not the letter, in files of llama.cpp's converter.
    tokens = [
        token.replace(SPACE, " ") if kind == USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise CheckpointError(f"{file.path}: the vocabulary holds a token twice")
    model = models.BPE(
        vocab=ids, merges=_merges(file, vocabulary), fuse_unk=True, byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1, right=0)] if prefix else steps
    )
    stripping = file.metadata.get("general.architecture") == STRIPPING
    _add_tokens(backend, vocabulary.of_type(UNKNOWN, CONTROL), special=True, strip=stripping)
    user_defined = [token.replace(SPACE, " ") for token in vocabulary.of_type(USER_DEFINED)]
    _add_tokens(backend, user_defined, special=False, strip=stripping)
    return backend


def _merges(file: GGUFFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, in the order SentencePiece would take them.

    It joins the neighbours whose piece has the highest score. Of two ways to make one piece it
    takes the leftmost in the text, which an order of merges cannot say; as in transformers'
    conversions, the one with the longer first half comes first.
    """
    scores = file.require_list("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(
            f"{file.path}: {len(vocabulary.tokens)} tokens but {len(scores)} scores"
        )
    pieces = {
        token: score
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, scores, strict=True)
        if kind == NORMAL
    }
    ways = [
        (piece[:middle], piece[middle:])
        for piece in pieces
        for middle in range(1, len(piece))
        if piece[:middle] in pieces and piece[middle:] in pieces
    ]
    return sorted(ways, key=lambda way: (pieces[way[0] + way[1]], *map(len, way)), reverse=True)


def _add_tokens(
    backend: tokenizers.Tokenizer, contents: Iterable[str], *, special: bool, strip: bool = False
) -> None:
    import tokenizers

    backend.add_tokens(
        [
            tokenizers.AddedToken(
                content,
                special=special,
                normalized=False,
                rstrip=strip and content not in NOT_STRIPPING,
            )
            for content in contents
        ]
    )


def _token_id(file: GGUFFile, name: str, vocabulary: _Vocabulary) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None or value == NO_TOKEN:
        return None
    if not isinstance(value, int) or not 0 <= value < len(vocabulary.tokens):
        raise CheckpointError(f"{file.path}: {name} token id {value!r} is outside the vocabulary")
    return value


def _templates(file: GGUFFile) -> dict[str, str]:
    """The default template, and those of other names behind it."""
    sources = {}
    for key, value in file.metadata.items():
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}."):
            if not isinstance(value, str):
                raise CheckpointError(f"{file.path}: metadata {key!r} is not text")
            sources[key.removeprefix(TEMPLATE).removeprefix(".") or DEFAULT] = value
    return sources
