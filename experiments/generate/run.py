"""The work of `generate`: load, answer, show, compare, write."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from experiments.cluster_option import chosen_clusters
from experiments.codecs import codec_for
from experiments.generate import views as generate_views
from experiments.generate.comparison import PREFILL_SECONDS, affordable_batch
from experiments.generate.config import GenerateConfig
from experiments.generate.decoding import BatchSettings, Measured, OnFinished, decode_batch
from experiments.generate.inputs import Inputs
from experiments.generate.summary import (
    THIS_RUN,
    UNSHARED,
    measured_of,
    measured_record,
    request_record,
    setting_of,
    summarise,
)
from experiments.harness.compilations import compilation_cache
from experiments.harness.console import make_console
from experiments.harness.environment import describe_environment, free_memory_bytes
from experiments.harness.progress import PhaseDisplay, phase_display
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.tables import print_table
from experiments.harness.units import tell_taken_over
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, fetch_model, load_fetched
from experiments.mesh_option import chosen_mesh
from experiments.prefix_option import behind_prefix, chosen_prefix
from experiments.prompts import PromptSet, make_prompts
from experiments.select_option import chosen_selector
from jax_chunkattn import RequestHandle, SamplingParams
from models import LoadedModel
from pallas_kernels.implementations import check_device


@compilation_cache()
def generate(
    config: GenerateConfig, inputs: Inputs, folder: ResultFolder, started: float
) -> dict[str, Any]:
    """Run the experiment into `folder`; `started` is the clock when the user's wait began."""
    check_device(config.implementation)
    environment = describe_environment()
    console = make_console()
    mesh = chosen_mesh(config.mesh)
    spec = fetch_model(inputs.model)
    load_began = time.perf_counter()
    loaded = load_fetched(
        spec,
        LoadOptions(config.dtype, config.seed, config.max_positions, chosen_heads(config), mesh),
    )
    decode_began = time.perf_counter()
    prompts = make_prompts(
        inputs.lines, inputs.system_prompt, loaded, max_tokens=config.max_tokens, seed=config.seed
    )
    if config.prefix is not None:
        prompts = behind_prefix(prompts, inputs.system_prompt, loaded)
    folder.begin(environment, **setting_of(prompts))
    tell_taken_over(folder, dict.fromkeys((THIS_RUN, UNSHARED)))
    if prompts.note:
        console.print(prompts.note, markup=False)
    if THIS_RUN in folder.finished:
        record, lines = folder.finished[THIS_RUN], folder.lines_of(THIS_RUN)
    else:
        lines = []
        write = _writer(folder, loaded, prompts, lines)
        with phase_display() as display:
            measured = decode(config, loaded, prompts, display, on_finished=write)
        seconds = {
            "load": decode_began - load_began,
            "compile": measured.compile_seconds,
            "prefill": measured.prefill_seconds,
            "decode": measured.decode_seconds,
            "first_answer": decode_began - started + measured.first_answer_seconds,
        }
        rounded = {name: round(taken, 3) for name, taken in seconds.items()}
        record = folder.finish_unit(THIS_RUN, measured_record(measured, seconds=rounded))
    print_table(console, generate_views.answers(lines))
    measured = measured_of(record)
    unshared = compare(config, loaded, prompts, measured, folder)
    summary = summarise(config, environment, measured, unshared, record["seconds"])
    return finish(folder, summary, printed=(generate_views.ANSWERS,))


def decode(
    config: GenerateConfig,
    loaded: LoadedModel,
    prompts: PromptSet,
    display: PhaseDisplay,
    **callbacks: OnFinished,
) -> Measured:
    """Answer all of `prompts` as `config` says."""
    settings = BatchSettings(
        chunk_size=config.chunk_size,
        codec=codec_for(config.codec, loaded.model),
        selector=chosen_selector(config, loaded.model),
        clusters=chosen_clusters(config.clusters, loaded.model),
        prefix=chosen_prefix(config.prefix, loaded),
        dtype=config.dtype,
        sharing=config.sharing,
        implementation=config.implementation,
        deterministic=config.deterministic,
        steps_per_call=config.steps_per_call,
        mesh=chosen_mesh(config.mesh),
        stop_tokens=_stop_tokens(config, loaded),
    )
    sampling = [
        SamplingParams(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed + index,
        )
        for index in range(len(prompts.tokens))
    ]
    return decode_batch(
        loaded.model,
        prompts.tokens,
        sampling,
        settings,
        names=[line.where for line in prompts.lines],
        on_progress=lambda progress: display.update(progress.phase, progress.done, progress.total),
        **callbacks,
    )


def _stop_tokens(config: GenerateConfig, loaded: LoadedModel) -> tuple[int, ...]:
    if config.ignore_eos or loaded.tokenizer is None:
        return ()
    return tuple(loaded.tokenizer.stop_ids)


def compare(
    config: GenerateConfig,
    loaded: LoadedModel,
    prompts: PromptSet,
    measured: Measured,
    folder: ResultFolder,
) -> Measured | None:
    """The same run without sharing, on as many requests as `config` says or the time allows."""
    if not (config.compare and config.sharing):
        return None
    if UNSHARED in folder.finished:
        return measured_of(folder.finished[UNSHARED])
    batch = config.compare_batch
    if batch is None:
        batch = _affordable_batch(config, loaded, prompts, measured)
        if batch < measured.batch:
            make_console().print(
                f"Running {batch} of the {measured.batch} requests without sharing: more would "
                f"need over {PREFILL_SECONDS:.0f} s of prefill, or too much memory."
            )
    fewer = dataclasses.replace(prompts, lines=prompts.lines[:batch], tokens=prompts.tokens[:batch])
    with phase_display() as display:
        unshared = decode(dataclasses.replace(config, sharing=False), loaded, fewer, display)
    return measured_of(folder.finish_unit(UNSHARED, measured_record(unshared)))


def _affordable_batch(
    config: GenerateConfig, loaded: LoadedModel, prompts: PromptSet, measured: Measured
) -> int:
    values = loaded.config.cache_spec.values_per_token
    return affordable_batch(
        [len(tokens) for tokens in prompts.tokens],
        max_tokens=config.max_tokens,
        tokens_per_second=measured.prefill_tokens_per_second,
        bytes_per_token=values * (4 if config.dtype == "float32" else 2),
        free_bytes=free_memory_bytes(),
    )


def _writer(
    folder: ResultFolder, loaded: LoadedModel, prompts: PromptSet, lines: list[Record]
) -> OnFinished:
    def write(index: int, request: RequestHandle) -> None:
        text = None if loaded.tokenizer is None else loaded.tokenizer.decode(request.tokens)
        lines.append(request_record(index, prompts, request, text))
        folder.write_record(lines[-1], of_unit=THIS_RUN)

    return write
