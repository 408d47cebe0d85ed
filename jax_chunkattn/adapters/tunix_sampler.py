"""An engine as tunix's sampler; see `jax_chunkattn.adapters.tunix`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from jax_chunkattn.adapters.padded import Answer, distinct_seeds, padded, padded_prompts, runs
from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.sampling import SamplingParams


class Tokenizer(Protocol):
    """What tunix's `TokenizerAdapter` offers, and a tokenizer with these methods as well."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def bos_id(self) -> int | None: ...
    def eos_id(self) -> int: ...
    def pad_id(self) -> int: ...


@dataclass
class SamplerOutput:
    """The fields of tunix's class of this name.

    Attributes:
      text: of each answer, without the token that ended it; with the prompt's if `echo` was asked.
      logits: nothing; see `TunixSampler`.
      tokens: of the same: an array each, or one `[B, T]` padded on the right if `pad_output` was.
      padded_prompt_tokens: `[B, P]`, padded on the left.
      logprobs: of each of `tokens`, 0 for those of prompts and padding, if asked for.
    """

    text: list[str]
    logits: None
    tokens: list[np.ndarray] | np.ndarray
    padded_prompt_tokens: np.ndarray
    logprobs: list[list[float]] | None


class TunixSampler:
    """Answers texts as tunix's samplers do.

    Args:
      engine: its own stop tokens end nothing here; those of each call do.
      tokenizer: of tunix, or one with the same methods.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine
        self.tokenizer = tokenizer

    def __call__(
        self,
        input_strings: str | Sequence[str],
        max_generation_steps: int,
        max_prompt_length: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        beam_size: int | None = None,
        seed: Any = None,
        multi_sampling: int = 1,
        return_logits: bool = False,
        echo: bool = False,
        pad_output: bool = False,
        *,
        return_logprobs: bool = False,
        eos_tokens: Sequence[int] | None = None,
        forbidden_tokens: Any = None,
        images: Any = None,
    ) -> SamplerOutput:
        """An answer to each text.

        Args:
          input_strings: B texts, or one.
          max_generation_steps: most tokens of an answer.
          max_prompt_length: to which prompts are padded; the next power of two above the longest,
            where that is longer, or for None. None is cut.
          temperature: 0 is greedy, whatever `top_p` says; above, `top_p` None is off.
          top_k: None, 0 and -1 are off.
          seed: a number, or a key of JAX; each row draws by one of its own that is made of it, as
            samples do (`SamplingParams.seed`). None draws fresh ones.
          return_logprobs: of the model's own distribution, which tunix divides by the temperature:
            the same for greedy choice and a temperature of 1, and refused for others.
          eos_tokens: end an answer, and are no part of it; None is the tokenizer's.

        Raises:
          ValueError: for `beam_size`, `multi_sampling`, `return_logits`, `forbidden_tokens` or
            `images`, which this does not do (there are no logits of all tokens here), and for
            `return_logprobs` with another temperature.
          InvalidRequest, PoolExhausted: as `Engine.generate`; nothing has been queued then.
        """
        refuse(
            beam_size=beam_size is not None and "use jax_chunkattn.beam_search",
            multi_sampling=multi_sampling != 1 and "repeat the text: the prompt is computed once",
            return_logits=return_logits and "return_logprobs has those of the chosen tokens",
            forbidden_tokens=bool(forbidden_tokens) and "the engine takes logit_bias alone",
            images=images is not None and "texts alone are answered",
            return_logprobs=return_logprobs
            and temperature not in (0, 1)
            and f"with temperature 0 or 1, not {temperature}: the model's own are known alone",
        )
        texts = [input_strings] if isinstance(input_strings, str) else list(input_strings)
        prompts = [self.tokenize(text) for text in texts]
        pad_id = self.tokenizer.pad_id()
        prompt_rows = padded_prompts(prompts, max_prompt_length, pad_id)
        ends = [self.tokenizer.eos_id()] if not eos_tokens else [int(one) for one in eos_tokens]
        asked = SamplingParams(
            int(max_generation_steps),
            float(temperature),
            max(0, int(top_k or 0)),
            1.0 if top_p is None else float(top_p),
            stop_token_ids=ends,
            ignore_eos=True,
            logprobs=0 if return_logprobs else None,
        )
        repeated = runs(prompts, self.engine.limits.samples)
        outputs = self.engine.generate(
            [prompt for prompt, _ in repeated],
            [
                replace(asked, n=times, seed=one)
                for one, (_, times) in zip(
                    distinct_seeds(seed, len(repeated)), repeated, strict=True
                )
            ],
        )
        answers = [Answer.of(one, ends) for output in outputs for one in output.samples]
        if echo:
            answers = [one.behind(prompt) for one, prompt in zip(answers, prompts, strict=True)]
        tokens: Any = [np.array(one.tokens, np.int32) for one in answers]
        logprobs = [one.logprobs for one in answers]
        if pad_output:
            width = max_generation_steps + (prompt_rows.shape[1] if echo else 0)
            tokens = padded(tokens, width, pad_id, left=False)
            logprobs = [one.padded_logprobs(width) for one in answers]
        return SamplerOutput(
            [self.tokenizer.decode(one.tokens) for one in answers],
            None,
            tokens,
            prompt_rows,
            logprobs if return_logprobs else None,
        )

    def tokenize(self, input_string: str) -> list[int]:
        """Ids behind one that begins a text, if the tokenizer has one that is not 0."""
        ids, begin = list(self.tokenizer.encode(input_string)), self.tokenizer.bos_id()
        while begin and ids[:1] == [begin]:
            ids = ids[1:]
        return [begin, *ids] if begin else ids

    @property
    def transformer(self) -> Any:
        raise NotImplementedError("an engine has no module: transformer_state has its arrays")

    @property
    def transformer_state(self) -> dict[str, jax.Array]:
        """The weights that are served, by name."""
        return self.engine.weights


def refuse(**reasons: str | bool) -> None:
    """Raises ValueError for the first that has a reason."""
    for name, reason in reasons.items():
        if reason:
            raise ValueError(f"{name} is not supported: {reason}")
