from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from experience import schema
from experience.schema import (
    ALL,
    PROMPTS,
    REF_SEQUENCE_LOGPROBS,
    SCHEMA_VERSION,
    SCORES,
    VALUES,
    SchemaError,
    check_schema,
    make_batch,
    require_same_rows,
)


def scores(ids: list[int]) -> pa.RecordBatch:
    return make_batch(SCORES, {"sample_id": ids, "score": [0.5] * len(ids)})


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(schema).failed == 0


def test_every_schema_carries_its_version_and_name_and_no_nulls() -> None:
    for name, known in ALL.items():
        assert known.metadata[b"troupe.schema"].decode() == name
        assert known.metadata[b"troupe.schema_version"] == str(SCHEMA_VERSION).encode()
        assert not any(field.nullable for field in known)
        assert not any(field.type.value_field.nullable for field in known if pa.types.is_list(field.type))
        check_schema(known.empty_table(), known)


def test_make_batch_takes_arrays_as_they_are() -> None:
    values = pa.array([[0.5], [1.5, 2.5]], pa.list_(pa.float32()))  # its inner field is called nullable
    batch = make_batch(VALUES, {"values": values, "sample_id": [1, 2]})
    assert batch.schema.equals(VALUES, check_metadata=True)
    assert batch.column("values").values.buffers()[1].address == values.values.buffers()[1].address
    assert make_batch(VALUES, {"values": values.slice(1), "sample_id": [2]}).to_pydict()["values"] == [[1.5, 2.5]]
    assert make_batch(SCORES, {"sample_id": pa.array([1], pa.int32()), "score": [1]}).column("score")[0].as_py() == 1.0


REST: dict[str, list[object]] = {"source": ["a"], "columns": ["{}"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_id": [1], "tokens": [[1]]}, r"prompts: has columns .* got \['prompt_id', 'tokens'\]"),
        ({"prompt_id": [1], "tokens": [["x"]], **REST}, "column tokens is not list"),
        ({"prompt_id": [1], "tokens": [1], **REST}, "column tokens is not list"),
        ({"prompt_id": [2**63 - 1, 1], "tokens": [[1]], **REST}, "columns differ in length"),
        ({"prompt_id": [None], "tokens": [[1]], **REST}, "column prompt_id holds 1 nulls"),
        ({"prompt_id": [1], "tokens": [[1, None]], **REST}, "column tokens holds 1 nulls"),
        ({"prompt_id": [1], "tokens": pa.array([None], pa.list_(pa.int32())), **REST}, "tokens holds 1 nulls"),
        ({"prompt_id": [1], "tokens": pa.array([["x"]]), **REST}, "column tokens is not list"),
    ],
)
def test_make_batch_refuses(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        make_batch(PROMPTS, columns)


def test_check_schema_says_what_differs() -> None:
    batch = scores([1])
    check_schema(batch, SCORES)
    check_schema(pa.Table.from_batches([batch]), SCORES)
    with pytest.raises(SchemaError, match="expected a batch of schema values, got one of scores"):
        check_schema(batch, VALUES)
    with pytest.raises(SchemaError, match=f"scores: schema version none, this code reads version {SCHEMA_VERSION}"):
        check_schema(batch.replace_schema_metadata(None), SCORES)
    renamed = batch.rename_columns(["sample_id", "reward"]).replace_schema_metadata(SCORES.metadata)
    with pytest.raises(SchemaError, match=r"(?s)scores: expected .*score: float not null, got .*reward"):
        check_schema(renamed, SCORES)


def test_require_same_rows() -> None:
    for expected in ([3, 4], pa.array([3, 4]), pa.chunked_array([[3], [4]])):
        require_same_rows(expected, scores([3, 4]))
        require_same_rows(expected, pa.Table.from_batches([scores([3]), scores([4])]))
        with pytest.raises(SchemaError, match="scores: row 1 is sample 9, expected sample 4"):
            require_same_rows(expected, scores([3, 9]))
        with pytest.raises(SchemaError, match="scores: 1 rows where 2 were expected"):
            require_same_rows(expected, scores([3]))
    require_same_rows([], scores([]))


def test_require_same_rows_by_another_id() -> None:
    batch = make_batch(REF_SEQUENCE_LOGPROBS, {"sequence_id": [7, 8], "ref_logprob": [-1.5, -2.0]})
    require_same_rows([7, 8], batch, "sequence_id")
    with pytest.raises(SchemaError, match="ref_sequence_logprobs: row 0 is sequence 7, expected sequence 6"):
        require_same_rows([6, 8], batch, "sequence_id")


def test_what_the_driver_imports_is_free_of_torch() -> None:
    modules = "experience.schema, experience.packing, experience.table, experience.ledger, experience.buffer"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
