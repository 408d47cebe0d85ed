"""`python -m experiments grpo`, small, and the parts it is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.grpo import objective, task
from experiments.grpo import run as grpo_run
from experiments.grpo.command import headline, run
from experiments.grpo.config import GrpoConfig, check
from experiments.grpo.views import figures, tables
from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from tests.experiments.results import text_of

SMALL: dict[str, Any] = GrpoConfig.SMOKE


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, but for times."""
    timed = ("seconds", "compile_seconds")
    records = read_result(folder).of_kind("steps")
    return [{name: one[name] for name in one if name not in timed} for one in records]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    run(GrpoConfig(**SMALL, output=folder))
    return folder


@pytest.mark.slow
def test_both_ways_get_the_same_rewards_and_sharing_learns_from_fewer_tokens(trained: Path):
    shared, unshared = (steps_of(trained)[index : index + 2] for index in (0, 2))
    for one, other in zip(shared, unshared, strict=True):
        assert one["step"] == other["step"]
        assert one["rewards"] == other["rewards"]
        assert one["sampled"] == other["sampled"] == 2 * 2 * 3 * 2
        assert other["learnt_from"] == 2 * 2 * 3 * (20 + 2 + 2 + 2)
        assert one["learnt_from"] < other["learnt_from"] / 3
    summary = read_result(trained).summary
    assert summary is not None
    assert headline(summary)["reward"] == summary["ways"]["shared"]["reward"]
    assert not list(trained.glob("*.npz"))
    text = text_of(tables(read_result(trained)))
    assert "GRPO: to copy 2 digits" in text
    assert "unshared: every sample by itself." in text
    assert list(figures(read_result(trained))) == ["picture"]


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = grpo_run._Training._step

    def broken_off(self: Any, policy: Any, number: int) -> Any:
        if number == 3 and self._way == "shared":
            raise KeyboardInterrupt
        return step(self, policy, number)

    config = GrpoConfig(**SMALL, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(grpo_run._Training, "_step", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert len(steps_of(tmp_path / "out")) == 1
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == ["state-shared-000002.npz"]
    run(config)
    assert steps_of(tmp_path / "out") == steps_of(trained)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.optimised
def test_the_policy_learns(tmp_path: Path):
    """From guessing, one digit in sixteen, to copying most."""
    sizes = {"instructions": 4, "steps": 300, "ways": ("shared",)}
    summary = run(GrpoConfig(**sizes, output=tmp_path / "out"))
    assert steps_of(tmp_path / "out")[0]["rewards"][0] < 0.2
    assert summary["reward"] > 0.5


def test_rewards_are_the_share_of_digits_that_are_right():
    config = GrpoConfig(task="sort", digits=3)
    found = task.rewards(config, [[3, 1, 2]], [[[1, 2, 3], [3, 1, 2], [1, 9, 3]]])
    np.testing.assert_allclose(found, [[1, 0, 2 / 3]])
    reverse = replace(config, task="reverse")
    np.testing.assert_allclose(task.rewards(reverse, [[3, 1, 2]], [[[2, 1, 3]]]), [[1]])


def test_each_step_has_questions_of_its_own_behind_the_same_instructions():
    config = GrpoConfig(instructions=5)
    one, other = (task.questions(config, step) for step in (0, 1))
    assert one == task.questions(config, 0) != other
    prompt = task.prompt_of(config, one[0])
    assert len(prompt) == config.prompt_tokens
    assert prompt[:5] == task.prompt_of(config, other[0])[:5]


def test_advantages_are_of_a_group_and_none_where_all_are_alike():
    found = objective.advantages(np.array([[0.0, 1.0], [0.5, 0.5]]))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-5)


def test_the_loss_is_that_of_the_paper():
    """Equation 3 with one token more or less, in float64 NumPy."""
    random = np.random.default_rng(0)
    logprobs, sampled, reference = -random.random((3, 4, 5))
    advantage = np.array([1.0, -1.0, 0.5, 0.0])
    mask = np.arange(5)[None] < np.array([5, 3, 1, 4])[:, None]
    terms = []
    for row, column in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(logprobs[row, column] - sampled[row, column])
        clipped = min(max(ratio, 0.8), 1.2)
        gain = min(ratio * advantage[row], clipped * advantage[row])
        off = reference[row, column] - logprobs[row, column]
        terms.append(gain - 0.1 * (np.exp(off) - off - 1))
    one, two, three, gain = (
        jnp.asarray(x, jnp.float32) for x in (logprobs, sampled, reference, advantage)
    )
    found = objective.loss(one, two, three, gain, jnp.asarray(mask), clip=0.2, kl=0.1)
    np.testing.assert_allclose(found, -np.mean(terms), rtol=1e-5)


def test_on_the_policy_that_sampled_the_gradient_is_that_of_reinforce():
    logprobs = jnp.array([[-1.0, -2.0], [-0.5, -3.0]])
    advantage = jnp.array([1.0, -1.0])
    mask = jnp.ones((2, 2), bool)

    def loss(given: jax.Array) -> jax.Array:
        return objective.loss(given, logprobs, logprobs, advantage, mask, clip=0.2, kl=0.0)

    np.testing.assert_allclose(jax.grad(loss)(logprobs), [[-0.25] * 2, [0.25] * 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 1}, "--samples must be at least 2"),
        ({"hidden": 48}, "--hidden must be a multiple of 32"),
        ({"kl": float("inf")}, "--kl must be a number from 0 up"),
        ({"kl": -1.0}, "--kl must be a number from 0 up"),
        ({"ways": ()}, "--ways must name one or both"),
        ({"ways": ("shared", "shared")}, "--ways must name one or both"),
        ({"rate": 0.0}, "--rate must be a number above 0"),
        ({"digits": 0}, "--digits must be at least 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(GrpoConfig(**wrong))
