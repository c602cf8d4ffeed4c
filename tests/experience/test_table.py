from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from experience.schema import ROLLOUT, SCHEMA_VERSION, SCORES, SchemaError, make_batch
from experience.table import Experience, join
from experience.tensors import list_column, scalar_column

MakeBatch = Callable[[range], pa.RecordBatch]


@pytest.fixture
def joined(rollout_of: MakeBatch, ref_of: MakeBatch, scores_of: MakeBatch) -> Experience:
    # Each role's batches are cut at other rows, and samples 0 and 4 have responses without a token.
    return join(
        [rollout_of(range(3)), rollout_of(range(3, 6))],
        [ref_of(range(2)), ref_of(range(2, 2)), ref_of(range(2, 6))],
        [scores_of(range(6))],
    )


def test_join_by_position_over_differently_cut_batches(joined: Experience) -> None:
    assert joined.num_rows == 6
    assert joined.table.column("sample_id").to_pylist() == [0, 1, 2, 3, 4, 5]
    assert joined.table.column_names == [*ROLLOUT.names, "ref_logprobs", "score"]
    row = joined.row(3)
    assert (row["sample_id"], row["prompt_id"], row["finish_reason"]) == (3, 1, "length")
    assert np.asarray(row["tokens"]).tolist() == [3] * 6
    assert np.asarray(row["ref_logprobs"]).tolist() == [-3.0] * 3
    assert row["score"] == pytest.approx(0.3)
    assert np.asarray(joined.row(4)["ref_logprobs"]).tolist() == []
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"row {index} of 6"):
            joined.row(index)


def test_join_copies_no_values(rollout_of: MakeBatch, ref_of: MakeBatch) -> None:
    rollouts, refs = [rollout_of(range(1, 3)), rollout_of(range(3, 6))], [ref_of(range(1, 4)), ref_of(range(4, 6))]
    experience = join(rollouts, refs)
    for name, batches in (("tokens", rollouts), ("ref_logprobs", refs)):
        viewed = [chunk.data_ptr() for chunk in list_column(experience.table, name).chunks]
        assert viewed == [batch.column(name).values.buffers()[1].address for batch in batches]


def test_written_and_mapped_back(joined: Experience, tmp_path: Path) -> None:
    path = tmp_path / "iteration-00003.arrow"
    size = joined.write(path, {"iteration": 3, "kl_coefficient": 0.05})
    assert size == path.stat().st_size
    before = pa.total_allocated_bytes()
    again = Experience.open(path)
    assert pa.total_allocated_bytes() == before
    assert again.metadata == {"iteration": "3", "kl_coefficient": "0.05"}
    assert again.table.to_pylist() == joined.table.to_pylist()
    assert again.table.schema.equals(joined.table.schema)
    with pa.memory_map(str(path)) as source:
        mapping = source.read_buffer(source.size())
        assert mapping.size == size
    # The file's values become tensors in place: no memory of Arrow's own was taken.
    column = list_column(again.table, "ref_logprobs")
    assert pa.total_allocated_bytes() == before
    assert column.gather(range(6)).tolist() == [-1.0, -2.0, -2.0, -3.0, -3.0, -3.0, -5.0]
    assert scalar_column(again.table, "score").tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    joined.write(path)
    assert Experience.open(path).metadata == {}
    assert list(tmp_path.iterdir()) == [path]


def test_pandas_reads_plain_columns(joined: Experience, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    joined.write(tmp_path / "a.arrow")
    frame = pandas.read_feather(tmp_path / "a.arrow")
    assert frame["score"].tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert frame.loc[3, "tokens"].tolist() == [3] * 6
    assert frame["finish_reason"].tolist() == ["stop", "stop", "stop", "length", "stop", "stop"]


def test_an_empty_iteration(rollout_of: MakeBatch, ref_of: MakeBatch, tmp_path: Path) -> None:
    empty = join([rollout_of(range(0))], [ref_of(range(0))])
    empty.write(tmp_path / "a.arrow")
    assert Experience.open(tmp_path / "a.arrow").num_rows == 0


def test_rows_that_do_not_match_are_refused(rollout_of: MakeBatch, ref_of: MakeBatch, scores_of: MakeBatch) -> None:
    rollouts = [rollout_of(range(4))]
    with pytest.raises(SchemaError, match="ref_logprobs: 3 rows where 4 were expected"):
        join(rollouts, [ref_of(range(3))])
    with pytest.raises(SchemaError, match="scores: row 2 is sample 7, expected sample 2"):
        join(rollouts, [scores_of(range(2)), scores_of(range(7, 9))])
    with pytest.raises(SchemaError, match="column score is there already"):
        join(rollouts, [scores_of(range(4))], [scores_of(range(4))])
    with pytest.raises(SchemaError, match="experience: sample 1 is there 2 times"):
        join([rollout_of(range(2)), rollout_of(range(1, 3))])
    with pytest.raises(SchemaError, match="the first batches of a join are rollouts, got scores"):
        join([scores_of(range(4))])
    with pytest.raises(SchemaError, match="expected a batch of schema rollout, got one of scores"):
        join([rollout_of(range(2)), scores_of(range(2, 4))])
    with pytest.raises(SchemaError, match="gave no batch"):
        join(rollouts, [])
    with pytest.raises(SchemaError, match="no schema is called unnamed"):
        join([pa.record_batch({"sample_id": [1]})])


def test_a_column_that_is_not_as_long_as_the_response(rollout_of: MakeBatch) -> None:
    rollout = rollout_of(range(4))
    columns = dict(zip(rollout.schema.names, rollout.columns, strict=True))
    columns["policy_versions"] = pa.array([[], [1], [1, 1], [1]], ROLLOUT.field("policy_versions").type)
    with pytest.raises(SchemaError, match="policy_versions of sample 3 has 1 values for a response of 3 tokens"):
        join([make_batch(ROLLOUT, columns)])


def test_files_that_are_not_experience(joined: Experience, tmp_path: Path, scores_of: MakeBatch) -> None:
    path = tmp_path / "a.arrow"
    with pytest.raises(FileNotFoundError):
        Experience.open(path)
    path.write_bytes(b"")
    with pytest.raises(SchemaError, match="not a whole Arrow file"):
        Experience.open(path)
    size = joined.write(path)
    os.truncate(path, size // 2)
    with pytest.raises(SchemaError, match=r"a\.arrow: not a whole Arrow file"):
        Experience.open(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCORES) as writer:
        writer.write_batch(scores_of(range(2)))
    now = SCHEMA_VERSION
    with pytest.raises(SchemaError, match=f"holds scores of version {now}, expected experience of {now}"):
        Experience.open(path)
    metadata = {**joined.table.schema.metadata, b"troupe.schema_version": b"9"}
    Experience(joined.table.replace_schema_metadata(metadata)).write(path)
    with pytest.raises(SchemaError, match="experience of version 9"):
        Experience.open(path)
    Experience(joined.table.drop_columns(["prompt_id"])).write(path)
    with pytest.raises(SchemaError, match=r"no columns \['prompt_id'\]"):
        Experience.open(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    joined: Experience, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.arrow"
    joined.write(path, {"iteration": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        joined.write(path, {"iteration": 2})
    assert Experience.open(path).metadata == {"iteration": "1"}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"troupe\.schema"):
        joined.write(path, {"troupe.schema": "mine"})
