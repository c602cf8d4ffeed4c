"""What a run needs of its environment, as far as it can be known without an episode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.config import OnlineRunConfig, RunConfig
from launch.errors import Problem
from launch.paths import resolve_rollout

if TYPE_CHECKING:
    from launch.check_models import Facts


def check_environment(config: RunConfig, facts: Facts) -> Iterator[Problem]:
    """Whether there is such an environment, and its columns are kept. Adds what it is to ``facts``."""
    if not isinstance(config, OnlineRunConfig):
        return
    if (environment := resolve_rollout(config.rollout).environment) is None:
        return
    # Here, because torch is loaded with it.
    from actors.environments.episodes import load_environment
    from actors.errors import RolloutError

    try:
        found = load_environment(environment)
    except RolloutError as error:
        yield Problem("rollout.environment", str(error).removeprefix("rollout.environment."))
        return
    wanted, kept = found.needs_columns, config.data.keep_columns
    reads = f", which reads {', '.join(wanted)}" if wanted else ""
    facts.append(("rollout.environment", f"environment {environment.path}{reads}"))
    for column in wanted:
        if column not in kept:
            what = f"{environment.path} needs the column {column!r} of the prompts' rows"
            yield Problem("rollout.environment.path", what, f"data.keep_columns: [{', '.join((*kept, column))}]")
