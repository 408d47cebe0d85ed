"""Why prompt tokens were not served from the cache: what to look at when the hit rate is low."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jax_chunkattn.tree.nodes import TOKEN_BYTES, encode_tokens


@dataclass(frozen=True)
class PromptUse:
    """Tokens of one prompt, or of several added up, by where they came from.

    Served: ``hit`` in whole chunks that were found in the pool, ``host`` and ``disk`` in those that
    were found in tiers behind it, ``copied`` out of a chunk that begins alike. Computed, by why:

    * ``too_short``: behind the prompt's last full chunk, where whole chunks cannot match. A smaller
      chunk size would serve some of them.
    * ``new``: no prompt with this prefix is remembered.
    * ``evicted``: computed before under this salt, and gone. A larger pool would serve them.
    * ``window``: found, but for heads with windows, of which too little was kept of what is before
      the prompt's own. `CacheConfig.window_chunks` would serve them.
    * ``salt``: computed before, but only under another salt, which keeps them apart, or behind
      another learned prefix.
    * ``last``: the last token of a prompt that is cached to its end, computed for its logits; its
      last chunk, where chunks are encoded.

    The sum of all is the prompt's length.
    """

    hit: int = 0
    host: int = 0
    disk: int = 0
    copied: int = 0
    too_short: int = 0
    new: int = 0
    evicted: int = 0
    window: int = 0
    salt: int = 0
    last: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts."""
        return sum(vars(self).values())

    @property
    def num_found(self) -> int:
        """Tokens that need not be computed."""
        return self.hit + self.host + self.disk + self.copied

    def of_which(self, host: int, disk: int) -> PromptUse:
        """The same where of the tokens found in whole chunks so many, the last, come from tiers."""
        behind = min(self.hit, host + disk)
        from_disk = min(disk, behind)
        return replace(self, hit=self.hit - behind, host=behind - from_disk, disk=from_disk)

    def __add__(self, other: PromptUse) -> PromptUse:
        if not isinstance(other, PromptUse):
            return NotImplemented
        counts = vars(other)
        return PromptUse(**{name: count + counts[name] for name, count in vars(self).items()})


class PrefixMemory:
    """Remembers which prefixes, in whole chunks, were computed under which salt.

    It keeps two 64-bit hashes per prefix, one with its salt and one without, of the path: every
    chunk is hashed together with the hash of the chunks before it. Prompts are not kept. Two
    prefixes with the same hash (likely only among billions) are taken for one, which may call a
    new prefix evicted; a prefix forgotten is taken for new. So this explains misses, roughly, and
    must never decide what is served.

    The ``max_prefixes`` prefixes used last are remembered, with the salt and, apart from that,
    without; of one prompt the longest are forgotten first, as in the cache itself. To tell what
    was evicted, remember several times as many as the pool has chunks.

    Args:
      chunk_size: tokens per chunk, C.
      max_prefixes: how many to remember, at 0.2 to 0.4 KB each.
      last_tokens: of a prompt that is cached to its end, computed again: 1, or C.

    Raises:
      ValueError: when either is below 1.
    """

    def __init__(self, chunk_size: int, max_prefixes: int, *, last_tokens: int = 1):
        if chunk_size < 1 or max_prefixes < 1:
            raise ValueError(
                f"chunk_size and max_prefixes must be at least 1, got {chunk_size}, {max_prefixes}"
            )
        self.chunk_size = chunk_size
        self.max_prefixes = max_prefixes
        self.last_tokens = last_tokens
        self._salted: OrderedDict[int, None] = OrderedDict()
        self._unsalted: OrderedDict[int, bytes] = OrderedDict()  # to the salt that came last

    def __len__(self) -> int:
        """Prefixes remembered; one under two salts counts twice."""
        return len(self._salted)

    def classify(
        self,
        tokens: np.ndarray | Sequence[int],
        salt: bytes,
        hit_tokens: int,
        copied_tokens: int,
        matched_tokens: int = 0,
    ) -> PromptUse:
        """Says what became of a prompt's tokens, then remembers its prefixes.

        Args:
          tokens: the whole prompt, [T].
          salt: the namespace it was looked up in.
          hit_tokens: how many were found in whole chunks, a multiple of C; all of them when the
            prompt is cached to its end, though the last ones are computed again.
          copied_tokens: how many behind those were copied out of another chunk, at most C.
          matched_tokens: how many were found in whole chunks by heads without windows, where that
            is more than `hit_tokens`.

        Raises:
          ValueError: for bad tokens, or counts that do not fit them.
        """
        paths = prefix_hashes(tokens, self.chunk_size)
        num_tokens = len(tokens)
        self._require_fitting(num_tokens, hit_tokens, copied_tokens)
        num_left = num_tokens - hit_tokens - copied_tokens
        if num_left == 0 and copied_tokens:
            use = PromptUse(hit=hit_tokens, copied=copied_tokens - 1, last=1)
        elif num_left == 0:
            use = PromptUse(hit=hit_tokens - self.last_tokens, last=self.last_tokens)
        else:
            window = max(0, matched_tokens - hit_tokens)
            found = (hit_tokens + window) // self.chunk_size
            missed = self._count_missed(paths[found:], salt, copied_tokens)
            too_short = num_left - window - sum(missed.values())
            use = PromptUse(
                hit=hit_tokens, copied=copied_tokens, too_short=too_short, window=window, **missed
            )
        self._remember(paths, salt)
        return use

    def remember(
        self, tokens: np.ndarray | Sequence[int], salt: bytes, from_chunk: int = 0
    ) -> None:
        """Notes that the whole chunks of ``tokens``, from ``from_chunk`` on, were computed.

        Raises ValueError for bad tokens or a negative ``from_chunk``.
        """
        if from_chunk < 0:
            raise ValueError(f"from_chunk must not be negative, got {from_chunk}")
        self._remember(prefix_hashes(tokens, self.chunk_size)[from_chunk:], salt)

    def forget(self) -> None:
        """Forgets everything: after the cache was emptied, misses are new ones."""
        self._salted.clear()
        self._unsalted.clear()

    def _require_fitting(self, num_tokens: int, hit_tokens: int, copied_tokens: int) -> None:
        if not 0 <= hit_tokens <= num_tokens or hit_tokens % self.chunk_size:
            raise ValueError(
                f"hit_tokens must be whole chunks of {self.chunk_size} within {num_tokens} tokens, "
                f"got {hit_tokens}"
            )
        most = min(self.chunk_size, num_tokens - hit_tokens)
        if not 0 <= copied_tokens <= most:
            raise ValueError(
                f"copied_tokens must be in [0, {most}] behind {hit_tokens} of {num_tokens} tokens, "
                f"got {copied_tokens}"
            )

    def _count_missed(self, paths: list[int], salt: bytes, copied_tokens: int) -> dict[str, int]:
        """Tokens of full chunks not found, by reason, less those copied out of the first."""
        missed = {"new": 0, "evicted": 0, "salt": 0}
        num_tokens = self.chunk_size - copied_tokens
        for path in paths:
            missed[self._reason(path, salt)] += num_tokens
            num_tokens = self.chunk_size
        return missed

    def _reason(self, path: int, salt: bytes) -> str:
        if hash((path, salt)) in self._salted:
            return "evicted"
        known_under = self._unsalted.get(path)
        if known_under is None:
            return "new"
        # Fewer prefixes differ without their salt, so they are remembered for longer.
        return "evicted" if known_under == salt else "salt"

    def _remember(self, paths: list[int], salt: bytes) -> None:
        salted, unsalted = self._salted, self._unsalted
        for path in reversed(paths):
            key = hash((path, salt))
            salted[key] = None
            salted.move_to_end(key)
            unsalted[path] = salt
            unsalted.move_to_end(path)
        for remembered in (salted, unsalted):
            while len(remembered) > self.max_prefixes:
                remembered.popitem(last=False)


def prefix_hashes(tokens: np.ndarray | Sequence[int], chunk_size: int) -> list[int]:
    """Hash of each prefix in whole chunks, the shortest first; within this process only.

    Raises ValueError for bad tokens.
    """
    encoded = encode_tokens(tokens)
    step = chunk_size * TOKEN_BYTES
    path, paths = 0, []
    for end in range(step, len(encoded) + 1, step):
        path = hash((path, encoded[end - step : end]))
        paths.append(path)
    return paths
