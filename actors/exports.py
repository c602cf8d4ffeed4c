"""Model folders as they leave the trainer: what Hugging Face's ``from_pretrained`` and vLLM load.

Invariant: a sequence classifier's folder gives, under plain Transformers, the scores that it gives here: those at a
row's last token. Transformers reads the last token that is not the padding's (``pad_token_id``), so a folder never
names a token for padding that ends a row. A folder is whole: it holds the buffers that the model's own folder did.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.core_model_loading
from torch import Tensor

from actors.models import PackedModel

logger = logging.getLogger(__name__)


def save_model(model: PackedModel, weights: dict[str, Tensor], folder: Path, tokenizer: Any) -> None:
    """Write a folder that Hugging Face's ``from_pretrained`` and vLLM load, from ``weights`` by Hugging Face name.

    A sequence classifier whose padding token ends sequences too gets another one, in the folder alone.
    """
    network: Any = model.network
    weights = persistent_buffers(model) | weights
    if not type(network).__name__.endswith("ForSequenceClassification"):
        network.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        return
    pad = padding_token(network.config, tokenizer)
    if pad is None:
        logger.warning(
            "the tokenizer has no token for padding besides those that end a row: %s gets none, and Transformers "
            "scores one row at a time with it",
            folder,
        )
    with _padded_by(pad, network.config, tokenizer):
        network.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def persistent_buffers(model: PackedModel) -> dict[str, Tensor]:
    """What a folder holds besides parameters, by Hugging Face name: for one, the bias of DeepSeek-V3's routers."""
    return {
        f"{path}.{name}" if path else name: buffer.detach()
        for path, module in model.network.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def padding_token(config: Any, tokenizer: Any) -> str | None:
    """The token that pads rows without being taken for the end of one: in the vocabulary, and no end of a sequence.

    The tokenizer's own, if it is such a one; else a special token with "pad" in its name, the one for unknown text, the
    one that begins a sequence, or any other special one. None where there is none.
    """
    special = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    ends = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, _ends_of_turns(tokenizer, special))}
    for named in (getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())):
        ends.update(named if isinstance(named, (list, tuple)) else [named])
    wanted = [
        tokenizer.pad_token,
        *(token for token in special if "pad" in token.lower()),
        tokenizer.unk_token,
        tokenizer.bos_token,
        *special,
    ]
    for token in wanted:
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if number is not None and number not in ends and number < config.get_text_config().vocab_size:
            return str(token)
    return None


def _ends_of_turns(tokenizer: Any, special: Sequence[str]) -> set[str]:
    """Those of the ``special`` tokens that may end a row besides EOS, by the chat template (see ``data.chat``).

    The one that a rendered dialogue ends with. Also all that stand in the template, for it may end turns in several
    ways; but for BOS, which begins rows.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return set()
    found = {token for token in special if token in str(template) and token != tokenizer.bos_token}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip()
    except Exception as error:  # templates raise whatever they like
        logger.info("the chat template refuses two turns, so its words alone tell how it ends them: %s", error)
        return found
    return found | {token for token in special if rendered.endswith(token)}


@contextmanager
def _padded_by(pad: str | None, config: Any, tokenizer: Any) -> Iterator[None]:
    """Inside, configuration and tokenizer name ``pad`` for padding; afterwards what they named before."""
    configs = [config] if config.get_text_config() is config else [config, config.get_text_config()]
    before = [getattr(part, "pad_token_id", None) for part in configs], tokenizer.pad_token
    tokenizer.pad_token = pad
    for part in configs:
        part.pad_token_id = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    try:
        yield
    finally:
        for part, number in zip(configs, before[0], strict=True):
            part.pad_token_id = number
        tokenizer.pad_token = before[1]


def saved_form(model: PackedModel, name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """A weight as ``save_model`` would write it, which may be as several: what loads model files expects these.

    Names and shapes differ from those in memory where Transformers stacks a mixture's experts, and in older families.
    """
    saved = transformers.core_model_loading.revert_weight_conversion(model.network, {name: weight})
    return [(own, tensor.contiguous()) for own, tensor in saved.items()]
