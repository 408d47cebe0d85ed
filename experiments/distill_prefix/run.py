"""The work of `distill-prefix`: answers, steps of the optimiser, then what the prefix is worth."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.distill_prefix.config import DistillPrefixConfig
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
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.prefix_option import tokens_replaced
from experiments.prompts import PromptLine, make_prompts
from jax_chunkattn import CacheConfig, Engine, SamplingParams
from models import CheckpointError, LoadedModel
from models.prefix_training import Examples, PrefixTraining
from models.prefixes import PrefixArrays, save_prefix

PREFIX, FIRST = "prefix", "first"
"""The folder with the prefix, within that of the results; and what it began as."""
ANSWERS = "answers"
MEASURED_AT_ONCE = 4
"""Answers that one call measures."""
SPARE_CHUNKS = 64

_SETTING = ("tokens", "chunk_size", "steps", "batch", "rate", "answers", "max_tokens", "seed")


@compilation_cache()
def distill(
    config: DistillPrefixConfig,
    source: ModelSource,
    system_prompt: str,
    lines: Sequence[PromptLine],
    folder: ResultFolder,
) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    loaded = load_model(source, LoadOptions("float32", config.seed, config.max_positions))
    work = _Distilling(config, loaded, system_prompt, lines, folder)
    folder.begin(environment)
    done = work.run_steps()
    units: dict[str, Callable[[], Record]] = {PREFIX: functools.partial(work.write, done)}
    [written] = measure_units(folder, units, "measure")
    work.forget_state()
    measured = ("divergence", "divergence_at_first", "perplexity", "scored", "bytes")
    summary = {
        "experiment": "distill-prefix",
        "model": loaded.name,
        **{name: getattr(config, name) for name in _SETTING},
        "prompt_tokens": len(work.prompt),
        "questions": len(lines) - config.held_out,
        "held_out": config.held_out,
        "steps_done": done,
        **{name: written[name] for name in measured},
        "train_seconds": work.seconds,
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


class _Distilling:
    """Holds the questions, and the training, which is taken up when first needed."""

    def __init__(
        self,
        config: DistillPrefixConfig,
        loaded: LoadedModel,
        system_prompt: str,
        lines: Sequence[PromptLine],
        folder: ResultFolder,
    ) -> None:
        self._config = config
        self._loaded = loaded
        self._folder = folder
        self._states = StateFiles(folder.path)
        prompts = make_prompts(
            lines, system_prompt, loaded, max_tokens=config.max_tokens, seed=config.seed
        )
        replaced = tokens_replaced(prompts, system_prompt, loaded)
        if replaced < config.tokens:
            raise UserError(
                f"the system prompt has {replaced} tokens: --tokens {config.tokens} virtual ones "
                "would be no fewer"
            )
        self.prompt = prompts.tokens[0][:replaced]
        self._questions = [tokens[replaced:] for tokens in prompts.tokens]
        self._training: PrefixTraining | None = None

    @property
    def seconds(self) -> float:
        """What all steps have taken, in this run and in those that it goes on with."""
        return seconds_of_steps(self._folder)

    def run_steps(self) -> int:
        """All steps, or as many as there are minutes for; returns how many."""
        config, folder = self._config, self._folder
        blocks = blocks_of(config.steps, config.save_every)
        tell_taken_over(folder, dict.fromkeys((ANSWERS, *blocks)))
        with phase_display() as display:
            if ANSWERS not in folder.finished:
                display.update("answer", 0, len(self._questions))
                folder.finish_unit(ANSWERS, self._answer())
            run = functools.partial(self._run_block, display=display)
            return run_blocks(folder, blocks, run, minutes=config.minutes)

    def write(self, step: int) -> Record:
        """The prefix after so many steps, and what it is worth."""
        began = time.perf_counter()
        training = self._training_after(step)
        save_prefix(self._folder.path / PREFIX, training.prefix, base_model=self._loaded.name)
        first = self._new_training()
        prefixes = {PREFIX: training.prefix, FIRST: first.prefix}
        perplexities, scored = self._perplexities(prefixes)
        spec = self._loaded.model.cache_spec
        held = {"prompt": len(self.prompt), PREFIX: self._config.tokens}
        return {
            "kind": "prefix",
            "step": step,
            "divergence": self._divergence(training, self._held_out),
            "divergence_at_first": self._divergence(first, self._held_out),
            "perplexity": perplexities,
            "scored": scored,
            "bytes": {what: 4 * tokens * spec.values_per_token for what, tokens in held.items()},
            "seconds": round(time.perf_counter() - began, 3),
        }

    def forget_state(self) -> None:
        """Delete what only going on needs."""
        self._states.keep()

    def _answer(self) -> Record:
        """Answers of the model to all questions behind the prompt, drawn at temperature 1."""
        began, config = time.perf_counter(), self._config
        params = [
            SamplingParams(
                config.max_tokens, n=config.answers, temperature=1.0, seed=config.seed + index
            )
            for index in range(len(self._questions))
        ]
        prompts = [(*self.prompt, *question) for question in self._questions]
        with self._engine() as engine:
            outputs = list(engine.generate(prompts, params))
        return {
            "kind": ANSWERS,
            "answers": [[list(one.tokens) for one in output.samples] for output in outputs],
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _engine(self) -> Engine:
        """With room for the prompt once, and for all that is answered at a time."""
        config, running = self._config, 16
        longest = config.tokens + max(map(len, self._questions)) + config.max_tokens
        chunks = -(-len(self.prompt) // config.chunk_size) + SPARE_CHUNKS
        chunks += running * (longest // config.chunk_size + 2)
        tokenizer = self._loaded.tokenizer
        return Engine(
            self._loaded.model,
            CacheConfig(chunks, config.chunk_size),
            max_running=running,
            stop_tokens=() if tokenizer is None else tuple(tokenizer.stop_ids),
        )

    def _run_block(self, begin: int, end: int, display: PhaseDisplay) -> Record:
        """Steps from `begin` to `end`, after which the state is saved."""
        training = self._training_after(begin)
        began, losses = time.perf_counter(), []
        for step in range(begin, end):
            detail = f"{losses[-1]:.3f} nats a token" if losses else ""
            display.update("train", step, self._config.steps, detail=detail)
            losses.append(training.step(self._examples.take(self._read_at(step))))
        training.save(self._states.path(end))
        self._states.keep(begin, end)  # that of `begin` is needed until this record is written
        seconds = time.perf_counter() - began
        return {
            "kind": "steps",
            "step": end,
            "divergence": float(np.mean(losses)),
            "held_out_divergence": self._divergence(training, self._held_out),
            "seconds": round(seconds, 3),
        }

    def _read_at(self, step: int) -> list[int]:
        """The examples of a step: all, each time in another order, before one comes again."""
        count, found = len(self._examples.counts), []
        for number in range(step * self._config.batch, (step + 1) * self._config.batch):
            time_read, place = divmod(number, count)
            random = np.random.default_rng((self._config.seed, time_read))
            found.append(int(random.permutation(count)[place]))
        return found

    @functools.cached_property
    def _examples(self) -> Examples:
        """To learn from."""
        return self._examples_of(slice(None, -self._config.held_out))

    @functools.cached_property
    def _held_out(self) -> Examples:
        return self._examples_of(slice(-self._config.held_out, None))

    def _answered(self, which: slice) -> list[tuple[tuple[int, ...], list[int]]]:
        answers = self._folder.finished[ANSWERS]["answers"]
        return [
            (question, answer)
            for question, some in zip(self._questions[which], answers[which], strict=True)
            for answer in some
        ]

    def _examples_of(self, which: slice) -> Examples:
        assert self._training is not None, "taken up before"
        return self._training.examples(self._answered(which))

    @staticmethod
    def _divergence(training: PrefixTraining, examples: Examples) -> float:
        """Nats a token, over all of them."""
        total, count = 0.0, len(examples.counts)
        for begin in range(0, count, MEASURED_AT_ONCE):
            which = range(begin, min(begin + MEASURED_AT_ONCE, count))
            some = examples.take(which)
            total += training.divergence(some) * int(some.counts.sum())
        return total / int(examples.counts.sum())

    def _perplexities(self, prefixes: dict[str, PrefixArrays]) -> tuple[dict[str, float], int]:
        """Of the answers held out, by an engine: behind the prompt, each prefix, and nothing; and
        how many tokens they are."""
        answered = self._answered(slice(-self._config.held_out, None))
        found: dict[str, float] = {}
        with self._engine() as engine:
            for what, before, name in (
                ("prompt", self.prompt, None),
                *((name, (), name) for name in prefixes),
                ("nothing", (), None),
            ):
                if name is not None:
                    arrays = prefixes[name]
                    engine.add_prefix(name, arrays.keys, arrays.values)
                queries = [((*before, *question), [answer]) for question, answer in answered]
                scores = engine.score_batch(queries, learned=name)
                totals = [score.total for [score] in scores]
                found[what] = math.exp(-sum(totals) / sum(len(answer) for _, answer in answered))
        return found, sum(len(answer) for _, answer in answered)

    def _new_training(self) -> PrefixTraining:
        config = self._config
        return PrefixTraining(
            self._loaded.model,
            self.prompt,
            config.tokens,
            steps=config.steps,
            warmup=config.warmup,
            rate=config.rate,
        )

    def _training_after(self, step: int) -> PrefixTraining:
        """The training as it was after so many steps: as it is here, or as it was saved."""
        if self._training is None:
            self._training = self._new_training()
            if step:
                self._states.restore(step, self._training.restore, unreadable=CheckpointError)
        return self._training
