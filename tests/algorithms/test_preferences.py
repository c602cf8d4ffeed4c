"""Losses over pairs: values by hand, slow code with its gradients, and extremes."""

from __future__ import annotations

import math

import pytest
import torch

from algorithms.errors import ShapeMismatch
from algorithms.preferences import (
    conservative_dpo_loss,
    dpo_loss,
    mean_logprobs,
    nll_term,
    orpo_loss,
    robust_dpo_loss,
    sequence_logprobs,
    simpo_loss,
)
from tests.algorithms import slow_preferences as slow
from tests.algorithms.preference_inputs import (
    BETA,
    LOSSES,
    NUM_PAIRS,
    OF_LENGTHS,
    SMOOTHING,
    WITH_REFERENCE,
    Inputs,
    floats,
    following,
    random_pairs,
    slopes,
    slow_pairs,
)
from tests.algorithms.slow import offsets_of

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def one_pair(policy_w: float, policy_v: float, ref_w: float = 0.0, ref_v: float = 0.0, *, lengths: int = 1) -> Inputs:
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (policy_w, policy_v, ref_w, ref_v)]
    return following([*numbers, torch.tensor([lengths]), torch.tensor([lengths])])


# ---- sums of log-probs


def test_sequence_logprobs_by_hand() -> None:
    logprobs_T = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    sums_N = sequence_logprobs(logprobs_T, torch.tensor([0, 2, 2, 3, 3]))
    assert sums_N.tolist() == [-3.0, 0.0, -4.0, 0.0]
    (slope,) = torch.autograd.grad(sums_N, logprobs_T, torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert slope.tolist() == [2.0, 2.0, 5.0]


def test_sequence_logprobs_of_no_tokens() -> None:
    assert sequence_logprobs(torch.zeros(0), torch.tensor([0])).shape == (0,)
    assert sequence_logprobs(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0]


def test_sequence_logprobs_equal_exact_sums_wherever_they_stand() -> None:
    """Of 4,000 tokens in float32 the sum is the true one, rounded once; it is the same to the bit in any pack."""
    source = torch.Generator().manual_seed(0)
    parts = [-3 * torch.rand(length, generator=source) for length in (4000, 1, 17, 900)]
    alone = [sequence_logprobs(part, offsets_of([len(part)])) for part in parts]
    for part, total in zip(parts, alone, strict=True):
        assert float(total) == float(torch.tensor(math.fsum(part.tolist()), dtype=torch.float32))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        packed = sequence_logprobs(torch.cat([parts[i] for i in order]), offsets_of([len(parts[i]) for i in order]))
        assert torch.equal(packed, torch.cat([alone[i] for i in order]))


@pytest.mark.parametrize(
    "given, gotten", [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
)
def test_sequence_logprobs_keep_their_type(given: torch.dtype, gotten: torch.dtype) -> None:
    logprobs_T = torch.ones(3, dtype=given, requires_grad=True)
    sums_N = sequence_logprobs(logprobs_T, torch.tensor([0, 3]))
    assert sums_N.dtype == gotten
    assert torch.autograd.grad(sums_N.sum(), logprobs_T)[0].dtype == given


def test_sequence_logprobs_refuse_wrong_offsets() -> None:
    with pytest.raises(ShapeMismatch, match="they must rise from 0 to the 3 tokens"):
        sequence_logprobs(torch.zeros(3), torch.tensor([0, 2]))
    with pytest.raises(ShapeMismatch, match="vectors of one length"):
        sequence_logprobs(torch.zeros(3, 1), torch.tensor([0, 3]))


def test_mean_logprobs() -> None:
    assert mean_logprobs(torch.tensor([-6.0, -1.0]), torch.tensor([3, 1])).tolist() == [-2.0, -1.0]
    with pytest.raises(ShapeMismatch, match="response 1 of the batch has no token"):
        mean_logprobs(torch.tensor([-6.0, 0.0]), torch.tensor([3, 0]))


# ---- by hand


def test_dpo_by_hand() -> None:
    """beta 0.5; log ratios ln 3 and -ln 3: rewards +-ln 3 / 2, margin ln 3, sigmoid 3/4: ln 4/3, gradient -+0.5 / 4.

    Second pair: log ratios 0 and 0: ln 2, gradient -+0.25. Over 2. ref_kl (-ln 3 + ln 3) / 2 = 0.
    """
    policy_w, policy_v = torch.tensor([LN3 - 4, -2.0]).double(), torch.tensor([-5 - LN3, -9.0]).double()
    policy_w.requires_grad_(), policy_v.requires_grad_()
    loss, metrics = dpo_loss(
        policy_w, policy_v, torch.tensor([-4.0, -2.0]), torch.tensor([-5.0, -9.0]), beta=0.5, denominator=2
    )
    assert float(loss.detach()) == pytest.approx((math.log(4 / 3) + LN2) / 2)
    slope_w, slope_v = torch.autograd.grad(loss, (policy_w, policy_v))
    assert slope_w.tolist() == pytest.approx([-0.0625, -0.125])
    assert slope_v.tolist() == pytest.approx([0.0625, 0.125])
    assert floats(metrics) == pytest.approx(
        {
            "chosen_reward": LN3 / 4,
            "rejected_reward": -LN3 / 4,
            "reward_margin": LN3 / 2,
            "reward_accuracy": 0.75,
            "chosen_logprob": (LN3 - 6) / 2,
            "rejected_logprob": -(14 + LN3) / 2,
            "ref_kl": 0.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize(
    "name, inputs, wanted, slope",
    [
        # m = 0.3 * 10 = 3.
        ("hinge", (5.0, -1.0, 0.0, 4.0), 0.0, 0.0),
        # m = 0.3 * 2 = 0.6: 1 - 0.6, slope -beta.
        ("hinge", (1.0, -1.0, 0.0, 0.0), 0.4, -0.3),
        # h = 2, 1 / (2 beta) = 5/3: (1/3)^2, slope 2/3.
        ("ipo", (1.0, -1.0, 0.0, 0.0), 1 / 9, 2 / 3),
        # sigmoid(m) = 3/4: 0.8 ln 4/3 + 0.2 ln 4, slope -beta (0.8 / 4 - 0.2 * 3/4).
        ("conservative", (LN3 / 0.3, 0.0, 0.0, 0.0), 0.8 * (LN4 - LN3) + 0.2 * LN4, -0.3 * 0.05),
        # (0.8 ln 4/3 - 0.2 ln 4) / 0.6, slope -beta (0.8 / 4 + 0.2 * 3/4) / 0.6.
        ("robust", (LN3 / 0.3, 0.0, 0.0, 0.0), (0.8 * (LN4 - LN3) - 0.2 * LN4) / 0.6, -0.3 * 0.35 / 0.6),
        # 1.5 - 1 = 0.5; and beyond the margin.
        ("slic", (-3.0, -4.0, 0.0, 0.0), 0.5, -1.0),
        ("slic", (-3.0, -5.0, 0.0, 0.0), 0.0, 0.0),
        # The reference is not looked at.
        ("reference_free", (0.0, -LN3 / 0.3, 9.0, -9.0), LN4 - LN3, -0.3 / 4),
    ],
)
def test_by_hand(name: str, inputs: tuple[float, ...], wanted: float, slope: float) -> None:
    """beta 0.3, smoothing 0.2, margin 1.5; one pair. The slope is that of the chosen; the rejected has its negative."""
    pair = one_pair(*inputs)
    loss, _ = LOSSES[name](pair, 1)
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-12)
    assert [float(x) for x in slopes(loss, pair)] == pytest.approx([slope, -slope], abs=1e-12)


def test_simpo_by_hand() -> None:
    """beta 2, gamma 1; means -4 / 4 and -8 / 2: 2 * 3 - 1 = 5: ln(1 + e^-5); slopes -2 / 4 and 2 / 2 of sigmoid(-5)."""
    policy_w, policy_v = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-4.0, -8.0))
    loss, metrics = simpo_loss(
        policy_w, policy_v, torch.tensor([4]), torch.tensor([2]), beta=2.0, gamma=1.0, denominator=1
    )
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(-5)))
    wrong = 1 / (1 + math.exp(5))
    slope_w, slope_v = torch.autograd.grad(loss, (policy_w, policy_v))
    assert (float(slope_w), float(slope_v)) == pytest.approx((-0.5 * wrong, wrong))
    wanted = {
        "chosen_reward": -2.0,
        "rejected_reward": -8.0,
        "reward_margin": 6.0,
        "reward_accuracy": 1.0,
        "chosen_logprob": -4.0,
        "rejected_logprob": -8.0,
    }
    assert floats(metrics) == pytest.approx(wanted)


def test_orpo_by_hand() -> None:
    """P = 3/4 of two tokens and 1/2 of one: odds 3 and 1, log odds ratio ln 3: 0.4 ln 4/3.

    d log odds / d mean = 1 / (1 - P) = 4 and 2; d loss / d ratio = -0.4 / 4: slopes -0.1 * 4 / 2 and 0.1 * 2.
    """
    policy_w = torch.tensor([2 * math.log(0.75)], dtype=torch.float64, requires_grad=True)
    policy_v = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    loss, metrics = orpo_loss(policy_w, policy_v, torch.tensor([2]), torch.tensor([1]), coefficient=0.4, denominator=1)
    assert float(loss.detach()) == pytest.approx(0.4 * math.log(4 / 3))
    slope_w, slope_v = torch.autograd.grad(loss, (policy_w, policy_v))
    assert (float(slope_w), float(slope_v)) == pytest.approx((-0.2, 0.2))
    assert float(metrics["log_odds_ratio"]) == pytest.approx(LN3)
    assert float(metrics["chosen_reward"]) == pytest.approx(0.4 * math.log(0.75))
    assert float(metrics["reward_accuracy"]) == 1.0


def test_nll_by_hand() -> None:
    """Means 2 and 3 nats: 2.5, times 0.4. Over tokens it would be 7/3."""
    loss, metrics = nll_term(torch.tensor([-4.0, -3.0]), torch.tensor([2, 1]), coefficient=0.4, denominator=2)
    assert float(loss) == pytest.approx(1.0)
    assert floats(metrics) == pytest.approx({"chosen_nll": 2.5})


def test_step_0() -> None:
    """Policy and reference equal, in float32, at thousands of nats: ln 2 and margins of 0, exactly."""
    source = torch.Generator().manual_seed(0)
    chosen_N, rejected_N = (-4000 * torch.rand(NUM_PAIRS, generator=source) for _ in range(2))
    inputs = [chosen_N, rejected_N, chosen_N.clone(), rejected_N.clone()]
    for name, function in WITH_REFERENCE.items():
        loss, metrics = function(inputs, NUM_PAIRS)
        wanted = {"ipo": (1 / (2 * BETA)) ** 2, "hinge": 1.0}.get(name, LN2)
        assert float(loss) == pytest.approx(wanted, rel=1e-6)
        for metric in ("chosen_reward", "rejected_reward", "reward_margin", "ref_kl"):
            assert float(metrics[metric]) == 0.0
        assert float(metrics["reward_accuracy"]) == 0.5


def test_no_smoothing_is_dpo() -> None:
    inputs = random_pairs()[:4]
    wanted = float(dpo_loss(*inputs, beta=BETA, denominator=7)[0])
    for function in (conservative_dpo_loss, robust_dpo_loss):
        assert float(function(*inputs, beta=BETA, label_smoothing=0.0, denominator=7)[0]) == wanted


def test_robust_is_unbiased_and_conservative_is_not() -> None:
    """The mean over labels flipped with probability e is the DPO loss of the true labels."""
    inputs = random_pairs()
    flipped = [inputs[1], inputs[0], inputs[3], inputs[2]]
    wanted = float(WITH_REFERENCE["dpo"](inputs, 1)[0])
    mean = {
        name: (1 - SMOOTHING) * float(WITH_REFERENCE[name](inputs, 1)[0])
        + SMOOTHING * float(WITH_REFERENCE[name](flipped, 1)[0])
        for name in ("robust", "conservative")
    }
    assert mean["robust"] == pytest.approx(wanted, rel=1e-12)
    assert mean["conservative"] != pytest.approx(wanted, rel=1e-2)


# ---- slow code


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(2))
def test_equals_slow_code(name: str, seed: int) -> None:
    inputs = following(random_pairs(seed))
    loss, _ = LOSSES[name](inputs, NUM_PAIRS)
    wanted = torch.stack([getattr(slow, name)(pair) for pair in slow_pairs(inputs)]).sum() / NUM_PAIRS
    torch.testing.assert_close(loss, wanted)
    found = slopes(loss, inputs)
    torch.testing.assert_close(found, slopes(wanted, inputs))
    if name in ("hinge", "slic"):
        assert 0 < int((found[0] == 0).sum()) < NUM_PAIRS, "the inputs reach what they are to test"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nll"])
def test_metrics_equal_slow_code(name: str) -> None:
    inputs = random_pairs()
    _, metrics = LOSSES[name](inputs, NUM_PAIRS)
    sums: dict[str, float] = dict.fromkeys(metrics, 0.0)
    for pair in slow_pairs(inputs):
        w, v = float(pair.policy_w), float(pair.policy_v)
        if name in WITH_REFERENCE:
            reward_w, reward_v = BETA * (w - pair.ref_w), BETA * (v - pair.ref_v)
            sums["ref_kl"] += ((pair.ref_w - w) + (pair.ref_v - v)) / 2
        else:
            scale = {"slic": 1.0, "orpo": slow.COEFFICIENT}.get(name, BETA)
            of_lengths = name in OF_LENGTHS
            reward_w = scale * w / (pair.length_w if of_lengths else 1)
            reward_v = scale * v / (pair.length_v if of_lengths else 1)
        if name == "orpo":
            sums["log_odds_ratio"] += math.log(
                float(slow.odds(pair.policy_w, pair.length_w) / slow.odds(pair.policy_v, pair.length_v))
            )
        sums["chosen_reward"] += reward_w
        sums["rejected_reward"] += reward_v
        sums["reward_margin"] += reward_w - reward_v
        sums["reward_accuracy"] += reward_w > reward_v
        sums["chosen_logprob"] += w
        sums["rejected_logprob"] += v
    assert floats(metrics) == pytest.approx({key: x / NUM_PAIRS for key, x in sums.items()}, rel=1e-9)
    assert ("ref_kl" in metrics) == (name in WITH_REFERENCE)


# ---- extremes


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_extremes_stay_finite_in_float32(name: str, size: float) -> None:
    """Log ratios of thousands of nats either way, and responses that are certain."""
    policy_w = torch.tensor([-size, 0.0, -size, 0.0])
    policy_v = torch.tensor([0.0, -size, -size, 0.0])
    lengths = torch.tensor([1, 1, 7, 7])
    inputs = following([policy_w, policy_v, policy_v, policy_w, lengths, lengths])
    loss, metrics = LOSSES[name](inputs, 4)
    assert math.isfinite(float(loss.detach()))
    assert all(math.isfinite(x) for x in floats(metrics).values())
    assert all(bool(slope.isfinite().all()) for slope in slopes(loss, inputs))


def test_extremes_by_hand() -> None:
    """A margin of -+2e4 nats at beta 0.1: the loss is 2,000 or 0, the slope -beta or 0."""
    numbers = (torch.tensor(x) for x in ([-1e4, 1e4], [1e4, -1e4], [0.0, 0.0], [0.0, 0.0]))
    policy_w, policy_v, ref_w, ref_v = numbers
    policy_w.requires_grad_()
    loss, _ = dpo_loss(policy_w, policy_v, ref_w, ref_v, beta=0.1, denominator=1)
    assert float(loss.detach()) == pytest.approx(2000)
    assert torch.autograd.grad(loss, policy_w)[0].tolist() == pytest.approx([-0.1, 0.0])


@pytest.mark.parametrize("logprob", [-1e-5, -1e-2, -0.7, -3.0, -30.0, -5000.0])
def test_orpo_keeps_its_digits_in_float32(logprob: float) -> None:
    """Against float64, from P near 1 to P that underflows; the other response has odds of 1."""
    results = []
    for dtype in (torch.float32, torch.float64):
        policy_w = torch.tensor([-LN2], dtype=dtype)
        policy_v = torch.tensor([logprob], dtype=torch.float32).to(dtype).requires_grad_()
        one = torch.tensor([1])
        loss, metrics = orpo_loss(policy_w, policy_v, one, one, coefficient=1.0, denominator=1)
        slope = float(torch.autograd.grad(loss, policy_v)[0])
        results.append((float(loss.detach()), float(metrics["log_odds_ratio"]), slope))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_orpo_of_certainty() -> None:
    """P of 1, or nearer to it than float32 can say: odds of 2^24, and no gradient."""
    policy_w = torch.tensor([0.0, -1e-9], requires_grad=True)
    one, even = torch.ones(2, dtype=torch.int64), torch.full((2,), -LN2)
    loss, metrics = orpo_loss(policy_w, even, one, one, coefficient=1.0, denominator=2)
    assert float(metrics["log_odds_ratio"]) == pytest.approx(24 * LN2, rel=1e-6)
    assert torch.autograd.grad(loss, policy_w)[0].tolist() == [0.0, 0.0]
