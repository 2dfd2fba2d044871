"""Questions that need two or more searches and python: "height of Denali plus that of Hood in m?"

Each question names two entities of one topic. If an entity has aliases, the question often uses one of them. Training
and held-out questions share no unordered pair of entities, so a model cannot memorize a held-out answer.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

from arpo_trl.errors import ConfigError
from arpo_trl.quickstart.corpus import ALIASES, TOPICS, Topic
from arpo_trl.quickstart.task import split_rows

_ALIAS_SHARE = 0.6
_QUESTION = re.compile(r"(.+) of (.+) (plus|minus) that of (.+) in (.+)\?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The parts of a question. `first` and `second` are the names in the question, which may be aliases."""

    asked: str
    first: str
    second: str
    operation: str
    unit: str

    def __str__(self) -> str:
        return f"{self.asked} of {self.first} {self.operation} that of {self.second} in {self.unit}?"


def parse_question(text: str) -> Question:
    """Return the parts of a question of this module.

    Raises:
        ValueError: The text is not such a question.
    """
    match = _QUESTION.fullmatch(text)
    if match is None:
        raise ValueError(f"Not a quickstart question: {text!r}. Expected the form {_QUESTION.pattern!r}.")
    asked, first, operation, second, unit = match.groups()
    return Question(asked=asked, first=first, second=second, operation=operation, unit=unit)


def make_tasks(seed: int, n_train: int, n_heldout: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and held-out rows {prompt, answer, task, id}. The same arguments give the same rows.

    Raises:
        ConfigError: There are fewer pairs of entities than requested questions.
    """
    rng = random.Random(seed)
    pairs = [(topic, *pair) for topic in TOPICS for pair in itertools.combinations(topic.titles, 2)]
    if n_train + n_heldout > len(pairs):
        raise ConfigError(
            f"n_train ({n_train}) + n_heldout ({n_heldout}) is more than the {len(pairs)} pairs of entities in the "
            "corpus. Request fewer questions."
        )
    rng.shuffle(pairs)
    return split_rows([_make_row(rng, *pair) for pair in pairs[: n_train + n_heldout]], n_heldout)


def _make_row(rng: random.Random, topic: Topic, first: str, second: str) -> dict[str, Any]:
    operation = rng.choice(("plus", "minus"))
    values = topic.asked_quantities
    # The larger value comes first, so that no difference is negative.
    if values[first].converted < values[second].converted:
        first, second = second, first
    sign = 1 if operation == "plus" else -1
    answer = round(values[first].converted + sign * values[second].converted)
    question = Question(
        asked=topic.asked, first=_name(rng, first), second=_name(rng, second), operation=operation, unit=topic.unit
    )
    return {"prompt": [{"role": "user", "content": str(question)}], "answer": [str(answer)], "task": "math"}


def _name(rng: random.Random, title: str) -> str:
    aliases = [alias for alias, target in ALIASES.items() if target == title]
    return rng.choice(aliases) if aliases and rng.random() < _ALIAS_SHARE else title
