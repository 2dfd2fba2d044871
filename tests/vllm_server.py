"""A real vLLM server on the loopback, for tests: started, killed, restarted on the same port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from arpo_trl.quickstart.model import build_model, build_tokenizer
from support import TEXTS

UP_S = 180.0
"""Most seconds that a server may take to come up on a slow machine."""


def save_model(folder: Path, seed: int = 0) -> str:
    """The quickstart's model for the tests' tokenizer, with distributions that are neither flat nor certain."""
    tokenizer: PreTrainedTokenizerFast = build_tokenizer(TEXTS * 3)
    model: Qwen3ForCausalLM = build_model(tokenizer, seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server process; `flags` and `environment` come on top of what a server to be trained against needs."""

    def __init__(self, model: str, log: Path, *flags: str, port: int | None = None, **environment: str | None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager", "--dtype", "float32"),
            *("--max-num-seqs", "64", "--max-model-len", "1024", "--logprobs-mode", "processed_logprobs", *flags),
        ]
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **environment,
        }
        self._environment = {k: v for k, v in (dict(os.environ) | settings).items() if v is not None}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        return self

    def wait(self) -> Server:
        """Returns once the server has answered a request: the first takes seconds of compiling."""
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
        raise AssertionError(f"no server after {UP_S} s: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """The whole process group at once, as a machine that goes down."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def running(model: str, log: Path, *flags: str, **environment: str | None) -> Iterator[Server]:
    server = Server(model, log, *flags, **environment).start()
    try:
        yield server.wait()
    finally:
        server.kill()
