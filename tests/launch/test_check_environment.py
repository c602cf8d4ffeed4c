"""What ``troupe check`` knows of environments without an episode."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.check_environment import check_environment
from launch.configfile import load

ROOT = Path(__file__).parents[2]
GAME = """
from actors.environments.face import Action, Environment, Step, Task, Words

class Game(Environment):
    needs_columns = ("answer",)

    def __init__(self, size: int) -> None:
        raise RuntimeError("check makes none")

    async def reset(self, task: Task) -> Words:
        return ""

    async def step(self, action: Action) -> Step:
        return Step("", 0.0, True)
"""


def look(name: str, *words: str) -> tuple[list[str], list[tuple[str, str]]]:
    facts: list[tuple[str, str]] = []
    problems = [str(problem) for problem in check_environment(load(ROOT / name, words), facts)]
    return problems, facts


def test_the_shipped_ones_will_do() -> None:
    problems, [(where, fact)] = look("examples/environments/calculator_grpo.yaml")
    assert problems == [] and where == "rollout.environment"
    assert fact == f"environment {Path('examples/environments/games.py').absolute()}:Calculator"
    assert look("ray_config.yaml") == look("examples/sft.yaml") == ([], [])


def test_what_cannot_be_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_HOME", str(tmp_path))
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    game = f"{tmp_path}/game.py:Game"
    run = "examples/environments/calculator_grpo.yaml"
    path, options = "rollout.environment.path={}", "rollout.environment.options={}"
    for words, problem in {
        (path.format("game.py:Other"),): "path {}/game.py:Other: Other does not exist",
        (path.format("broken.py:Game"),): "path {}/broken.py:Game: {}/broken.py cannot be imported: ModuleNotFound",
        (path.format("tests.actors.games:Unfinished"),): "path tests.actors.games:Unfinished: step is missing; write",
        (path.format("game.py:Game"), options.format("{call: 1}")):
            "options of {}/game.py:Game: missing a required argument: 'size'; its keywords are (size: int)",
    }.items():  # fmt: skip
        [found], facts = look(run, *words)
        assert found.startswith("rollout.environment: " + problem.replace("{}", str(tmp_path))) and facts == []
    words = (path.format("game.py:Game"), options.format("{size: 3}"))
    [found], [(_, fact)] = look(run, *words)
    assert found == (
        f"rollout.environment.path: {game} needs the column 'answer' of the prompts' rows; data.keep_columns: [answer]"
    )
    assert fact == f"environment {game}, which reads answer"
    assert look(run, *words, "data.keep_columns=[answer]")[0] == []
