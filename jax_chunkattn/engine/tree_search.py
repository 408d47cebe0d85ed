"""Tree search over forks: every node is a request, and what answers have in common is shared.

The shape is that of mctx (https://github.com/google-deepmind/mctx): callbacks select, expand and
evaluate, values are backed up to the root, and what comes out is a tree of arrays. Unlike there an
expansion makes all children of a node, since they decode in one batch for little more than one.
"""

from __future__ import annotations

from collections.abc import Collection

from jax_chunkattn.engine.engine import Engine, Prompt
from jax_chunkattn.engine.outputs import EngineClosed, RequestFailed
from jax_chunkattn.engine.search_expansion import Evaluation, Expansion, mean_logprob
from jax_chunkattn.engine.search_growth import Growth
from jax_chunkattn.engine.search_selection import Puct, Selected, Selection
from jax_chunkattn.engine.search_tree import SearchTree
from jax_chunkattn.sampling import MAX_STOP_TOKENS, SamplingParams
from jax_chunkattn.tree.allocator import PoolExhausted


class SearchFailed(RuntimeError):
    """The engine failed in the midst of a tree search; this error's cause says how.

    Attributes:
      tree: what had been found.
    """

    def __init__(self, message: str, tree: SearchTree):
        super().__init__(message)
        self.tree = tree


def tree_search(
    engine: Engine,
    prompt: Prompt,
    *,
    expand: Expansion,
    num_simulations: int,
    evaluate: Evaluation = mean_logprob,
    select: Selection = Puct(),
    max_tokens: int = 48,
    max_depth: int | None = None,
    stop_tokens: Collection[int] = (),
    salt: str = "",
    prefix: str | None = None,
) -> SearchTree:
    """Grows a tree of partial answers to a prompt.

    In a simulation `select` chooses a node, `expand` says what children it gets, `evaluate` what
    these are worth, and all nodes above count their values. Children are forks: they share all that
    they have in common, and those of all nodes that are selected together decode in one batch, with
    whatever other requests the engine has. Without randomness in the callbacks, and with seeds for
    what is sampled, the same tree is grown each time.

    Nodes that may be expanded are held, the others let go. When the pool runs short those held the
    longest lose what they hold: expanding them computes it again, and the tree is the same. Where
    full chunks are encoded, so do last chunks of leaves that have no slot any more. When the search
    ends, in whatever way, Ctrl-C included, nothing of it is running or held.

    Args:
      expand: how nodes go on, for instance `NextTokens()` or `Continuations()`.
      num_simulations: most nodes that are selected, each time one is.
      evaluate: called with all children that were made together, in the order of their indices.
      select: `Puct()`, `BestFirst()`, `Beam()`, or any function.
      max_tokens: most tokens of an answer.
      max_depth: most edges of a path; None for no limit.
      stop_tokens: end an answer; those of the engine do not count.
      salt, prefix: as for `Engine.submit`.

    Raises:
      ValueError: for numbers out of range, or when a callback returns what cannot be.
      InvalidRequest, PoolExhausted, EngineClosed: as `Engine.submit`, for the longest answer.
      SearchFailed: when an error ended a request, or the pool came to be pinned by others, or the
        engine was closed; it has the tree so far.
    """
    for name, value in (("num_simulations", num_simulations), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if max_depth is not None and max_depth < 1:
        raise ValueError(f"max_depth must be at least 1, or None for no limit, got {max_depth}")
    stops = frozenset(stop_tokens)
    if len(stops) > MAX_STOP_TOKENS:
        raise ValueError(f"stop_tokens must be at most {MAX_STOP_TOKENS}, got {len(stops)}")
    longest = SamplingParams(max_tokens, stop_token_ids=sorted(stops))
    engine.check_request(prompt, longest, salt=salt, prefix=prefix)
    growth = Growth(expand, evaluate, max_tokens, max_depth, stops)
    first = SamplingParams(1, logprobs=growth.num_likeliest(0), ignore_eos=True)
    root = engine.submit(prompt, first, salt=salt, prefix=prefix, hold=True)
    try:
        growth.plant(root)
        while num_simulations > 0:
            selected = select(growth.tree.view())
            if not len(selected.nodes):
                break
            nodes = list(selected.nodes)[:num_simulations]
            num_simulations -= len(nodes)
            growth.grow(Selected(nodes, selected.pruned))
        return growth.tree.copy()
    except (RequestFailed, PoolExhausted, EngineClosed) as error:
        message = f"the search was broken off with {growth.tree.num_nodes} nodes: {error}"
        raise SearchFailed(message, growth.tree.copy()) from error
    finally:
        root.prune()
