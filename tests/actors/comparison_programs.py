"""Batches of comparisons, what a plain Hugging Face model makes of them, and what ranks do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import transformers
from torch import Tensor

from actors.config import LoRAConfig, TrainedRoleConfig, TuningConfig
from actors.errors import RoleError
from actors.learner import LearnerActor
from actors.reports import ColumnInfo
from algorithms.config import LearningConfig
from cluster.context import RankContext
from experience.schema import COMPARISONS, REF_SEQUENCE_LOGPROBS, make_batch
from experience.table import write_table
from tests.actors import role_programs as programs


def ranked(
    ranks: Sequence[Sequence[int]],
    *,
    margins: Sequence[float] | None = None,
    preferences: Sequence[float] | None = None,
    ratings: Sequence[str] | None = None,
    seed: int = 0,
    longest: int = 8,
) -> pa.RecordBatch:
    """A comparison for each list of ranks: a prompt of 2 to 4 tokens and responses of 1 to ``longest``.

    Every other response ends in token 1, the EOS of the tiny models, and every third holds it elsewhere.
    """
    source = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=source))

    columns: dict[str, list[Any]] = {name: [] for name in COMPARISONS.names}
    for number, places in enumerate(ranks):
        prompt = [draw(2, 63) for _ in range(draw(2, 4))]
        for rank in places:
            row = len(columns["rank"])
            response = [draw(2, 63) for _ in range(draw(1, longest))]
            if row % 2 == 0:
                response[-1] = 1
            if row % 3 == 0:
                response[0] = 1
            columns["comparison_id"].append(number)
            columns["sequence_id"].append(row)
            columns["rank"].append(rank)
            columns["tokens"].append(prompt + response)
            columns["num_prompt_tokens"].append(len(prompt))
            columns["margin"].append(margins[number] if margins else 0.0)
            columns["preference"].append(preferences[number] if preferences else 1.0)
            columns["rating"].append(ratings[number] if ratings else "")
    return make_batch(COMPARISONS, columns)


def replaced(batch: pa.RecordBatch, **columns: list[Any]) -> pa.RecordBatch:
    """``batch`` with other values in some columns."""
    return make_batch(COMPARISONS, {name: batch.column(name) for name in batch.schema.names} | columns)


def by_comparison(batch: pa.RecordBatch, rows: Sequence[Any]) -> list[list[Any]]:
    """One value a row, as a list for each comparison."""
    found: dict[int, list[Any]] = {}
    for number, value in zip(batch.column("comparison_id").to_pylist(), rows, strict=True):
        found.setdefault(number, []).append(value)
    return list(found.values())


def plain_scores(folder: Path, batch: pa.RecordBatch) -> list[float]:
    """Score of each response as Transformers gives it: by the model's own forward, which pools, in a padded batch."""
    rows = batch.column("tokens").to_pylist()
    return pooled_scores(folder, rows, "right")


def pooled_scores(folder: Path, rows: Sequence[Sequence[int]], side: str) -> list[float]:
    """As ``plain_scores``, padded on either side by the folder's own tokenizer."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padded = tokenizer.pad({"input_ids": [list(row) for row in rows]}, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    found: list[float] = logits[:, 0].tolist()
    return found


def plain_logprobs(folder: Path, batch: pa.RecordBatch) -> list[float]:
    """Log-prob of each response, summed over its tokens, each forwarded alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    prompts = batch.column("num_prompt_tokens").to_pylist()
    for row, num_prompt in zip(batch.column("tokens").to_pylist(), prompts, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        found.append(sum(logprobs[at - 1, row[at]].item() for at in range(num_prompt, len(row))))
    return found


def write_reference(values: Sequence[float], path: Path) -> Path:
    """A file of the reference's log-probs, of sequence 0, 1, 2 ..."""
    column = make_batch(REF_SEQUENCE_LOGPROBS, {"sequence_id": list(range(len(values))), "ref_logprob": list(values)})
    write_table(pa.Table.from_batches([column]), path)
    return path


def learner(
    own: RankContext,
    folder: Path,
    algorithm: LearningConfig,
    stage: int = 1,
    *,
    max_tokens: int = programs.PACK,
    lora: bool = False,
    rate: float = 1e-2,
    **model: Any,
) -> LearnerActor:
    """A learner that learns as ``algorithm`` says."""
    tuning = TuningConfig(method="lora", lora=LoRAConfig(rank=4, alpha=8.0)) if lora else TuningConfig()
    arguments = programs.trained(folder, stage, rate, **model) | {"max_tokens_per_pack": max_tokens, "tuning": tuning}
    return LearnerActor(own, TrainedRoleConfig(**arguments), algorithm, 3)


Learned = tuple[dict[str, float], list[dict[str, float]], dict[str, float]]


def learn(
    own: RankContext,
    folder: Path,
    algorithm: LearningConfig,
    stage: int,
    batches: Sequence[pa.RecordBatch],
    reference: Path | None = None,
) -> Learned:
    """An evaluation of the first batch, the metrics of one update a batch, and the evaluation again."""
    actor = learner(own, folder, algorithm, stage)
    if reference is not None:
        actor.use_reference(reference)
    before = actor.evaluate(batches[:1])
    metrics = [dict(actor.train(update, 10, batch).metrics) for update, batch in enumerate(batches)]
    for report in metrics:
        del report["tokens_per_second"]
    return before, metrics, actor.evaluate(batches[:1])


def score(
    own: RankContext, folder: Path, algorithm: LearningConfig, stage: int, batches: Sequence[pa.RecordBatch]
) -> list[pa.RecordBatch]:
    """The reference's column of each batch."""
    actor = learner(own, folder, algorithm, stage)
    return [actor.score_reference(batch)[0] for batch in batches]


def score_and_digest(
    own: RankContext, folder: Path, algorithm: LearningConfig, stage: int, batches: Sequence[pa.RecordBatch]
) -> tuple[list[tuple[pa.RecordBatch, ColumnInfo]], list[str]]:
    """The reference's log-probs of each batch; digests at first, after scoring, and after an update."""
    actor = learner(own, folder, algorithm, stage)
    digests = [actor.model_digest()]
    columns = [actor.score_reference(batch) for batch in batches]
    digests.append(actor.model_digest())
    actor.train(0, 10, batches[0])
    digests.append(actor.model_digest())
    return columns, digests


def score_after_training(
    own: RankContext, folder: Path, algorithm: LearningConfig, stage: int, batch: pa.RecordBatch, lora: bool
) -> tuple[list[float], list[float] | str, dict[str, float]]:
    """The reference's log-probs before and after two updates, or why they are refused, and what training changed."""
    actor = learner(own, folder, algorithm, stage, lora=lora)
    before = actor.score_reference(batch)[0].column("ref_logprob").to_pylist()
    for update in range(2):
        actor.train(update, 2, batch)
    changed = actor.evaluate([batch])
    try:
        return before, actor.score_reference(batch)[0].column("ref_logprob").to_pylist(), changed
    except RoleError as error:
        return before, str(error), changed


class Spy(torch.nn.Module):
    """A model that keeps what it gave last."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = model
        self.seen = torch.zeros(0)

    def forward(self, *arguments: Tensor) -> Tensor:
        """As the model's."""
        given = torch.as_tensor(self._model(*arguments))
        self.seen = given.detach()
        return given
