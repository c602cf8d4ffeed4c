"""docs/schema.md says what the code says, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from experience.schema import ALL, SCHEMA_VERSION

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "schema.md").read_text()


def test_the_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run([sys.executable, "-W", "error", "-c", blocks[0]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ALL)
def test_every_column_stands_in_its_schemas_section_with_its_type(name: str) -> None:
    sections = [part for part in re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE) if f"`{name}`" in part.splitlines()[0]]
    assert len(sections) == 1
    for field in ALL[name]:
        by_role = ("ref_logprobs", "policy_logprobs", "values", "scores", "baseline_scores")
        if name in by_role and field.name == "sample_id":
            continue
        plain = str(field.type.value_type if pa.types.is_list(field.type) else field.type)
        plain = {"float": "float32", "double": "float64"}.get(plain, plain)
        kind = f"list<{plain}>" if pa.types.is_list(field.type) else plain
        written = f"`{field.name}` | `{kind}`"
        assert written in sections[0], f"{name}: expected a row with {written}"


def test_the_version_is_the_codes() -> None:
    assert f"The version is {SCHEMA_VERSION}." in PAGE
