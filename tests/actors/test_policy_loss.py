"""The policy's loss, as configured, against a slow loop: normalisation, KL, entropy, weights; any cut into packs."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from actors.config import SamplingConfig
from actors.packed import Samples
from actors.policy_loss import PolicyBatch, PolicyObjective
from actors.updates import Size, all_ids
from algorithms.config import OnlineConfig
from experience.schema import CREDIT, REF_LOGPROBS, SchemaError, make_batch
from tests.actors.experience_batches import rollout

TEMPERATURE, LONGEST, VOCABULARY = 0.7, 16, 64
KL_COEFFICIENT = 0.3


class Table(nn.Module):
    """Logits that depend on the token before alone."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.logits_VV = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=source, dtype=torch.float64))

    def forward(self, tokens: Tensor, position_ids: Tensor, positions_S: Tensor) -> Tensor:
        return self.logits_VV[tokens[positions_S]]


ROLLOUTS = [rollout(5, seed=1), rollout(3, seed=2, first_id=5)]
ROWS = [row for batch in ROLLOUTS for row in batch.to_pylist()]
IDS = [row["sample_id"] for row in ROWS]
LENGTHS = [len(row["rollout_logprobs"]) for row in ROWS]


def numbers(seed: int, spread: float = 1.0, shift: float = 0.0) -> list[list[float]]:
    source = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(length, generator=source) + shift).tolist() for length in LENGTHS]


ADVANTAGES, BEHAVIOUR, REFERENCE = numbers(3), numbers(4, 0.5, -5), numbers(5, 0.5, -5)
WEIGHTS = [[0.0] * len(row) if i == 2 else [abs(w) for w in row] for i, row in enumerate(numbers(6))]
CREDITS = make_batch(
    CREDIT,
    {"sample_id": IDS, "advantages": ADVANTAGES, "behaviour_logprobs": BEHAVIOUR, "loss_weights": WEIGHTS},
)
REFERENCES = make_batch(REF_LOGPROBS, {"sample_id": IDS, "ref_logprobs": REFERENCE})


def evaluate(settings: dict[str, Any], cuts: list[list[int]]) -> tuple[float, Tensor, dict[str, float]]:
    """Loss and gradient of the whole batch, cut into packs."""
    config = OnlineConfig.model_validate(settings)
    objective = PolicyObjective(config, SamplingConfig(max_response_tokens=LONGEST, temperature=TEMPERATURE))
    batch = PolicyBatch(all_ids(ROLLOUTS), Samples(ROLLOUTS), [CREDITS], [REFERENCES] if config.kl.in_loss else [])
    model, size = Table(), Size(sum(LENGTHS), len(LENGTHS))
    total, sums = 0.0, dict[str, float]()
    for rows in cuts:
        loss, metrics = objective.loss(model, batch.pack(rows, torch.device("cpu")), size, KL_COEFFICIENT)
        torch.autograd.backward(loss)
        total += loss.item()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    gradient = model.logits_VV.grad
    assert gradient is not None
    return total, gradient, sums


def slow_loss(config: OnlineConfig, model: Table) -> Tensor:
    """The objective, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantages, old, ref, weights in zip(ROWS, ADVANTAGES, BEHAVIOUR, REFERENCE, WEIGHTS, strict=True):
        tokens, first, length = row["tokens"], row["num_prompt_tokens"], len(advantages)
        every = [(model.logits_VV[tokens[first + t - 1]] / TEMPERATURE).log_softmax(-1) for t in range(length)]
        own = [every[t][tokens[first + t]] for t in range(length)]
        norm = {
            "tokens": 1 / sum(LENGTHS),
            "sequences": 1 / (len(LENGTHS) * length),
            "constant": 1 / (len(LENGTHS) * LONGEST),
        }[config.normalise]
        mean_ratio = torch.exp(torch.stack([p - q for p, q in zip(own, old, strict=True)]).mean())
        for t in range(length):
            ratio = mean_ratio if config.policy_loss == "gspo" else torch.exp(own[t] - old[t])
            low, high = config.clip_bounds
            clipped = ratio.clamp(1 - low, 1 + high)
            if config.policy_loss == "cispo":
                gain = clipped.item() * advantages[t] * own[t]
            elif config.policy_loss == "reinforce":
                gain = advantages[t] * own[t]
            else:
                gain = torch.minimum(ratio * advantages[t], clipped * advantages[t])
            total = total - norm * weights[t] * gain
            total = total + norm * config.entropy_coefficient * (every[t].exp() * every[t]).sum()
            if config.kl.in_loss:
                gap = ref[t] - own[t]
                square = gap.square() / 2
                kl = {
                    "k1": square + (-gap - square).item(),  # the gradient of k2
                    "k2": square,
                    "k3": gap.exp() - gap - 1,
                }[config.kl.estimator_used]
                total = total + norm * KL_COEFFICIENT * kl
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "ppo", "entropy_coefficient": 0.1},
        {"name": "grpo"},
        {"name": "dr_grpo", "clip_high": 0.28},
        {"name": "rloo", "policy_loss": "reinforce", "normalise": "sequences"},
        {"name": "reinforce_plus_plus_baseline"},
        {"name": "remax", "kl": {"placement": "loss", "estimator": "k1"}},
        {"name": "grpo", "policy_loss": "gspo", "clip_ratio": 0.3, "kl": {"coefficient": 0}},
        {"name": "grpo", "policy_loss": "cispo", "clip_high": 2.0, "entropy_coefficient": 0.2, "normalise": "constant"},
    ],
    ids=lambda settings: "-".join(str(settings.get(key, "")) for key in ("name", "policy_loss")),
)
def test_equals_a_slow_loop(settings: dict[str, Any]) -> None:
    model = Table()
    expected = slow_loss(OnlineConfig.model_validate(settings), model)
    torch.autograd.backward(expected)
    for cuts in ([list(range(8))], [[4, 1], [], [0, 7, 6], [2, 3, 5]]):
        loss, gradient, metrics = evaluate(settings, cuts)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert torch.allclose(gradient, cast(Tensor, model.logits_VV.grad), rtol=1e-5, atol=1e-9)
        assert ("ref_kl" in metrics) == OnlineConfig.model_validate(settings).kl.in_loss
        assert metrics["entropy"] > 0
        assert math.isfinite(metrics["approx_kl"])


def test_an_empty_pack_adds_nothing() -> None:
    for settings in ({"name": "grpo"}, {"name": "ppo", "policy_loss": "gspo", "entropy_coefficient": 0.1}):
        loss, gradient, _ = evaluate(settings, [[]])
        assert loss == 0 and not gradient.any()


def test_columns_of_other_rows_are_refused() -> None:
    ids = all_ids(ROLLOUTS)
    for credit, reference in (([CREDITS.slice(1)], []), ([CREDITS], [REFERENCES.slice(1)])):
        with pytest.raises(SchemaError, match="7 rows where 8"):
            PolicyBatch(ids, Samples(ROLLOUTS), credit, reference)
    with pytest.raises(SchemaError, match="expected a batch of schema credit, got one of ref_logprobs"):
        PolicyBatch(ids, Samples(ROLLOUTS), [REFERENCES], [])
