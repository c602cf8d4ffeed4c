"""Small tokenizers, made here: byte-level BPE as the public models have, with and without template, BOS and EOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.tokenizer import load_tokenizer
from tests.data.decoding import DecodingTokenizer

CORPUS = ["the cat sat on the mat and the dog sat on the log", "Human Assistant question answer sorted list 1 2 3 4"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_raw() -> RawTokenizer:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    )
    raw.train_from_iterator(CORPUS, trainer)
    return raw


MakeTokenizer = Callable[..., DecodingTokenizer]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Make, save and load a tokenizer: ``template``, ``eos`` and ``bos`` as given."""

    def make(*, template: str | None = None, eos: str | None = "</s>", bos: bool = False) -> DecodingTokenizer:
        raw = make_raw()
        if bos:
            raw.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token="<s>" if bos else None)
        tokenizer.chat_template = template
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        return cast(DecodingTokenizer, load_tokenizer(str(folder)))

    return make


@pytest.fixture(scope="session")
def plain(make_tokenizer: MakeTokenizer) -> DecodingTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chatml(make_tokenizer: MakeTokenizer) -> DecodingTokenizer:
    return make_tokenizer(template=CHATML, eos="<|im_end|>")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL; strings are written as they are."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
