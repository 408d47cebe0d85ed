"""Cases of rows that have chosen some of their chunks to check: most of what they choose is the
same, so that work items read it in common, each row its own part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jax_chunkattn.planning.workloads import AttentionInputs
from pallas_kernels import chunk_attention
from pallas_kernels.selection import ItemColumns, RowChoice, selected_rows
from pallas_kernels.specs import AttentionCase

SHARE, AGREEMENT = 0.4, 0.8
"""Of the chunks before its own a row reads so many; how alike the rows' orders of them are."""

TINY = (AttentionCase("1,3_64,8", 6, 2, 32, chunk_size=16),)
ALL = (
    *TINY,
    AttentionCase("1,32_4096,140", 24, 6, 128, dtype="bfloat16", ragged=200),
    AttentionCase("1,17_3000,40", 9, 3, 64, dtype="float16", ragged=900),
    AttentionCase("1,12_2000,9", 8, 4, 256, dtype="bfloat16", ragged=70, softcap=5.0, scale=0.25),
    AttentionCase("1,4,16_1024,640,50", 6, 3, 64, chunk_size=32, ragged=300),
)
"""Decode problems."""


def cases(small: bool) -> tuple[AttentionCase, ...]:
    return TINY if small else ALL


def name(case: AttentionCase) -> str:
    return f"{case.name} choices"


@dataclass(frozen=True)
class Choices:
    """What every row of a problem reads.

    Letters: B rows, R chunks that a row reads at most, P columns of the longest table.
    """

    columns: Int32[np.ndarray, "B R"]
    number: Int32[np.ndarray, " B"]
    chunk: Int32[np.ndarray, " B"]
    tables: Int32[np.ndarray, "B P"]

    @classmethod
    def of(cls, inputs: AttentionInputs, chunk_size: int, seed: int) -> Choices:
        """Drawn at random, the chunk of a row's last token always among them."""
        random, rows = np.random.default_rng(seed), len(inputs.q)
        width = max(map(len, inputs.tables))
        tables = np.zeros((rows, width), np.int32)
        chunk, number = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        chosen: list[np.ndarray] = []
        common = random.standard_normal(width)
        for row, table in enumerate(inputs.tables):
            tables[row, : len(table)] = table
            chunk[row] = own = (int(inputs.lengths[row]) - 1) // chunk_size
            worth = AGREEMENT * common + (1 - AGREEMENT) * random.standard_normal(width)
            best = np.argsort(-worth[:own])[: round(SHARE * own)]
            chosen.append(np.sort(np.append(best, own)))
            number[row] = len(chosen[-1])
        columns = np.full((rows, max(map(len, chosen))), width, np.int32)
        for row, of_row in enumerate(chosen):
            columns[row, : len(of_row)] = of_row
        return cls(columns, number, chunk, tables)

    def read(self, lengths: Sequence[int], chunk_size: int) -> tuple[list[list[int]], list[int]]:
        """Of each row with tokens the chunks that it reads, and how many tokens those have."""
        tables, read = [], []
        for row, length in enumerate(lengths):
            columns = self.columns[row, : self.number[row]]
            tables.append(self.tables[row, columns].tolist())
            read.append(length - (int(self.chunk[row]) + 1 - len(columns)) * chunk_size)
        return tables, read


def attend(backend: str, case: AttentionCase) -> Callable[..., jax.Array]:
    """Attention of `(q, keys, values, plan, lengths, layer, columns, number, chunk, tables)`."""

    def run(q, keys, values, plan, lengths, layer, columns, number, chunk, tables):
        sizes: Any = {"chunk_size": case.chunk_size, "num_chunks": keys.shape[2]}
        selected = selected_rows(
            plan,
            RowChoice(columns, number, chunk),
            tables,
            ItemColumns.of(jax.tree.map(jnp.asarray, plan.items), tables),
            jnp.array(True),
            group=case.num_heads // case.num_kv_heads,
            **sizes,
        )
        how = {"scale": case.scale, "softcap": case.softcap, "implementation": backend}
        return chunk_attention(q, keys, values, selected, lengths, layer=layer, **how)

    return run
