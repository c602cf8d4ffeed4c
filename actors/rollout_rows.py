"""From what engines answered to rows of the ROLLOUT schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from experience.schema import ROLLOUT, make_batch

if TYPE_CHECKING:
    from actors.vllm_engine.engine import Completion


@dataclass(frozen=True)
class Turn:
    """A turn of the policy, where in its sample it begins, and what an environment gave for each of its tokens.

    Without an environment ``rewards`` is empty.
    """

    start: int
    completion: Completion
    rewards: Sequence[float] = ()


@dataclass(frozen=True)
class Answer:
    """A sample: all its tokens, and the turns among them. The last turn ends it."""

    sample_id: int
    prompt_id: int
    tokens: Sequence[int]
    num_prompt_tokens: int
    turns: Sequence[Turn]
    finish_reason: str

    @classmethod
    def of_one_turn(cls, sample_id: int, prompt_id: int, prompt: Sequence[int], done: Completion) -> Answer:
        """A prompt and its response."""
        turns = (Turn(len(prompt), done),)
        return cls(sample_id, prompt_id, [*prompt, *done.tokens], len(prompt), turns, done.finish_reason)

    @property
    def completions(self) -> list[Completion]:
        """What the policy drew, turn by turn."""
        return [turn.completion for turn in self.turns]

    @property
    def num_drawn(self) -> int:
        """Tokens that the policy drew."""
        return sum(len(completion.tokens) for completion in self.completions)


def rollout_rows(answers: Sequence[Answer]) -> pa.RecordBatch:
    """ROLLOUT, one row a sample."""
    turns = [turn for answer in answers for turn in answer.turns]
    num_turns, num_drawn = ([len(a.turns) for a in answers], [a.num_drawn for a in answers])
    ends = [turn.start + len(turn.completion.tokens) for turn in turns]
    rewards = list(chain.from_iterable(turn.rewards for turn in turns))
    num_rewards = [sum(len(turn.rewards) for turn in answer.turns) for answer in answers]
    logprobs = list(chain.from_iterable(turn.completion.logprobs for turn in turns))
    spans = [span for turn in turns for span in turn.completion.versions]
    versions = np.repeat([version for version, _, _ in spans], [end - start for _, start, end in spans])
    tokens = list(chain.from_iterable(answer.tokens for answer in answers))
    return make_batch(
        ROLLOUT,
        {
            "sample_id": [answer.sample_id for answer in answers],
            "prompt_id": [answer.prompt_id for answer in answers],
            "tokens": _lists(np.array(tokens, dtype=np.int32), [len(answer.tokens) for answer in answers]),
            "num_prompt_tokens": [answer.num_prompt_tokens for answer in answers],
            "turn_starts": _lists(np.array([turn.start for turn in turns], dtype=np.int32), num_turns),
            "turn_ends": _lists(np.array(ends, dtype=np.int32), num_turns),
            "environment_rewards": _lists(np.array(rewards, dtype=np.float32), num_rewards),
            "rollout_logprobs": _lists(np.array(logprobs, dtype=np.float32), num_drawn),
            "policy_versions": _lists(versions.astype(np.int32), num_drawn),
            "finish_reason": [answer.finish_reason for answer in answers],
        },
    )


def _lists(values: np.ndarray[tuple[int], np.dtype[np.generic]], lengths: Sequence[int]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
