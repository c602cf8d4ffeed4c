"""A key that a run would not read is refused where it was set, and read where it means something."""

from __future__ import annotations

import pytest

from tests.launch.test_rules import refused

TEXT = "pretraining_data={train: runs/demo-data/pretrain.jsonl, max_tokens: 32"


@pytest.mark.parametrize("name", ["pretrain", "reward", "dpo", "methods/kto", "ppo"])
def test_what_is_learnt_of_demonstrations_is_said_for_sft(name: str) -> None:
    [(where, what)] = refused(name, "data.learn_from=everything")
    assert where == "data.learn_from"
    assert what.startswith("everything, which SFT alone reads, and this is ") and what.endswith("leave it out")


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "methods/kto", "ppo"])
def test_what_documents_become_is_said_for_pre_training(name: str) -> None:
    [(where, what)] = refused(name, "data.documents=pieces")
    assert where == "data.documents"
    assert what.startswith("pieces, which pre-training alone reads, and this is ")
    assert "leave it out" in what


def test_they_are_read_by_who_they_are_for_and_may_be_set_to_what_holds_anyway() -> None:
    assert refused("sft", "data.learn_from=everything", "data.documents=packed") == []
    for documents in ("packed", "pieces", "separate"):
        assert refused("pretrain", f"data.documents={documents}", "data.learn_from=response") == []
    assert refused("methods/ppo_ptx", f"{TEXT}, documents: pieces}}") == []
    [(where, _)] = refused("methods/ppo_ptx", f"{TEXT}, learn_from: everything}}")
    assert where == "pretraining_data.learn_from"


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo", "methods/kto"])
def test_experience_is_kept_where_there_is_some(name: str) -> None:
    assert refused(name, "run.keep_experience=false") == []
    [(where, what)] = refused(name, "run.keep_experience=true")
    assert where == "run.keep_experience"
    assert "and this run has none" in what and what.endswith("leave it out")
    assert refused("ppo", "run.keep_experience=true") == []


@pytest.mark.parametrize("name", ["methods/dpo_reference", "methods/kto"])
def test_a_reference_has_learnt_something(name: str) -> None:
    assert refused(name, "reference={model: {path: m}}") == []
    [(where, what)] = refused(name, "reference={model: {path: m, from_scratch: true}}")
    assert where == "reference.model.from_scratch"
    assert what.startswith("true, and random weights are nothing to be compared with; ")


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_weights_are_of_a_mixture_that_is_drawn_from(name: str) -> None:
    mixture = "data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]"
    assert refused(name, mixture, "data.heldout=[a.jsonl]") == []
    [(where, what)] = refused(name, mixture, "data.heldout=[a.jsonl, {path: b.jsonl, weight: 1}]")
    assert where == "data.heldout.1.weight"
    assert what == "1, and every held-out row is taken once; leave it out"


def test_what_is_normalised_on_has_no_weights() -> None:
    assert refused("reward", "normalise={by: demonstrations, data: [a.jsonl]}") == []
    [(where, what)] = refused("reward", "normalise={by: demonstrations, data: [{path: a.jsonl, weight: 2}]}")
    assert where == "normalise.data.0.weight"
    assert what == "2, and the first normalise.max_rows rows are taken, one source behind the other; leave it out"
