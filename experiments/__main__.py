"""Entry point of `python -m experiments`."""

from __future__ import annotations

import sys

from experiments.cli import main

if __name__ == "__main__":  # a worker process imports this module under another name
    sys.exit(main())
