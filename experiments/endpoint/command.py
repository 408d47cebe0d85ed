"""`python -m experiments endpoint`: a model behind OpenAI's interface, until Ctrl-C.

Any client of that interface can ask it, by `/v1/completions`, `/v1/chat/completions` and
`/v1/models`, and `/v1/score` for the log-probabilities of given texts. Each answer says how many of
its prompt's tokens were cached, and why the others were not. A page at `/` draws the live prefix
tree, and `/metrics` is for Prometheus.

It listens at this machine's own address alone. With `--keys` only who has a key may ask, and
tenants share no cache.

    python -m experiments endpoint --model smollm2
    python -m experiments endpoint --model ./Llama-3.2-1B-Instruct --keys keys.txt

Needs the extra `server`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from experiments.endpoint.config import EndpointConfig, check
from experiments.harness.commands import Command
from experiments.harness.errors import UserError

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def run(config: EndpointConfig) -> dict[str, Any]:
    """Serve until told to stop; returns what was served.

    Raises:
        UserError: something in `config`, or a file it names, cannot be used.
    """
    check(config)
    check_installed()
    from experiments.endpoint.run import serve

    return serve(config)


def check_installed() -> None:
    """Raise `UserError` unless what the server is made of is installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the endpoint needs {', '.join(missing)}: pip install -e '.[experiments,server]'"
        )


ENDPOINT = Command("endpoint", EndpointConfig, run)
