"""What a run needs of its data: the first rows of every source, read and tokenised as the run would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from data.build import Builder
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.formats import Kind, recognise
from data.readers import BadRow, read_rows
from data.tokenizer import Tokenizer
from launch.config import OnlineRunConfig, RewardModelRunConfig, RunConfig
from launch.errors import Problem
from launch.paths import resolve_data

if TYPE_CHECKING:
    from launch.check_models import Facts

ROWS_READ = 1000


def check_data(config: RunConfig, tokenizer: Tokenizer | None, facts: Facts) -> Iterator[Problem]:
    """What is wrong with each source. Adds what was found in it to ``facts``.

    Args:
        tokenizer: the model's; none where it cannot be loaded, and then rows are read but not tokenised.
    """
    data, kind, whole = resolve_data(config.data), _kind(config), config.algorithm.name == "pretrain"
    builder: Builder | None = None
    if tokenizer is not None:
        try:
            builder = Builder(data, kind, tokenizer, whole_document=whole)
        except DataError as error:  # of the tokenizer, so the same for every source
            yield Problem("data", str(error))
    if isinstance(config, RewardModelRunConfig) and config.normalise is not None and tokenizer is not None:
        yield from _check_measured(resolve_data(config.normalise.data_config(data)), tokenizer, facts)
    for part, sources in (("train", data.train), ("heldout", data.heldout)):
        for index, source in enumerate(sources):
            first = source.model_copy(update={"limit_rows": min(source.limit_rows or ROWS_READ, ROWS_READ)})
            where = f"data.{part}.{index}"
            try:
                if builder is None:
                    _read(first, data, kind, whole)
                else:
                    facts.append((where, _build(builder, first)))
            except DataError as error:
                yield Problem(where, str(error))


def _check_measured(data: DataConfig, tokenizer: Tokenizer, facts: Facts) -> Iterator[Problem]:
    """What a reward model is normalised on."""
    for index, source in enumerate(data.train):
        first = source.model_copy(update={"limit_rows": min(source.limit_rows or ROWS_READ, ROWS_READ)})
        try:
            facts.append((f"normalise.data.{index}", _build(Builder(data, "examples", tokenizer), first)))
        except DataError as error:
            yield Problem(f"normalise.data.{index}", str(error))


def _kind(config: RunConfig) -> Kind:
    return "prompts" if isinstance(config, OnlineRunConfig) else config.DATA_KIND


def _build(builder: Builder, source: SourceConfig) -> str:
    """What a source holds, in words.

    Raises:
        DataError: it cannot be used as configured.
    """
    built = builder.build(source, heldout_fraction=0.0)
    counts = built.counts
    longest = built.train.facts.longest
    seen = f" (the first {ROWS_READ:,} were looked at)" if counts.read == ROWS_READ else ""
    return f"{counts}{seen}; format {counts.format}; longest {longest} tokens"


def _read(source: SourceConfig, data: DataConfig, kind: Kind, whole_document: bool) -> None:
    """Read rows without a tokenizer.

    Raises:
        DataError: the source cannot be read, its first good row is of no known format, or a row is refused.
    """
    known = False
    for row in read_rows(source):
        if isinstance(row, BadRow):
            if data.bad_rows == "refuse":
                raise DataError(f"{row.origin}: {row.why} (data.bad_rows: skip leaves such rows out)")
        elif row.wanted and not known:
            columns = frozenset(name for name, value in row.values.items() if value is not None)
            try:
                recognise(columns, kind, whole_document=whole_document)
            except DataError as error:
                raise DataError(f"{row.origin}: {error}") from error
            known = True
