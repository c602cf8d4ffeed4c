"""Episodes: turns of the policy and words of an environment, in turn, until one of the two ends it.

Invariants:

- Every turn is a request of its own, whose prompt is all tokens so far, as they were sampled or given. The engine's
  prefix cache holds them, so only what is new is computed.
- The tokens of a sample only grow; nothing is decoded and encoded again.
- The environment answers every turn, also one that was cut off, so every token of the policy has a reward.
- An environment that fails fails its episode, with a reason, and never the engine's other episodes.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from actors.config import EnvironmentConfig
from actors.environments.face import JSON, Action, Environment, Step, Task, Words
from actors.errors import RewardError, RolloutError
from actors.rewards.binding import load_function
from actors.rewards.face import LARGEST_SCORE, Reason, RewardFailure, checked, checked_batch
from actors.rollout_rows import Answer, Turn

if TYPE_CHECKING:
    from actors.vllm_engine.engine import Completion

logger = logging.getLogger(__name__)

T = TypeVar("T")
#: Gives tokens so far, the number of the turn and the most tokens it may have; gives the turn.
TakeTurn = Callable[[Sequence[int], int, int], "Awaitable[Completion]"]


class EpisodeFailed(RolloutError):
    """An environment timed out, raised, or said what cannot be used. ``reason`` is what failures are counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"the environment {reason}: {detail}")
        self.reason = reason


def load_environment(config: EnvironmentConfig) -> type[Environment]:
    """The class at ``package.module:Class`` or ``path/to/file.py:Class``, which none is made of yet.

    Raises:
        RolloutError: there is none, it is no ``Environment``, one of its methods is missing or no coroutine, or it does
            not take the options.
    """
    path = config.path
    try:
        found: object = load_function(path)
    except RewardError as error:
        raise RolloutError(f"rollout.environment.path {error}") from error
    if not isinstance(found, type) or not issubclass(found, Environment):
        raise RolloutError(
            f"rollout.environment.path {path}: not an environment; it must be a subclass of "
            "actors.environments.face.Environment"
        )
    for name in ("reset", "step", "close"):
        method = getattr(found, name)
        if name in found.__abstractmethods__ or not inspect.iscoroutinefunction(inspect.unwrap(method)):
            what = "is missing" if name in found.__abstractmethods__ else "is no coroutine"
            raise RolloutError(f"rollout.environment.path {path}: {name} {what}; write `async def {name}`")
    try:
        signature = inspect.signature(found)
        signature.bind(**config.options)
    except TypeError as error:
        raise RolloutError(f"rollout.environment.options of {path}: {error}; its keywords are {signature}") from error
    return found


@dataclass(frozen=True)
class Prompt:
    """What an episode is about."""

    sample_id: int
    prompt_id: int
    tokens: Sequence[int]
    columns: Mapping[str, JSON]
    seed: int


class Episodes:
    """Plays episodes, as many at a time as are asked for.

    Args:
        tokenizer: the policy's.
        max_turn_tokens: the longest turn.
        context_tokens: the longest sample that the engine takes.

    Raises:
        RolloutError: there is no such environment, or it cannot be made.
    """

    def __init__(self, config: EnvironmentConfig, tokenizer: Any, *, max_turn_tokens: int, context_tokens: int) -> None:
        self._config = config
        self._make = load_environment(config)
        self._tokenizer = tokenizer
        self._num_tokens_known = len(tokenizer)
        self._max_turn_tokens = max_turn_tokens
        self._context_tokens = context_tokens

    async def play(self, prompt: Prompt, take_turn: TakeTurn) -> Answer:
        """One sample.

        Raises:
            EpisodeFailed: the environment failed.
            RolloutError: it needs a column that the prompts' rows do not have.
        """
        if missing := [name for name in self._make.needs_columns if name not in prompt.columns]:
            kept = ", ".join(prompt.columns) or "none"
            raise RolloutError(
                f"the environment {self._config.path} needs the column {missing[0]!r} of the prompts' rows; they keep "
                f"{kept}: name it in data.keep_columns"
            )
        environment = self._made()
        try:
            answer = await self._play(environment, prompt, take_turn)
        except BaseException:
            try:
                await self._asked(environment.close)
            except EpisodeFailed as error:  # what went wrong first is what is told
                logger.warning("an episode that failed could not be closed: %s", error)
            raise
        await self._asked(environment.close)
        return answer

    async def _play(self, environment: Environment, prompt: Prompt, take_turn: TakeTurn) -> Answer:
        longest = min(self._context_tokens, len(prompt.tokens) + self._config.max_tokens)
        task = Task(self._text(prompt.tokens), prompt.tokens, prompt.columns, prompt.seed)
        tokens = [*prompt.tokens, *self._tokens(await self._asked(partial(environment.reset, task)))]
        if len(tokens) >= longest:
            raise EpisodeFailed("said too much", f"{len(tokens)} tokens before the first turn, of {longest} in all")
        num_prompt_tokens, turns, reason = len(tokens), list[Turn](), "length"
        while True:
            room = min(self._max_turn_tokens, longest - len(tokens))
            done = await take_turn(tuple(tokens), len(turns), room)
            step = await self._asked(partial(environment.step, self._action(done)))
            rewards, over = _read(step, len(done.tokens))
            turns.append(Turn(len(tokens), done, rewards))
            # They are added up, and what is beyond float32 would be infinite there.
            if not abs(sum(sum(turn.rewards) for turn in turns)) <= LARGEST_SCORE:
                raise EpisodeFailed("gave no finite number", f"rewards that add up to more than {LARGEST_SCORE}")
            tokens += done.tokens
            if over:
                reason = "stop"
                break
            words = self._tokens(step.words)
            if not words:
                raise EpisodeFailed("said nothing", "though the episode is not over; the policy would speak to itself")
            if len(turns) == self._config.max_turns or len(tokens) + len(words) >= longest:
                break
            tokens += words
        return Answer(prompt.sample_id, prompt.prompt_id, tokens, num_prompt_tokens, turns, reason)

    def _made(self) -> Environment:
        try:
            return self._make(**self._config.options)
        except Exception as error:  # the user's code raises whatever it likes
            raise EpisodeFailed("raised", f"{type(error).__name__}: {error}") from error

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await asyncio.wait_for(call(), self._config.timeout_s)
        except TimeoutError as error:
            raise EpisodeFailed("timed out", f"no answer in {self._config.timeout_s:g} s") from error
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise  # it is this episode that is to end, and not something that the environment waited for
            raise EpisodeFailed("raised", "CancelledError") from error
        except Exception as error:  # the user's code raises whatever it likes
            raise EpisodeFailed("raised", f"{type(error).__name__}: {error}") from error

    def _tokens(self, words: Words) -> list[int]:
        if isinstance(words, str):
            try:
                words.encode()
            except UnicodeEncodeError as error:
                raise EpisodeFailed("said no words", f"half a character, which is no text: {error}") from error
            return list(self._tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []
        if isinstance(words, bytes) or not isinstance(words, Sequence):
            raise EpisodeFailed("said no words", f"{type(words).__name__}; a text or a list of tokens is expected")
        known, tokens = self._num_tokens_known, list[int]()
        for token in words:
            if not isinstance(token, int) or not 0 <= token < known:
                raise EpisodeFailed("said what is no token", f"{token!r}; tokens are whole numbers below {known}")
            tokens.append(token)
        return tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _action(self, done: Completion) -> Action:
        tokens = tuple(done.tokens)
        closed = tokens[-1:] == (self._tokenizer.eos_token_id,)
        return Action(tokens, self._text(tokens[:-1] if closed else tokens), done.finish_reason == "stop")


def _read(step: Step, num_tokens: int) -> tuple[list[float], bool]:
    """What each token of the turn earned, and whether the episode is over."""
    if not isinstance(step, Step):
        raise EpisodeFailed("gave no step", f"{type(step).__name__}; step must return an environments.face.Step")
    try:
        rewards, over = _per_token(step.reward, num_tokens), bool(step.done)
    except (TypeError, ValueError, RuntimeError) as error:  # an array or a tensor
        raise EpisodeFailed("gave no step", f"a step that cannot be read: {error}") from error
    numbers = list[float]()
    for reward in rewards:
        if isinstance(reward, RewardFailure):
            what = {Reason.NOT_FINITE: "finite number", Reason.WRONG_LENGTH: "number for each token"}
            detail = f"a reward of a turn of {num_tokens} tokens cannot be taken: {reward.detail}"
            raise EpisodeFailed(f"gave no {what.get(reward.reason, 'number')}", detail)
        numbers.append(reward)
    return numbers, over


def _per_token(reward: object, num_tokens: int) -> Sequence[float | RewardFailure]:
    """Of one number for the turn, all stands on its last token."""
    if getattr(reward, "shape", ()) == () and (isinstance(reward, str) or not isinstance(reward, Sequence)):
        return [*([0.0] * (num_tokens - 1)), checked(reward)]
    return checked_batch(reward, num_tokens)


async def whole_groups(
    samples: Sequence[tuple[int, Awaitable[Answer]]],
) -> tuple[list[Answer], dict[int, str]]:
    """Await samples, each with its prompt's id; gives those of prompts without a failure, and why the others failed.

    The first failure of a prompt ends its other samples. What is not of an environment ends them all, and is raised.
    """
    tasks = {asyncio.ensure_future(answer): prompt_id for prompt_id, answer in samples}
    failed: dict[int, str] = {}
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                prompt_id = tasks[task]
                error = None if task.cancelled() else task.exception()
                if isinstance(error, EpisodeFailed) and prompt_id not in failed:
                    logger.warning("prompt %d is dropped: %s", prompt_id, error)
                    failed[prompt_id] = f"environment {error.reason}"
                    for other in (other for other in waiting if tasks[other] == prompt_id):
                        other.cancel()
                elif error is not None and not isinstance(error, EpisodeFailed):
                    raise error
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task, prompt_id in tasks.items() if prompt_id not in failed], failed
