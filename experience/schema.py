"""The Arrow schemas of everything that travels between the roles.

Invariants:

- One record batch holds one role's columns over some rows; rows of two batches belong together when their ids
  are equal, position by position (``require_same_rows``).
- A column is there exactly when its role is. No column is nullable.
- Per-token columns are ``list<T>``: a flat value buffer and an offsets buffer, which is what packed,
  variable-length attention takes. ``tokens`` covers the whole sample; every other per-token column of experience
  covers what the policy drew of it, its turns: without an environment the response, ``len(tokens) -
  num_prompt_tokens`` tokens.
- Every schema carries its version and its name in the Arrow metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int64Array: TypeAlias = npt.NDArray[np.int64]

SCHEMA_VERSION = 5
VERSION_KEY = b"troupe.schema_version"
NAME_KEY = b"troupe.schema"


class SchemaError(ValueError):
    """A batch does not have the columns, the types or the rows that its reader needs."""


def _schema(name: str, *fields: tuple[str, pa.DataType]) -> pa.Schema:
    metadata = {VERSION_KEY: str(SCHEMA_VERSION).encode(), NAME_KEY: name.encode()}
    return pa.schema([pa.field(key, kind, nullable=False) for key, kind in fields], metadata=metadata)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


TOKENS = _list(pa.int32())
PER_TOKEN_FLOAT = _list(pa.float32())

#: What a dataset gives a rollout: one row a prompt. ``source`` names the file and line it came from; ``columns`` is a
#: JSON object with the columns of its row that are kept for the rewards, ``{}`` where none are.
PROMPTS = _schema(
    "prompts",
    ("prompt_id", pa.int64()),
    ("tokens", TOKENS),
    ("source", pa.string()),
    ("columns", pa.string()),
)

#: What a dataset gives pre-training and SFT: one row a sequence. ``loss_mask`` is 1 on the tokens to be learnt.
EXAMPLES = _schema(
    "examples", ("example_id", pa.int64()), ("tokens", TOKENS), ("loss_mask", _list(pa.uint8()))
)

#: What a dataset gives reward models and preference losses: one row a response. The rows of one comparison stand
#: together, best first, two or more of them; ``rank`` 0 is the best, equal ranks are ties. ``num_prompt_tokens`` is
#: the same for all rows of a comparison. ``margin``, ``preference`` and ``rating`` are of the comparison and stand in
#: each of its rows: 0, 1 and "" where the data give none.
COMPARISONS = _schema(
    "comparisons",
    ("comparison_id", pa.int64()),
    ("sequence_id", pa.int64()),
    ("rank", pa.int32()),
    ("tokens", TOKENS),
    ("num_prompt_tokens", pa.int32()),
    ("margin", pa.float32()),
    ("preference", pa.float32()),
    ("rating", pa.string()),
)

#: What a dataset gives losses over responses that are good or bad each for itself: one row a response.
#: ``mismatched_tokens`` are the row's prompt and the response of another row, the same in every epoch.
FEEDBACK = _schema(
    "feedback",
    ("sequence_id", pa.int64()),
    ("tokens", TOKENS),
    ("num_prompt_tokens", pa.int32()),
    ("desirable", pa.bool_()),
    ("mismatched_tokens", TOKENS),
)

#: By the reference role, over the rows of comparisons: log-probs summed over each response's tokens.
REF_SEQUENCE_LOGPROBS = _schema(
    "ref_sequence_logprobs", ("sequence_id", pa.int64()), ("ref_logprob", pa.float64())
)

#: By the reference role, over the rows of feedback: the same, and of the mismatched response behind the row's prompt.
REF_FEEDBACK_LOGPROBS = _schema(
    "ref_feedback_logprobs",
    ("sequence_id", pa.int64()),
    ("ref_logprob", pa.float64()),
    ("mismatched_ref_logprob", pa.float64()),
)

#: The first columns of experience, by the rollout engines: one row a sample.
#: ``sample_id = prompt_id * samples_per_prompt + k``. ``rollout_logprobs`` are of the tokens as they were
#: sampled. ``policy_versions`` holds, for each response token, the version of the weights that drew it.
#: ``turn_starts`` and ``turn_ends`` hold, for each turn of the policy, where in ``tokens`` it begins and ends
#: (``experience.turns``); what lies between turns is the environment's. ``environment_rewards`` are what it gave for
#: each response token, and empty in a run without one.
ROLLOUT = _schema(
    "rollout",
    ("sample_id", pa.int64()),
    ("prompt_id", pa.int64()),
    ("tokens", TOKENS),
    ("num_prompt_tokens", pa.int32()),
    ("turn_starts", _list(pa.int32())),
    ("turn_ends", _list(pa.int32())),
    ("environment_rewards", PER_TOKEN_FLOAT),
    ("rollout_logprobs", PER_TOKEN_FLOAT),
    ("policy_versions", _list(pa.int32())),
    ("finish_reason", pa.string()),
)

#: By the reference role: log-probs of the response tokens at the rollout's temperature.
REF_LOGPROBS = _schema("ref_logprobs", ("sample_id", pa.int64()), ("ref_logprobs", PER_TOKEN_FLOAT))

#: By the policy role, where they are recomputed before training.
POLICY_LOGPROBS = _schema("policy_logprobs", ("sample_id", pa.int64()), ("policy_logprobs", PER_TOKEN_FLOAT))

#: By the critic: the value of the prefix *before* each response token.
VALUES = _schema("values", ("sample_id", pa.int64()), ("values", PER_TOKEN_FLOAT))

#: By the reward role.
SCORES = _schema("scores", ("sample_id", pa.int64()), ("score", pa.float32()))

#: By credit assignment from another response to the same prompt, where the algorithm needs one: its shaped score.
BASELINE_SCORES = _schema("baseline_scores", ("sample_id", pa.int64()), ("baseline_score", pa.float32()))

_CREDIT: tuple[tuple[str, pa.DataType], ...] = (
    ("sample_id", pa.int64()),
    ("advantages", PER_TOKEN_FLOAT),
    ("behaviour_logprobs", PER_TOKEN_FLOAT),
    ("loss_weights", PER_TOKEN_FLOAT),
)

#: By credit assignment, over the whole batch of a training iteration. ``behaviour_logprobs`` are the ones that
#: the policy ratio divides by; ``loss_weights`` what a token's policy loss is multiplied with.
CREDIT = _schema("credit", *_CREDIT)

#: The same in a run with a critic, which learns ``returns``.
CREDIT_WITH_RETURNS = _schema("credit_with_returns", *_CREDIT, ("returns", PER_TOKEN_FLOAT))

#: The ledger's rows: one a prompt. ``engine`` and ``policy_version`` are of its last dispatch, -1 where it has none;
#: ``policy_version`` of a consumed prompt is the one that training on it started from. ``reason`` is of a drop.
LEDGER = _schema(
    "ledger",
    ("prompt_id", pa.int64()),
    ("state", pa.string()),
    ("engine", pa.int32()),
    ("num_dispatches", pa.int32()),
    ("policy_version", pa.int32()),
    ("reason", pa.string()),
)

ALL: dict[str, pa.Schema] = {
    schema.metadata[NAME_KEY].decode(): schema
    for schema in (
        PROMPTS,
        EXAMPLES,
        COMPARISONS,
        FEEDBACK,
        REF_SEQUENCE_LOGPROBS,
        REF_FEEDBACK_LOGPROBS,
        ROLLOUT,
        REF_LOGPROBS,
        POLICY_LOGPROBS,
        VALUES,
        SCORES,
        BASELINE_SCORES,
        CREDIT,
        CREDIT_WITH_RETURNS,
        LEDGER,
    )
}


def schema_name(schema: pa.Schema) -> str:
    """The name in a schema's metadata, or ``unnamed``."""
    return ((schema.metadata or {}).get(NAME_KEY) or b"unnamed").decode()


def check_schema(batch: pa.RecordBatch | pa.Table, schema: pa.Schema) -> None:
    """Refuse a batch that is not of ``schema``: other version, other columns, other types, or nulls.

    Raises:
        SchemaError: naming the schema and what differs.
    """
    metadata = batch.schema.metadata or {}
    name, version = schema_name(schema), metadata.get(VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise SchemaError(f"{name}: schema version {version}, this code reads version {SCHEMA_VERSION}")
    if schema_name(batch.schema) != name:
        raise SchemaError(f"expected a batch of schema {name}, got one of {schema_name(batch.schema)}")
    if not batch.schema.equals(schema, check_metadata=False):
        raise SchemaError(f"{name}: expected {schema.remove_metadata()}, got {batch.schema.remove_metadata()}")
    for field, column in zip(batch.schema, batch.columns, strict=True):
        nulls = column.null_count
        if pa.types.is_list(field.type):
            chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
            nulls += sum(chunk.flatten().null_count for chunk in chunks)
        if nulls:
            raise SchemaError(f"{name}: column {field.name} holds {nulls} nulls")


def require_same_rows(
    expected: Sequence[int] | pa.Array | pa.ChunkedArray,
    batch: pa.RecordBatch | pa.Table,
    id_column: Literal["sample_id", "sequence_id"] = "sample_id",
) -> None:
    """Refuse a column whose ids differ from ``expected`` in any position.

    Raises:
        SchemaError: naming the first position that differs.
    """
    ids, wanted = batch.column(id_column).to_numpy(), as_int64(expected)
    if np.array_equal(ids, wanted):
        return
    name = schema_name(batch.schema)
    if len(ids) != len(wanted):
        raise SchemaError(f"{name}: {len(ids)} rows where {len(wanted)} were expected")
    at = int(np.flatnonzero(ids != wanted)[0])
    what = id_column.removesuffix("_id")
    raise SchemaError(f"{name}: row {at} is {what} {ids[at]}, expected {what} {wanted[at]}")


def as_int64(ids: Sequence[int] | pa.Array | pa.ChunkedArray) -> Int64Array:
    """Ids as a numpy array; shares memory with an Arrow array in one piece."""
    return np.asarray(ids, dtype=np.int64)


def make_batch(schema: pa.Schema, columns: Mapping[str, pa.Array | Sequence[object]]) -> pa.RecordBatch:
    """A batch of ``schema`` from its columns, in any order, each an Arrow array or plain Python values.

    An array that already has the column's type is taken as it is; others are converted. Metadata and
    "not nullable" come from the schema, so what this returns passes ``check_schema``.

    >>> make_batch(SCORES, {"sample_id": [4, 5], "score": [0.5, -1.0]}).num_rows
    2

    Raises:
        SchemaError: a column is missing, unknown, of another type or length, or holds nulls.
    """
    name = schema_name(schema)
    if set(columns) != set(schema.names):
        raise SchemaError(f"{name}: has columns {schema.names}, got {sorted(columns)}")
    arrays = []
    for field in schema:
        given = columns[field.name]
        try:
            # Arrow's own way to convert would copy lists whose inner field is merely called nullable.
            arrays.append(_retyped(given, field.type) if isinstance(given, pa.Array) else pa.array(given, field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise SchemaError(f"{name}: column {field.name} is not {field.type}: {error}") from error
    lengths = {key: len(array) for key, array in zip(schema.names, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"{name}: columns differ in length: {lengths}")
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    check_schema(batch, schema)
    return batch


def _retyped(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    lists = pa.types.is_list(kind) and pa.types.is_list(array.type)
    if lists and array.type.value_type == kind.value_type and not array.null_count:
        return pa.ListArray.from_arrays(array.offsets, array.values, type=kind)
    return array.cast(kind)
