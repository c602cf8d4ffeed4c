"""KL estimators and the controller."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from algorithms.errors import AlgorithmError
from algorithms.kl import ESTIMATORS, LOSS_ESTIMATORS, KLController, k1, k1_with_gradient, k2, k3

ROOT = Path(__file__).parents[2]


def test_by_hand() -> None:
    """p = 0.5, q = 0.25: log ratio ln 2 = 0.693147; k1 that; k2 0.480453 / 2; k3 0.5 - 1 + 0.693147 = 0.193147.

    p = 0.25, q = 0.5: k1 -0.693147; k2 the same 0.240227; k3 2 - 1 - 0.693147 = 0.306853.
    """
    p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    torch.testing.assert_close(k1(p, q), torch.tensor([0.6931472, -0.6931472]))
    torch.testing.assert_close(k2(p, q), torch.tensor([0.2402265, 0.2402265]))
    torch.testing.assert_close(k3(p, q), torch.tensor([0.1931472, 0.3068528]))


def test_k1_in_a_loss_by_hand() -> None:
    """p = 0.5, q = 0.25 and the other way round: the number is the log ratio, and so is its slope in log p, as k2's."""
    p, q = torch.tensor([0.5, 0.25]).log().requires_grad_(), torch.tensor([0.25, 0.5]).log()
    estimate = k1_with_gradient(p, q)
    assert estimate.tolist() == pytest.approx([0.6931472, -0.6931472])
    assert torch.autograd.grad(estimate.sum(), p)[0].tolist() == pytest.approx([0.6931472, -0.6931472])
    assert dict(LOSS_ESTIMATORS) == {**ESTIMATORS, "k1": k1_with_gradient}


def test_k1_and_k3_are_unbiased() -> None:
    """Their expectation under p, summed over the whole vocabulary, is KL(p, q); that of k2 is not."""
    source = torch.Generator().manual_seed(0)
    p, q = (torch.randn(20, dtype=torch.float64, generator=source).log_softmax(-1) for _ in range(2))
    exact = sum(float(a.exp() * (a - b)) for a, b in zip(p, q, strict=True))
    assert float((p.exp() * k1(p, q)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p.exp() * k3(p, q)).sum()) == pytest.approx(exact, rel=1e-12)
    assert float((p.exp() * k2(p, q)).sum()) != pytest.approx(exact, rel=1e-2)
    assert bool((k3(p, q) >= 0).all())


def test_k3_keeps_its_digits_in_float32() -> None:
    """x = 1e-4: k3 = x^2 / 2 + x^3 / 6 = 5.00017e-9, far below float32's rounding of exp(x)."""
    got = k3(torch.tensor([0.0]), torch.tensor([1e-4]))
    assert float(got) == pytest.approx(5.00017e-9, rel=2e-3)


def test_controller_by_hand() -> None:
    """Target 6, horizon 1000, batches of 100: the share is 0.1.

    KL 6.6: e = 0.1, factor 1.01. KL 12: e = 1, clipped to 0.2, factor 1.02. KL 0: e = -1, clipped to -0.2, factor
    0.98. KL -3 (k1 may be negative) the same. KL 6: factor 1.
    """
    start = KLController(0.1, target=6.0, horizon_samples=1000)
    for kl, factor in ((6.6, 1.01), (12.0, 1.02), (0.0, 0.98), (-3.0, 0.98), (6.0, 1.0)):
        assert start.updated(kl, 100).coefficient == pytest.approx(0.1 * factor, rel=1e-12), kl
    assert start.coefficient == 0.1
    moved = start.updated(12.0, 100)
    assert (moved.target, moved.horizon_samples) == (6.0, 1000)


def test_controller_steers_towards_its_target() -> None:
    """Where KL falls as the coefficient grows (KL = 1 / coefficient), it settles at the target."""
    controller = KLController(1.0, target=5.0, horizon_samples=500)
    for _ in range(200):
        controller = controller.updated(1 / controller.coefficient, 100)
    assert 1 / controller.coefficient == pytest.approx(5.0, rel=1e-3)


def test_fixed_controller_stays() -> None:
    fixed = KLController(0.05, target=None, horizon_samples=10)
    assert fixed.updated(100.0, 10**6) == fixed


def test_refusals() -> None:
    with pytest.raises(AlgorithmError, match="coefficient -1"):
        KLController(-1, None, 10)
    with pytest.raises(AlgorithmError, match="coefficient nan"):
        KLController(float("nan"), None, 10)
    with pytest.raises(AlgorithmError, match="target 0"):
        KLController(0.1, 0, 10)
    with pytest.raises(AlgorithmError, match="horizon of 0"):
        KLController(0.1, 1.0, 0)
    with pytest.raises(AlgorithmError, match="mean KL of the batch is nan"):
        KLController(0.1, 1.0, 100).updated(float("nan"), 10)
    with pytest.raises(AlgorithmError, match="the horizon must be above 100,"):
        KLController(0.1, 1.0, 100).updated(0.5, 500)
    assert KLController(0.1, 1.0, 101).updated(0.0, 500).coefficient > 0


def test_imports_no_torch() -> None:
    """A driver steers the coefficient and the learning rate without it."""
    program = "import sys, algorithms.kl, algorithms.schedules, algorithms.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
