"""docs/algorithms.md: its algorithm runs, is short, and its table is what the code says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from algorithms.bundles import ALGORITHMS, CreditInputs, LossInputs, algorithm_of
from algorithms.config import OnlineConfig

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()


def test_the_example_is_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 40
    (tmp_path / "optimists.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = re.findall(r"name: (optimists:\w+)", PAGE)
    try:
        config = OnlineConfig(name=name)
        assert config.normalise == "constant" and config.kl.in_loss and config.needs.groups
        with pytest.raises(ValueError, match="gamma means nothing to optimists:OPTIMISTS"):
            OnlineConfig(name=name, gamma=0.5)
        algorithm = algorithm_of(name)
    finally:
        sys.modules.pop("optimists", None)
    # Prompt 7: scores 1, 5, 3, the second of two tokens; prompt 8: 2, 2.
    rewards_T = torch.tensor([1.0, 0.0, 5.0, 3.0, 2.0, 2.0], dtype=torch.float64)
    offsets, groups = torch.tensor([0, 1, 3, 4, 5, 6]), torch.tensor([7, 7, 7, 8, 8])
    inputs = CreditInputs(rewards_T, offsets, groups, None, None, 1.0, 1.0)
    advantages_T, returns_T = algorithm.credit(inputs)
    assert advantages_T.tolist() == [-0.5, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert returns_T is None
    weights = torch.ones(6, dtype=torch.float64)
    logprobs = -weights.clone().requires_grad_()
    loss, _ = algorithm.loss(LossInputs(logprobs, -weights, advantages_T, offsets, weights, 6.0, config))
    assert loss.item() == pytest.approx((-0.5 + 1 + 1) / 6)


def test_the_table_is_what_the_code_says() -> None:
    rows = {}
    for line in PAGE.splitlines():
        if found := re.match(r"\| `(\w+)` \|[^|]*\| (\w+) \| ([^|]+) \|([^|]*)\|", line):
            rows[found[1]] = (found[2], found[3].strip(), found[4].strip())
    assert rows.keys() == ALGORITHMS.keys()
    for name, (normalise, kl, needs) in rows.items():
        config = OnlineConfig(name=name)
        assert normalise == config.normalise
        said = f"{config.kl.placement}, {f'{config.kl.estimator_used}, ' if config.kl.in_loss else ''}"
        assert kl == (f"{said}{config.kl.coefficient:g}" if config.kl.coefficient else "none")
        assert ("critic" in needs, "groups" in needs) == (config.needs.critic, config.needs.groups)
        for baseline in ("greedy", "initial"):
            assert (baseline in needs) == (config.needs.baseline == baseline)
