"""Tiny Hugging Face folders with random weights, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 64


def tokenizer(backwards: bool = False) -> Any:
    """One token for each of the characters from blank to ], besides <pad> and <eos>; numbered up, or down."""
    numbers = range(VOCAB - 1, 1, -1) if backwards else range(2, VOCAB)
    vocab = {"<pad>": 0, "<eos>": 1} | {chr(32 + place): number for place, number in enumerate(numbers)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def network_config(kind: str, tied: bool = True, width: int = 32, **changes: Any) -> Any:
    """Configuration of a decoder of some 20,000 weights, or more where it is wider."""
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128, **changes)
    if kind == "bloom":
        return transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, **changes)
    classes = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}
    return classes[kind](
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **changes,
    )


def write(
    folder: Path,
    kind: str = "qwen2",
    head: str = "causal",
    tied: bool = True,
    seed: int = 0,
    width: int = 32,
    **changes: Any,
) -> Path:
    """A model folder, tokenizer included. Weights are spread wide, so that attention and position matter."""
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "score": transformers.AutoModelForSequenceClassification,
        "token_score": transformers.AutoModelForTokenClassification,
    }[head]
    config = network_config(kind, tied, width, **changes)
    if head != "causal":
        config.num_labels = changes.get("num_labels", 1)
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3 * (32 / width) ** 0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
