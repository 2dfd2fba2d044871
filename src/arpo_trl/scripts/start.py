"""Common code of the training scripts: the model's name, and short errors for mistakes that other packages detect."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trl import ModelConfig

from arpo_trl.errors import ArpoError, ConfigError

TRACEBACK = "ARPO_TRACEBACK"
"""Environment variable: if it is 1, mistakes that other packages detect keep their traceback."""


def required_model(model_config: ModelConfig) -> str:
    """The model to train.

    Raises:
        ConfigError: `model_name_or_path` is not set.
    """
    if not model_config.model_name_or_path:
        raise ConfigError("model_name_or_path is not set; expected a folder or a Hub id of the model to train.")
    return model_config.model_name_or_path


@contextmanager
def start_errors() -> Iterator[None]:
    """A context in which a mistake that another package detects becomes a ConfigError, which the scripts print in one
    line.

    It converts the types of errors that packages raise for unusable settings. Unintended errors of this package's own
    code keep their traceback.
    """
    try:
        yield
    except ArpoError:
        raise
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        package = _package_of(error)
        if package == "arpo_trl" or os.environ.get(TRACEBACK) == "1":
            raise
        told = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"Training cannot start. {package} says: {told} (Set {TRACEBACK}=1 to see where it was raised.)"
        ) from error


def _package_of(error: BaseException) -> str:
    """The package whose code raised the error."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    folders = [*file.parts[:-1], file.stem]
    for parent in ("site-packages", "src"):
        if parent in folders[:-1]:
            return folders[len(folders) - folders[::-1].index(parent)]
    return "Python"
