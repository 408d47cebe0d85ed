"""What the kernels should reach on an H200, and whether the run shows that they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.gpu import peer_torch
from experiments.gpu.jobs import MOSAIC, unshared
from experiments.gpu.record import MEASURED
from pallas_kernels.specs import PAT_TREES, AttentionCase

PASS, FAIL, UNKNOWN = "pass", "fail", "not measured"
TIMED_PARTS = ("paper", "trees", "hydragen")
HEADLINE = AttentionCase("1,32_4096,64", 32, 32, 128, dtype="bfloat16")
HEADLINE_US = 25.0
LEAST_FRACTION = {"bandwidth": 0.8, "matrix": 0.6}
LARGE_BATCH, LONG_PREFIX = 64, 4096
SLOWDOWN = 1.05
TREES_WON = 16

Timed = Mapping[tuple[str, str], Mapping[str, Any]]


def evaluate(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with its outcome and, in words, why."""
    timed = {
        (record["case"], record["side"]): record
        for record in records
        if record["part"] in TIMED_PARTS and record["status"] == MEASURED and record["unit"] == "us"
    }
    goals = [_headline(timed), _large_cases(timed)]
    goals += [_against_flashinfer(timed, heads) for heads in ((32, 32), (16, 8), (32, 8), (64, 8))]
    return [*goals, _never_slower(timed)]


def _goal(goal: str, outcome: str, detail: str) -> dict[str, Any]:
    return {"goal": goal, "outcome": outcome, "detail": detail}


def _headline(timed: Timed) -> dict[str, Any]:
    goal = f"{HEADLINE.name} in at most {HEADLINE_US:g} us"
    record = timed.get((HEADLINE.name, MOSAIC))
    if record is None:
        return _goal(goal, UNKNOWN, f"no time of {MOSAIC}")
    outcome = PASS if record["value"] <= HEADLINE_US else FAIL
    return _goal(goal, outcome, f"{record['value']:.1f} us")


def _large_cases(timed: Timed) -> dict[str, Any]:
    goal = (
        f"{LEAST_FRACTION['bandwidth']:.0%} of the copy bandwidth or "
        f"{LEAST_FRACTION['matrix']:.0%} of the matrix rate from {LARGE_BATCH} rows and "
        f"{LONG_PREFIX} shared tokens on"
    )
    misses, seen = [], 0
    for (case, side), record in timed.items():
        if side != MOSAIC or record["batch"] < LARGE_BATCH or shared_tokens(case) < LONG_PREFIX:
            continue
        seen += 1
        if record["fraction_of_floor"] < LEAST_FRACTION[record["floor"]]:
            misses.append(f"{case}: {record['fraction_of_floor']:.0%} of {record['floor']}")
    if not seen:
        return _goal(goal, UNKNOWN, "no such case was timed")
    detail = f"{seen - len(misses)} of {seen} cases" + "".join(f"; {miss}" for miss in misses)
    return _goal(goal, FAIL if misses else PASS, detail)


def _against_flashinfer(timed: Timed, heads: tuple[int, int]) -> dict[str, Any]:
    label = f"{heads[0]}/{heads[1]} heads"
    goal = (
        f"not slower than {peer_torch.FLASHINFER} on {TREES_WON} of {len(PAT_TREES)} trees, {label}"
    )
    won = seen = 0
    for tree in PAT_TREES:
        case = AttentionCase(tree, *heads, 128, dtype="bfloat16").name
        ours, theirs = timed.get((case, MOSAIC)), timed.get((case, peer_torch.FLASHINFER))
        if ours and theirs:
            seen += 1
            won += ours["value"] <= theirs["value"]
    if seen < len(PAT_TREES):
        return _goal(goal, UNKNOWN, f"{seen} of {len(PAT_TREES)} trees were timed on both")
    return _goal(goal, PASS if won >= TREES_WON else FAIL, f"{won} of {seen}")


def _never_slower(timed: Timed) -> dict[str, Any]:
    goal = f"never above {SLOWDOWN:g} times our own unshared plan"
    worse, seen = [], 0
    for (case, side), record in timed.items():
        other = timed.get((case, unshared(side).name))
        if other is None:
            continue
        seen += 1
        ratio = record["value"] / other["value"]
        if ratio > SLOWDOWN:
            worse.append(f"{case}: {ratio:.2f}x")
    if not seen:
        return _goal(goal, UNKNOWN, "no case was timed on both")
    detail = f"{seen - len(worse)} of {seen} cases" + "".join(f"; {one}" for one in worse)
    return _goal(goal, FAIL if worse else PASS, detail)


def shared_tokens(case: str) -> int:
    """Tokens that all rows of a case have in common, from its name."""
    nodes, tokens = (part.split(",") for part in case.split()[0].split("_"))
    tokens[-1] = tokens[-1].partition("+")[0]
    return sum(int(t) for n, t in zip(nodes, tokens, strict=True) if n == "1")
