"""Training through a role against a bare packed PyTorch loop: same weights, same tokens, same packs, same updates.

The bare loops are what one would write by hand: Hugging Face's model over each pack, cross-entropy or PPO's ratio
loss, backward, clip, PyTorch's fused AdamW. They report nothing.

    python -m benchmarks.training [--size small] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from actors.config import ModelConfig, OptimizerConfig, PolicyConfig, SamplingConfig, TrainedRoleConfig, ZeroConfig
from actors.learner import LearnerActor
from actors.policy import PolicyActor
from algorithms.config import OnlineConfig, SupervisedConfig
from benchmarks.measure import Trial, print_setting
from benchmarks.tiny import sequences, write_model
from cluster.context import RankContext
from experience.packing import minibatches, plan_packs
from experience.schema import CREDIT, EXAMPLES, ROLLOUT, make_batch
from experience.turns import one_turn_each

ROWS, SHORTEST, LONGEST, PROMPT = 32, 32, 224, 16
PACK = 512
MINIBATCHES = 2
LEARNING_RATE, BETAS, EPS, CLIP = 1e-4, (0.9, 0.95), 1e-5, 0.2


class BareLoop:
    """A Hugging Face model and an optimizer."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True
        )

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """One optimizer update of the sum of some losses."""
        self._optimizer.zero_grad(set_to_none=True)
        for loss in losses:
            loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def next_token(self, rows: Sequence[list[int]], denominator: int) -> Tensor:
        """Cross-entropy of every token of a pack but each row's first."""
        tokens, positions = packed(rows)
        logits = self.model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
        targets = tokens[1:].masked_fill(positions[1:] == 0, -100)
        return cross_entropy(logits[:-1], targets, reduction="sum") / denominator

    def ratio(self, rows: Sequence[list[int]], advantages: Tensor, behaviour: Tensor, denominator: int) -> Tensor:
        """PPO's clipped loss over the responses of a pack."""
        tokens, positions = packed(rows)
        keep = (positions >= PROMPT).nonzero()[:, 0] - 1
        logits = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep
        ).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, tokens[keep + 1][:, None])[:, 0]
        ratio = (logprobs - behaviour).exp()
        worse = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        return worse.sum() / denominator


def packed(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows end to end, and their positions."""
    tokens = torch.tensor([token for row in rows for token in row])
    return tokens, torch.cat([torch.arange(len(row)) for row in rows])


def learner(folder: Path, size: str, zero: ZeroConfig, rounds: int) -> None:
    """Pre-training: one update a run."""
    rows = sequences(ROWS, SHORTEST, LONGEST, size)
    mask = [[1] * len(row) for row in rows]
    batch = make_batch(EXAMPLES, {"example_id": list(range(ROWS)), "tokens": rows, "loss_mask": mask})
    config = TrainedRoleConfig(**common(folder, zero))
    role = LearnerActor(context("learner"), config, SupervisedConfig(name="pretrain", batch_size=ROWS), 0)
    bare = BareLoop(folder)
    denominator = sum(len(row) - 1 for row in rows)

    def bare_update() -> None:
        packs = plan_packs([len(row) for row in rows], 1, PACK).packs[0]
        bare.update([partial(bare.next_token, [rows[unit] for unit in units], denominator) for units in packs])

    race(
        f"LearnerActor.train, ZeRO stage {zero.stage}",
        sum(map(len, rows)),
        rounds,
        lambda: role.train(0, 1000, batch),
        bare_update,
    )


def policy(folder: Path, size: str, zero: ZeroConfig, rounds: int) -> None:
    """PPO: one epoch of minibatches a run."""
    rows = sequences(ROWS, SHORTEST, LONGEST, size)
    lengths = [len(row) - PROMPT for row in rows]
    rollout, credit, advantages, behaviour = experience(rows, lengths)
    algorithm = OnlineConfig(num_minibatches=MINIBATCHES, clip_ratio=CLIP)
    sampling = SamplingConfig(max_response_tokens=LONGEST)
    role = PolicyActor(context("policy"), PolicyConfig(**common(folder, zero)), algorithm, sampling, 0, 1000)
    bare = BareLoop(folder)
    starts = np.cumsum([0, *lengths])

    def column(values: Tensor, chosen: Sequence[int]) -> Tensor:
        return torch.cat([values[starts[row] : starts[row + 1]] for row in chosen])

    def loss(own: Sequence[int], denominator: int) -> Tensor:
        return bare.ratio([rows[row] for row in own], column(advantages, own), column(behaviour, own), denominator)

    def bare_iteration() -> None:
        for chosen in minibatches(ROWS, MINIBATCHES, 0, 0, 0):
            denominator = sum(lengths[row] for row in chosen)
            packs = plan_packs([len(rows[row]) for row in chosen], 1, PACK).packs[0]
            picked = [[chosen[unit] for unit in units] for units in packs]
            bare.update([partial(loss, own, denominator) for own in picked])

    race(
        f"PolicyActor.train, ZeRO stage {zero.stage}",
        sum(map(len, rows)),
        rounds,
        lambda: role.train(0, [rollout], [credit]),
        bare_iteration,
    )


def experience(rows: list[list[int]], lengths: list[int]) -> tuple[pa.RecordBatch, pa.RecordBatch, Tensor, Tensor]:
    """A rollout of ``rows``, its credit, and the same two columns as flat tensors."""
    source = torch.Generator().manual_seed(1)
    advantages = torch.randn(sum(lengths), generator=source)
    behaviour = torch.full((sum(lengths),), -7.6)
    ids = list(range(len(rows)))

    def lists(values: Tensor) -> list[list[float]]:
        return [part.tolist() for part in torch.split(values, lengths)]

    rollout = {
        "sample_id": ids,
        "prompt_id": ids,
        "tokens": rows,
        "num_prompt_tokens": [PROMPT] * len(rows),
        **one_turn_each([PROMPT] * len(rows), [PROMPT + length for length in lengths]),
        "rollout_logprobs": lists(behaviour),
        "policy_versions": [[0] * length for length in lengths],
        "finish_reason": ["length"] * len(rows),
    }
    given = {
        "sample_id": ids,
        "advantages": lists(advantages),
        "behaviour_logprobs": lists(behaviour),
        "loss_weights": lists(torch.ones_like(advantages)),
    }
    return make_batch(ROLLOUT, rollout), make_batch(CREDIT, given), advantages, behaviour


def race(what: str, num_tokens: int, rounds: int, role: Callable[[], object], bare: Callable[[], object]) -> None:
    """Time both, in turn, after a run of each that is not counted."""
    trial = Trial("tokens", num_tokens)
    role()
    bare()
    for _ in range(rounds):
        with trial.time(f"bare loop ({what.split('.')[0]})"):
            bare()
        with trial.time(what):
            role()
    trial.report(f"bare loop ({what.split('.')[0]})")


def common(folder: Path, zero: ZeroConfig) -> dict[str, Any]:
    """What every trained role here is configured with."""
    return {
        "model": ModelConfig(path=str(folder), dtype="float32"),
        "zero": zero,
        "optimizer": OptimizerConfig(learning_rate=LEARNING_RATE, betas=BETAS, eps=EPS),
        "max_tokens_per_pack": PACK,
    }


def context(role: str) -> RankContext:
    """The only rank of a role, in this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return RankContext(role, 0, 1, 0, "127.0.0.1", port, "cpu", torch.get_num_threads(), None, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        num_weights = write_model(Path(folder), given.size)
        print_setting(
            "training through a role against a bare packed loop",
            {
                "model": f"{num_weights / 1e6:.1f} M weights, float32, {torch.get_num_threads()} thread",
                "batch": f"{ROWS} sequences of {SHORTEST} to {LONGEST} tokens, packs of at most {PACK}",
                "PPO": f"prompts of {PROMPT} tokens, {MINIBATCHES} minibatches, 1 epoch",
            },
        )
        for stage in given.stages:
            learner(Path(folder), given.size, ZeroConfig(stage=stage), given.rounds)
            policy(Path(folder), given.size, ZeroConfig(stage=stage), given.rounds)


if __name__ == "__main__":
    main()
