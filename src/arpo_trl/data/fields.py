"""The fields of a row: which of several names it uses, JSON in text, values as text. Pure."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from arpo_trl.common.user_files import shown
from arpo_trl.errors import DataError
from arpo_trl.visible import WITHOUT_MEANING

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""The suffixes of files of rows."""
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_PRINTED_LIST = re.compile(rf"\[\s*{_QUOTED}(?:[\s,]+{_QUOTED})*,?\s*\]", re.DOTALL)
_PRINTED_DICTS = re.compile(r"\[\s*\{\s*'.*\}\s*\]|\{\s*'.*\}", re.DOTALL)
_LOST_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def is_blank(value: Any) -> bool:
    """Whether a value is empty: null, blank text, an empty list or mapping, or NaN (pandas' missing value)."""
    if isinstance(value, str):
        return not value.translate(WITHOUT_MEANING).strip()
    if isinstance(value, list | tuple | Mapping):
        return not value
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def first_field(row: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """The first field whose value is not blank; else the first one that is not null; else None."""
    present = [field for field in fields if row.get(field) is not None]
    return next((field for field in present if not is_blank(row[field])), present[0] if present else None)


def first(row: Mapping[str, Any], fields: Sequence[str]) -> Any:
    """The first value that is not blank, or None."""
    return next((row[field] for field in fields if not is_blank(row.get(field))), None)


def named(row: Mapping[str, Any], fields: Sequence[str], meaning: str) -> str:
    """The same as `first_field`, but an error if there is none.

    Raises:
        DataError: All of the fields are missing or null.
    """
    field = first_field(row, fields)
    if field is None:
        nulls = [name for name in fields if name in row]
        got = f"{nulls[0]!r} is null" if nulls else f"the row has the fields {sorted(map(str, row))}"
        raise DataError(
            f"no {meaning}: {got}; expected a value under one of {list(fields)}. To name other fields, set columns."
        )
    return field


def at(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field, or of nested fields with dots between their names. A field in a null is null.

    Raises:
        KeyError: There is no such field.
    """
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = decoded(value)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise KeyError(field)
        value = value[part]
    return value


def decoded(value: Any) -> Any:
    """The list or mapping in a JSON text; any other value unchanged. CSV files store nested values this way."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def is_printed_list(text: str) -> bool:
    """Whether a text is a list of texts as Python or numpy prints it: `['a', 'b']` or `['a' 'b']`. Some lists in JSON
    are too; sets, intervals and lists of numbers are not."""
    return _PRINTED_LIST.fullmatch(text.strip()) is not None


def has_printed_key(text: str, keys: Sequence[str]) -> bool:
    """Whether a text is a dict, or a list of dicts, as Python prints it, with one of the keys at any depth."""
    return _PRINTED_DICTS.fullmatch(text.strip()) is not None and any(f"'{key}':" in text for key in keys)


def printed(value: str, field: str) -> DataError:
    """The error for a text that is a list or a dict as Python prints it. pandas and datasets write such CSV files."""
    return DataError(
        f"{field!r} is {shown(value)}, a list or a dict as Python prints it; expected JSON. Save the rows as .jsonl "
        "or .parquet, or write the value as JSON."
    )


def text_of(value: Any, field: str) -> str:
    """A value as text. Numbers are written in digits, without an exponent and without a fraction of zero.

    Raises:
        DataError: It is neither text nor a finite number, or cannot be written.
    """
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        raise DataError(f"{field!r} contains {value}; expected text or a finite number.")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise DataError(f"{field!r} contains {shown(value)}; expected text or a number, or a list of them.")
    if isinstance(value, float | Decimal):
        digits = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    try:
        text = _restore_escapes(str(value))
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field!r} contains a lone surrogate (character {error.start}); expected valid Unicode. Repair the row."
        ) from error
    except ValueError as error:
        raise DataError(f"{field!r} contains a number with too many digits. Write it as text.") from error
    return text


def _restore_escapes(text: str) -> str:
    r"""Restores `\boxed` and `\frac` whose backslash was read as an escape; removes other control characters."""
    return _LOST_CONTROL.sub("", text.replace("\x08oxed", r"\boxed").replace("\x0crac", r"\frac"))
