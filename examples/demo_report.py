"""What the demo learned: held-out measurements of each stage, and answers of the models before and after PPO."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from examples.sorting import LONGEST_COMPLETION, is_right, right_answer

NUM_SAMPLES_SHOWN = 6


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_and_last(rows: Sequence[dict[str, float]], key: str) -> tuple[float, float]:
    """A metric at its first and last appearance."""
    values = [row[key] for row in rows if key in row]
    return values[0], values[-1]


def print_stage(console: Console, stage: str, runs: Path) -> None:
    """One sentence on what a stage learned, from its metrics."""
    rows = read_rows(runs / f"demo-{stage}" / "metrics.jsonl")
    if stage == "ppo":
        score, kl = first_and_last(rows, "experience/score"), first_and_last(rows, "experience/kl_per_sample")
        console.print(
            f"[bold]PPO[/]: the reward model's score of the policy's answers rose from {score[0]:.2f} to "
            f"{score[1]:.2f}; KL to the SFT model is {kl[1]:.2f} nats an answer."
        )
    elif stage == "reward":
        accuracy = first_and_last(rows, "heldout/accuracy")
        console.print(
            f"[bold]Reward model[/]: prefers the better of two held-out answers in {accuracy[1]:.1%} of pairs, "
            f"{accuracy[0]:.1%} before training."
        )
    else:
        loss = first_and_last(rows, "heldout/loss")
        console.print(
            f"[bold]{'Pre-training' if stage == 'pretrain' else 'SFT'}[/]: held-out loss fell from {loss[0]:.3f} to "
            f"{loss[1]:.3f} nats a token (perplexity {math.exp(loss[1]):.2f})."
        )


def print_report(console: Console, runs: Path, seed: int, seconds: float) -> None:
    """Truth before and after PPO, reward, KL, and both models' answers side by side."""
    prompts = [str(row["prompt"]) for row in read_rows(runs / "demo-data" / "heldout.jsonl")]
    before = answers(runs / "demo-sft" / "model", prompts, seed)
    after = answers(runs / "demo-ppo" / "model", prompts, seed)
    rows = read_rows(runs / "demo-ppo" / "metrics.jsonl")
    score, kl = first_and_last(rows, "experience/score"), first_and_last(rows, "experience/kl_per_sample")
    accuracy = (accuracy_of(prompts, before), accuracy_of(prompts, after))

    console.rule("What PPO changed")
    table = Table("", "before PPO (SFT)", "after PPO", "change")
    table.add_row(
        "right answers, held-out lists", f"{accuracy[0]:.1%}", f"{accuracy[1]:.1%}",
        f"{100 * (accuracy[1] - accuracy[0]):+.1f} points",
    )  # fmt: skip
    table.add_row("reward model's score", f"{score[0]:.2f}", f"{score[1]:.2f}", f"{score[1] - score[0]:+.2f}")
    table.add_row("KL to the SFT model, nats", f"{max(kl[0], 0):.2f}", f"{kl[1]:.2f}", "")
    console.print(table)
    samples = Table("held-out prompt", "before PPO", "after PPO", "right answer")
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:NUM_SAMPLES_SHOWN]:
        samples.add_row(prompt, marked(prompt, old), marked(prompt, new), right_answer(prompt))
    console.print(samples)
    console.print(f"{len(prompts)} held-out lists, answers sampled at temperature 1. All four stages: {seconds:.0f} s.")


def answers(model_folder: Path, prompts: Sequence[str], seed: int) -> list[str]:
    """One answer to each prompt, sampled at temperature 1, as the policy is trained to."""
    torch.manual_seed(seed)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        output = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LONGEST_COMPLETION + 2
        )
    responses = output[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]


def accuracy_of(prompts: Sequence[str], responses: Sequence[str]) -> float:
    """Share of right answers, by the program that knows."""
    right = sum(is_right(prompt, response) for prompt, response in zip(prompts, responses, strict=True))
    return right / len(prompts)


def marked(prompt: str, response: str) -> str:
    """An answer, green if it is right and red if not."""
    return f"[{'green' if is_right(prompt, response) else 'red'}]{response}[/]"
