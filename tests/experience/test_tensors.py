from __future__ import annotations

import doctest
import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experience import tensors
from experience.schema import EXAMPLES, SCORES, VALUES, SchemaError, check_schema, make_batch
from experience.tensors import list_array, list_column, pack, prediction_positions, scalar_column

ROWS = [[1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10]]


def batch_of(rows: list[list[int]]) -> pa.RecordBatch:
    masks = [[1] * len(row) for row in rows]
    return make_batch(EXAMPLES, {"example_id": list(range(len(rows))), "tokens": rows, "loss_mask": masks})


def value_buffer(batch: pa.RecordBatch, name: str) -> pa.Buffer:
    """The buffer of a list column's values."""
    return batch.column(name).values.buffers()[1]


def lies_in(tensor: torch.Tensor, buffer: pa.Buffer) -> bool:
    end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return bool(buffer.address <= tensor.data_ptr() and end <= buffer.address + buffer.size)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(tensors).failed == 0


@pytest.mark.parametrize(("name", "dtype"), [("tokens", torch.int32), ("loss_mask", torch.uint8)])
def test_values_have_the_address_of_the_arrow_buffer(name: str, dtype: torch.dtype) -> None:
    batch = batch_of(ROWS)
    column = list_column(batch, name)
    assert column.values.data_ptr() == value_buffer(batch, name).address
    assert column.values.dtype == dtype
    assert column.offsets.dtype == torch.int64
    assert column.offsets.tolist() == [0, 3, 4, 4, 6, 10]
    assert column.lengths.tolist() == [3, 1, 0, 2, 4]


def test_a_slice_shares_memory_from_its_own_first_value() -> None:
    batch = batch_of(ROWS)
    column = list_column(batch.slice(1, 3), "tokens")
    assert column.values.data_ptr() == value_buffer(batch, "tokens").address + 3 * 4
    assert column.offsets.tolist() == [0, 1, 1, 3]
    assert [row.tolist() for row in column.rows(range(3))] == [[4], [], [5, 6]]
    twice = list_column(batch.slice(1, 4).slice(2, 2), "tokens")
    assert twice.values.tolist() == [5, 6, 7, 8, 9, 10]


def test_a_mapped_file_is_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "examples.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, EXAMPLES) as writer:
        writer.write_batch(batch_of(ROWS))
        writer.write_batch(batch_of([[11, 12]]))
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        whole = source.read_buffer(source.size())  # the mapping itself
    column = list_column(batches, "tokens")
    assert [lies_in(chunk, whole) for chunk in column.chunks] == [True, True]
    assert column.chunks[0].data_ptr() == value_buffer(batches[0], "tokens").address
    assert pa.total_allocated_bytes() == before
    assert [row.tolist() for row in column.rows(range(6))] == [*ROWS, [11, 12]]


def test_a_read_only_buffer_needs_no_warning_filter() -> None:
    # Run under `filterwarnings = error`: torch's warning about read-only memory would fail this.
    flat = pa.Array.from_buffers(pa.int32(), 3, [None, pa.py_buffer(np.array([1, 2, 3], np.int32).tobytes())])
    assert not flat.buffers()[1].is_mutable
    column = list_column(pa.record_batch({"x": pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), flat)}), "x")
    assert column.values.data_ptr() == flat.buffers()[1].address
    assert column.row(1).tolist() == [2, 3]


def test_tensors_keep_the_buffer_alive() -> None:
    row = list_column(batch_of([list(range(100_000))]), "tokens").row(0)
    gc.collect()
    filler = [np.full(100_000, 7, np.int32) for _ in range(20)]
    assert row.tolist() == list(range(100_000))
    assert len(filler) == 20


def test_several_batches_are_viewed_one_by_one() -> None:
    first, empty, last = batch_of(ROWS), batch_of([]), batch_of([[11], [12, 13]])
    for given_ in ([first, empty, last], pa.Table.from_batches([first, empty, last])):
        column = list_column(given_, "tokens")
        assert [chunk.data_ptr() for chunk in column.chunks] == [
            value_buffer(first, "tokens").address,
            value_buffer(last, "tokens").address,
        ]
        assert column.num_rows == 7
        assert [column.row(i).tolist() for i in range(7)] == [*ROWS, [11], [12, 13]]
        assert column.row(6).data_ptr() == value_buffer(last, "tokens").address + 4
        assert column.gather([6, 0, 2, 6]).tolist() == [12, 13, 1, 2, 3, 12, 13]
        assert column.values.tolist() == [*range(1, 11), 11, 12, 13]


@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=5), min_size=1, max_size=4), st.data())
def test_any_chunking_reads_the_same_rows(chunks: list[list[list[int]]], data: st.DataObject) -> None:
    batches = [batch_of(rows) for rows in chunks]
    cut = data.draw(st.integers(0, len(chunks[0])))
    batches[0] = batches[0].slice(cut)
    expected = [row for rows in [chunks[0][cut:], *chunks[1:]] for row in rows]
    column = list_column(batches, "tokens")
    assert [column.row(i).tolist() for i in range(column.num_rows)] == expected
    order = data.draw(st.permutations(range(len(expected))))
    assert column.gather(order).tolist() == [token for i in order for token in expected[i]]
    packed = pack(column, order)
    assert packed.tokens.tolist() == column.gather(order).tolist()
    assert packed.position_ids.tolist() == [at for i in order for at in range(len(expected[i]))]
    assert packed.offsets.diff().tolist() == [len(expected[i]) for i in order]


def test_no_rows() -> None:
    for given_ in (batch_of([]), [batch_of([]), batch_of([])], EXAMPLES.empty_table()):
        column = list_column(given_, "tokens")
        assert (column.num_rows, column.values.tolist(), column.values.dtype) == (0, [], torch.int32)
        packed = pack(column, [])
        assert (packed.tokens.tolist(), packed.offsets.tolist(), packed.tokens.dtype) == ([], [0], torch.int64)
    assert scalar_column(EXAMPLES.empty_table(), "example_id").tolist() == []


def test_pack_is_a_copy_that_may_be_written() -> None:
    batch = batch_of(ROWS)
    packed = pack(list_column(batch, "tokens"), [0])
    packed.tokens.fill_(0)
    list_column(batch, "tokens").gather([0]).fill_(0)
    assert batch.column("tokens")[0].as_py() == [1, 2, 3]
    assert pack(list_column(batch, "tokens"), [0]).to("cpu").tokens.tolist() == [1, 2, 3]


def test_rows_that_are_not_there() -> None:
    column = list_column(batch_of(ROWS), "tokens")
    for index in (-1, 5):
        with pytest.raises(IndexError):
            column.row(index)
        with pytest.raises(IndexError):
            column.gather([0, index])
        with pytest.raises(IndexError):
            pack(column, [index])


def test_prediction_positions_by_hand() -> None:
    # Two rows: prompt 2 + response 3 at 0..4, prompt 1 + response 0 at 5, prompt 1 + response 2 at 6..8.
    positions = prediction_positions(torch.tensor([0, 5, 6, 9]), torch.tensor([2, 1, 1], dtype=torch.int32))
    assert positions.tolist() == [1, 2, 3, 6, 7]
    with pytest.raises(ValueError, match="row 1 of the pack has 1 tokens, 2 of them prompt"):
        prediction_positions(torch.tensor([0, 5, 6]), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="row 0 of the pack has 5 tokens, 0 of them prompt"):
        prediction_positions(torch.tensor([0, 5]), torch.tensor([0]))


def test_scalar_column() -> None:
    batch = make_batch(SCORES, {"sample_id": [1, 2, 3], "score": [0.5, 1.5, 2.5]})
    view = scalar_column(batch.slice(1), "score")
    assert view.tolist() == [1.5, 2.5]
    assert view.data_ptr() == batch.column("score").buffers()[1].address + 4
    assert scalar_column([batch, batch.slice(2)], "sample_id").tolist() == [1, 2, 3, 3]


def test_what_cannot_be_viewed_is_refused_with_its_name() -> None:
    nulls = pa.record_batch({"x": pa.array([[1, None]]), "y": pa.array([[1], None]).slice(1), "z": pa.array([1])})
    with pytest.raises(SchemaError, match="column x holds 1 nulls"):
        list_column(nulls, "x")
    with pytest.raises(SchemaError, match="column y holds 1 nulls"):
        list_column(nulls, "y")
    with pytest.raises(SchemaError, match="column z is int64, expected a list"):
        list_column(nulls, "z")
    with pytest.raises(SchemaError, match="examples: no column values"):
        list_column(batch_of(ROWS), "values")
    with pytest.raises(SchemaError, match="no batch"):
        list_column([], "x")
    with pytest.raises(SchemaError, match="column s holds string, expected numbers"):
        scalar_column(pa.record_batch({"s": pa.array(["a"])}), "s")


def test_list_array_shares_memory_and_fits_the_schema() -> None:
    values = torch.arange(4, dtype=torch.float32)
    column = list_array(values, torch.tensor([0, 1, 1, 4]))
    assert column.to_pylist() == [[0.0], [], [1.0, 2.0, 3.0]]
    assert column.values.buffers()[1].address == values.data_ptr()
    batch = make_batch(VALUES, {"sample_id": [1, 2, 3], "values": column})
    check_schema(batch, VALUES)
    assert value_buffer(batch, "values").address == values.data_ptr()
    assert list_column(batch, "values").values.data_ptr() == values.data_ptr()
    with_grad = torch.ones(2, requires_grad=True)
    assert list_array(with_grad, torch.tensor([0, 2])).to_pylist() == [[1.0, 1.0]]
    assert list_array(torch.empty(0), torch.zeros(1, dtype=torch.int64)).to_pylist() == []


@pytest.mark.parametrize("offsets", [[], [0, 3], [1, 4], [0, 3, 2, 4], [0, 5]])
def test_list_array_refuses_offsets_that_do_not_fit(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets must rise from 0 to the 4 values"):
        list_array(torch.arange(4), torch.tensor(offsets, dtype=torch.int64))
