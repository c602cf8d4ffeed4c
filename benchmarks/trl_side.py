"""One of TRL's trainers over one data file: the other side of `benchmarks.against_trl`.

Runs in an environment of TRL's own and imports nothing of this project. Prints one line of JSON: the seconds of the
second of two epochs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl


class EpochClock(transformers.TrainerCallback):  # type: ignore[misc]
    """Takes the time at the beginning and end of every epoch."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.began.append(time.perf_counter())

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.ended.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["sft", "dpo"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--reference-each-step", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    datasets.disable_progress_bars()
    common: dict[str, Any] = {
        "output_dir": str(given.out),
        "num_train_epochs": 2,
        "per_device_train_batch_size": given.micro_batch,
        "gradient_accumulation_steps": given.batch_size // given.micro_batch,
        "gradient_checkpointing": given.checkpointing,
        "learning_rate": 1e-4,
        "max_length": 512,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }
    rows = datasets.load_dataset("json", data_files=str(given.data), split="train", cache_dir=str(given.out / "cache"))
    clock = EpochClock()
    trainer: Any
    if given.method == "sft":
        trainer = trl.SFTTrainer(
            model=str(given.model), args=trl.SFTConfig(**common), train_dataset=rows, callbacks=[clock]
        )
    else:
        settings = trl.DPOConfig(**common, beta=0.1, precompute_ref_log_probs=not given.reference_each_step)
        trainer = trl.DPOTrainer(model=str(given.model), args=settings, train_dataset=rows, callbacks=[clock])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"seconds": clock.ended[1] - clock.began[1], "first_loss": losses[0], "num_steps": len(losses)}))


if __name__ == "__main__":
    main()
