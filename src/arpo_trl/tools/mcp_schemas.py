"""Gives the function of an MCP server's tool the tool's name, signature, docstring and schema."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from arpo_trl.errors import ToolSpecError

_COMBINED = ("allOf", "anyOf", "oneOf")
_DEFINITIONS = ("$defs", "definitions")
_PARTS = ("$ref", *_COMBINED)
"""The parts of a schema, besides its properties, that the model reads, with the definitions to which they refer."""
_OPEN = "additionalProperties"

_MAX_INLINED_CHARS = 10_000
"""The maximum length of the parts that replace the references of a parameter: references may double at each level."""
_ANNOTATIONS = ("title", "description", "default", "examples", "deprecated")
_NULL = {"type": "null"}


def with_schema(tool: Any, call: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Set the tool's name, docstring and schema on `call`, and its signature after `parameters`. Return `call`."""
    root = tool.input_schema
    try:
        described = _with_properties(root, root)
        properties = {name: _plain(schema, root) for name, schema in described["properties"].items()}
    except (LookupError, RecursionError) as error:
        raise _excluded(tool, f"a schema whose parameters cannot be found: {error}") from error
    required = [name for name in dict.fromkeys(described["required"]) if name in properties]
    is_open = described.get(_OPEN, False) is not False
    kept = {name: described[name] for name in (*_PARTS, *([_OPEN] if is_open else [])) if name in described}
    if '"$ref"' in json.dumps([properties, kept]):
        kept |= {name: described[name] for name in _DEFINITIONS if name in described}
    taken = {parameter.name for parameter in parameters}
    for name in sorted(properties, key=lambda name: name not in required):  # parameters without a default first
        if name in taken:
            raise _excluded(tool, f"a parameter {name!r}, a name that per_path cannot offer")
        default = inspect.Parameter.empty if name in required else None
        try:
            parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default))
        except ValueError as error:
            raise _excluded(tool, f"a parameter that a Python function cannot have: {error}") from error
    if is_open:
        further = "further"
        while further in properties:
            further += "_"
        parameters.append(inspect.Parameter(further, inspect.Parameter.VAR_KEYWORD))
    call.__name__ = call.__qualname__ = re.sub(r"\W", "_", tool.name, flags=re.ASCII)
    call.__doc__ = tool.description or tool.name
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.json_schema = {  # type: ignore[attr-defined]
        "type": "function",
        "function": {
            "name": call.__name__,
            "description": inspect.cleandoc(call.__doc__),
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": required,
                **kept,
            },
        },
    }
    return call


def _excluded(tool: Any, what: str) -> ToolSpecError:
    return ToolSpecError(
        f"tool {tool.name!r} of an MCP server has {what}. Exclude the tool: list the tools to offer in the server's "
        "`tools`."
    )


def _with_properties(schema: Any, root: Any) -> dict[str, Any]:
    """Return the schema of an object with the `properties`, the `required` names and the `additionalProperties` of its
    `$ref`, `allOf`, `anyOf` and `oneOf` added to its own.

    Raises:
        LookupError: A `$ref` does not lead to a part of `root`.
        RecursionError: A `$ref` leads back to itself.
    """
    if not isinstance(schema, dict):  # true
        return {"properties": {}, "required": []}
    whole = {
        **schema,
        "properties": {**(schema.get("properties") or {})},
        "required": [*(schema.get("required") or ())],
    }
    together = [_referred(str(schema["$ref"]), root)] if "$ref" in schema else []
    together += schema.get("allOf") or ()
    for choices in (*([part] for part in together), schema.get("anyOf"), schema.get("oneOf")):
        parts = [_with_properties(part, root) for part in choices or ()]
        found: dict[str, list[Any]] = {}
        for part in parts:
            for name, value in part["properties"].items():
                if value not in found.setdefault(name, []):
                    found[name].append(value)
            if part.get(_OPEN, False) is not False:
                whole.setdefault(_OPEN, part[_OPEN])
        for name, values in found.items():
            whole["properties"].setdefault(name, values[0] if len(values) == 1 else {"anyOf": values})
        for part in parts[:1]:
            whole["required"] += [name for name in part["required"] if all(name in of["required"] for of in parts)]
    return whole


def _plain(schema: Any, root: Any) -> dict[str, Any]:
    """Return the schema of a parameter in the form of transformers, which chat templates and parsers know.

    Parts of `root` replace their `$ref`, and `nullable` replaces a choice between one schema and null. A `$ref` stays
    if its part contains it, if it leads to no part, or if the parts become too long.
    """
    left = _MAX_INLINED_CHARS

    def plain(schema: Any, outer: tuple[str, ...] = ()) -> Any:
        nonlocal left
        if not isinstance(schema, dict):
            return schema
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in outer:
            with contextlib.suppress(LookupError):
                part = _referred(reference, root)
                length = len(json.dumps(part))
                whole = _joined(part, schema, "$ref")
                if whole is not None and length <= left:
                    left -= length
                    return plain(whole, (*outer, reference))
        schema = {key: inside(key, value, outer) for key, value in schema.items()}
        types = schema.get("type")
        if isinstance(types, list) and len(types) == 2 and "null" in types:
            (name,) = (name for name in types if name != "null")
            schema |= {"type": name, "nullable": True}
        for key in _COMBINED:
            parts = schema.get(key)
            some = [part for part in parts if part != _NULL] if isinstance(parts, list) else []
            whole = _joined(some[0], schema, key) if len(some) == 1 else None
            if whole is not None:
                schema = whole | ({} if some == parts else {"nullable": True})
        return schema

    def inside(key: str, value: Any, outer: tuple[str, ...]) -> Any:
        if key in ("properties", "patternProperties") and isinstance(value, dict):
            return {name: plain(part, outer) for name, part in value.items()}
        if key in (*_COMBINED, "prefixItems") and isinstance(value, list):
            return [plain(part, outer) for part in value]
        return plain(value, outer) if key in ("items", _OPEN) else value

    described = plain(schema)
    return described if isinstance(described, dict) else {}  # or a bool


def _joined(part: Any, schema: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return `schema` with the content of `part` instead of its `key`; None if both restrict the same."""
    if not isinstance(part, dict):
        return None
    own = {name: value for name, value in schema.items() if name != key}
    both = part.keys() & own.keys()
    return {**part, **own} if all(name in _ANNOTATIONS or part[name] == own[name] for name in both) else None


def _referred(reference: str, root: Any) -> Any:
    """Return the part of `root` to which a `$ref` leads."""
    start, *steps = reference.split("/")
    part = root if start == "#" else None
    for step in steps:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and step.isdecimal() and int(step) < len(part):
            part = part[int(step)]
        else:
            part = part.get(step) if isinstance(part, dict) else None
    if part is None:
        raise LookupError(f"$ref {reference!r} does not lead to a part of it")
    return part
