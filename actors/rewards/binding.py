"""How a reward function is found by its path, and what it is given.

It names what it wants: ``prompt``, ``response``, ``finished``, and columns of the prompt's row, by the names of its
parameters; ``**columns`` takes all columns that no parameter names. A batched one is given lists.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import RewardError

_OF_SAMPLE = ("prompt", "response", "finished")


def load_function(path: str) -> Callable[..., Any]:
    """The function at ``package.module:name`` or ``path/to/file.py:name``.

    Raises:
        RewardError: there is no such module, file or function, or importing it failed.
    """
    where, separator, name = path.rpartition(":")
    if not separator or not where or not name:
        raise RewardError(f"{path}: a function is given as package.module:name or path/to/file.py:name")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # user code raises whatever it likes
        raise RewardError(f"{path}: {where} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        others = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value)) or "none"
        what = "is not a function" if found is not None else "does not exist"
        raise RewardError(f"{path}: {name} {what}; functions of {where}: {others}")
    return found  # type: ignore[no-any-return]


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    name = f"reward_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    call = getattr(function, "__call__", None)  # noqa: B004  an object with an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


@dataclass(frozen=True)
class Signature:
    """What a function wants to be given."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_rest: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """Read from its parameters.

        Raises:
            RewardError: it has parameters that cannot be given by name, or wants neither response nor the rest.
        """
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise RewardError(f"parameter {parameter} of the reward function cannot be given by name")
        named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        return cls(
            tuple(parameter.name for parameter in named),
            tuple(parameter.name for parameter in named if parameter.default is parameter.empty),
            len(named) < len(parameters),
        )

    def bind(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for one sample, as ``face.to_json`` gives it.

        Raises:
            RewardError: it asks for a column that the row does not have.
        """
        columns = sample["columns"]
        if clash := sorted(columns.keys() & set(_OF_SAMPLE)):
            raise RewardError(f"the column {clash[0]!r} has the name of a part of the sample: rename it (columns)")
        given = {name: sample[name] for name in _OF_SAMPLE} | columns
        if missing := [name for name in self.required if name not in given]:
            raise RewardError(
                f"the reward function asks for {missing[0]!r}; it can be given {', '.join(given)}. Columns of the "
                "prompts' rows are kept by naming them in data.keep_columns"
            )
        if self.takes_rest:
            return {key: value for key, value in given.items() if key in self.names or key in columns}
        return {key: value for key, value in given.items() if key in self.names}

    def bind_batch(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Arguments for a batch: for each name the list over samples."""
        bound = [self.bind(sample) for sample in samples]
        return {name: [one[name] for one in bound] for name in bound[0]} if bound else {}
