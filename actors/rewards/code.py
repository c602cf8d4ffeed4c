"""Code in a response as a reward: it is run with the row's tests in a sandbox.

What the code does wrong (it loops for ever, eats memory, opens a socket) makes a test that is not passed, which is a
score. A failure is of the sandbox, or of the row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.errors import RewardError
from actors.rewards.config import CodeRewardConfig
from actors.rewards.face import JSON, Answer, Reason, RewardFailure, RewardSample, TextReward
from actors.rewards.fences import last_fenced
from actors.rewards.sandbox import Run, Sandbox


@dataclass(frozen=True)
class ProgramTest:
    """Python that is run behind the code; it passes where nothing is raised."""

    program: str


@dataclass(frozen=True)
class OutputTest:
    """Standard input, and what the code has to print: compared line by line, blanks at line ends left off."""

    given: str
    wanted: str


Test = ProgramTest | OutputTest


class CodeReward(TextReward):
    """The share of a row's tests that a response's code passes, or whether it passes all.

    Raises:
        RewardError: no sandbox can be started here.
    """

    def __init__(self, config: CodeRewardConfig) -> None:
        self._config = config
        self._sandbox = Sandbox(config)
        self._slots = asyncio.Semaphore(config.num_workers)

    async def score(self, samples: Sequence[RewardSample]) -> list[Answer]:
        """One answer for each sample.

        Raises:
            RewardError: the samples lack the column with the tests.
        """
        return list(await asyncio.gather(*(self._scored(sample) for sample in samples)))

    async def close(self) -> None:
        """Nothing is kept between two calls."""

    async def _scored(self, sample: RewardSample) -> Answer:
        tests = self._tests(sample.columns)
        if isinstance(tests, RewardFailure):
            return tests
        code = last_fenced(sample.response) if self._config.fenced else sample.response
        if code is None:
            return 0.0
        num_passed = 0
        for test in tests:
            async with self._slots:
                run, passed = await self._run(code, test)
            if run.outcome == "not_started":
                return RewardFailure(Reason.CRASHED, f"the sandbox did not start: {run.output}")
            num_passed += passed
            if not passed and self._config.score == "all":
                return 0.0
        return num_passed / len(tests)

    async def _run(self, code: str, test: Test) -> tuple[Run, bool]:
        if isinstance(test, ProgramTest):
            run = await self._sandbox.run(f"{code}\n\n{test.program}\n")
            return run, run.outcome == "ended"
        run = await self._sandbox.run(code, test.given, may_exit=True)
        return run, run.outcome == "ended" and _lines(run.output) == _lines(test.wanted)

    def _tests(self, columns: Mapping[str, JSON]) -> list[Test] | RewardFailure:
        name = self._config.tests_column
        if name not in columns:
            raise RewardError(f"a reward that runs code needs the column {name!r}: name it in data.keep_columns")
        given = columns[name]
        tests: list[Test] = []
        for one in given if isinstance(given, list) else [given]:
            match one:
                case str(program):
                    tests.append(ProgramTest(program))
                case {"input": str(text), "output": str(wanted)}:
                    tests.append(OutputTest(text, wanted))
                case _:
                    why = f"the column {name!r} holds {one!r}; a test is Python, or an object with input and output"
                    return RewardFailure(Reason.BAD_ROW, why)
        return tests or RewardFailure(Reason.BAD_ROW, f"the column {name!r} holds no test")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
