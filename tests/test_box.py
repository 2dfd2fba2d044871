"""The ToolBox runs calls concurrently, enforces timeouts, shares executions, and turns every failure into text."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict
from urllib.error import URLError

import numpy as np
import pandas
import pydantic
import pytest

import arpo_trl
from arpo_trl.errors import ConfigError, ToolError, ToolSpecError, ToolStopped, ToolUnavailable
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.python.local import python_tool
from arpo_trl.tools.search.index import LocalIndex, search_tool
from arpo_trl.tools.spec import tool_spec
from arpo_trl.tools.state import PathState, PathStates
from arpo_trl.tools.toolbox import ToolBox, ToolResult
from arpo_trl.tools.visit.pages import visit_tool
from support import short_deadline


def echo(text: str) -> str:
    """Return the text.

    Args:
        text: What to return.
    """
    return text


async def echo_later(text: str) -> str:
    """Return the text, asynchronously.

    Args:
        text: What to return.
    """
    await asyncio.sleep(0)
    return text


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Gate:
    """A tool that waits until the test lets it go on, and counts its executions."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.executions = 0
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def tool(self) -> Callable[[str], str]:
        def wait(text: str) -> str:
            """Wait, then return the text.

            Args:
                text: What to return.
            """
            with self._lock:
                self.executions += 1
                self.running += 1
                self.most_running = max(self.most_running, self.running)
            self.opened.wait(60)
            with self._lock:
                self.running -= 1
            return text

        return wait


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def returning(value: Any) -> Callable[[str], Any]:
    """A tool that returns `value`, or raises it if it is an exception."""

    def tool(text: str) -> Any:
        """Return something.

        Args:
            text: Not used.
        """
        if isinstance(value, BaseException):
            raise value
        return value

    return tool


def of_kind(kind: str, tool: Callable[[str], Any]) -> Callable[[str], Any]:
    """The sync tool as one that runs in a "thread" or in "main", or as an "async" one."""
    if kind != "async":
        return wanting(tool, run_in=kind)

    async def wrapper(text: str) -> Any:
        return tool(text)

    wrapper.__name__, wrapper.__doc__ = tool.__name__, tool.__doc__
    return wrapper


def collect(box: ToolBox, count: int) -> dict[int, ToolResult]:
    """The next `count` results by ticket."""
    results: dict[int, ToolResult] = {}
    while len(results) < count:
        arrived = box.poll(timeout_s=30)
        assert arrived, f"{count - len(results)} results never came"
        results.update(arrived)
    return results


def call_once(tool: Callable[..., Any], arguments: dict[str, Any] | None = None, **settings: Any) -> ToolResult:
    with ToolBox([tool], **settings) as box:
        ticket = box.submit(ToolCall(name=tool.__name__, arguments={"text": "x"} if arguments is None else arguments))
        return collect(box, 1)[ticket]


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: float
    next: Any = None


# Specifications.


def test_a_spec_tells_parameters_kind_and_the_single_text_parameter() -> None:
    spec = tool_spec(echo)
    assert (spec.name, spec.parameters, spec.is_async, spec.single_text_parameter) == (
        "echo",
        ("text",),
        False,
        "text",
    )
    assert spec.schema["function"]["parameters"]["properties"]["text"]["description"] == "What to return."
    assert tool_spec(echo_later).is_async
    assert tool_spec(add).single_text_parameter is None  # the one required parameter is an int


def _untyped(text):  # type: ignore[no-untyped-def]
    """Documented.

    Args:
        text: Described.
    """


def _undocumented(text: str) -> str:
    return text


def _undescribed(text: str) -> str:
    """No word about its parameter."""
    return text


def _without_description(text: str) -> str:
    """
    Args:
        text: Described.
    """
    return text


def _variadic(*texts: str) -> str:
    """Any number.

    Args:
        texts: Described.
    """
    return ""


def named(name: str) -> Callable[[str], str]:
    def tool(text: str) -> str:
        """Return the text.

        Args:
            text: What to return.
        """
        return text

    tool.__name__ = name
    return tool


def _positional(text: str, /) -> str:
    return text


class Searcher:
    def find(self, text: str) -> str:
        """Find it.

        Args:
            text: What.
        """
        return text


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (_untyped, "a type for each"),
        (_undocumented, "docstring"),
        (_undescribed, "describes each parameter"),
        (_without_description, "with a description and, after it, an `Args:` section"),
        (_variadic, "Name each parameter"),
        (_positional, "its parameter 'text' is positional-only, .* Remove the `/`"),
        (len, "its parameter 'obj' is positional-only, .* in a `def` of your own"),
        (max, "tool 'max': it has no signature. Call it in a `def`"),
        (Searcher.find, r"a function of the class Searcher .* Pass a method of an object instead, .*er\(\).find"),
        (inspect, "A tool must be a named function, got <module 'inspect'"),
        (named("<lambda>"), "used as a tag"),
        (named("two words"), "used as a tag"),
        (named("1st"), "used as a tag"),
        (named("answer"), "<answer> is a reserved tag"),
    ],
)
def test_a_tool_that_cannot_be_offered_is_refused(tool: Callable[..., Any], message: str) -> None:
    with pytest.raises(ToolSpecError, match=message):
        tool_spec(tool)


def annotated(hint: Any) -> Callable[..., Any]:
    """A tool whose parameter has that type."""

    def tool(value: Any) -> str:
        """Show the value.

        Args:
            value: What to show.
        """
        return repr(value)

    tool.__annotations__["value"] = hint
    tool.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("value", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint)]
    )
    return tool


class Pair(TypedDict):
    first: int
    second: NotRequired[Literal["a"]]


PAIR = {
    "type": "object",
    "properties": {"first": {"type": "integer"}, "second": {"type": "string", "enum": ["a"]}},
    "required": ["first"],
}


class Tree(TypedDict, total=False):
    name: Required[str]
    parts: list[Tree]


class Dated(TypedDict):
    on: date


def local_typed_dict() -> Any:
    class Local(TypedDict):
        parts: list[Local]

    return Local


@pytest.mark.parametrize(
    ("hint", "schema", "value"),
    [
        (list, {"type": "array", "items": {}}, [1, "a"]),
        (tuple, {"type": "array", "items": {}}, [1, "a"]),
        (list | None, {"type": "array", "items": {}, "nullable": True}, [1]),
        (list[list], {"type": "array", "items": {"type": "array", "items": {}}}, [[1]]),
        (list[dict], {"type": "array", "items": {"type": "object"}}, [{}]),
        (dict[str, list], {"type": "object", "additionalProperties": {"type": "array", "items": {}}}, {"a": [1]}),
        (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, [1, "a"]),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}, [1, 2, 3]),
        (dict, {"type": "object"}, {"a": 1}),
        (list[Pair], {"type": "array", "items": PAIR}, [{"first": 1}]),
        (Pair | None, {**PAIR, "nullable": True}, {"first": 1}),
        (
            Tree,
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"type": "object"}}},
                "required": ["name"],
            },
            {"name": "a"},
        ),
        (local_typed_dict(), {"type": "object"}, {"parts": []}),
        (str | int, {"type": ["integer", "string"]}, "a"),
        (int | Literal["all"], {"anyOf": [{"type": "integer"}, {"type": "string", "enum": ["all"]}]}, "all"),
        (Literal["a"] | Literal["b", 1], {"type": ["string", "integer"], "enum": ["a", "b", 1]}, "b"),
        (
            str | list[int] | None,
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}], "nullable": True},
            [1],
        ),
        (Any, {}, [1]),
        (Annotated[str, "a city"], {"type": "string"}, "Oslo"),
        (Literal["a", 1] | None, {"type": ["string", "integer"], "enum": ["a", 1], "nullable": True}, None),
    ],
)
def test_a_parameter_takes_the_json_values_of_its_type(hint: Any, schema: dict[str, Any], value: Any) -> None:
    tool = annotated(hint)
    properties = tool_spec(tool).schema["function"]["parameters"]["properties"]
    assert properties == {"value": {**schema, "description": "What to show."}}
    assert call_once(tool, {"value": value}).text == repr(value)


@pytest.mark.parametrize(
    ("hint", "shown", "instead"),
    [
        (Colour, "Colour", r"Literal\['red'\]"),
        (list[Colour], "Colour", r"Literal\['red'\]"),
        (dict[str, date | None], "datetime.date", "str, int"),
        (list[Dated], "Dated], whose key 'on' is annotated datetime.date", "str, int"),
        (datetime, "datetime.datetime", "str, int"),
        (bytes, "bytes", "str, int"),
        (set[int], r"set\[int\]", "str, int"),
        (Point, "Point", "str, int"),
        (object, "object", "str, int"),
        (Callable[[int], int], "Callable", "str, int"),
    ],
)
def test_a_parameter_of_a_type_that_json_lacks_is_refused_by_its_name(hint: Any, shown: str, instead: str) -> None:
    with pytest.raises(ToolSpecError, match=rf"'tool': the parameter 'value' is annotated .*{shown}") as e:
        tool_spec(annotated(hint))
    lacking = shown.rpartition(" ")[2]
    assert re.search(rf"but [\w.]*{lacking}.* is not a type of JSON values\. Annotate it with {instead}", str(e.value))


@pytest.mark.parametrize(
    ("hint", "value", "accepted"),
    [
        (Literal["red", "green"], "blue", False),
        (Literal["red", "green"], "red", True),
        (Literal["red", 2], True, False),
        (Literal["red", 1], True, False),
        (Literal["red", 1], [], False),
        (Literal["red", 1], 1, True),
        (Literal["red", True], True, True),
        (Literal[1, 2], 2.0, True),
        (Literal[1, 2], 3.0, False),
        (Literal["red"] | None, None, True),
        (Literal["red"] | Literal["green"], "green", True),
        (Literal["red"] | Literal["green"], "blue", False),
    ],
)
def test_only_the_values_of_a_literal_reach_the_tool(hint: Any, value: Any, accepted: bool) -> None:
    result = call_once(annotated(hint), {"value": value})
    assert result.failure == (None if accepted else "bad_call")


def optional(number: int = None) -> str:  # type: ignore[assignment]  # noqa: RUF013
    """A tool whose annotation leaves out None.

    Args:
        number: A number.
    """
    return repr(number)


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (5, "5"), (5.0, "5"), (-0.0, "0")])
def test_an_integer_may_be_written_with_a_point_and_a_default_of_none_as_null(value: Any, shown: str) -> None:
    assert call_once(optional, {"number": value}).text == shown


@pytest.mark.parametrize("value", [5.5, float("inf"), True, "5"])
def test_what_json_does_not_count_as_an_integer_is_refused(value: Any) -> None:
    assert call_once(optional, {"number": value}).failure == "bad_call"


def test_a_value_that_is_no_choice_is_text_with_the_choices() -> None:
    assert call_once(annotated(Literal["red", "green"]), {"value": "blue"}).text == (
        "Error: tool: value must be one of 'red', 'green', got 'blue'."
    )


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (list, {"type": "array", "items": {}}),
        (Sequence[str], None),
        (set[str], None),
        (np.ndarray[Any, np.dtype[np.float64]], None),
        (Point, None),
        ("OnlyForTypeCheckers", None),
    ],
)
def test_the_schema_has_the_type_of_a_result_only_if_json_has_it(hint: Any, schema: dict[str, Any] | None) -> None:
    tool = returning("x")
    tool.__annotations__["return"] = hint
    function = tool_spec(tool).schema["function"]
    assert function.get("return") == schema
    assert function["parameters"]["properties"]["text"]["type"] == "string"


def test_a_docstring_may_repeat_the_types_of_parameters() -> None:
    def move(piece: str, by: int = 1) -> None:
        """Move a piece (x): far.

        Args:
            piece (str): Which one (the
                white one).
            by (Optional[int], optional): How far.
        """

    function = tool_spec(move).schema["function"]
    assert function["description"] == "Move a piece (x): far."
    properties = function["parameters"]["properties"]
    assert properties["piece"]["description"] == "Which one (the white one)."
    assert properties["by"]["description"] == "How far."


def test_an_object_without_a_name_is_refused() -> None:
    class Callable_:
        def __call__(self, text: str) -> str:
            return text

    with pytest.raises(ToolSpecError, match="A tool must be a named function"):
        tool_spec(Callable_())


def test_a_method_of_an_object_is_a_tool() -> None:
    assert tool_spec(Searcher().find).parameters == ("text",)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolSpecError, match="Two tools are named 'echo'"):
        ToolBox([echo, named("echo")])


@pytest.mark.parametrize("settings", [{"timeout_s": 0.0}, {"concurrency": 0}, {"max_chars": 99}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ToolBox([echo], **settings)


# Results.


def test_sync_and_async_tools_return_their_text_under_their_tickets() -> None:
    with ToolBox([echo, echo_later]) as box:
        assert box.names == ("echo", "echo_later")
        tickets = {
            box.submit(ToolCall(name=name, arguments={"text": name + str(i)})): name + str(i)
            for i in range(5)
            for name in box.names
        }
        results = collect(box, 10)
        assert box.poll() == []
    assert {ticket: result.text for ticket, result in results.items()} == tickets
    assert {(result.ok, result.source) for result in results.values()} == {(True, "executed")}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (True, "true"),
        (3, "3"),
        (0.5, "0.5"),
        ({"é": [1, None]}, '{"é": [1, null]}'),
        ((1, "b"), '[1, "b"]'),
        (Decimal("0.10"), "0.10"),
        (date(2024, 2, 29), "2024-02-29"),
        (
            {"on": datetime(2024, 2, 29, 12, 30), "cost": Decimal("1.5")},
            '{"on": "2024-02-29 12:30:00", "cost": "1.5"}',
        ),
        (np.float64(0.5), "0.5"),
        (np.int64(7), "7"),
        (np.bool_(True), "true"),
        ({"n": np.int32(3), "a": np.array([[1, 2], [3, 4]])}, '{"n": 3, "a": [[1, 2], [3, 4]]}'),
        (["a"], '["a"]'),
        (np.float32(0.1), "0.1"),
        ({"a": np.array([0.1, 2.0], np.float32)}, '{"a": [0.1, 2.0]}'),
        (np.datetime64("2024-02-29"), "2024-02-29"),
        (np.datetime64("2024-02-29", "ns"), "2024-02-29T00:00:00.000000000"),
        (np.array(["2024-02-29T12", "NaT"], "datetime64[ns]"), '["2024-02-29T12:00:00.000000000", "NaT"]'),
        (
            {"a": np.timedelta64(90, "s"), np.datetime64("2024", "ns"): 1},
            '{"a": "0:01:30", "2024-01-01T00:00:00.000000000": 1}',
        ),
        (np.array([3_600_000_000_000], "timedelta64[ns]"), '["1:00:00"]'),
        (np.timedelta64(3_600_000_000, "us"), "1:00:00"),
        (Colour.RED, "red"),
        ([Colour.RED], '["red"]'),
        (Point(1.5, [Point(0.0)]), '{"x": 1.5, "next": [{"x": 0.0, "next": null}]}'),
        (pydantic.RootModel[list[int]]([1, 2]), "[1, 2]"),
        (pandas.DataFrame({"city": ["Oslo"], "n": [3]}), "   city  n\n0  Oslo  3"),
        (pandas.Series({"Oslo": 10, "Rome": 30}), "Oslo    10\nRome    30"),
        (None, "(no output)"),
        ("", "(no output)"),
        (" \n", "(no output)"),
        (
            {date(2024, 5, 1): 1, np.int64(2): np.float64(0.5), (1, "a"): [{Decimal("1.5"): 2}]},
            '{"2024-05-01": 1, "2": 0.5, "(1, \'a\')": [{"1.5": 2}]}',
        ),
        ("nul \0 here", "nul \ufffd here"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("pair \ud83d\ude00", "pair \U0001f600"),
    ],
)
def test_a_value_becomes_encodable_text(value: Any, text: str) -> None:
    result = call_once(returning(value))
    assert (result.text, result.failure) == (text, None)
    assert result.text.encode()


@pytest.mark.parametrize("run_in", ["thread", "main"])
def test_no_result_and_no_error_contains_a_secret_of_the_environment(
    run_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "k/1+2 3456")
    monkeypatch.setenv("SHOP_TOKEN", "k/1+2 3456-and-more")
    monkeypatch.setenv("SHOP_NAME", "not a secret")

    def tool(text: str) -> Any:
        """Quotes what it was configured with.

        Args:
            text: How it answers.
        """
        if text == "raise":  # the cut at 300 characters would go through the key
            raise ValueError("x" * 290 + "k/1+2 3456")
        if text == "refuse":
            raise ToolError("https://shop/?key=k%2F1%2B2%203456 says no")
        return {"keys": ["k/1+2 3456", "k/1+2 3456-and-more"], "name": "not a secret", "url": "?k=k%2F1%2B2+3456"}

    tool.run_in = run_in  # type: ignore[attr-defined]
    assert call_once(tool).text == '{"keys": ["[key]", "[key]"], "name": "not a secret", "url": "?k=[key]"}'
    assert call_once(tool, {"text": "raise"}).text == f"Error: ValueError: {'x' * 290}[key]"
    assert call_once(tool, {"text": "refuse"}).text == "https://shop/?key=[key] says no"
    assert "k/1+2" not in call_once(tool, {"k/1+2 3456": "x"}).text  # refused


class Leaving:
    """A value whose own code ends the program."""

    def to_string(self) -> str:
        raise SystemExit(1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"bytes", "bytes"),
        (object(), "object"),
        ({1, 2}, "set"),
        (Leaving(), "Leaving"),
        ({"a": object()}, "dict with a value of type object"),
        ([b"x"], "list with a value of type bytes"),
        ({"a": [Point(1.0, {1})]}, "dict with a value of type set"),
        ((1, Leaving()), "tuple with a value of type Leaving"),
        ({frozenset(): 1}, "dict with a key of type frozenset"),
    ],
)
def test_a_value_without_text_is_a_failure_that_names_the_type(value: Any, shown: str) -> None:
    result = call_once(returning(value))
    assert result.failure == "not_text"
    assert result.text == f"Error: the tool call returned {shown}, which is not text."


@pytest.mark.parametrize("run_in", ["thread", "main"])
def test_an_awaitable_that_a_sync_tool_returns_is_awaited(run_in: str) -> None:
    async def later(text: str) -> str:
        await asyncio.sleep(0)
        if text == "raise":
            raise ValueError("no such thing")
        return text.upper()

    def tool(text: str) -> Any:
        """Answers later.

        Args:
            text: What to answer.
        """
        return later(text)

    tool.run_in = run_in  # type: ignore[attr-defined]
    assert (call_once(tool).text, call_once(tool).failure) == ("X", None)
    failed = call_once(tool, {"text": "raise"})
    assert (failed.text, failed.failure) == ("Error: ValueError: no such thing", "error")


def test_an_awaitable_that_never_comes_is_left_at_the_deadline() -> None:
    def tool(text: str) -> Any:
        """Answers never.

        Args:
            text: What to answer.
        """
        return asyncio.sleep(3600)

    assert call_once(tool, timeout_s=0.1).failure == "timeout"


def test_a_value_that_contains_itself_is_not_text() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert call_once(returning(loop)).failure == "not_text"


def test_a_value_that_breaks_when_it_is_read_is_not_text() -> None:
    class Broken(dict[str, str]):
        def items(self) -> Any:
            raise KeyError("broken")

    assert call_once(returning(Broken(a="b"))).failure == "not_text"


@pytest.mark.parametrize("length", [101, 5_000, 1_000_000])
def test_a_flood_keeps_head_and_tail_and_marks_the_cut(length: int) -> None:
    text = "h" * (length // 2) + "t" * (length - length // 2)
    result = call_once(returning(text), max_chars=100)
    assert result.ok
    assert len(result.text) == 100
    assert result.text.startswith("hhhhh") and result.text.endswith("ttttt")
    assert "characters omitted" in result.text


def test_an_unavailable_service_of_a_tool_has_its_own_failure() -> None:
    result = call_once(returning(ToolUnavailable("Error: away")))
    assert (result.text, result.failure) == ("Error: away", "degraded")


def test_a_text_of_just_the_longest_length_is_not_cut() -> None:
    assert call_once(returning("x" * 100), max_chars=100).text == "x" * 100


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ToolError("nothing on that page\ntry another"), "nothing on that page\ntry another"),
        (ValueError("bad value\nsecond line"), "Error: ValueError: bad value"),
        (KeyError(), "Error: KeyError"),
        (
            FileNotFoundError(2, "No such file or directory", "/a/secret/path"),
            "Error: FileNotFoundError: No such file or directory",
        ),
        (ValueError("x" * 1000), "Error: ValueError: " + "x" * 300),
        (SystemExit(1), "Error: SystemExit: 1"),
        (KeyboardInterrupt(), "Error: KeyboardInterrupt"),
        (StopIteration("end"), "Error: StopIteration: end"),
        (asyncio.CancelledError(), "Error: CancelledError"),
        (FileNotFoundError("there is no order 'A7'"), "Error: FileNotFoundError: there is no order 'A7'"),
        (TimeoutError("the shop took more than 3 s"), "Error: TimeoutError: the shop took more than 3 s"),
        (URLError("unknown url type: foo"), "Error: URLError: <urlopen error unknown url type: foo>"),
        (FileNotFoundError(2, None, "/a/secret/path"), "Error: FileNotFoundError"),
        (OSError(2, b"bytes", "/a/secret/path"), "Error: FileNotFoundError"),
        (OSError(2, b"bytes"), "Error: FileNotFoundError: [Errno 2] b'bytes'"),
        (OSError(), "Error: OSError"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_exception_is_one_line_without_paths(error: BaseException, text: str, kind: str) -> None:
    async def fail(text: str) -> str:
        """Fail.

        Args:
            text: Not used.
        """
        raise error

    result = call_once(returning(error) if kind == "sync" else fail)
    if kind == "async" and isinstance(error, StopIteration):  # Python itself makes it a RuntimeError in a coroutine
        text = "Error: RuntimeError: coroutine raised StopIteration"
    assert (result.text, result.failure, result.source) == (text, "error", "executed")


async def leave() -> None:
    sys.exit(2)


async def stop_the_loop() -> None:
    asyncio.get_running_loop().stop()


@pytest.mark.parametrize(("work", "text"), [(leave, "Error: SystemExit: 2"), (stop_the_loop, "null")])
def test_an_async_tool_that_ends_the_program_in_a_task_ends_only_its_call(
    work: Callable[[], Any], text: str, gate: Gate
) -> None:
    async def ending(text: str) -> Any:
        """End the program.

        Args:
            text: Not used.
        """
        return json.dumps(await asyncio.wait_for(work(), 60))

    async def waiting(text: str) -> str:
        """Wait until the other call has ended.

        Args:
            text: What to return.
        """
        while not gate.opened.is_set():
            await asyncio.sleep(0.001)
        return text

    with ToolBox([ending, waiting, echo_later]) as box:
        during = box.submit(ToolCall(name="waiting", arguments={"text": "during"}))
        box.submit(ToolCall(name="ending", arguments={"text": "x"}))
        (result,) = collect(box, 1).values()
        gate.opened.set()
        later = box.submit(ToolCall(name="echo_later", arguments={"text": "later"}))
        results = collect(box, 2)
    assert result.text == text
    assert (results[during].text, results[later].text) == ("during", "later")


class Ending(BaseException):
    """Neither an Exception nor one of Python's own."""


def failing(error: BaseException | None) -> Any:
    """A method that raises `error`; None: it returns no text."""

    def method(self: Any, *arguments: Any) -> Any:
        if error is not None:
            raise error

    return method


ODD_ERRORS = [RuntimeError("no"), SystemExit(1), Ending(), None]


@pytest.mark.parametrize("error", [*ODD_ERRORS, KeyboardInterrupt()])
@pytest.mark.parametrize("base", [Exception, ToolError, ToolUnavailable, FileNotFoundError])
@pytest.mark.parametrize("kind", ["thread", "main", "async"])
def test_an_exception_whose_class_makes_no_message_is_text(
    error: BaseException | None, base: type[Exception], kind: str
) -> None:
    if kind == "main" and isinstance(error, KeyboardInterrupt):
        return  # in the main thread it comes from the user
    unprintable = type("Unprintable", (base,), {"__str__": failing(error)})
    result = call_once(of_kind(kind, returning(unprintable())))
    assert result.text == "Error: Unprintable"
    assert result.failure == ("degraded" if base is ToolUnavailable else "error")


def test_the_message_of_an_exception_may_be_an_odd_text() -> None:
    class Odd(str):
        encode = strip = partition = failing(RuntimeError("no"))

    assert call_once(returning(ToolError(Odd("closed")))).text == "closed"
    assert call_once(returning(ValueError(Odd("closed")))).text == "Error: ValueError: closed"
    assert call_once(returning(Odd("closed"))).text == "closed"


@pytest.mark.parametrize("error", ODD_ERRORS)
@pytest.mark.parametrize("kind", ["thread", "main", "async"])
def test_a_value_whose_class_fails_to_write_it_is_not_text(error: BaseException | None, kind: str) -> None:
    for base, arguments in ((Decimal, ("1.5",)), (date, (2024, 2, 29)), (Path, ("a",))):
        unprintable = type("Unprintable", (type(base(*arguments)),), {"__str__": failing(error)})
        result = call_once(of_kind(kind, returning(unprintable(*arguments))))
        assert (result.text, result.failure) == (
            "Error: the tool call returned Unprintable, which is not text.",
            "not_text",
        )


@pytest.mark.parametrize("kind", ["thread", "main", "async"])
def test_a_value_that_hides_its_class_ends_only_its_call(kind: str) -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("no object")

    assert not call_once(of_kind(kind, returning(Proxy()))).ok


class Soon:
    """An awaitable that is no coroutine."""

    def __await__(self) -> Iterator[Any]:
        return asyncio.sleep(0).__await__()


@pytest.mark.parametrize("other", [echo_later, returning(Soon())])
def test_a_call_that_another_coroutine_cancels_before_its_first_step_is_text(other: Callable[[str], Any]) -> None:
    async def cancel(text: str) -> str:
        """Cancel the other call.

        Args:
            text: What to return.
        """
        while len(tasks := asyncio.all_tasks() - {asyncio.current_task()}) == 0:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return text

    with ToolBox([cancel, other]) as box:
        first = box.submit(ToolCall(name="cancel", arguments={"text": "done"}))
        second = box.submit(ToolCall(name=other.__name__, arguments={"text": "x"}))
        results = collect(box, 2)
    assert (results[first].text, results[second].text) == ("done", "Error: CancelledError")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            ToolCall(name="browse", arguments={"text": "x"}),
            "Error: there is no tool 'browse'; the tools are: echo, add.",
        ),
        (ToolCall(name="echo", arguments={}), "Error: echo: missing a required argument: 'text'."),
        (
            ToolCall(name="echo", arguments={"text": "x", "more": 1}),
            "Error: echo: got an unexpected keyword argument 'more'.",
        ),
        (ToolCall(name="echo", arguments={"text": 5}), "Error: echo: text must be of type string, got int."),
        (ToolCall(name="add", arguments={"a": True}), "Error: add: a must be of type integer, got bool."),
    ],
)
def test_a_bad_call_becomes_an_error_for_the_model_and_nothing_runs(call: ToolCall, text: str) -> None:
    with ToolBox([echo, add]) as box:
        ticket = box.submit(call)
        result = collect(box, 1)[ticket]
    assert result == ToolResult(text=text, failure=ToolFailure.BAD_CALL, seconds=0.0, source=CallSource.REFUSED)


# Deadlines and places.


def test_a_hanging_sync_call_ends_at_its_deadline(gate: Gate) -> None:
    result = call_once(gate.tool(), timeout_s=0.05)
    assert (result.failure, result.text) == ("timeout", "Error: the wait call took longer than 0.05 s.")
    assert result.seconds >= 0.05


def test_a_hanging_async_call_is_cancelled_at_its_deadline() -> None:
    ended = threading.Event()

    async def hang(text: str) -> str:
        """Hang.

        Args:
            text: Not used.
        """
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        return ""

    result = call_once(hang, timeout_s=0.05)
    assert (result.failure, ended.wait(30)) == ("timeout", True)


def test_a_blocking_async_tool_delays_no_sync_call() -> None:
    released = threading.Event()

    async def block(text: str) -> str:
        """Block the event loop.

        Args:
            text: Not used.
        """
        released.wait(60)
        return ""

    with ToolBox([block, echo], timeout_s=30.0) as box:
        short_deadline(box, 0.05, of=lambda call: call.name == "block")
        blocked = box.submit(ToolCall(name="block", arguments={"text": "x"}))
        echoed = box.submit(ToolCall(name="echo", arguments={"text": "x"}))
        results = collect(box, 2)
        released.set()
    assert (results[blocked].failure, results[echoed].text) == ("timeout", "x")


def test_hung_calls_give_their_places_back(gate: Gate) -> None:
    with ToolBox([gate.tool(), echo], timeout_s=30.0, concurrency=2) as box:
        short_deadline(box, 0.05, of=lambda call: call.name == "wait")
        hung = [box.submit(ToolCall(name="wait", arguments={"text": str(i)})) for i in range(6)]
        last = box.submit(ToolCall(name="echo", arguments={"text": "still served"}))
        results = collect(box, 7)
    assert [results[ticket].failure for ticket in hung] == ["timeout"] * 6
    assert results[last].text == "still served"


def test_waiting_for_a_place_does_not_count_towards_the_deadline() -> None:
    def is_served() -> bool:
        """Whether a call ends in time that waits for the only place longer than its deadline."""
        gate = Gate()
        with ToolBox([gate.tool(), echo], timeout_s=30.0, concurrency=1) as box:
            short_deadline(box, 0.2, of=lambda call: call.name == "echo")
            box.submit(ToolCall(name="wait", arguments={"text": "in the only place"}))
            waiting = box.submit(ToolCall(name="echo", arguments={"text": "x"}))
            time.sleep(0.3)
            gate.opened.set()
            return collect(box, 2)[waiting].ok

    assert any(is_served() for _ in range(10))  # a busy machine may need more than 0.2 s for the call itself


def test_no_more_calls_run_at_once_than_there_are_places(gate: Gate) -> None:
    with ToolBox([gate.tool()], concurrency=3) as box:
        for i in range(9):
            box.submit(ToolCall(name="wait", arguments={"text": str(i)}))
        while gate.running < 3:
            time.sleep(0.001)
        gate.opened.set()
        collect(box, 9)
    assert (gate.executions, gate.most_running) == (9, 3)


def test_a_tool_with_a_limit_of_its_own_leaves_the_other_places_to_others(gate: Gate) -> None:
    with ToolBox([gate.tool(), echo], concurrency=3, per_tool={"wait": 2}) as box:
        waiting = [box.submit(ToolCall(name="wait", arguments={"text": str(i)})) for i in range(6)]
        other = box.submit(
            ToolCall(name="echo", arguments={"text": "served meanwhile"})
        )  # the third place, past the queue of `wait`
        assert collect(box, 1)[other].text == "served meanwhile"
        gate.opened.set()
        results = collect(box, 6)
    assert [results[ticket].text for ticket in waiting] == [str(i) for i in range(6)]
    assert gate.most_running == 2


@pytest.mark.parametrize(("per_tool", "most"), [(None, 2), ({"wait": 3}, 2), ({"wait": 1}, 1)])
def test_the_limit_that_a_tool_declares_holds_and_waiting_for_it_is_no_part_of_a_call(
    gate: Gate, per_tool: dict[str, int] | None, most: int
) -> None:
    tool = gate.tool()
    tool.concurrency = 2  # type: ignore[attr-defined]
    with ToolBox([tool], per_tool=per_tool, timeout_s=0.5) as box:
        tickets = [box.submit(ToolCall(name="wait", arguments={"text": str(i)})) for i in range(2 * most)]
        first = collect(box, most)  # which miss their deadline
        gate.opened.set()
        second = collect(box, most)
    results = [(first | second)[ticket].failure for ticket in tickets]
    assert results == [ToolFailure.TIMEOUT] * most + [None] * most


@pytest.mark.parametrize("limit", [0, 1.5, True, "2"])
def test_a_declared_limit_that_is_none_is_refused(limit: Any) -> None:
    def odd(text: str) -> str:
        """Odd.

        Args:
            text: Not used.
        """
        return text

    odd.concurrency = limit  # type: ignore[attr-defined]
    with pytest.raises(ToolSpecError, match=rf"attribute concurrency is {limit!r}; expected an integer of at least 1"):
        ToolBox([odd])


@pytest.mark.parametrize(
    ("per_tool", "message"),
    [
        ({"serach": 1}, "'serach', which is not a tool; the tools are: echo"),
        ({"echo": 0}, "The limit of tool 'echo' is 0; expected an integer of at least 1"),
        ({"echo": 1.5}, "The limit of tool 'echo' is 1.5"),
    ],
)
def test_a_limit_that_cannot_work_is_refused(per_tool: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ToolBox([echo], per_tool=per_tool)


def test_polling_waits_at_most_for_its_timeout(gate: Gate) -> None:
    with ToolBox([gate.tool()]) as box:
        box.submit(ToolCall(name="wait", arguments={"text": "x"}))
        assert box.poll() == []
        assert box.poll(timeout_s=0.01) == []


# Threads.


def wanting(tool: Callable[..., Any], **attributes: Any) -> Callable[..., Any]:
    """The tool with what it says of itself."""
    for name, value in attributes.items():
        setattr(tool, name, value)
    return tool


def price_tool() -> Callable[[str], str]:
    """A look-up on a connection that only the thread that made it may use."""
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE prices (metal, price)")
    db.execute("INSERT INTO prices VALUES ('tin', 31)")

    def price(metal: str) -> str:
        """Tell a price.

        Args:
            metal: Whose.
        """
        return str(db.execute("SELECT price FROM prices WHERE metal = ?", (metal,)).fetchone()[0])

    return price


def test_a_tool_with_run_in_main_runs_in_the_polling_thread() -> None:
    assert call_once(wanting(price_tool(), run_in="main"), {"metal": "tin"}).text == "31"


def test_a_tool_that_needs_one_thread_and_does_not_say_so_is_named_in_the_log_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ToolBox([price_tool()]) as box:
        for _ in range(2):
            box.submit(ToolCall(name="price", arguments={"metal": "tin"}))
            (result,) = collect(box, 1).values()
            assert result.text.startswith("Error: ProgrammingError: SQLite objects created in a thread")
    (record,) = caplog.records
    assert "ProgrammingError: SQLite objects" in record.message and "price.run_in = 'main'" in record.message


def test_a_failure_that_is_about_something_else_is_not_taken_for_a_matter_of_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for error in (ValueError("no such needle or thready thing"), ToolError("that forum has no such thread")):
        assert call_once(returning(error)).failure == "error"
    assert not caplog.records


def noting(order: list[str]) -> Callable[[str], str]:
    """A tool that appends its texts to `order`."""

    def note(text: str) -> str:
        """Note something.

        Args:
            text: What.
        """
        order.append(text)
        return text

    return note


def test_calls_in_the_main_thread_run_in_their_order_and_take_no_place(gate: Gate) -> None:
    order: list[str] = []
    note = noting(order)

    with ToolBox([gate.tool(), wanting(note, run_in="main")], concurrency=1) as box:
        waiting = box.submit(ToolCall(name="wait", arguments={"text": "in the only place"}))
        for text in "abc":
            box.submit(ToolCall(name="note", arguments={"text": text}))
        assert order == []  # nothing runs before somebody polls
        collect(box, 3)
        assert order == ["a", "b", "c"]
        gate.opened.set()
        assert collect(box, 1)[waiting].ok


def test_a_call_in_the_main_thread_outlasts_its_deadline_while_those_of_threads_fire(gate: Gate) -> None:
    def slow(text: str) -> str:
        """Be slow.

        Args:
            text: What to return.
        """
        time.sleep(0.1)
        return text

    with ToolBox([wanting(slow, run_in="main"), gate.tool()], timeout_s=0.02) as box:
        late = box.submit(ToolCall(name="slow", arguments={"text": "late"}))
        hung = box.submit(ToolCall(name="wait", arguments={"text": "hung"}))
        results = collect(box, 2)
    assert (results[late].text, results[late].failure, results[hung].failure) == ("late", None, "timeout")
    assert results[late].seconds >= 0.1


def test_slow_calls_in_the_main_thread_leave_the_poller_time_between_them() -> None:
    def slow(text: str) -> str:
        """Be slow.

        Args:
            text: What to return.
        """
        time.sleep(0.06)
        return text

    with ToolBox([wanting(slow, run_in="main")]) as box:
        tickets = [box.submit(ToolCall(name="slow", arguments={"text": str(i)})) for i in range(3)]
        # longer than a poll goes on starting calls, so each poll runs one
        assert [[ticket for ticket, _ in box.poll()] for _ in tickets] == [[ticket] for ticket in tickets]


def test_what_a_tool_raises_in_the_main_thread_is_text_but_ctrl_c_is_not() -> None:
    for error in (ValueError("no"), SystemExit(1)):
        assert call_once(wanting(returning(error), run_in="main")).text.startswith(f"Error: {type(error).__name__}: ")
    with pytest.raises(KeyboardInterrupt):
        call_once(wanting(returning(KeyboardInterrupt()), run_in="main"))


@pytest.mark.parametrize(
    ("attributes", "tool", "message"),
    [
        ({"run_in": "process"}, named("x"), r"run_in is 'process'; expected one of \('thread', 'main'\)"),
        ({"deterministic": "yes"}, named("x"), "deterministic is 'yes'; expected a bool"),
    ],
)
def test_an_invalid_attribute_is_refused(attributes: dict[str, Any], tool: Callable[..., Any], message: str) -> None:
    with pytest.raises(ToolSpecError, match=message):
        tool_spec(wanting(tool, **attributes))


def test_an_async_tool_cannot_run_in_the_main_thread() -> None:
    async def later(text: str) -> str:
        """Return the text.

        Args:
            text: What to return.
        """
        return text

    with pytest.raises(ToolSpecError, match=r"'later' is async .* Make it a sync function"):
        tool_spec(wanting(later, run_in="main"))


def test_a_tool_of_the_sampling_thread_that_needs_another_one_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ThreadPoolExecutor(1, "sampling") as pool:
        tool = wanting(price_tool(), run_in="main")
        result = pool.submit(call_once, tool, {"metal": "tin"}).result(60)
    assert result.text.startswith("Error: ProgrammingError: SQLite objects created in a thread")
    (record,) = caplog.records
    assert "'price' failed: ProgrammingError: SQLite objects" in record.message
    assert "it ran in the sampling thread, sampling_0. With rollouts_ahead this is not the main" in record.message


def test_an_interrupt_by_a_tool_in_another_sampling_thread_is_text() -> None:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call_once, wanting(returning(KeyboardInterrupt()), run_in="main")).result(60)
    assert result.text == "Error: KeyboardInterrupt"


class Shelf(PathState):
    """Its slow call takes until the gate opens."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.calls: list[str] = []

    def put(self, text: str) -> str:
        self.gate.opened.wait(60)
        self.calls.append(text)
        return " ".join(self.calls)

    async def put_later(self, text: str) -> str:
        while not self.gate.opened.is_set():
            await asyncio.sleep(0.001)
        return self.put(text)

    def look(self, text: str) -> str:
        self.calls.append(text)
        return " ".join(self.calls)

    def fork(self) -> Shelf:
        raise NotImplementedError


def shelf_tools(gate: Gate) -> list[Callable[..., Any]]:
    async def put_later(text: str) -> str:
        """Put something on the shelf, asynchronously.

        Args:
            text: What.
        """
        raise AssertionError

    def create(group: int) -> Shelf:
        return Shelf(gate)

    tools = [named("put"), put_later, wanting(named("look"), run_in="main")]
    return [wanting(tool, create_state=create) for tool in tools]


@pytest.mark.parametrize("slow", ["put", "put_later"])
def test_calls_of_a_state_run_in_their_order_also_if_some_run_in_the_main_thread(slow: str, gate: Gate) -> None:
    with ToolBox(shelf_tools(gate)) as box:
        states, others = box.create_states(0), box.create_states(0)

        def submit(name: str, text: str, states: PathStates) -> int:
            return box.submit(ToolCall(name=name, arguments={"text": text}), states)

        tickets = [submit(name, text, states) for name, text in (("look", "a"), (slow, "b"), ("look", "c"))]
        tickets += [submit(name, text, states) for name, text in (("look", "d"), (slow, "e"))]
        other = submit("look", "x", others)
        results = collect(box, 2)  # of the first call, and of the other path's, which overtakes
        assert set(results) == {tickets[0], other}
        gate.opened.set()
        results |= collect(box, 4)
        assert results[other].text == "x"
    assert [results[ticket].text for ticket in tickets] == ["a", "a b", "a b c", "a b c d", "a b c d e"]


def test_calls_in_the_main_thread_run_in_their_order_also_if_some_have_a_state(gate: Gate) -> None:
    order: list[str] = []
    note = noting(order)

    class Noted(Shelf):
        def look(self, text: str) -> str:
            return note(text)

    look = wanting(named("look"), run_in="main", create_state=lambda group: Noted(gate))
    with ToolBox([look, wanting(note, run_in="main")]) as box:
        states = box.create_states(0)
        for name, text in (("look", "a"), ("look", "b"), ("note", "c"), ("look", "d")):
            box.submit(ToolCall(name=name, arguments={"text": text}), states)
        collect(box, 4)
    assert order == ["a", "b", "c", "d"]


@pytest.mark.parametrize("kind", ["thread", "main", "async"])
def test_a_tool_that_changes_its_arguments_does_not_change_the_call(kind: str) -> None:
    def change(cards: list[int], best: dict[str, list[int]]) -> int:
        """Take the highest card.

        Args:
            cards: The cards.
            best: The best ones.
        """
        cards.sort()
        best["seen"].append(cards.pop())
        return best["seen"][-1]

    async def change_later(cards: list[int], best: dict[str, list[int]]) -> int:
        """Take the highest card.

        Args:
            cards: The cards.
            best: The best ones.
        """
        return change(cards, best)

    tool = change_later if kind == "async" else wanting(change, run_in=kind)
    call = ToolCall(name=tool.__name__, arguments={"cards": [3, 9, 1], "best": {"seen": []}})
    with ToolBox([tool]) as box:
        box.submit(call)
        (result,) = collect(box, 1).values()
    assert result.text == "9"
    assert call.arguments == {"cards": [3, 9, 1], "best": {"seen": []}}


# Sharing.


def counter(**attributes: Any) -> Callable[[str], str]:
    """A tool that counts its calls."""
    calls = itertools.count(1)

    def count(text: str) -> str:
        """Count.

        Args:
            text: Not used.
        """
        return str(next(calls))

    return wanting(count, **attributes)


@pytest.mark.parametrize("run_in", ["thread", "main"])
def test_identical_calls_of_a_tool_each_run_unless_it_is_deterministic_or_cached(run_in: str) -> None:
    texts = {}
    for how, deterministic, cache in (
        ("plain", False, False),
        ("deterministic", True, False),
        ("cached", False, True),
    ):
        with ToolBox([counter(run_in=run_in, deterministic=deterministic)], cache=cache, concurrency=1) as box:
            for _ in range(4):
                box.submit(ToolCall(name="count", arguments={"text": "same"}))
            texts[how] = sorted(result.text for result in collect(box, 4).values())
    assert texts["plain"] == ["1", "2", "3", "4"]
    # Of threads the first may be done before the last is asked, and then the answer is no longer under way.
    if run_in == "main":
        assert texts["deterministic"] == ["1"] * 4
    assert texts["cached"] == ["1"] * 4


def test_which_of_the_built_in_tools_are_deterministic() -> None:
    assert tool_spec(search_tool(LocalIndex(["Iron melts at 1,538 °C."]))).deterministic
    assert tool_spec(visit_tool()).deterministic
    assert not tool_spec(python_tool()).deterministic


def test_identical_calls_in_flight_of_a_deterministic_tool_share_one_execution(gate: Gate) -> None:
    with ToolBox([wanting(gate.tool(), deterministic=True)]) as box:
        first = box.submit(ToolCall(name="wait", arguments={"text": "same"}))
        second = box.submit(ToolCall(name="wait", arguments={"text": "same"}))
        other = box.submit(ToolCall(name="wait", arguments={"text": "other"}))
        gate.opened.set()
        results = collect(box, 3)
    assert gate.executions == 2
    assert [results[ticket].source for ticket in (first, second, other)] == ["executed", "joined", "executed"]
    assert results[first].seconds == results[second].seconds > 0


def test_a_result_that_the_caller_has_is_polled_like_the_others() -> None:
    known = ToolResult(text="known", failure=None, seconds=0.5, source=CallSource.SHARED)
    with ToolBox([echo]) as box:
        first, second = box.submit_answered(known), box.submit(ToolCall(name="echo", arguments={"text": "run"}))
        results = collect(box, 2)
    assert (results[first], results[second].text) == (known, "run")


def test_without_a_cache_a_later_identical_call_runs_again(gate: Gate) -> None:
    gate.opened.set()
    with ToolBox([gate.tool()]) as box:
        for _ in range(2):
            box.submit(ToolCall(name="wait", arguments={"text": "same"}))
            assert [result.source for result in collect(box, 1).values()] == ["executed"]
    assert gate.executions == 2


def test_a_cache_gives_successes_again_and_failures_not() -> None:
    with ToolBox([echo, named("fail")], cache=True) as box:
        box._offered.functions["fail"] = returning(ToolError("no"))
        for name, sources in (("echo", ["executed", "cached"]), ("fail", ["executed", "executed"])):
            seen: list[ToolResult] = []
            for _ in range(2):
                box.submit(ToolCall(name=name, arguments={"text": "same"}))
                seen += collect(box, 1).values()
            assert [result.source for result in seen] == sources
            assert seen[0].text == seen[1].text


def test_arguments_are_compared_by_value_whatever_their_order() -> None:
    with ToolBox([add], cache=True) as box:
        for arguments in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
            box.submit(ToolCall(name="add", arguments=arguments))
            (result,) = collect(box, 1).values()
            assert (result.text, result.source) == (
                str(sum(arguments.values())),
                "cached" if list(arguments) == ["b", "a"] else "executed",
            )


# The end.


# What the calls of a path act on.


class Notes(PathState):
    """Shows the texts of the calls before a call and its own."""

    def __init__(self, executed: list[str], *before: str) -> None:
        self.executed = executed
        self.before = before

    @property
    def key(self) -> tuple[str, ...]:
        return self.before

    def bind(self, tool: str) -> Callable[[str], str]:
        before = self.before  # as of this call, whenever it runs

        def note(text: str) -> str:
            self.executed.append(text)
            return " ".join([*before, text])

        return note

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:
        self.before += (f"{call.arguments['text']}{'!' if failure else ''}",)

    def fork(self) -> Notes:
        return Notes(self.executed, *self.before)


def notebook(executed: list[str]) -> Callable[[str], str]:
    def note(text: str) -> str:
        """Note something.

        Args:
            text: What.
        """
        return f"of no path: {text}"

    note.create_state = lambda group: Notes(executed)  # type: ignore[attr-defined]
    return note


def noted(box: ToolBox, *before: tuple[str, ToolFailure | None]) -> PathStates:
    """The states of a path of `box` that made those calls of `note`."""
    states = box.create_states(0)
    for text, failure in before:
        states.record(ToolCall(name="note", arguments={"text": text}), failure)
    return states


def test_a_call_of_a_stateful_tool_acts_on_the_state_of_its_path() -> None:
    assert tool_spec(notebook([])).create_state is not None
    assert tool_spec(echo).create_state is None
    with ToolBox([notebook([]), echo]) as box:
        states = noted(box, ("a", None), ("b", None))
        ticket = box.submit(ToolCall(name="note", arguments={"text": "c"}), states)
        states.record(ToolCall(name="note", arguments={"text": "c"}), None)
        later = box.submit(ToolCall(name="note", arguments={"text": "d"}), states)
        stateless = box.submit(ToolCall(name="echo", arguments={"text": "e"}), states)
        of_no_path = box.submit(ToolCall(name="note", arguments={"text": "f"}))
        results = collect(box, 4)
    assert [results[i].text for i in (ticket, later, stateless, of_no_path)] == [
        "a b c",
        "a b c d",
        "e",
        "of no path: f",
    ]


@pytest.mark.parametrize("cache", [False, True])
def test_identical_calls_join_until_the_first_is_polled_however_fast_the_tool_is(cache: bool) -> None:
    executed: list[str] = []

    def quick(text: str) -> str:
        """Answers at once.

        Args:
            text: What to answer.
        """
        executed.append(text)
        return text

    quick.deterministic = True  # type: ignore[attr-defined]
    with ToolBox([quick], cache=cache) as box:
        call = ToolCall(name="quick", arguments={"text": "a"})
        box.submit(call)
        while not executed or box._joinable[next(iter(box._joinable))].result is None:
            time.sleep(0.001)
        box.submit(call)
        assert [result.source for result in collect(box, 2).values()] == ["executed", "joined"]
        box.submit(call)
        assert [result.source for result in collect(box, 1).values()] == ["cached" if cache else "executed"]
    assert executed == ["a"] * (1 if cache else 2)


def test_calls_on_states_with_other_keys_are_other_calls_to_the_cache() -> None:
    texts: list[str] = []
    executed: list[str] = []
    with ToolBox([notebook(executed)], cache=True) as box:
        for before in ([("a", None)], [("b", None)], [], [("a", None)], [("a", ToolFailure.ERROR)]):
            ticket = box.submit(ToolCall(name="note", arguments={"text": "c"}), noted(box, *before))
            texts.append(collect(box, 1)[ticket].text)
    assert texts == ["a c", "b c", "c", "a c", "a! c"]
    assert len(executed) == 4  # the second "a c" came from the cache


def test_calls_on_a_state_without_a_key_share_nothing_and_run_one_after_the_other() -> None:
    class Log(PathState):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> str:
            if text == "a":
                time.sleep(0.05)  # begun first, and longest
            self.lines.append(text)
            return " ".join(self.lines)

        def fork(self) -> Log:
            raise NotImplementedError

    note = notebook([])
    note.create_state = lambda group: Log()  # type: ignore[attr-defined]
    note.deterministic = True  # type: ignore[attr-defined]
    with ToolBox([note], cache=True) as box:
        states = box.create_states(0)
        tickets = [box.submit(ToolCall(name="note", arguments={"text": text}), states) for text in ("a", "b", "b")]
        tickets.append(box.submit(ToolCall(name="note", arguments={"text": "b"}), box.create_states(0)))
        results = collect(box, 4)
        assert box.state_dict() == {}
    assert [results[ticket].text for ticket in tickets] == ["a", "a b", "a b b", "b"]
    assert {result.source for result in results.values()} == {"executed"}


def test_an_invalid_create_state_is_refused() -> None:
    note = notebook([])
    note.create_state = "Notes"  # type: ignore[attr-defined]
    with pytest.raises(ToolSpecError, match="tool 'note': the attribute create_state is 'Notes'; expected a function"):
        tool_spec(note)
    note.create_state = dict  # type: ignore[attr-defined]
    assert tool_spec(note).create_state is dict  # a type without a signature may accept it
    note.create_state = lambda: {}  # type: ignore[attr-defined]
    with pytest.raises(
        ToolSpecError, match=r"tool 'note': create_state .* cannot be called with one argument. It must"
    ):
        tool_spec(note)
    note.create_state = lambda group: {}  # type: ignore[attr-defined]
    with (
        ToolBox([note]) as box,
        pytest.raises(ToolSpecError, match="create_state of tool 'note' returned dict; expected a PathState"),
    ):
        box.submit(ToolCall(name="note", arguments={"text": "a"}), box.create_states(0))


def test_a_create_state_without_a_hash_is_refused() -> None:
    @dataclass
    class Create:
        size: int

        def __call__(self, group: int) -> None:
            raise AssertionError

    note = notebook([])
    note.create_state = Create(3)  # type: ignore[attr-defined]
    with pytest.raises(ToolSpecError, match="tool 'note': create_state is a Create without a hash"):
        tool_spec(note)


def test_a_call_stopped_by_the_tool_differs_from_a_failed_call() -> None:
    assert call_once(returning(ToolStopped("killed"))).failure == "stopped"
    assert call_once(returning(ToolError("wrong"))).failure == "error"


def test_a_closed_box_takes_no_calls() -> None:
    box = ToolBox([echo])
    box.close()
    box.close()
    with pytest.raises(RuntimeError, match="closed"):
        box.submit(ToolCall(name="echo", arguments={"text": "x"}))


@pytest.mark.slow
def test_hung_tools_do_not_keep_the_interpreter_from_exiting(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(
        "import asyncio, json, threading, time\n"
        "from arpo_trl.tools import ToolBox, ToolCall\n"
        "def hang(text: str) -> str:\n"
        '    """Hang.\n\n    Args:\n        text: Not used.\n    """\n'
        "    threading.Event().wait()\n"
        "async def block(text: str) -> str:\n"
        '    """Hang.\n\n    Args:\n        text: Not used.\n    """\n'
        "    threading.Event().wait()\n"
        "box = ToolBox([hang, block], timeout_s=0.05)\n"
        "for name in box.names: box.submit(ToolCall(name=name, arguments={'text': ''}))\n"
        "results = []\n"
        "while len(results) < 2: results += box.poll(1.0)\n"
        "box.submit(ToolCall(name='hang', arguments={'text': 'again'}))\n"
        "print(json.dumps([result.failure for _, result in results]))\n"
        "raise KeyboardInterrupt\n"
    )
    source = Path(arpo_trl.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(source)}
    )
    assert json.loads(ran.stdout) == ["timeout", "timeout"]
    assert "KeyboardInterrupt" in ran.stderr
