"""The record of parity with transformers, and the table made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.architectures import ARCHITECTURES
from models.differences import describe_differences
from models.parity import PATH, Parity, ParityCase, markdown_table, read_parity

LLAMA = "LlamaForCausalLM"
RECORD: dict[str, Any] = {
    "versions": {"transformers": "5.23.0", "torch": "2.13.0", "jax": "0.10.2"},
    "date": "2026-11-21",
    "cases": {
        name: {
            "class_name": LLAMA,
            "what": "three shards",
            "max_abs_logit_difference": difference,
            "greedy_tokens": 64,
            "greedy_tokens_equal": True,
            "format": file_format,
        }
        for name, difference, file_format in (
            ("llama", 1.7e-6, "safetensors"),
            ("gguf-llama", 2.4e-6, "gguf"),
        )
    },
}


def read(tmp_path: Path, record: Any) -> Parity | None:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps(record))
    return read_parity(path)


def rows(parity: Parity | None) -> dict[str, list[str]]:
    lines = markdown_table(parity).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {6}
    assert cells[0][0] == "architecture"
    return {row[0].strip("`"): row for row in cells[2:]}


def test_cases_of_one_architecture_are_told_together(tmp_path):
    parity = read(tmp_path, RECORD)
    assert parity is not None
    assert parity.cases["llama"] == ParityCase(**RECORD["cases"]["llama"])
    agreement = parity.agreement(LLAMA)
    assert agreement is not None
    assert agreement.cases == 2
    assert agreement.max_abs_logit_difference == 2.4e-6
    assert agreement.tokens_in_words == "128 equal"
    assert parity.agreement("OPTForCausalLM") is None


def test_one_case_with_other_tokens_is_enough(tmp_path):
    record = json.loads(json.dumps(RECORD))
    record["cases"]["llama"]["greedy_tokens_equal"] = False
    parity = read(tmp_path, record)
    assert parity is not None
    assert rows(parity)[LLAMA][-1] == "not equal"


def test_the_table_has_every_architecture_measured_or_not(tmp_path):
    table = rows(read(tmp_path, RECORD))
    assert list(table) == list(ARCHITECTURES)
    assert table[LLAMA][3:] == ["yes", "2.4e-06", "128 equal"]
    assert table["OPTForCausalLM"][3:] == ["no", "not measured", "not measured"]
    assert table["MistralForCausalLM"][3] == "yes"  # as Llama's


def test_without_a_file_nothing_was_measured(tmp_path):
    assert read_parity(tmp_path / "absent.json") is None


def test_the_record_that_is_shipped_can_be_read():
    parity = read_parity()
    assert (parity is None) == (not PATH.exists())
    assert parity is None or {case.class_name for case in parity.cases.values()} <= set(
        ARCHITECTURES
    )


@pytest.mark.parametrize(
    "record",
    [[], {}, {**RECORD, "cases": {"llama": {"class_name": LLAMA}}}, {**RECORD, "cases": [1]}],
    ids=["list", "empty", "half a case", "no names"],
)
def test_another_record_is_refused(tmp_path, record):
    with pytest.raises(ValueError, match=r"parity\.json: no record of parity"):
        read(tmp_path, record)


DIFFERENCES = {
    "MistralForCausalLM": {"sliding windows"},
    "Qwen2ForCausalLM": {"biases of queries, keys and values"},
    "Qwen3ForCausalLM": {"queries and keys normalised over each head"},
    "Gemma2ForCausalLM": {
        "norms before and after",
        "GELU gates",
        "scores and logits capped softly",
        "its own scale of scores",
        "scaled embeddings",
        "sliding windows in some layers",
    },
    "Gemma3ForCausalLM": {
        "norms before and after",
        "queries and keys normalised over each head",
        "2 rotary embeddings",
        "GELU gates",
        "its own scale of scores",
        "scaled embeddings",
        "sliding windows in some layers",
    },
    "Phi3ForCausalLM": {"nothing"},
    "Olmo2ForCausalLM": {
        "norms after instead of before",
        "queries and keys normalised over all heads",
    },
    "SmolLM3ForCausalLM": {"layers without positions"},
    "OPTForCausalLM": {
        "layer norms",
        "biases everywhere",
        "learned positions",
        "ReLU without a gate",
    },
    "GPT2LMHeadModel": {
        "layer norms",
        "biases everywhere",
        "learned positions",
        "GELU without a gate",
    },
}


@pytest.mark.parametrize("class_name", DIFFERENCES)
def test_what_sets_each_apart_from_llama(class_name):
    assert (
        set(describe_differences(ARCHITECTURES[class_name]).split("; ")) == DIFFERENCES[class_name]
    )
