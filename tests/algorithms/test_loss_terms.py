"""Normalisation by weights, entropy, KL in the loss, and PPO-ptx."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.kl import LOSS_ESTIMATORS, k1, k1_with_gradient, k2, k3
from algorithms.logprobs import token_logprobs
from algorithms.loss_terms import (
    add_terms,
    constant_length_weights,
    entropy_bonus,
    kl_term,
    pretraining_term,
    sequence_mean_weights,
    token_mean_weights,
    weighted_mean,
)
from algorithms.losses import Loss, next_token_loss
from algorithms.policy_losses import clip_higher_loss
from tests.algorithms import slow

LENGTHS = [3, 1, 8, 2, 6]
NUM_TOKENS = sum(LENGTHS)
OFFSETS = slow.offsets_of(LENGTHS)
Estimator = Callable[[Tensor, Tensor], Tensor]


def random_tokens(count: int, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(NUM_TOKENS, dtype=torch.float64, generator=source) for _ in range(count)]


# ---- normalisation


def test_normalisation_by_hand() -> None:
    """Samples of 1 and 3 tokens with terms 6 | 1, 2, 3; the longest response allowed has 5.

    By token 12 / 4 = 3. By sequence (6 + 2) / 2 = 4. By constant length 12 / (2 * 5) = 1.2.
    """
    term_T, offsets = torch.tensor([6.0, 1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([0, 1, 4])
    assert float(weighted_mean(term_T, token_mean_weights(term_T), 4)) == 3.0
    by_sequence = sequence_mean_weights(term_T, offsets, num_tokens=4, num_samples=2)
    assert by_sequence.tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    assert float(weighted_mean(term_T, by_sequence, 4)) == pytest.approx(4.0)
    by_constant = constant_length_weights(term_T, num_tokens=4, num_samples=2, max_tokens=5)
    assert float(weighted_mean(term_T, by_constant, 4)) == pytest.approx(1.2)


def test_sequence_mean_equals_slow_code_and_its_weights_have_mean_one() -> None:
    (term_T,) = random_tokens(1)
    weights_T = sequence_mean_weights(term_T, OFFSETS, num_tokens=NUM_TOKENS, num_samples=5)
    means = [sum(sample.tolist()) / len(sample) for sample in slow.samples(term_T, OFFSETS)]
    assert float(weighted_mean(term_T, weights_T, NUM_TOKENS)) == pytest.approx(sum(means) / 5)
    assert float(weights_T.mean()) == pytest.approx(1)


def test_sequence_mean_does_not_depend_on_the_cut() -> None:
    """A micro-batch weighs its tokens with the counts of the whole minibatch."""
    (term_T,) = random_tokens(1)
    weights_T = sequence_mean_weights(term_T, OFFSETS, num_tokens=NUM_TOKENS, num_samples=5)
    parts = []
    for first, last in pairwise([0, 2, 2, 5]):
        begin, end = int(OFFSETS[first]), int(OFFSETS[last])
        offsets = OFFSETS[first : last + 1] - begin
        parts.append(sequence_mean_weights(term_T[begin:end], offsets, num_tokens=NUM_TOKENS, num_samples=5))
    assert torch.equal(torch.cat(parts), weights_T)


def test_weights_take_precision_and_carry_no_gradient() -> None:
    like_T = torch.zeros(4, dtype=torch.float32, requires_grad=True)
    for weights_T in (
        token_mean_weights(like_T),
        sequence_mean_weights(like_T, torch.tensor([0, 1, 1, 4]), num_tokens=4, num_samples=3),
        constant_length_weights(like_T, num_tokens=4, num_samples=3, max_tokens=7),
    ):
        assert weights_T.dtype == torch.float32 and weights_T.shape == (4,)
        assert not weights_T.requires_grad and bool(weights_T.isfinite().all())


def test_a_weight_of_zero_hides_anything() -> None:
    term_T = torch.tensor([1.0, torch.inf, torch.nan], requires_grad=True)
    mean = weighted_mean(term_T, torch.tensor([1.0, 0.0, 0.0]), 2)
    assert float(mean.detach()) == 0.5
    assert torch.autograd.grad(mean, term_T)[0].tolist() == [0.5, 0, 0]


def test_normalisation_refused() -> None:
    three = torch.zeros(3)
    with pytest.raises(ShapeMismatch, match="must rise from 0 to the 3 tokens"):
        sequence_mean_weights(three, torch.tensor([0, 2]), num_tokens=3, num_samples=1)
    with pytest.raises(AlgorithmError, match="a loss is divided by 0"):
        sequence_mean_weights(three, torch.tensor([0, 3]), num_tokens=3, num_samples=0)
    with pytest.raises(AlgorithmError, match="a loss is divided by 0"):
        constant_length_weights(three, num_tokens=3, num_samples=1, max_tokens=0)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        weighted_mean(three, three[:, None], 1)


# ---- entropy and KL


def test_entropy_bonus_by_hand() -> None:
    """-0.5 * (1 * 1 + 3 * 2) / 2; the metric is the plain mean."""
    entropy_T = torch.tensor([1.0, 2.0], requires_grad=True)
    loss, metrics = entropy_bonus(entropy_T, coefficient=0.5, weights_T=torch.tensor([1.0, 3.0]), denominator=2)
    assert float(loss.detach()) == -1.75
    assert float(metrics["entropy"]) == 1.5
    assert torch.autograd.grad(loss, entropy_T)[0].tolist() == [-0.25, -0.75]


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS.values())
def test_kl_equals_slow_code(estimator: Estimator) -> None:
    policy_T, ref_T, weights_T = random_tokens(3)
    policy_T.requires_grad_()
    loss, metrics = kl_term(policy_T, ref_T, estimator, coefficient=0.3, weights_T=weights_T, denominator=NUM_TOKENS)
    values, slopes = [], []
    for p, q in zip(policy_T.tolist(), ref_T.tolist(), strict=True):
        ratio = torch.tensor(q - p, dtype=torch.float64).exp().item()
        by_estimator: dict[Estimator, tuple[float, float]] = {
            k1_with_gradient: (p - q, p - q),
            k2: ((p - q) ** 2 / 2, p - q),
            k3: (ratio - 1 - (q - p), 1 - ratio),
        }
        value, slope = by_estimator[estimator]
        values.append(value)
        slopes.append(slope)
    expected = 0.3 * sum(w * v for w, v in zip(weights_T.tolist(), values, strict=True)) / NUM_TOKENS
    assert float(loss.detach()) == pytest.approx(expected)
    assert float(metrics["ref_kl"]) == pytest.approx(sum(values) / NUM_TOKENS)
    (gradient,) = torch.autograd.grad(loss, policy_T)
    torch.testing.assert_close(gradient, 0.3 * weights_T * torch.tensor(slopes, dtype=torch.float64) / NUM_TOKENS)


@pytest.mark.parametrize(
    ("estimator", "towards"),
    [(k1, None), (k1_with_gradient, "reverse"), (k2, "reverse"), (k3, "forward")],
)
def test_what_the_gradients_of_the_estimators_are_of(estimator: Estimator, towards: str | None) -> None:
    """Over all actions of a small policy, each as often as it is drawn: nothing, KL(p, q), KL(q, p).

    So plain k1 is no loss; it is there as a number.
    """
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.2, -0.5, 0.0], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    chances = policy.detach().exp()
    loss, metrics = kl_term(policy, reference, estimator, coefficient=1.0, weights_T=chances, denominator=1)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    exact = {
        None: 0 * policy.sum(),
        "reverse": (policy.exp() * (policy - reference)).sum(),
        "forward": (reference.exp() * (reference - policy)).sum(),
    }[towards]
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, logits)[0])
    if estimator is not k2:
        kl = float((chances * (policy.detach() - reference)).sum())
        assert float(loss.detach()) == pytest.approx(kl), "k1 and k3 are unbiased in value"
    assert set(metrics) == {"ref_kl"}


@pytest.mark.parametrize("estimator", LOSS_ESTIMATORS.values())
@pytest.mark.parametrize("gap", [100.0, -100.0, 1000.0])
def test_kl_does_not_overflow(estimator: Estimator, gap: float) -> None:
    policy_T = torch.tensor([-1.0], requires_grad=True)
    loss, metrics = kl_term(
        policy_T, policy_T.detach() + gap, estimator, coefficient=1.0, weights_T=torch.ones(1), denominator=1
    )
    (gradient,) = torch.autograd.grad(loss, policy_T)
    assert bool(loss.isfinite()) and bool(gradient.isfinite()) and bool(metrics["ref_kl"].isfinite())
    assert float(gradient) > 0 if gap < 0 else float(gradient) < 0, "it still pulls to the reference"


def terms(name: str, policy_T: Tensor, other_T: Tensor, weights_T: Tensor, *, denominator: float) -> Loss:
    if name == "entropy":
        return entropy_bonus(policy_T, coefficient=0.1, weights_T=weights_T, denominator=denominator)
    if name == "kl":
        return kl_term(policy_T, other_T, k3, coefficient=0.1, weights_T=weights_T, denominator=denominator)
    return pretraining_term(policy_T, weights_T > 0, coefficient=27.8, denominator=denominator)


@pytest.mark.parametrize("name", ["entropy", "kl", "pretraining"])
def test_parts_add_up_to_the_whole(name: str) -> None:
    inputs = random_tokens(3)
    inputs[0].requires_grad_()
    loss, metrics = terms(name, *inputs, denominator=NUM_TOKENS)
    parts = [
        terms(name, *(tensor[a:b] for tensor in inputs), denominator=NUM_TOKENS)
        for a, b in pairwise([0, 3, 3, 12, NUM_TOKENS])
    ]
    assert float(sum(part[0].detach() for part in parts)) == pytest.approx(float(loss.detach()))
    for key in metrics:
        assert float(sum(part[1][key] for part in parts)) == pytest.approx(float(metrics[key]))
        assert not metrics[key].requires_grad
    together = torch.autograd.grad(sum((part[0] for part in parts), torch.zeros(())), inputs[0])[0]
    torch.testing.assert_close(together, torch.autograd.grad(loss, inputs[0])[0])
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(1))
    moved, _ = terms(name, *(tensor[order] for tensor in inputs), denominator=NUM_TOKENS)
    assert float(moved.detach()) == pytest.approx(float(loss.detach()))


@pytest.mark.parametrize("name", ["entropy", "kl", "pretraining"])
def test_nothing_and_refusals(name: str) -> None:
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = terms(name, none, none, none, denominator=5)
    assert float(loss.detach()) == 0 and {float(metric) for metric in metrics.values()} == {0.0}
    assert torch.autograd.grad(loss, none)[0].shape == (0,)
    one = torch.zeros(1)
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        terms(name, one, one, one[:, None], denominator=5)
    with pytest.raises(AlgorithmError, match="a loss is divided by -1"):
        terms(name, one, one, one, denominator=-1)


def test_only_the_policy_is_moved_by_the_kl() -> None:
    policy_T, ref_T, weights_T = (tensor.requires_grad_() for tensor in random_tokens(3))
    loss, _ = kl_term(policy_T, ref_T, k2, coefficient=1.0, weights_T=weights_T, denominator=1)
    gradients = torch.autograd.grad(loss, (policy_T, ref_T, weights_T), allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, False, False]


# ---- sums of terms


def test_terms_are_added() -> None:
    one, two = (torch.tensor(1.0), {"a": torch.tensor(5.0)}), (torch.tensor(2.0), {"b": torch.tensor(6.0)})
    loss, metrics = add_terms(one, two)
    assert float(loss) == 3.0
    assert {name: float(metric) for name, metric in metrics.items()} == {"a": 5.0, "b": 6.0}
    assert set(one[1]) == {"a"}, "what was given stays as it is"
    with pytest.raises(AlgorithmError, match="two terms of a loss have a metric 'a'"):
        add_terms(one, two, one)
    with pytest.raises(AlgorithmError, match="at least one term"):
        add_terms()


# ---- PPO-ptx


def test_pretraining_by_hand() -> None:
    """27.8 * (1 + 3) / 2 nats."""
    loss, metrics = pretraining_term(
        torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([True, False, True]), coefficient=27.8, denominator=2
    )
    assert float(loss) == pytest.approx(55.6)
    assert float(metrics["pretraining_nats_per_token"]) == 2.0


class Bigram(nn.Module):
    """Logits of the next token from the token alone; dropout-free, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 7, dtype=torch.float64)

    def logprobs(self, tokens: Tensor) -> Tensor:
        return token_logprobs(self.head(self.embedding(tokens[:-1])), tokens[1:])


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_the_mixed_gradient_is_that_of_the_summed_objective() -> None:
    """Micro-batches of both kinds, unequal in size and number, backward one by one into one buffer, in two orders.

    Against autograd of J = mean over all policy tokens + 27.8 * mean over all pre-training tokens, written in full.
    """
    source = torch.Generator().manual_seed(5)
    episodes = [torch.randint(0, 7, (length,), generator=source) for length in (4, 9, 6)]
    texts = [torch.randint(0, 7, (length,), generator=source) for length in (12, 30, 3, 17, 5)]
    num_policy, num_text = (sum(len(tokens) - 1 for tokens in rows) for rows in (episodes, texts))
    model = Bigram()
    with torch.no_grad():
        noise = [0.3 * torch.randn(len(tokens) - 1, dtype=torch.float64, generator=source) for tokens in episodes]
        behaviour = [model.logprobs(tokens) + gap for tokens, gap in zip(episodes, noise, strict=True)]
    advantages = [torch.randn(len(row), dtype=torch.float64, generator=source) for row in behaviour]

    def policy(row: int) -> Tensor:
        logprobs_T = model.logprobs(episodes[row])
        loss, _ = clip_higher_loss(
            logprobs_T,
            behaviour[row],
            advantages[row],
            clip_low=0.2,
            clip_high=0.2,
            weights_T=token_mean_weights(logprobs_T),
            denominator=num_policy,
        )
        return loss

    def text(row: int) -> Tensor:
        logprobs_T = model.logprobs(texts[row])
        return pretraining_term(logprobs_T, torch.ones_like(logprobs_T), coefficient=27.8, denominator=num_text)[0]

    plain = [(model.logprobs(e) - b).exp() for e, b in zip(episodes, behaviour, strict=True)]
    surrogate = torch.cat([torch.minimum(r * a, r.clamp(0.8, 1.2) * a) for r, a in zip(plain, advantages, strict=True)])
    objective = -surrogate.mean() - 27.8 * torch.cat([model.logprobs(tokens) for tokens in texts]).mean()
    model.zero_grad()
    torch.autograd.backward(objective)
    expected = gradients(model)
    assert len(expected) == 3 and all(bool(gradient.any()) for gradient in expected)

    steps = [(policy, row) for row in range(3)] + [(text, row) for row in range(5)]
    for order in (steps, [steps[at] for at in (7, 0, 3, 5, 1, 6, 2, 4)]):
        model.zero_grad()
        for term, row in order:
            torch.autograd.backward(term(row))
        for got, wanted in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_coefficient_does_not_depend_on_the_ratio_of_data() -> None:
    """Twice the pre-training data, the same again: the same loss."""
    (logprobs_T,) = random_tokens(1)
    ones_T = torch.ones_like(logprobs_T)
    once, _ = pretraining_term(logprobs_T, ones_T, coefficient=27.8, denominator=NUM_TOKENS)
    twice, _ = pretraining_term(logprobs_T.repeat(2), ones_T.repeat(2), coefficient=27.8, denominator=2 * NUM_TOKENS)
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(once, 27.8 * next_token_loss(logprobs_T, ones_T, NUM_TOKENS)[0])
