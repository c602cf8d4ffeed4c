"""An untrained model that is small enough to learn in minutes on a CPU: its shape, and a tokenizer of whole words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
UNKNOWN_TOKEN = "<unk>"
MAX_TOKENS = 64


def write_untrained(directory: Path, words: Sequence[str]) -> None:
    """Write the configuration of a model of some 400,000 weights, and a tokenizer with one token for each of `words`.

    Words stand apart by spaces.  Besides them there are tokens for padding, the end of a sequence, and any other word.

    The architecture is Llama's.  It could be another, but not Qwen2's: for a model of that type
    transformers 5 loads every tokenizer as a `Qwen2Tokenizer`, whose rules for cutting up text
    replace those saved here.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = [PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *words]
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token=UNKNOWN_TOKEN))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.index(PAD_TOKEN),
        eos_token_id=vocabulary.index(EOS_TOKEN),
        bos_token_id=None,
    ).save_pretrained(directory)
