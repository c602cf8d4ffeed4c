"""Configuration of what comes in. Imports nothing heavy."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr

#: What the templates of Llama 3.1 and its successors print where they are told no date.
CHAT_DATE = date(2024, 7, 26)
#: Margins by rating, Llama 2 (Touvron et al. 2023), appendix, table 27.
MARGINS: dict[str, dict[str, float]] = {
    "none": {},
    "small": {"significantly_better": 1, "better": 2 / 3, "slightly_better": 1 / 3, "negligibly_better": 0},
    "large": {"significantly_better": 3, "better": 2, "slightly_better": 1, "negligibly_better": 0},
}


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceConfig(_Frozen):
    """One file, glob, folder or hub name."""

    path: str = Field(
        description="A file, a glob, any fsspec URL, or `hub:NAME` for a data set on the Hugging Face hub. "
        "JSONL, JSON, Parquet, Arrow/Feather, CSV, plain text; .gz is read through."
    )
    weight: float | None = Field(
        None, gt=0, description="Share of this source in a mixture, relative to the other weights. None in any source: "
        "every row of every source once an epoch."
    )
    split: str = Field("train", description="Split of a hub data set.")
    text_unit: Literal["line", "paragraph", "file"] = Field(
        "line", description="Plain text: what one document is. Paragraphs are separated by blank lines; "
        "books want `file`."
    )
    columns: dict[str, str] = Field(
        {}, description="Renames columns before the format is recognised: {prompt: question_text}."
    )
    where: dict[str, tuple[Scalar, ...]] = Field(
        {}, description="Take only rows whose columns (as the file names them) have one of these values: "
        "{tag: [helpfulness]}. The others are counted."
    )
    limit_rows: PositiveInt | None = Field(None, description="Read only the first rows.")

    @field_validator("where", mode="before")
    @classmethod
    def _one_value(cls, values: object) -> object:
        """`where: {tag: safety}` stands for a list of one."""
        if not isinstance(values, dict):
            return values
        return {name: value if isinstance(value, list | tuple) else (value,) for name, value in values.items()}


class DataConfig(_Frozen):
    """The data of a run."""

    train: tuple[SourceConfig, ...] = Field(min_length=1, description="What is trained on: one source or a mixture.")
    heldout: tuple[SourceConfig, ...] = Field((), description="What is evaluated on.")
    heldout_fraction: float = Field(
        0.0, ge=0, lt=1, description="Where no held-out source is given: this share of the rows, taken by hash of the "
        "prompt (of a document: its text)."
    )
    max_tokens: PositiveInt = Field(description="Longest sequence (for prompts: longest prompt), in tokens.")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "skip", description="Rows over max_tokens: end the run, leave out and count, or cut (examples at the end; "
        "prompts are never cut)."
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="Rows that are not of the format: end the run naming file and line, or skip and count."
    )
    apply_chat_template: Literal["auto", "always", "never"] = Field(
        "auto", description="Wrap prompts in the tokenizer's chat template: where it has one, always, or never."
    )
    chat_date: date = Field(
        CHAT_DATE, description="What chat templates print that print today's date (Llama 3.1 and its successors): a "
        "day that stays, so that the same files are the same tokens tomorrow."
    )
    learn_from: Literal["response", "everything"] = Field(
        "response", description="SFT: tokens with loss are the responses (assistant turns), or all."
    )
    documents: Literal["packed", "pieces", "separate"] = Field(
        "packed", description="Pre-training, and PPO's pretraining_data: join documents with EOS into sequences of "
        "max_tokens that attend across borders; or keep documents apart, cutting those over max_tokens into pieces; or "
        "keep them apart and whole. Elsewhere they are kept apart and whole: in SFT a text is one example."
    )
    margins: Literal["none", "small", "large"] | dict[str, NonNegative] = Field(
        "none", description="Reward models, loss `ranking`: margins of comparisons with a rating and no margin of "
        "their own. Llama 2's small or large table, or {rating: margin}. A rating that the table lacks makes a bad "
        "row; `none` gives every rating margin 0."
    )
    keep_columns: tuple[str, ...] = Field(
        (), description="Prompts: further columns of their rows that rewards are given, such as the right answer. They "
        "go by the names that `columns` of the source gives them; a row without one of them is a bad row."
    )
    cache_dir: str | None = Field(
        None, description="Keep tokenised data in files below this folder: mapped, not held in memory, and used again "
        "by later runs with the same data, tokenizer and settings. None: in memory."
    )

    @property
    def margin_of_rating(self) -> dict[str, float]:
        """The table that ``margins`` stands for; empty where ratings give no margin."""
        return MARGINS[self.margins] if isinstance(self.margins, str) else self.margins

    @model_validator(mode="before")
    @classmethod
    def _plain_paths(cls, values: object) -> object:
        """`train: a.jsonl` and `train: [a.jsonl, b.jsonl]` stand for sources that have but a path."""
        if not isinstance(values, dict):
            return values
        out = dict(values)
        for key in ("train", "heldout"):
            value = out.get(key)
            if isinstance(value, str | dict):
                value = [value]
            if isinstance(value, list | tuple):
                out[key] = tuple({"path": v} if isinstance(v, str) else v for v in value)
        return out

    @model_validator(mode="after")
    def _one_heldout(self) -> DataConfig:
        if self.heldout and self.heldout_fraction:
            raise ValueError("give heldout or heldout_fraction, not both")
        return self

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> DataConfig:
        without = [source.path for source in self.train if source.weight is None]
        if without and len(without) < len(self.train):
            raise ValueError(f"give every source of a mixture a weight, or none: {without[0]} has none")
        return self
