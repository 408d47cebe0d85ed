"""The work of `train-tiny`: steps of the optimiser, then a checkpoint."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.progress import PhaseDisplay, phase_display
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.state_files import StateFiles
from experiments.harness.training_blocks import blocks_of, run_blocks, seconds_of_steps
from experiments.harness.units import measure_units, tell_taken_over
from experiments.harness.views import finish
from experiments.prompts import given_text, text_name
from experiments.train_tiny.config import TrainTinyConfig
from models import CheckpointError, num_parameters
from models.gpt2_checkpoint import byte_gpt2, write_byte_gpt2
from models.training import Training

MODEL = "model"
"""The folder with the checkpoint, within that of the results."""
SCORED_AT_ONCE = 4
"""Sequences that one call scores."""
PROBE = 8192
"""Of the bytes held out, how many the model is scored with while it is trained."""

_SETTING = ("layers", "heads", "hidden", "context", "steps", "batch", "rate", "seed")


@compilation_cache()
def train(config: TrainTinyConfig, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    text = given_text(config.text)
    work = _Training(config, text, folder)
    folder.begin(environment)
    done = work.run_steps()
    units: dict[str, Callable[[], Record]] = {MODEL: functools.partial(work.write, done)}
    [written] = measure_units(folder, units, "write")
    work.forget_state()
    summary = {
        "experiment": "train-tiny",
        **{name: getattr(config, name) for name in _SETTING},
        "text": text_name(config.text),
        "steps_done": done,
        "bytes_read": done * config.batch * config.context,
        **{name: written[name] for name in ("parameters", "bits_per_byte", "perplexity", "scored")},
        "train_seconds": work.seconds,
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Training:
    """Holds the text and the training, which is taken up when first needed."""

    def __init__(self, config: TrainTinyConfig, text: str, folder: ResultFolder) -> None:
        self._config = config
        self._folder = folder
        self._states = StateFiles(folder.path)
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        needed = config.held_out + 2 * config.context + 1
        if len(tokens) < needed:
            raise UserError(
                f"the text has {len(tokens):,} bytes, and --held-out {config.held_out:,} with "
                f"--context {config.context:,} needs {needed:,}: choose less, or a longer --text"
            )
        self._held_out, self._tokens = tokens[: config.held_out], tokens[config.held_out :]
        self._training: Training | None = None

    @property
    def seconds(self) -> float:
        """What all steps have taken, in this run and in those that it goes on with."""
        return seconds_of_steps(self._folder)

    def run_steps(self) -> int:
        """All steps, or as many as there are minutes for; returns how many."""
        config, folder = self._config, self._folder
        blocks = blocks_of(config.steps, config.save_every)
        tell_taken_over(folder, blocks)
        with phase_display() as display:
            run = functools.partial(self._run_block, display=display)
            return run_blocks(folder, blocks, run, minutes=config.minutes)

    def write(self, step: int) -> Record:
        """The checkpoint of the model after so many steps, and its score on what is held out."""
        began = time.perf_counter()
        training = self._training_after(step)
        bits = self._bits_per_byte(len(self._held_out))
        model = training.model
        write_byte_gpt2(self._folder.path / MODEL, model)
        return {
            "kind": "model",
            "step": step,
            "parameters": num_parameters(model.config),
            "bits_per_byte": bits,
            "perplexity": 2**bits,
            "scored": len(self._held_out_sequences) * self._config.context,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def forget_state(self) -> None:
        """Delete what only going on needs."""
        self._states.keep()

    def _run_block(self, begin: int, end: int, display: PhaseDisplay) -> Record:
        """Steps from `begin` to `end`, after which the state is saved."""
        began = time.perf_counter()
        training = self._training_after(begin)
        losses: list[float] = []
        for step in range(begin, end):
            detail = f"{losses[-1] / math.log(2):.2f} bits a byte" if losses else ""
            display.update("train", step, self._config.steps, detail=detail)
            losses.append(training.step(*self._sequences(step)))
        training.save(self._states.path(end))
        self._states.keep(begin, end)  # that of `begin` is needed until this record is written
        seconds = time.perf_counter() - began
        return {
            "kind": "steps",
            "step": end,
            "bits_per_byte": float(np.mean(losses)) / math.log(2),
            "held_out_bits_per_byte": self._bits_per_byte(PROBE),
            "seconds": round(seconds, 3),
        }

    def _sequences(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of a step, [B, T + 1], and the positions [B] that they begin at.

        The whole text is read, cut anew and in another order each time, before any of it is read
        again.
        """
        config = self._config
        is_short = step < round(config.short_share * config.steps)
        size = config.short if is_short else config.context
        batch = config.batch * config.context // size
        count = (len(self._tokens) - 1) // size - 1
        sequences, begins = [], []
        for number in range(step * batch, (step + 1) * batch):
            time_read, place = divmod(number, count)
            random = np.random.default_rng((config.seed, size, time_read))
            shift = random.integers(size)
            begin = shift + random.permutation(count)[place] * size
            sequences.append(self._tokens[begin : begin + size + 1])
            random = np.random.default_rng((config.seed, size, time_read, place))
            begins.append(random.integers(config.context - size + 1))
        return np.stack(sequences), np.array(begins, np.int32)

    @functools.cached_property
    def _held_out_sequences(self) -> np.ndarray:
        """[N, T + 1], one after another; each begins with the last token of the one before."""
        size = self._config.context
        begins = range(0, len(self._held_out) - size, size)
        return np.stack([self._held_out[begin : begin + size + 1] for begin in begins])

    def _bits_per_byte(self, most: int) -> float:
        """Of the first sequences that are held out, of so many bytes in all or one."""
        assert self._training is not None
        sequences = self._held_out_sequences[: max(1, most // self._config.context)]
        losses = []
        for begin in range(0, len(sequences), SCORED_AT_ONCE):
            some = sequences[begin : begin + SCORED_AT_ONCE]
            padding = (0, SCORED_AT_ONCE - len(some)), (0, 0)
            losses.append(self._training.losses(np.pad(some, padding))[: len(some)])
        return float(np.concatenate(losses).mean(dtype=np.float64)) / math.log(2)

    def _training_after(self, step: int) -> Training:
        """The training as it was after so many steps: as it is here, or as it was saved."""
        if self._training is None:
            config = self._config
            sizes = byte_gpt2(
                layers=config.layers,
                heads=config.heads,
                hidden=config.hidden,
                positions=config.context,
            )
            self._training = Training(
                sizes, steps=config.steps, warmup=config.warmup, rate=config.rate, seed=config.seed
            )
            if step:
                self._states.restore(step, self._training.restore, unreadable=CheckpointError)
        return self._training
