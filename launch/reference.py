"""Writes docs/configuration.md from the configuration models: ``python -m launch.reference > docs/configuration.md``.

A test holds the committed file against this, so the page cannot fall behind the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from launch.config import (
    FeedbackRunConfig,
    OnlineRunConfig,
    PreferenceRunConfig,
    RewardModelRunConfig,
    SupervisedRunConfig,
)
from launch.fields import ANY_NAME, is_named, models_of, tag_of

INTRODUCTION = """\
# Configuration

One YAML describes a run; `algorithm.name` says of which kind it is. `key.sub=value` on the command line changes a value
(`data.train.0.path=a.jsonl` reaches into a list); unknown keys are refused with the nearest right name. The resolved
configuration, every default written out, is kept as `config.yaml` in the run's folder. Relative paths of runs, models
and data start at `$TROUPE_HOME`, or else at the current folder.

`troupe check CONFIG` says whether a run can start, and takes no accelerator. Rules between keys and the run's folder
are checked at once; it then loads torch, without which Transformers reads no model's configuration, and Ray, of whose
placement it asks. No weights are loaded, and Ray is started only to ask a cluster, or for GPUs of this machine.

This page is written by `make docs` from the configuration models."""

KINDS = (
    (
        "PPO, GRPO and their kin",
        OnlineRunConfig,
        "`algorithm.name: ppo`, or another of [algorithms.md](algorithms.md), which says what roles there are: up to "
        "five with a model, each in processes of its own. "
        "[`ray_config.yaml`](../ray_config.yaml) is a commented example.",
    ),
    (
        "Pre-training and SFT",
        SupervisedRunConfig,
        "`algorithm.name: pretrain` or `sft`. One trained role, the learner. "
        "[`examples/`](../examples) has one of each kind of run.",
    ),
    ("Reward models", RewardModelRunConfig, "`algorithm.name: reward_model`. One trained role, the learner."),
    (
        "Preference optimisation",
        PreferenceRunConfig,
        "`algorithm.name: dpo` or one of its kin. One trained role, the learner; the reference is a role of its own, "
        "or the learner's model as it starts, whose log-probs are computed once and kept beside the runs.",
    ),
    ("KTO", FeedbackRunConfig, "`algorithm.name: kto`. As preference optimisation, from responses judged one by one."),
)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    seen: set[type[BaseModel]] = set()
    for title, model, text in KINDS:
        parts.append(f"## {title}\n\n{text}\n\n{_table(model)}")
        for name, field in model.model_fields.items():
            parts += _sections(name, field, seen)
    return "\n\n".join(parts) + "\n"


def _sections(key: str, field: FieldInfo, seen: set[type[BaseModel]]) -> Iterator[str]:
    """The section of a block and of every block inside it, each model once."""
    found = models_of(field.annotation)
    key = f"{key}.{ANY_NAME}" if is_named(field.annotation) else key
    for model in found:
        if model in seen:
            continue
        seen.add(model)
        tag = tag_of(model) if len(found) > 1 else None
        title = f"`{key}`" if tag is None else f"`{key}` with `{tag[0]}: {tag[1]}`"
        yield f"### {title}\n\n{_first_sentence(model)}\n\n{_table(model)}"
        for name, inner in model.model_fields.items():
            yield from _sections(f"{key}.{name}", inner, seen)


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {_words(field.description)} |")
    return "\n".join(rows)


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _words(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "its defaults"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{default}`"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(argument) for argument in arguments if argument is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[0])} to {_type(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", date: "date"}
    return names.get(annotation, str(annotation))


if __name__ == "__main__":
    print(page(), end="")
