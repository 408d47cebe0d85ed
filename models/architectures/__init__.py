"""The architectures that load, one file for each family; each is declared as a whole.

Another one is another declaration, in a file of its own or in that of its family, and a line here.
"""

from __future__ import annotations

from models.architectures.declaration import Architecture
from models.architectures.gemma import GEMMA2, GEMMA3
from models.architectures.gpt2 import GPT2
from models.architectures.llama import LLAMA
from models.architectures.mistral import MISTRAL
from models.architectures.olmo import OLMO2
from models.architectures.opt import OPT
from models.architectures.phi import PHI3
from models.architectures.qwen import QWEN2, QWEN3
from models.architectures.smollm import SMOLLM3

ARCHITECTURES: dict[str, Architecture] = {
    architecture.class_name: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        PHI3,
        OLMO2,
        SMOLLM3,
        OPT,
        GPT2,
    )
}
"""By class name, in the order of the README's table."""
