"""The Arrow schemas of everything that travels between the roles.

Invariants:

- One record batch holds one role's columns over some rows; rows of two batches belong together when their ids
  are equal, position by position (``require_same_rows``).
- A column is there exactly when its role is. No column is nullable.
- Per-token columns are ``list<T>``: a flat value buffer and an offsets buffer, which is what packed,
  variable-length attention takes. ``tokens`` covers prompt and response; every other per-token column of
  experience covers the response alone, so its list is ``len(tokens) - num_prompt_tokens`` long.
- Every schema carries its version and its name in the Arrow metadata.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = 1
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

#: What a dataset gives a rollout: one row a prompt. ``source`` names the file and line it came from.
PROMPTS = _schema("prompts", ("prompt_id", pa.int64()), ("tokens", TOKENS), ("source", pa.string()))

#: What a dataset gives pre-training and SFT: one row a sequence. ``loss_mask`` is 1 on the tokens to be learnt.
EXAMPLES = _schema(
    "examples", ("example_id", pa.int64()), ("tokens", TOKENS), ("loss_mask", _list(pa.uint8()))
)

#: What a dataset gives a reward model: one row a response. The rows of one comparison stand together,
#: best first: ``rank`` 0 is the chosen one.
COMPARISONS = _schema(
    "comparisons", ("comparison_id", pa.int64()), ("rank", pa.int32()), ("tokens", TOKENS)
)

#: The first columns of experience, by the rollout engines: one row a sample.
#: ``sample_id = prompt_id * samples_per_prompt + k``. ``rollout_logprobs`` are of the tokens as they were
#: sampled. ``policy_versions`` holds, for each response token, the version of the weights that drew it.
#: ``finish_reason`` is "stop" (EOS or a stop string) or "length".
ROLLOUT = _schema(
    "rollout",
    ("sample_id", pa.int64()),
    ("prompt_id", pa.int64()),
    ("tokens", TOKENS),
    ("num_prompt_tokens", pa.int32()),
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

#: By credit assignment, over the whole batch of a training iteration. ``behaviour_logprobs`` are the ones that
#: the policy ratio divides by.
CREDIT = _schema(
    "credit",
    ("sample_id", pa.int64()),
    ("advantages", PER_TOKEN_FLOAT),
    ("returns", PER_TOKEN_FLOAT),
    ("behaviour_logprobs", PER_TOKEN_FLOAT),
)

ALL: dict[str, pa.Schema] = {
    schema.metadata[NAME_KEY].decode(): schema
    for schema in (PROMPTS, EXAMPLES, COMPARISONS, ROLLOUT, REF_LOGPROBS, POLICY_LOGPROBS, VALUES, SCORES, CREDIT)
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
        if column.null_count:
            raise SchemaError(f"{name}: column {field.name} holds {column.null_count} nulls")


def require_same_rows(expected: Sequence[int] | pa.Array, batch: pa.RecordBatch | pa.Table) -> None:
    """Refuse a column whose ``sample_id`` differ from ``expected`` in any position.

    Raises:
        SchemaError: naming the first position that differs.
    """
    ids = batch.column("sample_id").to_pylist()
    wanted = expected.to_pylist() if isinstance(expected, pa.Array | pa.ChunkedArray) else list(expected)
    if ids == wanted:
        return
    name = schema_name(batch.schema)
    if len(ids) != len(wanted):
        raise SchemaError(f"{name}: {len(ids)} rows where {len(wanted)} were expected")
    at = next(i for i, (a, b) in enumerate(zip(ids, wanted, strict=True)) if a != b)
    raise SchemaError(f"{name}: row {at} is sample {ids[at]}, expected sample {wanted[at]}")
