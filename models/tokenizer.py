"""A checkpoint's tokenizer and chat templates: text to ids and back, and chats to ids.

Special tokens are parsed wherever their text occurs, in a user's message too: a chat is rendered to
one string by its template and that string is encoded, which is what `transformers` does in
`apply_chat_template`. Whoever serves untrusted text has to strip such strings first; `encode` with
`parse_special=False` shows how a text reads without them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.chat_template import ChatTemplates, Message

if TYPE_CHECKING:
    import tokenizers

USUAL_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|end_of_text|>",
        "<|end|>",
        "<end_of_turn>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
    }
)
"""Special tokens that end an answer even in a checkpoint that declares only one of them."""

NOT_VARIABLES = {
    "tokenize": "render_chat gives text, apply_chat_template ids",
    "chat_template": "name one of the checkpoint's by template=",
    "continue_final_message": "render without add_generation_prompt, and cut what ends the message",
    **dict.fromkeys(("return_dict", "return_assistant_tokens_mask"), "a list of ids is returned"),
    **dict.fromkeys(("return_tensors", "tokenizer_kwargs"), "make arrays of the list of ids"),
    **dict.fromkeys(("padding", "truncation", "max_length"), "pad or cut the list of ids"),
}
"""Arguments of transformers' `apply_chat_template` that no template should take for a variable of
its own, and what to do instead."""


class ChatTokenizer:
    """Text to ids and back, and chats to ids.

    Built by `models.tokenizer_folder.read_tokenizer_folder` and
    `models.gguf_tokenizer.read_gguf_tokenizer`.

    Attributes:
      stop_ids: ids that end an answer; a decode loop stops at any of them.
      special_ids: ids of special tokens, which `decode` skips.

    Args:
      backend: with every special token added as one; its truncation and padding are turned off.
      stop_ids: those that the checkpoint declares; special tokens of `USUAL_END_TOKENS` join them.
      templates: the chat templates.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, stop_ids: Iterable[int], templates: ChatTemplates
    ):
        backend.no_truncation()
        backend.no_padding()
        special = {
            index: token.content
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        usual = [index for index, content in special.items() if content in USUAL_END_TOKENS]
        self._backend = backend
        self._templates = templates
        self.special_ids = frozenset(special)
        self.stop_ids = tuple(dict.fromkeys([*stop_ids, *usual]))

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def bos_id(self) -> int | None:
        """The token that the checkpoint names as the beginning of a text, whether `encode` puts it
        there or not; None for none."""
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token that the checkpoint names as the end of a text, else the first of `stop_ids`;
        None for none."""
        named = self._special_id("eos_token")
        return next(iter(self.stop_ids), None) if named is None else named

    @property
    def template_names(self) -> tuple[str, ...]:
        """Names that `render_chat` takes; empty when the checkpoint has no chat template."""
        return self._templates.names

    def encode(
        self, text: str, *, parse_special: bool = True, add_special_tokens: bool = True
    ) -> list[int]:
        """Ids of `text`.

        With `add_special_tokens` the tokenizer's own post-processor adds what the model expects
        around a text, usually one token that begins it; a rendered chat has that token already.
        With `parse_special=False` the text of a special token, or of another token that a chat
        template writes, is cut like any other text. Other threads go on meanwhile. Raises
        ValueError for a string with lone surrogates, which no bytes stand for.
        """
        text.encode("utf-8")
        backend = self._backend if parse_special else self._plain_backend
        # `encode` would hold the interpreter's lock, for 3.9 s with a text of 3.5 MB.
        [encoded] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def template_source(self, template: str | None = None) -> str:
        """The chat template of this name, or the default one, as it is written; ValueError when
        there is none."""
        return self._templates.source(template)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The chat as the one string that the model was trained on.

        A message has a "role" and a "content": text, or for templates that know them a list of
        parts. `template` names one of `template_names`; `tools` are JSON schemas; `variables` are
        what else a template asks for (enable_thinking=False). Raises TypeError for those of
        `NOT_VARIABLES`, ValueError when there is no such template or it refuses the messages.
        """
        for name in sorted(variables.keys() & NOT_VARIABLES.keys()):
            raise TypeError(f"{name} is no argument here: {NOT_VARIABLES[name]}")
        return self._templates.render(
            messages,
            name=template,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            variables=variables,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of `render_chat`; see the module's note on special tokens in a message."""
        rendered = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            template=template,
            tools=tools,
            documents=documents,
            **variables,
        )
        return self.encode(rendered, add_special_tokens=False)

    def _special_id(self, name: str) -> int | None:
        content = self._templates.special_tokens.get(name)
        return None if content is None else self._backend.token_to_id(content)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """Made at the first use, since it takes a second and most callers never need it."""
        hidden = {
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if token.special or self._templates.write(token.content)
        }
        return _hide_tokens(self._backend, hidden)


def _hide_tokens(backend: tokenizers.Tokenizer, hidden: Collection[str]) -> tokenizers.Tokenizer:
    """A copy that never encodes a text to a token of `hidden`; ids are the same.

    Such a token is neither looked for in the text nor spelt by merges, and its entry in the
    vocabulary gets a name with a space, which no pre-tokenizer leaves in a word.
    """
    import tokenizers

    spec = json.loads(backend.to_str())
    model = spec["model"]
    by_index = isinstance(model["vocab"], list)  # Unigram: pairs of piece and score
    known = {piece for piece, _ in model["vocab"]} if by_index else set(model["vocab"])
    names = {content: f" {content} " for content in hidden if content in known}
    if by_index:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    # Those outside the model's vocabulary stay, so that the ids behind them do.
    spec["added_tokens"] = [
        {**token, "special": token["special"] or token["content"] in hidden}
        for token in spec["added_tokens"]
        if token["content"] not in names
    ]
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    return plain
