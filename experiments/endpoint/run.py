"""The work of `endpoint`: load, listen, serve, and tell what was served."""

from __future__ import annotations

import errno
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.codecs import codec_for
from experiments.endpoint.byte_tokens import BYTES, ByteTokenizer
from experiments.endpoint.config import EndpointConfig
from experiments.harness.compilations import compilation_cache
from experiments.harness.errors import UserError
from experiments.loading import LoadOptions, load_model, parse_model
from experiments.pool_option import pool_within
from experiments.tier_option import tier_errors, tiers_of
from jax_chunkattn import Engine, KVEvents
from jax_chunkattn.engine.text import Tokenizer
from jax_chunkattn.server.endpoint import Endpoint
from jax_chunkattn.server.limits import Limits
from jax_chunkattn.server.log import Log
from jax_chunkattn.server.orders import ChatTemplate, Served
from jax_chunkattn.server.serving import Server, Serving, bound_to
from jax_chunkattn.server.tenants import Keys, KeysError
from jax_chunkattn.server.tls import TLSError
from models import LoadedModel
from pallas_kernels.implementations import check_device


@compilation_cache()
def serve(config: EndpointConfig) -> dict[str, Any]:
    """Serve until told to stop."""
    check_device(config.implementation)
    keys, serving = _keys(config), _serving(config)
    source = parse_model(config.model)
    with _bound_to(config.host, config.port) as at:
        options = LoadOptions(config.dtype, config.seed, config.max_positions)
        return _serve_at(at, config, load_model(source, options), keys, serving)


def _serve_at(
    at: socket.socket,
    config: EndpointConfig,
    loaded: LoadedModel,
    keys: Keys | None,
    serving: Serving,
) -> dict[str, Any]:
    tokenizer, chat = words_of(loaded)
    events = None if config.kv_events is None else KVEvents()
    with (
        make_engine(config, loaded, tokenizer, events) as engine,
        _published(events, config.kv_events),
    ):
        served = served_of(config.name or config.model, engine, loaded, tokenizer, chat)
        endpoint = Endpoint(
            engine,
            served,
            keys=keys,
            limits=limits_of(config),
            warm_up=_warm_up if config.warm_up else None,
            log_prompts=config.log_prompts,
        )
        server = Server(endpoint, serving, keyed=keys is not None)
        log, began = Log(), time.perf_counter()
        try:
            with _stopped_after(config.seconds, server):
                server.run_until_stopped(lambda url: _tell(url, served), at)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # else somebody else began to listen there first
                raise
            raise _unusable(config.host, config.port, error) from error
        finally:
            log.close()
        return _summary(engine, served, time.perf_counter() - began)


def make_engine(
    config: EndpointConfig,
    loaded: LoadedModel,
    tokenizer: Tokenizer | None,
    events: KVEvents | None = None,
) -> Engine:
    """The engine that is served. Raises UserError for a pool that cannot be, and CodecError."""
    cache, _ = pool_within(
        config.pool_memory,
        loaded.model.cache_spec,
        config.max_running,
        chunk_size=config.chunk_size,
        dtype=config.dtype,
        codec=codec_for(config.codec, loaded.model),
        **tiers_of(config),
    )
    with tier_errors(config):
        return Engine(
            loaded.model,
            cache,
            tokenizer=tokenizer,
            stop_tokens=() if loaded.tokenizer is None else tuple(loaded.tokenizer.stop_ids),
            max_running=config.max_running,
            steps_per_call=config.steps_per_call,
            prefill_tokens=config.prefill_tokens,
            sharing=config.sharing,
            implementation=config.implementation,
            deterministic=config.deterministic,
            kv_events=events,
        )


def words_of(loaded: LoadedModel) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The model's tokenizer and chat template; bytes stand for tokens where it has none and they
    are in its vocabulary."""
    tokenizer = loaded.tokenizer
    if tokenizer is not None:
        return tokenizer, tokenizer.apply_chat_template if tokenizer.template_names else None
    if loaded.config.vocab_size < BYTES:
        return None, None
    print("the model has no tokenizer: bytes stand for tokens", file=sys.stderr)
    words = ByteTokenizer()
    return words, words.write_chat


def served_of(
    name: str,
    engine: Engine,
    loaded: LoadedModel,
    tokenizer: Tokenizer | None,
    chat: ChatTemplate | None,
) -> Served:
    """What clients are told of the model."""
    stats = engine.stats
    return Served(
        name,
        loaded.config.max_positions,
        stats.chunks_free * engine.cache.chunk_size,
        loaded.config.vocab_size,
        tokenizer,
        chat,
        int(time.time()),
    )


def limits_of(config: EndpointConfig) -> Limits:
    return Limits(
        body_bytes=math.ceil(config.body_mib * 2**20),
        prompt_tokens=config.most_prompt_tokens,
        new_tokens=config.most_new_tokens,
        samples=config.most_samples,
        queue=config.queue,
        streams=config.streams,
    )


@contextmanager
def _published(events: KVEvents | None, address: str | None) -> Iterator[None]:
    """What happens in the cache is published while the block runs, where there is an address."""
    if events is None or address is None:
        yield
        return
    try:
        from jax_chunkattn.server.kv_publisher import KVPublisher

        publisher = KVPublisher(events, address)
    except (OSError, ImportError) as error:
        raise UserError(f"--kv-events {address}: {error}") from error
    try:
        yield
    finally:
        publisher.close()


def _keys(config: EndpointConfig) -> Keys | None:
    try:
        return None if config.keys is None else Keys.read(Path(config.keys))
    except KeysError as error:
        raise UserError(f"--keys {error}") from error


def _serving(config: EndpointConfig) -> Serving:
    try:
        return Serving(
            config.host,
            config.port,
            grace=config.grace,
            certificate=config.certificate,
            private_key=config.private_key,
        )
    except TLSError as error:
        raise UserError(str(error)) from error


@contextmanager
def _bound_to(host: str, port: int) -> Iterator[socket.socket]:
    """The address, told before anything is loaded where it cannot be had."""
    with ExitStack() as stack:
        try:
            at = stack.enter_context(bound_to(host, port))
        except OSError as error:
            raise _unusable(host, port, error) from error
        yield at


def _unusable(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--host {host} --port {port}: {error.strerror or error}")


def _warm_up(engine: Engine) -> None:
    engine.warm_up()


def _tell(url: str, served: Served) -> None:
    print(f"{served.name} is served at {url}/v1; the page is {url}/", flush=True)


@contextmanager
def _stopped_after(seconds: float | None, server: Server) -> Iterator[None]:
    """Stops a server when some seconds are over; None never does."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, server.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _summary(engine: Engine, served: Served, seconds: float) -> dict[str, Any]:
    stats = engine.stats
    use = stats.prompts
    return {
        "experiment": "endpoint",
        "model": served.name,
        "seconds": round(seconds, 3),
        "answers": stats.submitted,
        "finished": stats.finished,
        "aborted": stats.aborted,
        "failed": stats.failed,
        "prompt_tokens": {**vars(use), "total": use.num_tokens},
        "decode_tokens": stats.decode_tokens,
        "plan_decision": stats.plan_decision,
    }
