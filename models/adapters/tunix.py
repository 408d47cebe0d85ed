"""A decoder as tunix's trainers call a model, and its tokenizer as tunix asks for one.

Held to google-tunix 0.1.7: its GRPO learner trains a `TrainableDecoder` while an engine serves the
same weights by `jax_chunkattn.adapters.tunix`, and its own sampler decodes one as the engine does.
tunix itself is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from jax_chunkattn.device.model_interface import Attend, CacheSpec
from models.chat_template import Message
from models.decoder import Decoder
from models.dense_attention import (
    attention_scores,
    attention_weights,
    visible_positions,
    weighted_values,
)
from models.tokenizer import ChatTokenizer

DenseCache = dict[str, jax.Array]
"""What a batch has computed: `keys` and `values [B, L, S, Hkv, D]`, the `positions [B, S]` of their
tokens, and how many of the S slots are written, `end_index [B]`."""


class TrainableDecoder(nnx.Module):
    """A decoder that takes padded batches and a mask, and attends densely.

    The weights are those of `decoder`, with `decoder.` before their names. Scores of all pairs of
    tokens are kept for the backward pass, as in `models.training`.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.config = decoder.config

    @property
    def num_embed(self) -> int:
        """V, as tunix's models call it."""
        return self.decoder.vocab_size

    def __call__(
        self,
        input_tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"],
        cache: DenseCache | None,
        attention_mask: Bool[jax.Array, "B T S"] | None,
    ) -> tuple[Float[jax.Array, "B T V"], DenseCache | None]:
        """float32 logits, and the cache with these tokens behind what it had.

        What a token sees is what the mask lets it, at positions up to its own and in its windows,
        and always itself: rows of padding, whose mask is empty, then have numbers too.

        Args:
          cache: as `init_cache` makes it; None where S = T and all are there.
          attention_mask: None, as tunix has it for several sequences packed into one, is refused.

        Raises:
          ValueError: without a mask.
        """
        if attention_mask is None:
            raise ValueError(
                "TrainableDecoder needs an attention_mask: packed sequences are not supported"
            )
        tokens, positions = input_tokens.astype(jnp.int32), positions.astype(jnp.int32)
        graphdef, state = nnx.split(self.decoder)

        def of_one(tokens, positions, mask, cache):
            model = nnx.merge(graphdef, state)
            pool, places, own = None, positions, jnp.arange(len(tokens), dtype=jnp.int32)
            if cache is not None:
                own = own + cache["end_index"]
                places = cache["positions"].at[own].set(positions)
                pool = cache["keys"], cache["values"]
            slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
            visible = mask | (own[:, None] == slots[None])
            attend = _masked_attend(model.cache_spec, positions, places, own, visible)
            hidden, pool = model(tokens, positions, pool, attend)
            if cache is not None:
                end = cache["end_index"] + jnp.int32(len(tokens))
                keys, values = pool
                cache = {"keys": keys, "values": values, "positions": places, "end_index": end}
            return model.logits(hidden), cache

        return jax.vmap(of_one)(tokens, positions, attention_mask, cache)

    def init_cache(self, batch_size: int, cache_size: int, dtype: DTypeLike) -> DenseCache:
        """An empty cache of S = `cache_size` tokens for each of B = `batch_size` sequences."""
        spec = self.decoder.cache_spec
        shape = batch_size, spec.num_layers, cache_size, spec.num_kv_heads, spec.head_dim
        return {
            "keys": jnp.zeros(shape, dtype),
            "values": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch_size, cache_size), jnp.int32),
            "end_index": jnp.zeros((batch_size,), jnp.int32),
        }


def _masked_attend(
    spec: CacheSpec,
    positions: jax.Array,
    places: jax.Array,
    own: jax.Array,
    visible: jax.Array,
) -> Attend:
    """Of queries at `positions [T]` to what is `visible [T, S]` of keys at `places [S]`, among
    which theirs have the slots `own [T]`."""

    def attend(pool, layer, q, k, v):
        if pool is not None:
            pool = pool[0].at[layer, own].set(k), pool[1].at[layer, own].set(v)
            k, v = pool[0][layer], pool[1][layer]
        seen = visible_positions(spec, layer, positions, places) & visible[None]
        weights = attention_weights(attention_scores(spec, q, k), seen)
        return weighted_values(weights, v).astype(q.dtype), pool

    return attend


class TunixTokenizer:
    """A checkpoint's tokenizer with the ids that tunix asks for as methods.

    Args:
      tokenizer: its `encode` puts around a text what the model expects, so there is no `bos_id`
        that tunix would put before it once more.
      pad_id: a token that no text has: tunix takes it for padding wherever it stands.
      eos_id: None takes the checkpoint's.

    Raises:
      ValueError: when the checkpoint has no end of a text and none is given.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, pad_id: int, eos_id: int | None = None):
        eos_id = tokenizer.eos_id if eos_id is None else eos_id
        if eos_id is None:
            raise ValueError("this tokenizer names no token that ends a text: give its eos_id")
        self._tokenizer = tokenizer
        self._pad_id, self._eos_id = pad_id, eos_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self._eos_id

    def pad_id(self) -> int:
        return self._pad_id

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """The chat as text, or as its ids."""
        render = self._tokenizer.apply_chat_template if tokenize else self._tokenizer.render_chat
        return render(messages, add_generation_prompt=add_generation_prompt, **variables)
