"""A broken vLLM server raises an error that names its URL and the setting to change."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, LoraConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file

import forked
from arpo_trl.errors import ConfigError, EngineError, Interrupted
from arpo_trl.options import VLLM_KEY_VARIABLE
from arpo_trl.rollout.engines.base import SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.vllm.client import (
    CANARY_TEXT,
    FRESH,
    ServerClient,
    ServerLost,
    check_server,
    headers,
)
from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine
from arpo_trl.rollout.engines.vllm.weights import (
    DiskTransfer,
    NcclTransfer,
    ServedWeights,
    is_plain_adapter,
    write_shards,
)
from arpo_trl.training.vllm_setup import _name_of_run, served_weights
from loopback import Asked, Loopback, Reply
from support import A_SERVER, events_of, tiny_model, tokenizer, until

HERE = Path(__file__).parent
EOS = int(tokenizer().eos_token_id)
MODELS = {"data": [{"id": "policy", "parent": None, "max_model_len": 100}]}
COMPLETION = {
    "choices": [
        {
            "token_ids": [60, EOS],
            "finish_reason": "stop",
            "logprobs": {"token_logprobs": [-0.5, -0.5], "top_logprobs": [{"a": -0.5, "b": -1.0}] * 2},
        }
    ]
}


def completion(**changes) -> dict:
    """`COMPLETION` with other values."""
    (choice,) = COMPLETION["choices"]
    logprobs = {name: changes.pop(name, value) for name, value in choice["logprobs"].items()}
    return {"choices": [choice | {"logprobs": logprobs} | changes]}


def info(max_logprobs=20, logprobs_mode="processed_logprobs", replicas=1):
    model = {"max_logprobs": max_logprobs, "logprobs_mode": logprobs_mode, "dtype": "torch.float32"}
    parallel = {"data_parallel_size": replicas}
    return {"vllm_config": {"model_config": model, "lora_config": None, "parallel_config": parallel}}


GOOD = {
    "/health": {},
    "/v1/models": MODELS,
    "/server_info": info(),
    "/weight_info": {"weight_version": FRESH},
    "/tokenize": {"tokens": tokenizer().encode(CANARY_TEXT)},
    "/reset_prefix_cache": {"success": True},
    "/update_weight_version": {"success": True},
    "/abort_requests": {},
    "/v1/completions": COMPLETION,
}


@pytest.fixture
def serve():
    """Starts HTTP servers with scripted answers: a body, (status, body), or a function of the request's number."""
    servers = []

    def start(**changes):
        answers = GOOD | {f"/{path.replace('__', '/')}": answer for path, answer in changes.items()}
        seen: list[tuple[str, dict, dict]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length) or b"{}")
                path = self.path.split("?")[0]
                answer = answers.get(path, (404, {"detail": "Not Found"}))
                if callable(answer):
                    answer = answer(sum(name == path for name, _, _ in seen))
                seen.append((path, body, dict(self.headers)))
                if path == "/update_weight_version" and "weight_info" not in changes:
                    answers["/weight_info"] = {"weight_version": body["new_version"]}
                if answer is None:  # hangs up
                    self.close_connection = True
                    return
                status, given = answer if isinstance(answer, tuple) else (200, answer)
                content = given.encode() if isinstance(given, str) else json.dumps(given).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def client(url: str) -> ServerClient:
    return ServerClient(url, timeout_s=60.0)


class Arrived:
    """Weights that are always synced."""

    def __init__(self, url):
        self.clients, self.version, self.syncs = [client(url)], "arpo-x-1", 0
        self.step = 1
        self.facts = {url: check_server(self.clients[0], tokenizer(), 2)}

    def sync(self):
        self.syncs += 1

    def model(self, url):
        return "policy"

    def restore(self, which):
        return which.weight_version()


def engine(url, *, weights=None, away_s=60.0, request_s=60.0) -> VLLMServerEngine:
    return VLLMServerEngine(
        tokenizer(),
        SamplingParams(eos_ids=(EOS,)),
        weights or Arrived(url),
        vocab_size=1000,
        top_logprobs=2,
        away_s=away_s,
        request_s=request_s,
    )


def write(made: VLLMServerEngine, count: int = 1) -> list[Turn]:
    turns = []
    with made.session():
        for i in range(count):
            made.submit(TurnRequest(id=i, ids=[50, 51], max_tokens=9, probe_tokens=4, seed=i, key=(i, 0)))
        turns += [event for event in events_of(made, count) if isinstance(event, Turn)]
    return turns


def test_a_good_server_is_taken_as_it_is(serve):
    url, _ = serve()
    facts = check_server(client(f"{url}/v1/"), tokenizer(), 20)  # the OpenAI form of the URL does no harm
    assert (facts.model, facts.max_model_len, facts.max_lora_rank) == ("policy", 100, None)
    assert [turn.ids for turn in write(engine(url))] == [[60, EOS]]


def test_something_else_on_the_port_is_named():
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 did not come up within 0 s .*vllm_server_urls"):
        client("http://127.0.0.1:9").wait(0.0)


def test_a_taken_port_is_named(serve):
    url, _ = serve(health=(404, "<html>a wiki</html>"))
    with pytest.raises(
        ConfigError, match=rf"{url} answers /health with 404, so it is not a vLLM server.* free the port"
    ):
        client(url).wait(60.0)


def test_a_server_that_is_still_loading_is_waited_for(serve):
    url, seen = serve(health=lambda number: (503, {}) if number < 2 else {})
    client(url).wait(60.0)
    assert len(seen) == 3


def test_a_server_that_is_still_loading_may_accept_connections_without_an_answer(serve, monkeypatch):
    monkeypatch.setattr("arpo_trl.rollout.engines.vllm.client.SHORT_S", 0.2)
    ended, answers = threading.Event(), [lambda: (ended.wait(30), (404, {}))[1]]
    url, _ = serve(health=lambda number: answers.pop()() if answers else {})
    client(url).wait(60.0)
    ended.set()


def test_the_environments_proxies_are_not_used(serve, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    url, _ = serve()
    assert check_server(client(url), tokenizer(), 2).model == "policy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v1__models": (404, {})}, "has no /v1/models .*This is not a vLLM server"),
        ({"server_info": (404, {})}, "has no /server_info .*VLLM_SERVER_DEV_MODE=1"),
        ({"weight_info": (404, {})}, "has no /weight_info .*vLLM ≥ 0.31"),
        ({"abort_requests": (404, {})}, "has no /abort_requests .*VLLM_SERVER_DEV_MODE=1"),
        (
            {"server_info": info(max_logprobs=5)},
            "at most 5 logprobs, but entropy_top_logprobs is 20.*--max-logprobs",
        ),
        ({"server_info": info(logprobs_mode="raw_logprobs")}, "raw_logprobs.*--logprobs-mode processed_logprobs"),
        ({"server_info": info(replicas=4)}, "4 data parallel replicas .* one server per replica"),
        ({"tokenize": {"tokens": [1, 2, 3]}}, "another tokenizer than the trainer.*3 tokens there.*--model"),
        ({"v1__models": (401, {})}, f"refuses access. Set the environment variable {VLLM_KEY_VARIABLE}"),
    ],
)
def test_a_missing_feature_of_a_server_is_named_with_the_remedy(serve, changes, message):
    url, _ = serve(**changes)
    with pytest.raises(ConfigError, match=f"{url}.*{message}"):
        check_server(client(url), tokenizer(), 20)


def test_a_server_with_a_path_for_aborts_is_accepted_and_nothing_is_aborted(serve):
    url, seen = serve(abort_requests=(405, {}))  # as vLLM answers a GET
    check_server(client(url), tokenizer(), 20)
    assert [path for path, _, _ in seen].count("/abort_requests") == 1


def test_an_unlimited_number_of_logprobs_is_accepted(serve):
    url, _ = serve(server_info=info(max_logprobs=-1))
    assert check_server(client(url), tokenizer(), 500).max_logprobs == -1


def test_nonsense_in_place_of_json_is_named(serve):
    url, _ = serve(weight_info="not json")
    with pytest.raises(EngineError, match=f"{url}/weight_info did not answer with JSON"):
        client(url).weight_version()


@pytest.mark.slow
@pytest.mark.parametrize("answer", [[], {}, "[1, null]", {"data": [1]}, {"vllm_config": []}, {"choices": "no"}])
@pytest.mark.parametrize("path", ["v1__models", "server_info", "weight_info", "tokenize"])
def test_json_of_another_form_is_named(serve, path, answer):
    url, _ = serve(**{path: answer})
    with pytest.raises(EngineError, match=f"{url} answered with JSON that does not have the format of vLLM"):
        check_server(client(url), tokenizer(), 2)


@pytest.mark.parametrize("path", ["reset_prefix_cache", "v1__completions"])
def test_json_of_another_form_after_a_sync_ends_the_run(serve, tmp_path, path):
    url, _ = serve(collective_rpc={}, **{path: {"choices": [{"prompt_logprobs": [None]}]}})
    with pytest.raises(EngineError, match=f"{url} answered with JSON that does not have the format of vLLM"):
        moving(url, tmp_path).sync()


def test_the_servers_key_is_sent_and_shown_nowhere(serve, monkeypatch):
    monkeypatch.setenv(VLLM_KEY_VARIABLE, "sesame")
    url, seen = serve(tokenize={"tokens": []})
    with pytest.raises(ConfigError) as caught:
        check_server(client(url), tokenizer(), 20)
    assert {headers["Authorization"] for _, _, headers in seen} == {"Bearer sesame"}
    assert "sesame" not in str(caught.value)


def test_a_prefix_cache_that_others_hold_is_an_error(serve, tmp_path):
    url, _ = serve(collective_rpc={}, reset_prefix_cache={"success": False})
    with pytest.raises(EngineError, match=f"{url} could not reset its prefix cache"):
        moving(url, tmp_path).sync()


@pytest.mark.parametrize("failure", [(500, {"error": "oops"}), (503, {}), None], ids=["500", "503", "hangs up"])
def test_a_request_that_fails_for_a_while_is_sent_again_with_its_seed(serve, failure):
    url, seen = serve(v1__completions=lambda number: failure if number < 2 else COMPLETION)
    assert len(write(engine(url))) == 1
    bodies = [body for path, body, _ in seen if path == "/v1/completions"]
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]


def test_a_server_that_never_completes_a_request_stops_the_rollout(serve):
    url, seen = serve(v1__completions=(500, {"error": "always"}))
    with pytest.raises(EngineError, match=rf"{url} could not complete a request \(500: .*always"):
        write(engine(url))
    assert 1 < sum(path == "/v1/completions" for path, _, _ in seen) < 10


@pytest.mark.parametrize(
    ("weight_info", "problem"),
    [
        (lambda number: {"weight_version": f"arpo-x-{number}"}, "it was restarted while it answered"),
        # The requests are: at the start 0, then two before each attempt and one after its answer.
        (lambda number: {"weight_version": "arpo-x-1"} if number == 0 or number % 3 else None, "it no longer answers"),
    ],
    ids=["restarted", "down"],
)
def test_a_server_whose_answers_are_never_used_is_named_with_the_reason(serve, weight_info, problem):
    url, _ = serve(weight_info=weight_info)
    with pytest.raises(EngineError, match=rf"{url} could not complete a request \({problem}\)"):
        write(engine(url))


def test_a_server_that_stays_away_is_named_after_the_deadline(serve):
    url, _ = serve(
        v1__completions=None, weight_info=lambda number: {"weight_version": "arpo-x-1"} if number == 0 else (503, {})
    )
    with pytest.raises(EngineError, match=rf"{url} was unreachable for 1 s .*vllm_server_timeout"):
        write(engine(url, away_s=1.0))


def test_an_error_during_a_sync_is_shown_when_the_session_has_ended_meanwhile(serve):
    """With rollouts ahead, a thread has the session, and ends it when its own requests fail."""
    url, _ = serve()
    made = engine(url)
    made._weights.is_current, made._weights.lock = False, nullcontext()
    made._weights.wait_for_ranks = lambda: None
    with ExitStack() as session:
        session.enter_context(made.session())

        def sync():
            session.close()
            raise EngineError("The server did not come up.")

        made._weights.sync = sync
        with pytest.raises(EngineError, match="did not come up"):
            made.sync()


def test_a_server_that_never_answers_is_named_after_the_deadline(serve):
    ended = threading.Event()
    url, _ = serve(v1__completions=lambda number: (ended.wait(120), COMPLETION)[1])
    with pytest.raises(EngineError, match=rf"{url} has not answered a request .* vllm_request_timeout_s"):
        write(engine(url, request_s=0.5))
    ended.set()


@pytest.mark.parametrize(
    "answer",
    [
        "not json",
        {},
        {"choices": []},
        {"choices": [{"text": "words only", "logprobs": None, "finish_reason": "stop"}]},
        {"choices": [{"token_ids": [60], "logprobs": {"token_logprobs": []}, "finish_reason": "stop"}]},
        {"choices": [1]},
        completion(token_ids=[]),
        completion(token_logprobs=[None, -0.5]),
        completion(token_logprobs=["-0.5", -0.5]),
        completion(token_logprobs=[float("nan"), -0.5]),
        completion(token_logprobs=[float("-inf"), -0.5]),
        completion(top_logprobs=None),
        completion(top_logprobs=[{"a": -0.5}]),
        completion(top_logprobs=[None, None]),
        completion(top_logprobs=[{}, {}]),
        completion(top_logprobs=[{"a": None}] * 2),
        completion(top_logprobs=[{"a": float("nan")}] * 2),
        completion(top_logprobs=[{"a": 800.0}] * 2),
    ],
)
def test_answers_of_another_shape_are_errors(serve, answer):
    url, seen = serve(v1__completions=answer)
    with pytest.raises(EngineError, match=r"vLLM"):
        write(engine(url))
    assert sum(path == "/v1/completions" for path, _, _ in seen) == 1


def test_a_body_that_cannot_be_decoded_is_an_error_of_its_server(monkeypatch):
    monkeypatch.setattr("arpo_trl.rollout.engines.vllm.client.DYING_S", 0.2)
    undecodable = Reply(b"not gzip", headers={"Content-Encoding": "gzip"})
    with Loopback(lambda asked: undecodable if "complet" in asked.path else Reply(GOOD[asked.path])) as loopback:
        with pytest.raises(EngineError, match=rf"{loopback.url} could not complete a request \(DecodingError"):
            write(engine(loopback.url))
        with pytest.raises(EngineError, match=rf"{loopback.url} failed at /v1/completions \(DecodingError"):
            client(loopback.url).logprobs([5, 6], "policy")


def test_requests_that_another_client_always_aborts_end_the_rollout(serve):
    url, seen = serve(v1__completions=completion(token_ids=[], finish_reason="abort"))
    with pytest.raises(EngineError, match=rf"{url} could not complete a request \(it was aborted .* not by this run"):
        write(engine(url))
    assert sum(path == "/v1/completions" for path, _, _ in seen) == 4  # ATTEMPTS


def test_the_trees_of_a_batch_are_shared_out_and_each_stays_with_one_server(serve):
    (first, seen_first), (second, seen_second) = serve(), serve()
    made = engine(first)
    other = Arrived(second)
    made._weights.clients += other.clients
    made._weights.facts |= other.facts
    with made.session():
        for i, key in enumerate([(0, 0), (0, 1), (1, 0), (0, 0, 1, 0), (3, 2)]):
            made.submit(TurnRequest(id=i, ids=[50 + key[0]], max_tokens=9, probe_tokens=4, seed=i, key=key))
        list(events_of(made, 5))

    def prompts(seen):
        return sorted(body["prompt"][0] for path, body, _ in seen if path == "/v1/completions")

    assert (prompts(seen_first), prompts(seen_second)) == ([50, 50, 50], [51, 53])


class Still:
    """A transfer of weights that does nothing."""

    def __getattr__(self, name):
        return lambda *args: None

    def served_as(self, facts, version):
        return facts.model


@pytest.mark.parametrize(
    ("theirs", "message"),
    [([-1.0, -2.0], None), ([-1.0, -2.5], "does not serve the trainer's weights"), ([float("nan"), -2.0], "does not")],
)
def test_logprobs_are_compared_after_each_sync(serve, theirs, message):
    given = [None, {"6": {"logprob": theirs[0]}}, {"7": {"logprob": theirs[1]}}]
    url, _ = serve(v1__completions={"choices": [{"prompt_logprobs": given}]})
    made = client(url)
    facts = check_server(made, tokenizer(), 2)
    step = (0, 1)
    weights = ServedWeights(
        [made], [facts], Still(), Accelerator(cpu=True), lambda: step, lambda ids: [-1.0, -2.0], [5, 6, 7], 0.05
    )
    if message is None:
        weights.sync()
        weights.sync()
        assert weights.version.endswith("-1")  # nothing has changed since the first
        step = (1, 1)
        weights.sync()
        assert weights.version.endswith("-2") and weights.step == 1
        step = (1, 2)  # other weights were loaded
        weights.sync()
        assert weights.version.endswith("-3") and weights.step == 1
    else:
        with pytest.raises(EngineError, match=f"{url} {message}"):
            weights.sync()
        assert weights.version == "default"


def moving(url, folder, **settings) -> ServedWeights:
    """Weights of a tiny model that move over the disk."""
    made = client(url)
    facts, accelerator = check_server(made, tokenizer(), 2), Accelerator(cpu=True)
    transfer = DiskTransfer(tiny_model(), accelerator, tokenizer(), folder, [facts])
    return ServedWeights(
        [made],
        [facts],
        transfer,
        accelerator,
        lambda: (1, 1),
        lambda ids: [-1.0],
        [5, 6],
        0.05,
        away_s=60.0,
        **settings,
    )


AGREES = {"choices": [{"prompt_logprobs": [None, {"6": {"logprob": -1.0}}]}]}


@pytest.mark.parametrize("comes", [True, False])
def test_a_server_that_another_rank_restores_at_the_same_time_refuses_nothing_that_matters(
    tmp_path, comes, monkeypatch
):
    monkeypatch.setattr("arpo_trl.rollout.engines.vllm.weights.RESTORED_S", 1.0)
    with Loopback(server := Restarts()) as loopback:
        weights = moving(loopback.url, tmp_path)
        weights.sync()
        server.restart()
        mark = f"{weights.version}.other"

        def answer(asked: Asked) -> Reply:
            if asked.path != "/collective_rpc":
                return server(asked)
            if comes:
                server.version = mark
            return Reply({"message": "has already been loaded"}, status=400)

        loopback.answer = answer
        if comes:
            assert weights.restore(weights.clients[0]) == mark
        else:
            with pytest.raises(EngineError, match="already been loaded"):
                weights.restore(weights.clients[0])


def test_a_server_that_is_killed_while_it_loads_weights_is_waited_for_and_gets_them(serve, tmp_path):
    url, seen = serve(
        collective_rpc=lambda number: None if number == 0 else {},
        health=lambda number: (503, {}) if number == 0 else {},
        v1__completions=AGREES,
    )
    weights = moving(url, tmp_path)
    seen.clear()
    weights.sync()
    paths = [path for path, _, _ in seen]
    claimed = ["/reset_prefix_cache", "/weight_info", "/v1/models", "/server_info", "/weight_info"]
    claimed += ["/update_weight_version"]
    served = ["/weight_info", "/collective_rpc", "/weight_info", "/reset_prefix_cache", "/v1/completions"]
    marked = [*served, "/weight_info", "/update_weight_version"]
    assert paths == [*claimed, "/weight_info", "/collective_rpc", "/health", "/health", *marked]
    assert seen[-1][1]["new_version"].startswith(f"{weights.version}.")
    assert weights.step == 1


def dead(call: str) -> tuple[int, dict]:
    """The answer of a server whose engine has died."""
    return 500, {"error": {"message": f"Call to {call} method failed: cancelled", "code": 500}}


@pytest.mark.parametrize("call", ["collective_rpc", "reset_prefix_cache", "v1__completions"])
def test_a_server_whose_engine_dies_during_an_update_is_waited_for_and_gets_the_weights(serve, tmp_path, call):
    usual = {"collective_rpc": {}, "reset_prefix_cache": {"success": True}, "v1__completions": AGREES}
    failing = {call: lambda number: dead(call) if number == 0 else usual[call]}
    states = [{}, None, (503, {}), {}]  # it still answers, its connection fails, it starts, it is back
    url, seen = serve(**usual | failing, health=lambda number: states[min(number, 3)])
    weights = moving(url, tmp_path)
    weights.sync()
    assert seen[-1][1]["new_version"].startswith(f"{weights.version}.") and weights.step == 1


def test_a_server_that_cannot_read_the_weights_but_stays_up_is_an_error_with_the_remedy(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("arpo_trl.rollout.engines.vllm.client.DYING_S", 0.2)
    url, _ = serve(collective_rpc=dead("collective_rpc"))
    with pytest.raises(EngineError, match=f"{url}/collective_rpc answered 500: .* must be able to read {tmp_path}"):
        moving(url, tmp_path).sync()


def test_a_server_that_stays_away_from_its_weights_ends_the_run_after_the_deadline(serve, tmp_path):
    url, _ = serve(collective_rpc=None, health=lambda number: (503, {}), v1__completions=AGREES)
    weights = moving(url, tmp_path)
    weights._away_s = 0.5
    with pytest.raises(EngineError, match=rf"{url} did not come up within 0 s .*vllm_server_timeout"):
        weights.sync()
    assert weights.step is None


def test_a_server_that_every_load_kills_is_not_waited_for_for_ever(serve, tmp_path):
    url, seen = serve(collective_rpc=None)
    with pytest.raises(EngineError, match=rf"{url} failed at /collective_rpc"):
        moving(url, tmp_path).sync()
    assert sum(path == "/collective_rpc" for path, _, _ in seen) == 4  # ATTEMPTS


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_wait_longer_than_a_collective_for_a_server_that_gets_weights_and_name_it(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    forked.run([*launcher, str(HERE / "waiting_ranks.py"), str(tmp_path)], cwd=HERE, env=os.environ)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert said == ["EngineError: http://server hangs"] * 2


@pytest.mark.parametrize(("ranks", "ddp_timeout", "warns"), [(2, 4, True), (2, 5, False), (1, 4, False)])
def test_a_wait_for_a_server_that_is_longer_than_a_collective_is_named_at_the_start(caplog, ranks, ddp_timeout, warns):
    waits = {"vllm_request_timeout_s": 5.0, "vllm_server_timeout": 0.1, "ddp_timeout": ddp_timeout}
    args = SimpleNamespace(server_urls=["http://127.0.0.1:9"], **waits)
    with pytest.raises(EngineError, match="did not come up"):
        served_weights(args, None, SimpleNamespace(num_processes=ranks), tokenizer(), None, None, None)
    assert ("a rank can wait 5 s for a server" in caplog.text) == warns


@pytest.mark.parametrize("server", ["away", "hangs"])
def test_a_signal_ends_the_wait_for_a_server_that_gets_weights(serve, tmp_path, server):
    def load(number):
        loading.set()
        if server == "hangs":
            ended.wait(120)

    def check():
        if loading.is_set():
            raise Interrupted(signal.SIGTERM)

    loading, ended = threading.Event(), threading.Event()
    url, _ = serve(collective_rpc=load, health=(503, {}))
    start = time.monotonic()
    with pytest.raises(Interrupted):
        moving(url, tmp_path, check=check).sync()
    ended.set()
    assert time.monotonic() - start < 40.0


def test_a_restarted_server_that_is_killed_again_while_it_gets_its_weights_gets_them_later(serve):
    url, _ = serve()
    made = engine(url)

    def restore(which):
        restored.append(which)
        if len(restored) == 1:
            raise ServerLost("killed")
        return FRESH

    restored = []
    made._weights.restore = restore
    assert len(write(made)) == 1
    assert len(restored) == 2


class Restarts:
    """A vLLM server whose restart resets its weights: the initial ones write 70, the trainer's 60."""

    def __init__(self):
        self.writes = lambda prompt: None
        """What happens while the server answers a request."""
        self.aborted, self.running = threading.Event(), 0
        self.loading = self.comparing = lambda: None
        self.prompts: list[int] = []
        self.refuses = 0
        """The status of its refusals to tell its mark; 0: it does not refuse."""
        self.restart()

    def restart(self, **settings):
        self.version, self.token, self.settings = FRESH, 70, info(**settings)
        self.adapters: list[str] = []

    def __call__(self, asked: Asked) -> Reply:
        match asked.path:
            case "/weight_info" if self.refuses:
                return Reply({"detail": "Not Found"}, status=self.refuses)
            case "/weight_info":
                return Reply({"weight_version": self.version})
            case "/update_weight_version":
                self.version = asked.json["new_version"]
            case "/server_info":
                return Reply(self.settings)
            case "/v1/models":
                adapters = [{"id": name, "parent": "policy", "max_model_len": 100} for name in self.adapters]
                return Reply({"data": MODELS["data"] + adapters})
            case "/v1/load_lora_adapter":
                self.adapters.append(asked.json["lora_name"])
            case "/collective_rpc":
                self.loading()
                self.token = 60
            case "/abort_requests":
                self.aborted.set()
            case "/reset_prefix_cache":
                return Reply({"success": self.running == 0})
            case "/v1/completions" if "prompt_logprobs" in asked.json:
                self.comparing()
                return Reply(AGREES)
            case "/v1/completions":
                self.running += 1
                token, prompt = self.token, asked.json["prompt"][0]
                self.prompts.append(prompt)
                self.writes(prompt)
                self.running -= 1
                (choice,) = COMPLETION["choices"]
                return Reply({"choices": [choice | {"token_ids": [token, EOS]}]})
        return Reply(GOOD.get(asked.path, {}))


@pytest.fixture
def restarts(tmp_path):
    """The server, an engine on it, and its weights."""
    with Loopback(server := Restarts()) as loopback:
        weights = moving(loopback.url, tmp_path)
        yield server, engine(loopback.url, weights=weights), weights


def turn(number: int) -> TurnRequest:
    return TurnRequest(id=number, ids=[number, 51], max_tokens=9, probe_tokens=4, seed=1, key=(number, 0))


def first_tokens(made: VLLMServerEngine, *turns: int, submitted: int = 0) -> dict[int, int]:
    """The first tokens of these turns and of others that are submitted already, in the session that is open."""
    for number in turns:
        made.submit(turn(number))
    events = events_of(made, len(turns) + submitted)
    return {event.id: event.ids[0] for event in events if isinstance(event, Turn)}


def test_no_token_of_a_restarted_servers_initial_weights_is_used(restarts):
    server, made, _ = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.restart()  # between two requests
        assert first_tokens(made, 2) == {2: 60}
        assert server.prompts == [1, 2, 2]
    server.restart()  # between two sessions of the same weights
    with made.session():
        assert first_tokens(made, 3) == {3: 60}
    assert server.prompts == [1, 2, 2, 3]


def test_no_request_is_sent_to_a_server_while_it_is_restored(restarts):
    server, made, _ = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.restart()
        server.loading = lambda: (made.submit(turn(3)), time.sleep(0.3), sent.extend(server.prompts))
        sent: list[int] = []
        assert first_tokens(made, 2, submitted=1) == {2: 60, 3: 60}
    assert sent == [1, 2]


def test_turns_that_run_on_a_restarted_server_are_aborted_and_sampled_again(restarts):
    """They would end after minutes, and the prefix cache that they use could not be reset before."""
    server, made, _ = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.restart()
        server.aborted.clear()
        server.writes = lambda prompt: prompt == 2 and server.aborted.wait(60)
        made.submit(turn(2))
        until(lambda: 2 in server.prompts)
        assert first_tokens(made, 3, submitted=1) == {2: 60, 3: 60}
    assert server.prompts.count(2) == 2


def test_a_server_that_another_rank_restored_is_used_but_not_its_answers_from_before(restarts):
    server, made, weights = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.restart()
        weights.restore(weights.clients[0])  # as another rank does
        assert first_tokens(made, 2) == {2: 60}

        def restart_once(prompt):
            server.writes = lambda prompt: None
            server.running = 0
            weights.restore(weights.clients[0])
            server.running = 1

        server.restart()
        server.writes = restart_once  # this answer is of the initial weights, and arrives when the server is restored
        assert first_tokens(made, 3) == {3: 60}
    assert server.prompts == [1, 2, 2, 3, 3]


@pytest.mark.parametrize("step", ["loading", "comparing"])
def test_a_server_that_another_rank_restores_meanwhile_keeps_the_other_mark_and_its_turns(restarts, step):
    """With a new mark, that rank would discard good answers of its turns."""
    server, _, weights = restarts
    weights.sync()
    server.restart()
    server.aborted.clear()

    def restored():
        server.version, server.running = f"{weights.version}.other", 1

    setattr(server, step, restored)
    assert weights.restore(weights.clients[0]) == server.version == f"{weights.version}.other"
    assert not server.aborted.is_set()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "its logprobs_mode is 'raw_logprobs', but was 'processed_logprobs'"),
        ({"max_logprobs": 5, "replicas": 2}, "its max_logprobs is 5, but was 20, replicas is 2, but was 1"),
    ],
)
def test_a_server_that_is_restarted_with_other_settings_ends_the_run(restarts, settings, named):
    server, made, weights = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.restart(**settings)
        with pytest.raises(ConfigError, match=rf"http\S+ was restarted with other settings: {named}\. .* flags"):
            first_tokens(made, 2)
    weights._trained = lambda: (2, 1)
    with pytest.raises(ConfigError, match=named):  # before an update
        weights.sync()


def test_a_server_that_is_restarted_with_other_settings_during_an_update_ends_the_run(tmp_path):
    with Loopback(server := Restarts()) as loopback:

        def answer(asked: Asked) -> Reply:
            if asked.path == "/collective_rpc":
                server.restart(logprobs_mode="raw_logprobs")
                return Reply(headers={"Content-Length": "9"}, stream=lambda file: None)  # the connection ends
            return server(asked)

        weights = moving(loopback.url, tmp_path)
        loopback.answer = answer
        with pytest.raises(ConfigError, match="its logprobs_mode is 'raw_logprobs'"):
            weights.sync()


@pytest.mark.parametrize(("status", "message"), [(404, "has no /weight_info .*DEV_MODE=1"), (401, "refuses access")])
def test_a_restarted_server_that_refuses_a_request_is_named_and_not_waited_for(restarts, status, message):
    server, made, weights = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        server.refuses = status
        with pytest.raises(ConfigError, match=rf"{weights.clients[0].url} {message}"):
            first_tokens(made, 2)


def test_a_server_that_works_for_another_job_keeps_that_jobs_weights_and_mark(restarts, tmp_path):
    server, made, weights = restarts
    other = moving(weights.clients[0].url, tmp_path / "other")
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        mark, loads = server.version, []
        server.loading = lambda: loads.append(1)
        ended = threading.Event()
        server.writes = lambda prompt: ended.wait(60)
        made.submit(turn(2))
        until(lambda: 2 in server.prompts)
        with pytest.raises(EngineError, match="could not reset its prefix cache, because other requests use it"):
            other.sync()
        assert (server.version, loads) == (mark, [])
        ended.set()
        assert first_tokens(made, submitted=1) == {2: 60}
    assert server.prompts == [1, 2]


def test_no_answer_of_a_server_that_another_job_took_counts(restarts, tmp_path):
    server, made, weights = restarts
    with made.session():
        assert first_tokens(made, 1) == {1: 60}
        other = moving(weights.clients[0].url, tmp_path / "other")

        def take(prompt):
            server.running, server.writes = 0, lambda prompt: None
            server.comparing = lambda: (answered.set(), taken.wait(60))  # its weights are loaded, without their mark
            pool.submit(other.sync)
            answered.wait(60)
            server.running = 1

        answered, taken = threading.Event(), threading.Event()
        server.writes = take
        with ThreadPoolExecutor(1) as pool, pytest.raises(EngineError, match="Another job has sent its weights to"):
            try:
                first_tokens(made, 2)
            finally:
                taken.set()
    assert server.prompts == [1, 2]
    assert server.version.startswith(f"{other.version}.")  # the other job keeps the server
    weights._trained = lambda: (2, 1)
    with pytest.raises(EngineError, match="Another job has sent its weights to"):
        weights.sync()
    assert server.version.startswith(f"{other.version}.")


def test_of_two_jobs_that_update_a_server_at_the_same_time_only_the_later_one_uses_it(restarts, tmp_path):
    server, _, weights = restarts
    others = []

    def also():
        server.comparing = lambda: None
        others.append(moving(weights.clients[0].url, tmp_path / "other"))
        others[0].sync()

    server.comparing = also
    with pytest.raises(EngineError, match="Another job has sent its weights to"):
        weights.sync()
    assert server.version.startswith(f"{others[0].version}.")


def test_a_server_that_another_job_marked_since_the_start_is_refused(restarts, tmp_path):
    server, _, weights = restarts
    other = moving(weights.clients[0].url, tmp_path / "other")
    weights.sync()
    with pytest.raises(EngineError, match="Another job has sent its weights to"):
        other.sync()
    assert server.version.startswith(f"{weights.version}.")
    moving(weights.clients[0].url, tmp_path / "later").sync()  # as a resumed run does


def test_an_adapter_that_another_rank_has_restored_stays_loaded(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    facts = [replace(A_SERVER, max_lora_rank=4)]
    transfer = DiskTransfer(model, Accelerator(cpu=True), tokenizer(), tmp_path, facts)
    with Loopback(server := Restarts()) as loopback:
        for _ in range(2):
            transfer.restore(client(loopback.url), "arpo-0-1")
        assert server.adapters == ["arpo-0-1"]
        assert not [asked.path for asked in loopback.asked if "unload" in asked.path]


def test_a_server_that_stops_while_it_loads_weights_but_keeps_its_connection_is_lost(monkeypatch):
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.05)
    loading, ended = threading.Event(), threading.Event()

    def load():
        loading.set()
        ended.wait(60)

    server = Restarts()
    server.loading = load
    with Loopback(server) as loopback, ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(client(loopback.url).load_weights, "/weights")
        assert loading.wait(60)
        loopback.__exit__()  # closes the port, and not the connection of the request
        try:
            with pytest.raises(ServerLost, match=rf"{loopback.url} failed at /collective_rpc"):
                loaded.result(30)
        finally:
            ended.set()


def test_a_turn_does_not_wait_for_a_server_that_stops_but_keeps_its_connection(tmp_path, monkeypatch):
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.05)
    ended = threading.Event()
    with Loopback(server := Restarts()) as loopback:
        server.writes = lambda prompt: ended.wait(60)
        made = engine(loopback.url, weights=moving(loopback.url, tmp_path), away_s=0.2)
        with made.session(), pytest.raises(EngineError, match=rf"{loopback.url} was unreachable for 0 s"):
            made.submit(turn(1))
            until(lambda: server.prompts)
            loopback.__exit__()  # closes the port, and not the connection of the turn
            until(lambda: made.poll(0.1))
    ended.set()


def test_moving_weights_from_a_gpu_is_refused_without_one():
    with pytest.raises(ConfigError, match=r"the trainer runs on 'cpu'. Set weight_sync: disk"):
        NcclTransfer(tiny_model(), Accelerator(cpu=True), tokenizer(), ["http://127.0.0.1:9"], 51216, 1.0)


def test_a_folder_for_weights_that_cannot_be_created_is_an_error_at_the_start(serve, tmp_path):
    url, _ = serve()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"weight_sync_dir .*file/weights cannot be created .* Choose another folder"
    ):
        DiskTransfer(
            tiny_model(), Accelerator(cpu=True), tokenizer(), tmp_path / "file" / "weights", [client(url).facts()]
        )


@pytest.mark.parametrize("name", ["default", "policy"])
def test_a_server_loads_an_adapter_of_any_name_from_the_folder_with_its_files(serve, tmp_path, name):
    url, seen = serve(v1__load_lora_adapter={})
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)
    facts = [replace(A_SERVER, max_lora_rank=4)]
    transfer = DiskTransfer(model, Accelerator(cpu=True), tokenizer(), tmp_path, facts)
    transfer.prepare("arpo-0-1")
    transfer.deliver(client(url), "arpo-0-1")
    folder = Path(seen[-1][1]["lora_path"])
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_runs_with_the_same_output_path_on_two_machines_have_two_folders_for_weights(tmp_path):
    output, copy = tmp_path / "a/grpo", tmp_path / "b/grpo"
    name = _name_of_run(str(output))
    assert _name_of_run(str(output)) == name and name.startswith("grpo-")  # a resumed run
    shutil.copytree(output, copy)
    assert _name_of_run(str(copy)) != name
    shutil.rmtree(output)  # another machine's folder with this path has nothing of this one's
    assert _name_of_run(str(output)) != name


def test_large_models_are_written_in_shards_that_hold_every_tensor_once(tmp_path, monkeypatch):
    monkeypatch.setattr("arpo_trl.rollout.engines.vllm.weights.SHARD_BYTES", 100)
    tensors = {f"layer{i}": torch.full((10,), float(i)) for i in range(5)} | {"steps": torch.tensor([1])}

    def changing():
        for name, tensor in tensors.items():
            yield name, tensor
            tensor.zero_()  # as unmerging an adapter would

    write_shards(tmp_path, changing(), torch.float64)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3  # two of 80 bytes each before the limit is passed
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert sorted(written) == sorted(tensors)
    assert written["layer3"].tolist() == [3.0] * 10 and written["layer3"].dtype == torch.float64
    assert written["steps"].dtype == torch.int64


@pytest.mark.parametrize(("key", "sent"), [("abcdefgh1234\n", "Bearer abcdefgh1234"), ("", None)])
def test_a_key_is_sent_without_the_line_end_of_its_file(monkeypatch, key, sent):
    monkeypatch.setenv(VLLM_KEY_VARIABLE, key)
    assert headers().get("Authorization") == sent


def test_a_key_that_no_header_can_have_is_named(monkeypatch):
    monkeypatch.setenv(VLLM_KEY_VARIABLE, "schlüssel1234")
    with pytest.raises(ConfigError, match=f"{VLLM_KEY_VARIABLE} contains characters that are not allowed"):
        headers()


@pytest.mark.parametrize(
    ("config", "is_plain"),
    [
        (LoraConfig(r=8), True),
        (LoraConfig(r=32), False),  # more than the server's
        (LoraConfig(r=8, alpha_pattern={"v_proj": 64}), False),
        (LoraConfig(r=8, rank_pattern={"v_proj": 4}), False),
        (LoraConfig(r=8, use_dora=True), False),
        (LoraConfig(r=8, use_rslora=True, lora_dropout=0.1, init_lora_weights="gaussian"), True),
        (LoraConfig(r=8, init_lora_weights="pissa"), False),
        (LoraConfig(r=8, lora_bias=True), False),
        (LoraConfig(r=8, modules_to_save=["lm_head"]), False),
        (AdaLoraConfig(init_r=8, total_step=10), False),
        (VBLoRAConfig(num_vectors=8, vector_length=4, topk=2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_an_adapter_with_one_rank_and_one_scaling_is_sent_as_it_is(config, is_plain):
    config.target_modules, config.task_type = {"q_proj", "v_proj"}, "CAUSAL_LM"
    assert is_plain_adapter(get_peft_model(tiny_model(), config), [replace(A_SERVER, max_lora_rank=16)]) == is_plain
