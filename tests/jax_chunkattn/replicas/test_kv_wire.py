"""KV events as vLLM writes them, in both of its layouts."""

from __future__ import annotations

from typing import Any

import pytest

from jax_chunkattn.replicas.wire import decode_batch, encode_batch
from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

EVENTS = [
    BlockStored((11, 12), None, (1, 2, 3, 4), 2, b"tenant"),
    BlockStored((13,), 12, (5, 6), 2),
    BlockRemoved((13, 12)),
    AllBlocksCleared(),
]
MAPS = {
    "ts": 1.5,
    "events": [
        {
            "type": "BlockStored",
            "block_hashes": [11, 12],
            "parent_block_hash": None,
            "token_ids": [1, 2, 3, 4],
            "block_size": 2,
            "lora_id": None,
            "medium": None,
            "lora_name": None,
            "extra_keys": [["tenant"], None],
        },
        {
            "type": "BlockStored",
            "block_hashes": [13],
            "parent_block_hash": 12,
            "token_ids": [5, 6],
            "block_size": 2,
            "lora_id": None,
            "medium": None,
            "lora_name": None,
        },
        {"type": "BlockRemoved", "block_hashes": [13, 12], "medium": None},
        {"type": "AllBlocksCleared"},
    ],
    "data_parallel_rank": 3,
}
ARRAYS = [
    1.5,
    [
        ["BlockStored", [11, 12], None, [1, 2, 3, 4], 2, None, None, None, [["tenant"], None]],
        ["BlockStored", [13], 12, [5, 6], 2, None, None, None],
        ["BlockRemoved", [13, 12], None],
        ["AllBlocksCleared"],
    ],
    3,
]


@pytest.mark.parametrize(("layout", "written"), [("map", MAPS), ("array", ARRAYS)])
def test_events_are_written_as_vllm_writes_them_and_read_back(layout: Any, written: Any):
    assert encode_batch(EVENTS, 1.5, rank=3, layout=layout) == written
    assert decode_batch(written) == (1.5, EVENTS, 3)


def test_what_newer_versions_add_is_passed_over():
    newer = [2.0, [["BlockStored", [1], None, [7], 1, None, "GPU", None, None, 0, "full", None]]]
    assert decode_batch(newer) == (2.0, [BlockStored((1,), None, (7,), 1)], None)
    oldest = [2.0, [["BlockStored", [1], None, [7], 1, None], ["BlockRemoved", [1]]]]
    events = [BlockStored((1,), None, (7,), 1), BlockRemoved((1,))]
    assert decode_batch(oldest) == (2.0, events, None)


@pytest.mark.parametrize(
    "wrong",
    [
        7,
        [1.0],
        {"ts": 1.0},
        [1.0, [["BlockMoved"]]],
        [1.0, [3]],
        [None, []],
        [1.0, [["BlockStored"]]],
    ],
    ids=["number", "no events", "map", "unknown", "event", "time", "fields"],
)
def test_what_is_no_batch_is_refused(wrong: Any):
    with pytest.raises(ValueError, match="KV event"):
        decode_batch(wrong)


@pytest.mark.parametrize("arrays", [False, True], ids=["map", "array"])
def test_structs_like_those_of_vllm_read_it(arrays: bool):
    msgspec = pytest.importorskip("msgspec")
    # The fields of vLLM's classes, in their order.
    first = [("block_hashes", list[int]), ("parent_block_hash", int | None)]
    first += [("token_ids", list[int]), ("block_size", int), ("lora_id", int | None)]
    first += [("medium", str | None), ("lora_name", str | None)]
    first += [("extra_keys", list[tuple[Any, ...] | None] | None, None)]
    options = {"tag": True, "array_like": arrays}
    kinds = [
        msgspec.defstruct("BlockStored", [*first, ("group_idx", int | None, None)], **options),
        msgspec.defstruct(
            "BlockRemoved", [("block_hashes", list[int]), ("medium", str | None)], **options
        ),
        msgspec.defstruct("AllBlocksCleared", [], **options),
    ]
    either = kinds[0] | kinds[1] | kinds[2]
    batch = [("ts", float), ("events", list[either]), ("data_parallel_rank", int | None, None)]
    reader = msgspec.msgpack.Decoder(msgspec.defstruct("Batch", batch, array_like=arrays))
    layout = "array" if arrays else "map"
    read = reader.decode(msgspec.msgpack.encode(encode_batch(EVENTS, 1.5, rank=3, layout=layout)))
    assert [type(event).__name__ for event in read.events] == [
        type(event).__name__ for event in EVENTS
    ]
    assert read.events[0].block_hashes == [11, 12]
    assert read.events[0].extra_keys == [("tenant",), None]
    assert read.events[1].token_ids == [5, 6]
    assert read.data_parallel_rank == 3
