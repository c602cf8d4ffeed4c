"""What the documents say holds: links lead somewhere, commands and configurations work, generated pages are current."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.configfile import load
from launch.reference import page

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "docs/methods", "benchmarks")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
SHIPPED = [ROOT / "ray_config.yaml", *sorted((ROOT / "examples").rglob("*.yaml"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_parses(path: Path) -> None:
    assert load(path).run.name


def test_there_are_shipped_configurations() -> None:
    assert {"ray_config.yaml", "ppo.yaml", "dpo.yaml"} <= {path.name for path in SHIPPED}


def test_the_reference_of_the_configuration_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "run `make docs`"


def test_every_command_of_the_documents_is_known() -> None:
    """`make` targets exist, `troupe` subcommands too, and what `python -m` names can be found."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for document in DOCUMENTS:
        commands = "\n".join([*blocks(document, "bash"), *blocks(document, "")])
        for target in re.findall(r"^make ([a-z-]+)", commands, flags=re.MULTILINE):
            assert target in targets, f"{document.name}: make {target}"
        for word in re.findall(r"^troupe ([a-z-]+)", commands, flags=re.MULTILINE):
            assert word in ("train", "check", "serve-reward"), f"{document.name}: troupe {word}"
        for module in re.findall(r"python -m ([\w.]+)", commands):
            path = ROOT / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").exists(), f"{document.name}: python -m {module}"


def script_commands() -> list[str]:
    """``python -m benchmarks.x ...`` and ``examples.x``: of the documents' blocks, the scripts, and the Makefile."""
    texts = [block for document in DOCUMENTS for block in (*blocks(document, "bash"), *blocks(document, ""))]
    texts.append((ROOT / "Makefile").read_text())
    texts += [ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / "benchmarks").glob("*.py")]
    lines = re.findall(r"python -m ((?:benchmarks|examples)\..*)", "\n".join(texts))
    return sorted({re.sub(r"[\[\]]", "", line.split("#")[0]).strip() for line in lines})


def test_command_lines_of_scripts_are_understood() -> None:
    """All in one process, which reads them as the scripts would and stops there: loading the engines takes seconds."""
    program = """
import argparse, importlib, shlex, sys

class Understood(Exception):
    pass

understand = argparse.ArgumentParser.parse_args

def parse_args(self, *given):
    understand(self, *given)
    raise Understood

argparse.ArgumentParser.parse_args = parse_args
for line in sys.stdin.read().splitlines():
    print("python -m", line, file=sys.stderr)
    module, *sys.argv[1:] = shlex.split(line)
    try:
        importlib.import_module(module).main()
    except Understood:
        continue
    sys.exit("it takes no command line")
"""
    commands = script_commands()
    with_a_main = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in path.read_text()}
    # The other side of a comparison runs in an environment of its own.
    assert {line.split()[0] for line in commands} >= {f"benchmarks.{name}" for name in with_a_main - {"trl_side"}}
    words = (sys.executable, "-c", program)
    done = subprocess.run(words, input="\n".join(commands), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_pip_is_told_to_install_is_there() -> None:
    extras = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    told = set(re.findall(r"pip install -e \.\[(\w+)\]", text))
    assert told and told <= extras


@pytest.mark.timeout(600)
def test_the_first_run_of_the_readme(
    troupe: Callable[..., subprocess.CompletedProcess[str]], home: Path
) -> None:
    """The README's own commands, word by word, on the test's small models and data."""
    (block,) = [text for text in blocks(ROOT / "README.md", "bash") if "troupe train" in text]
    commands = [line.split("#")[0].split() for line in block.splitlines() if line.startswith("troupe")]
    assert [words[1] for words in commands] == ["check", "train", "train"]
    (home / "runs" / "demo-pretrain").symlink_to(home / "runs" / "demo-sft")
    for words in commands:
        done = troupe(*words[1:])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (home / "runs" / "my-ppo" / "model" / "config.json").exists()


def test_make_files_and_yaml_are_well_formed() -> None:
    yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    done = subprocess.run(("make", "-n", "-C", str(ROOT), "test"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sys.version_info >= (3, 11)
