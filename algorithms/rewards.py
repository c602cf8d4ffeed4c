"""From a reward model's score to a reward for every token.

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.
"""

from __future__ import annotations

from torch import Tensor

from algorithms.kl import k1


def shape_scores(
    scores_N: Tensor,
    finished_N: Tensor,
    *,
    clip: float | None,
    missing_eos_score: float | None,
    missing_eos_penalty: float,
) -> Tensor:
    """Scores as they enter the reward, (N,): clipped, then changed where a response did not end by itself.

    Args:
        finished_N: bool; false where generation was cut off.
        clip: scores are clipped to ``[-clip, clip]``.
        missing_eos_score: replaces the score of an unfinished response (Huang et al. 2024, detail 13).
        missing_eos_penalty: is subtracted from it.
    """
    shaped = scores_N if clip is None else scores_N.clamp(-clip, clip)
    if missing_eos_score is not None:
        shaped = shaped.where(finished_N, missing_eos_score)
    return shaped - missing_eos_penalty * (~finished_N).to(shaped)


def per_token_rewards(
    scores_N: Tensor, behaviour_logprobs_T: Tensor, ref_logprobs_T: Tensor, offsets: Tensor, kl_coefficient: float
) -> Tensor:
    """``-coefficient * (behaviour - reference)`` on each token, and the score on top of the last, (T,).

    (Ouyang et al. 2022, equation 2, token by token; the KL is k1 of the policy that drew the tokens.)

    Raises:
        ValueError: a sample has no response token to carry its score.
    """
    if bool((offsets.diff() < 1).any()):
        raise ValueError(f"sample {int((offsets.diff() < 1).nonzero()[0])} of the batch has no response token")
    rewards = -kl_coefficient * k1(behaviour_logprobs_T, ref_logprobs_T)
    return rewards.index_add(0, offsets[1:] - 1, scores_N.to(rewards))
