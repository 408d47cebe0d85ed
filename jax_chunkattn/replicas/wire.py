"""KV events as vLLM publishes them, so that what follows its caches follows ours.

The schema is that of `vllm/distributed/kv_events.py`: a batch has a time, events, and the rank of
whoever sends it; an event has the name of its class and its fields. vLLM wrote both as arrays, the
name first, and its present version writes maps, the name under "type". Values here are lists, maps,
numbers and texts, for `msgspec.msgpack.encode` or any other encoder of MessagePack. vLLM sends them
by ZeroMQ in three frames: a topic, the batch's number as 8 bytes (big endian), and this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent

_STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
    "lora_name", "extra_keys",
)  # fmt: skip
_REMOVED = ("block_hashes", "medium")
_BATCH = ("ts", "events", "data_parallel_rank")
_FIELDS = {"BlockStored": _STORED, "BlockRemoved": _REMOVED, "AllBlocksCleared": ()}


def encode_batch(
    events: Iterable[KVEvent],
    time: float,
    *,
    rank: int | None = None,
    layout: Literal["map", "array"] = "map",
) -> Any:
    """A batch of events, of seconds since 1970, as plain values.

    A salt is what vLLM's `cache_salt` is: the one extra key of a prompt's first block.
    """
    written = [_encode(event, layout) for event in events]
    batch = {"ts": time, "events": written, "data_parallel_rank": rank}
    return batch if layout == "map" else list(batch.values())


def decode_batch(batch: Any) -> tuple[float, list[KVEvent], int | None]:
    """The time, events and rank of a batch, in either layout.

    The salt is known of blocks that begin a prompt alone. Fields that say where a block is, or by
    which adapter it was computed, are passed over.

    Raises:
      ValueError: for what is no such batch.
    """
    fields = _named(batch, _BATCH)
    try:
        events = [_decode(event) for event in fields["events"]]
        return float(fields["ts"]), events, fields.get("data_parallel_rank")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a batch of KV events: {batch!r:.80}") from error


def _encode(event: KVEvent, layout: str) -> Any:
    name = type(event).__name__
    if isinstance(event, BlockStored):
        salted = event.salt and event.parent_block_hash is None
        salt = event.salt.decode(errors="surrogateescape")
        values = {
            "block_hashes": list(event.block_hashes),
            "parent_block_hash": event.parent_block_hash,
            "token_ids": list(event.token_ids),
            "block_size": event.block_size,
            "lora_id": None,
            "medium": None,
            "lora_name": None,
        }
        if salted:
            values["extra_keys"] = [[salt], *[None] * (len(event.block_hashes) - 1)]
    elif isinstance(event, BlockRemoved):
        values = {"block_hashes": list(event.block_hashes), "medium": None}
    else:
        values = {}
    return {"type": name, **values} if layout == "map" else [name, *values.values()]


def _decode(event: Any) -> KVEvent:
    name = event["type"] if isinstance(event, dict) else event[0]
    if name not in _FIELDS:
        raise ValueError(f"unknown KV event {name!r:.40}; known: {', '.join(_FIELDS)}")
    fields = event if isinstance(event, dict) else _named(event[1:], _FIELDS[name])
    if name == "AllBlocksCleared":
        return AllBlocksCleared()
    hashes = tuple(fields["block_hashes"])
    if name == "BlockRemoved":
        return BlockRemoved(hashes)
    first = (fields.get("extra_keys") or [None])[0]
    return BlockStored(
        hashes,
        fields["parent_block_hash"],
        tuple(fields["token_ids"]),
        fields["block_size"],
        first[0].encode(errors="surrogateescape") if first else b"",
    )


def _named(values: Any, names: Sequence[str]) -> dict[str, Any]:
    """The fields of a map or array; what an array has behind those that are known is left."""
    if isinstance(values, dict):
        return values
    if not isinstance(values, list | tuple):
        raise ValueError(f"not a batch of KV events: {values!r:.80}")
    return dict(zip(names, values, strict=False))
