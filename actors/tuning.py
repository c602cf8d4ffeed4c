"""Training few weights instead of all: LoRA and QLoRA, by PEFT and bitsandbytes.

Invariants:

- ``tune`` freezes every weight but the adapters and a scorer's head. Before the first update the model's outputs are
  what they were: B is zero. (With QLoRA they are those of the weights as rounded to 4 bits.)
- Outside, a model with adapters looks like one without: ``weight_sources`` gives merged weights under Hugging Face's
  names, in the order, shapes and dtype that the model had before it was tuned. Merging computes in float32 on copies:
  the frozen weights are never touched, and never quantised a second time.
- A base that bitsandbytes holds in 4 bits computes with its de-quantised weights, in training and in scoring alike.
- ``peft`` and ``bitsandbytes`` take seconds to import, so only a model that is tuned by them does.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from actors.config import LoRAConfig, TrainedRoleConfig
from actors.errors import ModelError
from actors.models import PREFIX, PackedModel, TokenScorer
from actors.weights import ADAPTER_PREFIX, WeightPart

logger = logging.getLogger(__name__)

_ADAPTER = "default"
_BASE = "base_layer."
#: Weights that share one scale in 4 bits.
_BLOCK = 64


@dataclass(frozen=True)
class WeightSource:
    """A weight as it leaves the trainer: its Hugging Face name, and how its value is had.

    ``parameters`` are what ``value`` reads; where they are sharded, they must be gathered first.
    """

    name: str
    num_bytes: int
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]


class Adapters:
    """The adapters of one model."""

    def __init__(self, model: PackedModel, layers: dict[str, Any], lora: LoRAConfig, peft_config: Any) -> None:
        """``layers``: PEFT's layers by the Hugging Face name of the layer each stands for."""
        self._model = model
        self._layers = layers
        self._lora = lora
        self._peft_config = peft_config

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is its frozen base (a head that was trained stays)."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    def set_training(self, training: bool) -> None:
        """Whether the adapters' dropout drops."""
        for layer in self._layers.values():
            layer.training = training
            layer.lora_dropout.train(training)

    def trained(self) -> dict[str, nn.Parameter]:
        """What an adapter's file holds: adapters and head, by their names there."""
        found: dict[str, nn.Parameter] = {}
        for name, parameter in self._model.network.named_parameters():
            if parameter.requires_grad:
                name = name.replace(f".{_ADAPTER}", "")
                name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
                found[ADAPTER_PREFIX + name] = parameter
        return found

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads, from the values of ``trained``."""
        config = copy.copy(self._peft_config)
        config.inference_mode = True
        if isinstance(self._model, TokenScorer):
            config.modules_to_save = [self._model.head_name]
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")

    def apart(self) -> Iterator[WeightSource]:
        """A and B of every layer by PEFT's names, as vLLM's LoRA takes them; B with the scale multiplied in."""
        for name, layer in self._layers.items():
            for part, scale in (("lora_A", 1.0), ("lora_B", self._lora.scale)):
                parameter = getattr(layer, part)[_ADAPTER].weight
                num_bytes = _shape(parameter).numel() * parameter.dtype.itemsize
                value = partial(_scaled, parameter, scale)
                yield WeightSource(f"{ADAPTER_PREFIX}{name}.{part}.weight", num_bytes, (parameter,), value)

    def source(self, name: str, parameter: nn.Parameter, *, merge: bool = True) -> WeightSource | None:
        """Of a parameter by its name in the network; none for one that is part of an adapter.

        With ``merge`` the adapter is merged into the weight that it stands beside.
        """
        owner, rest = _split(name, self._layers)
        if owner is None:
            return _plain(name, parameter)
        if not rest.startswith(_BASE):
            return None
        rest = rest.removeprefix(_BASE)
        if rest != "weight" or not merge:
            return _plain(f"{owner}.{rest}", parameter)
        layer = self._layers[owner]
        adapter = [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
        if self._lora.use_dora:
            adapter.append(layer.lora_magnitude_vector[_ADAPTER].weight)
        shape, dtype = _shape(parameter), _dtype(parameter)
        num_bytes = shape.numel() * dtype.itemsize
        transposed = isinstance(layer.get_base_layer(), Conv1D)

        def value() -> Tensor:
            return merged(_dense(parameter), adapter, self._lora.scale, transposed=transposed).to(dtype)

        return WeightSource(f"{owner}.weight", num_bytes, (parameter, *adapter), value)


@torch.no_grad()
def merged(weight: Tensor, adapter: Sequence[Tensor], scale: float, *, transposed: bool = False) -> Tensor:
    """The one matrix that a layer and its adapter are, in float32.

    Args:
        weight: W of the base, (out, in), or (in, out) where ``transposed``.
        adapter: A (rank, in), B (out, rank), and with DoRA the magnitudes m (out,).
        scale: what B A is multiplied by.

    Returns:
        W + scale B A (LoRA, Hu et al. 2021, section 4.1); with DoRA each of its rows stretched to length m (Liu et al.
        2024, equation 5).
    """
    weight = weight.float().T if transposed else weight.float()
    whole = weight + scale * (adapter[1].float() @ adapter[0].float())
    if len(adapter) > 2:
        whole = whole * (adapter[2].float() / torch.linalg.norm(whole, dim=1))[:, None]
    return whole.T.contiguous() if transposed else whole


def tune(model: PackedModel, config: TrainedRoleConfig, device: torch.device, seed: int) -> Adapters | None:
    """Freeze ``model`` and give it adapters as ``config.tuning`` says, drawn from ``seed``; none for full tuning.

    Raises:
        ModelError: as ``require_tunable`` says.
    """
    tuning = config.tuning
    if tuning.method == "full":
        return None
    import peft  # here and not above: see the module's last invariant

    network: Any = model.network
    targets = require_tunable(model, config, device.type)
    peft_config = peft.LoraConfig(
        r=tuning.lora.rank,
        lora_alpha=tuning.lora.alpha,
        lora_dropout=tuning.lora.dropout,
        use_rslora=tuning.lora.use_rslora,
        use_dora=tuning.lora.use_dora,
        target_modules=targets,
        fan_in_fan_out=isinstance(network.get_submodule(targets[0]), Conv1D),
        task_type=_task(model),
        base_model_name_or_path=_absolute(config.model.path),
    )
    if tuning.method == "qlora":
        _quantise(model, device, double=tuning.qlora.double_quantisation)
        network.is_loaded_in_4bit = True  # PEFT asks for it, and then wraps bitsandbytes' layers in its own for them
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft_config, network, _ADAPTER)
    if tuning.method == "qlora":
        del network.is_loaded_in_4bit
    layers = {name: network.get_submodule(name) for name in targets}
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            part.to(network.dtype)
    if isinstance(model, TokenScorer):
        getattr(network, model.head_name).requires_grad_(True)
    adapters = Adapters(model, layers, tuning.lora, peft_config)
    adapters.set_training(False)
    _report(model, tuning.method)
    return adapters


def _report(model: PackedModel, method: str) -> None:
    """Say how much of the model learns, and warn where 4 bits save little."""
    parameters = list(model.parameters())
    total = sum(_shape(p).numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    quantised = sum(_shape(p).numel() for p in parameters if hasattr(p, "quant_state"))
    name = type(model.network).__name__
    logger.info("%s: %d of %d weights learn, %d are in 4 bits", name, trained, total, quantised)
    if method == "qlora" and quantised < total / 2:
        # Of a mixture of experts for one: Transformers stacks the experts in tensors that are no linear layers.
        logger.warning("%s: only %d of %d weights could be put in 4 bits", name, quantised, total)


def require_tunable(model: PackedModel, config: TrainedRoleConfig, device_type: str) -> list[str]:
    """The names of the layers that get an adapter. Weights are not looked at: ``actors.models.outline`` will do.

    Raises:
        ModelError: ``targets`` names no linear layer, or an output layer that is tied; or the model's layers cannot be
            quantised on such a device.
    """
    tuning = config.tuning
    names = _target_names(model, tuning.lora.targets)
    if tuning.method == "qlora":
        for name in _linear_names(model):
            _require_quantisable(model, name, device_type)
    return names


def weight_sources(
    model: PackedModel, adapters: Adapters | None, part: WeightPart = "merged"
) -> Iterator[WeightSource]:
    """The weights of a part of the model under their Hugging Face names, tied ones once; an adapter's by PEFT's."""
    if part == "adapter":
        yield from adapters.apart() if adapters is not None else ()
        return
    for name, parameter in model.named_parameters():
        name, merge = name.removeprefix(PREFIX), part == "merged"
        source = _plain(name, parameter) if adapters is None else adapters.source(name, parameter, merge=merge)
        if source is not None:
            yield source


def _plain(name: str, parameter: nn.Parameter) -> WeightSource:
    """A weight that no adapter changes."""
    num_bytes = _shape(parameter).numel() * _dtype(parameter).itemsize
    return WeightSource(name, num_bytes, (parameter,), lambda: _dense(parameter))


def _scaled(parameter: nn.Parameter, scale: float) -> Tensor:
    return parameter.detach() if scale == 1 else parameter.detach() * scale


def _split(name: str, layers: dict[str, Any]) -> tuple[str | None, str]:
    """The layer that ``name`` is part of, and the rest of the name; no layer where it is part of none."""
    end = len(name)
    while (end := name.rfind(".", 0, end)) >= 0:
        if name[:end] in layers:
            return name[:end], name[end + 1 :]
    return None, name


def _dense(parameter: nn.Parameter) -> Tensor:
    """The values that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit  # loaded already, by whoever quantised it

    return torch.as_tensor(dequantize_4bit(parameter.detach(), state))


def _shape(parameter: nn.Parameter) -> torch.Size:
    state = getattr(parameter, "quant_state", None)
    # Of a sharded parameter only DeepSpeed knows the whole shape.
    return torch.Size(state.shape if state is not None else getattr(parameter, "ds_shape", parameter.shape))


def _dtype(parameter: nn.Parameter) -> torch.dtype:
    state = getattr(parameter, "quant_state", None)
    dtype: torch.dtype = parameter.dtype if state is None else state.dtype
    return dtype


def _linear_names(model: PackedModel) -> list[str]:
    """The linear layers of the decoder: all but the output layer and the head."""
    network: Any = model.network
    left_out = [network.get_output_embeddings()]
    if isinstance(model, TokenScorer):
        left_out.append(getattr(network, model.head_name))
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(module is other for other in left_out)
    ]


def _target_names(model: PackedModel, targets: str | Sequence[str]) -> list[str]:
    linear = _linear_names(model)
    if isinstance(targets, str):
        return linear
    network: Any = model.network
    chosen: list[str] = []
    for target in targets:
        found = [name for name, _ in network.named_modules() if name == target or name.endswith(f".{target}")]
        if isinstance(model, TokenScorer) and model.head_name in found:
            raise ModelError(f"tuning.lora.targets: {target} is the head, which is trained in full; remove it")
        output = network.get_output_embeddings()
        for name in found:
            module = network.get_submodule(name)
            if module is output and output.weight is network.get_input_embeddings().weight:
                raise ModelError(
                    f"tuning.lora.targets: {target} shares its weights with the input embeddings, so it cannot be "
                    "adapted alone; remove it"
                )
            if not isinstance(module, (nn.Linear, Conv1D)):
                raise ModelError(f"tuning.lora.targets: {name} is a {type(module).__name__}, not a linear layer")
        if not found:
            offered = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ModelError(
                f"tuning.lora.targets: {type(network).__name__} has no layer {target}; its linear layers are {offered}"
            )
        chosen += [name for name in found if name not in chosen]
    return chosen


def _require_quantisable(model: PackedModel, name: str, device_type: str) -> None:
    layer = model.network.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"tuning.method qlora: {type(model.network).__name__} keeps its weights in {type(layer).__name__}, which "
            "bitsandbytes does not quantise; use lora"
        )
    if device_type == "cpu" and layer.in_features % _BLOCK:
        # Seen in bitsandbytes 0.50.2 with AVX-512: blocks that cross a row get other blocks' scales, silently.
        raise ModelError(
            f"tuning.method qlora: {name} takes {layer.in_features} inputs; on CPU bitsandbytes de-quantises right "
            f"only where they are a multiple of {_BLOCK}: use lora, or a GPU"
        )


def _quantise(model: PackedModel, device: torch.device, *, double: bool) -> None:
    """Turn the decoder's linear layers into bitsandbytes' in NF4, one at a time, on ``device``."""
    import bitsandbytes

    network: Any = model.network
    for name in _linear_names(model):
        linear: Any = network.get_submodule(name)
        with torch.device("meta"):
            quantised = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype
            )
        # Stored as the model's dtype, for DeepSpeed shards parameters of one dtype only.
        quantised.weight = bitsandbytes.nn.Params4bit(
            linear.weight.detach(),
            requires_grad=False,
            blocksize=_BLOCK,
            compress_statistics=double,
            quant_type="nf4",
            quant_storage=linear.weight.dtype,
            module=quantised,
        ).to(device)
        quantised.quant_storage = linear.weight.dtype
        quantised.bias = linear.bias
        # On CPUs with AVX512-BF16 it would, on the first forward without gradients, pack the weights for a kernel
        # that computes in bfloat16 and has no backward: training after scoring would silently lose gradients.
        quantised.support_avx512bf16_for_cpu = False
        quantised.eval()
        network.set_submodule(name, quantised)


def _task(model: PackedModel) -> str:
    if not isinstance(model, TokenScorer):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if type(model.network).__name__.endswith("ForTokenClassification") else "SEQ_CLS"


def _absolute(path: str) -> str:
    """A folder's path from the root; a name on the hub as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
