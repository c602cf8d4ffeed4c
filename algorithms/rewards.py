"""From a reward model's score to a reward for every token.

Legend: N samples, T their response tokens laid end to end; ``offsets`` (N+1,) int64 are where samples begin and end.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from algorithms.errors import ShapeMismatch
from algorithms.kl import k1
from algorithms.shapes import require_offsets, require_same_length


def per_token_rewards(
    scores_N: Tensor,
    behaviour_logprobs_T: Tensor,
    ref_logprobs_T: Tensor,
    offsets: Tensor,
    kl_coefficient: float,
    estimator: Callable[[Tensor, Tensor], Tensor] = k1,
) -> Tensor:
    """``-coefficient * KL(behaviour, reference)`` on each token, and the score on top of the last, (T,).

    Summed over a sample this is InstructGPT's ``r(x, y) - beta log(pi(y|x) / pi_SFT(y|x))`` (Ouyang et al. 2022,
    equation 2, without its pre-training term), with the KL's estimator k1. It is of the policy that drew the tokens, a
    number: no gradient flows through the reward. The score lands on the last real token (OpenRLHF), not one past it
    (TRL).

    >>> behaviour, reference = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.0, -3.0, -2.0])
    >>> per_token_rewards(torch.tensor([5.0]), behaviour, reference, torch.tensor([0, 3]), 0.5)
    tensor([-0.0000, -0.5000,  4.5000])

    Raises:
        ShapeMismatch: lengths differ, or a sample has no response token to carry its score.
    """
    require_same_length(behaviour_logprobs=behaviour_logprobs_T, ref_logprobs=ref_logprobs_T)
    require_offsets(offsets, len(ref_logprobs_T))
    require_same_length(scores=scores_N, lengths=offsets[1:])
    if bool((empty := offsets.diff() < 1).any()):
        raise ShapeMismatch(f"sample {int(empty.nonzero()[0])} of the batch has no response token to carry its score")
    rewards_T = -kl_coefficient * estimator(behaviour_logprobs_T.detach(), ref_logprobs_T)
    return rewards_T.index_add(0, offsets[1:] - 1, scores_N.to(rewards_T))
