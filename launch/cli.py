"""The command line: ``troupe train CONFIG [key.sub=value ...]``, ``troupe check CONFIG [key.sub=value ...]``, and
``troupe serve-reward MODEL``.

Exit codes: 0 done; 1 a run failed; 2 nothing was started, because the configuration, the data, a model or the
cluster is not as it must be; 130 and 143 a run was stopped by Ctrl-C or SIGTERM, after writing a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cluster.errors import ClusterError, PlacementFailed, SessionError
from data.errors import DataError
from launch.configfile import load
from launch.errors import LaunchError
from launch.stopping import StopRequest

app = typer.Typer(
    help="Reinforcement learning from human feedback on a cluster, every model of a run an actor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="The run's YAML.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to it, such as policy.optimizer.learning_rate=1e-5.")
]
Traceback = Annotated[
    bool, typer.Option("--traceback", help="Where something is wrong, show the Python traceback as well.")
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    traceback: Traceback = False,
) -> None:
    """Carry out the run that CONFIG describes."""
    with _told_plainly(traceback):
        run_config = load(config, overrides or [])
        # Here, because it loads torch: a mistake in the configuration is told at once.
        from launch.run import run

        stop = StopRequest()
        result = run(run_config, resume=resume, stop=stop)
    console = Console(highlight=False, markup=False)
    if stop.signal is not None and result.stopped:
        console.print(
            f"stopped by {stop.signal.name} after step {result.steps}; a checkpoint is in {result.folder}; "
            "go on with --resume",
            soft_wrap=True,
        )
        raise typer.Exit(128 + stop.signal)
    console.print(f"done: {result.steps} steps; model in {result.folder / 'model'}", soft_wrap=True)


@app.command()
def check(config: ConfigPath, overrides: Overrides = None, traceback: Traceback = False) -> None:
    """Say whether CONFIG can run: its rules, models, data and places. Takes no accelerator."""
    with _told_plainly(traceback):
        run_config = load(config, overrides or [])
        from launch.check import check as check_run

        report = check_run(run_config)
    Console(highlight=False).print(report)
    raise typer.Exit(0 if report.ok else 2)


@app.command("serve-reward")
def serve_reward(
    model: Annotated[str, typer.Argument(help="The reward model: a Hugging Face folder, or a name on the hub.")],
    engine: Annotated[str, typer.Option(help="What scores: transformers or vllm.")] = "transformers",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all. It has no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    dtype: Annotated[str, typer.Option(help="Precision: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens of one forward pass, and so of one sample.")] = 8192,
    attention: Annotated[
        str | None,
        typer.Option(help="Of transformers: sdpa, which is the default, flash_attention_2 or eager. vLLM has its own."),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the Python code that the model brings.")] = False,
) -> None:
    """Serve MODEL as a reward by the protocol of docs/rewards.md, until it is interrupted."""
    # Here, because it loads torch.
    import torch

    from actors.config import ModelConfig
    from actors.errors import EngineDead, RoleError
    from actors.rewards.server import serve

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if engine == "vllm" and attention is not None:
            raise ValueError(f"--attention {attention} is for --engine transformers; vLLM has its own")
        config = ModelConfig.model_validate(
            {"path": model, "dtype": dtype, "attention": attention or "sdpa", "trust_remote_code": trust_remote_code}
        )
        serve(config, engine=engine, host=host, port=port, device=device, max_tokens=max_tokens)
    except (RoleError, ValueError, OSError) as error:
        Console(stderr=True, highlight=False).print(Text.assemble(("error", "bold red"), f": {error}"), soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, EngineDead) else 2) from error


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _told_plainly(traceback: bool) -> Iterator[None]:
    """End the process with the message alone of an error that is written for the user. Others keep their traceback."""
    try:
        yield
    except (LaunchError, DataError, ClusterError) as error:
        if traceback:
            raise
        message = Text.assemble(("error", "bold red"), f": {error}")  # not markup: messages hold brackets
        Console(stderr=True, highlight=False).print(message, soft_wrap=True)
        raise typer.Exit(_exit_code(error)) from error


def _exit_code(error: Exception) -> int:
    if isinstance(error, LaunchError):
        return error.exit_code
    return 2 if isinstance(error, DataError | SessionError | PlacementFailed) else 1
