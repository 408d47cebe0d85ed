"""Conversations of many tenants, made up: no trace to download."""

from __future__ import annotations

import numpy as np

from experiments.cache.config import REQUESTS, CacheConfig
from experiments.cache.workload import Workload, make_workload


def make_up(config: CacheConfig) -> Workload:
    """Requests are the turns of conversations, in the order they come.

    A turn's prompt is the tenant's system prompt, all questions and answers before, and a question.
    Turns of a conversation, and tokens of each part, have geometric distributions; how many other
    requests come between two turns, an exponential one; conversations begin evenly spread.
    """
    random = np.random.default_rng(config.seed)
    requests = config.requests or REQUESTS

    def lengths(mean: float, count: int) -> np.ndarray:
        return random.geometric(1 / mean, count)

    turns = lengths(config.turns, requests)
    conversations = int(np.searchsorted(np.cumsum(turns), requests)) + 1
    turns = turns[:conversations]
    popularity = np.arange(1, config.tenants + 1.0) ** -config.zipf
    tenant = random.choice(config.tenants, conversations, p=popularity / popularity.sum())
    begin = random.uniform(0, requests, conversations)

    system = lengths(config.system_tokens, config.tenants)
    new = lengths(config.question_tokens, int(turns.sum()))
    new += np.where(_is_first(turns), 0, lengths(config.answer_tokens, len(new)))
    pauses = random.exponential(config.between, len(new))
    due, paths, ends = [], [], system.tolist()
    turn = 0
    for conversation, count in enumerate(turns.tolist()):
        path, time = (int(tenant[conversation]),), begin[conversation]
        for _ in range(count):
            ends.append(ends[path[-1]] + int(new[turn]))
            path = (*path, len(ends) - 1)
            paths.append(path)
            due.append(time)
            time += pauses[turn]
            turn += 1
    order = np.argsort(due, kind="stable")[:requests]
    name = f"{config.tenants} tenants' conversations, made up"
    return make_workload(name, [paths[index] for index in order], ends)


def _is_first(turns: np.ndarray) -> np.ndarray:
    """Of all turns, one conversation after another, which begin one."""
    first = np.zeros(turns.sum(), bool)
    first[np.cumsum(turns) - turns] = True
    return first
