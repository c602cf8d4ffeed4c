"""Walks the fields of configuration models: which model stands at a path, which leaves hang below it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.fields import FieldInfo

#: Keys and list indices from the top of a configuration.
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value and not a section."""

    path: tuple[str, ...]
    info: FieldInfo


def model_of(annotation: object) -> type[BaseModel] | None:
    """The model in ``M``, ``M | None`` or ``tuple[M, ...]``; none where the annotation holds no model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in typing.get_args(annotation) if (model := model_of(part))), None)


def model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model whose keys stand below ``path``; none where ``path`` leads to a value or to nothing."""
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        inner = None if info is None else model_of(info.annotation)
        if inner is None:
            return None
        model = inner
    return model


def info_at(model: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """The field at ``path``, or none."""
    names = [part for part in path if isinstance(part, str)]
    owner = model_at(model, names[:-1])
    return owner.model_fields.get(names[-1]) if owner is not None and names else None


def leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every field that holds a value, in the order of the models."""
    for name, info in model.model_fields.items():
        inner = model_of(info.annotation)
        if inner is None:
            yield Leaf((*prefix, name), info)
        else:
            yield from leaves(inner, (*prefix, name))


def required(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """The paths below ``model`` that have no default: what a section must at least say."""
    for name, info in model.model_fields.items():
        if info.is_required():
            inner = model_of(info.annotation)
            if inner is None:
                yield (name,)
            else:
                yield from ((name, *rest) for rest in required(inner))


def dotted(path: Sequence[str | int]) -> str:
    """``("data", "train", 0)`` as ``data.train.0``."""
    return ".".join(str(part) for part in path)
