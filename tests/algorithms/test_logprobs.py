"""Log-probs and entropy: values by hand, slow code, gradients, and what memory they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms import logprobs
from algorithms.errors import AlgorithmError, ShapeMismatch
from algorithms.logprobs import entropy, token_logprobs
from tests.algorithms import slow


def random_logits(num_tokens: int = 7, vocabulary: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(num_tokens, vocabulary, dtype=torch.float64, generator=source)
    return logits_TV, torch.randint(vocabulary, (num_tokens,), generator=source)


def test_by_hand() -> None:
    """Logits (ln 1, ln 3) are probabilities 1/4 and 3/4: log-probs -ln 4 and ln 3/4.

    Entropy: ln 4 / 4 + 3/4 ln(4/3) = 0.346574 + 0.215762 = 0.562335.
    At temperature 1/2 the logits double: weights 1 and 9, probability of the second 0.9.
    """
    logits_TV = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    got = token_logprobs(logits_TV, torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([-math.log(4), math.log(0.75)]))
    torch.testing.assert_close(entropy(logits_TV)[0], torch.tensor(0.5623351))
    cold = token_logprobs(logits_TV, torch.tensor([0, 1]), temperature=0.5)
    torch.testing.assert_close(cold, torch.tensor([math.log(0.1), math.log(0.9)]))


def test_gradient_by_hand() -> None:
    """d log p_y / d l = (1[y] - p) / temperature: (0 - 1/4, 1 - 3/4) at temperature 1.

    Of entropy: -p (log p + H): for p = (1/4, 3/4), H = 0.562335: -1/4 (-1.386294 + 0.562335) = 0.205990, and the
    second is its negative, since adding a constant to all logits changes nothing.
    """
    logits_TV = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    (gradient,) = torch.autograd.grad(token_logprobs(logits_TV, torch.tensor([1])).sum(), logits_TV)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.25]]))
    (gradient,) = torch.autograd.grad(entropy(logits_TV).sum(), logits_TV)
    torch.testing.assert_close(gradient, torch.tensor([[0.2059898, -0.2059898]]))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_equals_slow_code(temperature: float) -> None:
    logits_TV, targets_T = random_logits()
    rows = logits_TV.tolist()
    expected = [slow.logprob(row, target, temperature) for row, target in zip(rows, targets_T.tolist(), strict=True)]
    torch.testing.assert_close(
        token_logprobs(logits_TV, targets_T, temperature), torch.tensor(expected, dtype=torch.float64)
    )
    expected = [slow.entropy(row, temperature) for row in rows]
    torch.testing.assert_close(entropy(logits_TV, temperature), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 22, 1 << 18])
def test_gradients(temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, and against autograd of log_softmax with a different slope for each token."""
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", chunk)
    logits_TV, targets_T = random_logits(5, 6)
    logits_TV.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: token_logprobs(logits, targets_T, temperature), (logits_TV,))
    assert torch.autograd.gradcheck(lambda logits: entropy(logits, temperature), (logits_TV,))

    slopes_T = torch.arange(1.0, 6.0, dtype=torch.float64)
    plain = (logits_TV / temperature).log_softmax(-1)
    chosen = plain.gather(-1, targets_T[:, None])[:, 0]
    (expected,) = torch.autograd.grad((chosen * slopes_T).sum(), logits_TV, retain_graph=True)
    (got,) = torch.autograd.grad((token_logprobs(logits_TV, targets_T, temperature) * slopes_T).sum(), logits_TV)
    torch.testing.assert_close(got, expected)
    (expected,) = torch.autograd.grad((-(plain.exp() * plain).sum(-1) * slopes_T).sum(), logits_TV)
    (got,) = torch.autograd.grad((entropy(logits_TV, temperature) * slopes_T).sum(), logits_TV)
    torch.testing.assert_close(got, expected)


def test_both_together_add_their_gradients() -> None:
    """The policy's loss takes both of the same logits."""
    logits_TV, targets_T = random_logits(4, 5)
    logits_TV.requires_grad_()
    made = (token_logprobs(logits_TV, targets_T), entropy(logits_TV))
    parts = [torch.autograd.grad(part.sum(), logits_TV)[0] for part in made]
    (both,) = torch.autograd.grad((token_logprobs(logits_TV, targets_T) + entropy(logits_TV)).sum(), logits_TV)
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize("chunk", [1, 25, 100, 101])
def test_a_token_does_not_depend_on_its_neighbours(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit the same alone, in any order, and in chunks of any size."""
    logits_TV, targets_T = (part if part.dtype == torch.int64 else part.float() for part in random_logits(13, 25))
    whole, whole_entropy = token_logprobs(logits_TV, targets_T), entropy(logits_TV)
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", chunk)
    assert torch.equal(token_logprobs(logits_TV, targets_T), whole)
    assert torch.equal(entropy(logits_TV), whole_entropy)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    assert torch.equal(token_logprobs(logits_TV[order], targets_T[order]), whole[order])
    assert torch.equal(token_logprobs(logits_TV[4:5], targets_T[4:5]), whole[4:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_raised(dtype: torch.dtype) -> None:
    """What comes out is as exact as float32 from the logits that were given; the gradient is in their precision."""
    exact, targets_T = random_logits(9, 300)
    logits_TV = exact.to(dtype).requires_grad_()
    got = token_logprobs(logits_TV, targets_T, 0.9)
    assert got.dtype == torch.float32
    assert entropy(logits_TV).dtype == torch.float32
    expected = token_logprobs(logits_TV.detach().double(), targets_T, 0.9)
    torch.testing.assert_close(got.detach().double(), expected, atol=2e-6, rtol=1e-6)
    torch.autograd.backward(got.sum())
    assert logits_TV.grad is not None
    assert logits_TV.grad.dtype == dtype
    wanted = torch.nn.functional.one_hot(targets_T, 300) - (logits_TV.detach().double() / 0.9).softmax(-1)
    torch.testing.assert_close(logits_TV.grad, (wanted / 0.9).to(dtype), atol=1e-7, rtol=0.02)


def test_large_and_infinite_logits() -> None:
    """exp(1e4) overflows, logsumexp does not. A token that cannot come counts 0 in entropy and in its gradient."""
    logits_TV = torch.tensor([[1e4, 1e4 - math.log(3)], [0.0, -torch.inf]], requires_grad=True)
    logprobs_T, entropy_T = token_logprobs(logits_TV, torch.tensor([0, 0])), entropy(logits_TV)
    torch.testing.assert_close(logprobs_T, torch.tensor([math.log(0.75), 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy_T[1], torch.tensor(0.0))
    torch.autograd.backward(logprobs_T.sum() + entropy_T.sum())
    assert logits_TV.grad is not None
    assert bool(logits_TV.grad.isfinite().all())


def test_no_tokens() -> None:
    """A rank whose pack is empty still runs forward and backward."""
    logits_TV = torch.zeros(0, 5, requires_grad=True)
    total = token_logprobs(logits_TV, torch.zeros(0, dtype=torch.int64)).sum() + entropy(logits_TV).sum()
    torch.autograd.backward(total)
    assert logits_TV.grad is not None
    assert logits_TV.grad.shape == (0, 5)


def test_rows_may_be_strided() -> None:
    logits_TV, targets_T = random_logits(6, 8)
    strided = logits_TV.t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    torch.autograd.backward(token_logprobs(strided, targets_T).sum())
    plain = logits_TV.clone().requires_grad_()
    torch.autograd.backward(token_logprobs(plain, targets_T).sum())
    assert strided.grad is not None and plain.grad is not None
    torch.testing.assert_close(strided.grad, plain.grad)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in PyTorch
    """Notes the largest tensor that any operation makes, and how many of the logits' size."""

    def __init__(self, full_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.full_size = full_size
        self.num_full = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor) and part.numel() >= self.full_size:
                self.num_full += part.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("function", ["token_logprobs", "entropy"])
def test_makes_nothing_of_the_logits_size_but_their_gradient(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", 4 * 50)
    logits_TV = torch.randn(64, 50, dtype=torch.bfloat16).requires_grad_()
    targets_T = torch.randint(50, (64,))
    with LargestTensor(logits_TV.numel()) as forward:
        made = token_logprobs(logits_TV, targets_T) if function == "token_logprobs" else entropy(logits_TV)
    with LargestTensor(logits_TV.numel()) as backward:
        torch.autograd.backward(made.sum())
    assert (forward.num_full, backward.num_full) == (0, 1)
    with LargestTensor(logits_TV.numel()) as naive:
        logits_TV.float().log_softmax(-1)
    assert naive.num_full == 2, "the counter sees what it is for"


def test_refusals() -> None:
    logits_TV = torch.zeros(3, 4)
    with pytest.raises(ShapeMismatch, match=r"logits \(3, 4\) and targets \(2,\)"):
        token_logprobs(logits_TV, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeMismatch, match=r"\(T, V\), got shape \(1, 3, 4\)"):
        entropy(logits_TV[None])
    with pytest.raises(AlgorithmError, match="temperature 0"):
        token_logprobs(logits_TV, torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        token_logprobs(logits_TV, torch.full((3,), 4))
    with pytest.raises(RuntimeError, match="index -100 is out of bounds"):
        token_logprobs(logits_TV, torch.full((3,), -100))
