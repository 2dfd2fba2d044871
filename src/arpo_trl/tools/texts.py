"""The texts that a model reads: values that tools return, errors that they raise, and how both are shortened."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

from arpo_trl.errors import ToolError
from arpo_trl.visible import without_secrets

_MAX_ERROR_CHARS = 300
_WRITTEN_OUT = (Decimal, Fraction, date, time_of_day, timedelta, UUID, PurePath)
"""Types with a single obvious text form."""


class NotText(Exception):
    """A value that a tool returned has no text form. The message names its type."""


def written_out(value: Any) -> str:
    """Return a value that a tool returned as text; "" for None.

    Raises:
        NotText: It has no obvious text form, or its class fails to make one.
    """
    kind = type(value).__name__
    with _code_of_a_class():
        value = _unwrapped(value)
    try:
        with _code_of_a_class():  # fails also if the value is not JSON or contains itself
            if value is None:  # as methods return that only act
                return ""
            if isinstance(value, str):
                return str.__str__(value)
            if isinstance(value, _WRITTEN_OUT):
                return str.__str__(str(value))
            if isinstance(value, (bool, int, float, dict, list, tuple)):
                return json.dumps(_with_plain_keys(value), ensure_ascii=False, default=_jsonable)
    except NotText as error:
        raise NotText(f"{kind} with {error}") from None
    raise NotText(kind)


def described(error: BaseException) -> str:
    """Return the message of a `ToolError`; for other exceptions one short line.

    If an OSError names a file, this leaves out the file: the model does not see paths of this machine. If the
    exception's class fails to make a message, the text consists of its name.
    """
    with _code_of_a_class():
        if isinstance(error, ToolError):
            return str.__str__(str(error))
        # Without secrets before it is cut: a part of one would remain.
        first_line = without_secrets(_message(error).strip()).partition("\n")[0][:_MAX_ERROR_CHARS]
        if first_line:
            return f"Error: {type(error).__name__}: {first_line}"
    return f"Error: {type(error).__name__}"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError):
        if isinstance(error.strerror, str):
            return str.__str__(error.strerror)
        if error.filename is not None:
            return ""
    return str.__str__(str(error))


@contextmanager
def _code_of_a_class() -> Iterator[None]:
    """A context that ends quietly if code of a user's class raises anything. Ctrl-C passes: Python raises it in the
    main thread only."""
    try:
        yield
    except NotText:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise


def presentable(text: str, max_chars: int) -> str:
    """Return `text` in a form that a model can read: encodable, without secrets, not empty, not too long."""
    text = for_models(text)
    if not text.strip():
        return "(no output)"
    if len(text) <= max_chars:
        return text
    mark = f"\n[… {len(text) - max_chars} or more characters omitted …]\n"
    kept = max_chars - len(mark)
    return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


def for_models(text: str) -> str:
    """Return a text that tokenizers and files accept: lone surrogates and NUL become U+FFFD, pairs become their
    character. A mark replaces each secret of the environment, which tools and their errors may quote."""
    encodable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
    return without_secrets(encodable)


def _unwrapped(value: Any) -> Any:
    """Return what an enum, an array, a table, a dataclass or a pydantic model holds; other values unchanged."""
    if isinstance(value, Enum) and not isinstance(value, str):
        return value.value
    if isinstance(value, type):
        return value
    if callable(to_string := getattr(value, "to_string", None)):  # a table or a series of pandas, with its names
        return to_string()
    if callable(getattr(value, "tolist", None)) and hasattr(value, "dtype"):  # numpy, or a library with its interface
        kind = getattr(value.dtype, "kind", "")
        if kind == "M":  # `tolist` makes numbers of times in nanoseconds
            return value.astype(str).tolist()
        if kind == "m":  # and of durations
            return value.astype("timedelta64[us]").tolist()
        is_short = kind == "f" and value.dtype.itemsize < 8
        return (value.astype(str).astype(float) if is_short else value).tolist()  # 0.1, not 0.10000000149011612
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if callable(model_dump := getattr(value, "model_dump", None)):  # pydantic
        return model_dump()
    return value


def _jsonable(value: Any) -> Any:
    """Return a JSON-compatible replacement for a value that JSON cannot represent."""
    with _code_of_a_class():
        if isinstance(value, _WRITTEN_OUT):
            return str(value)
        unwrapped = _unwrapped(value)
        if unwrapped is not value:
            return _with_plain_keys(unwrapped)
    raise NotText(f"a value of type {type(value).__name__}")


def _with_plain_keys(value: Any) -> Any:
    """Return the value with keys that JSON does not have, such as dates and numpy scalars, written out."""
    if isinstance(value, dict):
        return {_plain_key(key): _with_plain_keys(item) for key, item in value.items()}
    return [_with_plain_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _plain_key(key: Any) -> Any:
    plain = _unwrapped(key)
    if isinstance(plain, (*_WRITTEN_OUT, tuple)):
        return str(plain)
    if plain is None or isinstance(plain, str | int | float):
        return plain
    raise NotText(f"a key of type {type(key).__name__}")
