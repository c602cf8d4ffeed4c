"""What is rendered, and which characters of it the model has to write."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, tzinfo
from pathlib import Path
from typing import Any, Literal

import pytest

from data.chat import Rendered, Renderer
from data.config import CHAT_DATE, DataConfig
from data.dataset import Dataset
from data.errors import RowError, TokenizerError
from data.records import Demonstration, Document, Prompt, Turn
from data.tokenize import Encoder
from tests.data.decoding import DecodingTokenizer

USER, BOT = "user", "assistant"
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>bot "
    "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot {% endif %}"
)
#: Like some reasoning models: what the assistant said is written in full only in the last turn.
FORGETFUL = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['content'] if loop.last or message['role'] == 'user' else message['content'][:1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_END = (
    "{% for message in messages %}### {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message['content'] }}]{% endfor %}"
)


#: As Llama 3.1 and its successors begin.
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today Date: {{ date_string }} {{ strftime_now('%H:%M') }}\n" + MARKED
)


def turns(*contents: str, first: str = USER) -> tuple[Turn, ...]:
    order = (USER, BOT) if first == USER else (BOT, USER)
    return tuple(Turn(order[place % 2], content) for place, content in enumerate(contents))


def demonstration(*contents: str) -> Demonstration:
    dialogue = turns(*contents)
    return Demonstration(Prompt(dialogue[:-1], verbatim=False), dialogue[-1:])


def learnt(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.fixture(scope="module")
def of(make_tokenizer: Callable[..., DecodingTokenizer]) -> Callable[..., Renderer]:
    def renderer(
        template: str | None = None,
        apply: Literal["auto", "always", "never"] = "auto",
        *,
        chat_date: date = CHAT_DATE,
        **more: Any,
    ) -> Renderer:
        return Renderer(make_tokenizer(template=template, **more), apply, chat_date)

    return renderer


def test_verbatim_is_concatenation(plain: DecodingTokenizer) -> None:
    prompt = Prompt(turns("the cat"), verbatim=True)
    renderer = Renderer(plain, "auto", CHAT_DATE)
    assert renderer.prompt(prompt).text == "the cat"
    rendered = renderer.response(prompt, turns(" sat", first=BOT))
    assert (rendered.text, learnt(rendered), rendered.eos) == ("the cat sat", [" sat"], True)


def test_dialogue_without_template(plain: DecodingTokenizer) -> None:
    renderer = Renderer(plain, "auto", CHAT_DATE)
    dialogue = (Turn("system", "Be kind."), *turns("a", "b", "c"))
    asked = "Be kind.\n\nHuman: a\n\nAssistant: b</s>\n\nHuman: c\n\nAssistant:"
    assert renderer.prompt(Prompt(dialogue, verbatim=False)).text == asked
    rendered = renderer.demonstration(Demonstration(Prompt(dialogue, verbatim=False), turns("d", first=BOT)))
    assert rendered.text == asked + " d"
    assert learnt(rendered) == [" b</s>", " d"]
    assert rendered.eos


def test_template_learns_every_turn_with_its_end(chatml: DecodingTokenizer) -> None:
    renderer = Renderer(chatml, "auto", CHAT_DATE)
    rendered = renderer.demonstration(demonstration("a", "b", "c", "d"))
    assert learnt(rendered) == ["b<|im_end|>", "d<|im_end|>"]
    assert rendered.text.endswith("d<|im_end|>"), "what the template writes behind the last end-of-turn is cut"
    assert not rendered.eos
    tokens = Encoder(chatml).encode([rendered])[0]
    assert tokens.tokens[-1] == chatml.eos_token_id
    assert tokens.mask[-1] == 1


def test_what_is_trained_on_begins_with_what_the_engines_are_given(
    chatml: DecodingTokenizer, plain: DecodingTokenizer
) -> None:
    for tokenizer in (chatml, plain):
        renderer, encoder = Renderer(tokenizer, "auto", CHAT_DATE), Encoder(tokenizer)
        for prompt in (Prompt(turns("the cat"), verbatim=True), Prompt(turns("a", "b", "c"), verbatim=False)):
            asked, whole = encoder.encode([renderer.prompt(prompt), renderer.response(prompt, turns(" d", first=BOT))])
            assert whole.tokens[: len(asked.tokens)] == asked.tokens
            assert whole.mask == [0] * len(asked.tokens) + [1] * (len(whole.tokens) - len(asked.tokens))


def test_template_without_an_end_gets_eos(of: Callable[..., Renderer]) -> None:
    rendered = of(NO_END).demonstration(demonstration("a", "b", "c", "d"))
    assert learnt(rendered) == [" b\n", " d\n"]
    assert rendered.eos


def test_markers_are_used_and_completed_by_the_end_of_turn(of: Callable[..., Renderer]) -> None:
    rendered = of(MARKED).demonstration(demonstration("a", "b", "c", "d"))
    assert learnt(rendered) == ["b<|im_end|>", "d<|im_end|>"]
    assert rendered.text.endswith("d<|im_end|>")
    assert not rendered.eos


def test_template_that_rewrites_the_past_is_refused_by_row(of: Callable[..., Renderer]) -> None:
    renderer = of(FORGETFUL)
    assert learnt(renderer.demonstration(demonstration("a", "bb"))) == ["bb</s>"]
    with pytest.raises(RowError, match="before turn 2 otherwise"):
        renderer.demonstration(demonstration("a", "bb", "c", "dd"))


def test_template_whose_answer_does_not_follow_its_question_is_refused_by_row(of: Callable[..., Renderer]) -> None:
    thinking = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    prompt = Prompt(turns("a"), verbatim=False)
    with pytest.raises(RowError, match="before turn 2 otherwise"):
        of(thinking).response(prompt, turns("b", first=BOT))


def test_template_that_refuses_the_turns_is_named(of: Callable[..., Renderer]) -> None:
    two_users = Prompt((Turn(USER, "a"), Turn(USER, "b")), verbatim=False)
    with pytest.raises(RowError, match="the chat template refuses these turns: roles must alternate"):
        of(ALTERNATING).prompt(two_users)


def test_never_and_always(of: Callable[..., Renderer], chatml: DecodingTokenizer) -> None:
    prompt = Prompt(turns("the cat"), verbatim=True)
    assert Renderer(chatml, "never", CHAT_DATE).prompt(prompt).text == "the cat"
    assert Renderer(chatml, "always", CHAT_DATE).prompt(prompt).text.endswith("<|im_start|>assistant\n")
    with pytest.raises(TokenizerError, match="has no chat template"):
        of(apply="always")


def test_a_template_prints_the_date_that_it_is_given_and_never_todays(of: Callable[..., Renderer]) -> None:
    """In prompts, responses and demonstrations, marked ones too, so that the same rows are the same tokens tomorrow."""
    prompt = Prompt(turns("a"), verbatim=False)
    for renderer, day in (
        (of(DATED), "26 Jul 2024"),
        (of(DATED, chat_date=date(2026, 1, 5)), "05 Jan 2026"),
    ):
        for rendered in (
            renderer.prompt(prompt),
            renderer.response(prompt, turns("b", first=BOT)),
            renderer.demonstration(demonstration("a", "b", "c", "d")),
        ):
            assert rendered.text.startswith(f"Today Date: {day} 00:00\n")


def test_the_same_files_are_the_same_rows_on_another_day(
    make_tokenizer: Callable[..., DecodingTokenizer],
    jsonl: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = make_tokenizer(template=DATED)
    path = jsonl(*({"prompt": f"{n} the", "completion": " cat"} for n in range(3)))

    def found(**more: Any) -> set[str]:
        datas = []
        for cache_dir in (None, str(tmp_path / "cache")):
            config = DataConfig(train=path, max_tokens=128, cache_dir=cache_dir, **more)
            datas.append(Dataset.from_config(config, "examples", tokenizer, seed=0))
        return {told for data in datas for told in (data.fingerprint(), data.digest())}

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Tomorrow:
            return cls(2031, 2, 3)

    before = found()
    assert len(before) == 2
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert found() == before
    assert found(chat_date="2031-02-03").isdisjoint(before)


def test_dialogue_without_eos_is_refused_where_it_is_needed(of: Callable[..., Renderer]) -> None:
    renderer = of(eos=None)
    assert renderer.prompt(Prompt(turns("a"), verbatim=False)).text == "\n\nHuman: a\n\nAssistant:"
    with pytest.raises(TokenizerError, match="has no EOS token, which has to follow every turn"):
        renderer.prompt(Prompt(turns("a", "b", "c"), verbatim=False))


def test_response_that_brings_its_own_eos_gets_no_second(plain: DecodingTokenizer) -> None:
    prompt = Prompt(turns("the cat"), verbatim=True)
    rendered = Renderer(plain, "auto", CHAT_DATE).response(prompt, turns(" sat</s>", first=BOT))
    (row,) = Encoder(plain).encode([rendered])
    assert plain.eos_token_id is not None
    assert row.tokens.count(plain.eos_token_id) == 1


def test_bos_comes_once_in_front(make_tokenizer: Callable[..., DecodingTokenizer]) -> None:
    tokenizer = make_tokenizer(bos=True)
    assert tokenizer.bos_token_id is not None
    renderer, encoder = Renderer(tokenizer, "auto", CHAT_DATE), Encoder(tokenizer)
    prompt = Prompt(turns("the cat"), verbatim=True)
    rows = encoder.encode(
        [
            renderer.prompt(prompt),
            renderer.response(prompt, turns(" sat", first=BOT)),
            renderer.document(Document("the dog")),
            renderer.demonstration(demonstration("a", "b", "c", "d")),
        ]
    )
    for row in rows:
        assert row.tokens[0] == tokenizer.bos_token_id
        assert row.tokens.count(tokenizer.bos_token_id) == 1
        assert len(row.tokens) == len(row.mask)
    writes_bos = make_tokenizer(bos=True, template="<s>{{ messages[0]['content'] }}")
    with_template = Renderer(writes_bos, "auto", CHAT_DATE).prompt(prompt)
    assert encoder.encode([with_template])[0].tokens.count(tokenizer.bos_token_id) == 1


def test_a_token_across_the_border_is_not_made(plain: DecodingTokenizer) -> None:
    """``th`` + ``e cat`` would be the one token ``the`` if the text were tokenised as a whole."""
    encoder, renderer = Encoder(plain), Renderer(plain, "auto", CHAT_DATE)
    (whole,) = encoder.encode([renderer.document(Document("the cat"))])
    prompt = Prompt(turns("th"), verbatim=True)
    asked, apart = encoder.encode([renderer.prompt(prompt), renderer.response(prompt, turns("e cat", first=BOT))])
    assert apart.tokens != whole.tokens
    assert apart.tokens[: len(asked.tokens)] == asked.tokens
    assert sum(apart.mask) == len(apart.tokens) - len(asked.tokens)
    assert plain.decode(apart.tokens) == plain.decode(whole.tokens) == "the cat</s>"
