"""The `python` tool on a remote executor with SandboxFusion's HTTP API, for machines that cannot isolate code.

    POST <url>/run_code   {"code", "language": "python", "compile_timeout", "run_timeout", "memory_limit_MB"}
    reply                 {"status": "Success" | "Failed" | "SandboxError", "message",
                           "run_result": {"status": "Finished" | "Error" | "TimeLimitExceeded",
                                          "execution_time", "return_code", "stdout", "stderr"}}

The request contains the text of `cell` before the code, so the output is the same as in the local sandbox. The
executor must isolate the code and limit its memory and processes. This module enforces the deadline, the maximum size
of the reply and the format of the text for the model.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from arpo_trl.errors import ConfigError, ToolError, ToolStopped, ToolUnavailable
from arpo_trl.net.addresses import check_server_url
from arpo_trl.tools.python import cell as python_cell
from arpo_trl.tools.python.local import offer, shown, stop_reason
from arpo_trl.tools.python.sandbox import Ending, Limits, ending_of
from arpo_trl.visible import encodable, without_secrets

_ATTEMPTS = 3
_BACK_OFF_S = 0.2  # doubled with each attempt, plus up to 50 % at random
_GRACE_S = 5.0  # beyond the deadline of a call, for the network and the executor's queue
_JSON_BYTES = 6  # per byte of output, at most: \u0000
_OTHER_BYTES = 1 << 16  # of a reply, without stdout


class _Retry(Exception):
    """The executor is unreachable or reports a temporary failure, so a retry may succeed."""


class RemotePython:
    """Runs code on the executor at `url`. Calls are independent. An instance may be used from several event loops.

    Construction makes a first call.

    Raises:
        ConfigError: `url` is not an address, or the executor does not run Python.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        check_server_url(url, "python_executor_url", None)
        parsed = httpx.URL(url)
        self._url = parsed.copy_with(path=parsed.path.rstrip("/") + "/run_code")
        self._limits = limits
        self._cell = inspect.getsource(python_cell)
        self._ssl = httpx.create_ssl_context()  # takes longer to create than a call
        with ThreadPoolExecutor(1) as thread:  # this thread may run an event loop
            try:
                said = thread.submit(asyncio.run, self("6 * 7")).result()
            except ToolError as error:
                said = str(error)
        if said != "42":
            raise ConfigError(
                f"The python executor at {parsed.host} does not run Python: for 6 * 7 it returned "
                f"{without_secrets(said)[:300]!r}. "
                "Start a SandboxFusion server there, or correct python_executor_url."
            )

    def __str__(self) -> str:
        """Return one line that describes the isolation of the model's code."""
        return f"Model-written Python runs on the remote executor {self._url.host}, which must isolate it."

    async def __call__(self, code: str, earlier: Sequence[str] = ()) -> str:
        """Return the output of `code`, which runs after the cells `earlier`.

        Raises:
            ToolError: The code raised; the message is its output, with the traceback.
            ToolStopped: A limit ended the code, or the executor did not answer in time.
            ToolUnavailable: The executor cannot be reached, or failed.
        """
        cells = [encodable(cell) for cell in (*earlier, code)]
        request = {
            "code": f"{self._cell}\nsys.stderr = sys.stdout\nsys.exit(run_cells({cells!r}))\n",
            "language": "python",
            "compile_timeout": self._limits.timeout_s,
            "run_timeout": self._limits.timeout_s,
            "memory_limit_MB": self._limits.memory_mb,
        }
        try:
            async with asyncio.timeout(self._limits.timeout_s + _GRACE_S):
                reply = await self._ask(request)
        except TimeoutError:
            raise ToolStopped("Error: the python executor did not answer in time") from None
        output, ending = _read(reply)
        if len(encoded := output.encode("utf-8", "replace")) > self._limits.output_bytes:
            output, ending = encoded[: self._limits.output_bytes].decode("utf-8", "ignore"), Ending.FLOOD
        return shown(output, ending, stop_reason(ending, self._limits, earlier))

    async def _ask(self, request: dict[str, Any]) -> Any:
        """Return the decoded reply, after up to `_ATTEMPTS` attempts."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._ask_once(request)
            except (_Retry, httpx.TransportError) as error:
                fault = str(error) if isinstance(error, _Retry) else type(error).__name__
                await asyncio.sleep(_BACK_OFF_S * 2**attempt * (1 + random.random() / 2))
        raise ToolUnavailable(f"Error: the python executor cannot be reached ({fault})")

    async def _ask_once(self, request: dict[str, Any]) -> Any:
        body = bytearray()
        most = self._limits.output_bytes * _JSON_BYTES + _OTHER_BYTES
        # A new client, because a client belongs to one event loop. The caller sets the deadline of the whole call.
        async with (
            httpx.AsyncClient(verify=self._ssl, timeout=None) as client,
            client.stream("POST", self._url, json=request, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status_code == 429 or response.status_code >= 500:
                raise _Retry(f"HTTP status {response.status_code}")
            if response.status_code != 200:
                raise ToolUnavailable(
                    f"Error: the python executor rejected the call (HTTP status {response.status_code})"
                )
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > most:
                    raise ToolStopped(f"Error: stopped, the code printed more than {self._limits.output_bytes} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise ToolUnavailable(_NOT_UNDERSTOOD) from None


_NOT_UNDERSTOOD = "Error: the python executor's reply cannot be understood"


def _read(reply: Any) -> tuple[str, Ending]:
    """Return the code's output and the way it ended.

    Raises:
        ToolUnavailable: `reply` is invalid, or reports a failure of the executor.
    """
    if not isinstance(reply, dict):
        raise ToolUnavailable(_NOT_UNDERSTOOD)
    if reply.get("status") == "SandboxError":
        raise ToolUnavailable("Error: the python executor failed")
    result = reply.get("run_result")
    if reply.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
        raise ToolUnavailable(_NOT_UNDERSTOOD)
    status, code, stdout = result.get("status"), result.get("return_code"), result.get("stdout") or ""
    if not isinstance(stdout, str):
        raise ToolUnavailable(_NOT_UNDERSTOOD)
    if status == "TimeLimitExceeded":
        return stdout, Ending.TIMEOUT
    if status != "Finished" or not isinstance(code, int):
        raise ToolUnavailable(_NOT_UNDERSTOOD)
    return stdout, ending_of(code)


def remote_python_tool(
    url: str,
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    max_output_chars: int = 100_000,
    stateful: bool = False,
) -> Callable[[str], Awaitable[str]]:
    """Return an async function `python(code: str) -> str` that runs code on a SandboxFusion server.

    `python_tool` explains the arguments.

    Raises:
        ConfigError: A test call to `url` does not run Python.
    """
    run = RemotePython(url, Limits(timeout_s=timeout_s, memory_mb=memory_mb, output_bytes=max_output_chars))

    async def python(code: str) -> str:
        return await run(code)

    return offer(python, run, stateful=stateful)
