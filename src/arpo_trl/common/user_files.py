"""Files that a user hands us, read so that whatever is in them ends in an error that names the place.

    JSON, JSON lines, YAML  ──▶  values, nested `MAX_DEPTH` deep at most  ──▶  `expect`: keys and types

A file may be cut off, of another encoding or of another program.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from arpo_trl.errors import DataError

MAX_DEPTH = 100
"""Lists and mappings within one another. Beyond some hundreds Python can neither compare nor print them."""

Shape = type | UnionType | list[Any] | dict[str, Any]
"""What `expect` expects: a type; `[shape]`, a list of such; `{key: shape}`, a mapping with at least these keys, of
which those that end in ? may be missing."""


def is_url(name: str) -> bool:
    """Whether the name of a file or folder is a web address, which nothing here opens."""
    return name.startswith(("http://", "https://"))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; `DataError` where it cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise _not_utf_8(str(path), error) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file; `DataError` where there is none."""
    return parse_json(read_text(path), str(path))


def json_lines(path: Path, bad: list[str] | None = None) -> Iterator[tuple[int, Any]]:
    r"""Number (from 1) and value of each line that is not blank.

    Only \n ends a line: JSON allows the other ends of lines within a string.

    Args:
        bad: What is wrong with each line that is left out for it goes here; None: the first one raises.

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
    """The value in a YAML file; `DataError` where it cannot be read."""
    import yaml

    text = read_text(path)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there cannot be
        raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    except RecursionError as error:
        raise _too_deep(str(path)) from error
    _check_depth(value, str(path))
    return value


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `DataError`, which names `where` it stands, when it is none."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, where)
    return value


def expect(value: Any, shape: Shape, name: str) -> None:
    """Returns if `value`, called `name`, has `shape`; `DataError`, which names the part, where it has not."""
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
            if isinstance(part, type) and type(item) is part:  # most items are numbers: without a name for each
                continue
            expect(item, part, f"{name}[{number}]")
    elif not _is_a(value, shape):
        expected = shape.__name__ if isinstance(shape, type) else str(shape)
        raise DataError(f"{name} is {shown(value)}; expected {expected}.")


def _is_a(value: Any, kind: type | UnionType) -> bool:
    if isinstance(value, bool):  # Python's are integers, a file's are not
        return isinstance(value, kind) and not isinstance(1, kind)
    return isinstance(value, kind) or (type(value) is int and isinstance(1.0, kind))


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf_8(where, error) from error


def _not_utf_8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{where} is not UTF-8 text (byte {error.start}). Convert it, with iconv for example.")


def _too_deep(where: str) -> DataError:
    return DataError(f"{where}: lists and mappings stand more than {MAX_DEPTH} deep in one another. Flatten them.")


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        parts = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [item for part in parts for item in part]
        if not level:
            return
    raise _too_deep(where)


def shown(value: Any) -> str:
    """The value's repr, short enough for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:77] + "…"
