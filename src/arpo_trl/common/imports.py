"""Loads objects of the user's code by their import path, and hides optional packages from an import."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arpo_trl.common.user_code import place_in
from arpo_trl.errors import ConfigError

_PACKAGE = str(Path(__file__).parents[1])
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(text: str) -> bool:
    """Whether `text` has the form package.module:name."""
    return _PATH.fullmatch(text) is not None


def load_callable(path: str, setting: str) -> Any:
    """The function, class or callable object at `path`, such as "my_rewards:exact". Modules in the current folder
    can be imported.

    Args:
        setting: The setting that names it, for errors.

    Raises:
        ConfigError: The path has another format, or the module cannot be imported or has no such callable.
    """
    if not is_import_path(path):
        raise ConfigError(f"{setting} contains {path!r}; expected an import path such as my_package.my_module:name.")
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except SystemExit as error:
        raise ConfigError(
            f"{setting} contains {path!r}, but {module_name} ends the program when it is imported ({error.code!r})."
            f'{_place(error, at_import=True)} Put what it does as a program under `if __name__ == "__main__":`.'
        ) from error
    except Exception as error:  # the module's own code can raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        where = f" Python searches for it in {os.getcwd()} and in the installed packages."
        raise ConfigError(
            f"{setting} contains {path!r}, but {module_name} cannot be imported ({type(error).__name__}: {error})."
            + (where if is_missing else _place(error))
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        here = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise ConfigError(
            f"{setting} contains {path!r}, but {module_name} ({module.__file__}) has no function or class {name!r}; "
            f"it has {sorted(here)[:10]}."
        )
    return found


def _place(error: BaseException, at_import: bool = False) -> str:
    """A sentence with the line at which the user's code has failed to import a module; empty if there is none.

    Args:
        at_import: Return the line of the imported module itself, and not the line in a function that it has called.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and not frame.filename.startswith(_PACKAGE)
    ]
    if not frames:
        return ""
    place = frames[0] if at_import else place_in(frames)
    return f" It fails in {place.filename}, line {place.lineno}."


@contextmanager
def hidden_package(name: str) -> Iterator[None]:
    """Inside, `import name` raises ImportError, also if the package has been imported before."""
    before = sys.modules.get(name)
    # None marks a module that must not be imported, although the type of sys.modules does not allow it.
    # unittest.mock.patch.dict could set it too, but would also remove all modules imported in the meantime.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
