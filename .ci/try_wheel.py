"""What somebody does who has installed the wheel and nothing else: the kernel, and an engine.

Run it in an environment with the wheel alone, outside the repository.
"""

import importlib.metadata
import pathlib

import jax
import numpy as np
from flax import nnx

import jax_chunkattn
import models

assert pathlib.Path(jax_chunkattn.__file__).is_relative_to(pathlib.Path(jax.__file__).parents[1])
assert jax_chunkattn.__version__ == importlib.metadata.version("jax_chunkattn")

config = models.DecoderConfig(
    vocab_size=97, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8,
)  # fmt: skip
model = models.Decoder(config, rngs=nnx.Rngs(0))
prompts = [[*range(1, 41), last] for last in (50, 60, 70)]
answers = {}
for sharing in (True, False):
    cache = jax_chunkattn.CacheConfig(num_chunks=40, chunk_size=8)
    with jax_chunkattn.Engine(model, cache, sharing=sharing) as engine:
        outputs = engine.generate(prompts, jax_chunkattn.SamplingParams(max_tokens=8))
        answers[sharing] = [output.samples[0].tokens for output in outputs]
        computed = engine.stats.prefill_tokens
        print(f"sharing={sharing}: {computed} prompt tokens computed; {engine.stats.plan_decision}")
assert answers[True] == answers[False], answers

rows = [[0, 1, 2], [0, 1, 3]]
lengths = [20, 22]
plan, summary = jax_chunkattn.plan_decode(rows, lengths, chunk_size=8, num_chunks=4)
random = np.random.default_rng(0)
keys, values = random.standard_normal((2, 1, 2, 4, 8, 16), np.float32)
padded = plan.num_rows
q = random.standard_normal((padded, 4, 16), np.float32)
lengths = np.pad(np.array(lengths, np.int32), (0, padded - len(lengths)))
xla, native, reference = (
    jax_chunkattn.chunk_attention(q, keys, values, plan, lengths, implementation=implementation)
    for implementation in ("xla", "native", "reference")
)
np.testing.assert_allclose(xla, reference, atol=1e-5)
np.testing.assert_allclose(native, reference, atol=1e-5)
print(f"jax_chunkattn {jax_chunkattn.__version__}: {summary.reason}")
