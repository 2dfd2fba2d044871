"""The remote executor returns results like the local one, and turns every server response into text."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from arpo_trl.errors import ConfigError, ToolError, ToolStopped, ToolUnavailable
from arpo_trl.tools.builtin import ToolArguments, _print_once, build_tools
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.python.remote import RemotePython, remote_python_tool
from arpo_trl.tools.python.sandbox import Limits
from arpo_trl.tools.spec import tool_spec
from arpo_trl.tools.toolbox import ToolBox

LIMITS = Limits(timeout_s=10.0, output_bytes=1000)


def execute(request: dict[str, Any]) -> dict[str, Any]:
    """What SandboxFusion's server answers, the code run in a plain process."""
    command = [sys.executable, "-c", request["code"]]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=request["run_timeout"], check=False)
    except subprocess.TimeoutExpired as late:
        stdout = (late.stdout or b"").decode()
        result = {
            "status": "TimeLimitExceeded",
            "execution_time": 1.0,
            "return_code": None,
            "stdout": stdout,
            "stderr": "",
        }
        return {"status": "Failed", "message": "", "run_result": result}
    result = {
        "status": "Finished",
        "execution_time": 0.1,
        "return_code": ran.returncode,
        "stdout": ran.stdout,
        "stderr": ran.stderr,
    }
    status = "Failed" if ran.returncode else "Success"
    return {"status": status, "message": "", "compile_result": None, "run_result": result, "files": {}}


class Executor:
    """An HTTP server on loopback; `answer` writes the reply to each request, `requests` has what was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None] = self.run

    def run(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        self.reply(handler, json.dumps(execute(request)).encode())

    def reply(self, handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    @contextmanager
    def serving(self) -> Iterator[str]:
        executor = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert (self.path, request["language"]) == ("/run_code", "python")
                executor.requests.append(request)
                try:
                    executor.answer(self, request)
                except OSError:  # the client has hung up, as it should have
                    self.close_connection = True

            def log_message(self, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture(scope="module")
def executor() -> Iterator[tuple[Executor, RemotePython]]:
    executor = Executor()
    with executor.serving() as url:
        yield executor, RemotePython(url, LIMITS)


@pytest.fixture
def remote(executor: tuple[Executor, RemotePython]) -> RemotePython:
    executor[0].answer = executor[0].run
    executor[0].requests.clear()
    return executor[1]


def run(remote: RemotePython, code: str, *earlier: str) -> str:
    return asyncio.run(remote(code, earlier))


# What a call shows, as in the sandbox here.


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("x = 20\nx + 1", "21"),
        ("print('a')\n'b'", "a\n'b'"),
        ("", ""),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr"),
        ("print('é 数'), '\\ud800'", "é 数\n(None, '\\ud800')"),
        ("'\"\"\"' + \"'''\" # \\", "'\"\"\"\\'\\'\\''"),
        ("__name__", "'__main__'"),
    ],
)
def test_a_call_returns_the_local_tools_text(remote: RemotePython, code: str, shown: str) -> None:
    assert run(remote, code) == shown


def test_an_exception_shows_the_users_frames_only(remote: RemotePython) -> None:
    with pytest.raises(ToolError) as caught:
        run(remote, "print('before')\n1 / 0")
    assert str(caught.value).splitlines() == [
        "before",
        "Traceback (most recent call last):",
        '  File "<python>", line 2, in <module>',
        "    1 / 0",
        "    ~~^~~",
        "ZeroDivisionError: division by zero",
    ]
    assert not isinstance(caught.value, ToolStopped)


def test_earlier_cells_run_before_and_show_nothing(remote: RemotePython) -> None:
    assert run(remote, "x + 1", "print('earlier')\nx = 41", "1 / 0") == "42"


def test_the_limits_are_sent(executor: tuple[Executor, RemotePython], remote: RemotePython) -> None:
    run(remote, "1")
    (request,) = executor[0].requests
    assert (request["run_timeout"], request["compile_timeout"], request["memory_limit_MB"]) == (10.0, 10.0, 512)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import os\nos.abort()", "Error: the python process was killed or crashed"),
        ("print('x' * 2000)", "x" * 1000 + "\nError: stopped, the code printed more than 1000 bytes"),
    ],
)
def test_the_reason_for_a_stopped_call_is_reported(remote: RemotePython, code: str, text: str) -> None:
    with pytest.raises(ToolStopped) as caught:
        run(remote, code)
    assert str(caught.value).startswith(text)


def test_a_call_that_the_server_stops_at_its_deadline_keeps_its_output(
    executor: tuple[Executor, RemotePython], remote: RemotePython
) -> None:
    def at_once(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        executor[0].run(handler, request | {"run_timeout": 0.7})

    executor[0].answer = at_once
    with pytest.raises(ToolStopped, match=r"^(before\n)?Error: the code ran longer than 10 s$"):
        run(remote, "print('before', flush=True)\nwhile True: pass")


# What a server may answer.

FINISHED = {"status": "Finished", "return_code": 0, "stdout": "fine", "stderr": ""}
NOT_UNDERSTOOD = "Error: the python executor's reply cannot be understood"


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"status": "SandboxError", "message": "no such pod: secret-host"}, "Error: the python executor failed"),
        ({"status": "Success"}, NOT_UNDERSTOOD),
        ({"status": "Success", "run_result": None}, NOT_UNDERSTOOD),
        ({"status": "Success", "run_result": [FINISHED]}, NOT_UNDERSTOOD),
        ({"status": "Weather", "run_result": FINISHED}, NOT_UNDERSTOOD),
        ({"status": ["Success"], "run_result": FINISHED}, NOT_UNDERSTOOD),
        ({"status": "Success", "run_result": FINISHED | {"stdout": 7}}, NOT_UNDERSTOOD),
        ({"status": "Success", "run_result": FINISHED | {"return_code": "0"}}, NOT_UNDERSTOOD),
        ({"status": "Success", "run_result": FINISHED | {"status": "Error"}}, NOT_UNDERSTOOD),
        ([], NOT_UNDERSTOOD),
        (None, NOT_UNDERSTOOD),
        (b"{", NOT_UNDERSTOOD),
        (b"", NOT_UNDERSTOOD),
        (b"\xff\xfe\x00", NOT_UNDERSTOOD),
        (b"[" * 100_000, "Error: stopped, the code printed more than 1000 bytes"),
        (b"[" * 60_000, NOT_UNDERSTOOD),
        (b'{"status": "Success", "x": ' + b"1" * 10_000 + b"}", NOT_UNDERSTOOD),
    ],
)
def test_an_invalid_reply_is_an_error_for_the_model(
    executor: tuple[Executor, RemotePython], remote: RemotePython, reply: Any, text: str
) -> None:
    body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
    executor[0].answer = lambda handler, _: executor[0].reply(handler, body)
    with pytest.raises(ToolStopped if "printed" in text else ToolUnavailable) as caught:
        run(remote, "1")
    assert str(caught.value) == text
    assert len(executor[0].requests) == 1  # asking again would get no better reply


def test_a_reply_without_end_is_cut_off_while_it_is_read(
    executor: tuple[Executor, RemotePython], remote: RemotePython
) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler, _: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        while True:
            sent += handler.wfile.write(b"x" * 65536)

    executor[0].answer = endless
    with pytest.raises(ToolStopped, match="printed more than 1000 bytes"):
        run(remote, "1")
    assert sent < 50_000_000


def test_a_compressed_bomb_is_not_unpacked(executor: tuple[Executor, RemotePython], remote: RemotePython) -> None:
    import gzip

    bomb = gzip.compress(bytes(10_000_000))
    executor[0].answer = lambda handler, _: executor[0].reply(handler, bomb, Content_Encoding="gzip")
    with pytest.raises(ToolError, match="cannot be understood"):
        run(remote, "1")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["headers", "body", "nowhere"])
def test_a_server_that_is_slow_or_drips_meets_the_deadline(
    executor: tuple[Executor, RemotePython], remote: RemotePython, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.tools.python.remote._GRACE_S", -9.0)  # a deadline of a second: timeout_s is 10
    stopped = threading.Event()

    def drip(handler: BaseHTTPRequestHandler, _: Any) -> None:
        if where == "body":
            handler.send_response(200)
            handler.end_headers()
        while not stopped.wait(0.05):
            if where != "nowhere":
                handler.wfile.write(b"H" if where == "headers" else b" ")

    executor[0].answer = drip
    began = time.monotonic()
    with pytest.raises(ToolStopped, match="did not answer in time"):
        run(remote, "1")
    stopped.set()
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_request_to_a_failing_server_is_retried(
    executor: tuple[Executor, RemotePython], remote: RemotePython, status: int
) -> None:
    def recovers(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        if len(executor[0].requests) < 3:
            executor[0].reply(handler, b"oops", status)
        else:
            executor[0].run(handler, request)

    executor[0].answer = recovers
    assert run(remote, "6 * 7") == "42"
    assert len(executor[0].requests) == 3


@pytest.mark.slow
def test_a_permanently_failing_server_is_an_error_after_three_attempts(
    executor: tuple[Executor, RemotePython], remote: RemotePython
) -> None:
    executor[0].answer = lambda handler, _: executor[0].reply(handler, b"oops", 500)
    with pytest.raises(ToolUnavailable, match=r"^Error: the python executor cannot be reached \(HTTP status 500\)$"):
        run(remote, "1")
    assert len(executor[0].requests) == 3


def test_a_lost_connection_is_tried_again(executor: tuple[Executor, RemotePython], remote: RemotePython) -> None:
    def hangs_up(handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        if len(executor[0].requests) == 1:
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            executor[0].run(handler, request)

    executor[0].answer = hangs_up
    assert run(remote, "6 * 7") == "42"


@pytest.mark.parametrize("status", [301, 400, 404, 422])
def test_a_refusal_is_not_repeated_and_no_redirect_is_followed(
    executor: tuple[Executor, RemotePython], remote: RemotePython, status: int
) -> None:
    executor[0].answer = lambda handler, _: executor[0].reply(handler, b"", status, Location="http://127.0.0.1:1/")
    with pytest.raises(ToolUnavailable, match=f"rejected the call .HTTP status {status}"):
        run(remote, "1")
    assert len(executor[0].requests) == 1


# As a tool.


def test_a_box_runs_it_and_a_path_keeps_its_variables() -> None:
    executor = Executor()
    with executor.serving() as url:
        python = remote_python_tool(url, stateful=True)
        assert tool_spec(python).is_async
        with ToolBox([python]) as box:
            states = box.create_states(0)
            states.record(ToolCall(name="python", arguments={"code": "x = 40"}), None)
            states.record(ToolCall(name="python", arguments={"code": "while True: pass"}), ToolFailure.STOPPED)
            ticket = box.submit(ToolCall(name="python", arguments={"code": "x + 2"}), states)
            ((got, result),) = box.poll(timeout_s=30)
    assert (got, result.text, result.failure) == (ticket, "42", None)


def test_the_configuration_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    _print_once.cache_clear()  # as in a new process
    executor = Executor()
    with executor.serving() as url:
        (python,) = build_tools(ToolArguments(tools=["python"], python_executor_url=url + "/"))
        assert asyncio.run(python("1 + 1")) == "2"
    assert "remote executor 127.0.0.1, which must isolate it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sandbox:8080", "does not begin with http"),
        ("ftp://host", "does not begin with http"),
        ("http://", "does not begin with http"),
        ("http://host:port", "python_executor_url must be an address .* not a valid URL"),
        ("http://user:hush@host", "has a user name or password"),
    ],
)
def test_an_address_that_cannot_be_one_is_an_error_at_start(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RemotePython(url, LIMITS)
    assert "hush" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_does_not_run_python_is_an_error_at_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    with pytest.raises(ConfigError, match=r"does not run Python: .* cannot be reached \(ConnectError\)"):
        RemotePython(f"http://127.0.0.1:{port}", LIMITS)
    executor = Executor()
    wrong = {"status": "Success", "run_result": FINISHED}
    executor.answer = lambda handler, _: executor.reply(handler, json.dumps(wrong).encode())
    with executor.serving() as url, pytest.raises(ConfigError, match=r"for 6 \* 7 it returned 'fine'"):
        RemotePython(url, LIMITS)
