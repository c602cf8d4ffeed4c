"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest

from algorithms.errors import AlgorithmError
from algorithms.schedules import learning_rate

Shape = Literal["constant", "linear", "cosine"]


def rates(num_updates: int, shape: Shape, warmup: float = 0.0, final: float = 0.1) -> list[float]:
    return [learning_rate(i, num_updates, 2.0, shape, warmup, final) for i in range(num_updates)]


def test_by_hand() -> None:
    """Peak 2, 5 updates. Linear to a tenth: 2 falls to 0.2 in four equal steps of 0.45.

    Cosine: share left (1 + cos(pi i / 4)) / 2 = 1, 0.853553, 0.5, 0.146447, 0, of the 1.8 between.
    """
    assert rates(5, "constant") == [2.0] * 5
    assert rates(5, "linear") == pytest.approx([2.0, 1.55, 1.1, 0.65, 0.2])
    assert rates(5, "cosine") == pytest.approx([2.0, 1.736396, 1.1, 0.463604, 0.2], abs=1e-6)


def test_warmup_by_hand() -> None:
    """10 updates, a fifth and a half of them rising.

    InstructGPT's warm-up: over 10 updates from a tenth of the peak.
    """
    assert rates(10, "constant", warmup=0.5) == pytest.approx([0.4, 0.8, 1.2, 1.6, *[2.0] * 6])
    assert rates(10, "linear", warmup=0.2, final=0.0)[:3] == pytest.approx([1.0, 2.0, 2.0 * 7 / 8])
    assert rates(20, "constant", warmup=0.5)[:10] == pytest.approx([0.2 * i for i in range(1, 11)])


@pytest.mark.parametrize("shape", get_args(Shape))
@pytest.mark.parametrize("num_updates", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_rises_then_never_rises_again(shape: Shape, num_updates: int, warmup: float) -> None:
    got = rates(num_updates, shape, warmup, final=0.25)
    top = got.index(max(got))
    assert max(got) == pytest.approx(2.0)
    assert all(rate > 0 for rate in got), "an update at rate 0 would be wasted"
    assert got[:top] == sorted(got[:top])
    assert got[top:] == sorted(got[top:], reverse=True)
    if shape != "constant" and warmup < 1 and num_updates > 2:
        assert got[-1] == pytest.approx(0.5), "the last update is at the final fraction"


def test_warmup_counts_whole_updates() -> None:
    """0.07 * 100 is 7.000000000000001 in binary, and 7 updates."""
    got = rates(100, "constant", warmup=0.07)
    assert got[6] == 2.0 and got[5] == pytest.approx(2.0 * 6 / 7)


def test_cosine_is_halfway_at_half() -> None:
    assert rates(101, "cosine", final=0.0)[50] == pytest.approx(1.0)
    assert rates(101, "cosine", final=0.0)[25] == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize("update", [-1, 10])
def test_refuses_updates_of_no_run(update: int) -> None:
    with pytest.raises(AlgorithmError, match=f"update {update} is not one of a run of 10"):
        learning_rate(update, 10, 1.0, "constant", 0.0, 0.1)


def test_refuses_unknown_shapes() -> None:
    with pytest.raises(AlgorithmError, match="no schedule has the shape 'exponential'"):
        learning_rate(0, 10, 1.0, "exponential", 0.0, 0.1)  # type: ignore[arg-type]
