"""What a checkpoint keeps of the evaluations before it, and the file that names the best checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """The iteration whose weights were best, by which metric, and its value."""

    iteration: int
    metric: str
    value: float


@dataclass(frozen=True)
class EvaluationState:
    """The iteration that was last evaluated, none yet where it is -1, and the best one where one is looked for."""

    iteration: int = -1
    best: Best | None = None

    def best_is_of(self, iteration: int) -> bool:
        """Whether the best weights are those of an iteration."""
        return self.best is not None and self.best.iteration == iteration

    def to_json(self) -> dict[str, Any]:
        """As ``from_json`` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> EvaluationState:
        """From what ``to_json`` gave."""
        return cls(saved["iteration"], None if saved["best"] is None else Best(**saved["best"]))


def write_best(best: Best, checkpoint: Path) -> None:
    """Say beside the checkpoints which is the best, in a file that is there as a whole or not at all."""
    file = checkpoint.parent / BEST_FILE
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps({"checkpoint": checkpoint.name, **asdict(best)}, indent=1) + "\n")
    os.replace(beside, file)
