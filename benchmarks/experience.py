"""Reading experience from the object store into torch, against memcpy and against pickled tensors.

What is read is the four big columns of a rollout. "view" makes every column a tensor; "gather" also lays all rows of
the three per-response columns and the tokens end to end in an order of its own, as a trainer does. The ways that
pickle put the same numbers into the same store as torch tensors: one a column, and one a sample and column.

    python -m benchmarks.experience [--rows 4096] [--rounds 9]
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from torch import Tensor

from benchmarks.measure import Trial, print_setting
from cluster.config import ClusterConfig
from cluster.session import connect
from experience.schema import ROLLOUT, make_batch
from experience.tensors import ListColumn, list_column
from experience.turns import one_turn_each

PROMPT, SHORTEST, LONGEST = 64, 64, 960
COLUMNS = ("tokens", "rollout_logprobs", "policy_versions")


def rollout(num_rows: int) -> pa.RecordBatch:
    """Random samples."""
    source = np.random.default_rng(0)
    lengths = source.integers(SHORTEST, LONGEST + 1, num_rows)
    responses, totals = int(lengths.sum()), lengths + PROMPT
    return make_batch(
        ROLLOUT,
        {
            "sample_id": np.arange(num_rows).tolist(),
            "prompt_id": np.arange(num_rows).tolist(),
            "tokens": lists(source.integers(0, 50_000, int(totals.sum())).astype(np.int32), totals),
            "num_prompt_tokens": [PROMPT] * num_rows,
            **one_turn_each([PROMPT] * num_rows, totals.tolist()),
            "rollout_logprobs": lists(source.standard_normal(responses).astype(np.float32), lengths),
            "policy_versions": lists(np.zeros(responses, np.int32), lengths),
            "finish_reason": ["stop"] * num_rows,
        },
    )


def lists(values: npt.NDArray[np.generic], lengths: npt.NDArray[np.int64]) -> pa.ListArray:
    """Values cut into rows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def views(batch: pa.RecordBatch) -> dict[str, ListColumn]:
    """The columns as tensors."""
    return {name: list_column(batch, name) for name in COLUMNS}


def gathered(batch: pa.RecordBatch, order: list[int]) -> list[Tensor]:
    """The columns with their rows in another order."""
    return [column.gather(order) for column in views(batch).values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with connect(ClusterConfig(address="local", object_store_bytes=1 << 30), num_cpus_wanted=1):
        race(rollout(given.rows), given.rounds)


def race(batch: pa.RecordBatch, rounds: int) -> None:
    """Time every way to read ``batch``."""
    columns = views(batch)
    flat = {name: column.values.clone() for name, column in columns.items()}
    samples = [
        {name: flat[name][column.offsets[row] : column.offsets[row + 1]].clone() for name, column in columns.items()}
        for row in range(batch.num_rows)
    ]
    num_bytes = sum(values.nbytes for values in flat.values())
    order = np.random.default_rng(1).permutation(batch.num_rows).tolist()
    sources = [values.numpy() for values in flat.values()]
    targets = [np.empty_like(values) for values in sources]
    stored, stored_pickle, stored_samples = ray.put(batch), ray.put(pickle.dumps(flat)), ray.put(pickle.dumps(samples))
    stored_tensors = ray.put(flat)

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)

    ways: dict[str, Callable[[], object]] = {
        "memcpy": copy,
        "Arrow, view": lambda: views(ray.get(stored)),
        "Arrow, view and gather": lambda: gathered(ray.get(stored), order),
        "torch tensors as Ray serializes them": lambda: ray.get(stored_tensors),
        "pickled tensors, one a column": lambda: pickle.loads(ray.get(stored_pickle)),
        "pickled tensors, one a sample and column": lambda: pickle.loads(ray.get(stored_samples)),
    }
    print_setting(
        "reading experience into torch",
        {
            "rows": f"{batch.num_rows} samples, prompts of {PROMPT} and responses of {SHORTEST} to {LONGEST} tokens",
            "columns": f"{', '.join(COLUMNS)}: {num_bytes / 1e6:.0f} MB",
        },
    )
    trial = Trial("MB", num_bytes / 1e6)
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            with trial.time(name):
                way()
    trial.report("memcpy")
    trial.report("pickled tensors, one a column")


if __name__ == "__main__":
    main()
