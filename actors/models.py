"""Hugging Face models as the trained and scoring roles use them: packed, without dropout, without a cache.

Invariants:

- A packed model takes sequences laid end to end, with positions that restart at 0, and gives each token what it
  would get alone. Where an architecture cannot keep packed sequences apart (it takes no position ids, or carries a
  state from token to token, or lets attention cross the border), ``PackedModel`` runs the same pack as a padded
  batch instead; callers see no difference. Which of the two is found out once, by trying, at load. A sequence so long
  that it changes its mates in either layout is refused (see ``actors.positions``).
- A model computes what its makers' does, or is refused: no attention is taken that leaves part of it out.
- Dropout is off everywhere: the model stays in evaluation mode, and every dropout rate is 0 besides. (Adapters, which
  ``actors.tuning`` adds later, may have their own.)
- Parameter names are the Hugging Face model's own once ``PREFIX`` is removed; shared (tied) weights appear once.

Legend: T tokens of a pack, S selected positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.errors import ModelError
from actors.padded import run_padded
from actors.positions import flash_boundaries, require_apart, rotary_limit

logger = logging.getLogger(__name__)

#: Of a reward model's config.json: what is added to its head's output (see ``actors.normalisation``).
SCORE_BIAS = "troupe_score_bias"
#: What a packed model puts before the names of the Hugging Face model's parameters.
PREFIX = "network."

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HEAD_NAMES = ("score", "classifier", "classifier_head")
_FORWARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class PackedModel(nn.Module):
    """A Hugging Face decoder over packed sequences."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.padded = False
        self._limit = rotary_limit(network.config)
        self.tokens_first = False
        """Whether the decoder gives (L, B, hidden), as ChatGLM's own code does."""

    @property
    def config(self) -> Any:
        """The Hugging Face configuration (its classes are untyped)."""
        return self.network.config

    def _run(self, module: nn.Module, tokens_T: Tensor, position_ids_T: Tensor, **arguments: object) -> Any:
        """Call ``module`` on the pack as one row without mask: positions that restart tell sequences apart."""
        require_apart(self._limit, position_ids_T)
        if self.config._attn_implementation == "flash_attention_2":
            arguments |= flash_boundaries(position_ids_T)
        return module(input_ids=tokens_T[None], position_ids=position_ids_T[None], use_cache=False, **arguments)

    def _run_padded(self, run: Callable[[Tensor, Tensor], Tensor], tokens_T: Tensor, position_ids_T: Tensor) -> Tensor:
        """Call ``run`` on the pack as padded batches: see ``run_padded``."""
        require_apart(self._limit, position_ids_T)
        # Of a sharded parameter DeepSpeed keeps the whole shape.
        sharded = hasattr(next(self.network.parameters()), "ds_shape")
        return run_padded(run, tokens_T, position_ids_T, sharded=sharded)

    def hidden_states(self, module: nn.Module, tokens_T: Tensor, position_ids_T: Tensor) -> Tensor:
        """Last hidden states of the decoder ``module``, (T, hidden)."""

        def states(output: Any) -> Tensor:
            found = torch.as_tensor(output.last_hidden_state)
            return found.transpose(0, 1) if self.tokens_first else found

        if not self.padded:
            return states(self._run(module, tokens_T, position_ids_T))[0]

        def run(tokens: Tensor, mask: Tensor) -> Tensor:
            return states(module(input_ids=tokens, attention_mask=mask, use_cache=False))

        return self._run_padded(run, tokens_T, position_ids_T)


class CausalLM(PackedModel):
    """A causal language model over packed sequences."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._selects = "logits_to_keep" in inspect.signature(network.forward).parameters

    def forward(self, tokens_T: Tensor, position_ids_T: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Logits (T, V) that each token predicts the next one with, or (S, V) at ``positions_S`` alone.

        Choosing positions here keeps the vocabulary projection, and its memory, to where it is wanted.
        """
        if self.padded:
            logits_TV = self._run_padded(self._logits, tokens_T, position_ids_T)
        elif positions_S is not None and self._selects:
            output = self._run(self.network, tokens_T, position_ids_T, logits_to_keep=positions_S)
            return torch.as_tensor(output.logits[0])
        else:
            logits_TV = self._run(self.network, tokens_T, position_ids_T).logits[0]
        return torch.as_tensor(logits_TV if positions_S is None else logits_TV[positions_S])

    def _logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Of a padded batch."""
        return torch.as_tensor(self.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits)


class TokenScorer(PackedModel):
    """A model with one output a token: a reward model or a critic."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.head_name = next(name for name in _HEAD_NAMES if isinstance(getattr(network, name, None), nn.Linear))
        setattr(network, self.head_name, _Float32Head(getattr(network, self.head_name)))
        self.score_bias = float(getattr(network.config, SCORE_BIAS, 0.0))
        """Added to every score: of a normalised reward model whose head has no bias."""

    def forward(self, tokens_T: Tensor, position_ids_T: Tensor, positions_S: Tensor | None = None) -> Tensor:
        """Scores (T,), or (S,) at ``positions_S`` alone: computed by the head in float32, whatever its weights are."""
        states = self.hidden_states(self.network.base_model, tokens_T, position_ids_T)  # type: ignore[arg-type]
        if positions_S is not None:
            states = states[positions_S]
        head = getattr(self.network, self.head_name)
        return torch.as_tensor(head(states)[:, 0] + self.score_bias)


class _Float32Head(nn.Linear):
    """A linear layer with the parameters of another that computes in float32. In bfloat16 scores have 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer, as Hugging Face gives it.

    Raises:
        ModelError: there is none, it is corrupt, or it has no EOS token.
    """
    path = config.tokenizer_path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ModelError(f"no tokenizer could be loaded from {path}: {explained(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {path} has no EOS token: set eos_token in its tokenizer_config.json")
    return tokenizer


def load_causal_lm(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> CausalLM:
    """Load a causal language model, or draw its weights from ``seed`` where ``config.from_scratch``.

    Raises:
        ModelError: the folder is missing or corrupt, weights are missing, or it is no causal language model.
    """
    network_config = _read_config(config)
    architecture = _architecture(network_config)
    if architecture.endswith("Classification"):
        raise ModelError(f"{config.path} is a {architecture}, not a causal language model")
    network = _build(transformers.AutoModelForCausalLM, network_config, config, seed, may_miss=())
    model = CausalLM(network)
    _prepare(model, device)
    return model


def load_scorer(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 0) -> TokenScorer:
    """Load a model with one label per sequence or token. A causal language model gets a new head that is all zeros.

    Raises:
        ModelError: the folder is missing or corrupt, or the model has another number of labels than one.
    """
    network_config = _read_config(config)
    architecture = _architecture(network_config)
    auto = _scorer_class(network_config, config)
    fresh = config.from_scratch or not architecture.endswith("Classification")
    network = _build(auto, network_config, config, seed, may_miss=tuple(f"{name}." for name in _HEAD_NAMES) * fresh)
    head = next((getattr(network, name) for name in _HEAD_NAMES if hasattr(network, name)), None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(f"{config.path} ({architecture}) has no linear head over its tokens named {_HEAD_NAMES}")
    if fresh:
        if hasattr(network.config, SCORE_BIAS):
            delattr(network.config, SCORE_BIAS)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
    model = TokenScorer(network)
    _prepare(model, device)
    return model


def outline(config: ModelConfig, *, scores: bool) -> PackedModel:
    """The layers of a model without weights, on PyTorch's meta device: to look at, not to run. Takes milliseconds.

    Raises:
        ModelError: the folder is missing or corrupt, or the model has another number of labels than one.
    """
    network_config = _read_config(config)
    auto = _scorer_class(network_config, config) if scores else transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            network = auto.from_config(
                network_config, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # transformers and remote code raise whatever they like
        raise ModelError(f"model {config.path} could not be built as {auto.__name__}: {explained(error)}") from error
    return TokenScorer(network) if scores else CausalLM(network)


def enable_gradient_checkpointing(model: PackedModel) -> None:
    """Recompute each layer's activations in backward. Only the layers learn that they train, so dropout stays off.

    Raises:
        ModelError: the architecture does not offer it.
    """
    require_gradient_checkpointing(model)
    network: Any = model.network
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def require_gradient_checkpointing(model: PackedModel) -> None:
    """Whether the architecture offers it. Weights are not looked at: ``outline`` will do.

    Raises:
        ModelError: it does not.
    """
    network: Any = model.network
    if not network.supports_gradient_checkpointing:
        raise ModelError(f"{type(network).__name__} does not support gradient checkpointing")


def explained(error: Exception) -> str:
    """What Transformers says, with what to do about it in the words of a run's configuration."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "it brings Python code of its own, which runs only where trust_remote_code: true says that it is trusted"
    if "Unrecognized configuration class" in said:
        return f"there is no such class for it, in Transformers or in code that it brings ({said.split(' for ')[0]})"
    if "attention implementation" in said:
        return f"{said.split('. ')[0]}; set attention: eager, which every model has"
    return said


def _architecture(network_config: Any) -> str:
    return str((getattr(network_config, "architectures", None) or ["unknown"])[0])


def _scorer_class(network_config: Any, config: ModelConfig) -> Any:
    """Transformers' class for a model with one label; ``network_config`` is made to ask for that label."""
    architecture = _architecture(network_config)
    if not architecture.endswith("Classification"):
        network_config.num_labels = 1
    if network_config.num_labels != 1:
        labels = ", ".join(network_config.id2label.values())
        raise ModelError(
            f"{config.path} has {network_config.num_labels} labels ({labels}); a reward model or critic has one"
        )
    network_config.architectures = None  # save_pretrained writes the class that this becomes
    if architecture.endswith("ForTokenClassification"):
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def _read_config(config: ModelConfig) -> Any:
    folder = Path(config.path)
    if config.path.startswith((".", "/")) and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise ModelError(f"model folder {config.path} {what}; a Hugging Face model folder or hub name is expected")
    try:
        found = transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"config.json of model {config.path} could not be read: {explained(error)}") from error
    if config.attention == "sdpa" and getattr(found.get_text_config(), "attn_logit_softcapping", None):
        # Of Gemma 2 for one. Transformers 5 takes sdpa all the same, and silently computes without the cap.
        raise ModelError(
            f"model {config.path} caps its attention's logits, which sdpa leaves out; set attention: eager, or "
            "flash_attention_2 on a GPU"
        )
    return found


def _build(auto: Any, network_config: Any, config: ModelConfig, seed: int, may_miss: tuple[str, ...]) -> nn.Module:
    """The Hugging Face model, with weights from its folder or drawn; keys in ``may_miss`` need not be in the folder."""
    transformers.utils.logging.disable_progress_bar()  # the log of a rank is no terminal
    options: dict[str, Any] = {
        "dtype": _TORCH_DTYPES[config.dtype],
        "attn_implementation": config.attention,
        "trust_remote_code": config.trust_remote_code,
    }
    try:
        if config.from_scratch:
            # Drawn in float32 whatever the dtype, so that a seed means the same weights.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network: nn.Module = auto.from_config(network_config, **(options | {"dtype": torch.float32}))
            return network.to(_TORCH_DTYPES[config.dtype])
        loaded, info = auto.from_pretrained(
            config.path, config=network_config, output_loading_info=True, **options
        )
    except Exception as error:  # transformers, safetensors and remote code raise whatever they like
        raise ModelError(f"model {config.path} could not be loaded as {auto.__name__}: {explained(error)}") from error
    missing = [key for key in info["missing_keys"] if not key.startswith(may_miss or ("\0",))]
    if missing or info["mismatched_keys"]:
        raise ModelError(
            f"the weights of model {config.path} do not fit its config.json: missing {sorted(missing)[:5]}, "
            f"of another shape {sorted(map(str, info['mismatched_keys']))[:5]}"
        )
    network = loaded
    return network


def _prepare(model: PackedModel, device: torch.device | str) -> None:
    """Evaluation mode, no dropout, on the device, and the layout that this architecture can run."""
    model.eval()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "dropout" in name or name.endswith("pdrop") or (name == "p" and isinstance(module, nn.Dropout))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)
    model.to(device)
    with torch.no_grad():
        _try(model, torch.device(device))
    if model.padded:
        logger.warning("%s cannot run packed sequences; running padded batches", type(model.network).__name__)


def _try(model: PackedModel, device: torch.device) -> None:
    """Find out how the model is to be run.

    Raises:
        ModelError: it is no decoder, or does not run on plain tokens.
    """
    name = type(model.network).__name__
    base: Any = model.network.base_model
    tokens = _probe(model, 8, 3, device)[None]
    try:
        states = base(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
    except Exception as error:  # code of others raises whatever it likes
        raise ModelError(f"{name} does not run on a row of tokens and a mask alone: {error}") from error
    model.tokens_first = tuple(states.shape[:2]) == (8, 1)
    try:
        model.padded = not _keeps_packed_sequences_apart(model, device)
    except Exception as error:
        logger.info("%s fails on a packed row: %s", name, error)
        model.padded = True
    _require_causal(model, device)


def _keeps_packed_sequences_apart(model: PackedModel, device: torch.device) -> bool:
    """Does the second sequence of a pack keep its hidden states when the first one changes, and when it is alone?"""
    base: Any = model.network.base_model
    if "position_ids" not in inspect.signature(base.forward).parameters or getattr(base, "_is_stateful", False):
        return False
    first, second = _probe(model, 8, 3, device), _probe(model, 7, 5, device)
    positions = torch.cat([torch.arange(8, device=device), torch.arange(7, device=device)])
    states = model.hidden_states(base, torch.cat([first, second]), positions)[8:]
    mate_changed = model.hidden_states(base, torch.cat([first.flip(0), second]), positions)[8:]
    alone = model.hidden_states(base, second, positions[8:])
    return _close(states, mate_changed) and _close(states, alone)


def _require_causal(model: PackedModel, device: torch.device) -> None:
    """Refuse a model in which a token sees later ones: its outputs would not be of prefixes."""
    base: Any = model.network.base_model
    tokens, positions = _probe(model, 8, 3, device), torch.arange(8, device=device)
    later_changed = torch.cat([tokens[:7], tokens[:1]])
    states = [model.hidden_states(base, row, positions)[:7] for row in (tokens, later_changed)]
    if not _close(*states):
        name = type(model.network).__name__
        raise ModelError(f"{name} is no decoder: its tokens see the ones after them, so it cannot score prefixes")


def _probe(model: PackedModel, length: int, factor: int, device: torch.device) -> Tensor:
    """Tokens that differ from one another, of any vocabulary."""
    size = min(int(model.config.get_text_config().vocab_size), 64)
    return torch.arange(1, length + 1, device=device) * factor % size


def _close(states: Tensor, others: Tensor) -> bool:
    tolerance = _FORWARD_TOLERANCE[states.dtype] * float(states.abs().max())
    return float((others - states).abs().max()) <= tolerance
