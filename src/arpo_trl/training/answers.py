"""The policy's probability of a row's reference answer at points of a path, for credits that use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from arpo_trl.common.columns import shown_columns
from arpo_trl.errors import DataError
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.trl_seam import pad

COLUMN = "answer"

AnswerLogprobs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(prompt ids, prompt mask, completion ids, completion mask) → (rows, T) logprobs of the completions."""


def check_answers(datasets: Sequence[Any], credit: str) -> None:
    """Checks that every training row has a reference answer; of a streamed dataset, only the first row.

    Raises:
        DataError: A row has no reference answer. Names the row.
    """
    for dataset in datasets[:1]:
        if isinstance(dataset, IterableDataset):
            for row in dataset.take(1):
                reference(row.get(COLUMN), 0)
        if not isinstance(dataset, Dataset):
            continue
        if COLUMN not in dataset.column_names:
            raise DataError(
                f"The credit {credit!r} needs reference answers, but the dataset has no column {COLUMN!r}; it has "
                f"{shown_columns(dataset)}. Add the column, or choose another advantage_attribution."
            )
        for i, answer in enumerate(dataset[COLUMN]):
            reference(answer, i)


def reference(answer: Any, row: int) -> str:
    """The first accepted answer of a row.

    Raises:
        DataError: The row has no accepted answer.
    """
    first = answer[0] if isinstance(answer, list) and answer else answer
    if not isinstance(first, str) or not first.strip():
        raise DataError(f"Row {row}: {COLUMN} is {answer!r}; expected non-empty text, or a list of such texts.")
    return first


def answer_probabilities(
    trees: Sequence[RolloutTree],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    score: AnswerLogprobs,
    same_number: Callable[[int], int],
) -> list[dict[int, float]]:
    """For each tree: node → exp(mean logprob of the answer's tokens after the path down to it).

    The nodes are the root and the observations.

    Args:
        answers: The texts with which the model would give the answers, one per tree.
        score: Computes logprobs. A collective.
        same_number: The maximum over ranks of a number of rows, since all ranks must run equally many forwards. A
            collective.
    """
    places = [(i, node.index) for i, tree in enumerate(trees) for node in (tree.root, *tree.observations())]
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    rows = [(trees[i].ids_to(node), ids[i]) for i, node in places]
    rows += [rows[0]] * (same_number(len(rows)) - len(rows))
    prompts, completions = ([torch.tensor(row[part]) for row in rows] for part in (0, 1))
    masks = [[torch.ones_like(row) for row in part] for part in (prompts, completions)]
    fill = tokenizer.pad_token_id
    mask = pad(masks[1], padding_value=0, padding_side="right")
    logprobs = score(
        pad(prompts, padding_value=fill, padding_side="left"),
        pad(masks[0], padding_value=0, padding_side="left"),
        pad(completions, padding_value=fill, padding_side="right"),
        mask,
    ).cpu()
    means = (logprobs * mask).sum(dim=1) / mask.sum(dim=1)
    made: list[dict[int, float]] = [{} for _ in trees]
    for (i, node), mean in zip(places, means.tolist(), strict=False):
        made[i][node] = math.exp(mean)
    return made


def texts(template: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text with which the model would give each row's answer."""
    return [template.replace("{answer}", reference(row.get(COLUMN), i)) for i, row in enumerate(rows)]
