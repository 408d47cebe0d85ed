"""Reading what XLA and ptxas write: small texts in their formats."""

from __future__ import annotations

from experiments.compile_report.hlo import Module
from experiments.compile_report.pool_copies import pool_copies, pool_sized_operations
from experiments.compile_report.ptx import (
    Assembled,
    count_instructions,
    parse_entries,
    parse_mosaic_shared,
    parse_ptxas,
)
from experiments.compile_report.target import TARGETS
from experiments.compile_report.thunks import parse_thunk_operations, parse_thunks

POOL = "bf16[2,8,64]{2,1,0}"  # 2048 bytes, a layer 1024
LAYER_BYTES = 1024


def module(entry: str, fused: str = "") -> str:
    return f"""HloModule jit_step, entry_computation_layout={{(bf16[2,8,64])->bf16[2,8,64]}}

{fused}
ENTRY %main.9 (keys.1: bf16[2,8,64]) -> bf16[2,8,64] {{
  %keys.1 = {POOL} parameter(0), metadata={{op_name="keys"}}
{entry}
}}
"""


def fusion(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"""%fused_computation (p0: bf16[2,8,64]) -> bf16[2,8,64] {{
  %p0 = {POOL} parameter(0)
  %update = bf16[1,1,64]{{2,1,0}} constant({{...}})
{body}
}}
"""


CALLS_FUSION = f"  ROOT %f = {POOL} fusion(%keys.1), kind=kLoop, calls=%fused_computation"


def test_copies_and_computed_arrays_are_found():
    entry = f"  %copy.1 = {POOL} copy(%keys.1)\n  ROOT %neg = {POOL} negate(%copy.1)"
    assert pool_sized_operations(module(entry), LAYER_BYTES) == [
        "copy bf16[2,8,64] in main.9",
        "negate bf16[2,8,64] in main.9",
    ]


def test_operations_smaller_than_a_layer_are_not():
    entry = "  ROOT %cut = bf16[1,1,64]{2,1,0} slice(%keys.1), slice={[0:1], [0:1], [0:64]}"
    assert pool_sized_operations(module(entry), LAYER_BYTES) == []


def test_a_fusion_that_ends_in_a_write_to_its_operand_is_in_place():
    text = fusion(
        f"%written = {POOL} dynamic-update-slice(%p0, %update, %i, %j, %k)",
        f"ROOT %b = {POOL} bitcast(%written)",
    )
    assert pool_sized_operations(module(CALLS_FUSION, text), LAYER_BYTES) == []


def test_a_fusion_that_converts_before_it_writes_is_not():
    text = fusion(
        "%wide = f32[2,8,64]{2,1,0} convert(%p0)",
        f"ROOT %written = {POOL} scatter(%wide, %i, %update), to_apply=%region_0.1",
    )
    assert len(pool_sized_operations(module(CALLS_FUSION, text), LAYER_BYTES)) == 1


def test_each_result_of_a_fusion_is_judged_by_itself():
    text = fusion(
        f"%written = {POOL} scatter(%p0, %i, %update), to_apply=%region_0.1",
        f"%negated = {POOL} negate(%p0)",
        f"ROOT %both = ({POOL}, {POOL}) tuple(%written, %negated)",
    )
    entry = f"  %f = ({POOL}, {POOL}) fusion(%keys.1), kind=kInput, calls=%fused_computation"
    assert len(pool_sized_operations(module(entry, text), LAYER_BYTES)) == 1


def test_custom_calls_are_in_place_in_what_they_alias():
    call = (
        f'  %call = ({POOL}, {POOL}) custom-call(%keys.1), custom_call_target="kernel", '
        "output_to_operand_aliasing={{1}: (0, {})}"
    )
    assert len(pool_sized_operations(module(call), LAYER_BYTES)) == 1
    call = (
        f'  ROOT %call = {POOL} custom-call(%keys.1), custom_call_target="kernel", '
        "output_to_operand_aliasing={{}: (0, {})}"
    )
    assert pool_sized_operations(module(call), LAYER_BYTES) == []
    assert Module(module(call)).custom_calls() == {"call": "kernel"}


def test_an_asynchronous_copy_is_found_once():
    entry = f"""  %copy-start = ({POOL}, {POOL}, u32[]) copy-start(%keys.1)
  ROOT %copy-done = {POOL} copy-done(%copy-start)"""
    assert len(pool_sized_operations(module(entry), LAYER_BYTES)) == 1


def test_an_asynchronous_fusion_may_hold_a_large_operand():
    entry = (
        f"  %start = (({POOL}, s32[]), bf16[1,1,64]{{2,1,0}}, s32[]) fusion-start(%keys.1, %i), "
        "kind=kCustom, calls=%fused_computation"
    )
    text = fusion("ROOT %cut = bf16[1,1,64]{2,1,0} dynamic-slice(%p0, %i, %j, %k)")
    assert pool_sized_operations(module(entry, text), LAYER_BYTES) == []


def test_temporaries_and_missing_aliases_are_signs():
    sizes = {"pool_bytes": 4096, "layer_bytes": LAYER_BYTES, "hlo": module("")}
    assert pool_copies(temporary_bytes=1023, aliased_bytes=4096, **sizes) == []
    assert len(pool_copies(temporary_bytes=1024, aliased_bytes=4096, **sizes)) == 1
    assert len(pool_copies(temporary_bytes=0, aliased_bytes=4095, **sizes)) == 1


THUNKS = """\
001: kCopy  [source       | next=002 (1)] kCopy
002: kWhile [prev=001 (1) | sink        ]   
condition:
    003: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | next=006 (1)] 
        004: kCustomKernel [source       | next=005 (1)] chunk_first grid: [8, 2, 4] threads: [128, 1, 1]  shared_memory: 20480 bytes
        005: kCustomCall   [prev=004 (1) | sink        ] kCustomCall
    006: kCustomKernel [prev=000 (1) | sink] late grid: [1, 1, 1] threads: [64, 2, 1]  shared_memory: 8 bytes
"""  # noqa: E501


def test_thunks_know_their_launch_and_whether_they_are_captured():
    thunks = {thunk.identifier: thunk for thunk in parse_thunks(THUNKS)}
    assert [thunk.kind for thunk in thunks.values()].count("kCommandBuffer") == 1
    first = thunks[4]
    assert (first.kernel, first.grid, first.threads, first.shared) == (
        "chunk_first",
        64,
        128,
        20480,
    )
    assert [number for number, thunk in thunks.items() if thunk.captured] == [4, 5]
    assert thunks[6].threads == 128


def test_thunks_are_named_by_their_operation():
    metadata = """thunk_metadata {
  thunk_info {
    profile_annotation: "pallas_call.4"
    thunk_id: 6
  }
  thunk_kind: "kCustomKernel"
}
"""
    assert parse_thunk_operations(metadata) == {6: "pallas_call.4"}


def test_ptxas_report():
    report = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 71 registers, used 1 barriers
ptxas info    : Compiling entry function 'full' for 'sm_90a'
ptxas info    : Function properties for full
    32 bytes stack frame, 28 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 55.160 ms
"""
    assert parse_ptxas(report) == {
        "plain": Assembled(71, 0, 0, 0),
        "full": Assembled(255, 28, 24, 1),
    }


def test_entries_of_a_ptx_file():
    ptx = """.target sm_90a
.visible .entry first(
	.param .u64 a
)
.reqntid 128, 1, 1
{ ret; }
.entry second(
)
.maxntid 64, 2
"""
    assert parse_entries(ptx) == {"first": 128, "second": 128}


def test_instructions_are_counted():
    ptx = """.visible .entry first(
	.param .u64 a
)
.reqntid 128, 1, 1
{
	.reg .b32 %r<3>;
	.loc 1 2 3
	ld.param.u64 %rd1, [a];
$L__BB0_1:
	@%p1 bra $L__BB0_1;
	// a remark;
	@!%p1 mov.b32 %r1, 1;
	ret;
}
.entry second(
)
{
	ret;
}
"""
    assert count_instructions(ptx) == {"first": 4, "second": 1}


def test_shared_memory_of_a_mosaic_kernel(tmp_path):
    passes = tmp_path / "kernel_0.mlir-passes.log"
    passes.write_text(
        "    %c51240_i32 = arith.constant 51240 : i32\n"
        "    %c7_i32 = arith.constant 7 : i32\n"
        "    %9 = gpu.launch async [%0] blocks(%a) in (%b = %c4) threads(%c) in (%d = %c128) "
        "dynamic_shared_memory_size %c51240_i32 {\n"
    )
    assert parse_mosaic_shared(passes) == 51240
    passes.write_text("nothing\n")
    assert parse_mosaic_shared(passes) == 0


def test_occupancy_is_what_runs_out_first():
    h200 = TARGETS["h200"]
    assert h200.programs_per_multiprocessor(registers=32, shared=0, threads=128) == 16
    assert h200.programs_per_multiprocessor(registers=255, shared=0, threads=128) == 2
    assert h200.programs_per_multiprocessor(registers=32, shared=100_000, threads=128) == 2
    assert h200.programs_per_multiprocessor(registers=16, shared=0, threads=32) == 32
