"""Entry point of `python -m experiments`."""

from __future__ import annotations

import sys

try:
    import tyro  # noqa: F401 -- the first of what the extra installs
except ModuleNotFoundError:
    print("error: this needs an extra: pip install -e '.[experiments]'", file=sys.stderr)
    sys.exit(2)

from experiments.cli import main

if __name__ == "__main__":  # a worker process imports this module under another name
    sys.exit(main())
