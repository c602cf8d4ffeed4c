"""Each rule between keys of a configuration: what breaks it is named, what keeps it passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config import OnlineRunConfig
from launch.configfile import load
from launch.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
#: PPO with every role on GPUs of its own.
ON_GPUS = tuple(f"{role}.gpus_per_rank=1" for role in ("policy", "critic", "reference", "reward", "rollout"))


def refused(name: str, *overrides: str) -> list[tuple[str, str]]:
    """(key, the rest of the problem) of everything that is wrong; empty if nothing is."""
    try:
        load(EXAMPLES / f"{name}.yaml", overrides)
    except ConfigError as error:
        return [(problem.where.partition(" ")[0], f"{problem.what}; {problem.right}") for problem in error.problems]
    return []


def test_groups_and_minibatches_divide() -> None:
    assert refused("ppo", "rollout.sampling.samples_per_prompt=3", "online.scoring_batch_size=2") == [
        ("online.batch_size", "256 is not a multiple of rollout.sampling.samples_per_prompt = 3; 255 or 258 would be"),
        ("online.scoring_batch_size", "2 is not a multiple of rollout.sampling.samples_per_prompt = 3; 3 would be"),
    ]
    assert refused("ppo", "rollout.sampling.samples_per_prompt=4") == []


def test_online_has_an_end() -> None:
    [(where, what)] = refused("ppo", "run.num_iterations=null")
    assert where == "run.num_iterations"
    assert "an online run has no end of its own" in what
    [(where, what)] = refused("ppo", "run.num_iterations=3")
    assert where == "algorithm.critic_warmup_iterations"
    assert "3 leaves the policy none of run.num_iterations = 3" in what


def test_a_reference_of_its_own_is_of_use() -> None:
    assert refused("methods/dpo_reference", "reference.model.dtype=bfloat16", "reference.sharding=zero3") == []
    assert refused("methods/kto", "reference={model: {path: runs/demo-sft/model}}") == []
    words = ("reference.max_tokens_per_pack=31", "reference.gpus_per_rank=2", "reference.colocate=learner")
    assert [where for where, _ in refused("methods/dpo_reference", *words)] == [
        "reference.colocate", "reference.max_tokens_per_pack", "reference.gpus_per_rank"
    ]
    [(where, what)] = refused("methods/simpo", "reference={model: {path: runs/demo-sft/model}}")
    assert where == "reference" and "simpo compares with no reference" in what
    [(where, what)] = refused("sft", "reference={model: {path: runs/demo-sft/model}}")
    assert where == "reference" and "has no reference" in what


def test_reference_and_learner_are_placed_one_after_the_other() -> None:
    words = ("learner.cpus_per_rank=2", "reference.cpus_per_rank=3")
    config = load(EXAMPLES / "methods" / "dpo_reference.yaml", words)
    assert set(config.placements_before()) == {"source", "reference"}
    assert set(config.placements()) == {"source", "learner"}
    assert config.cpus_wanted() == 2 * 3 + 0.5
    assert load(EXAMPLES / "dpo.yaml").placements_before() == {}


def test_margins_are_asked_for_by_one_loss() -> None:
    assert refused("reward", "data.margins=small") == []
    for name, reader in (
        ("methods/reward_soft_labels", "algorithm.loss soft_labels"),
        ("methods/reward_best_of", "algorithm.loss best_of"),
        ("sft", "sft"),
        ("dpo", "dpo"),
        ("methods/kto", "kto"),
        ("ppo", "ppo"),
    ):
        [(where, what)] = refused(name, "data.margins=small")
        assert where == "data.margins" and f"loss `ranking` alone, and this is {reader}; leave it out" in what
    text = "pretraining_data={train: runs/demo-data/pretrain.jsonl, max_tokens: 32, margins: {better: 1}}"
    assert "pretraining_data.margins" in [where for where, _ in refused("methods/ppo_ptx", text)]


def test_an_adaptive_coefficient_starts_above_zero() -> None:
    assert [where for where, _ in refused("ppo", "algorithm.kl={coefficient: 0, target: 6}")] == [
        "algorithm.kl.coefficient"
    ]
    assert refused("ppo", "algorithm.kl={coefficient: 0}") == []


def test_the_longest_sample_fits() -> None:
    assert refused("ppo", "rollout.max_model_tokens=25", "critic.max_tokens_per_pack=20") == [
        (
            "rollout.max_model_tokens",
            "25 is less than the longest sample, data.max_tokens 16 + rollout.sampling.max_response_tokens 10 = 26 "
            "tokens; at least 26, or a smaller part",
        ),
        (
            "critic.max_tokens_per_pack",
            "20 is less than the longest sample, data.max_tokens 16 + rollout.sampling.max_response_tokens 10 = 26 "
            "tokens; at least 26",
        ),
    ]
    assert refused("ppo", "rollout.max_model_tokens=26", "critic.max_tokens_per_pack=26") == []


def test_a_comparison_is_two_sequences() -> None:
    assert refused("sft", "learner.max_tokens_per_pack=32") == []
    [(where, what)] = refused("reward", "learner.max_tokens_per_pack=63")
    assert where == "learner.max_tokens_per_pack"
    assert what.endswith("= 64 tokens; at least 64")
    assert refused("reward", "learner.max_tokens_per_pack=64") == []


def test_evaluation_needs_data_and_patience_needs_evaluation() -> None:
    changes = ("data.heldout=[]", "algorithm.early_stopping_patience=2")
    assert [where for where, _ in refused("sft", *changes)] == ["algorithm.evaluate_every"]
    changes = ("algorithm.evaluate_every=null", "algorithm.early_stopping_patience=2")
    assert [where for where, _ in refused("sft", *changes)] == ["algorithm.early_stopping_patience"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (("policy.model.attention=flash_attention_2",), "policy.model.attention"),
        (("reward.model.attention=flash_attention_2", "reward.gpus_per_rank=1"), "reward.model.attention"),
        (("policy.zero.offload_optimizer=true",), "policy.zero.offload_optimizer"),
        (("critic.gpus_per_rank=2",), "critic.gpus_per_rank"),
        (("rollout.tensor_parallel_size=2",), "rollout.tensor_parallel_size"),
        (("rollout.tensor_parallel_size=2", "rollout.gpus_per_rank=1"), "rollout.gpus_per_rank"),
        (("rollout.gpus_per_rank=2",), "rollout.gpus_per_rank"),
        (("rollout.gpus_per_rank=0.5", "rollout.kv_cache_bytes=null"), "rollout.gpu_memory_fraction"),
        (("rollout.weight_transfer=nccl",), "rollout.weight_transfer"),
        (("rollout.weight_transfer=nccl", "rollout.gpus_per_rank=1"), "rollout.weight_transfer"),
        ((*ON_GPUS, "rollout.weight_transfer=ipc"), "rollout.weight_transfer"),
        ((*ON_GPUS, "rollout.weight_transfer=shared_memory"), "rollout.weight_transfer"),
        # A resource that only stands for a GPU gives no GPU.
        ((*ON_GPUS, "rollout.weight_transfer=nccl", "cluster.accelerator_resource=slot"), "rollout.weight_transfer"),
    ],
)
def test_what_needs_a_gpu_has_one(changes: tuple[str, ...], where: str) -> None:
    assert [found for found, _ in refused("ppo", *changes)] == [where]


def test_gpu_settings_that_fit_pass() -> None:
    assert refused("ppo", *ON_GPUS, "policy.zero.offload_optimizer=true", "rollout.weight_transfer=nccl") == []
    tensor_parallel = ("rollout.tensor_parallel_size=2", "rollout.gpus_per_rank=2")
    attention = ("policy.model={path: m, attention: flash_attention_2}",)
    assert refused("ppo", *ON_GPUS, *tensor_parallel, *attention) == []


def shared(**fractions: float) -> list[str]:
    """Overrides that colocate roles, each with a fraction of the GPU and two ranks."""
    return [
        change
        for role, fraction in fractions.items()
        for change in (f"{role}.gpus_per_rank={fraction}", f"{role}.colocate=pair", f"{role}.ranks_per_node=2")
    ]


def test_colocated_roles_share_one_accelerator_rank_by_rank() -> None:
    assert refused("ppo", *shared(policy=0.6, critic=0.4)) == []
    [(where, what)] = refused("ppo", *shared(policy=0.6, critic=0.6))
    assert where == "policy.gpus_per_rank"
    assert "policy 0.6 + critic 0.6 = 1.2" in what
    [(where, what)] = refused("ppo", *shared(policy=0.5, critic=0.5), "critic.ranks_per_node=1")
    assert where == "critic.colocate"
    assert "critic has 1 x 1 ranks laid out PACK and policy has 1 x 2 ranks laid out PACK" in what


def test_a_group_of_one_is_a_slip_of_the_pen() -> None:
    changes = [*shared(policy=0.5, critic=0.5), "reference.colocate=piar"]
    [(where, what)] = refused("ppo", *changes)
    assert where == "reference.colocate"
    assert what.startswith("reference is alone in group 'piar'; ")
    assert "(groups here: piar, pair)" in what


def test_weights_between_processes_on_one_gpu_go_by_ipc() -> None:
    both = [*shared(policy=0.5, rollout=0.5), "rollout.gpu_memory_fraction=0.4"]
    assert refused("ppo", *both, "rollout.weight_transfer=ipc") == []
    [(where, what)] = refused("ppo", *both, "rollout.weight_transfer=nccl")
    assert where == "rollout.weight_transfer"
    assert what.endswith("; ipc")


def test_a_group_does_not_take_a_role_in_by_its_name() -> None:
    both = ["policy.colocate=critic", "rollout.colocate=critic", "policy.ranks_per_node=1"]
    assert refused("ppo", *both) == [
        ("policy.colocate", "'critic' names a role that is not in this group; give critic the same `colocate`")
    ]
    assert refused("ppo", *both, "critic.colocate=critic") == []
    [(where, what)] = refused("ppo", *(change.replace("=critic", "=source") for change in both))
    assert (where, what) == ("policy.colocate", "'source' names a role that is not in this group; choose another name")


def test_engines_run_an_adapter_that_is_there_and_that_vllm_takes() -> None:
    lora = "policy.tuning={method: lora, lora: {rank: 4}}"
    assert refused("ppo", "rollout.lora=adapter", lora) == []
    assert refused("ppo", "rollout.lora=adapter", "policy.tuning={method: qlora, lora: {use_rslora: true}}") == []
    [(where, what)] = refused("ppo", "rollout.lora=adapter")
    assert (where, what) == ("rollout.lora", "adapter, but policy.tuning.method is full: there is none; merged")
    for change, message in (("use_dora: true", "vLLM's LoRA has no DoRA"), ("rank: 513", "vLLM takes at most 512")):
        [(where, what)] = refused("ppo", "rollout.lora=adapter", f"policy.tuning={{method: lora, lora: {{{change}}}}}")
        assert where == "rollout.lora" and message in what
    on_gpus = (*ON_GPUS, "rollout.lora=adapter", lora)
    assert refused("ppo", *on_gpus) == refused("ppo", *on_gpus, "rollout.weight_transfer=shared_memory") == []
    [(where, what)] = refused("ppo", *on_gpus, "rollout.weight_transfer=nccl")
    assert (where, what) == ("rollout.weight_transfer", "nccl, but adapters travel through shared memory; auto")


def test_what_is_recomputed_for_older_samples_needs_a_correction() -> None:
    recomputed = "algorithm.recompute_logprobs=true"
    assert refused("ppo", recomputed) == refused("ppo", "online.max_staleness=2") == []
    [(where, what)] = refused("ppo", recomputed, "online.max_staleness=2")
    assert where == "algorithm.recompute_logprobs"
    assert "with online.max_staleness = 2 older ones drew the samples" in what and "correction.method" in what
    assert refused("ppo", recomputed, "online.max_staleness=2", "algorithm.correction.method=truncated") == []
    assert refused("ppo", "online.max_staleness=2", "algorithm.correction.method=decoupled") == []


@pytest.mark.parametrize(("key", "value", "whole"), [("top_p", "0.9", "1"), ("top_k", "50", "0")])
def test_what_is_trained_on_is_drawn_from_the_whole_distribution(key: str, value: str, whole: str) -> None:
    cut = f"rollout.sampling.{key}={value}"
    [(where, what)] = refused("ppo", cut)
    assert where == f"rollout.sampling.{key}"
    assert what.startswith(f"{value}: the engine's log-probs are then of what this leaves of the distribution")
    assert f"; {whole}; or algorithm.recompute_logprobs" in what
    assert refused("ppo", cut, "algorithm.recompute_logprobs=true") == []
    assert refused("ppo", cut, "algorithm.correction.method=truncated") == []
    assert refused("ppo", f"rollout.sampling.{key}={whole}") == []
    # A baseline is compared with and not trained on.
    assert refused("methods/initial_baseline", f"baseline.sampling.{key}={value}") == []


def test_a_critic_is_there_where_the_algorithm_needs_one() -> None:
    [(where, what)] = refused("methods/grpo", "critic={model: {path: m}, optimizer: {learning_rate: 1.0e-5}}")
    assert (where, what) == ("critic", "grpo learns without a critic; remove the section, or set algorithm.name to ppo")
    found = refused("methods/grpo", "algorithm={name: ppo}")
    assert found == [
        (
            "critic",
            "the section is missing, and ppo needs it (the model that estimates what a prefix is worth); add it "
            "with at least critic.model.path, critic.optimizer.learning_rate",
        )
    ]


def test_a_kl_penalty_has_a_reference_or_an_adapter() -> None:
    with_kl = ("algorithm.kl.coefficient=0.1",)
    [(where, what)] = refused("methods/dr_grpo", *with_kl)
    assert where == "reference"
    assert what.startswith("the section is missing, and algorithm.kl.coefficient 0.1 needs it (the model that")
    assert what.endswith("add it with at least reference.model.path; or set algorithm.kl.coefficient to 0")
    assert refused("methods/dr_grpo", *with_kl, "policy.tuning={method: lora}") == []
    config = load(EXAMPLES / "methods" / "dr_grpo.yaml", [*with_kl, "policy.tuning={method: lora}"])
    assert isinstance(config, OnlineRunConfig) and config.policy_is_reference
    assert config.placements().keys() == {"policy", "reward", "rollout", "credit", "source"}
    # Who the reference is does not move the penalty.
    role = load(EXAMPLES / "methods" / "dr_grpo.yaml", [*with_kl, "reference={model: {path: m}}"])
    assert isinstance(role, OnlineRunConfig) and not role.policy_is_reference
    assert config.algorithm.kl == role.algorithm.kl and config.algorithm.kl.in_loss


def test_a_moving_average_is_the_reference_alone() -> None:
    average = ("policy.ema_decay=0.9", "policy.ema_is_reference=true")
    [(where, what)] = refused("methods/grpo", *average)
    assert (where, what) == (
        "reference",
        "policy.ema_is_reference makes the policy's moving average the reference, and there is one; remove the "
        "section, or policy.ema_is_reference",
    )
    for coefficient in (0.1, 0.0):  # at 0 the distance is measured, as that to a role is
        words = [*average, "reference=null", f"algorithm.kl.coefficient={coefficient}"]
        config = load(EXAMPLES / "methods" / "grpo.yaml", words)
        assert isinstance(config, OnlineRunConfig) and config.policy_is_reference
        assert "reference" not in config.placements()
    [(where, _)] = refused("methods/grpo", "policy.ema_decay=0.9", "reference=null")
    assert where == "reference"


def test_what_compares_responses_has_several() -> None:
    one = "rollout.sampling.samples_per_prompt=1"
    [(where, what)] = refused("methods/grpo", one)
    assert (where, what.partition(";")[0]) == (
        "rollout.sampling.samples_per_prompt", "1, and grpo compares several responses to a prompt"
    )
    assert refused("methods/reinforce_plus_plus", one) == []
    [(where, _)] = refused("methods/reinforce_plus_plus", one, "online.max_redraws=3")
    assert where == "online.max_redraws"
    overlong = "total.shaping.overlong={kind: overlong, margin_tokens: 11}"
    [(where, what)] = refused("methods/grpo", overlong)
    assert (where, what) == (
        "total.shaping.overlong.margin_tokens",
        "11 is more than the longest response, 10 tokens; at most 10",
    )


def test_a_mistake_elsewhere_does_not_hide_a_missing_role() -> None:
    found = refused("methods/grpo", "algorithm={name: ppo}", "run.sede=1")
    assert [where for where, _ in found] == ["run.sede", "critic"]


def test_ones_own_algorithm_is_an_online_run() -> None:
    [(where, what)] = refused("methods/grpo", "algorithm={name: 'no_such_module:MINE'}")
    assert where == "algorithm.name"
    assert "module no_such_module cannot be imported" in what


def test_engines_with_the_initial_weights_are_there_where_they_are_the_baseline() -> None:
    one = "baseline={sampling: {max_response_tokens: 4}}"
    assert refused("methods/initial_baseline") == []
    [(where, what)] = refused("methods/rloo", one)
    assert (where, what.partition(";")[0]) == ("baseline", "rloo compares with no initial model")
    [(where, what)] = refused("methods/rloo", "algorithm={name: initial_baseline}")
    assert where == "baseline"
    assert what.endswith("add it with at least baseline.sampling.max_response_tokens")
    [(where, _)] = refused("methods/initial_baseline", "baseline.sampling.samples_per_prompt=2")
    assert where == "baseline.sampling.samples_per_prompt"
    [(where, _)] = refused("methods/initial_baseline", "baseline.sampling.max_response_tokens=11")
    assert where == "baseline.sampling.max_response_tokens"
    config = load(EXAMPLES / "methods" / "initial_baseline.yaml")
    assert "baseline" in config.placements()


def test_text_is_mixed_in_where_it_is_given() -> None:
    [(where, what)] = refused("ppo", "algorithm.pretraining.coefficient=2")
    assert (where, what) == ("algorithm.pretraining", "is set, and there is no text to mix in; add pretraining_data")
    text = "pretraining_data={train: a.txt, max_tokens: 513}"
    assert [where for where, _ in refused("ppo", text)] == ["policy.max_tokens_per_pack"]
    config = load(EXAMPLES / "methods" / "ppo_ptx.yaml")
    assert "pretraining_source" in config.placements()
