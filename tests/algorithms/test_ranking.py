"""Losses of reward models: values by hand, and slow code with its gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from algorithms.errors import AlgorithmError
from algorithms.ranking import (
    accuracy_counts,
    best_of_loss,
    centring_term,
    kwise_centring_term,
    kwise_loss,
    num_ranked_prompts,
    pairwise_loss,
    ranked_pairs,
    soft_pairwise_loss,
    wins,
)
from tests.algorithms import slow_ranking
from tests.algorithms.ranking_inputs import (
    NUM_PAIRS,
    NUM_RANKED,
    SIZES,
    doubles,
    floats,
    prompts_of,
    ranked,
    ranks_of,
    same_order,
    scalars,
)

LN3 = math.log(3)


# ---- pairs


def test_pairwise_by_hand() -> None:
    """Margins ln 3, -ln 3, 0: sigmoids 3/4, 1/4, 1/2: losses ln 4/3, ln 4, ln 2 = 0.287682, 1.386294, 0.693147.

    Their mean is 0.789041. One is right, one wrong, one a tie: accuracy 0.5.
    Gradients of the chosen: -(1 - sigmoid) / 3.
    """
    chosen_N = torch.tensor([LN3, 0.0, 5.0], dtype=torch.float64, requires_grad=True)
    rejected_N = torch.tensor([0.0, LN3, 5.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = pairwise_loss(chosen_N, rejected_N, denominator=3)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0.789041, abs=1e-6)
    assert chosen_N.grad is not None and rejected_N.grad is not None
    assert chosen_N.grad.tolist() == pytest.approx([-0.25 / 3, -0.75 / 3, -0.5 / 3])
    assert rejected_N.grad.tolist() == pytest.approx([0.25 / 3, 0.75 / 3, 0.5 / 3])
    assert floats(metrics) == pytest.approx({"accuracy": 0.5, "margin": 0.0, "score": (2 * LN3 + 10) / 6})


def test_untrained_pairwise_loss_is_ln_2() -> None:
    """A head of zeros."""
    loss, metrics = pairwise_loss(torch.zeros(5), torch.zeros(5), denominator=5)
    assert float(loss) == pytest.approx(math.log(2))
    assert float(metrics["accuracy"]) == 0.5


def test_pairwise_equals_slow_code() -> None:
    chosen_N, rejected_N = (part.requires_grad_() for part in doubles(2, seed=2))
    loss, metrics = pairwise_loss(chosen_N, rejected_N, denominator=NUM_PAIRS)
    pairs = list(zip(chosen_N.tolist(), rejected_N.tolist(), strict=True))
    wanted = sum(math.log(1 + math.exp(rejected - chosen)) for chosen, rejected in pairs) / NUM_PAIRS
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    slopes = [-1 / (1 + math.exp(chosen - rejected)) / NUM_PAIRS for chosen, rejected in pairs]
    chosen_slope, rejected_slope = torch.autograd.grad(loss, (chosen_N, rejected_N))
    assert chosen_slope.tolist() == pytest.approx(slopes, rel=1e-12)
    assert rejected_slope.tolist() == pytest.approx([-slope for slope in slopes], rel=1e-12)
    assert float(metrics["accuracy"]) == sum(chosen > rejected for chosen, rejected in pairs) / NUM_PAIRS


def test_pairwise_does_not_overflow() -> None:
    loss, _ = pairwise_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), denominator=1)
    assert float(loss) == 2e4


# ---- soft labels


def test_soft_labels_by_hand() -> None:
    """Both d = ln 3: sigmoid 3/4. p = 0.75: -(0.75 ln 0.75 + 0.25 ln 0.25) = 0.562335, the entropy, gradient 0.

    p = 0.25: -(0.25 ln 0.75 + 0.75 ln 0.25) = 1.111641, gradient 0.75 - 0.25 = 0.5. Over 2: loss 0.836988, 0, 0.25.
    The first is right, with margin ln 3; in the second the other is believed better: wrong, with margin -ln 3.
    """
    first_N = torch.tensor([LN3, 1 + LN3], dtype=torch.float64, requires_grad=True)
    second_N = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = soft_pairwise_loss(first_N, second_N, torch.tensor([0.75, 0.25]), denominator=2)
    assert float(loss.detach()) == pytest.approx(0.836988, abs=1e-6)
    first_slope, second_slope = torch.autograd.grad(loss, (first_N, second_N))
    assert first_slope.tolist() == pytest.approx([0.0, 0.25])
    assert second_slope.tolist() == pytest.approx([0.0, -0.25])
    assert floats(metrics) == pytest.approx({"accuracy": 0.5, "margin": 0.0, "score": (2 * LN3 + 2) / 4})


def test_certain_labels_are_pairwise() -> None:
    """p = 1, and p = 0 with the two exchanged, to the bit; scores of 1e4 do not overflow."""
    first_N, second_N = (part.float() for part in doubles(2))
    first_N[0], second_N[0] = -1e4, 1e4
    loss, metrics = pairwise_loss(first_N, second_N, denominator=3)
    soft_loss, soft_metrics = soft_pairwise_loss(first_N, second_N, torch.ones(NUM_PAIRS), denominator=3)
    swapped_loss, swapped_metrics = soft_pairwise_loss(second_N, first_N, torch.zeros(NUM_PAIRS), denominator=3)
    assert float(loss) == float(soft_loss) == float(swapped_loss)
    assert floats(metrics) == floats(soft_metrics) == floats(swapped_metrics)


def test_soft_labels_equal_slow_code() -> None:
    first_N, second_N, logits_N = doubles(3, seed=3)
    preferences_N = logits_N.sigmoid()
    preferences_N[:3] = 0.5
    first_N.requires_grad_(), second_N.requires_grad_()
    loss, metrics = soft_pairwise_loss(first_N, second_N, preferences_N, denominator=NUM_PAIRS)
    terms, right, margins = [], 0.0, 0.0
    for first, second, p in zip(first_N, second_N, preferences_N.tolist(), strict=True):
        d = first - second
        terms.append(-p * slow_ranking.log_sigmoid(d) - (1 - p) * slow_ranking.log_sigmoid(-d))
        right += 0.5 if p == 0.5 else float((d.item() > 0) == (p > 0.5))
        margins += 0.0 if p == 0.5 else d.item() if p > 0.5 else -d.item()
    wanted = torch.stack(terms).sum() / NUM_PAIRS
    torch.testing.assert_close(loss, wanted)
    for got, slope in zip(
        torch.autograd.grad(loss, (first_N, second_N)), torch.autograd.grad(wanted, (first_N, second_N)), strict=True
    ):
        torch.testing.assert_close(got, slope)
    assert float(metrics["accuracy"]) == pytest.approx(right / NUM_PAIRS)
    assert float(metrics["margin"]) == pytest.approx(margins / NUM_PAIRS)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_refuses_what_is_no_probability(wrong: float) -> None:
    one = torch.zeros(1)
    with pytest.raises(AlgorithmError, match="from 0 to 1"):
        soft_pairwise_loss(one, one, torch.tensor([wrong]), denominator=1)


# ---- K-wise


def test_kwise_by_hand() -> None:
    """Prompt 0: scores ln 3, 0, 0 with ranks 0, 1, 1: the tie gives no pair, two pairs of margin ln 3: ln 4/3.

    Prompt 1: scores 1, 1 with ranks 1, 0: ln 2. Prompt 2: a tie, nothing. Over 2: (0.287682 + 0.693147) / 2.
    Gradients: -0.25 of two pairs, halved, over 2: -0.125, 0.0625, 0.0625; 0.5 over 2; 0.
    Accuracy (1 + 0.5) / 2, margin ln 3 / 2, mean score (ln 3 / 3 + 1) / 2.
    """
    scores_N = torch.tensor([LN3, 0.0, 0.0, 1.0, 1.0, 7.0, 8.0], dtype=torch.float64, requires_grad=True)
    ranks_N, offsets = torch.tensor([0, 1, 1, 1, 0, 3, 3]), torch.tensor([0, 3, 5, 7])
    assert num_ranked_prompts(ranks_N, offsets) == 2
    loss, metrics = kwise_loss(scores_N, ranks_N, offsets, denominator=2)
    assert float(loss.detach()) == pytest.approx(0.490415, abs=1e-6)
    (slope,) = torch.autograd.grad(loss, scores_N)
    assert slope.tolist() == pytest.approx([-0.125, 0.0625, 0.0625, 0.25, -0.25, 0.0, 0.0])
    assert floats(metrics) == pytest.approx({"accuracy": 0.75, "margin": LN3 / 2, "score": (LN3 / 3 + 1) / 2})


def test_kwise_margin_by_hand() -> None:
    """d = ln 3 less a margin of 2 ln 3 is -ln 3: loss ln 4, not the ln 28/27 of a margin that is added.

    The gradient grows from 1 - 3/4 to 1 - 1/4. Accuracy and margin do not see it.
    """
    scores_N = torch.tensor([0.0, LN3], dtype=torch.float64, requires_grad=True)
    ranks_N, offsets = torch.tensor([1, 0]), torch.tensor([0, 2])
    margins_P = torch.tensor([2 * LN3], dtype=torch.float64)
    loss, metrics = kwise_loss(scores_N, ranks_N, offsets, margins_P=margins_P, denominator=1)
    assert float(loss.detach()) == pytest.approx(math.log(4))
    assert torch.autograd.grad(loss, scores_N)[0].tolist() == pytest.approx([0.75, -0.75])
    assert floats(metrics) == pytest.approx({"accuracy": 1.0, "margin": LN3, "score": LN3 / 2})



@pytest.mark.parametrize("with_margins", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_kwise_equals_slow_code(seed: int, with_margins: bool) -> None:
    batch = ranked(seed)
    scores_N = batch.scores_N.requires_grad_()
    margins_P = batch.margins_P if with_margins else None
    prompts = list(zip(scalars(scores_N, batch.offsets), ranks_of(batch), strict=True))
    wanted, wanted_metrics, count = slow_ranking.kwise(
        prompts, batch.margins_P.tolist() if with_margins else [0.0] * len(SIZES)
    )
    assert num_ranked_prompts(batch.ranks_N, batch.offsets) == count == NUM_RANKED
    loss, metrics = kwise_loss(scores_N, batch.ranks_N, batch.offsets, margins_P=margins_P, denominator=count)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, scores_N)[0], torch.autograd.grad(wanted, scores_N)[0])
    assert floats(metrics) == pytest.approx(wanted_metrics, rel=1e-12)


def test_two_responses_are_pairwise() -> None:
    """To the bit, whichever of the two stands first, in float32."""
    chosen_N, rejected_N = (part.float().requires_grad_() for part in doubles(2, seed=4))
    last_first = torch.arange(NUM_PAIRS) % 3 == 0
    scores_N = torch.stack([chosen_N.where(~last_first, rejected_N), rejected_N.where(~last_first, chosen_N)], 1)
    ranks_N = torch.stack([last_first, ~last_first], 1).long()
    offsets = torch.arange(0, 2 * NUM_PAIRS + 1, 2)
    loss, metrics = pairwise_loss(chosen_N, rejected_N, denominator=NUM_PAIRS)
    kwise, kwise_metrics = kwise_loss(scores_N.flatten(), ranks_N.flatten(), offsets, denominator=NUM_PAIRS)
    assert float(kwise.detach()) == float(loss.detach())
    inputs = (chosen_N, rejected_N)
    for got, slope in zip(torch.autograd.grad(kwise, inputs), torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(got, slope)
    assert floats(kwise_metrics) == pytest.approx(floats(metrics), rel=1e-6)


def test_prompts_of_different_size_weigh_thesame_order() -> None:
    """Nine untrained responses cost ln 2, as two do."""
    for size in (2, 4, 9):
        scores_N = torch.zeros(size, dtype=torch.float64)
        loss, metrics = kwise_loss(scores_N, torch.arange(size), torch.tensor([0, size]), denominator=1)
        assert float(loss) == pytest.approx(math.log(2), rel=1e-12)
        assert float(metrics["accuracy"]) == pytest.approx(0.5)


def test_a_constant_for_each_prompt_does_not_matter() -> None:
    batch = ranked()
    shift_N = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES)) * 5.0
    moved_N = batch.scores_N + shift_N
    losses = [kwise_loss(x, batch.ranks_N, batch.offsets, denominator=1)[0] for x in (batch.scores_N, moved_N)]
    torch.testing.assert_close(*losses)
    losses = [best_of_loss(x, batch.ranks_N, batch.offsets, denominator=1)[0] for x in (batch.scores_N, moved_N)]
    torch.testing.assert_close(*losses)


def test_ranked_pairs_are_all_and_only_those() -> None:
    batch = ranked()
    pairs = ranked_pairs(batch.ranks_N, batch.offsets)
    bounds = batch.offsets.tolist()
    wanted = {
        (w, v, p)
        for p, (begin, end) in enumerate(pairwise(bounds))
        for w in range(begin, end)
        for v in range(begin, end)
        if batch.ranks_N[w] < batch.ranks_N[v]
    }
    got = list(zip(pairs.better_M.tolist(), pairs.worse_M.tolist(), pairs.prompts_M.tolist(), strict=True))
    assert len(got) == len(wanted) and set(got) == wanted
    sums = torch.zeros(len(SIZES), dtype=torch.float64).index_add(0, pairs.prompts_M, pairs.weights_M)
    assert sums.tolist() == pytest.approx([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])


def test_what_is_dropped_may_be_anything() -> None:
    """A prompt without a pair has no say, even if its scores are not finite."""
    scores_N = torch.tensor([1.0, 0.0, math.inf, math.nan], requires_grad=True)
    ranks_N, offsets = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 2, 4])
    loss, metrics = kwise_loss(scores_N, ranks_N, offsets, denominator=1)
    assert math.isfinite(float(loss.detach())) and all(math.isfinite(x) for x in floats(metrics).values())
    assert torch.autograd.grad(loss, scores_N)[0].isfinite().all()


def test_kwise_does_not_overflow() -> None:
    scores_N = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    loss, _ = kwise_loss(scores_N, torch.arange(3), torch.tensor([0, 3]), denominator=1)
    assert float(loss.detach()) == pytest.approx((1e4 + 2e4 + 1e4) / 3)
    assert torch.autograd.grad(loss, scores_N)[0].tolist() == pytest.approx([-2 / 3, 0.0, 2 / 3])


def test_refuses_scores_as_ranks() -> None:
    with pytest.raises(AlgorithmError, match="ranks are integers"):
        kwise_loss(torch.zeros(2), torch.tensor([0.3, 0.7]), torch.tensor([0, 2]), denominator=1)


# ---- best of


def test_best_of_by_hand() -> None:
    """Scores ln 2, 0, 0, the first the best: softmax 1/2, 1/4, 1/4: loss ln 2, gradient -1/2, 1/4, 1/4; right.

    Two equal scores: ln 2, gradient -1/2, 1/2, right by half. Over 2. Margins ln 2 and 0. Means ln 2 / 3 and 3.
    """
    ln2 = math.log(2)
    scores_N = torch.tensor([ln2, 0.0, 0.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = best_of_loss(scores_N, torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 3, 5]), denominator=2)
    assert float(loss.detach()) == pytest.approx(ln2)
    slope = torch.autograd.grad(loss, scores_N)[0].tolist()
    assert slope == pytest.approx([-0.25, 0.125, 0.125, 0.25, -0.25])
    assert floats(metrics) == pytest.approx({"accuracy": 0.75, "margin": ln2 / 2, "score": (ln2 / 3 + 3) / 2})


def test_two_that_are_best_are_not_set_against_each_other() -> None:
    """Scores ln 3, 0, 0, the first two the best. ln 3 against the last: 3/4, loss ln 4/3. 0 against it: 1/2, ln 2.

    The mean is ln(8/3) / 2, the gradient of the best -1/8 and -1/4, of the last 3/8: nothing passes between the two.
    One is right, one by half. Margin ln 3 / 2.
    """
    scores_N = torch.tensor([LN3, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss, metrics = best_of_loss(scores_N, torch.tensor([0, 0, 1]), torch.tensor([0, 3]), denominator=1)
    assert float(loss.detach()) == pytest.approx(math.log(8 / 3) / 2)
    assert torch.autograd.grad(loss, scores_N)[0].tolist() == pytest.approx([-1 / 8, -1 / 4, 3 / 8])
    assert floats(metrics) == pytest.approx({"accuracy": 0.75, "margin": LN3 / 2, "score": LN3 / 3})


@pytest.mark.parametrize("seed", range(3))
def test_best_of_equals_slow_code(seed: int) -> None:
    batch = ranked(seed)
    scores_N = batch.scores_N.requires_grad_()
    prompts = list(zip(scalars(scores_N, batch.offsets), ranks_of(batch), strict=True))
    assert any(1 < ranks.count(min(ranks)) < len(ranks) for _, ranks in prompts)
    wanted, wanted_metrics, count = slow_ranking.best_of(prompts)
    assert count == num_ranked_prompts(batch.ranks_N, batch.offsets)
    loss, metrics = best_of_loss(scores_N, batch.ranks_N, batch.offsets, denominator=count)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, scores_N)[0], torch.autograd.grad(wanted, scores_N)[0])
    assert floats(metrics) == pytest.approx(wanted_metrics, rel=1e-12)


def test_best_of_two_is_pairwise() -> None:
    chosen_N, rejected_N = doubles(2, seed=5)
    scores_N = torch.stack([rejected_N, chosen_N], 1).flatten()
    ranks_N, offsets = torch.tensor([1, 0] * NUM_PAIRS), torch.arange(0, 2 * NUM_PAIRS + 1, 2)
    loss, metrics = best_of_loss(scores_N, ranks_N, offsets, denominator=7)
    wanted, wanted_metrics = pairwise_loss(chosen_N, rejected_N, denominator=7)
    torch.testing.assert_close(loss, wanted)
    assert floats(metrics) == pytest.approx(floats(wanted_metrics))


def test_best_of_does_not_overflow() -> None:
    scores_N = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    loss, _ = best_of_loss(scores_N, torch.tensor([0, 1, 2]), torch.tensor([0, 3]), denominator=1)
    assert float(loss.detach()) == 2e4
    assert torch.autograd.grad(loss, scores_N)[0].tolist() == [-1.0, 1.0, 0.0]


# ---- centring


def test_centring_by_hand() -> None:
    """0.01 ((1 + 2)^2 + (1 - 3)^2) / 2 = 0.065; gradients 0.01 * 2 * sum / 2: 0.03 and -0.02 for both of a pair."""
    chosen_N = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    rejected_N = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    term, metrics = centring_term(chosen_N, rejected_N, coefficient=0.01, denominator=2)
    assert float(term.detach()) == float(metrics["centring"]) == pytest.approx(0.065)
    for slope in torch.autograd.grad(term, (chosen_N, rejected_N)):
        assert slope.tolist() == pytest.approx([0.03, -0.02])


def test_kwise_centring_by_hand() -> None:
    """Scores 1, 2, 6: (2 * 3)^2 = 36, gradient 2 * 6 * 2/3 = 8 each. A prompt without a pair is left alone."""
    scores_N = torch.tensor([1.0, 2.0, 6.0, 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    ranks_N, offsets = torch.tensor([0, 1, 1, 4, 4]), torch.tensor([0, 3, 5])
    term, _ = kwise_centring_term(scores_N, ranks_N, offsets, coefficient=0.5, denominator=1)
    assert float(term.detach()) == pytest.approx(18)
    assert torch.autograd.grad(term, scores_N)[0].tolist() == pytest.approx([4.0, 4.0, 4.0, 0.0, 0.0])


def test_kwise_centring_of_two_is_that_of_pairs() -> None:
    chosen_N, rejected_N = doubles(2)
    scores_N = torch.stack([chosen_N, rejected_N], 1).flatten()
    ranks_N, offsets = torch.tensor([0, 1] * NUM_PAIRS), torch.arange(0, 2 * NUM_PAIRS + 1, 2)
    term, _ = kwise_centring_term(scores_N, ranks_N, offsets, coefficient=0.3, denominator=7)
    torch.testing.assert_close(term, centring_term(chosen_N, rejected_N, coefficient=0.3, denominator=7)[0])


# ---- accuracy by bucket


def test_accuracy_counts_equal_slow_code() -> None:
    """Buckets 0 to 2; parts add up; all buckets together give the accuracy of the loss; an empty one stays 0."""
    batch = ranked()
    buckets_P = torch.arange(len(SIZES)) % 3
    counts = accuracy_counts(batch.scores_N, batch.ranks_N, batch.offsets, buckets_P, 4)
    wanted = [[0.0, 0.0] for _ in range(4)]
    for p, prompt in enumerate(zip(scalars(batch.scores_N, batch.offsets), ranks_of(batch), strict=True)):
        if found := slow_ranking.pairs(prompt):
            wanted[p % 3][0] += 1
            wanted[p % 3][1] += sum(float(wins(w - v)) for w, v in found) / len(found)
    torch.testing.assert_close(counts, torch.tensor(wanted, dtype=torch.float64))
    parts = [prompts_of(batch, order, same_order) for order in ([0, 1, 2, 3], [4, 5, 6, 7, 8])]
    cut = [
        accuracy_counts(part.scores_N, part.ranks_N, part.offsets, buckets, 4)
        for part, buckets in zip(parts, torch.split(buckets_P, [4, 5]), strict=True)
    ]
    torch.testing.assert_close(cut[0] + cut[1], counts)
    total, right = counts.sum(0).tolist()
    _, metrics = kwise_loss(batch.scores_N, batch.ranks_N, batch.offsets, denominator=NUM_RANKED)
    assert right / total == pytest.approx(float(metrics["accuracy"]))


@pytest.mark.parametrize("bucket", [-1, 2])
def test_refuses_a_bucket_that_is_not_there(bucket: int) -> None:
    with pytest.raises(AlgorithmError, match="there are 2, from 0"):
        accuracy_counts(torch.zeros(2), torch.arange(2), torch.tensor([0, 2]), torch.tensor([bucket]), 2)
