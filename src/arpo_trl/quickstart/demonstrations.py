"""Noisy demonstrations from a scripted policy that solves the task and makes mistakes at known rates.

A model that is cold-started on them knows the format and is a good start for reinforcement learning. It is right often
enough to get rewards, wrong often enough to improve, and most uncertain directly after a search.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arpo_trl.quickstart.corpus import TOPICS, Quantity
from arpo_trl.quickstart.tasks import Question, parse_question

_QUANTITY = re.compile(r" (\d+(?:\.\d+)?)( (?:°C|K|ft|m|thousand km²|million km²|million)\b)?")
_POINTER = re.compile(r"look under (.+)\.")
_ASKED_VERBS = {topic.asked: topic.asked_sentence.split()[1] for topic in TOPICS}
_NOTHING = Quantity("0", "")

PLAIN_QUERIES = ("{asked} of {name}",)
"""The form of a search query in the quickstart."""
VARIED_QUERIES = tuple(
    opening + body
    for opening in ("", "find ", "give ", "what ")
    for body in ("{asked} of {name}", "{asked} for {name}", "{name} {asked}")
)
"""Forms with the same results, since no passage contains their other words. Rollouts of a prompt rarely repeat a
query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRates:
    """Probabilities of the scripted policy's mistakes.

    Attributes:
        wrong_snippet: Uses the wrong one of an entity's two values; per entity.
        skip_second_query: Does not follow an alias to its name and uses a number from another page; per alias.
        forget_unit: Does not convert a value; per value with a different unit.
        wrong_operation: Adds instead of subtracting, or subtracts instead of adding; per question.
        answer_directly: Answers with the value that it has just read, without python; per entity.
        give_up: Continues without a result instead of a retry; per failed call.
    """

    wrong_snippet: float = 0.22
    skip_second_query: float = 0.35
    forget_unit: float = 0.35
    wrong_operation: float = 0.15
    answer_directly: float = 0.03
    give_up: float = 0.05


NO_NOISE = NoiseRates(
    wrong_snippet=0.0,
    skip_second_query=0.0,
    forget_unit=0.0,
    wrong_operation=0.0,
    answer_directly=0.0,
    give_up=0.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Failing calls. The scripted policy retries them.

    Attributes:
        rate: Probability that a call fails, also for a retry; less than 1.
        texts: For each tool, the error texts that replace a result, all with equal probability.
    """

    rate: float
    texts: Mapping[str, Sequence[str]]


NO_FAILURES = Failures(rate=0.0, texts={})


def make_demonstrations(
    tasks: Sequence[Mapping[str, Any]],
    search: Callable[[str], str],
    seed: int,
    n: int,
    noise: NoiseRates = NoiseRates(),
    failures: Failures = NO_FAILURES,
    queries: Sequence[str] = PLAIN_QUERIES,
) -> list[dict[str, Any]]:
    """Return `n` demonstrations, rows {messages}. They cycle through `tasks` in order, with new mistakes each time.

    Args:
        tasks: Rows of `make_tasks`.
        search: The search tool of the policy, so that the demonstrations contain its real results.
        seed: The same seed gives the same demonstrations.
        n: Number of rows.
        noise: Probability of each mistake; `NO_NOISE` solves every task.
        failures: Probability that a call fails, and the error texts.
        queries: Forms of a search query, all with equal probability.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        trajectory = _Trajectory(tasks[i % len(tasks)]["prompt"], search, rng, noise, failures, queries)
        _demonstrate(trajectory, rng, noise)
        rows.append({"messages": trajectory.messages})
    return rows


class _Trajectory:
    """Builds the messages of one demonstration."""

    def __init__(
        self,
        prompt: Sequence[Mapping[str, str]],
        search: Callable[[str], str],
        rng: random.Random,
        noise: NoiseRates,
        failures: Failures,
        queries: Sequence[str],
    ):
        self.messages: list[dict[str, str]] = [dict(message) for message in prompt]
        self._search = search
        self._rng = rng
        self._noise = noise
        self._failures = failures
        self._queries = queries

    def search(self, asked: str, name: str) -> str | None:
        """Return the search result; None if the call failed and the policy gave up."""
        # With one form no random number is drawn, so that all other draws stay the same.
        form = self._rng.choice(self._queries) if len(self._queries) > 1 else self._queries[0]
        query = form.format(asked=asked, name=name)
        result = self._search(query)
        return result if self._call("search", query, result) else None

    def python(self, code: str, output: str) -> bool:
        """Return whether python returned its output; False if the call failed and the policy gave up."""
        return self._call("python", code, output)

    def answer(self, value: str) -> None:
        self.messages.append({"role": "assistant", "content": f"<answer>\\boxed{{{value}}}</answer>"})

    def _call(self, tool: str, argument: str, result: str) -> bool:
        """Write a call and retry it until it succeeds. Return False if the policy gave up."""
        # At a rate of 0 no random number is drawn, so that all other draws stay the same.
        while self._failures.rate and self._rng.random() < self._failures.rate:
            self._write(tool, argument, self._rng.choice(self._failures.texts[tool]))
            if self._rng.random() < self._noise.give_up:
                return False
        self._write(tool, argument, result)
        return True

    def _write(self, tool: str, argument: str, result: str) -> None:
        self.messages.append({"role": "assistant", "content": f"<{tool}>{argument}</{tool}>"})
        self.messages.append({"role": "tool", "name": tool, "content": result})


def _demonstrate(trajectory: _Trajectory, rng: random.Random, noise: NoiseRates) -> None:
    question = parse_question(trajectory.messages[-1]["content"])
    found: list[Quantity | None] = []
    spare: list[Quantity] = []
    for name in (question.first, question.second):
        chosen, others = _look_up(trajectory, question, name, rng, noise)
        found.append(chosen)
        spare += others
        if chosen is not None and rng.random() < noise.answer_directly:
            trajectory.answer(chosen.digits)
            return
    first, second = (quantity if quantity is not None else rng.choice(spare or [_NOTHING]) for quantity in found)
    expression, value = _compute(question, first, second, rng, noise)
    trajectory.answer(value if trajectory.python(f"print({expression})", value) else first.digits)


def _look_up(
    trajectory: _Trajectory, question: Question, name: str, rng: random.Random, noise: NoiseRates
) -> tuple[Quantity | None, list[Quantity]]:
    """Return the value chosen for `name`, or None if none was found, and the other values on its pages."""
    result = trajectory.search(question.asked, name)
    if result is None:
        return None, []
    pages = _pages_about(name, result)
    pointer = next((match.group(1) for page in pages if (match := _POINTER.search(page))), None)
    if pointer is not None:
        if rng.random() < noise.skip_second_query:
            return None, []  # the page of an alias has no number
        name = pointer
        result = trajectory.search(question.asked, name)
        if result is None:
            return None, []
        pages = _pages_about(name, result)
    verb = f" {_ASKED_VERBS[question.asked]} "
    asked = _quantities([page for page in pages if verb in page])
    others = _quantities([page for page in pages if verb not in page])
    if others and rng.random() < noise.wrong_snippet:
        asked, others = others, asked
    return asked[0], others


def _pages_about(name: str, result: str) -> list[str]:
    return [page for page in _pages(result) if page.startswith(f"{name} ")]


def _pages(result: str) -> list[str]:
    """Return the texts after "Page 1: ", "Page 2: " …"""
    return [line.partition(": ")[2] for line in result.split("\n")]


def _quantities(pages: Sequence[str]) -> list[Quantity]:
    return [Quantity(match[1], match[2] or "") for page in pages if (match := _QUANTITY.search(page))]


def _compute(
    question: Question, first: Quantity, second: Quantity, rng: random.Random, noise: NoiseRates
) -> tuple[str, str]:
    """Return the Python expression and its printed value."""
    operation = question.operation
    if rng.random() < noise.wrong_operation:
        operation = "plus" if operation == "minus" else "minus"
    expressions, values = [], []
    for quantity in (first, second):
        forgets = quantity.needs_conversion and rng.random() < noise.forget_unit
        expressions.append(quantity.digits if forgets else quantity.expression)
        values.append(quantity.number if forgets else quantity.converted)
    sign, factor = ("+", 1) if operation == "plus" else ("-", -1)
    return f"round({expressions[0]}{sign}{expressions[1]})", str(round(values[0] + factor * values[1]))
