"""The tokenizer, as far as the data need it: loaded without torch of ours, typed, and checked."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, cast

import xxhash

from data.errors import TokenizerError


class Encoded(Protocol):
    """What a tokenizer returns."""

    def __getitem__(self, name: str) -> list[list[int]]: ...


class AddedToken(Protocol):
    """A token that is not of the learnt vocabulary."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    bos_token_id: int | None
    eos_token_id: int | None
    eos_token: str | None
    added_tokens_decoder: dict[int, AddedToken]
    special_tokens_map: dict[str, str]
    name_or_path: str
    chat_template: str | dict[str, str] | None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Encoded: ...

    def get_chat_template(self) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def save_pretrained(self, save_directory: str) -> tuple[str, ...]: ...


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a folder in Hugging Face form, or of a name on the hub.

    Raises:
        TokenizerError: nothing there, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if Path(path).is_absolute() and not Path(path).is_dir():
        raise TokenizerError(f"tokenizer {path}: no such folder")
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code))
    except Exception as error:  # transformers raises whatever its parsers raise; all mean the same here
        what = "no such folder, and no such name on the hub"
        if Path(path).is_dir():
            what = "the folder holds no tokenizer that loads"
        raise TokenizerError(f"tokenizer {path}: {what}: {type(error).__name__}: {error}") from error


def require_eos(tokenizer: Tokenizer, why: str) -> int:
    """The id of the end-of-sequence token.

    Raises:
        TokenizerError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name_or_path}: has no EOS token, which {why}; set `eos_token` in its "
            "tokenizer_config.json to a token of its vocabulary"
        )
    return tokenizer.eos_token_id


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """[BOS] where the tokenizer begins every text with it by itself, else []."""
    ids = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0]
    starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ids[:1] if starts else []


def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of tokens that mark rather than say something: BOS, EOS, ends of turns."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of everything that the tokenizer saves, its template included, and of the libraries that run it.

    Equal digests mean equal tokens; a difference may mean nothing.
    """
    kind = type(tokenizer)
    digest = xxhash.xxh3_128(
        f"{kind.__module__}.{kind.__qualname__} {version('transformers')} {version('tokenizers')}".encode()
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return str(digest.hexdigest())
