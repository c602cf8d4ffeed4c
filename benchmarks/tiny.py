"""Random models of a chosen size, with a tokenizer, and random token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    hidden: int
    layers: int
    vocabulary: int


#: 0.7, 4 and 31 million weights.
SHAPES = {"tiny": Shape(128, 2, 1024), "small": Shape(256, 4, 2048), "medium": Shape(512, 8, 8192)}
MAX_TOKENS = 512


def write_model(folder: Path, size: str, seed: int = 0, num_labels: int | None = None) -> int:
    """Write a Hugging Face folder; with ``num_labels`` a sequence classifier. Returns the number of weights."""
    shape = SHAPES[size]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=shape.hidden // 32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    auto = transformers.AutoModelForCausalLM
    if num_labels is not None:
        config.num_labels = num_labels
        auto = transformers.AutoModelForSequenceClassification
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, shape.vocabulary)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def sequences(num: int, shortest: int, longest: int, size: str, seed: int = 0) -> list[list[int]]:
    """Random sequences, their lengths spread evenly."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (num,), generator=source).tolist()
    highest = SHAPES[size].vocabulary
    return [torch.randint(2, highest, (length,), generator=source).tolist() for length in lengths]
