"""`ToolSpec`: the name, the parameters and the declared attributes of a tool, and `ToolSet`: tools offered together.

A tool can set these attributes on its function:

    tool.deterministic = True   identical calls that run at the same time may share one execution and its result
    tool.depends_on_calls_only = True   a result depends on the path's calls and on chance only, so that paths with
                                the same history of calls may share it; see `arpo_trl.tools.sharing`
    tool.run_in = "main"        calls of this sync tool run in the thread that polls, one after the other, in order;
                                they need no slot and have no deadline, because nothing can stop them there
    tool.create_state = create  its calls act on a state of each path; see `arpo_trl.tools.state`
    tool.concurrency = 4        at most 4 of its calls run at the same time; others wait, and their deadline, too
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from transformers.utils.chat_template_utils import get_json_schema

from arpo_trl.common.user_code import parameters_of
from arpo_trl.errors import ToolSpecError
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.state import CreateState, NoState, PathState, PathStates

RESERVED_TAGS = frozenset({"think", "answer", "result"})

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
}

_TYPE_NAMES: dict[type, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    type(None): "null",
}

_ARGUMENTS = re.compile(r"\n\s*Args:\n")

RunIn = Literal["thread", "main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """The data for offering a tool to a model and for checking its calls. `tool_spec` creates it.

    Example: `tool_spec(python_tool()).single_text_parameter` is "code".
    """

    name: str
    parameters: tuple[str, ...]
    schema: dict[str, Any]
    """JSON schema of the function, in the format of chat templates."""
    is_of_server: bool
    """A server wrote the schema, and the function has no signature of its own."""
    is_async: bool
    deterministic: bool
    """Identical calls may share one execution."""
    depends_on_calls_only: bool
    """A result depends only on the calls of the path and on chance, not on the time or on other paths."""
    run_in: RunIn
    """The thread of a sync tool. "thread": each call in a new thread. "main": all calls in the thread that polls."""
    create_state: CreateState | None
    """Creates the state on which a path's calls of the tool act; None for a tool without state."""
    concurrency: int | None
    """The maximum number of calls that run at the same time; None: no maximum of its own."""
    single_text_parameter: str | None
    """The only required parameter if it is a string: the text between the tool's tags. Otherwise None."""

    @property
    def tag_parameter(self) -> str:
        """The argument of a call between tags: `single_text_parameter`.

        Raises:
            ToolSpecError: There is none, so tags cannot call the tool.
        """
        if self.single_text_parameter is None:
            if self.is_of_server:
                remedy = "List only the others in its server's `tools`"
            else:
                remedy = "Change the signature to that"
                if self.create_state is not None:
                    remedy += f", rename it to _{self.name} if it is only a helper of an environment"
            raise ToolSpecError(
                f"The tool {self.name!r} has the parameters {list(self.parameters)}; a call between tags has exactly "
                f"one required `str` argument. {remedy}, or set tool_protocol to "
                '"chat_template", with which a tool may have several arguments.'
            )
        return self.single_text_parameter

    @property
    def undescribed_parameters(self) -> Any:
        """The JSON schema of the parameters, without descriptions."""
        return _undescribed(self.schema["function"]["parameters"])


def _undescribed(schema: Any) -> Any:
    """Return a part of a JSON schema without its descriptions."""
    if isinstance(schema, dict):
        return {
            key: _undescribed(value)
            for key, value in schema.items()
            if not (key == "description" and isinstance(value, str))
        }
    return [_undescribed(item) for item in schema] if isinstance(schema, list) else schema


def tool_spec(tool: Callable[..., Any]) -> ToolSpec:
    """Return the specification of a typed, documented function.

    If the parameters are known only at run time, as for a tool of an MCP server, the function's attribute
    `json_schema` contains the schema in the format of chat templates. If it allows `additionalProperties`, the
    function has `**kwargs` for them. This module's docstring explains the attributes `deterministic`,
    `depends_on_calls_only`, `run_in`, `create_state` and `concurrency`.

    Raises:
        ToolSpecError: The name cannot be a tag; there is a parameter like `*args` or `**kwargs`; the docstring, or a
            parameter's type or description, is missing; JSON has no values of a parameter's type; or an attribute has
            an invalid value.
    """
    name = getattr(tool, "__name__", None)
    if name is None or not callable(tool):
        raise ToolSpecError(f"A tool must be a named function, got {tool!r}. Wrap it in a `def` with the tool's name.")
    if not _TAG.fullmatch(name):
        raise ToolSpecError(
            f"tool {name!r}: the name is used as a tag, so it must match {_TAG.pattern}. Rename the function."
        )
    if name in RESERVED_TAGS:
        raise ToolSpecError(f"tool {name!r}: <{name}> is a reserved tag in rollouts. Rename the function.")
    if parameters_of(tool) is None:
        raise ToolSpecError(f"tool {name!r}: it has no signature. Call it in a `def` with typed parameters.")
    signature = inspect.signature(tool)
    offered: Any = getattr(tool, "json_schema", None)
    is_open = bool(offered) and offered["function"]["parameters"].get("additionalProperties", False) is not False
    named = [p for p in signature.parameters.values() if not (is_open and p.kind is p.VAR_KEYWORD)]
    for parameter in named:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ToolSpecError(
                f"tool {name!r}: its parameter {parameter.name!r} is positional-only, but a model passes arguments by "
                "name. Remove the `/` from the signature; call a function of a library in a `def` of your own."
            )
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolSpecError(
                f"tool {name!r}: a model cannot use the parameter {str(parameter)!r}. Name each parameter."
            )
    owner = getattr(tool, "__qualname__", name).rpartition(".")[0].rpartition(".")[2]
    if owner.isidentifier() and named and named[0].name == "self":
        raise ToolSpecError(
            f"tool {name!r}: it is a function of the class {owner} and has the parameter self. Pass a method of an "
            f"object instead, such as {owner}().{name}."
        )
    try:
        schema = offered or _schema_of(tool, signature)
    except ToolSpecError:
        raise
    except Exception as error:  # parsing errors, and any exception that unusual annotations cause
        raise ToolSpecError(
            f"tool {name!r}: no schema can be built for it: {str(error).rstrip('.!')}. It needs a docstring with a "
            "description and, after it, an `Args:` section that describes each parameter, and a type for each."
        ) from error
    properties = schema["function"]["parameters"]["properties"]
    required = [p.name for p in named if p.default is p.empty]
    single = required[0] if len(required) == 1 and properties[required[0]].get("type") == "string" else None
    is_async = inspect.iscoroutinefunction(tool)
    declared: dict[str, Any] = {
        attribute: getattr(tool, attribute, False) for attribute in ("deterministic", "depends_on_calls_only")
    }
    run_in: Any = getattr(tool, "run_in", "thread")
    create_state: Any = getattr(tool, "create_state", None)
    concurrency: Any = getattr(tool, "concurrency", None)
    for attribute, value in declared.items():
        if not isinstance(value, bool):
            raise ToolSpecError(f"tool {name!r}: the attribute {attribute} is {value!r}; expected a bool.")
    if run_in not in get_args(RunIn):
        raise ToolSpecError(f"tool {name!r}: the attribute run_in is {run_in!r}; expected one of {get_args(RunIn)}.")
    if is_async and run_in == "main":
        raise ToolSpecError(
            f"tool {name!r} is async and runs on an event loop, but its run_in is 'main'. Make it a sync function."
        )
    if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
        raise ToolSpecError(
            f"tool {name!r}: the attribute concurrency is {concurrency!r}; expected an integer of at least 1."
        )
    if create_state is not None and not callable(create_state):
        raise ToolSpecError(
            f"tool {name!r}: the attribute create_state is {create_state!r}; expected a function that takes the id of "
            "a group and returns a new PathState."
        )
    if type(create_state).__hash__ is None:
        raise ToolSpecError(
            f"tool {name!r}: create_state is a {type(create_state).__name__} without a hash, but tools with the same "
            "create_state share a state. Make it a function, or a dataclass with eq=False."
        )
    if create_state is not None and not _takes_one(create_state):
        raise ToolSpecError(
            f"tool {name!r}: create_state {create_state!r} cannot be called with one argument. It must take the id of "
            "a group, and nothing else."
        )
    return ToolSpec(
        name=name,
        parameters=tuple(p.name for p in named),
        schema=schema,
        is_of_server=bool(offered),
        is_async=is_async,
        **declared,
        run_in=run_in,
        create_state=create_state,
        concurrency=concurrency,
        single_text_parameter=single,
    )


def _schema_of(tool: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """Return the JSON schema of a function in the format of transformers, which reads its docstring.

    The docstring may repeat a type, which transformers refuses: `text (str): What to return.` Schemas of types are
    those of transformers, except that it loses the keys of a TypedDict, makes an object of each class that it does not
    know, and of most types in a union keeps the outer name only. The type of the result is left out if it is not one
    of JSON values.
    """
    hints = hints_of(tool)
    types: dict[str, dict[str, Any]] = {}
    if "return" in hints:
        with contextlib.suppress(ToolSpecError):
            types["return"] = _json_type(hints["return"], "")
    doc = inspect.getdoc(tool) or ""
    start = _ARGUMENTS.search(doc)
    for name in signature.parameters:
        if name in hints:
            types[name] = _json_type(
                hints[name],
                f"tool {tool.__name__!r}: the parameter {name!r} is annotated {inspect.formatannotation(hints[name])}",
            )
        if start is not None:
            head, described = doc[: start.end()], doc[start.end() :]
            doc = head + re.sub(rf"^(\s*{name})\s*\(.*?\):", r"\1:", described, flags=re.MULTILINE)

    def same() -> None: ...

    same.__name__, same.__doc__, same.__annotations__ = tool.__name__, doc, dict.fromkeys(types, Any)
    same.__signature__ = signature  # type: ignore[attr-defined]
    schema: dict[str, Any] = get_json_schema(same)
    function = schema["function"]
    for name, described in function["parameters"]["properties"].items():
        # As in annotations of `x: int = None`, whose default the model may also write.
        nullable = {"nullable": True} if types[name] and signature.parameters[name].default is None else {}
        function["parameters"]["properties"][name] = types[name] | nullable | described
    if "return" in types:
        function["return"] = types["return"] | function["return"]
    return schema


def hints_of(tool: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a tool's parameters and result, without that of the result if it cannot be resolved."""
    try:
        return get_type_hints(tool)
    except Exception:  # such as a name that is imported only for type checkers

        def parameters() -> None: ...

        parameters.__annotations__ = {name: hint for name, hint in tool.__annotations__.items() if name != "return"}
        return get_type_hints(parameters, getattr(inspect.unwrap(tool), "__globals__", {}))


def _json_type(hint: Any, annotated: str, outer: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return the JSON schema of the values of a type.

    Args:
        annotated: The beginning of an error: the tool, the parameter and its annotation.
        outer: The TypedDicts that contain it; one that contains itself is an object without names of keys there.

    Raises:
        ToolSpecError: JSON has no values of this type.
    """
    of = partial(_json_type, annotated=annotated, outer=outer)
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if (origin or hint) in (list, tuple) and not parts:
        return {"type": "array", "items": {}}
    if origin is Literal and all(type(value) in _TYPE_NAMES for value in parts):
        names = list(dict.fromkeys(_TYPE_NAMES[type(value)] for value in parts))
        return {"type": names[0] if len(names) == 1 else names, "enum": list(parts)}
    if is_typeddict(hint):
        return {"type": "object"} if hint in outer else _typed_dict(hint, annotated, (*outer, hint))
    if origin is list or (origin is tuple and parts[1:] == (...,)):
        return {"type": "array", "items": of(parts[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [of(part) for part in parts]}
    if origin is dict:
        return {"type": "object", **({"additionalProperties": of(parts[1])} if parts else {})}
    if origin in (Union, UnionType):
        choices = tuple(value for part in parts if get_origin(part) is Literal for value in get_args(part))
        members = [part for part in parts if part is not type(None) and get_origin(part) is not Literal]
        schemas = [of(member) for member in (*members, *([Literal[choices]] if choices else []))]
        if len(schemas) == 1:
            (schema,) = schemas
        elif all(schema.keys() == {"type"} for schema in schemas):
            schema = {"type": sorted(schema["type"] for schema in schemas)}
        else:
            schema = {"anyOf": schemas}
        return {**schema, "nullable": True} if type(None) in parts else schema
    instead = "str, int, float, bool, list[…], dict[str, …], Any or a Literal"
    if isinstance(hint, type) and issubclass(hint, Enum):
        instead = f"Literal{[member.value for member in hint]}"
    raise ToolSpecError(
        f"{annotated}, but {inspect.formatannotation(hint)} is not a type of JSON values. Annotate it with {instead}, "
        "and convert the value in the function."
    )


def _typed_dict(hint: Any, annotated: str, outer: tuple[Any, ...]) -> dict[str, Any]:
    """Return the JSON schema of a TypedDict. `_json_type` explains the arguments and the error."""
    try:
        hints, marked = get_type_hints(hint), get_type_hints(hint, include_extras=True)
    except NameError:  # of a local class, or imported only for type checkers
        return {"type": "object"}
    marks = {name: get_origin(value) for name, value in marked.items()}
    required = [  # __required_keys__ does not know marks in annotations that are strings
        name
        for name, mark in marks.items()
        if mark is Required or (name in hint.__required_keys__ and mark is not NotRequired)
    ]
    properties = {
        name: _json_type(
            value, f"{annotated}, whose key {name!r} is annotated {inspect.formatannotation(value)}", outer
        )
        for name, value in hints.items()
    }
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return True
    try:
        signature.bind(0)
    except TypeError:
        return False
    return True


def _received(value: Any, schema: dict[str, Any]) -> Any:
    """Return an argument as its function gets it: 5 for 5.0 if it is an integer, as JSON Schema counts."""
    is_integral = schema.get("type") == "integer" and isinstance(value, float) and value.is_integer()
    return int(value) if is_integral else value


class ToolSet:
    """Tools that are offered together.

    Args:
        path_state: A `create_state` whose state each path has, even if no tool acts on it.

    Raises:
        ToolSpecError: A function cannot be a tool (see `tool_spec`), or two have the same name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], path_state: CreateState | None = None):
        self.specs: dict[str, ToolSpec] = {}
        self.functions: dict[str, Callable[..., Any]] = {}
        for tool in tools:
            spec = tool_spec(tool)
            if spec.name in self.specs:
                raise ToolSpecError(f"Two tools are named {spec.name!r}, but a tag must name one. Rename one of them.")
            self.specs[spec.name] = spec
            self.functions[spec.name] = tool
        self._signatures = {name: inspect.signature(tool) for name, tool in self.functions.items()}
        self._no_state = NoState(self.functions)
        self._create = {name: spec.create_state for name, spec in self.specs.items() if spec.create_state is not None}
        if path_state is not None:
            self._create[""] = path_state  # no tool has this name

    def create_states(self, group: int, close_failed: Callable[[PathState, BaseException], None]) -> PathStates:
        """Return the states of a path from the root; `PathStates` explains the arguments."""
        return PathStates(group, self._create, self._no_state, close_failed)

    def refusal(self, call: ToolCall) -> str | None:
        """Return the error text for the model if the call is invalid, otherwise None."""
        spec = self.specs.get(call.name)
        if spec is None:
            return f"Error: there is no tool {call.name!r}; the tools are: {', '.join(self.specs)}."
        try:
            self._signatures[call.name].bind(**call.arguments)
        except TypeError as error:
            return f"Error: {call.name}: {error}."
        properties = spec.schema["function"]["parameters"]["properties"]
        for name, written in call.arguments.items():
            schema = properties.get(name, {})  # none of its own: additionalProperties
            value = _received(written, schema)
            expected = schema.get("type")
            types = _JSON_TYPES.get(expected) if isinstance(expected, str) else None
            if value is None and schema.get("nullable"):
                continue
            # A bool is an int in Python, but not in a JSON schema.
            if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
                return f"Error: {call.name}: {name} must be of type {expected}, got {type(value).__name__}."
            choices = schema.get("enum")
            if isinstance(choices, list) and not any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices
            ):
                return f"Error: {call.name}: {name} must be one of {str(choices)[1:-1]}, got {value!r}."
        return None

    def received(self, call: ToolCall) -> ToolCall:
        """Return a valid call with its arguments as the function gets them."""
        properties = self.specs[call.name].schema["function"]["parameters"]["properties"]
        arguments = {name: _received(value, properties.get(name, {})) for name, value in call.arguments.items()}
        return ToolCall(name=call.name, arguments=arguments)
