"""The configuration files that are part of the package: those in `configs/` and in `accelerate_configs/`.

A wheel contains them inside the package. In a checkout they are folders in its root.
"""

from __future__ import annotations

from pathlib import Path

from arpo_trl.common.user_files import refuse_pipe, user_path
from arpo_trl.errors import ConfigError

_PACKAGE = Path(__file__).parents[1]
_CHECKOUT = Path(__file__).parents[3]

CONFIGS, ACCELERATE_CONFIGS = "configs", "accelerate_configs"


def shipped_folder(kind: str) -> Path:
    """The folder of the shipped files of that kind, `CONFIGS` or `ACCELERATE_CONFIGS`."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _CHECKOUT / kind


def shipped_names(kind: str) -> list[str]:
    """The names by which `shipped_file` finds a file of that kind, sorted."""
    return sorted(file.stem for file in shipped_folder(kind).glob("*.yaml"))


def shipped_file(kind: str, name: str) -> Path:
    """The shipped file of that name, such as "quickstart".

    Raises:
        ConfigError: There is no such file.
    """
    if name not in shipped_names(kind):
        raise ConfigError(f"There is no shipped configuration {name!r}; expected one of {shipped_names(kind)}.")
    return shipped_folder(kind) / f"{name}.yaml"


def file_or_shipped(kind: str, name: str) -> Path:
    """The file at the path `name`, with ~ for a home directory, or, if there is none, the shipped file of that name.

    Raises:
        ConfigError: Neither exists, or the path is a folder.
        DataError: It is a pipe, or the system refuses the path.
    """
    path = user_path(name, "--config")
    if path.is_dir() and name not in shipped_names(kind):
        raise ConfigError(f"The configuration {name} is a folder; expected a YAML file in it.")
    if path.is_file():
        return path
    refuse_pipe(path, f"The configuration {name}")
    if path.name != name or name.endswith((".yaml", ".yml")):
        raise ConfigError(f"The configuration {name} does not exist. Check the path.")
    return shipped_file(kind, name)
