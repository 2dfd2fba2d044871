"""The `python` tool at a remote executor that speaks SandboxFusion's HTTP API, for machines that cannot isolate code.

    POST <url>/run_code   {"code", "language": "python", "compile_timeout", "run_timeout", "memory_limit_MB"}
    reply                 {"status": "Success" | "Failed" | "SandboxError", "message",
                           "run_result": {"status": "Finished" | "Error" | "TimeLimitExceeded",
                                          "execution_time", "return_code", "stdout", "stderr"}}

The code is sent behind the text of `cell`, so a call shows what it would show in the sandbox here. What keeps
code from its machine, and its memory and processes within limits, is the executor's business; the deadline, the cap on
the reply and the shape of what the model reads are enforced here, whatever it answers.
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

from arpo_trl.errors import ConfigError, ToolError
from arpo_trl.net.addresses import check_server_url
from arpo_trl.tools.python import cell as python_cell
from arpo_trl.tools.python.local import offer, shown, stop_reason
from arpo_trl.tools.python.sandbox import Ending, Limits

_ATTEMPTS = 3
_BACK_OFF_S = 0.2  # doubled with each attempt, and up to half as much again by chance
_GRACE_S = 5.0  # beyond a call's own deadline, for the way and the queue of the executor
_JSON_BYTES = 6  # a character of the output takes at most as many bytes per byte of its own: \u0000
_OTHER_BYTES = 1 << 16  # of a reply, besides stdout


class _Retry(Exception):
    """The executor was not reached, or is not well: worth another attempt."""


class RemotePython:
    """Runs code at `url`, each call on its own; an instance may be used from several event loops.

    The first call is made on construction: raises `ConfigError` if `url` is none, or does not run Python.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        check_server_url(url, "python_executor_url", None)
        parsed = httpx.URL(url)
        self._url = parsed.copy_with(path=parsed.path.rstrip("/") + "/run_code")
        self._limits = limits
        self._cell = inspect.getsource(python_cell)
        self._ssl = httpx.create_ssl_context()  # takes longer to make than a call
        with ThreadPoolExecutor(1) as thread:  # there may be an event loop in this one
            try:
                said = thread.submit(asyncio.run, self("6 * 7")).result()
            except ToolError as error:
                said = str(error)
        if said != "42":
            raise ConfigError(
                f"The python executor at {parsed.host} does not run Python; asked for 6 * 7 it said {said[:300]!r}. "
                "Start a SandboxFusion server there, or mend python_executor_url."
            )

    def __str__(self) -> str:
        """How the model's code is kept apart, in a line."""
        return f"Model-written Python runs at the remote executor {self._url.host}, which has to isolate it."

    async def __call__(self, code: str, earlier: Sequence[str] = ()) -> str:
        """What `code` prints, run after the cells `earlier`; raises `ToolError` with what to show when it fails."""
        cells = [cell.encode("utf-8", "replace").decode() for cell in (*earlier, code)]
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
            raise ToolError("Error: the python executor did not answer in time") from None
        output, ending = _read(reply)
        if len(encoded := output.encode("utf-8", "replace")) > self._limits.output_bytes:
            output, ending = encoded[: self._limits.output_bytes].decode("utf-8", "ignore"), Ending.FLOOD
        return shown(output, ending, stop_reason(ending, self._limits, earlier))

    async def _ask(self, request: dict[str, Any]) -> Any:
        """The decoded reply, after as many attempts as it takes and there are."""
        for attempt in range(_ATTEMPTS):
            try:
                return await self._ask_once(request)
            except (_Retry, httpx.TransportError) as error:
                fault = str(error) if isinstance(error, _Retry) else type(error).__name__
                await asyncio.sleep(_BACK_OFF_S * 2**attempt * (1 + random.random() / 2))
        raise ToolError(f"Error: the python executor cannot be reached ({fault})")

    async def _ask_once(self, request: dict[str, Any]) -> Any:
        body = bytearray()
        most = self._limits.output_bytes * _JSON_BYTES + _OTHER_BYTES
        # A client of its own, as each belongs to one event loop. The deadline of the whole call is the caller's.
        async with (
            httpx.AsyncClient(verify=self._ssl, timeout=None) as client,
            client.stream("POST", self._url, json=request, headers={"Accept-Encoding": "identity"}) as response,
        ):
            if response.status_code == 429 or response.status_code >= 500:
                raise _Retry(f"HTTP status {response.status_code}")
            if response.status_code != 200:
                raise ToolError(f"Error: the python executor refused the call (HTTP status {response.status_code})")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > most:
                    raise ToolError(f"Error: stopped, the code printed more than {self._limits.output_bytes} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise ToolError(_NOT_UNDERSTOOD) from None


_NOT_UNDERSTOOD = "Error: the python executor's reply cannot be understood"


def _read(reply: Any) -> tuple[str, Ending]:
    """What the code printed and how it ended. Raises `ToolError` for anything that is not a reply, or says so."""
    if not isinstance(reply, dict):
        raise ToolError(_NOT_UNDERSTOOD)
    if reply.get("status") == "SandboxError":
        raise ToolError("Error: the python executor failed")
    result = reply.get("run_result")
    if reply.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
        raise ToolError(_NOT_UNDERSTOOD)
    status, code, stdout = result.get("status"), result.get("return_code"), result.get("stdout") or ""
    if not isinstance(stdout, str):
        raise ToolError(_NOT_UNDERSTOOD)
    if status == "TimeLimitExceeded":
        return stdout, Ending.TIMEOUT
    if status != "Finished" or not isinstance(code, int):
        raise ToolError(_NOT_UNDERSTOOD)
    return stdout, {python_cell.SUCCEEDED: Ending.FINISHED, python_cell.RAISED: Ending.RAISED}.get(code, Ending.DIED)


def remote_python_tool(
    url: str,
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    max_output_chars: int = 100_000,
    stateful: bool = False,
) -> Callable[[str], Awaitable[str]]:
    """An async function `python(code: str) -> str` that runs code at a SandboxFusion server; see `python_tool`.

    Raises `ConfigError` when `url` does not run Python, as tried.
    """
    run = RemotePython(url, Limits(timeout_s=timeout_s, memory_mb=memory_mb, output_bytes=max_output_chars))

    async def python(code: str) -> str:
        return await run(code)

    return offer(python, run, stateful=stateful)
