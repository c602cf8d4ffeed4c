"""From a YAML file and overrides to a ``RunConfig``, or to every problem in it at once, in the user's terms.

Invariant: importing and using this module imports no torch and no Ray.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TypeAlias, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from algorithms.config import PreferenceLoss
from algorithms.needs import BUILT_IN
from launch.config import (
    AnyLearnerRunConfig,
    BaseRunConfig,
    FeedbackRunConfig,
    LearnerRunConfig,
    OnlineRunConfig,
    PreferenceRunConfig,
    RewardModelRunConfig,
    RunConfig,
    SupervisedRunConfig,
)
from launch.errors import ConfigError, Problem, RuleViolations
from launch.fields import Path, Place, dotted, leaves, model_of, models_of, required, tag_of, walk
from launch.rules import violations
from launch.yamltree import YamlTree, to_yaml

RunKind: TypeAlias = type[OnlineRunConfig] | type[AnyLearnerRunConfig]
ALGORITHMS: Mapping[str, RunKind] = {
    **dict.fromkeys(BUILT_IN, OnlineRunConfig),
    "pretrain": SupervisedRunConfig,
    "sft": SupervisedRunConfig,
    "reward_model": RewardModelRunConfig,
    **dict.fromkeys(get_args(PreferenceLoss), PreferenceRunConfig),
    "kto": FeedbackRunConfig,
}


def load(path: str | FilePath, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value``, later ones win; values are YAML, list items go by index
            (``data.train.0.path=a.jsonl``).

    Raises:
        ConfigError: with every problem, each with its key, its line, and what would be right.
    """
    tree = YamlTree.read(FilePath(path))
    problems = [problem for text in overrides if (problem := tree.override(text))]
    kind, unclear = _kind(tree)
    try:
        config = kind.model_validate(tree.values)
    except ValidationError as error:
        problems += unclear or []
        problems += _problems(tree, kind, error, skip_algorithm=bool(unclear))
    else:
        problems += unclear
        if not problems:
            return config
    raise ConfigError(tree.source, problems)


def dump(config: BaseRunConfig) -> str:
    """``config`` as YAML, every default written out; ``load`` of it gives ``config`` back."""
    return to_yaml(config.model_dump(mode="json"))


def changes(before: FilePath, config: BaseRunConfig) -> list[str]:
    """What ``config`` has otherwise than the file that ``dump`` wrote before: ``key: old -> new``, in its order.

    Raises:
        ConfigError: the file is no YAML.
    """
    old, new = _flat(YamlTree.read(before).values), _flat(config.model_dump(mode="json"))
    keys = [*new, *(key for key in old if key not in new)]
    shown = [(key, *(json.dumps(side[key]) if key in side else "none" for side in (old, new))) for key in keys]
    return [f"{key}: {was} -> {now}" for key, was, now in shown if was != now]


def _flat(value: object, path: Path = ()) -> dict[str, object]:
    """Every value in a tree, by its dotted key."""
    inside: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    if not inside:
        return {dotted(path): value}
    return {key: leaf for name, held in inside for key, leaf in _flat(held, (*path, str(name))).items()}


def _kind(tree: YamlTree) -> tuple[RunKind, list[Problem]]:
    """The model that the file is of, with what is wrong about the key that says so."""
    guess: RunKind = SupervisedRunConfig if "learner" in tree.values else OnlineRunConfig
    names = ", ".join(ALGORITHMS)
    section = tree.values.get("algorithm")
    if not isinstance(section, dict) or "name" not in section:
        return guess, [Problem(tree.where(("algorithm", "name")), "is missing", f"one of {names}")]
    name = section["name"]
    if isinstance(name, str) and name in ALGORITHMS:
        return ALGORITHMS[name], []
    if isinstance(name, str) and ":" in name:  # an algorithm of the user's own, by its import path
        return OnlineRunConfig, []
    return guess, [Problem(tree.where(("algorithm", "name")), f"there is no algorithm {name!r}", f"one of {names}")]


def _problems(
    tree: YamlTree, kind: type[BaseRunConfig], error: ValidationError, skip_algorithm: bool
) -> Iterator[Problem]:
    details = error.errors(include_url=False)
    places = [walk(kind, detail["loc"]) for detail in details]
    paths = [place.path for place in places]
    for detail, place, path in zip(details, places, paths, strict=True):
        if skip_algorithm and path[:1] == ("algorithm",):
            continue
        # A list whose items are wrong is also called too short: the items' own errors say it better.
        if detail["type"] == "too_short" and any(other[: len(path)] == path != other for other in paths):
            continue
        yield from _problem(tree, kind, detail, place)
    if any(path for path in paths):  # else the rules have run: only whole configurations get that far
        yield from _located(tree, violations(kind.RULES, _valid_sections(tree.values, kind)))


def _valid_sections(values: Mapping[str, object], kind: type[BaseRunConfig]) -> dict[str, object]:
    sections: dict[str, object] = {}
    for name, info in kind.model_fields.items():
        if name not in values:
            if not info.is_required():
                sections[name] = info.get_default(call_default_factory=True)
            continue
        try:
            sections[name] = TypeAdapter(info.rebuild_annotation()).validate_python(values[name])
        except ValidationError:
            continue  # its problems are already in the list that is being made
    return sections


def _located(tree: YamlTree, problems: Sequence[Problem]) -> Iterator[Problem]:
    for problem in problems:
        yield Problem(tree.where(problem.where.split(".")), problem.what, problem.right)


def _problem(tree: YamlTree, kind: type[BaseRunConfig], detail: ErrorDetails, place: Place) -> Iterator[Problem]:
    cause, path = detail.get("ctx", {}).get("error"), place.path
    if isinstance(cause, RuleViolations):
        yield from _located(tree, cause.problems)
    elif detail["type"] == "extra_forbidden":
        yield _unknown_key(tree, kind, path, walk(kind, detail["loc"][:-1]).model)
    elif detail["type"] == "missing":
        yield _missing(tree, place)
    elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        yield _no_such_kind(tree, detail, place)
    elif cause is not None:
        yield Problem(tree.where(path), str(cause))
    else:
        yield Problem(tree.where(path), *_wrong_value(detail, place))


def _unknown_key(tree: YamlTree, kind: type[BaseRunConfig], path: Path, owner: type[BaseModel] | None) -> Problem:
    key, where = str(path[-1]), tree.where(path)
    if len(path) == 1 and issubclass(kind, LearnerRunConfig) and key in OnlineRunConfig.model_fields:
        name = _algorithm(tree)
        right = "remove the section (the model that is trained is `learner`), or set algorithm.name to ppo"
        return Problem(where, f"{name} trains one model, the learner, and has no {key}", right)
    if len(path) == 1 and kind is OnlineRunConfig and key in LearnerRunConfig.model_fields:
        right = "call it `policy`, or set algorithm.name to pretrain, sft, reward_model, dpo ..."
        return Problem(where, f"{_algorithm(tree)} trains {_trained(tree)} and has no {key}", right)
    known = list(owner.model_fields) if owner else []
    elsewhere = [leaf.path for leaf in leaves(kind) if leaf.path[-1] == key]
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        right = f"did you mean {close[0]!r}?"
    elif elsewhere:
        nearest = max(elsewhere, key=lambda found: (found[0] == path[0], -len(found)))
        right = f"did you mean {dotted(nearest)}?"
    else:
        right = f"the keys here are {', '.join(known)}"
    return Problem(where, "unknown key", right)


def _missing(tree: YamlTree, place: Place) -> Problem:
    path = place.path
    purpose = (place.info.description or "").rstrip(".") if place.info else ""
    model = model_of(place.annotation)
    least = ", ".join(dotted((*path, *key)) for key in required(model)) if model else ""
    if len(path) > 1:
        return Problem(tree.where(path), "is missing", f"{purpose}: at least {least}" if least else purpose)
    what = f"the section is missing, and {_algorithm(tree)} needs it ({purpose[:1].lower()}{purpose[1:]})"
    return Problem(tree.where(path), what, f"add it with at least {least}" if least else "add it")


def _no_such_kind(tree: YamlTree, detail: ErrorDetails, place: Place) -> Problem:
    """The key that says which of several sections it is has no value, or none that is known."""
    tags = [tag for model in models_of(place.annotation) if (tag := tag_of(model)) is not None]
    names = [name for _, name in tags]
    where = tree.where((*place.path, tags[0][0]))
    if detail["type"] == "union_tag_not_found":
        return Problem(where, "is missing", f"one of {', '.join(names)}")
    given = str(detail["ctx"]["tag"])
    close = difflib.get_close_matches(given, names, n=1)
    return Problem(where, f"{given!r} is none of {', '.join(names)}", f"did you mean {close[0]!r}?" if close else "")


def _trained(tree: YamlTree) -> str:
    known = BUILT_IN.get(str(_algorithm(tree)))
    return "`policy` and `critic`" if known is not None and known.critic else "`policy`"


def _algorithm(tree: YamlTree) -> object:
    section = tree.values.get("algorithm")
    return section.get("name", "a run") if isinstance(section, dict) else "a run"


def _wrong_value(detail: ErrorDetails, place: Place) -> tuple[str, str]:
    value, message = detail["input"], detail["msg"]
    if detail["type"] == "literal_error" and isinstance(value, str):
        options = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        close = difflib.get_close_matches(value, options, n=1)
        return f"{value!r} is none of {', '.join(options)}", f"did you mean {close[0]!r}?" if close else ""
    if detail["type"] == "string_type":
        return f"{value!r} is not text", "put it in quotes" if isinstance(value, int | float) else "text"
    if detail["type"] in ("too_short", "too_long"):
        limits = detail["ctx"]
        right = f"at least {limits['min_length']}" if "min_length" in limits else f"at most {limits['max_length']}"
        return f"has {limits['actual_length']} items", right
    if detail["type"] == "tuple_type":
        return f"{value!r} is not a list", "e.g. [a, b]"
    if detail["type"] == "model_type":
        owner = place.model
        keys = f"keys below it: {', '.join(owner.model_fields)}" if owner else "keys below it"
        return f"{value!r} is not a section", keys
    right = message.removeprefix("Input ").removeprefix("String ").partition(", unable to")[0]
    return f"{value!r} is not right", f"it {right[:1].lower()}{right[1:]}"
