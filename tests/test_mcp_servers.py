"""Tools of a real MCP server, started as a process or reached by URL, are tools of the policy."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpcore2
import psutil
import pytest
from datasets import Dataset
from mcp.types import Tool

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError, ToolOverdue, ToolSpecError
from arpo_trl.net import background
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.mcp import MAX_ANSWER_BYTES, McpServer, McpSession, _as_function, _tools_per_path, mcp_tools
from arpo_trl.tools.spec import ToolSet
from arpo_trl.tools.toolbox import ToolBox, ToolResult
from loopback import Asked, Loopback, Reply
from serving import free_port
from support import ANSWER, ON_CPU, Scripted, has_ended, save_tiny_model, tokenizer, until

pytestmark = pytest.mark.slow  # starts processes

SERVER = str(Path(__file__).with_name("mcp_server.py"))
COMMAND = {"command": sys.executable, "args": [SERVER]}


def by_name(tools: list[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {tool.__name__: tool for tool in tools}


class HttpServer:
    """The same server at an address, which survives restarts."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/mcp"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SERVER, str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(self.is_up, within_s=120.0)

    def is_up(self) -> bool:
        assert self.process.poll() is None, "the server did not start"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def http() -> Iterator[HttpServer]:
    server = HttpServer()
    yield server
    server.kill()


def results(box: ToolBox, *calls: tuple[str, dict[str, Any]]) -> list[ToolResult]:
    tickets = [box.submit(ToolCall(name=name, arguments=arguments)) for name, arguments in calls]
    done: dict[int, ToolResult] = {}
    while len(done) < len(tickets):
        done.update(box.poll(10))
    return [done[ticket] for ticket in tickets]


@pytest.fixture(scope="module", params=["stdio", "http"])
def server(request: pytest.FixtureRequest, http: HttpServer) -> dict[str, Any]:
    return COMMAND if request.param == "stdio" else {"url": http.url}


@pytest.fixture(scope="module")
def box(server: dict[str, Any]) -> Iterator[ToolBox]:
    with ToolBox(mcp_tools([server], timeout_s=60.0), timeout_s=60.0) as box:
        yield box


def test_calls_reach_the_server_and_come_back_as_text(box: ToolBox) -> None:
    echoed, twice, failed, picture, refused, missing = results(
        box,
        ("echo", {"text": "hi"}),
        ("echo", {"text": "hi", "times": 2}),
        ("fail", {"text": "tea"}),
        ("picture", {"text": "see"}),
        ("echo", {"text": 5}),
        ("echo", {}),
    )
    assert (echoed.text, echoed.failure) == ("hi", None)
    assert twice.text == "hi hi"
    assert (failed.text, failed.failure) == ("Error executing tool fail: no tea today", ToolFailure.ERROR)
    assert picture.text == "see\n[image omitted: only text can be shown]"
    assert refused.failure is missing.failure is ToolFailure.BAD_CALL


def test_a_slow_call_misses_its_deadline_and_delays_no_other(server: dict[str, Any]) -> None:
    with ToolBox(mcp_tools([server], timeout_s=1.0)) as box:

        def quick_is_not_delayed() -> bool:
            slow, quick = results(box, ("slow", {"text": "x"}), ("echo", {"text": "y"}))
            assert (slow.text, slow.failure) == ("Error: the slow call took longer than 1 s.", ToolFailure.TIMEOUT)
            return quick.text == "y" and quick.seconds < 1

        assert any(quick_is_not_delayed() for _ in range(10))  # a busy machine may need a second for it
        until(lambda: results(box, ("echo", {"text": "again"}))[0].text == "again")


def test_a_tool_is_offered_with_the_servers_own_schema(box: ToolBox) -> None:
    spec = box.specs["echo"]
    assert spec.schema["function"]["description"].startswith("Say it again.")
    assert spec.schema["function"]["parameters"]["properties"]["times"]["type"] == "integer"
    assert spec.schema["function"]["parameters"]["required"] == ["text"]
    assert (spec.parameters, spec.single_text_parameter, spec.is_async) == (("text", "times"), "text", True)
    assert "get_secret" in box.names  # get-secret is no tag


def tools_with(schema: dict[str, Any]) -> ToolSet:
    """The tool `t` of a server, with a schema of its parameters."""
    tool = Tool(name="t", input_schema={"type": "object", **schema})
    return ToolSet([_as_function(McpSession.__new__(McpSession), tool)])


TEXT, NUMBER, NULL = {"type": "string"}, {"type": "number"}, {"type": "null"}
BY_ID = {"properties": {"id": TEXT, "kind": {"const": "id"}}, "required": ["id", "kind"]}
BY_NAME = {"properties": {"name": TEXT, "kind": {"const": "name"}}, "required": ["name", "kind"]}
KINDS = {"anyOf": [{"const": "id"}, {"const": "name"}]}


@pytest.mark.parametrize(
    ("schema", "properties", "required", "accepted", "refused"),
    [
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": BY_ID}}, BY_ID["properties"], ["id", "kind"], "id", "name"),
        ({"anyOf": [BY_ID, BY_NAME]}, {"id": TEXT, "kind": KINDS, "name": TEXT}, ["kind"], "name", "further"),
        (
            {
                "properties": {"kind": TEXT},
                "oneOf": [BY_ID, {"$ref": "#/definitions/b"}],
                "definitions": {"b": BY_NAME},
            },
            {"kind": TEXT, "id": TEXT, "name": TEXT},
            ["kind"],
            "name",
            "further",
        ),
        (
            {"required": ["id"], "allOf": [BY_ID, {"properties": {"n": NUMBER}}, True]},
            {**BY_ID["properties"], "n": NUMBER},
            ["id", "kind"],
            "id",
            "further",
        ),
        (
            {"properties": {"a": TEXT, "b": TEXT}, "anyOf": [{"required": ["b"]}, {"required": ["a", "b"]}]},
            {"a": TEXT, "b": TEXT},
            ["b"],
            "a",
            "further",
        ),
        ({"$ref": "#/%24defs/a", "$defs": {"a": {"properties": {"q": TEXT}}}}, {"q": TEXT}, [], "q", "further"),
        ({"$ref": "#/oneOf/0", "oneOf": [{"properties": {"q": TEXT}}]}, {"q": TEXT}, [], "q", "further"),
        ({"additionalProperties": True}, {}, [], "further", None),
        ({"properties": {"n": NUMBER}, "additionalProperties": {}}, {"n": NUMBER}, [], "further", None),
        ({"allOf": [{"additionalProperties": TEXT}]}, {}, [], "further", None),
        ({"additionalProperties": False}, {}, [], None, "further"),
        ({}, {}, [], None, "further"),
    ],
)
def test_arguments_are_those_of_all_parts_of_the_servers_schema(
    schema: dict[str, Any], properties: dict[str, Any], required: list[str], accepted: str | None, refused: str | None
) -> None:
    tools = tools_with(schema)
    offered = tools.specs["t"].schema["function"]["parameters"]
    assert (offered["properties"], offered["required"]) == (properties, required)
    parts = schema.keys() - {"properties", "required", "additionalProperties"}
    assert {name: offered[name] for name in parts} == {name: schema[name] for name in parts}
    needed: dict[str, Any] = dict.fromkeys(required, "a")
    if accepted is not None:
        assert tools.refusal(ToolCall(name="t", arguments={**needed, accepted: "a"})) is None
    if refused is not None:
        assert tools.refusal(ToolCall(name="t", arguments={**needed, refused: "a"})) is not None


COLOR = {"type": "string", "enum": ["red", "blue"], "title": "Color"}
TO_COLOR, TO_TREE = {"$ref": "#/$defs/color"}, {"$ref": "#/$defs/tree"}
TREE = {
    "type": "object",
    "properties": {"parts": {"type": "array", "items": TO_TREE}, "next": {"anyOf": [TO_TREE, NULL]}},
}


@pytest.mark.parametrize(
    ("written", "offered"),
    [
        (TO_COLOR | {"title": "Of it"}, COLOR | {"title": "Of it"}),
        ({"anyOf": [TO_COLOR, NULL], "default": None}, COLOR | {"default": None, "nullable": True}),
        ({"oneOf": [NULL, NUMBER]}, NUMBER | {"nullable": True}),
        ({"type": ["number", "null"]}, NUMBER | {"nullable": True}),
        ({"allOf": [TO_COLOR]}, COLOR),
        ({"anyOf": [TO_COLOR, NUMBER, NULL]}, {"anyOf": [COLOR, NUMBER, NULL]}),
        ({"type": "array", "items": TO_COLOR}, {"type": "array", "items": COLOR}),
        ({"properties": {"default": TO_COLOR, "$ref": TEXT}}, {"properties": {"default": COLOR, "$ref": TEXT}}),
        ({"default": TO_COLOR}, {"default": TO_COLOR}),  # a value
        (
            TO_TREE,
            TREE
            | {"properties": {"parts": {"type": "array", "items": TO_TREE}, "next": TO_TREE | {"nullable": True}}},
        ),
        ({"$ref": "#/$defs/absent"}, {"$ref": "#/$defs/absent"}),
        (TO_COLOR | {"enum": ["red"]}, TO_COLOR | {"enum": ["red"]}),  # both restrict it
        (True, {}),
    ],
)
def test_parameters_have_the_form_that_templates_and_parsers_know(written: Any, offered: dict[str, Any]) -> None:
    schema = {"properties": {"it": written}, "$defs": {"color": COLOR, "tree": TREE}}
    assert tools_with(schema).specs["t"].schema["function"]["parameters"]["properties"]["it"] == offered


def test_a_parameter_with_a_reference_is_checked_and_can_be_that_of_a_tag() -> None:
    tools = tools_with({"properties": {"it": TO_COLOR}, "required": ["it"], "$defs": {"color": COLOR}})
    assert tools.specs["t"].tag_parameter == "it"
    assert tools.refusal(ToolCall(name="t", arguments={"it": "red"})) is None
    assert "must be one of 'red', 'blue'" in str(tools.refusal(ToolCall(name="t", arguments={"it": "tea"})))
    assert "$defs" not in tools.specs["t"].schema["function"]["parameters"]  # nothing refers to it


def test_a_tool_that_tags_cannot_call_is_left_out_with_the_tools_of_its_server() -> None:
    spec = tools_with({"properties": {"a": TEXT, "b": TEXT}, "required": ["a", "b"]}).specs["t"]
    with pytest.raises(ToolSpecError, match=r"'t' has .* List only the others in its server's `tools`, or set tool_p"):
        _ = spec.tag_parameter


def test_references_that_double_at_each_level_stay_above_a_bound() -> None:
    defs = {
        f"d{n}": {"type": "object", "properties": {side: {"$ref": f"#/$defs/d{n + 1}"} for side in ("left", "right")}}
        for n in range(40)
    } | {"d40": TEXT}
    offered = tools_with({"properties": {"it": {"$ref": "#/$defs/d0"}}, "$defs": defs}).specs["t"].schema
    assert offered["function"]["parameters"]["properties"]["it"]["type"] == "object"
    assert len(json.dumps(offered)) < 20_000


@pytest.mark.parametrize("reference", ["#/$defs/absent", "#/oneOf/1", "https://example.org/a", "#/$defs/circle"])
def test_a_schema_whose_parameters_cannot_be_found_is_an_error_at_start_up(reference: str) -> None:
    schema = {"type": "object", "$ref": reference, "$defs": {"circle": {"$ref": "#/$defs/circle"}}}
    with pytest.raises(ToolSpecError, match=r"'t' of an MCP server has a schema whose .* Exclude the tool: list the"):
        _as_function(McpSession.__new__(McpSession), Tool(name="t", input_schema=schema))


def test_a_tool_can_be_called_by_its_tag() -> None:
    with ToolBox(mcp_tools([{**COMMAND, "tools": ["echo"]}])) as box:
        (call,) = TagProtocol(tokenizer(), box.specs).parse_turn("<echo>hello there</echo>")
        assert isinstance(call, ToolCall)
        assert results(box, (call.name, call.arguments))[0].text == "hello there"


def test_a_crashed_server_is_started_again_for_the_next_call() -> None:
    with ToolBox(mcp_tools([COMMAND])) as box:
        before = results(box, ("process", {"text": ""}))[0].text
        crashed = results(box, ("die", {"text": ""}))[0]
        assert crashed.failure is ToolFailure.DEGRADED
        assert crashed.text == "Error: the server of this tool stopped during the call."
        after = results(box, ("process", {"text": "again"}))[0]
        assert after.ok
        assert after.text != before


def test_running_calls_fail_with_the_server_and_the_next_calls_succeed() -> None:
    slow = [("slow", {"text": str(number)}) for number in range(5)]
    with ToolBox(mcp_tools([COMMAND])) as box:
        failures = [result.failure for result in results(box, *slow, ("die", {"text": ""}))]
        assert failures == [ToolFailure.DEGRADED] * 6
        after = results(box, *[("echo", {"text": f"after {i}"}) for i in range(5)])
        assert [result.text for result in after] == [f"after {i}" for i in range(5)]


def test_a_server_that_starts_slowly_comes_back_although_calls_give_up_waiting(tmp_path: Path) -> None:
    code = (
        f"import pathlib, runpy, time\nflag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        f"time.sleep(2 if flag.exists() else 0)\nflag.touch()\nrunpy.run_path({SERVER!r}, run_name='__main__')"
    )
    with ToolBox(mcp_tools([{"command": sys.executable, "args": ["-c", code]}], timeout_s=1.0)) as box:
        until(lambda: results(box, ("die", {"text": ""}))[0].failure is ToolFailure.DEGRADED)
        assert results(box, ("echo", {"text": "a"}))[0].text == "Error: the echo call took longer than 1 s."
        # each gives up after a second; the start goes on
        until(lambda: results(box, ("echo", {"text": "b"}))[0].text == "b", within_s=120.0)


def test_an_address_whose_server_comes_back_is_connected_to_again() -> None:
    server = HttpServer()
    with ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"
        server.kill()
        assert results(box, ("echo", {"text": "b"}))[0].failure is ToolFailure.DEGRADED
        server.start()
        assert [results(box, ("echo", {"text": text}))[0].text for text in ("c", "d")] == ["c", "d"]
        server.kill()


class OlderServer:
    """A server of the protocol's generation with sessions, which it forgets when it `restart`s."""

    def __init__(self) -> None:
        self.session: str | None = "first"

    def restart(self) -> None:
        self.session = "second"

    def __call__(self, asked: Asked) -> Reply:
        if asked.method != "POST":
            return Reply("", 405)
        question = asked.json
        started = asked.headers.get("mcp-session-id") == self.session
        result: dict[str, Any]
        match question["method"]:
            case "initialize":
                version, name = question["params"]["protocolVersion"], {"name": "older", "version": "1"}
                result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": name}
            case _ if not started:
                return Reply("", 404 if "mcp-session-id" in asked.headers else 400)
            case "tools/list":
                schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
                result = {"tools": [{"name": "echo", "description": "Say it again.", "inputSchema": schema}]}
            case "tools/call":
                result = {"content": [{"type": "text", "text": question["params"]["arguments"]["text"]}]}
            case _:
                return Reply("", 202)
        headers = {"Mcp-Session-Id": self.session} if self.session is not None else {}
        return Reply({"jsonrpc": "2.0", "id": question["id"], "result": result}, headers=AS_JSON | headers)


def starts(server: Loopback) -> int:
    """The number of sessions that were started."""
    return sum(b'"initialize"' in asked.body for asked in server.asked)


def drip(file: Any) -> None:
    """Write a stream until its reader has closed it."""
    with contextlib.suppress(OSError):
        while True:
            file.write(b": waits\n\n")
            time.sleep(0.01)  # so that little of it waits in the reader's memory


AS_JSON = {"Content-Type": "application/json"}


def no_session(code: int) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code, "message": "no such session"}, "id": None}


@pytest.mark.parametrize(
    "unknown",
    [
        Reply("", 404),
        Reply(no_session(-32001), 404, AS_JSON),
        Reply(no_session(-32000), 400, AS_JSON),
        Reply(no_session(-32600), 400, AS_JSON),
        Reply("Invalid session ID", 400, {"Content-Type": "text/plain"}),
        Reply({"error": "no session"}, 400, AS_JSON),
        Reply("<html>", 502, {"Content-Type": "text/html"}),
        Reply({"message": "no healthy upstream"}, 503, AS_JSON),
        Reply(b" " * (MAX_ANSWER_BYTES + 1), 503, AS_JSON),
        Reply("endless", 503, {"Content-Type": "text/event-stream"}, drip),
    ],
    ids=lambda reply: f"{reply.status}-{str(reply.body)[:10]}",
)
def test_a_server_without_the_session_and_a_gateway_without_the_server_are_lost(unknown: Reply) -> None:
    """The call counts as degraded, and the next one has a new session."""
    older = OlderServer()

    def answer(asked: Asked) -> Reply:
        reply = older(asked)
        return unknown if reply.status == 404 else reply

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"
        older.restart()
        assert results(box, ("echo", {"text": "b"}))[0].failure is ToolFailure.DEGRADED
        assert results(box, ("echo", {"text": "c"}))[0].text == "c"


@pytest.mark.parametrize(
    ("session", "status", "code"), [("first", 400, -32602), ("first", 200, -32600), (None, 400, -32600)]
)
def test_an_error_of_the_tool_leaves_the_session(session: str | None, status: int, code: int) -> None:
    older = OlderServer()
    older.session = session

    def answer(asked: Asked) -> Reply:
        if b"refuse" in asked.body:
            error = {"code": code, "message": "not this text"}
            return Reply({"jsonrpc": "2.0", "error": error, "id": asked.json["id"]}, status, AS_JSON)
        return older(asked)

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        (refused,) = results(box, ("echo", {"text": "refuse"}))
        assert (refused.text, refused.failure) == ("Error: not this text", ToolFailure.ERROR)
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"
        assert starts(server) == 1


def test_more_calls_than_the_library_has_connections_run_at_the_same_time() -> None:
    older, running, go = OlderServer(), threading.Semaphore(0), threading.Event()

    def answer(asked: Asked) -> Reply:
        if b"slow" in asked.body:
            running.release()
            go.wait(60)
        return older(asked)

    with Loopback(answer) as server:
        session = McpSession(McpServer(url=server.url), 60.0)
        session.open("here")
        calls = [background.start(session._call("echo", {"text": f"slow {n}"})) for n in range(101)]
        assert all(running.acquire(timeout=60) for _ in calls)
        go.set()
        assert [call.result(60) for call in calls] == [f"slow {n}" for n in range(101)]
        session.close()


def test_sessions_share_their_tls_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read them takes 0.1 s, in which no other tool has the network."""
    read: list[ssl.SSLContext] = []
    default = httpcore2.default_ssl_context
    monkeypatch.setattr(httpcore2, "default_ssl_context", lambda **how: read.append(default(**how)) or read[-1])
    with Loopback(OlderServer()) as server:
        for _ in range(3):
            session = McpSession(McpServer(url=server.url), 60.0)
            session.open("here")
            session.close()
    assert len(read) <= 1  # none if an earlier session has read them


def test_overdue_calls_do_not_keep_their_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server never answers them. A call that runs when the session is replaced is answered."""
    monkeypatch.setattr("arpo_trl.tools.mcp._MAX_OVERDUE", 2)
    older, ended, go = OlderServer(), threading.Semaphore(0), threading.Event()

    def hang(file: Any) -> None:
        drip(file)
        ended.release()

    def answer(asked: Asked) -> Reply:
        if b'"hang"' in asked.body:
            return Reply(None, 200, {"Content-Type": "text/event-stream"}, hang)
        if b'"slow"' in asked.body:
            go.wait(60)
        return older(asked)

    with Loopback(answer) as server:
        session = McpSession(McpServer(url=server.url), 60.0)
        session.open("here")
        slow = background.start(session._call("echo", {"text": "slow"}))
        until(lambda: any(b'"slow"' in asked.body for asked in server.asked))
        session._timeout_s = 2.0
        hanging = [background.start(session._call("echo", {"text": "hang"})) for _ in range(2)]
        assert [type(call.exception(60)) for call in hanging] == [ToolOverdue, ToolOverdue]
        go.set()
        assert background.start(session._call("echo", {"text": "new"})).result(60) == "new"
        assert slow.result(60) == "slow"
        assert starts(server) == 2
        assert all(ended.acquire(timeout=60) for _ in hanging)
        session.close()


@pytest.mark.parametrize("fault", ["reset", "gateway", "cut"])
def test_a_call_that_loses_its_connection_ends_no_other(fault: str) -> None:
    older, lost = OlderServer(), threading.Event()

    def cut(file: Any) -> None:
        file.write(b": waits\n\n")

    def answer(asked: Asked) -> Reply:
        if b"tools/call" not in asked.body:
            return older(asked)
        if b"slow" in asked.body:
            lost.wait(60)
            return older(asked)
        if fault == "gateway":
            return Reply("<html>", 502, {"Content-Type": "text/html"})
        if fault == "cut":
            return Reply(None, 200, {"Content-Type": "text/event-stream"}, cut)
        raise ConnectionAbortedError

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        server.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # prints the error
        slow = box.submit(ToolCall(name="echo", arguments={"text": "slow"}))
        until(lambda: any(b"slow" in asked.body for asked in server.asked))
        (failed,) = results(box, ("echo", {"text": "lost"}))
        assert failed.failure is ToolFailure.DEGRADED
        lost.set()
        assert dict(box.poll(60))[slow].text == "slow"


def test_a_pattern_of_a_server_that_takes_hours_is_not_searched_for() -> None:
    older = OlderServer()

    def answer(asked: Asked) -> Reply:
        reply = older(asked)
        if asked.method == "POST" and asked.json["method"] == "tools/list":
            (tool,) = reply.body["result"]["tools"]
            tool["outputSchema"] = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
        if asked.method == "POST" and asked.json["method"] == "tools/call":
            reply.body["result"]["structuredContent"] = {"a": "a" * 60 + "!"}
        return reply

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"


def test_an_endless_or_compressed_answer_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A call is told so; none of it gets into the log, and the next call is answered."""
    older = OlderServer()

    def answer(asked: Asked) -> Reply:
        reply = older(asked)
        if b"tools/call" in asked.body and b"endless" in asked.body:
            return replace(reply, body=b"\x1b[2J" + b" " * MAX_ANSWER_BYTES)
        if b"tools/call" in asked.body and b"bomb" in asked.body:
            headers = {**reply.headers, "Content-Encoding": "gzip"}
            return replace(reply, body=gzip.compress(b" " * 100_000_000), headers=headers)
        return reply

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        for text in ("endless", "bomb"):
            (result,) = results(box, ("echo", {"text": text}))
            assert not result.ok and "compressed or longer than 8,388,608 bytes" in result.text
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"
        assert {asked.headers.get("accept-encoding") for asked in server.asked} == {"identity"}
    assert not caplog.records


def test_an_event_of_a_stream_may_be_as_long_as_another_answer() -> None:
    """A picture has more than the library's default, 1 MiB."""
    older = OlderServer()

    def answer(asked: Asked) -> Reply:
        reply = older(asked)
        if b"tools/call" not in asked.body:
            return reply
        picture = {"type": "image", "data": "A" * (4 << 20), "mimeType": "image/png"}
        reply.body["result"]["content"].append(picture)
        event = f"event: message\ndata: {json.dumps(reply.body)}\n\n"
        return Reply(event, headers={"Content-Type": "text/event-stream"})

    with Loopback(answer) as server, ToolBox(mcp_tools([{"url": server.url}], timeout_s=60.0), timeout_s=60.0) as box:
        (seen,) = results(box, ("echo", {"text": "seen"}))
    assert seen.text == "seen\n[image omitted: only text can be shown]"


def test_an_answer_on_a_too_long_line_fails_and_the_server_is_restarted() -> None:
    """5,000,000 times "a ", in JSON, are more than 8 MiB."""
    with ToolBox(mcp_tools([COMMAND], timeout_s=60.0), timeout_s=60.0) as box:
        assert results(box, ("echo", {"text": "a"}))[0].text == "a"
        (result,) = results(box, ("echo", {"text": "a", "times": 5_000_000}))
        assert result.text == "Error: the server of this tool sent a line of more than 8,388,608 bytes."
        assert results(box, ("echo", {"text": "b"}))[0].text == "b"


ODD_SERVER = r"""
import json, os, sys, time
for line in sys.stdin:
    asked, text = json.loads(line), ""
    if asked.get("method") == "initialize":
        version = asked["params"]["protocolVersion"]
        result = {"protocolVersion": version, "capabilities": {}, "serverInfo": {"name": "odd", "version": "1"}}
    elif asked.get("method") == "tools/list":
        schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        result = {"tools": [{"name": "echo", "inputSchema": schema}]}
    elif asked.get("method") == "tools/call":
        text = asked["params"]["arguments"]["text"]
        if text == "hang":
            time.sleep(600)  # until the client ends this server
        if text == "process":
            text = str(os.getpid())
        result = None if text == "null" else {"content": [{"type": "text", "text": text}]}
    elif "id" not in asked:
        continue
    if asked["method"] not in ("initialize", "tools/list", "tools/call") or text.startswith("-"):
        error = {"code": int(text or -32601), "message": "no"}
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": error}), flush=True)
        continue
    sys.stdout.buffer.write(b"\xff\xfe no JSON\n")
    sys.stdout.buffer.flush()
    answer = json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}).replace("?", r"\ud83d")
    print(f"[{answer}]" if "list" in answer else answer, flush=True)
"""


ODD_COMMAND = {"command": sys.executable, "args": ["-c", ODD_SERVER]}


def test_an_answer_that_the_library_cannot_read_does_not_leave_its_call_waiting() -> None:
    """The server also writes bytes that are not UTF-8 before each answer."""
    with ToolBox(mcp_tools([ODD_COMMAND], timeout_s=60.0), timeout_s=60.0) as box:
        surrogate, pair, asked, null, listed, plain = results(
            box, *(("echo", {"text": text}) for text in ("a?b", "\U0001f600", "a\ud83db", "null", "list", "a"))
        )
    assert [each.text for each in (surrogate, pair, asked)] == ["a\ufffdb", "\U0001f600", "a\ufffdb"]
    assert [listed.text, plain.text] == ["list", "a"]
    assert null.text == "Error: the answer of this tool's server cannot be read"
    assert null.failure is ToolFailure.ERROR


def test_an_error_of_the_tool_with_a_code_of_the_library_leaves_the_process() -> None:
    with ToolBox(mcp_tools([ODD_COMMAND], timeout_s=60.0), timeout_s=60.0) as box:
        before, invalid, closed, after = results(
            box, *(("echo", {"text": text}) for text in ("process", "-32600", "-32000", "process"))
        )
    assert [(each.text, each.failure) for each in (invalid, closed)] == [("Error: no", ToolFailure.ERROR)] * 2
    assert before.ok and before.text == after.text


@pytest.mark.parametrize(("of_mcp_s", "of_the_box_s"), [(1.0, 60.0), (2.0, 1.0)])
def test_a_process_that_hangs_is_started_again(of_mcp_s: float, of_the_box_s: float) -> None:
    """Whichever deadline ends the call."""
    with ToolBox(mcp_tools([ODD_COMMAND], timeout_s=of_mcp_s), timeout_s=of_the_box_s) as box:
        before = results(box, ("echo", {"text": "process"}))[0].text
        assert results(box, ("echo", {"text": "hang"}))[0].failure is ToolFailure.TIMEOUT
        until(lambda: results(box, ("echo", {"text": "a"}))[0].text == "a")
        until(lambda: has_ended(int(before)))


def test_a_process_that_is_slow_in_one_call_stays() -> None:
    session = McpSession(McpServer.of(COMMAND, "here"), 5.0)
    session.open("here")

    def process() -> str:
        return background.start(session._call("process", {"text": ""})).result(60)

    before = process()
    assert type(background.start(session._call("slow", {"text": ""})).exception(60)) is ToolOverdue
    probe = session._probe
    assert probe is not None
    until(probe.done)
    assert process() == before
    session.close()


def test_closing_waits_for_the_end_of_a_process_that_hangs() -> None:
    session = McpSession(McpServer.of(ODD_COMMAND, "here"), 1.0)
    session.open("here")
    process = int(background.start(session._call("echo", {"text": "process"})).result(60))
    background.start(session._call("echo", {"text": "hang"})).exception(60)
    until(lambda: session._ready is None)  # it is being stopped
    session.close()
    assert has_ended(process)


def test_a_server_that_begins_with_a_line_without_end_is_named_before_its_memory_matters() -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match="it sent a line of more than 8,388,608 bytes"):
        mcp_tools([{"command": sys.executable, "args": ["-c", "while True: print('x' * 65536, end='')"]}])
    assert psutil.Process().memory_info().rss - before < 200 << 20


def test_a_silent_server_times_out_and_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("arpo_trl.tools.mcp.START_TIMEOUT_S", 2.0)
    code = f"echo $$ > {shlex.quote(str(tmp_path / 'pid'))}; exec sleep 600"
    with pytest.raises(ConfigError, match="no answer in time"):
        mcp_tools([{"command": "sh", "args": ["-c", code]}])
    until(lambda: has_ended(int((tmp_path / "pid").read_text())))


def test_only_named_variables_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "yes")
    monkeypatch.setenv("KEPT", "secret")
    with ToolBox(mcp_tools([{**COMMAND, "env": ["GIVEN"]}])) as box:
        given, kept = results(box, ("get_secret", {"name": "GIVEN"}), ("get_secret", {"name": "KEPT"}))
    assert (given.text, kept.text) == ("yes", "not set")


def test_only_named_tools_are_offered_and_two_servers_cannot_share_a_name() -> None:
    assert list(by_name(mcp_tools([{**COMMAND, "tools": ["fail", "echo"]}]))) == ["fail", "echo"]
    with pytest.raises(ToolSpecError, match="Two tools are named 'echo'"):
        ToolBox(mcp_tools([{**COMMAND, "tools": ["echo"]}, {**COMMAND, "tools": ["echo"]}]))


def test_the_servers_log_is_not_in_ours(capfd: pytest.CaptureFixture[str]) -> None:
    mcp_tools([COMMAND])
    assert capfd.readouterr() == ("", "")


def test_the_servers_log_does_not_grow_between_calls() -> None:
    flood = "import sys, threading, time\ndef flood():\n while True: time.sleep(0.02); sys.stderr.write('x' * 65536)\n"
    code = f"{flood}threading.Thread(target=flood, daemon=True).start()\n{ODD_SERVER}"
    session = McpSession(McpServer(command=sys.executable, args=["-c", code]), 60.0)
    session.open("here")

    def size() -> int:
        return os.fstat(session._stderr.fileno()).st_size

    until(lambda: size() > 1 << 20)
    until(lambda: size() < 1 << 20)
    session.close()


def test_a_closed_session_leaves_no_process() -> None:
    session = McpSession(McpServer.of(COMMAND, "here"), 60.0)
    assert "process" in [tool.name for tool in session.open("here")]
    server = psutil.Process(int(background.start(session._call("process", {"text": ""})).result(60)))
    session.close()
    session.close()
    assert not server.is_running()


def test_a_server_stops_when_none_of_its_tools_is_left() -> None:
    tools = by_name(mcp_tools([{**COMMAND, "tools": ["echo", "process"]}]))
    server = int(asyncio.run(tools["process"](text="")))
    del tools["process"]
    gc.collect()
    assert asyncio.run(tools["echo"](text="a")) == "a"
    del tools["echo"]
    gc.collect()
    until(lambda: has_ended(server))


def test_servers_stop_with_their_process() -> None:
    code = (
        "import asyncio\n"
        "from arpo_trl.tools.mcp import MAX_ANSWER_BYTES, mcp_tools\n"
        f"tools = mcp_tools([{COMMAND!r}])\n"
        "print(asyncio.run([t for t in tools if t.__name__ == 'process'][0](text='')), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: has_ended(int(done.stdout)))


def test_servers_stop_with_a_killed_process() -> None:
    code = (
        "import asyncio, time\n"
        "from arpo_trl.tools.mcp import MAX_ANSWER_BYTES, mcp_tools\n"
        f"tools = mcp_tools([{COMMAND!r}])\n"
        "print(asyncio.run([t for t in tools if t.__name__ == 'process'][0](text='')), flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    until(lambda: has_ended(server))  # the end of its input tells the server


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"command": "no-such-command"}, r"mcp_servers\[0\]: command 'no-such-command' does not work .*PATH"),
        ({"command": "true"}, "does not work as an MCP server: Connection closed"),
        ({"command": sys.executable, "args": ["-c", "raise SystemExit('bad')"]}, "it said: bad"),
        (
            {"url": "http://127.0.0.1:9/mcp"},
            "All connection attempts failed. Check that the server runs, .* streamable HTTP; the older SSE is not",
        ),
        ({**COMMAND, "tools": ["sing"]}, r"has no tools \['sing'\]; it has \['die', 'echo'"),
        ({"command": "x", "url": "y"}, "either command or url"),
        ({}, "either command or url"),
        ({"cmd": "x"}, "a setting 'cmd'; expected some of"),
        ({"command": ["x"]}, "command must be a string"),
        ({"command": "x", "args": "y"}, "args must be a list of strings"),
        ({"command": "x", "env": {"A": "b"}}, "env must be a list of strings"),
        ({"command": "x", "env": ["NOT_SET_ANYWHERE"]}, "environment variable NOT_SET_ANYWHERE, which is not set"),
        ({"url": "http://x/mcp", "token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE"),
        ("uvx server", "is str; expected settings"),
    ],
)
def test_a_server_that_cannot_work_is_an_error_at_start_up(server: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tools(ToolArguments([], mcp_servers=[server]))


def test_after_a_mistake_the_servers_before_it_stop() -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ConfigError, match=r"mcp_servers\[1\]: command 'no-such-command'"):
        mcp_tools([COMMAND, {"command": "no-such-command"}])
    assert set(psutil.Process().children(recursive=True)) <= before


def test_an_older_library_is_not_blamed_on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", ModuleType("mcp"))
    with pytest.raises(ConfigError, match=r"needs the mcp library, version 2\.3 or newer \(cannot import name"):
        mcp_tools([{"command": "true"}])


def test_a_secret_that_the_server_repeats_stays_out_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "sk-PLANTED")
    code = "import os; raise SystemExit('bad token ' + os.environ['TOKEN'])"
    with pytest.raises(ConfigError, match=r"bad token \[TOKEN\]") as error:
        mcp_tools([{"command": sys.executable, "args": ["-c", code], "env": ["TOKEN"]}])
    assert "sk-PLANTED" not in str(error.value) + repr(error.value)


def test_a_variable_that_the_server_repeats_stays_out_of_what_the_model_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name does not show that it is a secret."""
    monkeypatch.setenv("SHOWN_PAT", 'ghp_"12345678')
    with ToolBox(mcp_tools([{**COMMAND, "env": ["SHOWN_PAT"], "tools": ["show"]}])) as box:
        shown, refused = results(box, ("show", {"text": "a"}), ("show", {"text": "refuse"}))
        description = box.specs["show"].schema["function"]["description"]
    assert shown.text == 'as it is: [SHOWN_PAT], as JSON: "[SHOWN_PAT]"'
    assert "[SHOWN_PAT] is expired" in refused.text
    assert description == "Show the token [SHOWN_PAT]."


@pytest.mark.parametrize("value", ["Europe/Paris", "12345678", "short-1", sys.executable])
def test_a_value_that_ordinary_text_may_contain_stays(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOWN", value)
    assert McpServer(command="x", env=["SHOWN"]).without_secrets(f"It is {value}.") == f"It is {value}."


def test_the_token_of_an_address_stays_out_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOWN", "ghp_1/2345678")
    server = McpServer(url="http://127.0.0.1:1/mcp", token_env="SHOWN")
    assert server.without_secrets("ghp_1/2345678 ghp_1%2F2345678") == "[SHOWN] [SHOWN]"


def test_the_token_is_sent_to_the_address(http: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "sk-PLANTED")
    with Loopback(lambda asked: Reply("", 401)) as server, pytest.raises(ConfigError) as error:
        mcp_tools([{"url": f"{server.url}/mcp?key=hidden", "token_env": "TOKEN"}])
    assert server.asked[0].headers["authorization"] == "Bearer sk-PLANTED"
    assert "sk-PLANTED" not in str(error.value)
    assert "hidden" not in str(error.value)


# A session per path --------------------------------------------------------------------------------------------------


def test_with_per_path_each_path_has_a_session_and_a_branch_repeats_its_prefix() -> None:
    def writes(request: Any, context: str) -> ScriptedTurn:
        name = "/".join(map(str, request.key[1:]))
        text = f"<note>{name}</note>" if request.key[-1] < 2 else ANSWER
        return ScriptedTurn(text=text, entropies=[float(request.key[-1] == 1)])

    children = set(psutil.Process().children(recursive=True))
    tools = mcp_tools([COMMAND | {"per_path": True, "tools": ["note"]}])
    batch = Scripted(writes, tools=tools, leaves=3, at_root=2, timeout_s=60.0)()
    assert {leaf.address: leaf.calls[-1].text for leaf in batch.trees[0].leaves()} == {
        (0,): "0/0 0/1",
        (0, 1, 0): "0/0 0/1/0/1",
        (1,): "1/0 1/1",
    }
    for child in set(psutil.Process().children(recursive=True)) - children:
        child.wait(60)  # each server ends with its path


def test_per_path_does_not_offer_reserved_names_of_environments() -> None:
    with pytest.raises(ConfigError, match=r"mcp_servers\[0\] .* a tool 'reset', a name that per_path cannot"):
        mcp_tools([COMMAND | {"per_path": True}])
    with pytest.raises(ConfigError, match=r"mcp_servers\[0\]: per_path must be true or false, got 1"):
        mcp_tools([COMMAND | {"per_path": 1}])


def test_per_path_does_not_offer_reserved_tags() -> None:
    server = McpServer.of(COMMAND | {"per_path": True}, "mcp_servers[0]")
    tool = Tool(name="answer", description="Answer.", input_schema={"type": "object"})
    with pytest.raises(ConfigError, match=r"has a tool 'answer', a name that per_path cannot offer\. Exclude it"):
        _tools_per_path(server, 5.0, "mcp_servers[0]", [tool])


def test_per_path_refuses_a_parameter_named_self() -> None:
    server = McpServer.of(COMMAND | {"per_path": True}, "mcp_servers[0]")
    tool = Tool(name="t", input_schema={"type": "object", "properties": {"self": {"type": "string"}}})
    with pytest.raises(ToolSpecError, match=r"tool 't' .* a parameter 'self', a name that per_path cannot .*Exclude"):
        _tools_per_path(server, 5.0, "mcp_servers[0]", [tool])


def test_per_path_refuses_two_tools_whose_names_for_the_model_are_equal() -> None:
    server = McpServer.of(COMMAND | {"per_path": True}, "mcp_servers[0]")
    tools = [Tool(name=name, description=name, input_schema={"type": "object"}) for name in ("get-page", "get_page")]
    with pytest.raises(ConfigError, match=r"the tools 'get-page' and 'get_page', .* equal: 'get_page'\. List the"):
        _tools_per_path(server, 5.0, "mcp_servers[0]", tools)


def writes_notes(request: Any, context: str) -> ScriptedTurn:
    """Each path writes two notes, and answers; entropy rises after the first one."""
    depth = request.key[-1]
    text = f"<note>{'/'.join(map(str, request.key[1:]))}</note>" if depth < 2 else ANSWER
    return ScriptedTurn(text=text, entropies=[float(depth == 1)])


def interrupts(request: Any, context: str) -> ScriptedTurn:
    if request.key[-1] == 1:
        raise KeyboardInterrupt
    return writes_notes(request, context)


@pytest.mark.parametrize("script", [writes_notes, interrupts])
def test_a_trainer_limits_counts_and_closes_the_sessions_of_paths(script: Any, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    args = ARPOConfig(
        str(tmp_path / "run"),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=200,
        max_steps=1,
        environment_concurrency=2,
        **ON_CPU,
    )
    trainer = ARPOTrainer(
        save_tiny_model(tmp_path / "model"),
        lambda completions: [1.0] * len(completions),
        args,
        Dataset.from_dict({"prompt": ["what is the answer"] * 4}),
        tools=mcp_tools([COMMAND | {"per_path": True, "tools": ["note"]}], timeout_s=60.0),
        engine=ScriptedEngine(
            tokenizer(),
            SamplingParams(eos_ids=(tokenizer().eos_token_id,), stop_strings=("</note>",)),
            script,
        ),
    )
    if script is interrupts:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
        log = trainer.state.log_history[0]
        # N = 2 of M = 4, and each path branches once, on a session that repeats its note.
        assert log["arpo/environments/resets"] == 4 and log["arpo/environments/replays"] == 2
        assert log["arpo/environments/live_max"] == 2 and log["arpo/environments/refused_forks"] == 0
    until(lambda: set(psutil.Process().children(recursive=True)) <= before)
