"""Tiny configurations of the model families that troupe is tested with, each in the shape its makers give it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.actors import tiny_models

#: Shorter than the longest row of the tests, so that what slides does.
WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_GROUPED = _COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2}
_GEMMA = _GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "bloom": (
        "BloomConfig",
        {"vocab_size": tiny_models.VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4,
         "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    ),
    "gpt_neox": ("GPTNeoXConfig", _COMMON | {"intermediate_size": 64, "rotary_pct": 0.5}),
    "glm": ("GlmConfig", _GROUPED | {"head_dim": 8, "attention_bias": True}),
    "glm4": ("Glm4Config", _GROUPED | {"head_dim": 8, "attention_bias": True}),
    "mixtral": ("MixtralConfig", _GROUPED | _EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _GROUPED | _EXPERTS | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
}  # fmt: skip
NAMES = tuple(_SHAPES)


def shape(name: str, **changes: Any) -> Any:
    """The Hugging Face configuration of a family."""
    kind, settings = _SHAPES[name]
    return getattr(transformers, kind)(**(settings | changes))


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A model folder of a family, of some 20,000 weights, tokenizer included."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape(name, **changes), dtype=torch.float32)
    spread(model)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


#: Of ``deepseek_v3``: a buffer that its folder holds, by which experts are chosen.
ROUTER_BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


def deepseek_v3() -> Any:
    """The Hugging Face configuration of a DeepSeek-V3 of one layer, a mixture of 4 experts."""
    return transformers.DeepseekV3Config(
        **_GROUPED
        | {"num_hidden_layers": 1, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4},
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=0,
        kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


def spread(model: Any) -> None:
    """Draw the matrices wide, so that attention and position matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.3)


#: What each repository's config.json says of its classes.
_REMOTE: dict[str, dict[str, Any]] = {
    "baichuan": {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
    },
    "chatglm": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
        },
    },
}


def write_remote(folder: Path, name: str, **changes: Any) -> Path:
    """A repository that brings its own code, as ``baichuan`` and ``chatglm`` do: weights, tokenizer and modules."""
    shutil.copytree(Path(__file__).parent / "remote_code" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    settings = _REMOTE[name] | {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0} | changes
    (folder / "config.json").write_text(json.dumps(settings))
    tiny_models.tokenizer().save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    spread(model)
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder
