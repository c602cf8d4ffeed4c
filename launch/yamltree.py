"""YAML with the line of every key, and overrides on top of it.

Invariants:

- For every key in ``values``, ``origin`` of its path names the line or the override that it came from.
- What ``to_yaml`` writes, ``YamlTree`` reads back as the same values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

import yaml

from launch.errors import ConfigError, Problem
from launch.fields import Path, dotted

#: YAML 1.1 wants a point in a float; people write 1e-5.
_EXPONENT = re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"
#: No key of a configuration is a date, and people name runs by dates.
_DATE_TAG = "tag:yaml.org,2002:timestamp"
_MAPPING_TAG, _SEQUENCE_TAG = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _resolvers(usual: Mapping[str, Sequence[tuple[str, re.Pattern[str]]]]) -> _Resolvers:
    """Which plain words are no text: as in YAML 1.1, with exponents and without dates."""
    resolvers = {start: [entry for entry in found if entry[0] != _DATE_TAG] for start, found in usual.items()}
    for start in "-+0123456789":
        resolvers.setdefault(start, []).append((_FLOAT_TAG, _EXPONENT))
    return resolvers


def _loader(text: str) -> yaml.SafeLoader:
    loader = yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = _resolvers(loader.yaml_implicit_resolvers)
    return loader


def to_yaml(values: Mapping[str, object]) -> str:
    """``values`` as YAML that ``YamlTree`` reads back as they are."""

    def dumper(stream: object, **options: object) -> yaml.SafeDumper:
        made = yaml.SafeDumper(stream, **options)
        made.yaml_implicit_resolvers = _resolvers(made.yaml_implicit_resolvers)
        return made

    text: str = yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True)
    return text


def parse_value(text: str) -> object:
    """A YAML value written on one line, as in ``key=[1, 2]``.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a tag such as !!int before what is none.
    """
    loader = _loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


class YamlTree:
    """The values of a YAML file with the origin of each key.

    Args:
        source: what messages call the file.
        text: its content.

    Raises:
        ConfigError: not YAML, no mapping at the top, or a key that stands twice.
    """

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self._origins: dict[Path, str] = {}
        self._problems: list[Problem] = []
        self._above: list[yaml.Node] = []
        self.values: dict[str, object] = self._parse(text)
        if self._problems:
            raise ConfigError(source, self._problems)

    @classmethod
    def read(cls, path: FilePath) -> YamlTree:
        """The tree of a file.

        Raises:
            ConfigError: it cannot be read, or is not a mapping in YAML.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigError(str(path), [Problem("", f"cannot be read: {reason}", "give a YAML file")]) from error
        return cls(str(path), text)

    def origin(self, path: Sequence[str | int]) -> str:
        """Where the value at ``path`` came from: the nearest key at or above it."""
        known = (self._origins.get(tuple(path[:length])) for length in range(len(path), 0, -1))
        return next((origin for origin in known if origin), self.source)

    def where(self, path: Sequence[str | int]) -> str:
        """``key.sub (file:line)``."""
        return f"{dotted(path)} ({self.origin(path)})" if path else self.source

    def override(self, text: str) -> Problem | None:
        """Apply ``key.sub=value``; says what is wrong with it, or none."""
        key, equals, value_text = text.partition("=")
        if not equals or not key:
            return Problem(f"override {text!r}", "is not of the form key.sub=value", "e.g. run.seed=1")
        try:
            value = parse_value(value_text)
        except (yaml.YAMLError, ValueError):
            return Problem(f"override {text!r}", f"{value_text!r} is not a YAML value", "put it in quotes")
        path: list[str | int] = []
        holder: object = self.values
        parts = key.split(".")
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            if isinstance(holder, dict):
                path.append(part)
                if last:
                    holder[part] = value
                else:
                    if holder.get(part) is None:
                        holder[part] = {}
                        self._origins[tuple(path)] = f"override {text}"
                    holder = holder[part]
            elif isinstance(holder, list):
                if not part.isdigit() or int(part) > len(holder) or (int(part) == len(holder) and not last):
                    right = f"an index from 0 to {len(holder)}, the last to append"
                    return Problem(f"override {text!r}", f"{dotted(path)} is a list and {part!r} not one of it", right)
                path.append(int(part))
                if last:
                    holder[int(part) : int(part) + 1] = [value]
                else:
                    holder = holder[int(part)]
            else:
                right = f"set it as a whole: {dotted(path)}=VALUE"
                return Problem(f"override {text!r}", f"{dotted(path)} is {holder!r} and has no keys", right)
        self._origins = {at: origin for at, origin in self._origins.items() if at[: len(path)] != tuple(path)}
        self._origins[tuple(path)] = f"override {text}"
        return None

    def _parse(self, text: str) -> dict[str, object]:
        try:
            loader = _loader(text)
            node = loader.get_single_node()
            values = {} if node is None else self._build(loader, node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            what = f"not YAML: {error.problem or error.context}"
            raise ConfigError(self.source, [Problem(f"{self.source}:{line}", what, "mend the line")]) from error
        except yaml.YAMLError as error:
            raise ConfigError(self.source, [Problem("", f"not YAML: {error}", "mend the file")]) from error
        if not isinstance(values, dict):
            right = "sections such as run:, data:, algorithm:"
            raise ConfigError(self.source, [Problem("", "is not a mapping of keys to values", right)])
        return values

    def _build(self, loader: yaml.SafeLoader, node: yaml.Node, path: Path) -> object:
        if node in self._above:
            raise _not_yaml("an alias that stands inside itself", node)
        self._above.append(node)
        try:
            if node.tag == _SEQUENCE_TAG:
                return [self._build(loader, item, self._note((*path, i), item)) for i, item in enumerate(node.value)]
            if node.tag == _MAPPING_TAG:
                return self._build_mapping(loader, node, path)
            return loader.construct_object(node, deep=True)
        except (TypeError, ValueError) as error:  # a tag such as !!int before what is none
            raise _not_yaml(str(error), node) from error
        finally:
            self._above.pop()

    def _build_mapping(self, loader: yaml.SafeLoader, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        seen: dict[str, int] = {}
        for key, _ in node.value:  # before merging, which would make an overridden key look doubled
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _not_yaml("a key that is no plain word", key)
            if key.value in seen and key.value != "<<":
                first = f"it is also on line {seen[key.value]}"
                where = f"{dotted((*path, key.value))} ({self.source}:{line})"
                self._problems.append(Problem(where, f"stands twice, {first}", "keep one"))
            seen[key.value] = line
        loader.flatten_mapping(node)
        return {
            str(key.value): self._build(loader, value, self._note((*path, str(key.value)), key))
            for key, value in node.value
        }

    def _note(self, path: Path, node: yaml.Node) -> Path:
        self._origins[path] = f"{self.source}:{node.start_mark.line + 1}"
        return path


def _not_yaml(what: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)
