"""Rows of a dataset on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from arpo_trl.common.hub_cache import cache_remedy
from arpo_trl.common.short_floats import as_written
from arpo_trl.errors import DataError


def load_from_hub(hub_id: str, split: str, config: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a dataset on the Hub.

    Raises:
        DataError: The dataset cannot be loaded.
    """
    try:
        dataset = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # errors of the Hub client, of requests or of the file system
        remedy = cache_remedy(error) or "Check the name and the connection, or pass a local path."
        raise DataError(
            f"{hub_id!r} is not a local file or folder, and loading its split {split!r} from the Hub failed: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
    yield from as_written(dataset, dataset.features.arrow_schema)
