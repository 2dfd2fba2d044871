"""Reads the settings of a command line, and turns this package's errors into one line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from arpo_trl.common.flags import NEAR, nearest
from arpo_trl.common.full_disk import full_disk_message, is_full_disk
from arpo_trl.common.interrupted import say_interrupted
from arpo_trl.common.pipes import discard, is_unread
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.common.working_folder import working_folder
from arpo_trl.errors import ArpoError, ConfigError, DataError, Interrupted
from arpo_trl.visible import say

T = TypeVar("T")
Elsewhere = Callable[[], tuple[str, Sequence[type[Any]]]]

CONFIG_TWICE = "--config is set twice; expected one file. Flags override its settings."


def keeps_tracebacks() -> bool:
    """Whether errors that other packages raise for mistakes of the user keep their traceback: ARPO_TRACEBACK is 1."""
    return os.environ.get("ARPO_TRACEBACK") == "1"


def report_errors(main: Callable[[], T]) -> Callable[[], T]:
    """Wraps `main`: prints this package's errors, and that a disk is full, in one line and exits with status 2. Other
    errors keep their traceback.

    Ctrl-C, and an interrupted training run, also print one line, and exit with 128 plus the signal's number. If the
    output goes to a program that has ended, such as `head`, nothing is printed, and the status is 1. On a terminal
    whose encoding lacks a character, a question mark is printed in its place. SIGTERM also ends the first process of a
    container, for which the system would ignore it.
    """

    @functools.wraps(main)
    def wrapped() -> T:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        if os.getpid() == 1:
            signal.signal(signal.SIGTERM, _end)
        try:
            if working_folder() is None:  # libraries fail in many ways without one
                raise ConfigError("The current folder no longer exists. Change to one that does (cd).")
            value = main()
            if sys.stdout is not None:
                sys.stdout.flush()
            return value
        except ArpoError as error:
            say(f"{type(error).__name__}: {error}", to=sys.stderr)
            raise SystemExit(2) from None
        except Interrupted as interrupted:
            from arpo_trl.runs.interrupts import leave

            if is_first_rank():
                say(str(interrupted), to=sys.stderr)
            leave(interrupted.exit_status)
        except KeyboardInterrupt:
            say_interrupted()
            raise SystemExit(128 + signal.SIGINT) from None
        except BrokenPipeError:  # also that of a socket or of another process
            if not is_unread(sys.stdout):
                raise
            raise SystemExit(1) from None
        except Exception as error:
            if not is_full_disk(error) or keeps_tracebacks():
                raise
            say(f"{type(error).__name__}: {full_disk_message(error)}", to=sys.stderr)
            raise SystemExit(2) from None
        finally:
            if is_unread(sys.stdout):  # Python would write the rest of the output at its exit, with an error
                discard(sys.stdout)

    return wrapped


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def parse_settings(
    kinds: Sequence[type[Any]],
    argv: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    elsewhere: Elsewhere | None = None,
    **parser: Any,
) -> tuple[Any, ...]:
    """Creates one instance of each dataclass from the YAML file of `--config` and from flags. Flags take precedence.

    `defaults` replace the fields' defaults. `parser` is passed to the argument parser. `elsewhere` returns the name of
    another program whose settings are easily confused with these, and the classes of its settings. It is called for an
    error only.

    Raises:
        ConfigError: The file cannot be read, a key or flag is not a field (the message names the most similar one), or
            a dataclass rejects its values.
    """
    from arpo_trl.common.parser import SettingsParser

    words = _config_apart(sys.argv[1:] if argv is None else argv)
    fields = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    config: dict[Any, Any] = {}
    if "--config" in words:
        at = words.index("--config")
        config = _read_config(words[at + 1])
        del words[at : at + 2]
        os.environ.update(_environment(config.pop("env", {})))
        # Checked first, since a dataclass would report the setting that a misspelt key leaves unset.
        _check_names(list(config), fields, elsewhere)
    try:
        reader = SettingsParser(kinds, **parser)
        reader.set_defaults_with_config(**{**(defaults or {}), **config})
        _check_lists(reader, words)
        *settings, left = reader.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except ConfigError:
        raise
    except ValueError as error:  # raised by TRL's own dataclasses
        raise ConfigError(str(error)) from error
    _check_names(
        [word[2:].partition("=")[0] for word in left if word.startswith("--")], ["config", *fields], elsewhere
    )
    if left:
        raise ConfigError(f"{left[0]!r} does not belong to a setting; expected --name value.")
    return tuple(settings)


def _check_lists(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raises ConfigError if a flag with several values is given twice: the parser would keep only the last one's."""
    flags = [word.partition("=")[0] for word in words]
    for action in parser._actions:
        given = [flag for flag in flags if flag in action.option_strings]
        if action.nargs == "+" and len(given) > 1:
            raise ConfigError(f"{given[0]} is given {len(given)} times; expected all values after one {given[0]}.")


def _config_apart(words: Sequence[str]) -> list[str]:
    """The arguments, with --config=FILE split in two.

    Raises:
        ConfigError: --config is set twice, or without a file.
    """
    apart = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else (word,))]
    if apart.count("--config") > 1:
        raise ConfigError(CONFIG_TWICE)
    if apart[-1:] == ["--config"]:
        raise ConfigError("--config is set without a value; expected a YAML file.")
    return apart


def _read_config(path: str) -> dict[Any, Any]:
    from arpo_trl.common.user_files import read_yaml, user_path

    try:
        config = read_yaml(user_path(path, "--config"))
    except DataError as error:
        raise ConfigError(f"The --config file cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"The --config file {path} contains a {type(config).__name__}; expected lines of name: value."
        )
    return config


def _environment(given: Any) -> dict[str, str]:
    """The environment variables that a config file sets under `env`, as in TRL's."""
    if not isinstance(given, dict):
        raise ConfigError(f"env is {given!r}; expected environment variables, as lines of NAME: value.")
    return {str(name): str(value) for name, value in given.items()}


def _check_names(names: Sequence[Any], fields: Sequence[str], elsewhere: Elsewhere | None) -> None:
    unknown = next((str(name) for name in names if name not in fields), None)
    if unknown is None:
        return
    if elsewhere is not None:
        program, kinds = elsewhere()
        if any(field.name == unknown for kind in kinds for field in dataclasses.fields(kind)):
            raise ConfigError(
                f"There is no setting {unknown!r} here: it is one of arpo-trl {program}. Run that program, or "
                "remove the setting."
            )
    near = _similar(unknown.replace("-", "_"), fields)
    raise ConfigError(f"There is no setting {unknown!r}" + (f"; did you mean {near}?" if near else ". Remove it."))


def _similar(name: str, fields: Sequence[str]) -> str:
    """The settings that `name` can mean, as text for users: a similar name, or the names with all its words."""
    if (near := nearest(name, fields, cutoff=NEAR)) and not near.startswith(f"{name}_"):
        return repr(near)
    words = set(name.split("_"))
    longer = [field for field in fields if words <= set(field.split("_"))]
    longer.sort(key=lambda field: not field.startswith(name))
    short = [field for field in fields if "".join(word[:1] for word in field.split("_")) == name]
    found = (short or longer)[:3] or [near for near in [nearest(name, fields)] if near]
    return " or ".join(map(repr, found))
