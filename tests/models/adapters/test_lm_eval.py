"""The engine in the hands of the real lm-eval, beside its Hugging Face backend, on local tasks.

`pip install -e '.[parity,lm-eval]'`, then `-m slow`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import importlib.util
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NEEDED = "lm_eval", "torch", "transformers", "accelerate"
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[parity,lm-eval]'"
    ),
]

POSITIONS = 256
WORDS = ["the", "red", "fox", "saw", "a", "bird", "over", "one", "old", "house", "and", "went"]


@pytest.fixture(autouse=True)
def _warnings_of_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module", params=["begins", "plain"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer, which puts a token before a text or does not."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp(request.param)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sentence(random.Random(0), 400)], trainer)
    if request.param == "begins":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tasks(folder: Path) -> list[Any]:
    """Few-shot multiple choice, answers to questions, and perplexity of texts."""
    chance = random.Random(1)
    docs = [
        {
            "text": sentence(chance, 30),
            "question": sentence(chance, 12) + chance.choice(["", " ", "  "]),
            "choices": [sentence(chance, chance.randint(1, 4)) for _ in range(4)],
            "answer": chance.randrange(4),
        }
        for _ in range(16)
    ]
    docs[3]["question"] = sentence(chance, 2 * POSITIONS)  # to be cut
    docs[5]["text"] = sentence(chance, 3 * POSITIONS)  # of several windows
    for name, some in {"train": docs[8:], "test": docs[:8]}.items():
        lines = "".join(json.dumps(doc) + "\n" for doc in some)
        (folder / f"{name}.jsonl").write_text(lines)
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "fewshot_split": "train",
        "test_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "{{question}}",
    }
    return [
        common
        | {
            "task": "local_choices",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "num_fewshot": 2,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common
        | {
            "task": "local_answers",
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "num_fewshot": 1,
            "generation_kwargs": {"until": ["\n\n", "e"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
        common
        | {
            "task": "local_texts",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    ]


def evaluated(model: str, arguments: str, folder: Path, **options: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import models.adapters.lm_eval  # noqa: F401, registers the model

    return lm_eval.simple_evaluate(
        model,
        arguments,
        tasks=[*tasks(folder)],
        task_manager=TaskManager(include_defaults=False),  # to read those takes 40 seconds
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model has answered to each document, in their order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["resps"]]


def test_numbers_are_those_of_the_hugging_face_backend(checkpoint, tmp_path):
    ours = evaluated("jax_chunkattn", f"pretrained={checkpoint},memory=16MiB", tmp_path)
    theirs = evaluated("hf", f"pretrained={checkpoint},dtype=float32", tmp_path, device="cpu")
    for task in ("local_choices", "local_answers", "local_texts"):
        assert ours["samples"][task][0]["arguments"] == theirs["samples"][task][0]["arguments"]
    pairs = [responses(results, "local_choices") for results in (ours, theirs)]
    assert len(pairs[0]) == 8 * 4
    differences = [abs(one[0] - other[0]) for one, other in zip(*pairs, strict=True)]
    assert [one[1] for one in pairs[0]] == [other[1] for other in pairs[1]]
    assert responses(ours, "local_answers") == responses(theirs, "local_answers")
    assert len(set(responses(ours, "local_answers"))) > 4
    pairs = [responses(results, "local_texts") for results in (ours, theirs)]
    rolling = [abs(one - other) for one, other in zip(*pairs, strict=True)]
    assert max(differences) < 1e-3
    assert max(rolling) < 1e-3
    for task, metric in [
        ("local_choices", "acc,none"),
        ("local_choices", "acc_norm,none"),
        ("local_answers", "exact_match,none"),
    ]:
        assert ours["results"][task][metric] == theirs["results"][task][metric]


def test_the_readme_s_lines_run(checkpoint, tmp_path, monkeypatch, capsys):
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from tests.test_readme import EXAMPLES

    [example] = [each for each in EXAMPLES if "lm_eval" in each]
    example = example.replace("FOLDER", str(checkpoint)).replace("1GiB", "16MiB")
    example = example.replace('["arc_easy"], num_fewshot=5', "TASKS")
    fewer = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", fewer)
    exec(compile(example, "README.md", "exec"), {"TASKS": tasks(tmp_path)[:1]})
    assert "'acc,none'" in capsys.readouterr().out


def test_prompts_of_chats_are_those_of_the_hugging_face_backend(checkpoint):
    from lm_eval.models.huggingface import HFLM

    from models.adapters.lm_eval import ChunkAttentionLM

    own = ChunkAttentionLM(str(checkpoint), memory="16MiB")
    its: Any = HFLM(pretrained=str(checkpoint), device="cpu")
    chat = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "saw a bird"},
        {"role": "assistant", "content": "over one \n"},
    ]
    assert own.apply_chat_template(chat[:2]) == its.apply_chat_template(chat[:2])
    for last in ("over one \n", "over", " over"):
        chat[2]["content"] = last
        assert own.apply_chat_template(chat, False) == its.apply_chat_template(chat, False)
    assert own.chat_template(True) == its.chat_template(True)
    assert own.chat_template(False) is None
    assert (own.eot_token_id, own.prefix_token_id) == (its.eot_token_id, its.prefix_token_id)
    assert own.max_length == its.max_length
    for text in ("the red", "<s>the red", "", " fox"):
        for special in (None, True, False):
            assert own.tok_encode(text, special) == its.tok_encode(text, special)
    assert own.tokenizer_name == checkpoint.name


def test_what_it_does_not_do_is_refused_by_name(checkpoint):
    from lm_eval.api.instance import Instance

    from models.adapters.lm_eval import ChunkAttentionLM

    with pytest.raises(ValueError, match="JAX runs on 'cpu'"):
        ChunkAttentionLM(str(checkpoint), device="cuda")
    with pytest.raises(ValueError, match="max_length"):
        ChunkAttentionLM(str(checkpoint), max_length=POSITIONS + 1)
    with pytest.raises(ValueError, match="no tokenizer"):
        ChunkAttentionLM("random:tiny")
    own = ChunkAttentionLM(str(checkpoint), memory="16MiB")

    def asked(**options: Any) -> list[Instance]:
        return [Instance("generate_until", {}, ("the red", options), 0)]

    for options, message in [
        ({"num_beams": 4}, "num_beams"),
        ({"max_gen_toks": POSITIONS}, "no room"),
    ]:
        with pytest.raises(ValueError, match=message):
            own.generate_until(asked(**options), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_length"):
        own._loglikelihood_tokens([(None, [1], [5] * (POSITIONS + 1))], disable_tqdm=True)
    sampled = own.generate_until(
        asked(do_sample=True, temperature=0.8, seed=1, max_new_tokens=6), disable_tqdm=True
    )
    greedy = own.generate_until(
        asked(do_sample=False, temperature=0.8, max_gen_toks=6), disable_tqdm=True
    )
    assert sampled != greedy
