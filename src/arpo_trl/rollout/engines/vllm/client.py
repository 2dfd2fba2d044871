"""The endpoints of a vLLM server except generation: its properties, the weights that it serves, and their update.

Every error names the server's URL and the setting of the trainer or the server to change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ArpoError, ConfigError, EngineError
from arpo_trl.net import background
from arpo_trl.net.addresses import authorization, server_key
from arpo_trl.net.clients import HTTPClients
from arpo_trl.options import VLLM_KEY_VARIABLE
from arpo_trl.visible import without_secrets

FRESH = "default"
"""The weight version of a server that still serves its initial weights."""
CANARY_TEXT = (
    "Iron melts at 1,538 °C. <search>melting point of tin</search>\n\ndef area(r):\n    return 3.14159 * r**2\n"
    "Warum? 因为 x² + y² = z², \\boxed{42}."
)
"""Words, digits, code and several scripts, which tokenizers split differently. The logprobs of this text are compared
too."""
ATTEMPTS = 4
"""Attempts per request, or per transfer of weights, before the run fails."""
SHORT_S = 5.0
"""The timeout in seconds of requests that need no computation."""
DYING_S = 3.0
"""Seconds within which a server whose engine has died closes its port: it still answers requests, with 500."""
DYING_CHECK_S = 0.5
"""Seconds between two checks of it."""
ABORT = "/abort_requests"
ABORT_HINT = "The server needs vLLM ≥ 0.31 and VLLM_SERVER_DEV_MODE=1."


class ServerLost(EngineError):
    """The connection to a server failed: it is down, or it or its engine was stopped or killed during the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """A server's properties. `max_lora_rank` is None without `--enable-lora`; `max_logprobs` is −1 without a limit."""

    model: str
    max_model_len: int
    max_logprobs: int
    logprobs_mode: str
    dtype: str
    max_lora_rank: int | None
    replicas: int
    weight_version: str


def headers() -> dict[str, str]:
    """The authorization header for servers that require a key."""
    return authorization(server_key(VLLM_KEY_VARIABLE))


P = ParamSpec("P")
T = TypeVar("T")


def _reads_json(method: Callable[Concatenate[ServerClient, P], T]) -> Callable[Concatenate[ServerClient, P], T]:
    """A method that raises EngineError if the server's JSON does not have vLLM's format."""

    @wraps(method)
    def read(self: ServerClient, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except ArpoError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            raise EngineError(
                f"{self.url} answered with JSON that does not have the format of vLLM ≥ 0.31 ({type(error).__name__}: "
                f"{error}). Correct vllm_server_urls, or check the server's version."
            ) from error

    return read


class ServerClient:
    """A blocking client for one server. Its methods raise EngineError with the URL if the server is down or fails."""

    def __init__(self, url: str, *, timeout_s: float):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = HTTPClients(
            lambda verify: httpx.AsyncClient(
                headers=headers(),
                # Loading weights can take long. Connecting must not.
                timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
                # The engine's requests for turns do not use the environment's proxies either.
                trust_env=False,
                verify=verify,
                limits=httpx.Limits(max_keepalive_connections=0),  # nothing closes this client
            )
        )

    def wait(self, away_s: float, check: Callable[[], None] = lambda: None) -> None:
        """Wait until the server is up. Calls `check` while it waits. An exception from `check` stops the wait.

        Raises:
            ConfigError: Something other than a vLLM server answers.
            EngineError: The server is not up after `away_s` seconds.
        """
        started = time.monotonic()
        # A progress bar, since nothing else is printed during the wait. It appears after five seconds.
        with tqdm(total=round(away_s), desc=f"Waiting for vLLM at {self.url}", unit="s", delay=5, leave=False) as bar:
            while True:
                try:
                    status = self._send("GET", "/health", timeout=SHORT_S).status_code
                except httpx.RequestError as error:
                    problem = f"{type(error).__name__}: {error}"
                else:
                    if status == 200:
                        return
                    if status < 500:
                        raise ConfigError(
                            f"{self.url} answers /health with {status}, so it is not a vLLM server. Correct "
                            "vllm_server_urls, or free the port."
                        )
                    problem = f"it answers {status}"
                if (waited_s := time.monotonic() - started) >= away_s:
                    raise EngineError(
                        f"The vLLM server {self.url} did not come up within {away_s:.0f} s ({problem}). Start it, "
                        "correct vllm_server_urls, or raise vllm_server_timeout."
                    )
                check()
                time.sleep(0.5)
                bar.update(round(waited_s) - bar.n)

    @_reads_json
    def facts(self) -> ServerFacts:
        """Ask the server for its properties.

        Raises:
            ConfigError: The server lacks a required endpoint.
        """
        models = self._json("GET", "/v1/models", "This is not a vLLM server. Correct vllm_server_urls.")["data"]
        information = self._json(
            "GET",
            "/server_info?config_format=json",
            "Start the server with VLLM_SERVER_DEV_MODE=1 in its environment, which weight updates require.",
        )["vllm_config"]
        lora = information.get("lora_config")
        return ServerFacts(
            model=next(model["id"] for model in models if model["parent"] is None),
            max_model_len=int(models[0]["max_model_len"]),
            max_logprobs=int(information["model_config"]["max_logprobs"]),
            logprobs_mode=str(information["model_config"]["logprobs_mode"]),
            dtype=str(information["model_config"]["dtype"]).removeprefix("torch."),
            max_lora_rank=None if lora is None else int(lora["max_lora_rank"]),
            replicas=int(information["parallel_config"]["data_parallel_size"]),
            weight_version=self.weight_version(),
        )

    @_reads_json
    def weight_version(self) -> str:
        answer = self._json("GET", "/weight_info", "The server needs vLLM ≥ 0.31 and VLLM_SERVER_DEV_MODE=1.")
        return str(answer["weight_version"])

    @_reads_json
    def tokenize(self, text: str, model: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return self._json("POST", "/tokenize", "The comparison of tokenizers needs the server's /tokenize.", body)[
            "tokens"
        ]

    @_reads_json
    def logprobs(self, ids: Sequence[int], model: str) -> list[float]:
        """The model's logprob of each id except the first, given the ids before it, at temperature 1."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        choices = self._json("POST", "/v1/completions", "The server must serve /v1/completions.", body)["choices"]
        given = choices[0]["prompt_logprobs"]
        return [position[str(token)]["logprob"] for position, token in zip(given[1:], ids[1:], strict=True)]

    def load_weights(self, folder: str) -> None:
        """Make the server load the safetensors files in `folder`, a path on the server's machine."""
        hint = f"The server must be able to read {folder}. Set weight_sync_dir to a folder shared with the server."
        self._json("POST", "/collective_rpc", hint, {"method": "reload_weights", "kwargs": {"weights_path": folder}})

    def load_adapter(self, name: str, folder: str) -> None:
        hint = (
            "Start the server with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora, and share the folder "
            f"{folder} (weight_sync_dir) with it."
        )
        self._request("POST", "/v1/load_lora_adapter", hint, {"lora_name": name, "lora_path": folder})

    @_reads_json
    def has_adapter(self, name: str) -> bool:
        """Whether the server has loaded an adapter of this name."""
        return name in (model["id"] for model in self._json("GET", "/v1/models", "")["data"])

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, if the server has it; a restarted server does not."""
        if self.has_adapter(name):
            self._request("POST", "/v1/unload_lora_adapter", "", {"lora_name": name})

    def abort(self) -> None:
        """Abort all running requests. The server answers them with the tokens sampled so far."""
        self._request("POST", ABORT, ABORT_HINT, {}, timeout=SHORT_S)

    def check_abort(self) -> None:
        """Check that the server has `abort`, without an effect on running requests.

        Raises:
            ConfigError: It does not.
        """
        self._request("GET", ABORT, ABORT_HINT, accepted=(200, 405))  # 405: the path exists, but not for GET

    @_reads_json
    def reset_prefix_cache(self) -> bool:
        """Reset the prefix cache, which has states from other weights. Returns False if running requests use it."""
        hint = "Start the server with VLLM_SERVER_DEV_MODE=1."
        return bool(self._json("POST", "/reset_prefix_cache", hint)["success"])

    def set_weight_version(self, version: str) -> None:
        """Set what `weight_version` returns until the server's engine ends."""
        self._json("POST", "/update_weight_version", "The server needs vLLM ≥ 0.31.", {"new_version": version})

    def _json(self, method: str, path: str, hint: str, body: dict[str, Any] | None = None) -> Any:
        response = self._request(method, path, hint, body)
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(f"{self.url}{path} did not answer with JSON. {hint}") from error

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            with self._http.one() as http:
                return await self._http.while_up(
                    f"{self.url}/health", http.request(method, f"{self.url}{path}", **options)
                )

        running = background.start(send())
        try:
            return running.result()
        finally:
            running.cancel()  # after an interrupt it still runs

    def _request(
        self,
        method: str,
        path: str,
        hint: str,
        body: dict[str, Any] | None = None,
        accepted: Sequence[int] = (200,),
        **options: Any,
    ) -> httpx.Response:
        try:
            response = self._send(method, path, json=body, **options)
        except httpx.ReadTimeout as error:
            raise EngineError(
                f"The vLLM server {self.url} has not answered {path} in time. Check its log, or raise "
                "vllm_request_timeout_s."
            ) from error
        except httpx.RequestError as error:
            raise ServerLost(
                f"The connection to the vLLM server {self.url} failed at {path} ({type(error).__name__}). Check its "
                "log."
            ) from error
        if response.status_code in (401, 403):
            raise ConfigError(
                f"{self.url} refuses access. Set the environment variable {VLLM_KEY_VARIABLE} to its key."
            )
        if response.status_code == 404:
            raise ConfigError(
                f"{self.url} has no {path.split('?')[0]} ({without_secrets(response.text)[:200]}). {hint}"
            )
        if response.status_code not in accepted:
            problem = f"{self.url}{path} answered {response.status_code}: {without_secrets(response.text)[:500]}."
            if response.status_code >= 500 and self._goes_down():
                raise ServerLost(f"{problem} Then the server went down. Check its log.")
            raise EngineError(f"{problem} {hint}")
        return response

    def _goes_down(self) -> bool:
        """Whether the server goes down within `DYING_S`."""
        end = time.monotonic() + DYING_S
        while time.monotonic() < end:
            try:
                if self._send("GET", "/health", timeout=SHORT_S).status_code >= 500:
                    return True
            except httpx.RequestError:
                return True
            time.sleep(DYING_CHECK_S)  # nothing reports the end of a server that another process has started
        return False


def check_server(client: ServerClient, tokenizer: PreTrainedTokenizerBase, top_logprobs: int) -> ServerFacts:
    """Check that the server can sample and be updated, and return its properties.

    Args:
        top_logprobs: The number of logprobs per probed token.

    Raises:
        ConfigError: The server lacks an endpoint, has the wrong kind or number of logprobs, has several data parallel
            replicas, or has another tokenizer than the trainer.
    """
    facts = client.facts()
    client.check_abort()
    if facts.logprobs_mode != "processed_logprobs":
        raise ConfigError(
            f"{client.url} returns {facts.logprobs_mode}, which are not the logprobs of the distribution that it "
            "samples from. Start it with --logprobs-mode processed_logprobs."
        )
    if 0 <= facts.max_logprobs < top_logprobs:
        raise ConfigError(
            f"{client.url} returns at most {facts.max_logprobs} logprobs, but entropy_top_logprobs is {top_logprobs}. "
            f"Start it with --max-logprobs {top_logprobs}, or lower entropy_top_logprobs."
        )
    if facts.replicas > 1:
        raise ConfigError(
            f"{client.url} has {facts.replicas} data parallel replicas behind one URL. The paths of a tree would not "
            "share a prefix cache, and the comparison of logprobs would check only one replica. Start one server per "
            "replica, and list all in vllm_server_urls."
        )
    theirs = client.tokenize(CANARY_TEXT, facts.model)
    remedy = "Start it with the --model or --tokenizer of the trained model."
    check_tokenizer(tokenizer, theirs, f"{client.url} has another tokenizer than the trainer", remedy)
    return facts


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, theirs: Sequence[int], problem: str, remedy: str) -> None:
    """Check that a server's ids of `CANARY_TEXT`, without special tokens, are those of `tokenizer`.

    Raises:
        ConfigError: They are not. Its text contains `problem` and `remedy`.
    """
    ours = tokenizer.encode(CANARY_TEXT, add_special_tokens=False)
    if ours != theirs:
        raise ConfigError(
            f"{problem}: the same text has {len(theirs)} tokens there and {len(ours)} here"
            f"{', with other ids' if len(theirs) == len(ours) else ''}. {remedy}"
        )
