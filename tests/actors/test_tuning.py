"""LoRA and QLoRA: few weights learn, the others stay, and outside the model looks like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from actors.config import LoRAConfig, ModelConfig
from actors.errors import ModelError, RoleError
from actors.models import PackedModel, load_causal_lm, load_scorer, outline
from actors.tuning import merged, require_tunable, tune, weight_sources
from actors.weight_sender import layout_of
from actors.weights import dtype_name
from tests.actors import engine_programs, tiny_models
from tests.actors import tuning_programs as programs
from tests.actors.ranks import Ranks

KINDS = [("qwen2", "lora"), ("llama", "qlora"), ("gpt2", "lora"), ("score", "lora"), ("score", "qlora")]
DORA = {"lora": {"use_dora": True}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as those of the other tests, of layers wide enough for blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_models.write(folder / "qwen2", "qwen2", tied=True, width=64)
    tiny_models.write(folder / "llama", "llama", tied=False, width=64)
    tiny_models.write(folder / "score", "qwen2", head="score", width=64)
    tiny_models.write(folder / "score_new", "qwen2", width=64)
    tiny_models.write(folder / "narrow", "qwen2")
    tiny_models.write(folder / "gpt2", "gpt2")
    return folder


def tuned(folder: Path, method: str = "lora", **changes: Any) -> PackedModel:
    settings = programs.config(folder, 0, method, **changes)
    model = programs.model_of(settings)
    tune(model, settings, CPU, 0)
    return model


def plain(folder: Path, weights: dict[str, Tensor]) -> Tensor:
    """The logits of an untuned model with these weights."""
    model = programs.model_of(programs.config(folder, 0))
    missing, unexpected = model.network.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    logits: Tensor = model(*engine_programs.pack(engine_programs.batch(100)))
    return logits.detach()


def require_same(logits: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest: the rounding of float32."""
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- what a tuned model is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_by_hand(rslora: bool) -> None:
    """Rank 4, alpha 8: the scale is 2, and with rsLoRA 4."""
    lora = LoRAConfig(rank=4, alpha=8, use_rslora=rslora)
    weight, a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(4, 2), torch.zeros(2, 4)
    a[1], b[0, 1] = torch.tensor([1.0, -1.0]), 0.5
    expected = torch.tensor([[3.0, 0.0], [3.0, 4.0]]) if rslora else torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    assert torch.equal(merged(weight, [a, b], lora.scale), expected)
    assert torch.equal(merged(weight.T, [a, b], lora.scale, transposed=True), expected.T)
    long = merged(weight, [a, b, torch.tensor([6.0, 10.0])], lora.scale)
    torch.testing.assert_close(long, expected * (torch.tensor([6.0, 10.0]) / expected.norm(dim=1))[:, None])


@pytest.mark.parametrize("changes", [{}, DORA, {"lora": {"use_rslora": True}}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize(("kind", "method"), KINDS)
def test_training_moves_adapters_and_head_alone(
    kind: str, method: str, changes: dict[str, Any], models: Path, one_rank: Ranks
) -> None:
    """Nothing changes at first; the base never does; merged weights give what the tuned model gives."""
    (found,) = one_rank.run(programs.train, models / kind, 1, method, changes)
    assert method == "qlora" or torch.equal(found["started"], found["base"])
    require_same(plain(models / kind, found["first"]), found["started"])
    require_same(plain(models / kind, found["weights"]), found["after"])
    assert not torch.allclose(found["after"], found["started"], atol=1e-2)
    assert found["moved"] == []
    head = {name for name in found["trained"] if "lora_" not in name}
    assert head == ({"network.score.weight"} if kind == "score" else set())
    changed = {name for name, tensor in found["weights"].items() if not torch.equal(tensor, found["first"][name])}
    adapted = {name.removeprefix("network.").split(".lora_")[0] + ".weight" for name in set(found["trained"]) - head}
    assert changed == adapted | {name.removeprefix("network.") for name in head}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_is_the_reference(method: str, models: Path, one_rank: Ranks) -> None:
    """With the adapter off, in the middle of training: exactly what was there before."""
    (found,) = one_rank.run(programs.train, models / "llama", 2, method, {})
    assert torch.equal(found["off"], found["started"])
    assert not torch.equal(found["off"], found["after"])
    if method == "lora":
        assert torch.equal(found["off"], found["base"])


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "score"])
def test_weights_leave_as_they_came(kind: str, models: Path) -> None:
    """Names, types, shapes and order are those of the model before it was tuned: what engines are told to expect."""
    settings = programs.config(models / kind, 0)
    model = programs.model_of(settings)
    expected = [(meta.name, meta.dtype, meta.shape) for meta in layout_of(model)]
    adapters = tune(model, settings, CPU, 0)
    sources = list(weight_sources(model, adapters))
    values = [(source.name, source.value()) for source in sources]
    assert [(name, dtype_name(value.dtype), tuple(value.shape)) for name, value in values] == expected
    assert [source.num_bytes for source in sources] == [value.nbytes for _, value in values]


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    [
        ("qwen2", "lora", {}),
        ("llama", "qlora", {}),
        ("score", "qlora", {}),
        ("llama", "lora", DORA | {"gradient_checkpointing": True}),
        ("llama", "qlora", {"gradient_checkpointing": True}),
    ],
)
def test_two_ranks_equal_one(
    kind: str, method: str, changes: dict[str, Any], stage: int, models: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    (alone,) = one_rank.run(programs.train, models / kind, 0, method, {k: v for k, v in changes.items() if k == "lora"})
    for found in two_ranks.run(programs.train, models / kind, stage, method, changes):
        assert found["reports"] == [pytest.approx(report, rel=2e-5) for report in alone["reports"]]
        assert found["weights"].keys() == alone["weights"].keys()
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=1e-5)
        require_same(found["off"], alone["off"])
        assert found["moved"] == []


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("offload", [{}, {"offload_optimizer": True, "offload_params": True}])
def test_shards_too_small_to_stay_whole(
    method: str, offload: dict[str, bool], models: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    """DeepSpeed keeps small parameters whole on every rank; here it is told to take all of them apart."""
    (alone,) = one_rank.run(programs.train, models / "llama", 0, method, {})
    for found in two_ranks.run(programs.train_in_shards, models / "llama", method, {"zero": offload}):
        assert found["reports"] == [pytest.approx(report, rel=2e-5) for report in alone["reports"]]
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bfloat16_learns(stage: int, method: str, models: Path, two_ranks: Ranks) -> None:
    exact = two_ranks.run(programs.train, models / "llama", stage, method, {})[0]
    found = two_ranks.run(programs.train, models / "llama", stage, method, {"dtype": "bfloat16"})[0]
    assert all(tensor.dtype == torch.bfloat16 for tensor in found["weights"].values())
    losses = [[report["loss"] for report in one["reports"]] for one in (exact, found)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert torch.equal(found["off"], found["started"])


@pytest.mark.parametrize(
    ("kind", "stage", "method", "changes"),
    [
        ("llama", 0, "lora", {}),
        ("score", 1, "lora", {}),
        ("llama", 1, "lora", {"lora": {"dropout": 0.5}}),
        ("llama", 2, "qlora", DORA),
        ("score", 3, "qlora", {}),
        ("llama", 3, "lora", {"dtype": "bfloat16"}),
    ],
)
def test_resuming_is_exact_and_keeps_no_base(
    kind: str, stage: int, method: str, changes: dict[str, Any], models: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    assert two_ranks.run(programs.resume, models / kind, stage, method, tmp_path, changes) == [True] * 2
    for file in (tmp_path / "engine").glob("*model_states.pt"):
        kept = torch.load(file, weights_only=False)["module"]
        # What bitsandbytes keeps beside its weights are no parameters, so DeepSpeed keeps them.
        assert all("lora_" in name or "score" in name or ".weight." in name for name in kept), list(kept)


# --- quantisation and dropout ----------------------------------------------------------------------------------------


def test_the_base_is_stored_in_four_bits(models: Path) -> None:
    """Values on the NF4 levels (QLoRA, appendix E), within half a level of the original; head and output stay."""
    folder = models / "llama"
    exact = dict(load_causal_lm(ModelConfig(path=str(folder), dtype="float32")).network.named_parameters())
    settings = programs.config(folder, 0, "qlora", tuning={"qlora": {"double_quantisation": False}})
    model = programs.model_of(settings)
    adapters = tune(model, settings, CPU, 0)
    levels = torch.tensor(
        [-1, -.6961928, -.5250731, -.3949175, -.2844414, -.1847734, -.0910500, 0,
         .0795803, .1609302, .2461123, .3379152, .4407098, .5626170, .7229568, 1]
    )  # fmt: skip
    layer: Any = model.network.get_submodule("model.layers.0.mlp.up_proj")
    stored = layer.get_base_layer().weight
    assert stored.quant_state.quant_type == "nf4" and stored.quant_state.blocksize == 64
    assert stored.nbytes == layer.get_base_layer().out_features * layer.get_base_layer().in_features / 2
    names = {source.name: source.value() for source in weight_sources(model, adapters)}
    name = "model.layers.0.mlp.up_proj.weight"
    blocks, originals = names[name].reshape(-1, 64), exact[name].detach().reshape(-1, 64)
    scaled = blocks / originals.abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - levels).abs().amin(-1)
    assert nearest.max() < 1e-5
    rounded = levels[(originals / originals.abs().amax(1, keepdim=True))[..., None].sub(levels).abs().argmin(-1)]
    assert (rounded - scaled).abs().gt(1e-5).float().mean() < 0.01
    for whole in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(names[whole], exact[whole])


def test_scoring_does_not_take_gradients_away(models: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs weights for scoring in a form that has no backward."""

    def gradients(model: PackedModel) -> list[Tensor]:
        model.zero_grad()
        model(*engine_programs.pack(engine_programs.batch(0))).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    fresh, scored = tuned(models / "llama", "qlora"), tuned(models / "llama", "qlora")
    with torch.no_grad():
        scored(*engine_programs.pack(engine_programs.batch(0)))
    expected = gradients(fresh)
    assert len(expected) == 28 and sum(float(g.abs().max()) > 0 for g in expected) == 14  # A's are 0 while B is
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients(scored), strict=True))


def test_dropout_is_in_training_alone(models: Path, one_rank: Ranks) -> None:
    changes = {"lora": {"dropout": 0.5}}
    (found,) = one_rank.run(programs.train, models / "qwen2", 1, "lora", changes)
    (plain_run,) = one_rank.run(programs.train, models / "qwen2", 1, "lora", {})
    assert torch.equal(found["started"], plain_run["started"])
    assert found["reports"][0]["grad_norm"] != plain_run["reports"][0]["grad_norm"]
    require_same(plain(models / "qwen2", found["weights"]), found["after"])


# --- exports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stage", "method", "changes"),
    [
        ("qwen2", 1, "lora", {}),
        ("gpt2", 2, "lora", DORA),
        ("llama", 3, "lora", DORA | {"lora": {"targets": ["q_proj", "lm_head"]}}),
        ("llama", 3, "qlora", {}),
        ("score", 3, "lora", {"lora": {"use_rslora": True}}),
        ("score_new", 1, "lora", {}),
    ],
)
def test_exports_load_with_transformers_and_peft(
    kind: str, stage: int, method: str, changes: dict[str, Any], models: Path, two_ranks: Ranks, tmp_path: Path
) -> None:
    import peft

    expected = two_ranks.run(programs.export, models / kind, stage, method, tmp_path, changes)[0]
    settings = programs.config(tmp_path / "merged", 0)
    scores = kind.startswith("score")
    load = load_scorer if scores else load_causal_lm
    batch = engine_programs.pack(engine_programs.batch(100))
    require_same(load(settings.model)(*batch).detach(), expected)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        models / kind
    )
    auto: Any = (
        transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    )
    base = in_4_bits(models / kind) if method == "qlora" else auto.from_pretrained(
        models / kind, **({"num_labels": 1} if scores else {})
    )
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    model = load(programs.config(models / kind, 0).model)
    # Merging into 4 bits would round once more.
    model.network = loaded.get_base_model() if method == "qlora" else loaded.merge_and_unload()
    require_same(model(*batch).detach(), expected)


def in_4_bits(folder: Path) -> Any:
    """The base as docs/methods/tuning.md says that QLoRA's adapter wants it."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else some CPUs compute in bfloat16
            module.support_avx512bf16_for_cpu = False
    return model


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "method", "changes", "message"),
    [
        (3, "qlora", DORA, "use_dora does not run under zero.stage 3"),
        (0, "full", DORA, "tuning.lora is set, but tuning.method is full"),
        (0, "lora", {"tuning": {"qlora": {"double_quantisation": False}}}, "tuning.qlora is set, but tuning.method is"),
        (0, "lora", {"lora": {"targets": []}}, "targets is empty"),
        (0, "lora", {"lora": {"rank": 0}}, "greater than 0"),
        (0, "lora", {"lora": {"dropout": 1.0}}, "less than 1"),
    ],
)
def test_what_cannot_be_configured(
    stage: int, method: str, changes: dict[str, Any], message: str, models: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        programs.config(models / "qwen2", stage, method, **changes)


def test_adapters_beside_random_weights_are_refused(models: Path) -> None:
    settings = programs.config(models / "qwen2", 0).model_dump()
    settings["model"]["from_scratch"] = True
    with pytest.raises(ValidationError, match="draws those at random: use full"):
        type(programs.config(models / "qwen2", 0))(**settings)


@pytest.mark.parametrize(
    ("kind", "method", "targets", "message"),
    [
        ("qwen2", "lora", ["q_prj"], "has no layer q_prj; its linear layers are down_proj, gate_proj"),
        ("qwen2", "lora", ["embed_tokens"], "is a Embedding, not a linear layer"),
        ("qwen2", "lora", ["q_proj", "lm_head"], "lm_head shares its weights with the input embeddings"),
        ("score", "lora", ["score"], "score is the head, which is trained in full"),
        ("narrow", "qlora", "all_linear", "takes 32 inputs; on CPU bitsandbytes de-quantises right only where"),
        ("gpt2", "qlora", ["c_attn"], "keeps its weights in Conv1D, which bitsandbytes does not quantise"),
    ],
)
def test_what_a_model_cannot_do_is_said(
    kind: str, method: str, targets: str | Sequence[str], message: str, models: Path
) -> None:
    """At load, and beforehand from the configuration alone."""
    settings = programs.config(models / kind, 0, method, lora={"targets": targets})
    with pytest.raises(ModelError, match=message):
        tune(programs.model_of(settings), settings, CPU, 0)
    with pytest.raises(ModelError, match=message):
        require_tunable(outline(settings.model, scores=kind == "score"), settings, "cpu")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "score", "score_new", "gpt2"])
def test_an_outline_has_the_layers_of_the_model(kind: str, models: Path) -> None:
    settings = programs.config(models / kind, 0)
    found = outline(settings.model, scores=kind.startswith("score"))
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}
    assert layout_of(found) == layout_of(programs.model_of(settings))
    assert require_tunable(found, settings, "cpu") == require_tunable(programs.model_of(settings), settings, "cpu")


def test_a_mixture_that_stays_large_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its experts are stacked in tensors that bitsandbytes does not know."""
    shape = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(tmp_path)
    tuned(tmp_path, "qlora")
    assert "weights could be put in 4 bits" in caplog.text


def test_a_model_tuned_in_full_has_no_adapter(models: Path, one_rank: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"{RoleError.__name__}.*tuning.method is full: there is no adapter"):
        one_rank.run(programs.adapter_of_full, models / "qwen2", tmp_path)


def test_full_tuning_loads_neither_library(models: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.actors.engine_programs import train\n"
        "from tests.actors.ranks import context\n"
        f"train(context(), Path({str(models / 'qwen2')!r}), 0, 4, 1, {{}})\n"
        "assert 'peft' not in sys.modules and 'bitsandbytes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_layers_that_stand_apart_have_their_own_adapters(tmp_path: Path) -> None:
    """Chosen by the end of their names, in every block and nowhere else."""
    folder = tiny_models.write(tmp_path / "llama", "llama", tied=False)
    model = tuned(folder, lora={"targets": ["q_proj", "layers.1.mlp.up_proj"]})
    trained = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    layers = "network.model.layers"
    assert trained == {f"{layers}.0.self_attn.q_proj", f"{layers}.1.self_attn.q_proj", f"{layers}.1.mlp.up_proj"}
