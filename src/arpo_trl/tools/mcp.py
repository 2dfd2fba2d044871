"""Makes the tools of MCP servers available to the policy, through the official client library.

    server (a process, or an address) ── one session ── its tools as async functions ─▶ ToolBox

Sessions run on the background event loop of the tools. If a server stops, its running calls fail with an error text,
and the next call reconnects. A server that this process started stops when its tools are released, or at the exit.

With `per_path` each path has its own session, as an environment. A branch repeats the calls of its prefix in its own
session.
"""

from __future__ import annotations

import asyncio
import atexit
import codecs
import contextlib
import functools
import inspect
import json
import logging
import os
import re
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import IO, Any

from arpo_trl.errors import ConfigError, ToolError, ToolOverdue, ToolUnavailable
from arpo_trl.net import background
from arpo_trl.net.addresses import check_server_url, server_key
from arpo_trl.tools.environments.kind import NOT_TOOLS, environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.mcp_schemas import with_schema
from arpo_trl.tools.spec import RESERVED_TAGS
from arpo_trl.visible import with_marks, with_texts, without_credentials

START_TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 8 << 20
_STOP_TIMEOUT_S = 10.0  # the library ends a process that ignores the end of its input after 2 s, and kills it after 4
_MAX_TOOLS_PAGES = 100
_MAX_OVERDUE = 32
"""After this many calls without an answer in time a server at an address gets a new session: until the end of the old
one, the library keeps a connection open for each of them."""
_SHOWN_STDERR_CHARS = 500
_MAX_ERROR_CHARS = 10_000
_MAX_STDERR_BYTES = 1 << 20
_STDERR_PERIOD_S = 1.0

_LOST = (400, 404, 502, 503, 504)
"""The statuses of a server that does not know the session, and of a gateway that does not reach its server."""

_CLOSED = "Connection closed"
"""The library's message of CONNECTION_CLOSED. Servers use the same code, -32000, for errors of their tools."""

_TOO_LONG = f"a line of more than {MAX_ANSWER_BYTES:,} bytes"
_BOUNDED_UTF_8 = "arpo_trl_bounded_utf_8"
_OVERLONG: ContextVar[Callable[[], None]] = ContextVar("overlong")
"""The callback for a line that is too long from the connection's process."""

_SURROGATE = re.compile("[\ud800-\udfff]")

# The library logs messages of servers. The errors of failed calls are enough.
logging.getLogger("mcp.client").setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """One entry of `mcp_servers`: a command that starts a server, or the address of a running one.

    Example: `McpServer(command="uvx", args=["mcp-server-time"])`
    """

    command: str | None = None
    args: Sequence[str] = ()
    env: Sequence[str] = ()
    """Names of environment variables that are passed to the command, in addition to basic ones such as PATH and
    HOME."""
    url: str | None = None
    token_env: str | None = None
    """Name of the environment variable that contains the token. It is sent to `url` as `Authorization: Bearer`."""
    tools: Sequence[str] | None = None
    """Names of the tools to offer; None: all."""
    per_path: bool = False
    """Whether each path has its own session, for servers whose tools keep state in the session."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> McpServer:
        """Return the server that `settings` describe.

        Raises:
            ConfigError: A setting is unknown, missing or invalid. The message names `where`.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{where} is {type(settings).__name__}; expected settings such as command or url.")
        known = [field.name for field in fields(cls)]
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"{where} has a setting {name!r}; expected some of {known}.")
            if name in ("args", "env", "tools") and not (
                isinstance(value, list) and all(isinstance(item, str) for item in value)
            ):
                raise ConfigError(f"{where}: {name} must be a list of strings, got {type(value).__name__}.")
            if name in ("command", "url", "token_env") and not isinstance(value, str):
                raise ConfigError(f"{where}: {name} must be a string, got {type(value).__name__}.")
            if name == "per_path" and not isinstance(value, bool):
                raise ConfigError(f"{where}: per_path must be true or false, got {value!r}.")
        server = cls(**settings)
        if (server.command is None) == (server.url is None):
            raise ConfigError(f"{where} must have either command or url.")
        start, unused = ("command", ["token_env"]) if server.url is None else ("url", ["args", "env"])
        for name in unused:
            if settings.get(name):
                raise ConfigError(f"{where}: {name} is set, but a server with a {start} does not get it. Unset it.")
        if server.url is not None:
            check_server_url(server.url, f"{where}: url", "that token_env names", may_have_query=True)
        for name in server.variables:
            if name not in os.environ:
                raise ConfigError(f"{where} needs the environment variable {name}, which is not set.")
        return server

    def without_secrets(self, text: str) -> str:
        """Return a text of the server with the names of its variables instead of their values, which may be
        secrets."""
        return with_marks(text, {os.environ.get(name, "").strip(): f"[{name}]" for name in self.variables})

    @property
    def variables(self) -> list[str]:
        """The names of the environment variables that the server receives."""
        return [*self.env, *([self.token_env] if self.token_env else [])]

    @property
    def shown(self) -> str:
        """The server's name in messages, without arguments and query, which may contain secrets."""
        return f"command {self.command!r}" if self.command is not None else f"url {without_credentials(str(self.url))}"


def mcp_tools(servers: Sequence[Mapping[str, Any]], *, timeout_s: float = 15.0) -> list[Callable[..., Any]]:
    """Return the tools of `servers` as async functions for a `ToolBox`.

    Names that cannot be tags are changed (`get-page` → `get_page`). A call that takes longer than `timeout_s` fails.

    Args:
        servers: The settings of each server; `McpServer` lists them.

    Raises:
        ConfigError: A setting is invalid, the library is not installed, or a server does not start or lacks a tool.
        ToolSpecError: A tool has a parameter that a Python function cannot have, or a schema whose parameters cannot
            be found.
    """
    if not timeout_s > 0:
        raise ConfigError(f"mcp_timeout_s is {timeout_s}; expected more than 0.")
    try:
        # All names that sessions use: in an older mcp they are missing, which would look like a fault of the server.
        from mcp import Client, MCPError, StdioServerParameters  # noqa: F401
        from mcp.client.stdio import stdio_client  # noqa: F401
        from mcp.client.streamable_http import streamable_http_client  # noqa: F401
        from mcp.types import (  # noqa: F401
            CONNECTION_CLOSED,
            INVALID_REQUEST,
            PARSE_ERROR,
            JSONRPCError,
            jsonrpc_message_adapter,
        )
    except ImportError as error:
        raise ConfigError(
            f"mcp_servers needs the mcp library, version 2.3 or newer ({error}): pip install 'arpo-trl[tools]'."
        ) from error
    tools = []
    with contextlib.ExitStack() as opened:  # after an error, no server that was started before stays
        for number, settings in enumerate(servers):
            where = f"mcp_servers[{number}]"
            server = McpServer.of(settings, where)
            session = McpSession(server, timeout_s)
            opened.callback(session.close)
            offered = {tool.name: tool for tool in session.open(where)}
            missing = [name for name in server.tools or () if name not in offered]
            if missing:
                raise ConfigError(f"{where} ({server.shown}) has no tools {missing}; it has {sorted(offered)}.")
            wanted = [offered[name] for name in (offered if server.tools is None else server.tools)]
            if server.per_path:
                session.close()
                tools += _tools_per_path(server, timeout_s, where, wanted)
            else:
                shared = _Shared(session)
                tools += [_as_function(shared, tool) for tool in wanted]
        opened.pop_all()
    return tools


def _tools_per_path(server: McpServer, timeout_s: float, where: str, tools: Sequence[Any]) -> list[Callable[..., Any]]:
    """Return a server's tools as the tools of an environment that opens a session for each path."""

    class Session:
        def __init__(self) -> None:
            self.session = McpSession(server, timeout_s)

        def reset(self, **row: Any) -> None:
            self.session.open(where)

        def close(self) -> None:
            self.session.close()

    offered: dict[str, str] = {}
    for tool in tools:
        method = _as_method(tool)
        if method.__name__ in RESERVED_TAGS.union(NOT_TOOLS) or method.__name__.startswith("_"):
            raise ConfigError(
                f"{where} ({server.shown}) has a tool {tool.name!r}, a name that per_path cannot offer. Exclude it: "
                "list the tools to offer in `tools`."
            )
        if method.__name__ in offered:
            raise ConfigError(
                f"{where} ({server.shown}) has the tools {offered[method.__name__]!r} and {tool.name!r}, whose names "
                f"for the model are equal: {method.__name__!r}. List the tools to offer in `tools`."
            )
        offered[method.__name__] = tool.name
        setattr(Session, method.__name__, method)
    Session.__name__ = f"session of {server.shown}"
    kind = environment_kind(Session, START_TIMEOUT_S)
    return Environments(kind, timeout_s=timeout_s).tools


class _Shared:
    """The session to which the tools of a server refer. It is closed when there are no more references to this."""

    def __init__(self, session: McpSession) -> None:
        self.call = session.call
        weakref.finalize(self, session.release).atexit = False  # the session has its own


class McpSession:
    """A connection to one server. It reconnects after a failure."""

    def __init__(self, server: McpServer, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Any] | None = None  # of the connected client
        self._stop = asyncio.Event()
        self._starting: asyncio.Timeout | None = None
        self._holds: set[asyncio.Task[None]] = set()  # those of this connection and of earlier ones that are ending
        self._answers = 0  # of all connections, including errors
        self._overdue = 0  # calls that the connected server has not answered in time
        self._probe: asyncio.Task[None] | None = None
        self._overlong = asyncio.Event()  # whether the connected process has sent a line that is too long
        self._stderr: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (closed in `close`)
        atexit.register(self.close)

    def open(self, where: str) -> list[Any]:
        """Connect, and return the tools of the server.

        Raises:
            ConfigError: The server does not start or does not answer.
        """
        try:
            return background.start(self._list_tools()).result(START_TIMEOUT_S + _STOP_TIMEOUT_S)
        except Exception as error:  # from the library, the system or the server
            reason = self._reason(error)
            self.close()
            raise ConfigError(
                f"{where}: {self._server.shown} does not work as an MCP server: {reason}. "
                + (
                    "Check that the command runs in a shell, that it is in PATH and that its arguments are in args."
                    if self._server.command is not None
                    else "Check that the server runs, that the url includes its path, such as /mcp, and that its "
                    "transport is streamable HTTP; the older SSE is not supported."
                )
            ) from None

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool of the server and return the text of its result.

        Raises:
            ToolError: The tool reports an error.
            ToolOverdue: It does not answer in time.
            ToolUnavailable: The server stopped and does not restart.
        """
        # The library cannot encode lone surrogates, and closes the connection.
        whole = with_texts(lambda text: _SURROGATE.sub("\ufffd", text), arguments)
        future = background.start(self._call(name, whole))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Close the session, and stop the server if this process started it. May be called repeatedly."""
        atexit.unregister(self.close)
        with contextlib.suppress(TimeoutError, CancelledError):
            background.start(self._shut_all()).result(_STOP_TIMEOUT_S)
        self._stderr.close()

    def release(self) -> None:
        """Close the session without waiting, because the garbage collector may call this in the loop's own thread."""
        background.start(self._release())

    # All methods below run on the background loop.

    async def _release(self) -> None:
        await self._shut_all()
        atexit.unregister(self.close)
        self._stderr.close()

    async def _list_tools(self) -> list[Any]:
        async with asyncio.timeout(START_TIMEOUT_S):
            client = await self._connected()
            tools: list[Any] = []
            cursor = None
            for _ in range(_MAX_TOOLS_PAGES):
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
            return [self._without_secrets(tool) for tool in tools]

    def _without_secrets(self, tool: Any) -> Any:
        schema = json.loads(self._server.without_secrets(json.dumps(tool.input_schema)))
        description = self._server.without_secrets(tool.description or "")
        return tool.model_copy(update={"description": description, "input_schema": schema})

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        session: asyncio.Future[Any] | None = None
        answers = self._answers
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    client = await self._connected()
                except Exception:
                    raise ToolUnavailable("Error: the server of this tool has stopped.") from None
                session = self._ready
                result = await client.call_tool(name, arguments)
                self._answers += 1
        except TimeoutError:
            await self._miss(session, answers)
            raise ToolOverdue.of(name, self._timeout_s) from None
        except asyncio.CancelledError:  # at the deadline of the ToolBox, if it is earlier
            await self._miss(session, answers)
            raise
        except MCPError as error:
            is_lost = error.code == CONNECTION_CLOSED and (self._server.url is not None or error.message == _CLOSED)
            if not is_lost:
                self._answers += 1
                # Cut twice: removing credentials from a long text takes seconds, and a cut can leave half of one.
                message = without_credentials(self._server.without_secrets(error.message)[: 2 * _MAX_ERROR_CHARS])
                raise ToolError(f"Error: {message[:_MAX_ERROR_CHARS]}") from None
            overlong = self._overlong.is_set()
            await self._lose(session)
            if overlong:
                raise ToolUnavailable(f"Error: the server of this tool sent {_TOO_LONG}.") from None
            raise ToolUnavailable("Error: the server of this tool stopped during the call.") from None
        text = self._server.without_secrets(_text_of(result))
        if result.is_error:
            raise ToolError(text if text.startswith("Error") else f"Error: {text}")
        return text

    async def _connected(self) -> Any:
        """Return the connected client. A start continues even if the call that waits for it times out."""
        if self._ready is None or self._task is None or self._task.done():
            self._ready = asyncio.get_running_loop().create_future()
            # asyncio logs exceptions that are never retrieved.
            self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
            self._stop, self._overlong, self._overdue = asyncio.Event(), asyncio.Event(), 0
            self._task = asyncio.create_task(self._hold(self._ready, self._stop))
            self._holds.add(self._task)
            self._task.add_done_callback(self._holds.discard)
        return await asyncio.shield(self._ready)

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        """Keep a session open until `stop`. The library requires that the task that opened it also closes it."""
        try:
            self._cut_stderr()
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(START_TIMEOUT_S) as self._starting:
                    client = await stack.enter_async_context(await self._client_for(stack, ready))
                    client.session.validate_tool_result = _accept
                ready.set_result(client)
                while not stop.is_set():
                    self._cut_stderr()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_STDERR_PERIOD_S):
                            await stop.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error if isinstance(error, Exception) else ConnectionError("it was stopped"))

    def _cut_stderr(self) -> None:
        if os.fstat(self._stderr.fileno()).st_size > _MAX_STDERR_BYTES:
            os.truncate(self._stderr.fileno(), 0)

    async def _client_for(self, stack: contextlib.AsyncExitStack, ready: asyncio.Future[Any]) -> Any:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = self._server
        if server.command is not None:
            command = StdioServerParameters(
                command=server.command,
                args=list(server.args),
                env={name: os.environ[name] for name in server.env},
                encoding=_BOUNDED_UTF_8,
                encoding_error_handler="replace",  # an error would end the library's reader, but not the connection
            )
            _OVERLONG.set(self._give_up)
            return Client(stdio_client(command, errlog=self._stderr))  # type: ignore[arg-type]
        headers = {"Accept-Encoding": "identity"}
        if server.token_env:
            headers["Authorization"] = f"Bearer {server_key(server.token_env)}"
        http_client = await stack.enter_async_context(_http_client(headers, ready))
        transport = streamable_http_client(
            str(server.url), http_client=http_client, max_sse_event_size=MAX_ANSWER_BYTES
        )
        return Client(transport)

    async def _miss(self, session: asyncio.Future[Any] | None, answers: int) -> None:
        """Note that a call on `session`, which began after `answers` answers, has had none in time."""
        if session is None or session is not self._ready:
            return
        if self._server.url is not None:
            self._overdue += 1
            if self._overdue == _MAX_OVERDUE:
                await self._lose(session)
        elif answers == self._answers and (self._probe is None or self._probe.done()):
            self._probe = asyncio.create_task(self._lose_if_silent(session))

    async def _lose_if_silent(self, session: asyncio.Future[Any]) -> None:
        """Stop a process that answers nothing any more, since a call may block it without end."""
        answers = self._answers
        try:
            async with asyncio.timeout(self._timeout_s):
                await session.result().list_tools(cache_mode="bypass")
        except TimeoutError:
            if answers == self._answers:
                await self._lose(session)
        except Exception:  # an error is an answer, and the next call notices a connection that is closed
            pass

    async def _lose(self, session: asyncio.Future[Any] | None) -> None:
        """Let the next call reconnect, unless another call has already done so.

        A process is stopped. A session at an address stays until its running calls have ended: they may be answered.
        """
        if session is not self._ready:
            return
        if self._server.url is None:
            await self._shut()
        else:
            asyncio.get_running_loop().call_later(self._timeout_s, self._stop.set)
            self._task = self._ready = None

    async def _shut(self) -> None:
        task, ready, self._task, self._ready = self._task, self._ready, None, None
        if task is not None and ready is not None:
            self._end(ready)
            await asyncio.wait([task])

    async def _shut_all(self) -> None:
        """Close the session, and wait for the end of earlier processes, too."""
        await self._shut()
        if self._server.url is None and self._holds:
            await asyncio.wait(self._holds)

    def _end(self, ready: asyncio.Future[Any]) -> None:
        self._stop.set()
        if not ready.done() and self._starting is not None:
            # Cancel through the timeout, only once: a second cancellation would stop the library from ending the
            # process.
            with contextlib.suppress(RuntimeError):  # the timeout has already expired
                self._starting.reschedule(asyncio.get_running_loop().time())

    def _give_up(self) -> None:
        """Close the connection, because its process has sent a line that is too long."""
        self._overlong.set()
        if self._ready is not None:
            self._end(self._ready)

    def _reason(self, error: Exception) -> str:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        reason += f"; it sent {_TOO_LONG}" if self._overlong.is_set() else ""
        self._stderr.seek(0)
        # Without secrets before it is cut: a part of one would remain.
        said = self._server.without_secrets(self._stderr.read().decode("utf-8", "replace")).strip()
        reason = self._server.without_secrets(reason)
        return f"{reason}; it said: {said[-_SHOWN_STDERR_CHARS:]}" if said else reason


async def _accept(name: str, result: Any) -> None:
    """Replaces the library's check of a result against the server's schema: a pattern in it may take hours, and
    nothing can stop the search. The result becomes text anyway."""


# mypy does not support a base class that a call returns.
class _BoundedLines(codecs.getincrementaldecoder("utf-8")):  # type: ignore[misc]
    """Decodes UTF-8 line by line, so that the library can read each line that contains JSON.

    Fails at a line of more than `MAX_ANSWER_BYTES`, which would otherwise be kept in memory.
    """

    def __init__(self, errors: str = "strict") -> None:
        super().__init__(errors)
        self._line: list[bytes] = []  # the parts of the line that is not complete
        self._bytes_of_line = 0

    def decode(self, data: Any, final: bool = False) -> str:
        whole, newline, after = bytes(data).rpartition(b"\n")
        self._bytes_of_line = len(after) if newline else self._bytes_of_line + len(after)
        if self._bytes_of_line > MAX_ANSWER_BYTES:
            from anyio import BrokenResourceError

            _OVERLONG.get()()
            raise BrokenResourceError  # then the library discards the rest
        if not newline:
            self._line.append(after)
            return ""
        lines = b"".join([*self._line, whole]).decode("utf-8", self.errors).split("\n")
        self._line = [after]
        return "".join(f"{_readable(line)}\n" for line in lines)


def _readable(line: str) -> str:
    """Return a line of a server in a form that the library accepts, because the call of a rejected answer would wait
    for its deadline.

    Lone surrogates become U+FFFD. An answer that the library would still reject becomes an error with the same id. A
    line that is not JSON stays, and the library ignores it.
    """
    if _can_be_read(line):
        return line
    try:
        message = json.loads(line)  # Python reads lone surrogates, NaN and deeper nesting
        answers = message if isinstance(message, list) else [message]  # older servers send several in a list
        return "\n".join(map(_readable_answer, answers)) or line
    except (ValueError, RecursionError):
        return line


def _readable_answer(answer: Any) -> str:
    line = _SURROGATE.sub("\ufffd", json.dumps(answer, ensure_ascii=False))
    if _can_be_read(line) or not isinstance(answer, dict) or "id" not in answer or "method" in answer:
        return line
    from mcp.types import PARSE_ERROR

    error = {"code": PARSE_ERROR, "message": "the answer of this tool's server cannot be read"}
    return json.dumps({"jsonrpc": "2.0", "id": answer["id"], "error": error})


def _can_be_read(line: str) -> bool:
    from mcp.types import jsonrpc_message_adapter

    try:
        jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError:
        return False
    return True


def _bounded_utf_8(name: str) -> codecs.CodecInfo | None:
    """Find the codec `_BOUNDED_UTF_8`. The codec name is the library's only setting for reading a process."""
    if name != _BOUNDED_UTF_8:
        return None
    utf_8 = codecs.lookup("utf-8")
    return codecs.CodecInfo(utf_8.encode, utf_8.decode, incrementaldecoder=_BoundedLines, name=name)


codecs.register(_bounded_utf_8)


def _http_client(headers: Mapping[str, str], ready: asyncio.Future[Any]) -> Any:
    """Return the HTTP client of a session. `ready` is done when the session has started.

    After that, a call that finds its server or its session lost gets the error `CONNECTION_CLOSED`. The library would
    pass on the error of a server that does not know the session, and of a gateway whose server is gone, as an error of
    the tool. If a connection fails, it would end the session with all its calls.
    """
    import httpx2
    from mcp.types import CONNECTION_CLOSED

    class HttpClient(httpx2.AsyncClient):
        async def send(self, request: Any, **options: Any) -> Any:
            try:
                response = await super().send(request, **options)
                if not ready.done() or not await _is_lost(response):
                    return response
                await response.aclose()
            except httpx2.TransportError:
                if not ready.done():
                    raise
            error = {"code": CONNECTION_CLOSED, "message": "the server or its session is lost"}
            return httpx2.Response(503, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)

    return HttpClient(
        headers=headers,
        timeout=None,
        verify=_tls(),
        event_hooks={"response": [_bound]},
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),  # each running call has its own
    )


@functools.cache
def _tls() -> Any:
    """Return the TLS settings of all sessions. To read them takes 0.1 s, during which the loop stands still."""
    import httpx2

    return httpx2.create_ssl_context()


async def _is_lost(response: Any) -> bool:
    """Return whether a response states that the server, or its session, no longer exists.

    A session that does not exist is a 404 with any content, or an error of JSON-RPC with one of two codes. Otherwise a
    JSON-RPC message is the server's answer. The library, too, reads only JSON: a stream may have no end.
    """
    import httpx2
    from mcp.types import CONNECTION_CLOSED, INVALID_REQUEST, JSONRPCError, jsonrpc_message_adapter

    if response.status_code not in _LOST:
        return False
    has_session = "mcp-session-id" in response.request.headers
    if response.status_code == 404 and has_session:
        return True
    if not response.headers.get("content-type", "").lower().startswith("application/json"):
        return True
    try:
        message = jsonrpc_message_adapter.validate_json(await response.aread(), by_name=False)
    except (httpx2.StreamError, ValueError):  # too long, or compressed; or no message
        return True
    is_error = isinstance(message, JSONRPCError) and message.error.code in (CONNECTION_CLOSED, INVALID_REQUEST)
    return has_session and is_error


async def _bound(response: Any) -> None:
    """Make reading `response` fail if it is too long or compressed. The library itself limits events of a stream."""
    import httpx2

    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return
    stream, is_compressed = response.stream, "content-encoding" in response.headers

    class Bounded(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = 0 if is_compressed else MAX_ANSWER_BYTES
            async for piece in stream:
                left -= len(piece)
                if left < 0:
                    raise httpx2.StreamError(f"the answer is compressed or longer than {MAX_ANSWER_BYTES:,} bytes")
                yield piece

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()


def _as_function(session: _Shared | McpSession, tool: Any) -> Callable[..., Any]:
    """Return `tool` as a function with the tool's name, signature, docstring and schema."""

    async def call(**arguments: Any) -> str:
        return await session.call(tool.name, arguments)

    return with_schema(tool, call, [])


def _as_method(tool: Any) -> Callable[..., Any]:
    """Return `tool` as a method of an object that has a `session`."""

    async def call(self: Any, **arguments: Any) -> str:
        return str(await self.session.call(tool.name, arguments))

    return with_schema(tool, call, [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)])


def _text_of(result: Any) -> str:
    """Return the texts of a result, with a note for each part that is not text."""
    parts = [_part_text(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _part_text(part: Any) -> str:
    if part.type == "text":
        return str(part.text)
    if part.type == "resource" and hasattr(part.resource, "text"):
        return str(part.resource.text)
    if part.type == "resource_link":
        return str(part.uri)
    return f"[{part.type} omitted: only text can be shown]"
