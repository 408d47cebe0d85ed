"""From the records of `clusters` to the numbers that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.harness.reading import Record
from experiments.quality.measures import Change, change_of


@dataclass(frozen=True, kw_only=True)
class ClusterMeasures(Change):
    """What clusters do, against heads that attend for themselves.

    Attributes:
      counted: by what: "all heads", "elbow", or a share of them such as "50%".
      membership: who is in a cluster, and who attends.
      clusters: of all layers.
      key_bytes, kv_bytes: of a token in the pool.
      decode_time: of a step, over that of a step where all heads attend; the median.
    """

    counted: str
    membership: str | None
    clusters: int
    key_bytes: int
    kv_bytes: int
    decode_time: float


def cluster_measures(records: Sequence[Record]) -> list[ClusterMeasures]:
    """Of every record, the first of which is of all heads."""
    names = ("counted", "membership", "clusters", "key_bytes", "kv_bytes", "decode_time")
    return [
        ClusterMeasures(**vars(change_of(records[0], one)), **{name: one[name] for name in names})
        for one in records
    ]
