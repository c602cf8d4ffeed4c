"""A reference of a data set scores as the plain model does, and names itself as a learner with its weights would."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from algorithms.config import PreferenceConfig
from tests.actors import comparison_programs, role_programs
from tests.actors.ranks import Ranks, context
from tests.actors.test_feedback_objective import judged, mismatched

# `import deepspeed` uses torch.jit, which PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.mark.parametrize("sharding", ["replicas", "zero3"])
def test_it_scores_comparisons_and_feedback_over_ranks(sharding: str, models: Path, two_ranks: Ranks) -> None:
    qwen, pairs = models / "qwen2", comparison_programs.ranked([[0, 1]] * 3)
    results = two_ranks.run(role_programs.data_reference, qwen, sharding, [pairs, judged()])
    wholes = [pa.Table.from_batches([columns[number] for _, columns in results]) for number in range(2)]
    expected = [
        ("ref_logprob", wholes[0], pairs),
        ("ref_logprob", wholes[1], judged()),
        ("mismatched_ref_logprob", wholes[1], mismatched(judged())),
    ]
    for name, whole, rows in expected:
        alone = comparison_programs.plain_logprobs(qwen, rows)
        assert whole.column(name).to_pylist() == pytest.approx(alone, rel=1e-5)
        assert whole.column("sequence_id").to_pylist() == rows.column("sequence_id").to_pylist()
    learner = comparison_programs.learner(context(), qwen, PreferenceConfig(name="dpo", batch_size=8))
    assert [digest for digest, _ in results] == [learner.model_digest()] * 2


def test_another_model_is_another_reference(models: Path) -> None:
    """The first loss is then of what the two models differ by, and the digest tells them apart."""
    digests = {role_programs.data_reference(context(), models / name, "replicas", [])[0] for name in ("qwen2", "llama")}
    assert len(digests) == 2
