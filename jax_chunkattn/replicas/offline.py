"""A file of prompts answered by many engines, each line exactly once, however often it breaks off.

Prompts are sorted, so that those which begin alike stand together, and cut into blocks. A block is
answered by one engine, which computes what its prompts have in common once, and written as a whole:
the file of a block is there with all of its answers, or not at all. So a job that is given again,
after whatever stopped it, computes the blocks that are missing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax_chunkattn.engine.admission import InvalidRequest
from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.replicas.server import MakeEngine
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.sampling.seeds import sample_seed
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.kv_events import KVEvents

BLOCK_LINES = 64


@dataclass(frozen=True)
class OfflineJob:
    """Prompts to be answered, and where answers go.

    Attributes:
      prompts: JSON lines with a `prompt`: token ids, or text for an engine with a tokenizer.
      answers: JSON lines in the order of the prompts: `line` from 0 up, `tokens`, `text` and
        `finish_reason`, or `error` for a prompt that no engine could serve. Until all are there,
        those that are lie in the folder `answers` + ".parts", which every engine must reach.
      params: of all; a seed given here makes one for each line.
      block_lines: prompts of a block.
    """

    prompts: Path
    answers: Path
    params: SamplingParams = SamplingParams()
    block_lines: int = BLOCK_LINES

    @property
    def parts(self) -> Path:
        return self.answers.with_name(f"{self.answers.name}.parts")

    def begin(self) -> list[int]:
        """Makes the folder of parts, or finds it; returns the blocks that are still missing.

        Raises:
          FileExistsError: the answers are there, or the parts of another job.
          ValueError: a line is no prompt.
        """
        if self.answers.exists():
            raise FileExistsError(f"{self.answers} is there already")
        self.parts.mkdir(parents=True, exist_ok=True)
        mark = {
            "prompts": hashlib.blake2b(self.prompts.read_bytes(), digest_size=16).hexdigest(),
            "params": repr(self.params),
            "block_lines": self.block_lines,
        }
        job = self.parts / "job.json"
        if job.exists() and json.loads(job.read_text()) != mark:
            raise FileExistsError(f"{self.parts} has the parts of another job; remove it first")
        number = len(self.sorted_blocks())
        _write_whole(job, [mark])
        return [block for block in range(number) if not self._part(block).exists()]

    def sorted_blocks(self) -> list[list[tuple[int, Any]]]:
        """Lines and their prompts, those that begin alike together, in blocks."""
        lines: list[tuple[int, Any]] = []
        with self.prompts.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                try:
                    lines.append((number, _prompt_of(json.loads(line))))
                except (ValueError, KeyError, TypeError) as error:
                    where = f"{self.prompts}, line {number}"
                    raise ValueError(f"{where}: no prompt: {error!r}") from error
        lines.sort(key=lambda one: (isinstance(one[1], str), one[1]))
        size = self.block_lines
        return [lines[begin : begin + size] for begin in range(0, len(lines), size)]

    def answer(self, block: int, lines: Sequence[tuple[int, Any]], engine: Engine) -> None:
        """Answers a block, and writes it as a whole; nothing to do if it is there."""
        if not self._part(block).exists():
            _write_whole(self._part(block), [*self._answers(lines, engine)])

    def finish(self) -> int:
        """Puts the parts together, in the order of the prompts; returns how many lines there are.

        Raises:
          FileNotFoundError: a block is missing.
        """
        records = []
        for block, lines in enumerate(self.sorted_blocks()):
            part = [json.loads(line) for line in self._part(block).read_text().splitlines()]
            assert [one["line"] for one in part] == [number for number, _ in lines]
            records.extend(part)
        _write_whole(self.answers, sorted(records, key=lambda one: one["line"]))
        shutil.rmtree(self.parts)
        return len(records)

    def _part(self, block: int) -> Path:
        return self.parts / f"block-{block:06d}.jsonl"

    def _answers(self, lines: Sequence[tuple[int, Any]], engine: Engine) -> Iterator[Any]:
        handles = {}
        for number, prompt in lines:
            try:
                handles[number] = engine.submit(prompt, self._params_of(number))
            except (InvalidRequest, PoolExhausted) as error:
                handles[number] = error
        for number, _ in lines:
            handle = handles[number]
            if isinstance(handle, Exception):
                yield {"line": number, "error": str(handle)}
                continue
            completion = handle.result()
            yield {
                "line": number,
                "tokens": list(completion.tokens),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
            }

    def _params_of(self, number: int) -> SamplingParams:
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=sample_seed(seed, number))


class OfflineWorker:
    """What an actor of Ray Data does: a batch of blocks by an engine of its own."""

    def __init__(self, job: OfflineJob, make_engine: MakeEngine):
        self._job, self._engine = job, make_engine(KVEvents())
        self._blocks = job.sorted_blocks()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for block in batch["block"]:
            self._job.answer(int(block), self._blocks[int(block)], self._engine)
        return batch


def answer_on_ray(job: OfflineJob, make_engine: MakeEngine, workers: int, **options: Any) -> int:
    """Answers a file by Ray Data's `map_batches` over actors; returns how many lines it has.

    Args:
      make_engine: called in each actor; it travels by cloudpickle.
      workers: actors.
      options: of `map_batches`: `num_cpus`, `num_gpus`, `runtime_env`.

    Raises:
      ImportError: Ray is not installed.
      FileExistsError, ValueError: as `OfflineJob.begin`.
    """
    from jax_chunkattn.replicas.on_ray import import_ray

    import_ray()
    import ray.data  # pyright: ignore[reportMissingImports]

    missing = job.begin()
    if missing:
        blocks = ray.data.from_items(
            [{"block": block} for block in missing], override_num_blocks=len(missing)
        )
        blocks.map_batches(
            OfflineWorker,
            fn_constructor_args=(job, make_engine),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=1,
            **options,
        ).materialize()
    return job.finish()


def _prompt_of(value: Any) -> Any:
    prompt = value["prompt"]
    tokens = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    if not tokens and not isinstance(prompt, str):
        raise TypeError(f"neither token ids nor text: {prompt!r:.60}")
    return prompt


def _write_whole(path: Path, records: Sequence[Any]) -> None:
    """Lines of JSON: all of them, or no file."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
