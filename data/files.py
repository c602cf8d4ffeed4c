"""The files that a path stands for: one file, a glob, a folder, or the same behind any fsspec URL.

Invariant: files come in sorted order, so the same path over the same files gives the same rows in the same order.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import IO

import fsspec
import xxhash

from data.errors import ReadError

logger = logging.getLogger(__name__)

#: Endings of the files that can be read, without the one of their compression.
KNOWN = ("jsonl", "ndjson", "json", "parquet", "arrow", "feather", "csv", "tsv", "txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
#: What `datasets.Dataset.save_to_disk` puts beside its Arrow files.
NOT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class File:
    """One file: how to open it, and what to call it in messages."""

    system: fsspec.AbstractFileSystem
    path: str
    name: str

    def binary(self) -> IO[bytes]:
        """The file's bytes, decompressed."""
        try:
            opened: IO[bytes] = self.system.open(self.path, "rb", compression="infer")
        except (ValueError, ImportError) as error:  # a compression whose package is not installed
            raise ReadError(f"{self.name}: cannot be decompressed: {error}") from error
        return opened

    def digest(self) -> str:
        """Of the bytes as they are stored.

        Raises:
            ReadError: the file cannot be read.
        """
        digest = xxhash.xxh3_128()
        try:
            with self.system.open(self.path, "rb") as opened:
                while block := opened.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise ReadError(f"{self.name}: cannot be read: {error}") from error
        return str(digest.hexdigest())

    def kind(self) -> str:
        """The extension that says how the file is laid out, without the one of its compression."""
        base = self.path.rsplit("/", 1)[-1].lower()
        for ending in COMPRESSED:
            base = base.removesuffix(ending)
        return base.rsplit(".", 1)[-1] if "." in base else ""


def known_endings() -> str:
    """What a file may be called, for messages."""
    return " ".join(f".{kind}" for kind in KNOWN) + " (each also with " + " ".join(COMPRESSED) + ")"


def find_files(path: str) -> list[File]:
    """The files that ``path`` stands for, sorted.

    Raises:
        ReadError: no such file, an empty folder, a glob without a match, or a protocol that is not installed.
    """
    try:
        system, root = fsspec.core.url_to_fs(path)
        if fsspec.core.has_magic(root) and not system.exists(root):
            matches = sorted(match for match in system.glob(root) if not system.isdir(match))
            found = [match for match in matches if _hidden(root) or not _hidden(match)]
            problem = "no file matches"
        elif system.isdir(root):
            found = _folder(system, root)
            problem = f"the folder holds no file of a known kind; known endings: {known_endings()}"
        else:
            found = [root] if system.exists(root) else []
            problem = "no such file or folder"
    except (OSError, ImportError, ValueError) as error:
        raise ReadError(f"{path}: cannot be read: {error}") from error
    if not found:
        raise ReadError(f"{path}: {problem}")
    return [File(system, match, system.unstrip_protocol(match) if "://" in path else match) for match in found]


def _hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def _folder(system: fsspec.AbstractFileSystem, root: str) -> list[str]:
    found: list[str] = []
    left: list[str] = []
    for match in sorted(system.find(root)):
        inner = match[len(root) :].strip("/")
        hidden = any(part.startswith((".", "_")) for part in inner.split("/"))
        known = File(system, match, match).kind() in KNOWN and inner.rsplit("/", 1)[-1] not in NOT_DATA
        (found if known and not hidden else left).append(match)
    if left:
        logger.info("%s: %d files of no known kind left out: %s", root, len(left), ", ".join(left[:5]))
    return found
