"""What a resume asks of its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.source import SourceDescription
from data.build import Counts
from launch.errors import CheckpointError
from launch.run import require_same_data


def described(fingerprint: str) -> SourceDescription:
    return SourceDescription(
        kind="prompts",
        num_rows=3,
        num_heldout_rows=0,
        num_rows_in_all=3,
        num_sequences=3,
        num_heldout_sequences=0,
        num_tokens=9,
        longest=3,
        longest_row=3,
        num_heldout_learnt=0,
        num_heldout_bytes=0,
        counts=(Counts("a.jsonl", read=3, train=3),),
        fingerprint=fingerprint,
        digest="d",
        first_cursor="{}",
    )


def test_a_resume_needs_the_data_it_began_with() -> None:
    require_same_data("abc", described("abc"), Path("step-2"))
    with pytest.raises(CheckpointError, match=r"the data are not those of step-2: .*a\.jsonl: 3 rows read"):
        require_same_data("abc", described("abd"), Path("step-2"))
