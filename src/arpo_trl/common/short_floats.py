"""Numbers of 16 or 32 bits as they were written: 0.1, not 0.10000000149011612."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow


def as_written(rows: Iterable[Mapping[str, Any]], schema: pyarrow.Schema) -> Iterator[Mapping[str, Any]]:
    """The rows with each such number, also in lists and objects, replaced by the shortest decimal that rounds to it.

    Args:
        schema: The types of the rows' fields.
    """
    short = {field.name: field.type for field in schema if _is_short(field.type)}
    for row in rows:
        yield {**row, **{name: _written(row[name], kind) for name, kind in short.items() if name in row}}


def _is_short(kind: pyarrow.DataType) -> bool:
    """Whether a type is one of short numbers or contains one."""
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        return True
    if isinstance(kind, pyarrow.BaseExtensionType):  # an image or an array
        return False
    return any(_is_short(kind.field(place).type) for place in range(kind.num_fields))


def _written(value: Any, kind: pyarrow.DataType) -> Any:
    if not _is_short(kind):
        return value
    if isinstance(value, Mapping) and pyarrow.types.is_struct(kind):
        return {**value, **{field.name: _written(value[field.name], field.type) for field in kind}}
    if isinstance(value, list) and not pyarrow.types.is_map(kind):
        return [_written(item, kind.value_type) for item in value]
    if isinstance(value, float | np.floating):
        return float(str((np.float16 if pyarrow.types.is_float16(kind) else np.float32)(value)))
    return value
