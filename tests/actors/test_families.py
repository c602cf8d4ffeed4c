"""What troupe needs of a model family, of each by a tiny random model: none is ever silently wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from actors.config import ModelConfig
from actors.errors import ModelError
from actors.exports import saved_form
from actors.models import PackedModel, load_causal_lm, load_scorer, load_tokenizer, outline
from actors.tuning import require_tunable, weight_sources
from actors.weight_sender import layout_of
from actors.weights import dtype_name
from tests.actors import families
from tests.actors import tuning_programs as programs
from tests.actors.ranks import Ranks

REMOTE = ("baichuan", "chatglm")
FAMILIES = (*families.NAMES, *REMOTE)
#: Those whose attention Transformers offers in one implementation only, or in none that computes all of it.
EAGER = ("bloom", "gemma2", *REMOTE)
#: Those that cannot tell the sequences of a packed row apart.
PADDED = ("bloom", *REMOTE)
NO_SCORER = ("baichuan",)

LAYERS = {
    "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "glm": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "glm4": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    # The experts are stacked in tensors that are no linear layers; they stay frozen.
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "baichuan": {"W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "chatglm": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"},
}
USUAL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name in families.NAMES:
        families.write(folder / name, name)
    for name in REMOTE:
        families.write_remote(folder / name, name)
    return folder


def settings(name: str) -> dict[str, Any]:
    """Of the family's ``ModelConfig``."""
    return {"attention": "eager" if name in EAGER else "sdpa", "trust_remote_code": name in REMOTE}


def model_config(folder: Path, name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(folder / name), dtype="float32", **(settings(name) | changes))


def rows() -> list[Tensor]:
    """Longer than the window of those that slide."""
    source = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (length,), generator=source) for length in (5, 9, 1, 30, 7)]


def packed() -> tuple[Tensor, Tensor]:
    return torch.cat(rows()), torch.cat([torch.arange(len(row)) for row in rows()])


@torch.no_grad()
def plain_logits(folder: Path, name: str) -> Tensor:
    """What Transformers itself gives one row at a time, with the attention that every family is written in."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=name in REMOTE
    ).eval()
    return torch.cat([model(input_ids=row[None]).logits[0] for row in rows()])


def require_packing_is_harmless(model: PackedModel) -> None:
    """Outputs and gradients of a pack are those of its sequences alone, whatever the order."""
    together = model(*packed())
    torch.autograd.backward(together.square().mean())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.cat([model(row, torch.arange(len(row))) for row in rows()])
    torch.autograd.backward(alone.square().mean())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=3e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            atol = 1e-5 * float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=atol)
    chosen = torch.tensor([0, 3, 6, 40])
    torch.testing.assert_close(model(*packed(), chosen), together[chosen], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_is_its_makers_model(name: str, folders: Path) -> None:
    model = load_causal_lm(model_config(folders, name))
    assert model.padded == (name in PADDED)
    torch.testing.assert_close(model(*packed()).detach(), plain_logits(folders / name, name), rtol=1e-4, atol=3e-5)
    require_packing_is_harmless(model)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_SCORER])
def test_a_scorer_begins_at_zero_and_does_not_see_its_pack(name: str, folders: Path) -> None:
    model = load_scorer(model_config(folders, name))
    assert torch.equal(model(*packed()), torch.zeros(52))
    head: Any = getattr(model.network, model.head_name)
    nn.init.normal_(head.weight)
    require_packing_is_harmless(model)


def learning() -> Iterator[Any]:
    """All families, tuned in full and by LoRA; by default one of each kind."""
    often = {"full": ("qwen3", "gemma2", "glm4", "mixtral", "baichuan"), "lora": ("bloom", "qwen3_moe", "chatglm")}
    for name in FAMILIES:
        for method, stage in (("full", 1), ("lora", 3)):
            marks = () if name in often[method] else pytest.mark.slow
            yield pytest.param(name, method, stage, marks=marks)


@pytest.mark.parametrize(("name", "method", "stage"), list(learning()))
def test_it_learns_and_leaves_as_it_came(
    name: str, method: str, stage: int, folders: Path, tmp_path: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    """A few updates; what is exported loads with Transformers, gives the same logits, and can be loaded here again."""
    ranks = one_rank if stage == 1 else two_ranks
    arguments = (folders / name, stage, method, tmp_path / "out", {"model": settings(name)})
    losses, expected = ranks.run(programs.learn_family, *arguments, [row.tolist() for row in rows()])[0]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(plain_logits(tmp_path / "out", name), expected, rtol=1e-4, atol=1e-4)
    again = load_causal_lm(model_config(tmp_path, "out", **settings(name)))
    torch.testing.assert_close(again(*packed()).detach(), expected, rtol=1e-4, atol=1e-4)
    before = plain_logits(folders / name, name)
    assert not torch.allclose(before, expected, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_layers_are_found(name: str, folders: Path) -> None:
    """In the model and in its outline alike, in each of its two blocks."""
    config = programs.config(folders / name, 0, "lora", model=settings(name))
    found = require_tunable(outline(config.model, scores=False), config, "cpu")
    assert {layer.rpartition(".")[2] for layer in found} == LAYERS.get(name, USUAL)
    assert found == require_tunable(load_causal_lm(config.model), config, "cpu")
    per_block = LAYERS.get(name, USUAL) - {"output_layer"}
    assert len(found) >= 2 * len(per_block)


@pytest.mark.parametrize("name", families.NAMES)
def test_engines_are_sent_what_a_model_file_holds(name: str, folders: Path) -> None:
    """By the names of files, not of memory: engines know no others. And so it is announced."""
    with safe_open(folders / name / "model.safetensors", framework="pt") as file:
        expected = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dictionary
    model = load_causal_lm(model_config(folders, name))
    sent = [
        form
        for source in weight_sources(model, None)
        for form in saved_form(model, source.name, source.value())
    ]
    assert dict(sent).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in sent)
    told = [(meta.name, meta.dtype, meta.shape) for meta in layout_of(model)]
    assert told == [(key, dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in sent]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMOTE)
def test_code_of_others_runs_only_where_it_is_trusted(name: str, folders: Path) -> None:
    config = model_config(folders, name, trust_remote_code=False)
    for load in (load_causal_lm, load_scorer):
        with pytest.raises(ModelError, match="brings Python code of its own, which runs only where trust_remote"):
            load(config)
    load_tokenizer(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma2", "caps its attention's logits, which sdpa leaves out; set attention: eager"),
        ("bloom", "does not support an attention implementation .*; set attention: eager"),
        ("chatglm", "does not support an attention implementation .*; set attention: eager"),
    ],
)
def test_attention_that_leaves_something_out_is_refused(name: str, message: str, folders: Path) -> None:
    config = model_config(folders, name, attention="sdpa")
    with pytest.raises(ModelError, match=message):
        load_causal_lm(config)
    with pytest.raises(ModelError, match=message):
        outline(config, scores=False)


def test_sdpa_would_have_been_wrong(folders: Path) -> None:
    """Why Gemma 2 is refused with it: Transformers takes it, and gives other logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders / "gemma2", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    row = rows()[3][None]
    with torch.no_grad():
        capped = model(input_ids=row).logits
        model.set_attn_implementation("eager")
        assert (model(input_ids=row).logits - capped).abs().max() > 1e-3


def test_a_repository_without_a_scorer_says_so(folders: Path) -> None:
    message = "there is no such class for it, in Transformers or in code that it brings"
    with pytest.raises(ModelError, match=message):
        load_scorer(model_config(folders, "baichuan"))
    with pytest.raises(ModelError, match=message):
        outline(model_config(folders, "baichuan"), scores=True)


def test_a_prefix_that_sees_all_of_itself_is_refused(tmp_path: Path) -> None:
    """The first ChatGLM: its tokens need a BOS in every row, and its prompts see what comes after them."""
    families.write_remote(tmp_path / "chatglm", "chatglm", position_encoding_2d=True)
    with pytest.raises(ModelError, match="does not run on a row of tokens and a mask alone: 2 is not in list"):
        load_causal_lm(model_config(tmp_path, "chatglm"))
