"""What a run needs of its data: the first rows of every source, read and tokenised as the run would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from data.build import Builder, Built
from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.formats import Kind, recognise
from data.readers import BadRow, Row, read_rows
from data.tokenizer import Tokenizer
from launch.config import LearnerRunConfig, OnlineRunConfig, RewardModelRunConfig, RunConfig
from launch.data_rules import keeps_ties, label_problems, row_problems
from launch.errors import Problem
from launch.paths import resolve_data
from launch.reward_rules import by_place, columns_of

if TYPE_CHECKING:
    from launch.check_models import Facts

ROWS_READ = 1000


def check_data(config: RunConfig, tokenizer: Tokenizer | None, facts: Facts) -> Iterator[Problem]:
    """What is wrong with each source. Adds what was found in it to ``facts``.

    Args:
        tokenizer: the model's; none where it cannot be loaded, and then rows are read but not tokenised.
    """
    data, whole = resolve_data(config.data), config.algorithm.name == "pretrain"
    if isinstance(config, RewardModelRunConfig) and config.normalise is not None:
        measured = resolve_data(config.normalise.data_config(data))
        yield from _check_sources({"normalise.data": measured.train}, measured, "examples", tokenizer, facts)
    sources = {"data.train": data.train, "data.heldout": data.heldout}
    learner = None if isinstance(config, OnlineRunConfig) else config
    yield from _check_sources(sources, data, _kind(config), tokenizer, facts, whole_document=whole, learner=learner)
    if isinstance(config, OnlineRunConfig):
        yield from _check_columns(config, sources)
        if config.pretraining_data is not None:
            text = resolve_data(config.pretraining_data)
            mixed_in = {"pretraining_data.train": text.train, "pretraining_data.heldout": text.heldout}
            yield from _check_sources(mixed_in, text, "examples", tokenizer, facts, whole_document=True)


def _check_sources(
    parts: Mapping[str, Sequence[SourceConfig]],
    data: DataConfig,
    kind: Kind,
    tokenizer: Tokenizer | None,
    facts: Facts,
    *,
    whole_document: bool = False,
    learner: LearnerRunConfig | None = None,
) -> Iterator[Problem]:
    """What is wrong with sources, given by where they stand in the configuration.

    Args:
        learner: the run whose learner trains on their rows; none where none does.
    """
    builder: Builder | None = None
    if tokenizer is not None:
        ties = learner is not None and keeps_ties(learner)
        try:
            builder = Builder(data, kind, tokenizer, whole_document=whole_document, keep_ties=ties)
        except DataError as error:  # of the tokenizer, so the same for every source
            yield Problem(next(iter(parts)).rpartition(".")[0], str(error))
    for where, source in _first_rows(parts):
        try:
            if builder is None:
                _read(source, data, kind, whole_document)
                continue
            built = builder.build(source, heldout_fraction=0.0)
        except DataError as error:
            yield Problem(where, str(error))
            continue
        facts.append((where, _in_words(built)))
        if learner is not None:
            of_table = built.train.facts
            largest = {"longest_row": of_table.longest_unit, "most_responses": of_table.most_rows}
            yield from row_problems(learner, where, **largest)
            yield from label_problems(learner, where, built.counts)


def _first_rows(parts: Mapping[str, Sequence[SourceConfig]]) -> Iterator[tuple[str, SourceConfig]]:
    for part, sources in parts.items():
        for index, source in enumerate(sources):
            limit = min(source.limit_rows or ROWS_READ, ROWS_READ)
            yield f"{part}.{index}", source.model_copy(update={"limit_rows": limit})


def _kind(config: RunConfig) -> Kind:
    return "prompts" if isinstance(config, OnlineRunConfig) else config.DATA_KIND


def _check_columns(config: OnlineRunConfig, parts: Mapping[str, Sequence[SourceConfig]]) -> Iterator[Problem]:
    """Whether columns that rewards and checkers are known to read hold anything; that rows have them is seen before."""
    trained_on = {where: columns_of(one) for where, one in by_place(config.reward, config.rewards).items()}
    checkers = {} if config.evaluation is None else config.evaluation.checkers
    checked = {f"evaluation.checkers.{name}": columns_of(checker) for name, checker in checkers.items()}
    for where, source in _first_rows(parts):
        is_trained_on = where.startswith("data.train")
        is_evaluated = config.evaluation is not None and (not is_trained_on or config.data.heldout_fraction > 0)
        reading = (trained_on if is_trained_on or is_evaluated else {}) | (checked if is_evaluated else {})
        try:
            empty = _empty_columns(source, {column for columns in reading.values() for column in columns})
        except DataError:  # has been told
            continue
        for reader, columns in reading.items():
            for column in sorted(columns & empty):
                what = f"{source.path}: the column {column!r} is null in every row, and {reader} reads it"
                yield Problem(where, what, f"rows with it, or {reader} without it")


def _empty_columns(source: SourceConfig, columns: Iterable[str]) -> set[str]:
    """Those that are there, and null in every row.

    Raises:
        DataError: the source cannot be read.
    """
    empty, seen = set(columns), set[str]()
    for row in read_rows(source) if empty else ():
        if isinstance(row, Row) and row.wanted:
            seen |= empty & row.values.keys()
            empty -= {column for column in empty if row.values.get(column) is not None}
        if not empty:
            break
    return empty & seen


def _in_words(built: Built) -> str:
    """What a source holds."""
    counts = built.counts
    longest = built.train.facts.longest
    seen = f" (the first {ROWS_READ:,} were looked at)" if counts.read == ROWS_READ else ""
    return f"{counts}{seen}; format {counts.format}; longest {longest} tokens"


def _read(source: SourceConfig, data: DataConfig, kind: Kind, whole_document: bool) -> None:
    """Read rows without a tokenizer.

    Raises:
        DataError: the source cannot be read, its first good row is of no known format or lacks a column that is to be
            kept, or a row is refused.
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
            for name in data.keep_columns:
                if name not in row.values:
                    raise DataError(f"{row.origin}: no column {name!r}, which data.keep_columns asks for")
            known = True
