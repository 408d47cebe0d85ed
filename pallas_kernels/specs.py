"""The cases that tests and benchmarks of every attention implementation share.

A tree is written as in PAT's benchmark (ASPLOS 2026): nodes per level, an underscore, tokens per
node of that level. `1,4_256,64` is one root of 256 tokens with four children of 64; the nodes of
the last level are the rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionCase:
    """One decode attention problem.

    Attributes:
      tree: shared structure, see above.
      ragged: rows get up to this many private tokens more, each its own number.
    """

    tree: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int = 64
    dtype: str = "float32"
    ragged: int = 0

    @property
    def name(self) -> str:
        heads = f"h{self.num_heads}/{self.num_kv_heads}"
        ragged = f"+{self.ragged}" if self.ragged else ""
        return f"{self.tree}{ragged} {heads} d{self.head_dim} c{self.chunk_size} {self.dtype}"

    @property
    def nodes_per_level(self) -> tuple[int, ...]:
        return _numbers(self.tree.split("_")[0])

    @property
    def tokens_per_level(self) -> tuple[int, ...]:
        return _numbers(self.tree.split("_")[1])

    @property
    def batch(self) -> int:
        return self.nodes_per_level[-1]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


# Small, and chosen for what can go wrong: one row, one token, G of 1, 3 and 8, head_dim that is no
# power of two, chunks of 16 to 128, runs shorter and longer than a piece, deep and forked trees,
# batches that are no power of two, nothing shared at all.
NUMERICS: tuple[AttentionCase, ...] = (
    AttentionCase("1_1", 1, 1, 16, chunk_size=16),
    AttentionCase("1_300", 4, 4, 32, chunk_size=16),
    AttentionCase("4_40", 4, 2, 16, chunk_size=16, ragged=37),
    AttentionCase("1,2_64,1", 2, 1, 80, chunk_size=64),
    AttentionCase("1,7_320,5", 9, 3, 64, chunk_size=64, ragged=130),
    AttentionCase("1,32_1100,16", 2, 2, 32, chunk_size=16, ragged=20),
    AttentionCase("1,5_513,1", 8, 1, 24, chunk_size=128, ragged=200),
    AttentionCase("1,4,16_96,64,48", 6, 2, 16, chunk_size=32, ragged=40),
    AttentionCase("1,2,4,8,40_64,48,32,64,3", 4, 4, 16, chunk_size=16, ragged=17),
    AttentionCase("2,6_160,96", 16, 2, 48, chunk_size=32, ragged=64),
)

# Seconds on two CPU cores, with something for each baseline to show.
SMOKE: tuple[AttentionCase, ...] = (
    AttentionCase("16_512", 8, 8, 64),
    AttentionCase("1,16_1024,64", 8, 8, 64),
    AttentionCase("1,16_1024,64", 9, 3, 64),
    AttentionCase("1,4,16_512,256,64", 8, 8, 64),
    AttentionCase("1,32_2048,64", 9, 3, 64),
)

# The grid of ChunkAttention's Table 3 (arXiv 2402.15220): 32 prompts of 1024 to 4096 tokens
# that have none, half or all of them in common. Where it is all, each row has decoded 64 more.
PAPER: tuple[AttentionCase, ...] = tuple(
    AttentionCase(tree, 32, 32, 128)
    for prompt in (1024, 2048, 4096)
    for tree in (f"32_{prompt}", f"1,32_{prompt // 2},{prompt // 2}", f"1,32_{prompt},64")
)
