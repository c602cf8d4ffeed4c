"""The task of the demo: lists of numbers to be sorted, and what people write and say about them.

The user gives a list of whole numbers and asks for it *sorted*::

    list 31 4 12 9 25 sorted :   ->   4 9 12 25 31

What the user wants is the order by value, smallest first.  The people who wrote the
demonstrations were of mixed quality, as people are:

* some sorted by value, which is right;
* as many let a spreadsheet sort the numbers *as text*, which looks plausible and is wrong
  (``12 25 31 4 9``, because "12" comes before "4" in a dictionary);
* both kinds slip now and then: they leave a number out, swap two neighbours, write one twice or
  misread one.

So the stages of RLHF each have something real to do:

1. **Pre-training** reads plain documents in which numbers are counted, listed by size and listed
   by spelling.  The model comes to know both orders; nothing tells it which one a user wants.
2. **Supervised fine-tuning** imitates the demonstrations, the wrong ones included.
3. **The reward model** learns from pairs of answers to one list which of the two people prefer.
4. **PPO** moves the policy towards the answers that the reward model prefers.

Because a program can tell whether an answer is right (`is_right`), the result is measured against
the truth and not merely against the reward model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from examples.untrained import EOS_TOKEN

LARGEST_NUMBER = 50
SHORTEST_LIST = 4
LONGEST_LIST = 6

#: The words of prompts and documents, besides the numbers.
WORDS = ("list", "count", "sorted", "by", "size", "spelling", ":")

#: The most tokens in a demonstration: the numbers, one of them written twice, end of sequence.
#: A policy that is let write two tokens more than that cannot be cut off in a right answer.
LONGEST_COMPLETION = LONGEST_LIST + 2
#: The most tokens in a prompt: "list", the numbers, "sorted :".
LONGEST_PROMPT = 1 + LONGEST_LIST + 2


@dataclass(frozen=True)
class Labellers:
    """How the people behave who write demonstrations and answers to be compared."""

    share_by_spelling: float = 0.5
    """Share of the demonstrations whose writer sorted the numbers as text."""
    slip_rate: float = 0.1
    """Share of the demonstrations in which the writer slips, in whichever order."""


def make_prompt(numbers: Sequence[int]) -> str:
    """The question that a user asks about `numbers`."""
    return f"list {join(numbers)} sorted :"


def join(numbers: Sequence[int]) -> str:
    return " ".join(str(number) for number in numbers)


def by_size(numbers: Sequence[int]) -> list[int]:
    """`numbers` from small to large, which is what the user wants."""
    return sorted(numbers)


def by_spelling(numbers: Sequence[int]) -> list[int]:
    """`numbers` sorted as text, the way a careless spreadsheet does it: 10 comes before 9."""
    return sorted(numbers, key=str)


def right_answer(prompt: str) -> str:
    """The one right response to `prompt`."""
    return join(by_size([int(word) for word in prompt.split() if word.isdigit()]))


def is_right(prompt: str, response: str) -> bool:
    """Whether `response` lists exactly the numbers of `prompt` from small to large.

    How they are spaced does not matter, and an end-of-sequence token at the end is ignored.
    """
    words = response.split()
    if words and words[-1] == EOS_TOKEN:
        words.pop()
    return words == right_answer(prompt).split()


def slip(numbers: Sequence[int], rng: random.Random) -> list[int]:
    """`numbers` with one slip of the pen: one left out, swapped, written twice or misread."""
    slipped = list(numbers)
    place = rng.randrange(len(slipped))
    kind = rng.choices(("leave out", "swap", "repeat", "misread"), weights=(1, 1, 1, 2))[0]
    if kind == "leave out":
        del slipped[place]
    elif kind == "swap":
        place = min(place, len(slipped) - 2)
        slipped[place], slipped[place + 1] = slipped[place + 1], slipped[place]
    elif kind == "repeat":
        slipped.insert(place, slipped[place])
    else:
        slipped[place] = misread(numbers, place, rng)
    return slipped


def misread(numbers: Sequence[int], place: int, rng: random.Random) -> int:
    """A number to mistake `numbers[place]` for: a new one that fits between its neighbours.

    Such a mistake leaves the order right, so only a look at the question gives it away.
    """
    before = numbers[place - 1] if place > 0 else 0
    after = numbers[place + 1] if place + 1 < len(numbers) else LARGEST_NUMBER + 1
    low, high = min(before, after), max(before, after)
    fitting = set(range(low + 1, high)) - set(numbers)
    others = set(range(1, LARGEST_NUMBER + 1)) - set(numbers)
    return rng.choice(sorted(fitting or others))


class ListSource:
    """Draws lists of different numbers, keeping held-out sets of numbers apart from all others."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._reserved: set[frozenset[int]] = set()

    def beside(self, rng: random.Random) -> ListSource:
        """A source that draws from `rng`, leaves this one's draws alone and keeps out what it keeps out."""
        source = ListSource(rng)
        source._reserved = self._reserved
        return source

    def draw(self) -> list[int]:
        """A list for training: never a reordering of a held-out one."""
        while True:
            numbers = self._candidate()
            if frozenset(numbers) not in self._reserved:
                return numbers

    def draw_heldout(self) -> list[int]:
        """A held-out list.  Draw all of these before the first list for training."""
        while True:
            numbers = self._candidate()
            if frozenset(numbers) not in self._reserved:
                self._reserved.add(frozenset(numbers))
                return numbers

    def _candidate(self) -> list[int]:
        """Different numbers, on which the two orders disagree: else there is nothing to learn."""
        while True:
            length = self._rng.randint(SHORTEST_LIST, LONGEST_LIST)
            numbers = self._rng.sample(range(1, LARGEST_NUMBER + 1), length)
            if by_size(numbers) != by_spelling(numbers):
                return numbers


def pretraining_document(source: ListSource, rng: random.Random) -> str:
    """A document that shows how numbers are ordered, but answers no user."""
    kind = rng.choices(("count", "size", "spelling"), weights=(1, 4, 4))[0]
    if kind == "count":
        first = rng.randint(1, LARGEST_NUMBER - LONGEST_LIST)
        return f"count {join(range(first, first + LONGEST_LIST + 1))}"
    numbers = source.draw()
    if kind == "size":
        return f"list {join(numbers)} by size : {join(by_size(numbers))}"
    return f"list {join(numbers)} by spelling : {join(by_spelling(numbers))}"


def demonstration(
    numbers: Sequence[int], labellers: Labellers, rng: random.Random
) -> dict[str, str]:
    """What one labeller, of the better or the worse kind, wrote for `numbers`."""
    careless = rng.random() < labellers.share_by_spelling
    answer = by_spelling(numbers) if careless else by_size(numbers)
    if rng.random() < labellers.slip_rate:
        answer = slip(answer, rng)
    return {"prompt": make_prompt(numbers), "completion": " " + join(answer)}


def preference(numbers: Sequence[int], rng: random.Random) -> dict[str, str]:
    """A better and a worse answer to one list.

    Whoever compares two answers prefers the right one to any other; of two wrong ones, the one in
    the right order with a slip to the one in the wrong order, and the one without a slip to the
    one with.
    """
    right, spelled = by_size(numbers), by_spelling(numbers)
    pairs = (
        (right, spelled),
        (right, slip(right, rng)),
        (right, slip(spelled, rng)),
        (slip(right, rng), slip(spelled, rng)),
        (spelled, slip(spelled, rng)),
    )
    chosen, rejected = rng.choices(pairs, weights=(3, 10, 1, 1, 1))[0]
    if rejected in (chosen, right):  # A slip can, by luck, undo the wrong order: compare again.
        return preference(numbers, rng)
    return {
        "prompt": make_prompt(numbers),
        "chosen": " " + join(chosen),
        "rejected": " " + join(rejected),
    }


def ranking(numbers: Sequence[int], rng: random.Random) -> dict[str, object]:
    """Four different answers to one list, each with a score that orders them as `preference` does.

    The right answer has 3, one in the right order with a slip 2, the wrong order 1, and that with a
    slip 0.  Two answers of the same score are a tie.
    """
    right, spelled = by_size(numbers), by_spelling(numbers)
    while True:
        slipped, again, worst = slip(right, rng), slip(right, rng), slip(spelled, rng)
        answers = [(right, 3), (slipped, 2), (again, 2), (spelled, 1), (worst, 0)]
        # As in `preference`, a slip can undo the wrong order: take another.
        if worst != sorted(worst) and len({tuple(answer) for answer, _ in answers}) == len(answers):
            break
    drawn = rng.sample(answers, 4)
    return {
        "prompt": make_prompt(numbers),
        "responses": [" " + join(answer) for answer, _ in drawn],
        "scores": [score for _, score in drawn],
    }


def tagged(numbers: Sequence[int], rng: random.Random) -> dict[str, object]:
    """A better and a worse answer to one list, judged for one thing alone, which `tag` names.

    Helpfulness is what `preference` is about.  Safety, here, is to name no number that the user did
    not: an answer in the wrong order is safe, and one that looks right with a number of its own is
    not.
    """
    if rng.random() < 0.5:
        return {**preference(numbers, rng), "tag": "helpfulness"}
    invented = by_size(numbers)
    place = rng.randrange(len(invented))
    invented[place] = misread(invented, place, rng)
    return {
        "prompt": make_prompt(numbers),
        "chosen": " " + join(rng.choice((by_size(numbers), by_spelling(numbers)))),
        "rejected": " " + join(invented),
        "tag": "safety",
    }


#: What a labeller says of two answers whose scores differ by so much (the words of Llama 2's comparisons).
RATINGS = {3: "significantly_better", 2: "better", 1: "slightly_better"}


def judgement(numbers: Sequence[int], rng: random.Random) -> dict[str, object]:
    """Two answers of a `ranking`, how much better the better one is, and how sure one may be of it.

    `preference` is the probability that the first answer is the better one; either may come first.
    """
    ranked = ranking(numbers, rng)
    answers = list(zip(cast(list[str], ranked["responses"]), cast(list[int], ranked["scores"]), strict=True))
    while True:
        (first, high), (second, low) = rng.sample(answers, 2)
        if high != low:
            break
    return {
        "prompt": ranked["prompt"],
        "responses": [first, second],
        "scores": [high, low],
        "preference": round(1 / (1 + math.exp(low - high)), 3),
        "rating": RATINGS[abs(high - low)],
    }
