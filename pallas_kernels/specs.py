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
      softcap, scale: as in `chunk_attention`. Queries and keys are normal, so scores of scale 1
        have the standard deviation sqrt(D).
    """

    tree: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    chunk_size: int = 64
    dtype: str = "float32"
    ragged: int = 0
    softcap: float | None = None
    scale: float | None = None

    @property
    def name(self) -> str:
        heads = f"h{self.num_heads}/{self.num_kv_heads}"
        ragged = f"+{self.ragged}" if self.ragged else ""
        sizes = f"d{self.head_dim} c{self.chunk_size} {self.dtype}"
        softcap = f" softcap {self.softcap:g}" if self.softcap is not None else ""
        scale = f" scale {self.scale:g}" if self.scale is not None else ""
        return f"{self.tree}{ragged} {heads} {sizes}{softcap}{scale}"

    @property
    def nodes_per_level(self) -> tuple[int, ...]:
        return _numbers(self.tree.split("_")[0])

    @property
    def tokens_per_level(self) -> tuple[int, ...]:
        return _numbers(self.tree.split("_")[1])

    @property
    def batch(self) -> int:
        return self.nodes_per_level[-1]

    @property
    def has_plain_scores(self) -> bool:
        """Whether attention that knows neither a softcap nor a scale of its own computes it."""
        return self.softcap is None and self.scale is None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


# Small, and chosen for what can go wrong: one row, one token, G of 1, 3 and 8, head_dim that is no
# power of two, chunks of 16 to 128, runs shorter and longer than a piece, deep and forked trees,
# batches that are no power of two, nothing shared at all, scores of which a softcap bends most.
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
    AttentionCase("1,6_96,20", 4, 2, 32, chunk_size=16, ragged=40, softcap=5.0, scale=1.0),
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

# For a GPU that runs them, where the interpreters would take minutes: every dtype, head size, chunk
# size and group that the kernels are compiled for, items of hundreds of chunks, more items than
# processors, trees of many levels.
GPU_NUMERICS: tuple[AttentionCase, ...] = (
    AttentionCase("1,64_4096,70", 8, 8, 128, dtype="bfloat16", ragged=100),
    AttentionCase("1,32_20000,16", 8, 1, 128, dtype="bfloat16", ragged=300),
    AttentionCase("1,40_16384,1", 4, 4, 64, chunk_size=32, dtype="bfloat16", ragged=40),
    AttentionCase("1,16_8192,200", 16, 1, 64, chunk_size=16, dtype="bfloat16", ragged=500),
    AttentionCase("1,9_4000,64", 9, 3, 64, chunk_size=64, dtype="bfloat16", ragged=1000),
    AttentionCase("1,33_2048,1", 16, 2, 256, chunk_size=64, dtype="bfloat16", ragged=129),
    AttentionCase("1,20_3000,90", 24, 3, 128, chunk_size=256, dtype="bfloat16", ragged=600),
    AttentionCase(
        "1,4,16,64,256_256,64,128,64,32", 8, 2, 128, chunk_size=16, dtype="bfloat16", ragged=33
    ),
    AttentionCase("8,16,32,128_512,192,256,32", 6, 2, 64, chunk_size=64, dtype="bfloat16"),
    AttentionCase("64_700", 8, 2, 128, chunk_size=128, dtype="bfloat16", ragged=900),
    AttentionCase("1,48_5000,3", 8, 8, 128, dtype="float16", ragged=64),
    AttentionCase("1,3,30_1024,640,50", 12, 4, 256, chunk_size=128, dtype="float16", ragged=70),
    AttentionCase("1,24_6000,40", 16, 1, 64, chunk_size=32, dtype="float16", ragged=256),
    AttentionCase("1,12_2500,30", 6, 2, 32, chunk_size=16, dtype="float16", ragged=200),
    AttentionCase("1,17_4096,40", 3, 1, 80, chunk_size=64, dtype="bfloat16", ragged=300),
    AttentionCase("1,32_4096,33", 8, 1, 128, dtype="float32", ragged=200),
    AttentionCase("1,2,8,32_512,256,128,16", 6, 2, 64, chunk_size=32, ragged=50),
    AttentionCase("1,10_3000,9", 4, 4, 256, chunk_size=256, ragged=300),
    AttentionCase("1,16_9000,20", 16, 1, 32, chunk_size=16, ragged=100),
    AttentionCase("1,32_3000,40", 8, 4, 256, dtype="bfloat16", ragged=90, softcap=5.0, scale=0.25),
    AttentionCase("1,20_3000,9", 8, 4, 128, dtype="float16", ragged=70, softcap=5.0, scale=0.5),
    AttentionCase("1,12_2000,9", 8, 4, 128, ragged=70, softcap=5.0, scale=0.5),
)

# PAT's benchmark (ASPLOS 2026): its trees, each with its query and KV heads of 128 dimensions.
PAT_TREES: tuple[str, ...] = (
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
)
PAT_HEADS: tuple[tuple[int, int], ...] = ((32, 32), (16, 8), (32, 8), (64, 8))
