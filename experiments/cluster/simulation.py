"""A fleet in simulated time: requests come, are routed, and leave; the trees tell the router."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from itertools import count

from experiments.cluster.device_model import DeviceModel
from experiments.cluster.replica import Replica, Served
from experiments.cluster.workload import Workload
from jax_chunkattn.replicas.router import Router, RouterStats


@dataclass
class Replayed:
    """What became of a workload.

    Attributes:
      served: requests, in the order they came; refused are those that no pool can hold.
      busy: seconds that each replica's device has worked.
      seconds: until the last had ended.
      routing: real seconds that the router took, for requests and for events.
    """

    served: list[Served] = field(default_factory=list)
    refused: int = 0
    busy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    routing: float = 0.0
    applying: float = 0.0
    evicted: int = 0
    preemptions: int = 0
    router: RouterStats = field(default_factory=RouterStats)


def replay(
    workload: Workload,
    router: Router,
    device: DeviceModel,
    *,
    replicas: int,
    num_chunks: int,
    max_running: int,
) -> Replayed:
    """Routes every request when it is due, to a fleet whose pools are empty at first."""
    fleet = {
        f"replica-{number}": Replica(device, num_chunks, router.chunk_size, max_running)
        for number in range(replicas)
    }
    for name in fleet:
        router.add(name)
    replayed, order = Replayed(), count()
    ends: list[tuple[float, int, str]] = []  # of turns; those that were cut are passed over

    def end_turns(until: float) -> None:
        while ends and ends[0][0] <= until:
            end, _, name = heapq.heappop(ends)
            replica = fleet[name]
            if replica.turn is None or replica.turn.end != end:
                continue
            began, ended = replica.end_turn()
            if replica.turn is not None:
                heapq.heappush(ends, (replica.turn.end, next(order), name))
            applied = time.perf_counter()
            for served in began:
                router.began(served.routed, served.found)
            for served in ended:
                router.finish(served.routed)
            router.apply(name, replica.events.take())
            replayed.applying += time.perf_counter() - applied
            replayed.seconds = end

    some = next(iter(fleet.values()))
    for arrival in workload.arrivals:
        if not some.fits(arrival):
            replayed.refused += 1
            continue
        end_turns(arrival.due)
        tokens = arrival.tokens()
        began = time.perf_counter()
        routed = router.route(tokens[: arrival.prompt])
        replayed.routing += time.perf_counter() - began
        replica, served = fleet[routed.replica], Served(arrival, routed, tokens)
        before = replica.turn.end if replica.turn is not None else None
        replica.submit(served, arrival.due)
        if replica.turn is not None and replica.turn.end != before:
            heapq.heappush(ends, (replica.turn.end, next(order), routed.replica))
        replayed.served.append(served)
    end_turns(float("inf"))
    replayed.busy = [replica.busy for replica in fleet.values()]
    replayed.evicted = sum(replica.num_evicted for replica in fleet.values())
    replayed.preemptions = sum(replica.preemptions for replica in fleet.values())
    replayed.router = router.stats
    return replayed
