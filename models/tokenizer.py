"""The byte-level BPE tokenizer and chat template that a GGUF file carries.

Special tokens are parsed wherever their text occurs, in a user's message too: a chat is rendered to
one string by its template and that string is encoded, which is what `transformers` does in
`apply_chat_template`. Whoever serves untrusted text has to strip such strings first; `encode` with
`parse_special=False` shows how a text reads without them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError
from models.gguf_file import GGUFFile

if TYPE_CHECKING:
    import jinja2
    import tokenizers

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
DIGIT_SPLITTING = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
PLAIN_BYTE_LEVEL = frozenset({"gpt-2", "default"})
"""Values of `tokenizer.ggml.pre`, by how text is cut before BPE (llama.cpp, llama-vocab.cpp)."""

USUAL_END_TOKENS = frozenset({"<|im_end|>", "<|endoftext|>"})
"""Control tokens that end an answer even in a file that declares only one of them."""

Message = Mapping[str, Any]


class ChatTokenizer:
    """Text to ids and back, and chats to ids. Build it with `read_tokenizer`.

    `stop_ids` are the ids that end an answer; a decode loop stops at any of them.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        plain_bpe: tokenizers.Tokenizer,
        *,
        special_ids: frozenset[int],
        stop_ids: tuple[int, ...],
        chat_template: str | None,
        template_tokens: Mapping[str, str],
    ):
        self._bpe = bpe
        self._plain_bpe = plain_bpe
        self._template_source = chat_template
        self._template_tokens = dict(template_tokens)
        self.special_ids = special_ids
        self.stop_ids = stop_ids

    @property
    def vocab_size(self) -> int:
        return self._bpe.get_vocab_size()

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Ids of `text`, with nothing added around it.

        With `parse_special=False` the text of a special token is cut like any other text. Raises
        ValueError for a string with lone surrogates, which no bytes stand for.
        """
        text.encode("utf-8")
        bpe = self._bpe if parse_special else self._plain_bpe
        return bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self._bpe.decode(list(ids), skip_special_tokens=skip_special)

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> str:
        """The chat as the one string that the model was trained on.

        A message has a "role" and a "content". Raises ValueError when the file carries no chat
        template or the template refuses the messages.
        """
        import jinja2

        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._template_tokens,
            )
        except (jinja2.TemplateError, TypeError, OverflowError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of `render_chat`; see the module's note on special tokens in a message."""
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        import jinja2
        import jinja2.sandbox

        if self._template_source is None:
            raise ValueError("this checkpoint carries no chat template")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        return environment.from_string(self._template_source)


def read_tokenizer(file: GGUFFile) -> ChatTokenizer:
    """The tokenizer in `file`'s metadata.

    Raises CheckpointError when it is of another kind than byte-level BPE, or inconsistent.
    """
    tokens = file.require_list("tokenizer.ggml.tokens")
    types = [1] * len(tokens)
    if "tokenizer.ggml.token_type" in file.metadata:
        types = file.require_list("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens but {len(types)} token types")
    control = [index for index, kind in enumerate(types) if kind == CONTROL_TOKEN]
    user_defined = [index for index, kind in enumerate(types) if kind == USER_DEFINED_TOKEN]
    bpe, plain_bpe = _build_bpe(file, tokens), _build_bpe(file, tokens)
    _add_tokens(bpe, [tokens[index] for index in control], special=True)
    _add_tokens(bpe, [tokens[index] for index in user_defined], special=False)
    ids = {name: _token_id(file, name, len(tokens)) for name in ("bos", "eos", "eot", "eom")}
    usual_ends = [index for index in control if tokens[index] in USUAL_END_TOKENS]
    declared_ends = [index for name, index in ids.items() if name != "bos" and index is not None]
    return ChatTokenizer(
        bpe,
        plain_bpe,
        special_ids=frozenset(control),
        stop_ids=tuple(dict.fromkeys([*declared_ends, *usual_ends])),
        chat_template=file.metadata.get("tokenizer.chat_template"),
        template_tokens={
            f"{name}_token": tokens[index]
            for name, index in ids.items()
            if name in ("bos", "eos") and index is not None
        },
    )


def _build_bpe(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    kind = file.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer {kind!r} is not supported, only byte-level BPE ('gpt2')"
        )
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name not in DIGIT_SPLITTING | PLAIN_BYTE_LEVEL:
        known = ", ".join(sorted(DIGIT_SPLITTING | PLAIN_BYTE_LEVEL))
        raise CheckpointError(f"{file.path}: pre-tokenizer {name!r} is not supported, only {known}")
    merges = [tuple(merge.split(" ")) for merge in file.require_list("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError(f"{file.path}: the vocabulary holds a token twice")
    try:
        bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the Rust side raises bare Exception
        raise CheckpointError(f"{file.path}: inconsistent BPE merges: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if name in DIGIT_SPLITTING else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _add_tokens(bpe: tokenizers.Tokenizer, contents: list[str], *, special: bool) -> None:
    import tokenizers

    added = [
        tokenizers.AddedToken(content, special=special, normalized=False) for content in contents
    ]
    if special:
        bpe.add_special_tokens(added)
    else:
        bpe.add_tokens(added)


def _token_id(file: GGUFFile, name: str, vocab_size: int) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
        raise CheckpointError(f"{file.path}: {name} token id {value!r} is outside the vocabulary")
    return value


def _raise_template_error(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
