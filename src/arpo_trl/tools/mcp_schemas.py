"""Gives the function of an MCP server's tool the tool's name, signature, docstring and schema."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from arpo_trl.errors import ToolSpecError

_PARTS = ("$ref", "allOf", "anyOf", "oneOf", "$defs", "definitions")
"""The parts of a schema, besides its properties, that the model reads."""
_OPEN = "additionalProperties"


def with_schema(tool: Any, call: Callable[..., Any], parameters: list[inspect.Parameter]) -> Callable[..., Any]:
    """Set the tool's name, docstring and schema on `call`, and its signature after `parameters`. Return `call`."""
    try:
        described = _with_properties(tool.input_schema, tool.input_schema)
    except (LookupError, RecursionError) as error:
        raise _excluded(tool, f"a schema whose parameters cannot be found: {error}") from error
    given: dict[str, Any] = described["properties"]
    properties = {name: schema if isinstance(schema, dict) else {} for name, schema in given.items()}  # or a bool
    required = [name for name in dict.fromkeys(described["required"]) if name in properties]
    is_open = described.get(_OPEN, False) is not False
    kept = (*_PARTS, _OPEN) if is_open else _PARTS
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
                **{name: described[name] for name in kept if name in described},
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
