"""The work of `search`: grow the tree on one engine, show it, say what sharing saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    CacheConfig,
    Engine,
    EngineStats,
    RequestHandle,
    SamplingParams,
)
from jax_chunkattn.engine.admission import chunks_to_finish
from models import LoadedModel
from models.tokenizer import ChatTokenizer


@dataclass(eq=False)
class Branch:
    """A partial answer: where it begins in its request's tokens, and how likely its own are."""

    handle: RequestHandle
    begin: int
    depth: int
    children: list[Branch] = field(default_factory=list)
    kept: bool = False

    @property
    def score(self) -> float:
        """Mean log-probability of all tokens of the answer so far."""
        logprobs = [one.chosen for one in self.handle.logprobs]
        return sum(logprobs) / len(logprobs)

    @property
    def stopped(self) -> bool:
        return self.handle.finish_reason == "stop"


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
        root = grow(engine, prompt, config, folder)
    answers = [branch for branch in everything_below(root) if not branch.children]
    best = max(answers, key=lambda branch: (branch.stopped, branch.score))
    make_console().print(_drawn(config, root, best))
    summary = {
        "experiment": "search",
        **{name: getattr(config, name) for name in ("question", "width", "keep", "depth")},
        "tokens": config.tokens,
        "seed": config.seed,
        "answer": best.handle.text,
        "score": round(best.score, 4),
        **_sharing(engine.stats, len(prompt), root),
        "environment": environment,
    }
    return finish(folder, summary)


def grow(
    engine: Engine, prompt: Sequence[int], config: SearchConfig, folder: ResultFolder
) -> Branch:
    """The tree: its root is the answer's likeliest first token, replaced in each first branch."""
    first = SamplingParams(1, logprobs=config.width, ignore_eos=True)
    root = Branch(engine.submit(prompt, first, hold=True), 0, 0)
    starts = [token for token, _ in root.handle.result().logprobs[0].top]
    going_on = [root]
    for depth in range(1, config.depth + 1):
        for parent in going_on:
            parent.kept = True
            for index in range(config.width):
                child = _branch(parent, config, starts[index] if parent is root else None, index)
                parent.children.append(child)
        fresh = [child for parent in going_on for child in parent.children]
        for child in fresh:
            child.handle.result()
            folder.write_record(_record(child))
        for parent in going_on:
            parent.handle.release()
        fresh.sort(key=lambda branch: -branch.score)
        going_on = [branch for branch in fresh if not branch.stopped][: config.keep]
        for branch in fresh:
            if depth == config.depth or branch not in going_on:
                branch.handle.release()
        if not going_on:
            break
    return root


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
        tokenizer=tokenizer,
        stop_tokens=tokenizer.stop_ids,
        max_running=config.keep * config.width,
    )


def _sharing(stats: EngineStats, prompt_tokens: int, root: Branch) -> dict[str, int]:
    """What the search did, and would have done without sharing."""
    branches = everything_below(root)
    return {
        "branches": len(branches),
        "forked": stats.forks,
        "prefill_tokens_computed": stats.prefill_tokens,
        "prefill_tokens_without_sharing": sum(
            prompt_tokens + branch.begin for branch in (root, *branches)
        ),
        "decode_tokens": stats.decode_tokens,
        "kv_bytes_held": stats.kv_bytes_held,
        "kv_bytes_unshared": stats.kv_bytes_unshared,
    }


def _branch(parent: Branch, config: SearchConfig, next_token: int | None, index: int) -> Branch:
    begin = 0 if next_token is not None else len(parent.handle.tokens)
    params = SamplingParams(
        max_tokens=begin + config.tokens,
        temperature=config.temperature,
        seed=config.seed + 1000 * parent.depth + index,
        logprobs=0,
    )
    handle = parent.handle.fork(params, next_token=next_token, hold=True)
    return Branch(handle, begin, parent.depth + 1)


def everything_below(root: Branch) -> list[Branch]:
    """All branches, each before those that go on from it."""
    return [branch for child in root.children for branch in (child, *everything_below(child))]


def _record(branch: Branch) -> dict[str, Any]:
    return {
        "kind": "branch",
        "depth": branch.depth,
        "text": branch.handle.text,
        "tokens": list(branch.handle.tokens),
        "score": round(branch.score, 4),
        "stopped": branch.stopped,
    }


def _drawn(config: SearchConfig, root: Branch, best: Branch) -> Tree:
    drawn = Tree(Text(config.question, style="bold"))

    def add(branch: Branch, to: Tree, shown: int) -> None:
        for child in branch.children:
            text = " ".join(child.handle.text[shown:].split())
            style = "bold green" if child is best else ("" if child.kept else "dim")
            node = to.add(Text(f"{child.score:6.3f}  {text}", style=style))
            add(child, node, len(child.handle.text))

    add(root, drawn, 0)
    return drawn
