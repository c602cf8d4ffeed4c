"""What a rank of a role knows of where it runs. Imports no Ray, so that tests build one by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class RankContext:
    """One process of a role.

    ``rank`` counts over the role's ``num_ranks`` processes, ``local_rank`` over those on this node.
    ``master_address`` and ``master_port`` are where the role's ranks meet. ``device`` is what it computes on, with
    ``num_threads`` CPU threads. ``log_dir`` is where its log goes; none where it has none. ``seed`` is the run's.
    ``answer_within_s`` is how long a method may take that can also answer in part: the call is given up soon after.
    """

    role: str
    rank: int
    num_ranks: int
    local_rank: int
    master_address: str
    master_port: int
    device: Literal["cpu", "cuda"]
    num_threads: int
    log_dir: Path | None
    seed: int
    answer_within_s: float = math.inf
