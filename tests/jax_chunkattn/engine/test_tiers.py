"""Chunks that leave the pool come back as they were, or are computed again; nobody can tell."""

from __future__ import annotations

import errno
import functools
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from jax_chunkattn import CacheConfig, Engine, EngineClosed, SamplingParams
from jax_chunkattn.engine import tiered
from jax_chunkattn.engine.residency import TierError
from jax_chunkattn.engine.tiered import TRIED_AGAIN, Tiered
from jax_chunkattn.tiers.disk import FOLDER, DiskTier
from jax_chunkattn.tiers.store import ChunkStore, Tier
from jax_chunkattn.tree.nodes import Node
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.selection import ChunkSelector
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import (
    greedy_without_cache,
    reweighted,
    token_tree,
    toy_model,
    windowed_model,
)

CHUNK = 16
[PROMPT, ALIKE] = token_tree((1, 4 * CHUNK), (2, 25), seed=1)
[STRANGER] = token_tree((1, 100), seed=2)
NUM_TOKENS = 12
PARAMS = SamplingParams(NUM_TOKENS)
WHOLE = len(PROMPT) // CHUNK * CHUNK
"""Tokens of the prompt that whole chunks hold."""


@functools.cache
def right() -> list[int]:
    """What a model without a cache answers."""
    return greedy_without_cache(PROMPT, NUM_TOKENS)


def small_engine(**options: Any) -> Engine:
    """Of a pool that holds the prompt's chunks or the stranger's, and whose tiers are asked."""
    sizes = {"num_chunks": 10, "prefill_tokens": 32, "max_running": 3, "load": "always"}
    if "model" in options:
        options["model"] = options["model"]()  # nothing is computed before a test runs
    return make_engine(**{**sizes, **options})


def on_disk(folder: Path, **options: Any) -> Engine:
    return small_engine(disk=folder, disk_memory="10MB", **options)


def answer(engine: Engine, prompt=PROMPT, **options: Any) -> list[int]:
    return list(engine.submit(prompt, PARAMS, **options).result().tokens)


def evict_all(engine: Engine) -> None:
    """By a stranger who needs the whole pool."""
    before = engine.stats.evictions
    engine.submit(STRANGER, SamplingParams(10 * CHUNK - len(STRANGER))).result()
    assert engine.stats.evictions >= before + WHOLE // CHUNK


def residency(engine: Engine) -> Tiered:
    assert isinstance(engine._residency, Tiered)
    return engine._residency


def settle(engine: Engine) -> None:
    """Everything is where it goes."""
    residency(engine).save()
    residency(engine)._store.settle()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_evicted_comes_back_from_memory():
    engine = small_engine(host_memory="1MB")
    assert answer(engine) == right()
    evict_all(engine)
    computed = engine.stats.prefill_tokens
    handle = engine.submit(PROMPT, PARAMS)
    assert list(handle.result().tokens) == right()
    assert engine.stats.prefill_tokens == computed + len(PROMPT) - WHOLE
    use = handle.prompt_use
    assert use is not None
    assert (use.hit, use.host, use.disk, use.num_tokens) == (0, WHOLE, 0, len(PROMPT))
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.loaded_from_host == WHOLE
    assert tiers.kept_in_host >= WHOLE // CHUNK
    assert tiers.failures == {}
    assert_all_returned(engine)


def test_what_one_who_begins_evicts_the_next_has_back():
    """Both in one turn, in which nothing is written between them."""
    engine = small_engine(host_memory="1MB", num_chunks=16, prefill_tokens=512)
    begun, whole = PROMPT[: 3 * CHUNK + 2], 3 * CHUNK
    few = SamplingParams(2)
    engine.submit(begun, few).result()
    engine.submit(STRANGER[: 5 * CHUNK], few).result()  # used later, so it goes later
    large = engine.submit([7] * (10 * CHUNK + 1), few)
    again = engine.submit(begun, few)
    large.result()
    again.result()
    assert engine.stats.preemptions == 0
    tiers = engine.stats.tiers
    assert tiers is not None
    assert again.prompt_use is not None
    assert (again.prompt_use.host, tiers.loaded_from_host, tiers.failures) == (whole, whole, {})
    assert_all_returned(engine)


def test_another_engine_finds_what_is_on_the_disk(tmp_path: Path):
    with on_disk(tmp_path) as engine:
        assert answer(engine) == right()
    with on_disk(tmp_path) as engine:
        handle = engine.submit(PROMPT, PARAMS)
        assert list(handle.result().tokens) == right()
        use = handle.prompt_use
        assert use is not None
        assert (use.disk, use.new, use.too_short) == (WHOLE, 0, len(PROMPT) - WHOLE)
        assert engine.stats.prefill_tokens == len(PROMPT) - WHOLE
        # The answer's chunk too, as a part of a longer prompt.
        longer = [*PROMPT, *right(), 7]
        handle = engine.submit(longer, PARAMS)
        assert list(handle.result().tokens) == greedy_without_cache(longer, NUM_TOKENS)
        assert_all_returned(engine)


def test_a_prompt_that_ends_with_a_chunk_has_its_last_token_computed(tmp_path: Path):
    prompt = PROMPT[:WHOLE]
    expected = greedy_without_cache(prompt, NUM_TOKENS)
    for _ in range(2):
        with on_disk(tmp_path) as engine:
            handle = engine.submit(prompt, PARAMS)
            assert list(handle.result().tokens) == expected
            use = handle.prompt_use
    assert use is not None
    assert (use.disk, use.last) == (WHOLE - 1, 1)


def test_a_tier_with_less_room_than_the_pool_keeps_beginnings():
    size = residency(small_engine(host_memory="1MB"))._layout.chunk_bytes
    engine = small_engine(host_memory=3 * size)
    assert answer(engine) == right()
    engine.resize(num_chunks=10)
    handle = engine.submit(PROMPT, PARAMS)
    assert list(handle.result().tokens) == right()
    assert handle.prompt_use is not None
    assert handle.prompt_use.host == 3 * CHUNK


def test_memory_gives_way_to_the_disk(tmp_path: Path):
    engine = on_disk(tmp_path, host_memory="20KB")  # of chunks of 8 KB
    assert answer(engine) == right()
    for _ in range(2):
        evict_all(engine)
        assert answer(engine) == right()
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.host_chunks == 2
    assert tiers.loaded_from_disk >= WHOLE // 2
    assert tiers.failures == {}
    assert_all_returned(engine)


def test_those_who_share_what_is_coming_wait_for_it_and_load_it_once(tmp_path: Path):
    with on_disk(tmp_path) as engine:
        answer(engine)
    with on_disk(tmp_path) as engine:
        requests = [engine.submit(prompt, PARAMS) for prompt in (PROMPT, ALIKE, PROMPT)]
        expected = [right(), greedy_without_cache(ALIKE, NUM_TOKENS), right()]
        assert run(requests) == expected
        tiers = engine.stats.tiers
        assert tiers is not None
        assert tiers.loaded_from_disk == WHOLE
        assert_all_returned(engine)


def test_others_go_on_while_chunks_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with on_disk(tmp_path) as engine:
        answer(engine)
    with on_disk(tmp_path) as engine:
        go = threading.Event()
        read = DiskTier.read
        monkeypatch.setattr(DiskTier, "read", lambda *of: (go.wait(20), read(*of))[1])
        waiting = engine.submit(PROMPT, PARAMS)
        other = engine.submit(STRANGER[:20], PARAMS)
        assert list(other.result().tokens) == greedy_without_cache(STRANGER[:20], NUM_TOKENS)
        assert waiting.tokens == ()
        assert engine.step(), "it waits, and there is more to do"
        go.set()
        assert list(waiting.result().tokens) == right()
        assert engine.stats.prefill_tokens == 20 + len(PROMPT) - WHOLE
        assert_all_returned(engine)


@pytest.mark.parametrize("whole_family", [True, False], ids=["all", "one of two"])
def test_who_waits_for_chunks_may_be_aborted(tmp_path: Path, monkeypatch, whole_family: bool):
    with on_disk(tmp_path) as engine:
        answer(engine)
    with on_disk(tmp_path) as engine:
        go = threading.Event()
        read = DiskTier.read
        monkeypatch.setattr(DiskTier, "read", lambda *of: (go.wait(20), read(*of))[1])
        first, second = (engine.submit(prompt, PARAMS) for prompt in (PROMPT, ALIKE))
        engine.step()
        first.abort()
        if whole_family:
            second.abort()
        stranger = engine.submit(STRANGER[:30], PARAMS)  # in chunks that the others had
        assert list(stranger.result().tokens) == greedy_without_cache(STRANGER[:30], NUM_TOKENS)
        go.set()
        if not whole_family:
            assert list(second.result().tokens) == greedy_without_cache(ALIKE, NUM_TOKENS)
        assert answer(engine) == right()
        assert_all_returned(engine)


def test_chunks_are_computed_where_that_is_faster(tmp_path: Path, monkeypatch):
    engine = on_disk(tmp_path, load="faster", host_memory="1MB")
    known = residency(engine)
    monkeypatch.setattr(known, "_seconds_per_token", lambda: 1e-9)
    answer(engine)
    for times in range(3):
        evict_all(engine)
        assert answer(engine) == right()
        tiers = engine.stats.tiers
        assert tiers is not None
        assert tiers.loaded_from_host == WHOLE, "the first time nothing was known"
        assert tiers.computed_instead >= WHOLE * times
    monkeypatch.setattr(known, "_seconds_per_token", lambda: 1.0)
    evict_all(engine)
    handle = engine.submit(PROMPT, PARAMS)
    assert list(handle.result().tokens) == right()
    assert handle.prompt_use is not None
    assert handle.prompt_use.host == WHOLE
    assert_all_returned(engine)


def test_what_was_slow_once_is_tried_again(monkeypatch):
    engine = small_engine(host_memory="1MB", load="faster")
    known = residency(engine)
    monkeypatch.setattr(known, "_seconds_per_token", lambda: 1.0)
    answer(engine)
    known._seconds[Tier.HOST] = 1e9  # a disk that had to start, say
    used = []
    for _ in range(TRIED_AGAIN):
        counts = Counter({Tier.HOST: 3})
        used.append(known._pays(counts))
    assert used == [False] * (TRIED_AGAIN - 1) + [True]


def test_what_is_sealed_when_the_engine_closes_is_kept(tmp_path: Path):
    with on_disk(tmp_path) as engine:
        handle = engine.submit(PROMPT, SamplingParams(40))
        while len(handle.tokens) < 30:
            engine.step()
        engine._core.drain()
        sealed = engine.stats.chunks_in_use - 1
    assert len(files(tmp_path)) >= sealed - 1


def test_an_engine_may_be_closed_twice_and_after_a_close_that_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = on_disk(tmp_path)
    assert answer(engine) == right()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(residency(engine)._store._writer, "shutdown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    engine.close()
    engine.close()
    assert len(files(tmp_path)) >= WHOLE // CHUNK


def test_a_signals_handler_may_read_what_tiers_do():
    engine = small_engine(host_memory="1MB")
    store = residency(engine)._store
    with store._lock:  # as in the midst of any of its changes
        assert engine.stats.tiers is not None


def test_salts_find_only_their_own(tmp_path: Path):
    with on_disk(tmp_path) as engine:
        answer(engine, salt="ann")
    with on_disk(tmp_path) as engine:
        for salt, found in (("ben", 0), ("", 0), ("ann", WHOLE)):
            before = engine.stats.prompts.disk
            assert answer(engine, salt=salt) == right()
            assert engine.stats.prompts.disk - before == found, salt


OTHERS: dict[str, dict[str, Any]] = {
    "weights": {"model": lambda: reweighted(toy_model())},
    "windows": {"model": windowed_model},
    "dtype": {"dtype": "bfloat16"},
    "codec": {"codec": "int8"},
    "another codec": {"codec": "int4"},
    "selector": {"selector": ChunkSelector(0.4, recent=0, refresh=4, whole=3)},
    "clusters": {"clusters": HeadClusters((2, 3))},
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_is_found_by_another_model_or_cache(tmp_path: Path, other: str):
    """Namespaces are made when the engine is; none of them has to compute anything."""
    plain = small_engine(disk=tmp_path, disk_memory="10MB")
    others = small_engine(disk=tmp_path, disk_memory="10MB", **OTHERS[other])
    names = {residency(engine)._namespace for engine in (plain, others, small_engine_on(tmp_path))}
    assert len(names) == 2
    same = small_engine(disk=tmp_path, disk_memory="10MB", **OTHERS[other])
    assert residency(same)._namespace == residency(others)._namespace


def small_engine_on(folder: Path) -> Engine:
    """With another pool's size and other memory behind it, which do not matter."""
    return small_engine(num_chunks=12, disk=folder, disk_memory="9MB", host_memory="1MB")


def test_new_weights_find_nothing_of_the_old(tmp_path: Path):
    """And the old ones, when they are served again, what they had left."""
    old, new = toy_model(), reweighted(toy_model())
    with on_disk(tmp_path, host_memory="1MB") as engine:
        assert answer(engine) == right()
        evict_all(engine)
        engine.update_weights(new)
        assert answer(engine) == greedy_without_cache(PROMPT, NUM_TOKENS, model=new)
        assert engine.stats.prompts.disk == engine.stats.prompts.host == 0
        engine.update_weights(old)
        assert answer(engine) == right()
        assert engine.stats.prompts.disk == WHOLE


def test_new_weights_that_cannot_be_named_are_not_served_behind_chunks_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = on_disk(tmp_path)
    assert answer(engine) == right()

    def fail() -> None:
        raise MemoryError("no memory to hash them")

    monkeypatch.setattr(residency(engine)._device, "namespace_parts", fail)
    doubled = {name: 2 * np.asarray(array) for name, array in engine.weights.items()}
    with pytest.raises(EngineClosed, match="no memory to hash them"):
        engine.update_weights(doubled)
    with pytest.raises(EngineClosed, match="no memory to hash them"):
        answer(engine)


def test_reset_forgets_everywhere(tmp_path: Path):
    engine = on_disk(tmp_path, host_memory="1MB")
    answer(engine)
    evict_all(engine)
    engine.reset()
    assert files(tmp_path) == []
    answer(engine)
    assert engine.stats.prompts.disk == engine.stats.prompts.host == 0
    assert_all_returned(engine)


def test_chunks_of_a_request_that_runs_come_to_the_disk_before_its_end(tmp_path: Path):
    engine = on_disk(tmp_path)
    handle = engine.submit(PROMPT, SamplingParams(40))
    while len(handle.tokens) < 20:
        engine.step()
    settle(engine)
    assert len(files(tmp_path)) >= (len(PROMPT) + 16) // CHUNK
    handle.result()


KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"codec": "int4"},
    "selector, int4": {
        "codec": "int4",
        "selector": ChunkSelector(0.4, recent=0, refresh=4, whole=3),
    },
    "clusters": {"clusters": HeadClusters((2, 3))},
    "windows": {"model": windowed_model},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "float32" else [pytest.mark.slow]) for kind in KINDS],
)
def test_a_chunk_that_was_on_the_disk_has_the_same_bytes(tmp_path: Path, kind: str):
    def stored(engine: Engine) -> dict[bytes, bytes]:
        """The bytes of all computed chunks in the pool, by their tokens and those before."""
        device, found = engine._core.device, {}
        for node in engine._core.tree.nodes():
            path, above = node.key[8:], node.parent
            while isinstance(above, Node):
                path, above = above.key[8:] + path, above.parent
            read = device.read_chunks([node.chunk_id])
            found[path] = device.chunk_layout.pack(read, 0).tobytes()
        return found

    with on_disk(tmp_path, **KINDS[kind]) as engine:
        first = answer(engine)
        before = stored(engine)
    assert len(before) == (len(PROMPT) + NUM_TOKENS - 1) // CHUNK
    with on_disk(tmp_path, **KINDS[kind]) as engine:
        assert answer(engine) == first
        assert engine.stats.prompts.disk == WHOLE
        after = stored(engine)
    prompts = {path for path in before if len(path) <= 4 * WHOLE}
    assert prompts == {path for path in after if len(path) <= 4 * WHOLE}
    for path in prompts:
        assert before[path] == after[path]


def test_nothing_is_compiled_after_warm_up(tmp_path: Path):
    with on_disk(tmp_path, host_memory="40KB") as engine:
        engine.warm_up()
        compiled = engine.stats.compilations
        for _ in range(2):
            answer(engine)
            evict_all(engine)
        assert answer(engine, prompt=PROMPT[:20])
        tiers = engine.stats.tiers
        assert tiers is not None
        assert tiers.loaded_from_host + tiers.loaded_from_disk
        assert engine.stats.compilations == compiled


# What may go wrong with the disk.


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def denied(folder: Path) -> None:
    for path in files(folder):
        path.unlink()
        path.mkdir()  # that it cannot be read holds for root too


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: [change(path, -5) for path in files(folder)], "read: damaged"),
    "cut": (lambda folder: [path.write_bytes(b"CHUNK") for path in files(folder)], "read: cut"),
    "foreign": (lambda folder: [change(path, 9) for path in files(folder)], "read: of another"),
    "gone": (lambda folder: shutil.rmtree(folder / FOLDER), "read: gone"),
    "unreadable": (denied, "read: is a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_computed_and_told(tmp_path: Path, fault: str):
    break_it, reason = FAULTS[fault]
    with on_disk(tmp_path) as engine:
        answer(engine)
    with on_disk(tmp_path) as engine:
        break_it(tmp_path)
        assert answer(engine) == right()
        assert engine.stats.prefill_tokens == len(PROMPT)
        tiers = engine.stats.tiers
        assert tiers is not None
        assert set(tiers.failures) <= {reason, "write: is a directory"}
        assert tiers.failures[reason]
        assert answer(engine) == right()
        assert_all_returned(engine)


def test_of_a_damaged_chunk_those_before_it_are_still_good(tmp_path: Path):
    with on_disk(tmp_path) as engine:
        answer(engine)
        names = [name for name, _ in residency(engine)._names.values()]
        third = names[2].hex()
    [path] = [path for path in files(tmp_path) if path.stem == third]
    change(path, -1)
    with on_disk(tmp_path) as engine:
        assert answer(engine) == right()
        computed = engine.stats.prefill_tokens
        assert computed == len(PROMPT) - 2 * CHUNK
    with on_disk(tmp_path) as engine:
        assert answer(engine) == right()
        assert engine.stats.prefill_tokens == len(PROMPT) - WHOLE, "it was written again"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "write: no space left on device"),
        (errno.EACCES, "write: permission denied"),
        (errno.EROFS, "write: read-only file system"),
    ],
)
def test_what_cannot_be_written_is_told_and_nobody_fails(tmp_path, monkeypatch, number, reason):
    def fail(self, target):
        raise OSError(number, __import__("os").strerror(number))

    engine = on_disk(tmp_path)
    monkeypatch.setattr(Path, "replace", fail)
    assert answer(engine) == right()
    evict_all(engine)
    assert answer(engine) == right()
    settle(engine)
    tiers = engine.stats.tiers
    assert tiers is not None
    assert set(tiers.failures) == {reason}
    assert tiers.kept_on_disk == tiers.disk_chunks == 0
    monkeypatch.undo()
    evict_all(engine)
    settle(engine)
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.kept_on_disk, "it is tried again"
    assert_all_returned(engine)


def test_a_disk_that_cannot_keep_up_loses_chunks_and_nobody_waits(tmp_path, monkeypatch):
    go = threading.Event()
    write = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *of: (go.wait(20), write(*of))[1])
    monkeypatch.setattr("jax_chunkattn.tiers.store.WAITING_BYTES", 3 * 8192)
    engine = on_disk(tmp_path)
    assert answer(engine) == right()
    evict_all(engine)
    residency(engine)._store.later(lambda: None).result()
    assert answer(engine) == right()
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.not_written
    go.set()
    assert_all_returned(engine)


def test_what_leaves_faster_than_it_is_kept_does_not_fill_the_device(monkeypatch):
    monkeypatch.setattr(tiered, "LEAVING_AT_ONCE", 16)
    monkeypatch.setattr(tiered, "WAIT_SECONDS", 0.01)
    engine = small_engine(host_memory="1MB")
    assert answer(engine) == right()
    go_on = threading.Event()
    residency(engine)._store.later(go_on.wait)  # as if a disk did not answer
    try:
        for one in range(8):
            engine.submit([one] * (6 * CHUNK), SamplingParams(2)).result()
        tiers = engine.stats.tiers
        assert tiers is not None
        assert tiers.failures["keep: too slow"] > 0
        assert 16 <= sum(size for size, _ in residency(engine)._keeping) < 16 + 8
    finally:
        go_on.set()
    settle(engine)
    assert residency(engine)._store._coming == Counter()
    assert answer(engine) == right()
    assert_all_returned(engine)


def test_an_error_of_the_device_loses_what_was_leaving_and_nothing_else(monkeypatch):
    engine = small_engine(host_memory="1MB")
    assert answer(engine) == right()
    pack = type(engine._core.device.chunk_layout).pack
    calls = []

    def fail(*of):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return pack(*of)

    monkeypatch.setattr(type(engine._core.device.chunk_layout), "pack", fail)
    evict_all(engine)
    assert answer(engine) == right()
    tiers = engine.stats.tiers
    assert tiers is not None
    assert tiers.failures["keep: MemoryError"]
    assert_all_returned(engine)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disk": "folder"}, "needs disk and disk_memory"),
        ({"disk_memory": "1MB"}, "needs disk and disk_memory"),
        ({"host_memory": "much"}, "a size is"),
        ({"disk": "folder", "disk_memory": "-1"}, "a size is"),
        ({"load": "never"}, "load must be"),
        ({"host_memory": "1MB", "window_chunks": 20}, "window_chunks is not for"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message: str):
    with pytest.raises(ValueError, match=message):
        CacheConfig(10, **options)


@pytest.mark.parametrize("options", [{"sharing": False}, {"retain": False}])
def test_tiers_are_for_engines_that_cache(options):
    with pytest.raises(ValueError, match="need sharing and retain"):
        small_engine(host_memory="1MB", **options)


def test_tiers_without_room_for_a_chunk_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="a chunk takes 8,192 bytes, host_memory is 1KB"):
        small_engine(host_memory="1KB")
    with pytest.raises(ValueError, match="disk_memory is 8192"):
        small_engine(disk=tmp_path, disk_memory=8192)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        small_engine(disk=tmp_path / "file", disk_memory="1MB")


class Opaque:
    """A part of a model that does not say what is in it."""


class Told(Opaque):
    def __repr__(self) -> str:
        return "Told(theta=10000)"


@pytest.mark.parametrize("part", [Opaque(), lambda x: x], ids=["object", "function"])
def test_a_model_that_does_not_say_what_it_is_gets_no_disk(tmp_path: Path, part):
    """Else two of them might take the other's chunks for their own."""
    model: Any = models.load("random:tiny").model
    model.rope = part
    with pytest.raises(TierError, match="can be told from others"):
        make_engine(10, model=model, disk=tmp_path, disk_memory="1MB")
    assert files(tmp_path) == []
    make_engine(10, model=model, host_memory="1MB")
    model.rope = Told()
    make_engine(10, model=model, disk=tmp_path, disk_memory="1MB")


def test_what_all_prompts_begin_with_stays_on_a_small_disk(tmp_path: Path):
    """Though it is written first, and then found in the pool only."""
    beginning = PROMPT[: 2 * CHUNK]
    tiers = {"disk": tmp_path, "disk_memory": 30 * 8300, "load": "always"}
    prompts = [[*beginning, *[at] * (2 * CHUNK), 1] for at in range(20)]
    with make_engine(**tiers) as engine:
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(1)).result()
            settle(engine)
    with make_engine(**tiers) as engine:
        handle = engine.submit(prompts[-1], SamplingParams(1))
        handle.result()
        assert handle.prompt_use is not None
        assert handle.prompt_use.disk == 4 * CHUNK


def test_names_that_were_announced_and_never_came_are_forgotten():
    engine = small_engine(host_memory="1MB")
    store = residency(engine)._store
    assert isinstance(store, ChunkStore)
    store.announce([b"name"])
    assert store.find(b"name") is not None
    residency(engine).start_over()
    settle(engine)
    assert store.find(b"name") is None
    store.put(b"name", np.zeros(8192, np.uint8), evicted=True)
    assert store.find(b"name") is not None


def test_a_config_without_tiers_has_the_pool_alone():
    config = CacheConfig(10, host_memory="1MB", disk="folder", disk_memory="1MB", load="always")
    assert config.has_tiers
    assert config.without_tiers() == CacheConfig(10)
    assert replace(config, num_chunks=12).without_tiers() == CacheConfig(12)
