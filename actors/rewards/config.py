"""Configuration of the rewards. Imports no torch.

``rewards: {NAME: {kind: ..., ...}}``: each is a role of its own, whose column of scores has its name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from actors.config import Fraction, ModelConfig, RewardConfig
from cluster.config import FrozenConfig, PlacementConfig, PositiveFloat, PositiveInt

Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]


class ModelRewardConfig(RewardConfig):
    """A reward model: one label over prompt and response."""

    kind: Literal["model"] = Field("model", description="A local reward model.")


class TextRewardConfig(PlacementConfig):
    """What rewards over text have in common."""

    num_retries: Count = Field(2, description="How often a sample whose scoring failed is tried again.")
    retry_wait_s: NotNegative = Field(
        0.5, description="Wait before the first of these tries; doubled, and drawn anew, for each further one."
    )
    on_failure: Literal["drop"] | float = Field(
        "drop",
        description="A sample that still has no score: `drop` leaves its prompt's group out, with the reason, and "
        "draws another prompt; a number is given to it as its score. Both are counted.",
    )


class FunctionRewardConfig(TextRewardConfig):
    """A Python function."""

    kind: Literal["function"] = Field("function", description="A Python function.")
    path: str = Field(
        description="`package.module:name` or `path/to/file.py:name`. It is given `prompt`, `response`, `finished` and "
        "columns of the prompt's row (data.keep_columns), those that its parameters name."
    )
    batched: bool = Field(False, description="It is given lists, and returns a list with one score a sample.")
    batch_size: PositiveInt = Field(64, description="Samples of one call, where it is batched.")
    timeout_s: PositiveFloat = Field(60.0, description="How long one call may take.")
    num_workers: PositiveInt = Field(1, description="Processes that run a plain function.")
    num_concurrent: PositiveInt = Field(64, description="Calls of an `async` function under way at a time.")

    @field_validator("path")
    @classmethod
    def _has_a_name(cls, value: str) -> str:
        where, _, name = value.rpartition(":")
        if not where or not name.isidentifier():
            raise ValueError(f"path is {value!r}; write package.module:name or path/to/file.py:name")
        return value


class _Check(FrozenConfig):
    right: float = Field(1.0, description="Score of a response that passes.")
    wrong: float = Field(0.0, description="Score of one that does not.")

    @model_validator(mode="after")
    def _differ(self) -> _Check:
        if self.right == self.wrong:
            raise ValueError(f"right and wrong are both {self.right}: every response would score the same")
        return self


def _compiled(value: str | None) -> str | None:
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from error
    return value


class ExactCheck(_Check):
    """The response is the answer."""

    name: Literal["exact"] = Field(description="The response, or the part that `extract` finds, is the answer.")
    column: str = Field("answer", description="Column of the prompt's row that holds the answer, a text.")
    extract: str | None = Field(
        None,
        description="Regular expression whose last match is compared, its first group where it has one; a response "
        "without a match is wrong. None: the whole response, blanks at both ends left off.",
    )
    ignore_case: bool = Field(False, description="Compare without regard to case.")

    _pattern = field_validator("extract")(_compiled)


class NumericCheck(_Check):
    """The last number of the response is the answer."""

    name: Literal["numeric"] = Field(description="The last number in the response equals the answer.")
    column: str = Field("answer", description="Column that holds the answer: a number, or a text with one.")
    tolerance: NotNegative = Field(1e-9, description="Distance allowed, relative to the answer where that is above 1.")


class Gsm8kCheck(_Check):
    """GSM8K's form of an answer."""

    name: Literal["gsm8k"] = Field(
        description="The number behind the response's last `####` equals that behind the answer's."
    )
    column: str = Field("answer", description="Column that holds the answer: a text that ends in `#### n`, or `n`.")
    needs_mark: bool = Field(True, description="A response without `####` is wrong; else its last number is taken.")


class MathCheck(_Check):
    r"""Mathematics in ``\boxed{}``, compared by math-verify."""

    name: Literal["math"] = Field(
        description="The last `\\boxed{}` of the response is the same mathematics as the answer's, by math-verify."
    )
    column: str = Field("answer", description="Column that holds the answer in LaTeX, in `\\boxed{}` or bare.")
    needs_box: bool = Field(True, description="A response without `\\boxed{}` is wrong; else any mathematics counts.")


class RegexCheck(_Check):
    """A regular expression."""

    name: Literal["regex"] = Field(description="The pattern is found in the response.")
    pattern: str = Field(description="Python's regular expression.")
    whole: bool = Field(False, description="It has to match the whole response.")

    _pattern = field_validator("pattern")(_compiled)


class JsonSchemaCheck(_Check):
    """A JSON value of a schema."""

    name: Literal["json_schema"] = Field(description="The response is JSON and valid under a JSON schema.")
    json_schema: dict[str, Any] = Field(description="The schema.")
    fenced: bool = Field(False, description="The JSON stands in the last fenced block of the response.")


class LengthCheck(_Check):
    """A length."""

    name: Literal["length"] = Field(description="The response's length is within bounds.")
    unit: Literal["characters", "words", "lines"] = Field("words", description="What is counted.")
    least: Count = Field(0, description="Lower bound, included.")
    most: Count | None = Field(None, description="Upper bound, included; none: there is none.")

    @model_validator(mode="after")
    def _bounds_rise(self) -> LengthCheck:
        if self.most is not None and self.most < self.least:
            raise ValueError(f"most is {self.most}, below least, {self.least}")
        return self


class FormatCheck(_Check):
    """Tagged sections."""

    name: Literal["format"] = Field(
        description="The response is `<a>...</a><b>...</b>`: the sections in this order, each once, nothing between "
        "them but blanks."
    )
    sections: tuple[str, ...] = Field(min_length=1, description="Names of the tags.")


Check = Annotated[
    ExactCheck
    | NumericCheck
    | Gsm8kCheck
    | MathCheck
    | RegexCheck
    | JsonSchemaCheck
    | LengthCheck
    | FormatCheck,
    Field(discriminator="name"),
]


class CheckerRewardConfig(TextRewardConfig):
    """A checker that is built in."""

    kind: Literal["checker"] = Field("checker", description="A checker that is built in.")
    check: Check = Field(description="What is checked.")
    timeout_s: PositiveFloat = Field(10.0, description="How long the check of one response may take.")
    num_workers: PositiveInt = Field(1, description="Processes that check.")


class CodeRewardConfig(TextRewardConfig):
    """The response's code, run against the row's tests."""

    kind: Literal["code"] = Field("code", description="The response's Python code is run in a sandbox.")
    tests_column: str = Field(
        "tests",
        description="Column that holds one test or a list of them, each run with the code in a process of its own: a "
        "text of Python is run behind the code and passes where nothing is raised; `{input, output}` gives the code "
        "standard input and compares what it prints.",
    )
    score: Literal["all", "share"] = Field(
        "all", description="`all`: 1 where every test passes, else 0; `share`: the share of tests that pass."
    )
    fenced: bool = Field(True, description="The code is the response's last fenced block; without one it scores 0.")
    timeout_s: PositiveFloat = Field(10.0, description="Wall time of one test; then it is killed, and has not passed.")
    cpu_s: PositiveInt = Field(10, description="CPU time of one test, over its threads.")
    memory_bytes: PositiveInt = Field(512 << 20, description="Address space of one test.")
    max_output_bytes: PositiveInt = Field(1 << 20, description="What a test may print, and write in all files.")
    isolation: Literal["namespaces", "limits"] = Field(
        "namespaces",
        description="`namespaces`: resource limits, and by namespaces of the kernel no network, no other processes, "
        "no writing but in a folder that is gone afterwards; refused where the kernel allows none. `limits`: resource "
        "limits alone: the code can open sockets, and write where its user can.",
    )
    python: str | None = Field(
        None, description="The interpreter that runs the code, with what that may import; none: ours."
    )
    num_workers: PositiveInt = Field(1, description="Tests under way at a time.")


class HttpRewardConfig(TextRewardConfig):
    """A service."""

    kind: Literal["http"] = Field("http", description="A service; docs/rewards.md has the protocol.")
    endpoints: tuple[str, ...] = Field(
        min_length=1, description="`http://host:port`, one or several: a batch goes to the one with the least to do."
    )
    batch_size: PositiveInt = Field(32, description="Samples of one request.")
    num_concurrent: PositiveInt = Field(8, description="Requests under way at a time, over all endpoints.")
    timeout_s: PositiveFloat = Field(60.0, description="How long one request may take.")
    num_attempts: PositiveInt = Field(4, description="How often a request is sent, to any endpoint, before it failed.")
    backoff_s: NotNegative = Field(
        0.5, description="The wait behind a failed attempt is drawn from 0 to this, doubled each time."
    )
    max_backoff_s: NotNegative = Field(30.0, description="Upper bound of that.")
    num_failures_to_open: PositiveInt = Field(
        3, description="Failed requests in a row after which an endpoint is left alone."
    )
    cooldown_s: PositiveFloat = Field(10.0, description="For so long; then one request tries it.")
    token_variable: str | None = Field(
        None, description="Environment variable of the role's processes that holds a bearer token."
    )

    @field_validator("endpoints")
    @classmethod
    def _are_urls(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
                raise ValueError(f"endpoint {value!r} is no address; write http://host:port")
        if len(set(values)) < len(values):
            raise ValueError("an endpoint stands twice")
        return tuple(value.rstrip("/") for value in values)


JUDGE_TEMPLATE = """\
Judge the response to the prompt below.

[Prompt]
{prompt}

[Response]
{response}

Is it a good response? Answer with Yes or No alone."""


class LabelsConfig(FrozenConfig):
    """A score read from the probabilities of the judge's first token."""

    values: dict[str, float] = Field(
        {"Yes": 1.0, "No": 0.0},
        min_length=2,
        description="Value of each label; the score is their mean, weighted by the judge's probabilities. A label is "
        "known by its first token.",
    )
    least_mass: Fraction = Field(
        0.5, description="Where the labels together are less probable than this, the judge did not answer: a failure."
    )


class JudgeRewardConfig(TextRewardConfig):
    """A language model as judge."""

    kind: Literal["judge"] = Field("judge", description="A language model as judge, on a vLLM engine for each rank.")
    model: ModelConfig = Field(description="The judge.")
    template: str = Field(
        JUDGE_TEMPLATE,
        description="What the judge is asked; {prompt}, {response} and columns of the prompt's row are filled in.",
    )
    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto", description="Wrap that in the judge's chat template: where it has one, always, or never."
    )
    labels: LabelsConfig | None = Field(None, description="Read the score from the first token's probabilities.")
    pattern: str | None = Field(
        None,
        description="Read it from what the judge writes: the number in the first group of this regular expression's "
        "last match.",
    )
    low: float | None = Field(None, description="With a pattern: a number below this is a failure.")
    high: float | None = Field(None, description="With a pattern: a number above this is a failure.")
    max_response_tokens: PositiveInt = Field(256, description="With a pattern: how much the judge may write.")
    temperature: NotNegative = Field(0.0, description="With a pattern: 0 takes the most probable token.")
    max_model_tokens: PositiveInt | None = Field(None, description="Longest question; none means the model's context.")
    kv_cache_bytes: PositiveInt | None = Field(
        None, description="Size of the engine's KV cache; none means 90 % of the GPU, or 256 MiB on CPU."
    )
    gpu_memory_fraction: Fraction = Field(0.9, description="Share of a GPU's memory that the engine takes.")
    max_concurrent_sequences: PositiveInt = Field(64, description="Samples that the engine judges at a time.")
    timeout_s: PositiveFloat = Field(300.0, description="How long one judgement may take.")

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        if _compiled(value) is not None and re.compile(value or "").groups < 1:
            raise ValueError(f"pattern {value!r} has no group: put the number in one, as in 'score: (\\d+)'")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> JudgeRewardConfig:
        if (self.labels is None) == (self.pattern is None):
            raise ValueError("a judge's score is read from labels or by a pattern: give one of the two")
        if "{response}" not in self.template:
            raise ValueError("template has no {response}: the judge would not see what it judges")
        return self


TextReward = (
    FunctionRewardConfig | CheckerRewardConfig | CodeRewardConfig | HttpRewardConfig | JudgeRewardConfig
)
AnyReward = Annotated[ModelRewardConfig | TextReward, Field(discriminator="kind")]
