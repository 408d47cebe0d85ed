"""An engine as a model of lm-eval, the Language Model Evaluation Harness.

    import lm_eval, models.adapters.lm_eval
    lm_eval.simple_evaluate("jax_chunkattn", "pretrained=FOLDER,memory=1GiB", tasks=["hellaswag"])

Held to lm-eval 0.4.13: log-likelihoods are those of its Hugging Face backend. Contexts are split
from continuations, cut and windowed as it does, by lm-eval's own code where that is public. Common
beginnings of requests, such as the examples of a few-shot task, are computed once: requests are
scored in the order of their tokens, so that those that begin alike are neighbours.

This imports lm_eval, and nothing of this project imports this. It needs no torch.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import lm_eval.models  # noqa: F401, lm-eval looks for its own only before one is registered
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jax_chunkattn import CacheConfig, Engine, SamplingParams
from models.chat_template import Message
from models.loading import LoadedModel, load

TOGETHER = 256  # requests given to the engine at once; those before it show as progress
DEFAULT_NEW_TOKENS = 256
"""Of an answer, where a task says nothing: as lm-eval's other backends."""

Tokens = list[int]
Scored = tuple[tuple[str, str] | None, Tokens, Tokens]

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the most tokens of an answer; the first that is given counts."""
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")

_log = logging.getLogger(__name__)


class ChunkAttentionLM(TemplateLM):
    """A checkpoint in an engine, for lm-eval's tasks.

    Args:
      pretrained: what `models.load` takes, or what it returned.
      memory: of the KV cache.
      dtype: of the weights and of the cache.
      max_length: most tokens of a context with its continuation; None is what the model has.
      codec: of `CacheConfig`.
      max_running, sharing: of the engine.
      batch_size, max_batch_size: without effect, since the engine makes batches itself; they are
        here because lm-eval always passes them.
      device: None, or JAX's platform: JAX chooses it.

    Raises:
      ValueError: for a model without a tokenizer, a longer `max_length` than the model has, or
        another device; and what `models.load` and `Engine` raise.
    """

    def __init__(
        self,
        pretrained: str | Path | LoadedModel,
        *,
        memory: int | str = "1GiB",
        dtype: str = "float32",
        max_length: int | None = None,
        codec: str = "identity",
        max_running: int = 64,
        sharing: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if device not in (None, jax.default_backend()):
            raise ValueError(
                f"device {device!r}: JAX runs on {jax.default_backend()!r}; JAX_PLATFORMS, set "
                "before Python starts, chooses"
            )
        given = isinstance(pretrained, LoadedModel)
        loaded = pretrained if given else load(pretrained, dtype=dtype)
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.name} has no tokenizer, and tasks are texts")
        most = loaded.model.max_positions
        if max_length is not None and not 1 < max_length <= most:
            raise ValueError(f"max_length must be from 2 to the model's {most}, got {max_length}")
        self._name = loaded.name
        self._tokenizer = loaded.tokenizer
        self._max_length = max_length or most
        self.engine = Engine(
            loaded.model,
            CacheConfig(memory=memory, dtype=dtype, codec=codec),
            tokenizer=loaded.tokenizer,
            stop_tokens=loaded.tokenizer.stop_ids,
            max_running=max_running,
            sharing=sharing,
            prefill_first=True,
        )

    # What lm-eval asks of a model.

    @property
    def eot_token_id(self) -> int:
        end = self._tokenizer.eos_id
        if end is None:
            raise ValueError(f"{self._name} names no token that ends a text")
        return end

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is scored behind."""
        begin = self._tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the record; None where none is to be applied."""
        if not chat_template:
            return None
        return self._tokenizer.template_source(
            chat_template if isinstance(chat_template, str) else None
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text; without a generation prompt the last message is left open.

        A template that refuses system messages gets the chat without.
        """
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _log.warning("leaving out the system message: %s", error)
            return self._render(rest, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Tokens:
        """Ids; None puts around the text what the model expects, unless it begins with that."""
        if kwargs:
            raise TypeError(f"tok_encode knows no {', '.join(sorted(kwargs))}")
        if add_special_tokens is None:
            begin = self._tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not string.startswith(begin)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in windows that overlap by one token."""
        windows = [self._windows(request.args[0]) for request in requests]
        flat = [(None, context, rest) for each in windows for context, rest in each]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        totals = []
        for request, each in zip(requests, windows, strict=True):
            totals.append(sum(score for score, _ in itertools.islice(scores, len(each))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is answered to each context, before the first of its stop strings."""
        asked = [self._asked(*request.args) for request in requests]
        answers: list[str] = []
        with tqdm(total=len(asked), disable=disable_tqdm, desc="generate_until") as progress:
            for some in _batches(range(len(asked))):
                prompts, params = zip(*(asked[index] for index in some), strict=True)
                for output in self.engine.generate(prompts, params):
                    answers.append(output.samples[0].text)
                    request = requests[some[output.index]]
                    self.cache_hook.add_partial("generate_until", request.args, answers[-1])
                    progress.update()
        return answers

    # Below it.

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy choice would give it."""
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(cut)), key=cut.__getitem__)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(order), disable=disable_tqdm, desc="loglikelihood") as progress:
            for some in _batches(order):
                groups = [list(each) for _, each in itertools.groupby(some, lambda i: cut[i][0])]
                queries = [(cut[each[0]][0], [cut[i][1] for i in each]) for each in groups]
                for each, scores in zip(
                    groups, self.engine.score_batch(queries, top=1), strict=True
                ):
                    answers |= {
                        index: (score.total, score.is_greedy)
                        for index, score in zip(each, scores, strict=True)
                    }
                progress.update(len(some))
        for index, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _cut(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """A context with as many of its last tokens as fit: the last of all is read by nobody."""
        room = self.max_length + 1 - len(continuation)
        if not continuation or room < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens: from 1 to max_length, "
                f"{self.max_length}, can be scored"
            )
        if len(context) > room:
            _log.warning("a context of %d tokens is cut to its last %d", len(context), room)
        return context[-room:], continuation

    def _windows(self, text: str) -> list[tuple[Tokens, Tokens]]:
        """Contexts, and what is predicted behind each."""
        return [
            make_disjoint_window(window)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]

    def _asked(self, context: str, options: dict[str, Any]) -> tuple[Tokens, SamplingParams]:
        """A prompt, cut to leave room for its answer, and how that is chosen.

        Raises ValueError for options that are not known, and for answers that leave no room.
        """
        rest = dict(options)
        lengths = [rest.pop(name, None) for name in _LENGTHS]
        length = next((int(one) for one in lengths if one is not None), self.max_gen_toks)
        until = rest.pop("until", None) or []
        end = self._tokenizer.decode([self.eot_token_id], skip_special=False)
        stop = dict.fromkeys([*([until] if isinstance(until, str) else until), end])
        temperature = float(rest.pop("temperature", None) or 0.0)
        greedy = rest.pop("do_sample", None) is False
        named = {name: rest.pop(name, None) for name in _SAMPLING}
        if rest:
            raise ValueError(f"generation_kwargs are not known: {', '.join(sorted(rest))}")
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {length}, of max_length {self.max_length}: no room for a context"
            )
        params = SamplingParams(
            length,
            0.0 if greedy else temperature,
            stop=[string for string in stop if string],
            **{name: value for name, value in named.items() if value is not None},
        )
        return self.tok_encode(context)[-room:], params

    def _render(self, chat: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self._tokenizer.render_chat(chat, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat[-1]["content"]
        begin = text.rfind(last.strip())
        if begin < 0:
            raise TypeError("the chat template rewrites the last message: it cannot be left open")
        end = begin + len(last.strip())
        open_end = last[len(last.rstrip()) :]
        return text[:end] + (open_end if text[end:].startswith(open_end) else "")


register_model("jax_chunkattn")(ChunkAttentionLM)  # no decorator: that would lose its type


def _batches(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for begin in range(0, len(indices), TOGETHER):
        yield indices[begin : begin + TOGETHER]
