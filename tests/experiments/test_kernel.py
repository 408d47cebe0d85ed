"""`python -m experiments kernel`, small."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from experiments.cli import main
from experiments.harness import plotting, timing
from experiments.harness.errors import UserError
from experiments.harness.reading import Result, read_result
from experiments.kernel import cases as kernel_cases
from experiments.kernel import operands as kernel_operands
from experiments.kernel import run as kernel_run
from experiments.kernel import sides as kernel_sides
from experiments.kernel import skips as kernel_skips
from experiments.kernel.cases import SizedCase, divided, suite_cases
from experiments.kernel.command import headline, run
from experiments.kernel.config import CODED, SCALES, Implementation, KernelConfig, Suite
from experiments.kernel.published import published_speedups
from experiments.kernel.views import figures, tables
from pallas_kernels import specs
from pallas_kernels.chunk_attention import IMPLEMENTATIONS
from pallas_kernels.implementations import COMPILED_HERE
from pallas_kernels.specs import PAPER, AttentionCase
from pallas_kernels.targets import A100, use_target
from tests.interpreted import skip_unless_there

SHARED = AttentionCase("1,6_64,16", 4, 2, 16, chunk_size=16, ragged=20)
UNSHARED = AttentionCase("3_40", 2, 2, 16, chunk_size=16)
NAMED = get_args(Implementation)
# Without those that need a GPU, or a codec.
ALL = tuple(name for name in NAMED[2:] if name not in CODED)
RUN = tuple(name for name in ALL if name != "torch-sdpa" or importlib.util.find_spec("torch"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {"smoke": (SHARED, UNSHARED), "paper": (SHARED,)}
    monkeypatch.setattr(timing, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(kernel_cases, "SUITES", {**kernel_cases.SUITES, **suites})


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are made and not written, which is what takes long."""
    monkeypatch.setattr(plotting, "save_figures", lambda folder, figures: [])


def measured(case: AttentionCase, *names: Implementation, **config: Any) -> dict[str, Any]:
    settings = KernelConfig(implementations=names, repeats=1, **config)
    return kernel_run.measure_case(SizedCase(case, case), settings, names)


@pytest.mark.usefixtures("undrawn")
def test_the_small_form_runs_one_case_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_cases, "SUITES", {"smoke": specs.SMOKE})
    summary = run(KernelConfig(**KernelConfig.SMOKE, output=tmp_path / "out"))
    assert (summary["cases"], summary["scale"], summary["ours"]) == (1, 8, "xla")
    assert all(side["cases"] == 1 for side in summary["sides"].values())


@pytest.mark.slow
def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    arguments = ["--suite", "paper", "--repeats", "2", "--seed", "3", "--output", str(output)]
    assert main(["kernel", *arguments]) == 0
    text = capsys.readouterr().out
    result = read_result(output)
    summary = result.summary or {}
    assert (summary["experiment"], summary["suite"], summary["seed"]) == ("kernel", "paper", 3)
    assert (summary["cases"], summary["scale"], summary["scaling"]) == (1, 1, None)
    assert summary["environment"]["platform"] == "cpu"
    (record,) = result.of_kind("case")
    check_record(record, SHARED)
    assert record["plan"]["shared"]
    for name, side in summary["sides"].items():
        assert (side["cases"], side["skipped"]) == ((1, 0) if name in RUN else (0, 1))
    assert headline(summary)["speed-up over paged"] == summary["sides"]["paged"]["ours_faster"]
    assert (output / "picture.png").stat().st_size > 10_000

    for words in (SHARED.name, *ALL, "matrix product", "of matmul", "max error"):
        assert words in text
    assert record["plan"]["reason"] in text


def check_record(record: dict[str, Any], case: AttentionCase) -> None:
    """Every number is there and the derived ones follow from the measured ones."""
    assert (record["case"], record["tree"]) == (case.name, case.tree)
    assert {skip["implementation"] for skip in record["skipped"]} == {*ALL} - {*RUN}
    assert record["flops"] == 4 * case.num_heads * case.head_dim * record["tokens_attended"]
    assert record["distinct_kv_bytes"] <= record["unshared_kv_bytes"]
    read = record["memory_read"]
    bandwidth = read["bytes"] / read["milliseconds"]["median"]
    assert read["distinct_kv_milliseconds"] == pytest.approx(
        record["distinct_kv_bytes"] / bandwidth, rel=2e-3
    )
    product = record["matmul"]["same_flops_milliseconds"]
    floor = max(product, read["distinct_kv_milliseconds"])
    assert record["floor"]["milliseconds"] == floor
    sides = {side["implementation"]: side for side in record["implementations"]}
    assert tuple(sides) == RUN
    paged = sides["paged"]["milliseconds"]["median"]
    for side in sides.values():
        times = side["milliseconds"]
        assert 0 < times["least"] <= times["median"] <= times["most"]
        assert side["of_matmul"] == pytest.approx(product / times["median"], rel=2e-3)
        assert side["of_floor"] == pytest.approx(floor / times["median"], rel=2e-3)
        assert side["speedup_over_paged"] == pytest.approx(paged / times["median"], rel=2e-3)
        assert 0 < side["max_error"] < 2e-6


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = KernelConfig(implementations=("paged", "dense"), repeats=1, output=tmp_path / "broken")
    measure = kernel_run.measure_case
    asked: list[AttentionCase] = []

    def interrupted(sized: SizedCase, *rest: Any) -> dict[str, Any]:
        asked.append(sized.case)
        if asked == [SHARED, UNSHARED]:
            raise KeyboardInterrupt
        return measure(sized, *rest)

    monkeypatch.setattr(kernel_run, "measure_case", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run(config)
    run(config)
    assert asked == [SHARED, UNSHARED, UNSHARED]

    whole = tmp_path / "whole"
    run(dataclasses.replace(config, output=whole))
    broken, in_one = (tables(read_result(path)) for path in (tmp_path / "broken", whole))
    assert [table.untimed() for table in broken] == [table.untimed() for table in in_one]
    assert any("max error" in str(table.untimed()) for table in broken)


def test_tokens_that_rows_share_are_counted_once():
    record = measured(SHARED, "xla")
    own = record["tokens_attended"] - 6 * 64
    bytes_per_token = 2 * 2 * 16 * 4
    assert record["distinct_kv_bytes"] == (64 + own) * bytes_per_token
    assert record["unshared_kv_bytes"] == (6 * 64 + own) * bytes_per_token
    assert record["implementations"][0]["speedup_over_paged"] is None


def test_a_wrong_output_shows_in_the_error(monkeypatch: pytest.MonkeyPatch):
    real = kernel_sides.dense_attention
    monkeypatch.setattr(kernel_sides, "dense_attention", lambda *args: real(*args) + 0.25)
    record = measured(UNSHARED, "dense")
    assert record["implementations"][0]["max_error"] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_what_does_not_fit_is_skipped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel_skips, "REFERENCE_SCORES", 100)
    pool, copies = kernel_operands.pool_bytes(SHARED), kernel_operands.copies_bytes(SHARED)
    names: tuple[Implementation, ...] = ("xla", "paged", "dense", "jax-dpa", "reference")
    output = tmp_path / "out"
    run(KernelConfig("paper", names, repeats=1, memory_gb=(pool + copies) / 1e9, output=output))
    (record,) = read_result(output).of_kind("case")
    assert [side["implementation"] for side in record["implementations"]] == ["xla", "paged"]
    assert [skip["implementation"] for skip in record["skipped"]] == [
        "dense",
        "jax-dpa",
        "reference",
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped dense: its copies take" in printed
    assert "skipped reference: it would score every query" in printed
    assert "skipped jax-dpa, 1 of 1 cases, first because its copies take" in printed


SIDES_WITH_CODES: list[tuple[Implementation, ...]] = [
    ("xla", "xla-int8", "xla-int4"),
    ("native", "native-int8", "native-int4"),
]


@pytest.mark.parametrize("sides", SIDES_WITH_CODES, ids=lambda sides: sides[0])
def test_encoded_chunks_are_fewer_bytes_and_off_by_what_the_codec_is(sides):
    skip_unless_there(sides[0])
    record = measured(SHARED, *sides)
    exact, int8, int4 = record["implementations"]
    assert exact["max_error"] < 1e-6 < 1e-4 < int8["max_error"] < int4["max_error"] < 0.2
    assert exact["distinct_kv_bytes"] == record["distinct_kv_bytes"]
    assert exact["distinct_kv_bytes"] > int8["distinct_kv_bytes"] > int4["distinct_kv_bytes"]
    lengths = kernel_operands.make_operands(SHARED, 0).row_lengths
    tails = sum((length - 1) % 16 + 1 for length in lengths)
    full = 4 + sum((length - 1) // 16 - 4 for length in lengths)  # four of them shared
    of_chunk = 2 * 16 * 16 + 2 * 16 * 2 * 2  # keys and values: codes, and pairs of float16
    assert int8["distinct_kv_bytes"] == 2 * (full * of_chunk + tails * 2 * 16 * 4)


def test_a_codec_that_cannot_store_the_case_is_skipped_and_said():
    odd = dataclasses.replace(SHARED, head_dim=15)
    [skip] = measured(odd, "xla-int4")["skipped"]
    assert "15 numbers of 4 bits do not fill bytes" in skip["reason"]


def test_kernels_without_a_gpu_are_skipped_and_said():
    record = measured(SHARED, "pallas_triton", "xla")
    assert [side["implementation"] for side in record["implementations"]] == ["xla"]
    (skip,) = record["skipped"]
    assert skip["implementation"] == "pallas_triton"
    assert "needs an NVIDIA GPU, and the device is 'cpu'" in skip["reason"]


def test_baselines_skip_scores_that_they_do_not_know():
    names = [name for name in ALL if name not in ("xla-unshared", "reference")]
    record = measured(dataclasses.replace(SHARED, softcap=3.0, scale=1.0), *names)
    assert [side["implementation"] for side in record["implementations"]] == names[:3]
    assert all(0 < side["max_error"] < 2e-6 for side in record["implementations"])
    reasons = {skip["implementation"]: skip["reason"] for skip in record["skipped"]}
    assert reasons == dict.fromkeys(names[3:], "it knows neither a softcap nor a scale of its own")


@pytest.mark.parametrize(
    ("case", "name", "reason"),
    [
        (AttentionCase("2,5_16,16", 2, 2, 16), "cascade", "different numbers of rows"),
        (dataclasses.replace(UNSHARED, dtype="float16"), "jax-dpa", "float16 on a CPU"),
    ],
)
def test_what_a_baseline_cannot_do_is_said(case: AttentionCase, name: str, reason: str):
    assert reason in kernel_skips.skip_reasons(case, [name], 1.0)[name]  # pyright: ignore[reportArgumentType]


def test_pytorch_that_is_missing_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_skips, "torch_missing", lambda: "pip install torch")
    reasons = kernel_skips.skip_reasons(UNSHARED, ["torch-sdpa"], 1.0)
    assert reasons == {"torch-sdpa": "pip install torch"}


def test_gpu_kernels_are_planned_for_and_checked():
    target = dataclasses.replace(A100, interpret=True)
    with use_target(target):
        for_gpus = tuple(name for name in ALL if name not in COMPILED_HERE)
        assert kernel_skips.runnable_implementations() == (*NAMED[:2], *for_gpus)
        (side,) = measured(SHARED, "pallas_triton")["implementations"]
    assert 0 < side["max_error"] < 2e-6


def test_a_pool_that_does_not_fit_skips_the_case(tmp_path: Path):
    output = tmp_path / "out"
    summary = run(KernelConfig("paper", ALL, repeats=1, memory_gb=1e-9, output=output))
    (record,) = read_result(output).of_kind("case")
    assert record["implementations"] == []
    assert record["plan"] is None
    assert [skip["implementation"] for skip in record["skipped"]] == list(ALL)
    assert "above --memory-gb" in record["skipped"][0]["reason"]
    assert headline(summary)["speed-up over paged"] is None
    assert not (output / "picture.png").exists()


def test_bytes_are_those_of_the_operands():
    operands = kernel_operands.make_operands(SHARED, seed=0)
    num_chunks = operands.keys.shape[2]
    used = (num_chunks - 3) / num_chunks  # three are to spare
    assert used * 2 * operands.keys.nbytes <= kernel_operands.pool_bytes(SHARED)
    assert sum(x.nbytes for x in operands.copies) <= kernel_operands.copies_bytes(SHARED)


@pytest.mark.parametrize(
    ("tree", "divisor", "smaller"),
    [
        ("1,1024_2048,32", 8, "1,128_256,16"),
        ("256_4096", 8, "32_512"),
        ("1,10_4096,416", 8, "1,10_512,64"),
        ("1,4,16,64,256,1024_256,32,256,64,32,256", 8, "1,4,16,64,256,512_32,16,32,16,16,32"),
        ("1,512_1024,0", 16, "1,32_64,0"),
    ],
)
def test_divided_trees_keep_their_branches(tree: str, divisor: int, smaller: str):
    case = divided(AttentionCase(tree, 32, 8, 128), divisor)
    assert (case.tree, case.chunk_size) == (smaller, 16)
    assert divided(AttentionCase(tree, 32, 8, 128), 1).tree == tree


@pytest.mark.usefixtures("undrawn")
def test_a_division_is_told_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    config = KernelConfig("paper", ("paged",), scale=4, heads=("2/1",), repeats=1, output=output)
    summary = run(config)
    (record,) = read_result(output).of_kind("case")
    assert (record["tree"], record["full_tree"], record["divided_by"]) == (
        "1,6_16,16",
        SHARED.tree,
        4,
    )
    assert (record["num_heads"], record["num_kv_heads"]) == (2, 1)
    assert (summary["scale"], "divided by 4" in summary["scaling"]) == (4, True)
    assert capsys.readouterr().out.count("sizes divided by 4") == 2


def test_a_tree_that_the_suite_does_not_have_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"--only 1,2_3,4: .* no such tree; it has 1,6_64,16 3_40"):
        run(KernelConfig(only=(SHARED.tree, "1,2_3,4"), output=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    (sized,) = suite_cases(KernelConfig(only=("3_40",)))
    assert sized.full == UNSHARED


def test_heads_head_size_and_dtype_replace_the_suites():
    config = KernelConfig("trees", heads=("8/1", "4/4"), head_dim=64, dtype="bfloat16")
    cases = [sized.full for sized in suite_cases(config)]
    assert len(cases) == 2 * len(specs.PAT_TREES)
    assert {(case.num_heads, case.num_kv_heads) for case in cases} == {(8, 1), (4, 4)}
    assert {(case.head_dim, case.dtype) for case in cases} == {(64, "bfloat16")}


@pytest.mark.parametrize(
    "arguments", [["--suite", "huge"], ["--implementations", "magic"], ["--repeats", "many"]]
)
def test_unknown_names_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["kernel", *arguments])
    assert exit_info.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--memory-gb", "nan"], "--memory-gb must be a number above 0, got nan"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--implementations", "xla", "xla"], "--implementations names one twice: xla xla"),
        (["--implementations"], "--implementations names nothing"),
        (["--only"], "--only names no trees"),
        (["--scale", "0"], "--scale must be at least 1, got 0"),
        (["--heads", "32/8", "8/3"], "--heads 8/3: give query heads and KV heads that divide"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["kernel", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"suite": "huge"}, {"implementations": ("magic",)}])
def test_unknown_names_from_python_are_refused(wrong: dict[str, Any], tmp_path: Path):
    with pytest.raises(
        UserError, match=r"unknown '(huge|magic)'; known: (smoke|pallas_mosaic_gpu)"
    ):
        run(KernelConfig(**wrong, output=tmp_path / "out"))


def test_every_implementation_can_be_named():
    assert set(NAMED) >= set(IMPLEMENTATIONS)
    assert set(NAMED) == set(kernel_sides.SIDES)
    assert set(get_args(Suite)) == set(kernel_cases.SUITES) == set(SCALES)


def test_the_paper_suite_is_the_grid_of_table_3():
    assert len(PAPER) == 9
    for case in PAPER:
        assert (case.batch, case.num_heads, case.num_kv_heads) == (32, 32, 32)
        assert (case.head_dim, case.chunk_size, case.dtype) == (128, 64, "float32")
    assert PAPER[-1].tree == "1,32_4096,64"
    published = [published_speedups(dataclasses.asdict(case), "xla") for case in PAPER]
    assert all(speedups["xla"] > speedups["paged-shared-pages"] for speedups in published)
    assert published[-1]["xla"] == pytest.approx(1400 / 206)
    assert published_speedups(dataclasses.asdict(SHARED), "xla") == {}


def test_the_other_suites_are_their_benchmarks():
    trees = [sized.full for sized in suite_cases(KernelConfig("trees", scale=1))]
    assert len(set(trees)) == 20 * 4
    hydragen = [sized.case.tree for sized in suite_cases(KernelConfig("hydragen"))]
    assert hydragen[:5] == [f"1,64_128,{suffix}" for suffix in (0, 16, 32, 48, 64)]
    assert len(hydragen) == 4 * 5


def made_up(suite: str, cases: Sequence[AttentionCase]) -> Result:
    """A result in which cascade takes twice and paged four times what ours takes."""
    lines = []
    for case in cases:
        sides = [
            {
                "implementation": name,
                "milliseconds": {"median": ms, "least": ms, "most": ms},
                "of_floor": 1 / ms,
                "max_error": 1e-7,
            }
            for name, ms in (("xla", 2.0), ("cascade", 4.0), ("paged", 8.0))
        ]
        lines.append(
            {
                "kind": "case",
                "case": case.name,
                **dataclasses.asdict(case),
                "batch": case.batch,
                "full_tree": case.tree,
                "divided_by": 1,
                "plan": {"chunk_reads": 25, "unshared_chunk_reads": 100},
                "implementations": sides,
                "skipped": [{"implementation": "dense", "reason": "it is too large"}],
                "floor": {"milliseconds": 1.0},
            }
        )
    header = {
        "experiment": "kernel",
        "config": {"suite": suite, "dtype": "float32"},
        "ours": "xla",
        "scaling": None,
    }
    return Result(Path(), header, lines, None)


def test_many_cases_are_one_table_and_one_summary():
    result = made_up("trees", kernel_cases.TREES)
    overview, sides = tables(result)
    assert [len(section) for section in overview.sections] == [20] * 4
    assert overview.rows[0] == ("1,10_4096,416", "32/32", "25%", "2", "4", "8", "1")
    assert [row[3] for row in sides.rows] == ["1.00x", "2.00x", "4.00x", ""]
    assert "skipped dense, 80 of 80 cases, first because it is too large" in sides.notes


def test_the_picture_shows_every_case_and_implementation():
    panels = figures(made_up("trees", kernel_cases.TREES))["picture"].axes
    assert [axes.get_title() for axes in panels] == [f"{h}/{k} heads" for h, k in specs.PAT_HEADS]
    by_name = {line.get_label(): line for line in panels[0].lines}
    np.testing.assert_array_equal(by_name["paged"].get_xdata(), np.full(20, 4.0))
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(specs.PAT_TREES)

    panels = figures(made_up("hydragen", kernel_cases.HYDRAGEN))["picture"].axes
    by_name = {line.get_label(): line for line in panels[3].lines}
    np.testing.assert_array_equal(by_name["cascade"].get_xdata(), range(0, 513, 128))
    np.testing.assert_array_equal(by_name["cascade"].get_ydata(), np.full(5, 4.0))

    figure = figures(made_up("paper", PAPER))["picture"]
    assert [container.get_label() for container in figure.axes[0].containers] == [
        "xla",
        "cascade",
        "paged",
    ]
    (legend,) = figure.legends
    assert "published, A100 fp16" in legend.get_texts()[-1].get_text()


@pytest.mark.parametrize("suite", ["smoke", "trees", "hydragen"])
@pytest.mark.parametrize("measured", [["reference"], []])
def test_there_is_no_picture_of_the_reference_alone(suite: str, measured: list[str]):
    result = made_up(suite, kernel_cases.TREES)
    for record in result.lines:
        side = record["implementations"][0]
        record["implementations"] = [{**side, "implementation": name} for name in measured]
    assert figures(result) == {}


@pytest.mark.parametrize(
    ("suite", "cases"),
    [
        ("smoke", specs.SMOKE[:2]),
        ("paper", PAPER),
        ("trees", kernel_cases.TREES[:20]),
        ("hydragen", kernel_cases.HYDRAGEN[:5]),
    ],
)
def test_the_legend_is_inside_the_picture(suite: str, cases: Sequence[AttentionCase]):
    result = made_up(suite, cases)
    names = [name for name in ALL if name != "reference"]
    for record in result.lines:
        side = record["implementations"][0]
        record["implementations"] = [{**side, "implementation": name} for name in names]
    figure = figures(result)["picture"]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    drawn = {text.get_text() for text in legend.get_texts()}
    assert drawn >= {*names} - {"xla"}


def test_calls_are_timed_in_turns():
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) or np.zeros(1) for name in ("a", "b")}
    timings, outputs = timing.time_in_turns(calls, 5)
    assert set(outputs) == {"a", "b"}
    assert made[:2] == ["a", "b"]
    for turn in range(1, 6):
        assert set(made[2 * turn : 2 * turn + 2]) == {"a", "b"}
    assert timings["a"].least <= timings["a"].median <= timings["a"].most
