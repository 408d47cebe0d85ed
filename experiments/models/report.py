"""What `models` prints for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from experiments.harness.console import make_console
from experiments.harness.tables import format_bytes
from experiments.mesh_option import mesh_devices
from experiments.models.config import ModelsConfig
from models.parity import NOT_MEASURED, Agreement

_TOO_LONG = "too long"


class ModelsReport:
    """Tables on standard output; plain text where that is not a terminal."""

    def __init__(self):
        self._console = make_console()

    def print(self, config: ModelsConfig, summary: dict[str, Any]) -> None:
        """Architectures, if there are any in the summary; then shapes and memory of the models."""
        if "architectures" in summary:
            self._print_architectures(summary)
        self._print_shapes(config, summary["models"])
        self._print_memory(config, summary)

    def _print_architectures(self, summary: dict[str, Any]) -> None:
        table = Table(title="Architectures that load", title_justify="left")
        table.add_column("architecture", no_wrap=True)
        table.add_column("models", min_width=11)
        table.add_column("GGUF", no_wrap=True)
        for heading in ("cases", "logits\ndiffer by", "greedy\ntokens"):
            table.add_column(heading, justify="right", no_wrap=True)
        for one in summary["architectures"]:
            agreement = one["parity"] and Agreement(**one["parity"])
            table.add_row(
                one["class_name"],
                one["models"],
                "yes" if one["gguf"] else "no",
                str(agreement.cases) if agreement else "0",
                f"{agreement.max_abs_logit_difference:.1e}" if agreement else NOT_MEASURED,
                agreement.tokens_in_words if agreement else "",
            )
        self._console.print(table)
        self._console.print(_measured_with(summary["parity"]), markup=False)

    def _print_shapes(self, config: ModelsConfig, models: list[dict[str, Any]]) -> None:
        title = "Presets: --model random:NAME" if config.model is None else "Shape"
        table = self._model_table(title, config)
        for heading in ("parameters", "layers", "query/KV\nheads", "head\ndim", "context"):
            table.add_column(heading, justify="right", no_wrap=True)
        for one in models:
            table.add_row(
                one["name"],
                f"{one['parameters']:,}",
                str(one["layers"]),
                f"{one['query_heads']}/{one['kv_heads']}",
                str(one["head_dim"]),
                f"{one['max_positions']:,}",
            )
        self._console.print(table)

    def _print_memory(self, config: ModelsConfig, summary: dict[str, Any]) -> None:
        title = f"Memory in {config.dtype}"
        devices = mesh_devices(config.mesh)
        if devices is not None:
            title += f", of each of the {devices} devices of --mesh {config.mesh}"
        table = self._model_table(title, config)
        per_tokens = ("KV of\na token", "KV of\n1,000")
        for heading in ("weights", *per_tokens, "batch,\nshared", "batch,\nunshared"):
            table.add_column(heading, justify="right")  # a wide number may leave its unit below it
        for one in summary["models"]:
            table.add_row(
                one["name"],
                format_bytes(one["weight_bytes"]),
                format_bytes(one["kv_bytes_per_token"]),
                format_bytes(1000 * one["kv_bytes_per_token"]),
                _held(one["kv_bytes_shared"]),
                _held(one["kv_bytes_unshared"]),
            )
        self._console.print(table)
        self._console.print(_batch_in_words(config, summary), markup=False)

    def _model_table(self, title: str, config: ModelsConfig) -> Table:
        table = Table(title=title, title_justify="left")
        # The names of presets are short; a path gives way to the numbers beside it.
        table.add_column("model", no_wrap=config.model is None, overflow="fold")
        return table


def _measured_with(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "How far logits differ from transformers' has not been measured."
    versions = ", ".join(f"{name} {version}" for name, version in parity["versions"].items())
    return (
        "Against transformers, in float32, over tiny checkpoints: the largest difference of all "
        f"cases, and whether greedy decoding chose the same tokens ({versions}; {parity['date']})."
    )


def _held(count: int | None) -> str:
    return _TOO_LONG if count is None else format_bytes(count)


def _batch_in_words(config: ModelsConfig, summary: dict[str, Any]) -> str:
    tokens = config.shared_tokens + config.own_tokens
    one = "1 request" if config.requests == 1 else f"{config.requests:,} requests"
    text = (
        f"batch: {one} of {tokens:,} tokens, of which {config.shared_tokens:,} are the same: "
        f"{summary['chunks_shared']:,} chunks of {config.chunk_size} shared, "
        f"{summary['chunks_unshared']:,} unshared."
    )
    if any(model["kv_bytes_shared"] is None for model in summary["models"]):
        text += f"\n{_TOO_LONG}: {tokens:,} tokens are more than the model's context."
    return text
