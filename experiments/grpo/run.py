"""The work of `grpo`: steps of sampling, learning and serving, each way by itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.grpo import task
from experiments.grpo.config import GrpoConfig
from experiments.grpo.objective import advantages
from experiments.grpo.policy import Policy
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.progress import PhaseDisplay, phase_display
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.state_files import StateFiles
from experiments.harness.units import tell_taken_over
from experiments.harness.views import finish
from models import CheckpointError

PARTS = ("sample", "learn", "serve")
"""What a step takes its time for."""
_SETTING = ("task", "digits", "instructions", "prompts", "samples", "steps", "rate", "seed")


@compilation_cache()
def train(config: GrpoConfig, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    folder.begin(environment)
    blocks = {
        f"{way}, step {end}": (way, begin, end)
        for way in config.ways
        for begin, end in _blocks(config)
    }
    tell_taken_over(folder, blocks)
    trainings = {way: _Training(config, way, folder) for way in config.ways}
    with phase_display() as display:
        for unit, (way, begin, end) in blocks.items():
            if unit not in folder.finished:
                folder.finish_unit(unit, trainings[way].run(begin, end, display))
            if end == config.steps:
                trainings[way].end()
    records = [folder.finished[unit] for unit in blocks]
    ways = {way: _summary([one for one in records if one["way"] == way]) for way in config.ways}
    summary = {
        "experiment": "grpo",
        **{name: getattr(config, name) for name in _SETTING},
        "reward": ways[config.ways[0]]["reward"],
        "ways": ways,
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _blocks(config: GrpoConfig) -> list[tuple[int, int]]:
    """Steps between one save and the next."""
    begins = range(0, config.steps, config.save_every)
    return [(begin, min(begin + config.save_every, config.steps)) for begin in begins]


def _summary(records: list[Record]) -> dict[str, Any]:
    """Of all steps of a way; the reward and what a step takes are of the last that were saved
    together."""
    last = records[-1]
    return {
        "reward": round(float(np.mean(last["rewards"])), 4),
        "exact": round(float(np.mean(last["exact"])), 4),
        "step": round(sum(last["seconds"].values()) / len(last["rewards"]), 4),
        "seconds": round(sum(sum(one["seconds"].values()) for one in records), 2),
        "parts": {part: round(sum(one["seconds"][part] for one in records), 2) for part in PARTS},
        "compile_seconds": round(sum(one["compile_seconds"] for one in records), 2),
        "sampled": sum(one["sampled"] for one in records),
        "learnt_from": sum(one["learnt_from"] for one in records),
    }


class _Training:
    """One way; its policy is made when it is first needed."""

    def __init__(self, config: GrpoConfig, way: str, folder: ResultFolder) -> None:
        self._config = config
        self._way = way
        self._states = StateFiles(folder.path, f"state-{way}")
        self._policy: Policy | None = None

    def run(self, begin: int, end: int, display: PhaseDisplay) -> Record:
        """Steps from `begin` to `end`, after which the state is saved."""
        policy = self._policy_after(begin)
        steps = []
        for step in range(begin, end):
            detail = f"reward {steps[-1]['reward']:.2f}" if steps else ""
            display.update(self._way, step, self._config.steps, detail=detail)
            steps.append(self._step(policy, step))
        policy.save(self._states.path(end))
        self._states.keep(begin, end)  # that of `begin` is needed until this record is written
        return {
            "kind": "steps",
            "way": self._way,
            "step": end,
            "rewards": [round(one["reward"], 5) for one in steps],
            "exact": [round(one["exact"], 5) for one in steps],
            "seconds": {part: round(sum(one[part] for one in steps), 4) for part in PARTS},
            "compile_seconds": round(sum(one["compiled"] for one in steps), 4),
            "sampled": sum(one["sampled"] for one in steps),
            "learnt_from": sum(one["learnt_from"] for one in steps),
        }

    def end(self) -> None:
        """Deletes what only going on needs, and gives up the engine."""
        self._states.keep()
        if self._policy is not None:
            self._policy.close()
            self._policy = None

    def _step(self, policy: Policy, step: int) -> Mapping[str, float]:
        """What it came to, and how long its parts took; compiling apart."""
        config, times = self._config, [time.perf_counter()]
        asked = task.questions(config, step)
        rollouts = policy.sample(step, asked)
        times.append(time.perf_counter())
        answers = rollouts.tokens.reshape(config.prompts, config.samples, -1)
        rewards = task.rewards(config, asked, answers.tolist())
        gains = advantages(rewards).reshape(-1).astype(np.float32)
        learnt_from, compiled = policy.learn(rollouts, gains)
        times.append(time.perf_counter())
        policy.serve()
        times.append(time.perf_counter())
        sample, learn, serve = np.diff(times).tolist()
        return {
            "reward": float(rewards.mean()),
            "exact": float((rewards == 1).mean()),
            "sample": sample,
            "learn": learn - compiled,
            "serve": serve,
            "compiled": compiled,
            "sampled": rollouts.tokens.size,
            "learnt_from": learnt_from,
        }

    def _policy_after(self, step: int) -> Policy:
        """The policy as it was after so many steps: as it is here, or as it was saved."""
        if self._policy is None:
            policy = Policy(self._config, self._way)
            if step:
                self._states.restore(step, policy.restore, unreadable=CheckpointError)
            self._policy = policy
        return self._policy
