"""The work of `search`: grow the tree on one engine, show it, say what sharing saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from experiments.codecs import codec_for
from experiments.harness.compilations import compilation_cache
from experiments.harness.console import make_console
from experiments.harness.environment import describe_environment, free_memory_bytes
from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder
from experiments.harness.tables import format_bytes
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.prompts import chat_tokens
from experiments.search.config import SearchConfig
from jax_chunkattn import (
    Beam,
    CacheConfig,
    Continuations,
    Engine,
    EngineStats,
    SamplingParams,
    SearchNode,
    SearchTree,
    tree_search,
)
from jax_chunkattn.engine.admission import chunks_to_finish
from jax_chunkattn.engine.search_expansion import mean_logprob
from jax_chunkattn.engine.search_tree import ROOT
from models import LoadedModel
from models.tokenizer import ChatTokenizer


@compilation_cache()
def search(
    config: SearchConfig, source: ModelSource, system_prompt: str, folder: ResultFolder
) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    environment = describe_environment()
    loaded = load_model(
        source, LoadOptions("float32", 0, config.max_positions, chosen_heads(config))
    )
    if loaded.tokenizer is None:
        raise UserError(f"--model {config.model} has no tokenizer, which a search needs")
    prompt = chat_tokens(loaded.tokenizer, system_prompt, config.question)
    cache = cache_of(config, loaded, len(prompt))
    folder.begin(environment, prompt_tokens=len(prompt))
    with _engine(config, loaded, loaded.tokenizer, cache) as engine:
        tree = grow(engine, prompt, config, loaded.tokenizer, folder)
    best = tree.best()
    texts = [_text(loaded.tokenizer, tree, node) for node in range(tree.num_nodes)]
    make_console().print(_drawn(config, tree, texts, best))
    summary = {
        "experiment": "search",
        **{name: getattr(config, name) for name in ("question", "width", "keep", "depth")},
        "tokens": config.tokens,
        "seed": config.seed,
        "answer": texts[best],
        "score": round(float(tree.raw_values[best]), 4),
        **_sharing(engine.stats, len(prompt), tree),
        "environment": environment,
    }
    return finish(folder, summary)


def grow(
    engine: Engine,
    prompt: Sequence[int],
    config: SearchConfig,
    tokenizer: ChatTokenizer,
    folder: ResultFolder,
) -> SearchTree:
    """The tree, each of whose branches is recorded as it comes."""

    def evaluate(nodes: Sequence[SearchNode]) -> list[float]:
        scores = mean_logprob(nodes)
        for node, score in zip(nodes, scores, strict=True):
            folder.write_record(_record(tokenizer, node, score))
        return scores

    sampling = SamplingParams(temperature=config.temperature, seed=config.seed)
    return tree_search(
        engine,
        prompt,
        expand=Continuations(config.width, config.tokens, sampling),
        evaluate=evaluate,
        select=Beam(config.keep),
        num_simulations=1 + config.keep * (config.depth - 1),
        max_tokens=config.depth * config.tokens,
        max_depth=config.depth,
        stop_tokens=tokenizer.stop_ids,
    )


def cache_of(config: SearchConfig, loaded: LoadedModel, prompt_tokens: int) -> CacheConfig:
    """A pool with room for all branches that are held at once, each with a copied chunk.

    Raises:
        UserError: the model has too few positions for the answers, or the machine too little
            memory for the pool.
    """
    longest, most = config.depth * config.tokens, loaded.config.max_positions
    if prompt_tokens + longest > most:
        raise UserError(
            f"the prompt's {prompt_tokens:,} tokens and --depth {config.depth} times --tokens "
            f"{config.tokens} are more than the model's {most:,} positions; lower one of the two"
        )
    at_once = config.keep * (1 + config.width)  # branches that go on, and their children
    shared = prompt_tokens // config.chunk_size
    own = chunks_to_finish(prompt_tokens, longest, config.chunk_size) - shared + 1
    num_chunks = shared + at_once * own
    codec = codec_for(config.codec, loaded.model)
    cache = CacheConfig(num_chunks, config.chunk_size, codec=codec)
    needed = num_chunks * cache.bytes_per_chunk(loaded.model.cache_spec)
    free = free_memory_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"{at_once:,} branches held at once take {format_bytes(needed)} of KV cache, but "
            f"{format_bytes(free)} of memory are free; lower --keep, --width or --chunk-size"
        )
    return cache


def _engine(
    config: SearchConfig, loaded: LoadedModel, tokenizer: ChatTokenizer, cache: CacheConfig
) -> Engine:
    return Engine(
        loaded.model,
        cache,
        stop_tokens=tokenizer.stop_ids,
        max_running=config.keep * config.width,
    )


def _sharing(stats: EngineStats, prompt_tokens: int, tree: SearchTree) -> dict[str, int]:
    """What the search did, and would have done without sharing."""
    begins = [len(tree.answer(int(parent))) for parent in tree.parents[ROOT + 1 :]]
    return {
        "branches": len(begins),
        "forked": stats.forks,
        "prefill_tokens_computed": stats.prefill_tokens,
        "prefill_tokens_without_sharing": sum(prompt_tokens + begin for begin in (0, *begins)),
        "decode_tokens": stats.decode_tokens,
        "kv_bytes_held": stats.kv_bytes_held,
        "kv_bytes_unshared": stats.kv_bytes_unshared,
    }


def _record(tokenizer: ChatTokenizer, node: SearchNode, score: float) -> dict[str, Any]:
    return {
        "kind": "branch",
        "depth": node.depth,
        "text": _decoded(tokenizer, node.tokens, node.stopped),
        "tokens": list(node.tokens),
        "score": round(score, 4),
        "stopped": node.stopped,
    }


def _text(tokenizer: ChatTokenizer, tree: SearchTree, node: int) -> str:
    return _decoded(tokenizer, tree.answer(node), bool(tree.stopped[node]))


def _decoded(tokenizer: ChatTokenizer, tokens: Sequence[int], stopped: bool) -> str:
    """Without the stop token."""
    return tokenizer.decode(tokens[: len(tokens) - stopped])


def _drawn(config: SearchConfig, tree: SearchTree, texts: Sequence[str], best: int) -> Tree:
    drawn = Tree(Text(config.question, style="bold"))

    def add(node: int, to: Tree) -> None:
        for child in tree.children_of(node):
            text = " ".join(texts[child][len(texts[node]) :].split())
            goes_on = bool(tree.children_of(child))
            style = "bold green" if child == best else ("" if goes_on else "dim")
            add(child, to.add(Text(f"{tree.raw_values[child]:6.3f}  {text}", style=style)))

    add(ROOT, drawn)
    return drawn
