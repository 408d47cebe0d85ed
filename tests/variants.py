"""Ways to call an operation: compiled and not, with arguments from the device and from the host."""

from __future__ import annotations

from typing import Any

import chex

variants: Any = chex.variants
every_way = variants(with_jit=True, without_jit=True, with_device=True, without_device=True)


class VariantsTestCase(chex.TestCase):
    """In a test decorated with `variants`, `variant(function)` calls the function in one way."""

    variant: Any
