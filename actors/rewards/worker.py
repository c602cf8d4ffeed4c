"""The process that runs a plain reward function, or a checker: ``python -m actors.rewards.worker TASK``.

It says that it is ready once all is loaded, so that no call's time goes by with that. It answers requests, one JSON
line each: a list of samples in, a list of scores or failures out. What the function prints goes to the log and never
into the answers. It dies with the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from actors.errors import RewardError
from actors.rewards.binding import Signature, load_function
from actors.rewards.face import Answer, Reason, RewardFailure, checked, checked_batch

PR_SET_PDEATHSIG = 1


def main(task: dict[str, Any]) -> None:
    """Answer until the requests end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    score = _scorer(task)
    answers.write("ready\n")
    answers.flush()
    for line in requests:
        answers.write(json.dumps(_answered(score, json.loads(line))) + "\n")
        answers.flush()


def _scorer(task: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[Answer]]:
    if "check" in task:
        # Here, because a function does without what it loads.
        from actors.rewards.checkers import checker_of

        check = checker_of(task["check"])
        if task["check"]["name"] == "math":
            from actors.rewards import mathematics

            mathematics.load()
        return lambda samples: [_called(check, sample) for sample in samples]
    function = load_function(task["path"])
    signature = Signature.of(function)
    if task["batched"]:
        return lambda samples: checked_batch(function(**signature.bind_batch(samples)), len(samples))
    return lambda samples: [checked(function(**signature.bind(sample))) for sample in samples]


def _called(check: Callable[[str, dict[str, Any]], Answer], sample: dict[str, Any]) -> Answer:
    return check(sample["response"], sample["columns"])


def _answered(score: Callable[[list[dict[str, Any]]], list[Answer]], samples: list[dict[str, Any]]) -> object:
    try:
        answers = score(samples)
    except RewardError as error:
        return {"error": str(error)}
    except Exception as error:  # user code raises whatever it likes
        answers = [RewardFailure(Reason.RAISED, f"{type(error).__name__}: {error}")] * len(samples)
    return [[one.reason, one.detail] if isinstance(one, RewardFailure) else one for one in answers]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
