"""YAML that people write, and YAML that they write by mistake."""

from __future__ import annotations

import pytest

from launch.errors import ConfigError
from launch.yamltree import YamlTree, to_yaml


def refused(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        YamlTree("run.yaml", text)
    return [str(problem) for problem in caught.value.problems]


def test_numbers_with_exponents_and_names_that_look_like_dates() -> None:
    values = YamlTree("run.yaml", "a: 1e-5\nb: -2E3\nc: 2026-11-21\nd: 2026-13-45\ne: '1e5'\nf: 1e5x\n").values
    assert values == {"a": 1e-5, "b": -2e3, "c": "2026-11-21", "d": "2026-13-45", "e": "1e5", "f": "1e5x"}


def test_what_is_written_is_read_back() -> None:
    values: dict[str, object] = {
        "words": ["1e5", "-1E-5", "2026-11-21", "no", "null", "~", "1_000", "0x1f", "1:30", "", " ", "\n\n", "a: b"],
        "numbers": [1e-5, 1e22, 0, -3, 0.1, 1.5e300],
        "others": [True, None, {"#": []}],
    }
    assert YamlTree("again.yaml", to_yaml(values)).values == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a:\n  b: &x [1, *x]\n", "run.yaml:2: not YAML: an alias that stands inside itself; mend the line"),
        ("a: 1\n[b]: 2\n", "run.yaml:2: not YAML: a key that is no plain word; mend the line"),
        ("a: 1\nb: !!int x\n", "run.yaml:2: not YAML: invalid literal for int() with base 10: 'x'; mend the line"),
        ("a: !!binary é\n", "run.yaml:1: not YAML: "),
        ("a: \x07\n", "not YAML: unacceptable character #x0007: "),
        ("a: 1\n---\nb: 2\n", "run.yaml:2: not YAML: but found another document; mend the line"),
        ("a: *nothing\n", "run.yaml:1: not YAML: found undefined alias 'nothing'; mend the line"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str, problem: str) -> None:
    [told] = refused(text)
    assert told.startswith(problem)


def test_an_alias_may_stand_twice() -> None:
    tree = YamlTree("run.yaml", "a: &x {b: [1]}\nc: *x\n")
    assert tree.values == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert tree.override("c.b.0=2") is None
    assert tree.values["a"] == {"b": [1]}  # each place has its own


@pytest.mark.parametrize("value", ["!!int x", "[1", "&a [*b]", "\x07"])
def test_an_override_that_is_no_value(value: str) -> None:
    problem = YamlTree("run.yaml", "a: 1").override(f"a={value}")
    assert problem is not None
    assert problem.what == f"{value!r} is not a YAML value"


def test_the_origin_of_a_key() -> None:
    tree = YamlTree("run.yaml", "a:\n  b: 1\n  c: [x,\n    y]\n")
    assert tree.origin(("a", "b")) == "run.yaml:2"
    assert tree.origin(("a", "c", 1)) == "run.yaml:4"
    assert tree.origin(("a", "nothing")) == "run.yaml:1"
    assert tree.origin(("nothing",)) == "run.yaml"
    assert tree.override("a.b=2") is None
    assert tree.origin(("a", "b")) == "override a.b=2"
    assert tree.override("a={}") is None
    assert tree.origin(("a", "c", 1)) == "override a={}"
