"""The final answer of a model and its accuracy.

`extract_answer` finds the answer, `math_equal` and `token_f1` compare it, and `task_accuracy` selects the comparison
by task.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, get_args

from arpo_trl.errors import RewardError
from arpo_trl.rewards.math_worker import math_worker
from arpo_trl.rewards.words import normalized_tokens

Task = Literal["math", "qa"]
TASKS: tuple[Task, ...] = get_args(Task)
MATH, QA = TASKS

MAX_MATH_CHARS = 512
"""A longer expression equals only the same text. The longest mathematical gold of the published rows has 83
characters."""

_BRACES = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` skips escaped braces; \\boxed is escaped twice
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{…}` in the last `<answer>…</answer>`, stripped; None if there is none.

    Braces are matched, escaped braces (`\{`) are text, and a box without its closing brace is ignored. `\boxed{}`
    gives "", and `\\boxed{5}`, escaped twice, gives "5". Linear in the length of the text.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, block = before.rpartition("<answer>")
    if not (closed and opened):
        return None
    starts: list[int | None] = []  # one entry per open brace: where its content starts, or None if it is no box
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(block):
        token = match.group()
        if token == "}":
            start = starts.pop() if starts else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        elif token == "{":
            starts.append(None)
        elif "boxed" in token:
            starts.append(match.end())
    return None if last is None else block[slice(*last)].strip()


@lru_cache(maxsize=16384)  # the paths of a group mostly have the same few answers
def math_equal(prediction: str, gold: str) -> bool:
    """Whether two answers, LaTeX or plain, have the same meaning (see `rewards.mathematics`): 1/2 is 0.5, −6 is not 6.

    Works in any thread and terminates for any input. The comparison runs in a process with limits (see `math_worker`).
    The result is False beyond those limits or beyond `MAX_MATH_CHARS`. Not symmetric: the prediction `x=5` matches the
    gold `5`.
    """
    prediction, gold = (unicodedata.normalize("NFC", text).strip() for text in (prediction, gold))
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    if max(len(prediction), len(gold)) > MAX_MATH_CHARS:
        return False
    return math_worker().equal(prediction, gold)


def paper_tokens(text: str) -> list[str]:
    """Return the tokens of `text` for the paper's released reward: SQuAD's unchanged rules for every task.

    ASCII punctuation is deleted, signs and fraction bars included, so "-6" is "6" and "1/2" is "12".
    """
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def spaced_tokens(text: str) -> list[str]:
    """Return the tokens of `text` for the paper's evaluation: lower case, split at spaces, nothing removed."""
    return text.lower().split()


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the token F1 in [0, 1] of the prediction, the best over all golds. Tokens by `normalized_tokens`."""
    return _best_f1(prediction, golds, normalized_tokens)


def paper_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the token F1 in [0, 1] of the paper's released reward. Tokens by `paper_tokens`. For parity only."""
    return _best_f1(prediction, golds, paper_tokens)


def spaced_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the token F1 in [0, 1] of the paper's evaluation. Tokens by `spaced_tokens`. For comparison only."""
    return _best_f1(prediction, golds, spaced_tokens)


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the prediction has the same tokens in the same order as any gold. Tokens by `normalized_tokens`."""
    words = normalized_tokens(prediction)
    return bool(words) and any(words == normalized_tokens(gold) for gold in golds)


def task_accuracy(prediction: str, golds: Sequence[str], task: str) -> float:
    """Return the accuracy of a prediction in [0, 1], the best over all golds.

    It is mathematical equality for the task "math" and token F1 for "qa".

    Raises:
        RewardError: `task` is neither "math" nor "qa".
    """
    if task == MATH:
        return float(any(math_equal(prediction, gold) for gold in golds))
    if task == QA:
        return token_f1(prediction, golds)
    raise RewardError(
        f"The task is {task!r}; expected one of {TASKS}. The task selects how answers are compared. Fix the dataset's "
        "`task` column."
    )


def _best_f1(prediction: str, golds: Sequence[str], tokens: Callable[[str], list[str]]) -> float:
    words = Counter(tokens(prediction))
    return max((_f1(words, Counter(tokens(gold))) for gold in golds), default=0.0)


def _f1(prediction: Counter[str], gold: Counter[str]) -> float:
    """2·|common| / (|prediction| + |gold|), which is the harmonic mean of precision and recall."""
    common = (prediction & gold).total()
    return 2 * common / (prediction.total() + gold.total()) if common else 0.0
