"""Reads files from users. Every fault in them becomes an error that names its place.

    JSON, JSON lines, YAML  ──▶  values, nested `MAX_DEPTH` deep at most  ──▶  `expect`: keys and types

A file may be truncated, have another encoding, or come from another program.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any

from arpo_trl.errors import ConfigError, DataError

MAX_DEPTH = 100
"""The maximum nesting of lists and mappings. Beyond several hundred levels Python can neither compare nor print
them."""
MAX_ALIASED = 100_000
"""The maximum number of values on one level of a YAML file. Aliases (*name) can turn a short file into billions."""

Shape = type | UnionType | list[Any] | dict[str, Any]
"""A shape for `expect`: a type; `[shape]`, a list of values of that shape; or `{key: shape}`, a mapping with at least
these keys. Keys that end in ? may be missing."""


def is_url(name: str | Path) -> bool:
    """Whether the name of a file or folder is a web address, which this package does not open."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def user_path(name: str | Path, setting: str) -> Path:
    """The path that a user named in a setting or an argument, with ~ for a home directory.

    Raises:
        DataError: It is neither text nor a path, the system refuses it as a path, for example since a name in it is
            too long, or there is no such user.
    """
    if not isinstance(name, str | PathLike):
        raise DataError(f"{setting} is {shown(name)}; expected a name as text or as a pathlib.Path.")
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # a name on the Hub, or of a file that is yet to be written
    except RuntimeError as error:
        raise DataError(f"{name} begins with a user who has no home directory here. Write the whole path.") from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{setting} is {shown(str(name))}, which the system refuses: {reason}. Check the path."
        ) from error
    return path


def refuse_pipe(path: Path, what: str) -> None:
    """Checks that `path`, called `what`, is no pipe, as of `<(command)`. Raises `DataError`.

    A pipe can be read only once, and a process that the shell's has started, such as a rank, does not find it.
    """
    if path.is_fifo() or (path.parent == Path("/dev/fd") and not path.exists()):
        raise DataError(f"{what} is a pipe, which cannot be read here; expected a file. Save its content to one.")


def model_name(name: str, setting: str) -> str:
    """The folder or the Hub id of a model that a user named, with the path in place of ~. Raises as `user_path`."""
    return str(user_path(name, setting)) if name.startswith("~") else name


def has_form_of_path(name: str) -> bool:
    """Whether the name of a model or a dataset can only be a path, and no id on the Hub."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell the paths apart: rl and sft, but seed0/rl and
    seed1/rl."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = range(1, max(map(len, parts), default=0) + 1)
    length = next((n for n in lengths if len({each[-n:] for each in parts}) == len({*parts})), 0)
    return [str(Path(*each[-length:])) for each in parts]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises `DataError` if it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise not_utf_8(str(path), error) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `DataError` if there is none."""
    return parse_json(read_text(path), str(path))


def json_lines(path: Path, bad: list[str] | None = None) -> Iterator[tuple[int, Any]]:
    r"""The number (from 1) and value of each line that is not blank.

    Only \n ends a line, because JSON allows the other line ends within a string.

    Args:
        bad: Faulty lines are skipped, and their faults are appended to this list. None: the first fault raises.

    Raises:
        DataError: The file cannot be read, or a line is not JSON in UTF-8; the message names it.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    value = parse_json(_decoded(line.removesuffix(b"\n"), where), where)
                except DataError as error:
                    if bad is None:
                        raise
                    bad.append(str(error))
                else:
                    yield number, value
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises `DataError` if it cannot be read, or sets a key twice."""
    import yaml

    from arpo_trl.common.yaml_values import parse_yaml

    text = read_text(path)
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number with more digits than Python reads
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise _too_deep(str(path)) from error
    _check_depth(value, str(path), most=MAX_ALIASED)
    return value


PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path, flag: str) -> None:
    """Checks that a picture can be written to `path`, the value of `flag`. Raises `ConfigError` for other formats."""
    if path.suffix not in PICTURES:
        raise ConfigError(f"{flag} is {path}; expected a file that ends in {', '.join(PICTURES)}.")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises `DataError`, which names its place `where`, if it is not JSON, or names a key
    twice."""
    try:
        value = json.loads(text, object_pairs_hook=_with_distinct_keys)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, where)
    return value


def _with_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"the key {repeated(key for key, _ in pairs)[0]!r} is set twice")
    return made


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def expect(value: Any, shape: Shape, name: str) -> None:
    """Checks that `value`, called `name`, has `shape`. Raises `DataError`, which names the wrong part."""
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise DataError(f"{name} is {shown(value)}; expected named values.")
        for key, part in shape.items():
            key, is_optional = key.removesuffix("?"), key.endswith("?")
            if key in value:
                expect(value[key], part, f"{name}.{key}")
            elif not is_optional:
                raise DataError(f"{name} has no {key!r}; it has {shown(list(value))}.")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise DataError(f"{name} is {shown(value)}; expected a list.")
        (part,) = shape
        for number, item in enumerate(value):
            if isinstance(part, type) and type(item) is part:  # most items are numbers, so this avoids a name for each
                continue
            expect(item, part, f"{name}[{number}]")
    elif not _is_a(value, shape):
        expected = shape.__name__ if isinstance(shape, type) else str(shape)
        raise DataError(f"{name} is {shown(value)}; expected {expected}.")


def _is_a(value: Any, kind: type | UnionType) -> bool:
    if isinstance(value, bool):  # in Python a bool is an integer, in a file it is not
        return isinstance(value, kind) and not isinstance(1, kind)
    return isinstance(value, kind) or (type(value) is int and isinstance(1.0, kind))


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf_8(where, error) from error


def not_utf_8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where} is not UTF-8 text (byte {error.start}). Convert it, with iconv for example.")


def _too_deep(where: str) -> DataError:
    return DataError(f"{where}: lists and mappings are nested more than {MAX_DEPTH} deep. Flatten them.")


def _check_depth(value: Any, where: str, most: int | None = None) -> None:
    for depth, level in enumerate(_levels(value)):
        if depth > MAX_DEPTH:
            raise _too_deep(where)
        if most is not None and len(level) > most:
            raise DataError(f"{where}: it has more than {most:,} values on one level. Check its aliases (*name).")


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and mappings are nested more than `depth` deep. Does not recurse."""
    return any(number > depth for number, _ in enumerate(_levels(value)))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The value, the values in it, the values in those, and so on."""
    level = [value]
    while level:
        yield level
        parts = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for part in parts for item in part]


def shown(value: Any) -> str:
    """The value's repr, short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:77] + "…"
