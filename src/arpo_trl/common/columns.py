"""The columns of a dataset, in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def shown_columns(dataset: Dataset) -> str:
    """The names of the columns, and what to do if a transform may make others, which no check can see."""
    names = f"{dataset.column_names}"
    if dataset.format["type"] != "custom":
        return names
    return f"{names} and a transform, whose columns exist only while a row is read (use dataset.map in its place)"
