"""Walks the fields of configuration models: which model stands at a path, which leaves hang below it.

A field may hold one model, one of several that a key tells apart (`kind`), or a mapping from names to such models.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

#: Keys and list indices from the top of a configuration.
Path = tuple[str | int, ...]
#: Stands in paths for the names that a configuration gives.
ANY_NAME = "NAME"


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value and not a section."""

    path: tuple[str, ...]
    info: FieldInfo


@dataclass(frozen=True)
class Place:
    """Where an error stands: its ``path`` as the file has it, and what the models say of it.

    ``annotation`` is of what stands there, ``info`` of the field; none where the models know of no such place.
    """

    path: Path
    annotation: object
    info: FieldInfo | None

    @property
    def model(self) -> type[BaseModel] | None:
        """The model whose keys stand here, where it is clear which."""
        found = models_of(self.annotation)
        return found[0] if len(found) == 1 and not is_named(self.annotation) else None


def models_of(annotation: object) -> tuple[type[BaseModel], ...]:
    """The models in ``M``, ``M | None``, ``M | N``, ``tuple[M, ...]`` or ``dict[str, M]``, in their order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(dict.fromkeys(model for part in get_args(annotation) for model in models_of(part)))


def model_of(annotation: object) -> type[BaseModel] | None:
    """The first of ``models_of``; none where the annotation holds no model."""
    return next(iter(models_of(annotation)), None)


def is_named(annotation: object) -> bool:
    """Whether it is a mapping from names that the configuration gives to models."""
    return get_origin(_plain(annotation)) is dict and bool(models_of(annotation))


def tag_of(model: type[BaseModel]) -> tuple[str, str] | None:
    """The key that tells a model from the others in its place, and its value: ``("kind", "http")``."""
    for name, info in model.model_fields.items():
        if get_origin(info.annotation) is Literal and len(values := get_args(info.annotation)) == 1:
            return name, values[0]
    return None


def walk(model: type[BaseModel], location: Sequence[str | int]) -> Place:
    """The place of an error of pydantic's, which puts the value of the key into a path where it chose by one."""
    annotation: object = model
    info: FieldInfo | None = None
    path: list[str | int] = []
    for part in location:
        annotation = _plain(annotation)
        if get_origin(annotation) in (Union, UnionType):
            member = next((one for one in models_of(annotation) if (tag_of(one) or ("", ""))[1] == part), None)
            if member is None:
                break  # one of several types of a value
            annotation = member
            continue
        path.append(part)
        if get_origin(annotation) is dict:
            annotation, info = get_args(annotation)[1], None
        elif get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(part, str):
            info = annotation.model_fields.get(part)
            annotation = None if info is None else info.annotation
        else:
            annotation = info = None
    return Place(tuple(path), annotation, info)


def leaves(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every field that holds a value, in the order of the models."""
    for name, info in model.model_fields.items():
        below = (*prefix, name, ANY_NAME) if is_named(info.annotation) else (*prefix, name)
        found = models_of(info.annotation)
        if not found:
            yield Leaf(below, info)
        for inner in found:
            yield from leaves(inner, below)


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


def _plain(annotation: object) -> object:
    """Without what is annotated to it, and without none."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [part for part in get_args(annotation) if part is not type(None)]
        if len(others) == 1:
            return _plain(others[0])
        if len(others) < len(get_args(annotation)):
            return typing.Union[tuple(others)]  # noqa: UP007  of a list that is made here
    return annotation
