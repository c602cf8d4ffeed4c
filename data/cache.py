"""Tokenised sources in files, found again by what they were made of.

Below ``data.cache_dir`` each source has a folder named by a digest: of its files' bytes, of the tokenizer, of the
settings that rows depend on, and of this package's own code. So nothing is ever out of date, only unused.

Invariant: a folder with such a name is complete. It is written beside its place, flushed to disk, and renamed; what a
killed run leaves behind is named ``.building-*`` and may be deleted. Two runs may build the same source at once: the
first to finish gives it its name, the other uses it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from data.build import Builder, Built, Counts
from data.config import DataConfig, SourceConfig
from data.errors import ReadError
from data.formats import Kind
from data.readers import content_digest
from data.table import TokenTable
from data.tokenizer import Tokenizer, tokenizer_digest

logger = logging.getLogger(__name__)

DESCRIPTION = "table.json"
#: Settings that no row depends on once it is there.
_NOT_OF_ROWS = {"train", "heldout", "heldout_fraction", "cache_dir"}


@dataclass(frozen=True)
class Cache:
    """Where tokenised sources are kept. Without a folder nothing is kept: tables are built in memory.

    ``settings`` is what rows depend on beside their source: empty where nothing is kept.
    """

    folder: Path | None
    kind: Kind
    settings: str

    @classmethod
    def of(
        cls, config: DataConfig, kind: Kind, tokenizer: Tokenizer, *, whole_document: bool, keep_ties: bool
    ) -> Cache:
        """The cache that a configuration asks for.

        Raises:
            ReadError: its folder cannot be made.
        """
        if config.cache_dir is None:
            return cls(None, kind, "")
        folder = Path(config.cache_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ReadError(f"data.cache_dir {folder}: cannot be made: {error}") from error
        settings = {
            "kind": kind,
            "whole_document": whole_document,
            "keep_ties": keep_ties,
            "config": config.model_dump(mode="json", exclude=_NOT_OF_ROWS),
            "tokenizer": tokenizer_digest(tokenizer),
            "code": _code_digest(),
        }
        return cls(folder, kind, json.dumps(settings, sort_keys=True))

    def build(self, builder: Builder, source: SourceConfig, heldout_fraction: float) -> Built:
        """The tables of a source, from the cache where they are there.

        Raises:
            DataError: as ``Builder.build``.
        """
        if self.folder is None:
            return builder.build(source, heldout_fraction)
        place = self.folder / self._digest(source, heldout_fraction)
        found = self._open(place, source)
        if found is None:
            self._write(place, lambda folder: builder.build(source, heldout_fraction, folder))
            found = self._open(place, source)
        if found is None:
            raise ReadError(f"{place}: what was just written there cannot be read")
        return found

    def _digest(self, source: SourceConfig, heldout_fraction: float) -> str:
        key = {
            "settings": self.settings,
            "source": source.model_dump(mode="json", exclude={"path", "weight"}),
            "content": content_digest(source),
            "heldout_fraction": heldout_fraction,
        }
        return str(xxhash.xxh3_128(json.dumps(key, sort_keys=True).encode()).hexdigest())

    def _open(self, place: Path, source: SourceConfig) -> Built | None:
        if not place.exists():
            return None
        try:
            described = json.loads((place / DESCRIPTION).read_text())
            tables = {name: TokenTable.open(self.kind, place / name, described[name]) for name in ("train", "heldout")}
            counts = Counts(**{**described["counts"], "path": source.path})
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged, and built anew: %s", place, error)
            shutil.rmtree(place)
            return None
        logger.info("%s (tokenised before, in %s)", counts, place)
        return Built(tables["train"], tables["heldout"], counts)

    def _write(self, place: Path, build: Callable[[Path], Built]) -> None:
        beside = Path(tempfile.mkdtemp(prefix=".building-", dir=place.parent))
        try:
            built = build(beside)
            tables = {"train": built.train.described(), "heldout": built.heldout.described()}
            (beside / DESCRIPTION).write_text(json.dumps({**tables, "counts": asdict(built.counts)}, indent=1))
            for file in sorted(beside.rglob("*")):
                _flush(file)
            _flush(beside)
            try:
                beside.rename(place)
            except OSError:
                if not place.exists():
                    raise
                logger.info("%s: another run built it first", place)
            _flush(place.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _code_digest() -> str:
    """Of the code that makes rows out of files: a change of it makes other tables."""
    digest = xxhash.xxh3_128()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return str(digest.hexdigest())
