"""`python -m experiments cluster`, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.cluster.command import headline, run
from experiments.cluster.config import ClusterConfig, check
from experiments.cluster.views import figures, tables
from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from tests.experiments.results import text_of

DEVICE = {"call": 1e-3, "token": 1e-4, "pair": 1e-8, "step": 3e-3, "row": 5e-4, "read": 3e-7}
SMALL: dict[str, Any] = {"requests": 80, "replicas": (2, 6), "tenants": 4, "pool_tokens": 60_000}


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """What an earlier run would have left."""
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"device": {**DEVICE, "product": 1e-7}}))
    return path


def test_policies_that_look_at_prefixes_find_more_and_all_is_shown(tmp_path: Path, device: Path):
    summary = run(ClusterConfig(device=device, output=tmp_path / "out", **SMALL))
    rates = {(one["policy"], one["replicas"]): one for one in summary["replays"]}
    assert len(rates) == 10
    for policy in ("prefix-hash", "longest-match", "least-work"):
        assert rates[policy, 6]["hit_rate"] > rates["random", 6]["hit_rate"]
    for one in summary["replays"]:
        assert one["requests"] == 80
        assert one["matched"] + one["overloaded"] + one["passed_by"] + one["unmatched"] == 80
        assert 0 < one["hit_rate"] < 1
        assert one["predicted_hit_rate"] == pytest.approx(one["hit_rate"], abs=0.05)
        assert one["busiest_by_mean"] >= 1
        first = one["first_token"]
        assert 0 < first["p50"] <= first["p90"] <= first["p99"]
    shown = headline(summary)
    assert shown["hit rate, random"] == rates["random", 6]["hit_rate"]
    result = read_result(tmp_path / "out")
    assert f"{rates['random', 6]['hit_rate']:.1%}" in text_of(tables(result))
    assert list(figures(result)) == ["fleets"]


def test_two_runs_with_one_seed_are_the_same_but_for_real_time(tmp_path: Path, device: Path):
    some = {**SMALL, "replicas": (3,), "policies": ("random", "longest-match")}
    untimed = []
    for name in ("one", "two"):
        run(ClusterConfig(device=device, output=tmp_path / name, **some))
        shown = tables(read_result(tmp_path / name))
        untimed.append([table.untimed() for table in shown])
    assert untimed[0] == untimed[1]


@pytest.mark.slow
@pytest.mark.thorough
def test_an_engine_is_measured_for_the_model_and_the_model_checked_by_it(tmp_path: Path):
    summary = run(ClusterConfig(**ClusterConfig.SMOKE, output=tmp_path / "out"))
    result = read_result(tmp_path / "out")
    [burst], [fit] = result.of_kind("burst"), result.of_kind("fit")
    assert summary["device"] == fit
    assert burst["seconds"] > burst["first_token"] > 0
    assert 0.1 < burst["seconds_modelled"] / burst["seconds"] < 10
    assert "Check: 24 requests at once" in text_of(tables(result))
    again = run(
        ClusterConfig(device=tmp_path / "out" / "summary.json", output=tmp_path / "2", **SMALL)
    )
    assert again["device"] == fit


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"replicas": (2000,)}, "at most 1,000"),
        ({"replicas": ()}, "--replicas names nothing"),
        ({"policies": ("random", "random")}, "names one twice"),
        ({"policies": ("best",)}, "unknown 'best'"),
        ({"load": 0.0}, "--load must be"),
        ({"pool_tokens": 10}, "less than a chunk"),
        ({"overload_slack": -1.0}, "--overload-slack"),
        ({"trace": Path("x"), "tenants": 3}, "--tenants is not for a --trace"),
        ({"scale": 3}, "power of two"),
        ({"scale": 8}, "for a --trace"),
    ],
    ids=["many", "none", "twice", "unknown", "load", "pool", "slack", "trace", "3", "8"],
)
def test_what_no_run_could_use_is_refused(how: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(ClusterConfig(**how))


@pytest.mark.parametrize("text", ["{", "{}", '{"device": {"call": 1}}', '{"device": 3}'])
def test_a_device_that_is_none_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"no summary\.json of `cluster`"):
        run(ClusterConfig(device=path, output=tmp_path / "out", **SMALL))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        run(ClusterConfig(device=path, output=tmp_path / "out", **SMALL))


def test_a_model_that_is_too_small_to_be_measured_is_refused(tmp_path: Path):
    config = ClusterConfig(model="random:tiny", output=tmp_path / "out", **SMALL)
    with pytest.raises(UserError, match="positions"):
        run(config)
