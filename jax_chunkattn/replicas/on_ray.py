"""Replicas as Ray actors. Ray is imported when it is used: extra `ray`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax_chunkattn.replicas.front_end import FrontEnd, Link, ReplicaLost
from jax_chunkattn.replicas.router import Router
from jax_chunkattn.replicas.server import MakeEngine, Order, ReplicaServer, Report


def import_ray() -> Any:
    """The module `ray`. Raises ImportError, naming the extra, when it is not installed."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "replicas on Ray need the extra `ray`: pip install 'jax_chunkattn[ray]'"
        ) from error
    return ray


class RayLink(Link):
    """A replica in an actor.

    Args:
      patience: seconds that an exchange may take, compiling included, before the replica counts as
        lost and is killed.
    """

    def __init__(self, make_engine: MakeEngine, options: dict[str, Any], patience: float):
        """Starts the actor, and waits until its engine is there. Raises ReplicaLost."""
        self._ray, self._patience = import_ray(), patience
        actor = self._ray.remote(ReplicaServer).options(**options)
        self._actor = actor.remote(make_engine)
        self.chunk_size: int = self._get(self._actor.start.remote())

    def exchange(self, orders: Sequence[Order], aborts: Sequence[int]) -> Report:
        return self._get(self._actor.exchange.remote(orders, aborts))

    def close(self) -> None:
        self._ray.kill(self._actor)

    def _get(self, result: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(result, timeout=self._patience)
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            self.close()
            raise ReplicaLost(str(error)) from error


def serve_on_ray(
    make_engine: MakeEngine,
    replicas: int,
    *,
    router: Router | None = None,
    patience: float = 600.0,
    most_lost: int = 100,
    **options: Any,
) -> FrontEnd:
    """A front end over actors of Ray, which is to be initialised.

    Args:
      make_engine: called in each actor; it travels by cloudpickle, and takes the `KVEvents` that
        its engine is to have.
      router: with the engines' chunk size; None is one of the default.
      patience: see `RayLink`.
      most_lost: see `FrontEnd`.
      options: of the actors, as `ray.remote` takes them: `num_cpus`, `num_gpus`, `runtime_env`.

    Raises:
      ImportError: Ray is not installed.
    """
    import_ray()

    def start(name: str) -> Link:
        link = RayLink(make_engine, options, patience)
        if link.chunk_size != front_router.chunk_size:
            link.close()
            raise ValueError(
                f"{name} has chunks of {link.chunk_size} tokens, the router of "
                f"{front_router.chunk_size}"
            )
        return link

    front_router = router or Router()
    return FrontEnd(front_router, start, replicas, most_lost=most_lost)
