"""Every format becomes the same few canonical records."""

from __future__ import annotations

from typing import Any

import pytest

from data.errors import FormatError, RowError
from data.formats import Kind, recognise
from data.records import Comparison, Demonstration, Document, Prompt, Turn, prompt_key

ASK = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
Q, A, B = Turn("user", "q"), Turn("assistant", "a"), Turn("assistant", "b")


def parse(row: dict[str, Any], kind: Kind) -> Any:
    return recognise(frozenset(row), kind).parse(row)


def asked(*turns: Turn, verbatim: bool = False) -> Prompt:
    return Prompt(turns, verbatim)


def pair(prompt: Prompt, chosen: tuple[Turn, ...], rejected: tuple[Turn, ...], **facts: Any) -> Comparison:
    return Comparison(prompt, (chosen, rejected), (0, 1), **facts)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, Demonstration(asked(Q, verbatim=True), (A,))),
        ({"prompt": [ASK], "completion": [REPLY]}, Demonstration(asked(Q), (A,))),
        ({"messages": [ASK, REPLY]}, Demonstration(asked(Q), (A,))),
        ({"messages": [ASK, REPLY, ASK, REPLY]}, Demonstration(asked(Q, A, Q), (A,))),
        ({"messages": [ASK | {"content": [{"type": "text", "text": "q"}]}, REPLY]}, Demonstration(asked(Q), (A,))),
        ({"messages": "\n\nHuman: q\n\nAssistant: a"}, Demonstration(asked(Q), (A,))),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            Demonstration(asked(Turn("system", "s"), Q), (A,)),
        ),
        ({"instruction": "q", "output": "a"}, Demonstration(asked(Q), (A,))),
        ({"instruction": "q", "input": "", "output": "a", "category": "x"}, Demonstration(asked(Q), (A,))),
        ({"instruction": "q", "input": None, "output": "a"}, Demonstration(asked(Q), (A,))),
        ({"instruction": "q", "input": "i", "output": "a"}, Demonstration(asked(Turn("user", "q\n\ni")), (A,))),
        ({"question": "q", "answer": "a"}, Demonstration(asked(Q), (A,))),
        ({"text": "t"}, Document("t")),
    ],
)
def test_examples(row: dict[str, Any], expected: Any) -> None:
    assert parse(row, "examples") == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, pair(asked(Q, verbatim=True), (A,), (B,))),
        ({"prompt": "q", "chosen": [REPLY], "rejected": "b"}, pair(asked(Q, verbatim=True), (A,), (B,))),
        ({"prompt": "q", "chosen": [ASK, REPLY], "rejected": "b"}, pair(asked(Q, verbatim=True), (A,), (B,))),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
            pair(asked(Q), (A,), (B,)),
        ),
        (
            {"chosen": [ASK, REPLY], "rejected": [ASK, {"role": "assistant", "content": "b"}]},
            pair(asked(Q), (A,), (B,)),
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            pair(asked(Q), (A,), (B,)),
        ),
        (
            {
                "chosen": "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant: ",
            },
            pair(asked(Turn("user", "x"), Turn("assistant", "y"), Q), (A,), (Turn("assistant", ""),)),
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            pair(asked(Q), (A,), (B,)),
        ),
    ],
)
def test_comparisons(row: dict[str, Any], expected: Any) -> None:
    assert parse(row, "comparisons") == expected
    assert parse(row, "prompts") == expected.prompt


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "answer": "42"}, asked(Q, verbatim=True)),
        ({"prompt": [ASK]}, asked(Q)),
        ({"prompt": "\n\nHuman: q\n\nAssistant:"}, asked(Q)),
        ({"messages": [ASK]}, asked(Q)),
        ({"messages": [ASK, REPLY]}, asked(Q)),
        ({"messages": [ASK, REPLY, ASK]}, asked(Q, A, Q)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, asked(Q)),
        ({"instruction": "q", "input": "i", "output": "a"}, asked(Turn("user", "q\n\ni"))),
        ({"question": "q", "answer": "a"}, asked(Q)),
        ({"text": "q"}, asked(Q, verbatim=True)),
    ],
)
def test_prompts_are_the_prompt_part_of_any_format(row: dict[str, Any], expected: Any) -> None:
    assert parse(row, "prompts") == expected


HH = "\n\nHuman: q\n\nAssistant:"
PREFILLED = "\n\nHuman: q\n\nAssistant: Sure, "


@pytest.mark.parametrize("prompt", ["the cat", PREFILLED])
def test_texts_that_all_begin_with_a_plain_prompt_are_wholes(prompt: str) -> None:
    pair = parse({"prompt": prompt, "chosen": prompt + " sat", "rejected": prompt + "s"}, "comparisons")
    assert [turns[0].content for turns in pair.responses] == [" sat", "s"]
    given = [prompt + part for part in (" sat", "s", " lay")]
    ranked = parse({"prompt": prompt, "responses": given, "scores": [2, 1, 0]}, "comparisons")
    assert [turns[0].content for turns in ranked.responses] == [" sat", "s", " lay"]
    for last in (prompt, " lay"):  # then nothing says that the others are not answers that repeat the question
        apart = parse({"prompt": prompt, "responses": [*given[:2], last], "scores": [2, 1, 0]}, "comparisons")
        assert [turns[0].content for turns in apart.responses] == [*given[:2], last]


@pytest.mark.parametrize(
    ("prompt", "value", "response"),
    [
        (HH, " a", "a"),
        (HH, " a\n", "a"),
        (HH, HH + " a", "a"),
        (HH, HH, ""),
        (HH, "\n\nHuman:  q \n\nAssistant: a", "a"),
        (HH, "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b", "a\n\nb"),
        (HH, [ASK, REPLY], "a"),
        (HH, "q a", "q a"),
        ([ASK], HH + " a", "a"),
        ([ASK], " a", " a"),
        ("the cat", "the cat sat", "the cat sat"),
        ("the cat", " the cat sat", " the cat sat"),
        ("the cat", "the cat", "the cat"),
        (PREFILLED, PREFILLED + "a", PREFILLED + "a"),
        (PREFILLED, "a", "a"),
    ],
)
def test_beside_a_prompt_stands_a_response_or_a_whole_dialogue(prompt: object, value: object, response: str) -> None:
    """The prompt is not said twice, and no second space follows the speaker's name.

    A completion beside a plain prompt stands as it is: a demonstration may well begin by repeating what was asked.
    """
    expected = (Turn("assistant", response),)
    other = "another"
    pair = parse({"prompt": prompt, "chosen": value, "rejected": other}, "comparisons")
    assert pair.responses == (expected, (Turn("assistant", other),))
    ranked = parse({"prompt": prompt, "responses": [other, value], "scores": [0, 1]}, "comparisons")
    assert ranked.responses == pair.responses and ranked.prompt == pair.prompt
    judged = parse({"prompt": prompt, "completion": value, "label": True}, "feedback")
    if pair.prompt.verbatim:
        assert judged.response == (Turn("assistant", str(value)),)
        return
    assert (judged.prompt, judged.response) == (pair.prompt, expected)
    if response:
        assert parse({"prompt": prompt, "completion": value}, "examples").response == expected


def test_what_begins_with_the_prompt_is_not_rendered_with_it_twice() -> None:
    row = {"messages": HH, "responses": [HH + " a", " b"], "ranks": [1, 2]}
    assert parse(row, "comparisons") == pair(asked(Q), (A,), (B,))


def test_turns_of_one_side_in_a_row_become_one() -> None:
    record = parse({"messages": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b"}, "examples")
    assert record == Demonstration(asked(Q), (Turn("assistant", "a\n\nb"),))


@pytest.mark.parametrize(
    ("kind", "row", "why"),
    [
        ("examples", {"prompt": " ", "completion": "a"}, "prompt is empty"),
        ("examples", {"prompt": "q", "completion": " "}, "completion is empty"),
        ("examples", {"prompt": "q", "completion": 3}, "completion must be a list of messages"),
        ("examples", {"prompt": "q", "completion": [ASK]}, "holds the assistant's turns alone"),
        ("examples", {"messages": []}, "messages must be a list of messages"),
        ("examples", {"messages": [ASK]}, "the last turn is user's"),
        ("examples", {"messages": [REPLY]}, "no turn stands before"),
        ("examples", {"messages": [ASK, {"role": "robot", "content": "x"}]}, "message 2 has the role 'robot'"),
        ("examples", {"messages": [ASK, {"role": "assistant"}]}, "message 2: content must be text"),
        ("examples", {"messages": [ASK, "hello"]}, "message 2 is str 'hello'"),
        ("examples", {"messages": "hello"}, "must begin with"),
        ("examples", {"instruction": "q", "output": 1}, "output must be text, got int"),
        ("examples", {"question": "", "answer": "a"}, "question is empty"),
        ("examples", {"text": "\n"}, "text is empty"),
        ("comparisons", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        (
            "comparisons",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
            "they answer different prompts",
        ),
        ("comparisons", {"prompt": HH, "chosen": " a", "rejected": "a "}, "chosen and rejected are the same"),
        (
            "comparisons",
            {"prompt": HH, "chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "b"},
            "chosen is a dialogue that does not begin with the prompt",
        ),
        (
            "comparisons",
            {"prompt": HH, "chosen": HH + " a\n\nHuman: p\n\nAssistant: a", "rejected": "b"},
            "chosen: a response to a prompt holds the assistant's turns alone",
        ),
        (
            "comparisons",
            {"prompt": [ASK], "chosen": [ASK, REPLY, ASK, REPLY], "rejected": "b"},
            "chosen: a response to a prompt holds the assistant's turns alone",
        ),
        ("examples", {"prompt": HH, "completion": HH}, "completion is empty"),
        ("prompts", {"messages": [REPLY]}, "no turn stands before"),
        ("prompts", {"prompt": 4}, "prompt must be a list of messages"),
    ],
)
def test_rows_that_are_not_of_their_format(kind: Kind, row: dict[str, Any], why: str) -> None:
    with pytest.raises(RowError, match=why):
        parse(row, kind)


def test_unknown_columns() -> None:
    with pytest.raises(FormatError, match=r"the columns are none; for comparisons they must include one of: prompt \+"):
        recognise(frozenset(), "comparisons")
    assert str(recognise(frozenset({"text", "prompt", "completion"}), "examples")) == "prompt + completion"
    assert str(recognise(frozenset({"text", "prompt"}), "examples", whole_document=True)) == "text"


def test_prompt_key_is_of_the_prompt_alone() -> None:
    rows: list[tuple[dict[str, Any], Kind]] = [
        ({"prompt": "q"}, "prompts"),
        ({"prompt": "q", "completion": "a"}, "examples"),
        ({"question": "q", "answer": "b"}, "examples"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "comparisons"),
    ]
    assert len({prompt_key(parse(row, kind)) for row, kind in rows}) == 1
    assert prompt_key(parse({"prompt": "other"}, "prompts")) != prompt_key(parse({"prompt": "q"}, "prompts"))
