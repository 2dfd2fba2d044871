"""The cache of models and datasets that Hugging Face's packages write below `HF_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants

from arpo_trl.common.full_disk import chain


def can_write(folder: str | Path) -> bool:
    """Whether files can be created in `folder`, or, if it is missing, whether it can be created."""
    place = Path(folder).absolute()
    nearest = next(each for each in (place, *place.parents) if os.path.exists(each))  # unlike Path.exists, no error
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def cache_remedy(error: BaseException) -> str | None:
    """The way out if the error, or one that led to it, is about a file or a folder of the cache, or one above it; None
    for other errors."""
    caches = [Path(folder).absolute() for folder in (constants.HF_HOME, constants.HF_HUB_CACHE)]
    for each in chain(error):
        if isinstance(each, OSError) and isinstance(each.filename, str | os.PathLike):
            file = Path(each.filename).absolute()
            if any(file.is_relative_to(cache) or cache.is_relative_to(file) for cache in caches):
                return "Set HF_HOME to a folder that can be written."
    return None
