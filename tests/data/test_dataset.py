"""From files to batches: schemas, ids, splits, filters, cursors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.config import DataConfig
from data.dataset import Dataset
from data.errors import DataError, EmptyDataError, FormatError, RowError, TokenizerError, TooLongError
from data.formats import Kind
from data.order import Cursor
from experience.schema import COMPARISONS, EXAMPLES, PROMPTS, check_schema
from tests.data.conftest import CHATML
from tests.data.decoding import DecodingTokenizer


def demonstrations(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"list {n} the", "completion": f" cat {n}"} for n in range(start, start + count)]


def make(
    tokenizer: DecodingTokenizer,
    kind: Kind,
    train: Any,
    max_tokens: int = 64,
    seed: int = 0,
    whole_document: bool = False,
    **more: Any,
) -> Dataset:
    config = DataConfig(train=train, max_tokens=max_tokens, **more)
    return Dataset.from_config(config, kind, tokenizer, seed=seed, whole_document=whole_document)


def text(tokenizer: DecodingTokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens)


def learnt(tokenizer: DecodingTokenizer, batch: pa.RecordBatch, row: int) -> str:
    tokens, mask = batch["tokens"][row].as_py(), batch["loss_mask"][row].as_py()
    return tokenizer.decode([token for token, one in zip(tokens, mask, strict=True) if one])


def test_examples_are_prompt_and_completion_and_eos(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    data = make(plain, "examples", jsonl({"prompt": "the cat", "completion": " sat"}))
    batch = data.draw(Cursor(), 1).batch
    check_schema(batch, EXAMPLES)
    assert text(plain, batch["tokens"][0].as_py()) == "the cat sat</s>"
    assert learnt(plain, batch, 0) == " sat</s>"


def test_comparisons_are_two_rows_chosen_first(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": f"{n} the", "chosen": f" cat {n}", "rejected": f" dog {n}"} for n in range(7)]
    data = make(plain, "comparisons", jsonl(*rows))
    drawn = data.draw(Cursor(), 7)
    check_schema(drawn.batch, COMPARISONS)
    assert drawn.batch["rank"].to_pylist() == [0, 1] * 7
    ids = drawn.batch["comparison_id"].to_pylist()
    assert ids[::2] == ids[1::2] == drawn.ids.tolist()
    assert sorted(drawn.ids) == list(range(7))
    for row, number in enumerate(ids):
        word = "cat" if row % 2 == 0 else "dog"
        assert text(plain, drawn.batch["tokens"][row].as_py()) == f"{number} the {word} {number}</s>"
    assert drawn.lengths.tolist() == [len(tokens) for tokens in drawn.batch["tokens"].to_pylist()]


def test_prompts_carry_their_line_and_serial_number(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(*demonstrations(5))
    data = make(plain, "prompts", path)
    first = data.draw(Cursor(), 3)
    second = data.draw(first.next_cursor, 4)
    check_schema(first.batch, PROMPTS)
    assert first.ids.tolist() == [0, 1, 2]
    assert second.batch["prompt_id"].to_pylist() == [3, 4, 5, 6]
    for tokens, source in zip(first.batch["tokens"].to_pylist(), first.batch["source"].to_pylist(), strict=True):
        line = int(source.removeprefix(path + ":"))
        assert text(plain, tokens) == f"list {line - 1} the"


def test_batches_do_not_depend_on_how_the_order_is_cut(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    data = make(plain, "prompts", jsonl(*demonstrations(7)))
    whole = data.draw(Cursor(), 30).batch
    cursor, parts = Cursor(), []
    for size in (1, 2, 9, 3, 15):
        drawn = make(plain, "prompts", jsonl(*demonstrations(7))).draw(Cursor.from_json(cursor.to_json()), size)
        parts += drawn.batch.to_pylist()
        cursor = drawn.next_cursor
    assert parts == whole.to_pylist()
    assert cursor == Cursor(epoch=4, position=2, drawn=30)


def test_every_row_once_an_epoch_and_another_order_each(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    data = make(plain, "examples", jsonl(*demonstrations(20)))
    epochs = [data.draw(Cursor(epoch, 0), 20).ids.tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other_seed = make(plain, "examples", jsonl(*demonstrations(20)), seed=1)
    assert other_seed.draw(Cursor(), 20).ids.tolist() != epochs[0]


def test_held_out_rows_stay_held_out_when_data_grow(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    def heldout(count: int) -> tuple[set[str], set[str]]:
        data = make(plain, "prompts", jsonl(*demonstrations(count)), heldout_fraction=0.25)
        assert data.num_rows + data.num_heldout_rows == count
        trained = data.draw(Cursor(), data.num_rows).batch["source"].to_pylist()
        return set(data.heldout().batch["source"].to_pylist()), set(trained)

    (small, _), (large, trained) = heldout(200), heldout(400)
    assert 25 < len(small) < 75
    assert small <= large
    assert not large & trained


def test_the_same_prompt_is_held_out_in_every_kind(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": f"{n} the", "chosen": " cat", "rejected": " dog", "completion": " log"} for n in range(60)]
    def heldout(kind: Kind, skipped: int) -> list[list[int]]:
        path = jsonl(*rows[skipped:], name=f"{kind}.jsonl")
        data = make(plain, kind, path, heldout_fraction=0.3)
        tokens: list[list[int]] = data.heldout().batch["tokens"].to_pylist()
        return tokens

    prompts, examples, comparisons = heldout("prompts", 0), heldout("examples", 5), heldout("comparisons", 9)
    assert 5 < len(prompts) < 60
    count = len(comparisons) // 2
    assert count > 5
    prompts, examples = prompts[-count:], examples[-count:]
    for prompt, example, chosen in zip(prompts, examples, comparisons[::2], strict=True):
        assert example[: len(prompt)] == prompt == chosen[: len(prompt)]


def test_held_out_source(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    data = make(plain, "examples", jsonl(*demonstrations(5)), heldout=jsonl(*demonstrations(3, 90), name="h.jsonl"))
    drawn = data.heldout()
    assert data.num_heldout_rows == drawn.batch.num_rows == 3
    assert text(plain, drawn.batch["tokens"][2].as_py()) == "list 92 the cat 92</s>"
    assert data.heldout(1, 5).ids.tolist() == [6, 7], "behind the training rows"
    assert data.heldout(3, 5).batch.num_rows == 0


def test_nothing_held_out_is_an_empty_batch_unless_a_fraction_is_asked_for(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl(*demonstrations(2))
    assert make(plain, "examples", path).heldout().batch.num_rows == 0
    with pytest.raises(EmptyDataError, match=r"heldout_fraction 1e-09 holds out nothing.*2 rows read"):
        make(plain, "examples", path, heldout_fraction=1e-9)


def test_bad_row_is_refused_by_file_and_line(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(*demonstrations(2), "{broken", *demonstrations(1))
    with pytest.raises(RowError, match=rf"{path}:3: not JSON"):
        make(plain, "examples", path)


def test_bad_rows_are_skipped_counted_and_named(
    plain: DecodingTokenizer, jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    broken = ["[1]", {"prompt": "", "completion": "x"}, {"prompt": "x"}, {"prompt": 3, "completion": "y"}]
    path = jsonl(*demonstrations(2), *broken, *demonstrations(1))
    data = make(plain, "examples", path, bad_rows="skip")
    (counts,) = data.counts
    assert (counts.read, counts.bad, counts.too_long, counts.train) == (7, 4, 0, 3)
    for line, why in ((3, "JSON object"), (4, "prompt is empty"), (5, "columns are prompt"), (6, "list of messages")):
        assert any(f"{path}:{line}: " in message and why in message for message in caplog.messages), caplog.messages


def test_only_the_first_bad_rows_are_named(
    plain: DecodingTokenizer, jsonl: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    data = make(plain, "examples", jsonl(*demonstrations(1), *["nonsense"] * 50), bad_rows="skip")
    assert data.counts[0].bad == 50
    assert sum("left out: not JSON" in message for message in caplog.messages) == 20
    assert sum("counted from here on" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("kind", ["examples", "prompts"])
def test_too_long_rows(plain: DecodingTokenizer, jsonl: Callable[..., str], kind: Kind) -> None:
    rows = [*demonstrations(2), {"prompt": "the cat sat on " * 9, "completion": " log"}]
    path = jsonl(*rows)
    data = make(plain, kind, path, max_tokens=24, too_long="skip")
    assert (data.counts[0].too_long, data.num_rows) == (1, 2)
    assert data.longest <= 24
    with pytest.raises(TooLongError, match=rf"{path}:3: \d+ tokens, data.max_tokens is 24"):
        make(plain, kind, path, max_tokens=24, too_long="refuse")


def test_truncation_cuts_responses_but_never_prompts(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": "the", "completion": " cat sat" * 30}, {"prompt": "the dog " * 30, "completion": " log"}]
    data = make(plain, "examples", jsonl(*rows), max_tokens=16, too_long="truncate")
    batch = data.draw(Cursor(), 1).batch
    assert (data.num_rows, data.counts[0].too_long) == (1, 1)
    assert len(batch["tokens"][0]) == 16
    assert text(plain, batch["tokens"][0].as_py()).startswith("the cat sat cat")
    prompts = make(plain, "prompts", jsonl(*rows), max_tokens=16, too_long="truncate")
    assert (prompts.num_rows, prompts.counts[0].too_long) == (1, 1)


def test_a_comparison_is_left_out_whole(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    rows = [
        {"prompt": "the", "chosen": " cat", "rejected": " dog" * 40},
        {"prompt": "the", "chosen": " cat", "rejected": " mat"},
    ]
    data = make(plain, "comparisons", jsonl(*rows), max_tokens=16)
    assert (data.num_rows, data.counts[0].too_long) == (1, 1)
    assert [text(plain, row) for row in data.draw(Cursor(), 1).batch["tokens"].to_pylist()] == [
        "the cat</s>",
        "the mat</s>",
    ]


def test_responses_may_be_whole_dialogues_that_begin_with_the_prompt(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    """The tokens are those of the responses alone beside the same prompt, and of the dialogues without one."""
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    rows: list[dict[str, Any]] = [
        {"chosen": prompt + " Hello!", "rejected": prompt + " What?"},
        {"prompt": prompt, "chosen": prompt + " Hello!", "rejected": prompt + " What?"},
        {"prompt": prompt, "chosen": " Hello!", "rejected": "What?"},
        {"prompt": prompt, "responses": [" What?", prompt + " Hello!"], "scores": [0, 1]},
    ]
    data = make(plain, "comparisons", jsonl(*rows))
    assert [text(plain, row) for row in data.in_order().batch["tokens"].to_pylist()] == [
        prompt + " Hello!</s>",
        prompt + " What?</s>",
    ] * len(rows)
    learnt = make(plain, "examples", {"path": jsonl(*rows[1:3]), "columns": {"completion": "chosen"}}).in_order().batch
    assert [text(plain, row) for row in learnt["tokens"].to_pylist()] == [prompt + " Hello!</s>"] * 2
    verbatim = {"prompt": "the cat", "chosen": "the cat sat", "rejected": "the cat log"}
    pair = make(plain, "comparisons", jsonl(verbatim)).in_order().batch
    assert [text(plain, row) for row in pair["tokens"].to_pylist()] == ["the cat sat</s>", "the cat log</s>"]


@pytest.mark.parametrize("kind", ["comparisons", "feedback"])
def test_responses_that_a_template_makes_the_same_are_a_bad_row(
    make_tokenizer: Callable[..., DecodingTokenizer],
    jsonl: Callable[..., str],
    kind: Kind,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not only where they are cut: one better than itself teaches nothing."""
    trims = make_tokenizer(template=CHATML.replace("message['content']", "message['content'] | trim"), eos="<|im_end|>")
    good = {"prompt": "the", "chosen": " cat", "rejected": " dog"}
    path = jsonl(good, good | {"rejected": "cat "}, {"prompt": "the", "responses": ["a", "b"], "ranks": [1, 2]})
    if kind == "feedback":
        path = jsonl(good, good | {"rejected": "cat "})
    why = "two responses of different ranks are the same tokens"
    with pytest.raises(RowError, match=rf"{path}:2: {why}.*data.bad_rows: skip"):
        make(trims, kind, path)
    data = make(trims, kind, path, bad_rows="skip")
    (counts,) = data.counts
    kept = 1 if kind == "feedback" else 2
    assert (counts.read, counts.bad, counts.too_long, counts.train) == (kept + 1, 1, 0, kept)
    assert any(f"{path}:2: left out: {why}" in message for message in caplog.messages)
    assert make(trims, kind, path, bad_rows="skip", max_tokens=24, too_long="truncate").counts[0].bad == 1


def test_nothing_left_says_the_counts(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(*demonstrations(4), "nonsense")
    counts = r"5 rows read, 1 bad, 4 too long, 0 kept .*max_tokens 2; the longest has \d+"
    with pytest.raises(EmptyDataError, match=counts):
        make(plain, "examples", path, max_tokens=2, bad_rows="skip")
    with pytest.raises(EmptyDataError, match="0 rows read"):
        make(plain, "examples", jsonl(name="empty.jsonl"))


def test_wrong_columns_name_what_is_there_and_what_is_known(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl({"question_text": "x", "reply": "y"})
    with pytest.raises(FormatError) as failure:
        make(plain, "examples", path, bad_rows="skip")
    message = str(failure.value)
    assert message.startswith(f"{path}:1: the columns are question_text, reply;")
    assert all(part in message for part in ("prompt + completion", "messages", "question + answer", "columns: {"))
    with pytest.raises(FormatError, match=r"columns: \{completion: chosen\}"):
        make(plain, "examples", jsonl({"prompt": "x", "chosen": "y", "rejected": "z"}))


def test_columns_are_renamed(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    source = {"path": jsonl({"q": "the", "a": " cat"}), "columns": {"prompt": "q", "completion": "a"}}
    data = make(plain, "examples", source)
    assert text(plain, data.draw(Cursor(), 1).batch["tokens"][0].as_py()) == "the cat</s>"
    with pytest.raises(RowError, match="no column 'zz'"):
        make(plain, "examples", source | {"columns": {"prompt": "zz"}})


def test_documents_are_joined_with_eos_and_cut(plain: DecodingTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat\n\nthe dog\n" + "on the mat and the log\n" * 5)
    packed = make(plain, "examples", str(path), max_tokens=10, whole_document=True)
    rows = packed.draw(Cursor(), packed.num_rows)
    tokens = [rows.batch["tokens"][int(place)].as_py() for place in np.argsort(rows.ids)]
    assert all(len(row) == 10 for row in tokens[:-1])
    assert 1 < len(tokens[-1]) <= 10
    joined = text(plain, [token for row in tokens for token in row])
    assert joined == "the cat sat</s>the dog</s>" + "on the mat and the log</s>" * 5
    assert packed.counts[0].train == 7
    assert all(row[0] == 0 and all(row[1:]) for row in rows.batch["loss_mask"].to_pylist())
    separate = make(plain, "examples", str(path), max_tokens=32, documents="separate", whole_document=True)
    assert separate.num_rows == 7


@pytest.mark.parametrize("documents", ["packed", "pieces", "separate"])
def test_only_pretraining_joins_or_cuts_documents(
    plain: DecodingTokenizer, jsonl: Callable[..., str], documents: str
) -> None:
    """In SFT each text is an example, which attends to no other and is too long as any other; so where scores are
    measured."""
    long = {"text": "the cat sat on the mat and " * 9}
    path = jsonl({"text": "the cat"}, long, {"text": "the dog sat"}, {"prompt": "on", "completion": " log"})
    data = make(plain, "examples", path, max_tokens=12, documents=documents)
    wanted = ["the cat</s>", "the dog sat</s>", "on log</s>"]
    assert [text(plain, row) for row in data.in_order().batch["tokens"].to_pylist()] == wanted
    assert (data.counts[0].too_long, data.counts[0].train) == (1, 3)
    cut = make(plain, "examples", path, max_tokens=12, documents=documents, too_long="truncate")
    assert cut.num_rows == 4 and cut.longest == 12
    config = DataConfig(train=path, max_tokens=12, documents=documents)
    measured = Dataset.first_rows(config, "examples", plain, 2).in_order().batch
    assert [text(plain, row) for row in measured["tokens"].to_pylist()] == wanted[:2]


def test_a_lone_last_token_is_no_sequence(plain: DecodingTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat\n")
    count = make(plain, "examples", str(path), max_tokens=99, whole_document=True).num_tokens
    cut = make(plain, "examples", str(path), max_tokens=count - 1, whole_document=True)
    assert (cut.num_rows, cut.num_tokens) == (1, count - 1)


def test_pretraining_takes_any_format_whole(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl({"prompt": "the", "completion": " cat", "text": "a text"}, {"prompt": "on", "completion": " log"})
    rows = make(plain, "examples", path, documents="separate", whole_document=True).draw(Cursor(), 2)
    texts = {text(plain, row) for row in rows.batch["tokens"].to_pylist()}
    assert texts == {"a text</s>", "on log</s>"}
    assert all(row[0] == 0 and all(row[1:]) for row in rows.batch["loss_mask"].to_pylist())
    everything = make(plain, "examples", path, learn_from="everything").draw(Cursor(), 2).batch
    assert all(row[0] == 0 and all(row[1:]) for row in everything["loss_mask"].to_pylist())


def test_mixture_of_files_by_weight(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    sources = [
        {"path": jsonl(*demonstrations(90)), "weight": 1.0},
        {"path": jsonl(*demonstrations(10, 700), name="b.jsonl"), "weight": 1.0},
    ]
    data = make(plain, "prompts", sources)
    texts = [text(plain, row) for row in data.draw(Cursor(), 100).batch["tokens"].to_pylist()]
    assert len([row for row in texts if re.match(r"list 70\d", row)]) == 50
    plain_join = make(plain, "prompts", [source["path"] for source in sources])
    assert len({text(plain, row) for row in plain_join.draw(Cursor(), 100).batch["tokens"].to_pylist()}) == 100
    with pytest.raises(ValueError, match="give every source of a mixture a weight, or none"):
        DataConfig(train=[sources[0], {"path": "c.jsonl"}], max_tokens=4)


def test_fingerprint_follows_data_seed_and_weights(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(*demonstrations(5))
    print_of = make(plain, "examples", path).fingerprint()
    assert make(plain, "examples", path).fingerprint() == print_of
    assert make(plain, "examples", path, seed=1).fingerprint() != print_of
    assert make(plain, "examples", path, learn_from="everything").fingerprint() != print_of
    assert make(plain, "examples", jsonl(*demonstrations(4))).fingerprint() != print_of


def test_cursors_that_are_none_are_refused(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    data = make(plain, "examples", jsonl(*demonstrations(5)))
    for wrong in ("", "[]", "{}x", '{"epoch": -1}', '{"page": 1}', json.dumps({"epoch": "0"})):
        with pytest.raises(DataError, match="not a data cursor"):
            Cursor.from_json(wrong)
    with pytest.raises(DataError, match="an epoch has 5 rows"):
        data.draw(Cursor(0, 5), 1)
    with pytest.raises(DataError, match="at least one row"):
        data.draw(Cursor(), 0)


def test_tokenizer_without_eos_is_refused_where_it_is_needed(
    make_tokenizer: Callable[..., DecodingTokenizer], jsonl: Callable[..., str]
) -> None:
    bare = make_tokenizer(eos=None)
    path = jsonl(*demonstrations(2))
    for kind in ("examples", "comparisons"):
        with pytest.raises(TokenizerError, match="has no EOS token, which has to end every sequence"):
            make(bare, kind, path)
    assert make(bare, "prompts", path).num_rows == 2


def test_tokenizer_without_template_is_refused_for_always(plain: DecodingTokenizer, jsonl: Callable[..., str]) -> None:
    with pytest.raises(TokenizerError, match=r"has no chat template, and .* is `always`"):
        make(plain, "prompts", jsonl(*demonstrations(2)), apply_chat_template="always")


def test_prompts_keep_the_columns_that_rewards_need(
    plain: DecodingTokenizer, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} the", "gold": n, "tags": ["a", None], "other": "é"} for n in range(12)]
    path = jsonl(*rows)
    train = {"path": path, "columns": {"answer": "gold"}}
    names = ["answer", "tags", "other"]
    for cache_dir in (None, str(tmp_path / "cache")):
        data = make(plain, "prompts", train, keep_columns=names, heldout_fraction=0.5, cache_dir=cache_dir)
        batch = pa.Table.from_batches([data.in_order().batch])
        kept = [json.loads(columns) for columns in batch["columns"].to_pylist()]
        assert sorted(one["answer"] for one in kept) == list(range(12))
        assert all(one == {"answer": one["answer"], "tags": ["a", None], "other": "é"} for one in kept)
        texts = [text(plain, tokens) for tokens in batch["tokens"].to_pylist()]
        assert texts == [f"{one['answer']} the" for one in kept]
    assert make(plain, "prompts", path).draw(Cursor(), 2).batch["columns"].to_pylist() == ["{}"] * 2


def test_a_prompt_without_a_column_that_is_kept_is_a_bad_row(
    plain: DecodingTokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl({"prompt": "a", "answer": 1}, {"prompt": "b", "gold": 1})
    with pytest.raises(RowError, match=re.escape(f"{path}:2: no column 'answer', which data.keep_columns asks for")):
        make(plain, "prompts", path, keep_columns=["answer"])
    assert make(plain, "prompts", path, keep_columns=["answer"], bad_rows="skip").num_rows == 1
