"""Starts, kills and restarts a local vLLM server, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

UP_S = 180.0
"""Seconds after which a server that does not respond is an error."""


def free_port() -> int:
    """A free port below Linux's ephemeral range, so that the kernel assigns it to no other process."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Server:
    """One server process with the endpoints that training needs. It keeps its port when it is restarted."""

    def __init__(self, model: str, log: Path, *flags: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--dtype", "float32"),
            *(
                "--max-num-seqs",
                "64",
                "--max-model-len",
                "1024",
                "--block-size",
                "32",
                "--logprobs-mode",
                "processed_logprobs",
                *flags,
            ),
        ]
        self._environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # Otherwise vLLM compiles parts of the sampler for each new shape, which takes g++ about ten seconds.
            "TORCHDYNAMO_DISABLE": "1",
        }
        self._log = log
        self._process: Any = None

    def start(self) -> Server:
        self._process = self._start_process()
        return self

    def _start_process(self) -> Any:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait(self) -> Server:
        """Waits until the server has answered a request."""
        assert self._process is not None
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    body = {"prompt": [40, 41], "max_tokens": 2, "logprobs": 2}
                    httpx.post(f"{self.url}/v1/completions", json=body, timeout=UP_S).raise_for_status()
                    return self
            except httpx.ConnectError:
                time.sleep(0.2)
        raise AssertionError(f"the server did not respond within {UP_S} s: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Kills the whole process group, as if the machine failed."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it may have ended by itself
                children = psutil.Process(self._process.pid).children(recursive=True)
                os.killpg(self._process.pid, signal.SIGKILL)
                psutil.wait_procs(children, timeout=UP_S)  # they hold the port, too
            self._process.wait()
            self._process = None


@contextmanager
def running(model: str, log: Path, *flags: str, kind: type[Server] = Server) -> Iterator[Server]:
    server = kind(model, log, *flags).start()
    try:
        yield server.wait()
    finally:
        server.kill()
