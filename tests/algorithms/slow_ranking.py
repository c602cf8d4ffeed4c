"""The same mathematics as ``algorithms.ranking``, in Python loops over single numbers: slow, and independent of it.

Scores are scalars that autograd follows, so that gradients can be compared.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

Prompt = tuple[list[Tensor], list[int]]


def log_sigmoid(x: Tensor) -> Tensor:
    """By the definition."""
    return torch.log(1 / (1 + torch.exp(-x)))


def pairs(prompt: Prompt) -> list[tuple[Tensor, Tensor]]:
    """(better, worse) of every two responses that are not tied."""
    scores, ranks = prompt
    found = []
    for i, j in combinations(range(len(scores)), 2):
        if ranks[i] < ranks[j]:
            found.append((scores[i], scores[j]))
        if ranks[i] > ranks[j]:
            found.append((scores[j], scores[i]))
    return found


def kwise(prompts: list[Prompt], margins: list[float]) -> tuple[Tensor, dict[str, float], int]:
    """Loss and metrics, means over the prompts with a pair, and how many those are."""
    losses, accuracies, differences, means = [], [], [], []
    for prompt, margin in zip(prompts, margins, strict=True):
        found = pairs(prompt)
        if not found:
            continue
        losses.append(sum((-log_sigmoid(w - v - margin) for w, v in found), torch.tensor(0.0)) / len(found))
        right = [1.0 if w.item() > v.item() else 0.5 if w.item() == v.item() else 0.0 for w, v in found]
        accuracies.append(sum(right) / len(found))
        differences.append(sum(w.item() - v.item() for w, v in found) / len(found))
        means.append(sum(score.item() for score in prompt[0]) / len(prompt[0]))
    count = len(losses)
    metrics = {"accuracy": accuracies, "margin": differences, "score": means}
    return torch.stack(losses).sum() / count, {name: sum(x) / count for name, x in metrics.items()}, count


def best_of(prompts: list[Prompt]) -> tuple[Tensor, dict[str, float], int]:
    """Loss and metrics, means over the prompts with a pair, and how many those are. Each best one in turn is set
    against all that are worse.
    """
    losses, accuracies, differences, means = [], [], [], []
    for scores, ranks in prompts:
        best = [score for score, rank in zip(scores, ranks, strict=True) if rank == min(ranks)]
        worse = [score for score, rank in zip(scores, ranks, strict=True) if rank > min(ranks)]
        if not worse:
            continue
        softmaxes = [torch.exp(one) / sum(torch.exp(score) for score in [one, *worse]) for one in best]
        losses.append(sum((-torch.log(share) for share in softmaxes), torch.tensor(0.0)) / len(best))
        right = 0.0
        for one in best:
            numbers = [one.item(), *(score.item() for score in worse)]
            right += 1 / numbers.count(max(numbers)) if one.item() == max(numbers) else 0.0
        accuracies.append(right / len(best))
        differences.append(sum(x.item() for x in best) / len(best) - sum(x.item() for x in worse) / len(worse))
        means.append(sum(score.item() for score in scores) / len(scores))
    count = len(losses)
    metrics = {"accuracy": accuracies, "margin": differences, "score": means}
    return torch.stack(losses).sum() / count, {name: sum(x) / count for name, x in metrics.items()}, count


def calibration_counts(margins: list[float], num_bins: int, weights: list[float]) -> list[list[float]]:
    """Counts, confidences and correct pairs by bin, each bin tried in turn."""
    counts = [[0.0, 0.0, 0.0] for _ in range(num_bins)]
    for margin, weight in zip(margins, weights, strict=True):
        confidence = 1 / (1 + math.exp(-abs(margin)))
        for index, row in enumerate(counts):
            low, high = 0.5 + 0.5 * index / num_bins, 0.5 + 0.5 * (index + 1) / num_bins
            if low < confidence <= high or (index == 0 and confidence == 0.5):
                row[0] += weight
                row[1] += weight * confidence
                row[2] += weight * (1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    return counts
