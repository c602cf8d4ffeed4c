"""Where relative paths of a configuration start: the one place that decides it.

Invariant: what leaves here is absolute, or is not a path of this file system (a URL, a hub name).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from actors.config import ModelConfig, RolloutConfig
from actors.rewards.config import AnyReward, FunctionRewardConfig, JudgeRewardConfig, ModelRewardConfig
from data.config import DataConfig, SourceConfig
from launch.errors import RunDirError

HOME_VARIABLE = "TROUPE_HOME"
#: Set by Ray, under this very name, in the process that a submitted job's command line runs in.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def home(environment: Mapping[str, str] = os.environ) -> Path:
    """Where relative paths start: ``$TROUPE_HOME``, or else the current folder."""
    return Path(environment.get(HOME_VARIABLE) or ".").expanduser().absolute()


def resolve(path: str, environment: Mapping[str, str] = os.environ) -> Path:
    """An absolute path: ``~`` is the user's home, a relative path starts at ``home()``."""
    return Path(os.path.normpath(home(environment) / Path(path).expanduser()))


def is_url(path: str) -> bool:
    """Whether ``path`` is not of this file system: an fsspec URL, or a name on a hub."""
    return "://" in path or path.startswith("hub:")


def resolve_source(path: str) -> str:
    """The path of a data source (a file, folder or glob made absolute; a URL or hub name as it is)."""
    return path if is_url(path) else str(resolve(path))


def resolve_model_path(path: str) -> str:
    """The path of a model: an existing folder made absolute; what can only be a path as well; else a hub name."""
    folder = resolve(path)
    return path if not folder.exists() and _HUB_NAME.fullmatch(path) else str(folder)


def resolve_model(model: ModelConfig) -> ModelConfig:
    """``model`` with its paths resolved."""
    tokenizer = None if model.tokenizer is None else resolve_model_path(model.tokenizer)
    return model.model_copy(update={"path": resolve_model_path(model.path), "tokenizer": tokenizer})


def resolve_data(data: DataConfig) -> DataConfig:
    """``data`` with the paths of its sources, and of its cache, resolved."""

    def resolved(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(source.model_copy(update={"path": resolve_source(source.path)}) for source in sources)

    cache_dir = None if data.cache_dir is None else str(resolve(data.cache_dir))
    sources = {"train": resolved(data.train), "heldout": resolved(data.heldout)}
    return data.model_copy(update={**sources, "cache_dir": cache_dir})


def resolve_reward(reward: AnyReward) -> AnyReward:
    """``reward`` with the path of its model, or of the file that its function is in, resolved."""
    match reward:
        case ModelRewardConfig() | JudgeRewardConfig():
            return reward.model_copy(update={"model": resolve_model(reward.model)})
        case FunctionRewardConfig(path=path):
            return reward.model_copy(update={"path": resolve_code(path)})
        case _:
            return reward


def resolve_code(path: str) -> str:
    """``path/to/file.py:name`` with the file made absolute; ``package.module:name`` as it is."""
    where, _, name = path.rpartition(":")
    return f"{resolve(where)}:{name}" if where.endswith(".py") else path


def resolve_rollout(rollout: RolloutConfig) -> RolloutConfig:
    """``rollout`` with the path of its environment's file resolved."""
    if (environment := rollout.environment) is None:
        return rollout
    found = environment.model_copy(update={"path": resolve_code(environment.path)})
    return rollout.model_copy(update={"environment": found})


def runs_root(root: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of all runs, absolute.

    Raises:
        RunDirError: it would lie in the working directory that Ray unpacked for a submitted job. Ray deletes that
            folder after the job, and the run with it.
    """
    places = (root, environment.get(HOME_VARIABLE) or ".")
    relative = not any(Path(place).expanduser().is_absolute() for place in places)
    if relative and _has_uploaded_working_dir(environment):
        raise RunDirError(
            f"run.root is {root!r}, a relative path, and this is a submitted job: its working directory is deleted "
            f"with the job, and the run's checkpoints with it; set run.root to an absolute path (or one that starts "
            f"with ~), or set {HOME_VARIABLE} to one in the job's env_vars"
        )
    return resolve(root, environment)


def _has_uploaded_working_dir(environment: Mapping[str, str]) -> bool:
    job = environment.get(JOB_VARIABLE)
    return bool(job) and bool((json.loads(job or "{}").get("runtime_env") or {}).get("working_dir"))
