"""The options of `endpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.codecs import CodecName, check_used_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)
from experiments.tier_option import Disk, DiskMemory, HostMemory, check_tiers

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_RUNNING = 4096
"""The device keeps a table of as many rows, and programs that decode them all."""


@dataclass(frozen=True)
class EndpointConfig:
    """Serve a model to any client of OpenAI's interface, and show on a page what requests share."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "port": 0,
        "warm_up": False,
        "seconds": 0.5,
    }

    model: ModelName = "smollm2"

    name: Annotated[str | None, by_default("STR", "that of the model")] = None
    """What clients call the model."""

    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine's own need keys, or `--open`."""

    port: int = 8000
    """Port to listen at; 0 takes one that is free."""

    keys: Annotated[Path | None, by_default("FILE", "everybody may ask")] = None
    """A file of API keys, NAME KEY a line. Tenants of different names share nothing; one that is
    NAME KEY observer may see the tree and the metrics of all."""

    open: bool = False
    """Let everybody ask who reaches another address than this machine's own."""

    certificate: Annotated[Path | None, by_default("FILE", "no TLS")] = None
    """A certificate for TLS, with its chain."""

    private_key: Annotated[Path | None, by_default("FILE", "in the certificate's file")] = None
    """The certificate's key."""

    pool_memory: str = "1GiB"
    """Size of the KV pool, such as 500MB or 2GiB."""

    host_memory: HostMemory = None

    disk: Disk = None

    disk_memory: DiskMemory = "20GiB"
    """What files in the folder of `--disk` may take."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache; prefixes are shared in whole chunks."""

    codec: CodecName = "identity"

    max_running: int = 64
    """The most answers decoded at once; others wait."""

    steps_per_call: int = 8
    """Tokens decoded for each answer in one call to the device: a stream's pieces."""

    prefill_tokens: Literal[32, 128, 512] = 512
    """The most prompt tokens computed between two decode calls."""

    sharing: bool = True
    """Store and read the KV cache of a shared prefix once."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    implementation: AttentionImplementation = None

    deterministic: bool = False
    """Compute each token to the same bits whatever else is computed with it; on CPUs."""

    warm_up: bool = True
    """Compile every program before the first request, but those of scores, which `/v1/score` and
    `echo` with `logprobs` ask for; `/ready` says when that is done."""

    queue: int = 256
    """Answers that may wait for their first token; who comes then is told to come again."""

    streams: int = 256
    """Answers of one key at once."""

    most_samples: int = 64
    """The most answers to one prompt, `n`."""

    most_prompt_tokens: Annotated[int | None, by_default("INT", "as the model and pool have")] = (
        None
    )
    """The most tokens of a prompt."""

    most_new_tokens: Annotated[int | None, by_default("INT", "as the model and pool have")] = None
    """The most tokens that an answer may ask for."""

    body_mib: float = 4.0
    """The largest body of a request, in MiB."""

    kv_events: Annotated[str | None, by_default("ADDRESS", "not published")] = None
    """Publish by ZeroMQ what the cache gains and loses, as vLLM does, at tcp://127.0.0.1:5557, say.
    All tenants' prompts are in it."""

    grace: float = 30.0
    """Seconds that answers may go on after the first Ctrl-C; the second ends them at once."""

    log_prompts: bool = False
    """Log requests as they came, with all that is in them."""

    seconds: Annotated[float | None, by_default("FLOAT", "until Ctrl-C")] = None
    """Serve for so long."""

    seed: int = 0
    """Seed of random weights."""


def check(config: EndpointConfig) -> None:
    """Raise `UserError` for options that no server could use."""
    check_at_least_one(
        config,
        "chunk_size",
        "max_running",
        "steps_per_call",
        "max_positions",
        "queue",
        "streams",
        "most_samples",
        "most_prompt_tokens",
        "most_new_tokens",
    )
    if config.max_running > MOST_RUNNING:
        raise UserError(f"--max-running must be at most {MOST_RUNNING}, got {config.max_running}")
    check_above_zero(config, "body_mib", "seconds")
    check_used_codec(config.codec)
    check_tiers(config, sharing=config.sharing)
    check_seed(config.seed)
    if not 0 <= config.port < 1 << 16:
        raise UserError(f"--port must be from 0 to 65535, got {config.port}")
    if not 0 <= config.grace < float("inf"):
        raise UserError(f"--grace must be a number of seconds from 0 up, got {config.grace}")
    if config.host not in LOOPBACK and config.keys is None and not config.open:
        raise UserError(
            f"--host {config.host} lets everybody ask who reaches it: give --keys FILE, or --open"
        )
    if config.private_key is not None and config.certificate is None:
        raise UserError("--private-key is of a --certificate")
    for name in ("certificate", "private_key"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise UserError(f"--{name.replace('_', '-')} {path}: there is no such file")
