"""From the columns of all rewards to one score a sample, with every step apart for the log.

Invariants:

- ``total`` is ``combined`` plus all steps that come behind it, sample by sample; nothing else enters.
- Only ``whiten`` and running moments look across samples, and they look over all that are given: give the whole global
  batch.
- What is given is not changed; running moments are given back, to be kept with the checkpoint.

Legend: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from actors.rewards.combination_config import (
    ClipConfig,
    GatedConfig,
    LengthConfig,
    LinearConfig,
    MissingEosConfig,
    NormaliseConfig,
    OverlongConfig,
    PiecewiseConfig,
    RepetitionConfig,
    Shaping,
    TotalConfig,
    TruncationConfig,
)
from algorithms.advantages import whiten
from algorithms.combining import gated, linear, piecewise
from algorithms.errors import AlgorithmError
from algorithms.moments import RunningMoments
from algorithms.shaping import (
    clip_scores,
    length_penalty,
    missing_eos_penalty,
    normalise_scores,
    overlong_penalty,
    repetition_penalty,
    replace_unfinished,
)

COMBINED, WHITENED = "combined", "whitened"


@dataclass(frozen=True)
class Responses:
    """What shaping looks at besides scores.

    ``tokens`` are those of each response; ``max_tokens`` is the longest that the rollout allows.
    ``safety_prompts_N`` (bool) tags prompts, where the combination needs it.
    """

    finished_N: Tensor
    tokens: Sequence[Sequence[int]]
    lengths_N: Tensor
    max_tokens: int
    safety_prompts_N: Tensor | None = None


@dataclass(frozen=True)
class Total:
    """One score a sample, and how it came about.

    ``terms`` are all of (N,), by name, in order: each reward's score as it was given; changes of single rewards;
    ``combined``; then each step's change of the total. ``behind`` are the names of the steps behind ``combined``.
    ``moments`` are the running ones, this batch included.
    """

    scores_N: Tensor
    terms: dict[str, Tensor]
    behind: tuple[str, ...]
    moments: dict[str, RunningMoments]

    def metrics(self) -> dict[str, float]:
        """The mean of every term, and the standard deviation of those before ``combined`` and of the total."""
        found = {name: float(term_N.mean()) for name, term_N in self.terms.items()}
        given = list(self.terms)[: list(self.terms).index(COMBINED)]
        found |= {f"{name}_std": float(self.terms[name].std(correction=0)) for name in given}
        return found | {"total": float(self.scores_N.mean()), "total_std": float(self.scores_N.std(correction=0))}


def total_scores(
    config: TotalConfig,
    scores: Mapping[str, Tensor],
    responses: Responses,
    moments: Mapping[str, RunningMoments] | None = None,
) -> Total:
    """Combine the rewards and shape what comes of it.

    >>> shaped = TotalConfig(shaping={"eos": {"kind": "missing_eos", "penalty": 2.0}})
    >>> responses = Responses(torch.tensor([True, False]), [[5], [5]], torch.tensor([1, 1]), max_tokens=8)
    >>> total = total_scores(shaped, {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([0.5, 3.0])}, responses)
    >>> total.scores_N, total.terms["combined"], total.terms["eos"]
    (tensor([1.5000, 2.0000]), tensor([1.5000, 4.0000]), tensor([ 0., -2.]))

    Args:
        scores: (N,) of each reward, raw, by its name.
        moments: the running ones, by the name of their shaping, as the last call gave them back.

    Raises:
        AlgorithmError: the configuration is of other rewards, lengths differ, or prompts are not tagged.
    """
    if reason := config.why_not(scores):
        raise AlgorithmError(reason)
    kept = dict(moments or {})
    terms = dict(scores)
    changed = dict(scores)
    steps = list(config.shaping.items())
    for name, step in steps:
        if (of := getattr(step, "reward", None)) is not None:
            after_N = _stepped(name, step, changed[of], responses, kept)
            terms[name], changed[of] = after_N - changed[of], after_N
    total_N = _combined(config, changed, responses)
    terms[COMBINED] = total_N
    behind: list[str] = []
    if isinstance(config.combine, PiecewiseConfig) and config.combine.whiten:
        white_N = whiten(total_N)
        terms[WHITENED], total_N = white_N - total_N, white_N
        behind.append(WHITENED)
    for name, step in steps:
        if getattr(step, "reward", None) is None:
            after_N = _stepped(name, step, total_N, responses, kept)
            terms[name], total_N = after_N - total_N, after_N
            behind.append(name)
    return Total(total_N, terms, tuple(behind), kept)


def _combined(config: TotalConfig, scores: Mapping[str, Tensor], responses: Responses) -> Tensor:
    match config.combine:
        case LinearConfig(weights=weights):
            return linear(scores, weights or dict.fromkeys(scores, 1.0))
        case GatedConfig() as rule:
            return gated(
                scores[rule.score], scores[rule.gate], threshold=rule.threshold, replacement=rule.replacement
            )
        case PiecewiseConfig() as rule:
            tags_N = responses.safety_prompts_N
            if tags_N is None:
                if rule.tag_column is not None:
                    raise AlgorithmError(f"piecewise needs each prompt's tag, from the column {rule.tag_column}")
                tags_N = responses.finished_N.new_zeros(len(responses.finished_N)).bool()
            return piecewise(scores[rule.helpfulness], scores[rule.safety], tags_N, rule.threshold)


def _stepped(
    name: str, step: Shaping, scores_N: Tensor, responses: Responses, moments: dict[str, RunningMoments]
) -> Tensor:
    """The scores behind one step."""
    match step:
        case ClipConfig(low=low, high=high):
            return clip_scores(scores_N, low, high)
        case NormaliseConfig(by="running"):
            moments[name] = moments.get(name, RunningMoments()).updated(scores_N.tolist())
            return normalise_scores(scores_N, moments[name].mean, moments[name].std)
        case NormaliseConfig(mean=mean, std=std):
            return normalise_scores(scores_N, mean, std)
        case TruncationConfig(score=score):
            return replace_unfinished(scores_N, responses.finished_N, score)
        case MissingEosConfig(penalty=penalty):
            return scores_N + missing_eos_penalty(responses.finished_N, penalty)
        case LengthConfig(penalty_per_token=penalty, free_tokens=free):
            return scores_N + length_penalty(responses.lengths_N, penalty, free)
        case OverlongConfig(margin_tokens=margin, max_tokens=longest, penalty=penalty):
            limit = longest or responses.max_tokens
            return scores_N + penalty * overlong_penalty(responses.lengths_N, max_tokens=limit, margin_tokens=margin)
        case RepetitionConfig(ngram=ngram, penalty=penalty):
            return scores_N + repetition_penalty(responses.tokens, ngram=ngram, penalty=penalty).to(scores_N)
