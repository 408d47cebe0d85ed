"""`python -m experiments decode`: how fast a batch decodes, with the prefix shared and without.

Each study varies one thing, and times both sides in turns at every value: tokens per second over
the completion's length (ChunkAttention, arXiv 2402.15220, Figure 3), the batch (its Figure 4), the
shared prefix's length (Hydragen, arXiv 2402.05099), the chunk's size, and the steps of one call to
the device. The side `shared` holds and reads the shared tokens once; `unshared` has a copy of them
for every row.

Decoding alone is timed: the compiled decode loop with plans made beforehand, without compilation,
prefill and the engine's host work (which `engine` measures). The keys and values of the prompts are
random numbers, the same on both sides, since a step takes as long whatever they are: prefill of 32
prompts of 16,384 tokens would take hours. So both sides choose the same tokens, up to rounding,
which is counted. A point that would not fit is skipped, and the reason told.

Besides, a few real prompts (the beginning of the system prompt that ships with this, and questions;
random tokens for a model without a tokenizer) are answered by the engine on both sides, with their
prefill, to see that the tokens are the same.

The default model, `random:small`, has the shape of a small Llama: 15 million parameters, 4 layers
of 8 query and 4 KV heads of 64, 32,768 positions, 8 KiB of float32 KV cache a token. Two cores
decode 32 rows of it at hundreds of tokens a second, and 32 copies of 16,384 tokens fit into 4.3 GB.
Attention's part is larger than in a large model: over 3,600 tokens it takes as many operations as
the products with the weights, in Llama 2 7B over 26,000. `--model smollm2` is a real one: 45 KiB a
token, 8,192 positions. A study takes some minutes.

    python -m experiments decode
    python -m experiments decode --study shared --rounds 5
    python -m experiments decode --study batch --model smollm2 --points 4 8 16
"""

from __future__ import annotations

from typing import Any

from experiments.decode.config import DecodeConfig, check_options
from experiments.decode.points import check_points
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: DecodeConfig) -> dict[str, Any]:
    """Run the study, print its tables, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("decode", config) as folder:
        from experiments.decode.run import measure

        return measure(config, source, folder)


def check(config: DecodeConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_options(config)
    check_points(config)


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """The numbers of a run that a sweep shows, those of its last point."""
    return {
        "tokens/s, shared": summary["shared_tokens_per_second"],
        "tokens/s, unshared": summary["unshared_tokens_per_second"],
        "times as fast": summary["ratio"],
    }


DECODE = Experiment("decode", DecodeConfig, run, check, headline)
