"""The completions engine against a real server on loopback with several dialects of `/v1/completions`."""

import json
import math
import threading
import time

import httpx
import pytest

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.rollout.engines.base import SamplingParams, TurnFailed, TurnRequest, TurnStop
from arpo_trl.rollout.engines.completions import KEY_VARIABLE, CompletionsEngine
from arpo_trl.rollout.engines.vllm.client import CANARY_TEXT
from arpo_trl.rollout.protocols.base import ContentEncoder
from loopback import Asked, Loopback, Reply
from support import tokenizer, until

EOS = int(tokenizer().eos_token_id)
SETTINGS = SamplingParams(eos_ids=(EOS,), stop_strings=("</search>", "</python>"), temperature=0.6, top_p=0.95)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=False)


class Server:
    """`writes(prompt as text)` says what the model writes; `finish` why it ends."""

    def __init__(self, writes, *, ids: bool, finish: str = "stop", key: str | None = None, models=("tiny",)):
        self.writes, self.ids, self.finish, self.key, self.models = writes, ids, finish, key, models
        self.bodies: list[dict] = []
        self.lock = threading.Lock()

    def __call__(self, asked: Asked) -> Reply:
        if self.key is not None and asked.headers.get("authorization") != f"Bearer {self.key}":
            return Reply({"error": "who are you"}, status=401)
        if asked.path == "/v1/models":
            return Reply({"data": [{"id": name, "max_model_len": 512} for name in self.models]})
        body = asked.json
        if not self.ids and not isinstance(body["prompt"], str):
            return Reply({"error": "prompt must be text"}, status=400)
        if not body.get("stream"):
            return Reply({"choices": [{"text": "1", "token_ids": encode("1")}]})
        with self.lock:
            self.bodies.append(body)
        prompt = decode(body["prompt"]) if self.ids else body["prompt"]
        written = self.writes(prompt)
        return written if isinstance(written, Reply) else Reply(stream=lambda out: self.stream(out, written))

    def stream(self, out, text: str) -> None:
        ids = [*encode(text), *([EOS] if self.finish == "stop" else [])]
        for i, token in enumerate(ids):
            choice = {"text": "" if token == EOS else decode([token]), "finish_reason": None}
            if self.ids:
                choice["token_ids"] = [token]
            if i == len(ids) - 1:
                choice["finish_reason"] = self.finish
            event(out, {"choices": [choice]})
        event(out, {"choices": [], "usage": {"total_tokens": 3}})
        out.write(b"data: [DONE]\n\n")


def event(out, data) -> None:
    out.write(f"data: {json.dumps(data)}\n\n".encode())
    out.flush()


def request(number: int, text: str = "what is the answer", max_tokens: int = 50) -> TurnRequest:
    return TurnRequest(
        id=number, ids=encode(text), max_tokens=max_tokens, probe_tokens=0, seed=2**40 + number, key=(number, 0, 0)
    )


def outcomes(engine: CompletionsEngine, *requests: TurnRequest, within_s: float = 60.0) -> dict:
    """What came of each request, in one session."""
    done: dict = {}
    deadline = time.monotonic() + within_s
    with engine.session():
        for one in requests:
            engine.submit(one)
        while len(done) < len(requests) and time.monotonic() < deadline:
            done |= {result.id: result for result in engine.poll(0.1)}
    assert len(done) == len(requests)
    return done


def engine(server: Loopback, **settings) -> CompletionsEngine:
    return CompletionsEngine(server.url + "/v1", settings.pop("model", None), tokenizer(), SETTINGS, **settings)


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
def test_a_turn_that_ends_by_itself_has_its_tokens_and_an_eos(ids):
    with Loopback(server := Server(lambda prompt: f"seen: {prompt}", ids=ids)) as loopback:
        made = engine(loopback)
        assert (made.speaks_ids, made.max_length, made.vocab_size) == (ids, 512, len(tokenizer()))
        turn = outcomes(made, request(0))[0]
    assert turn.stop is TurnStop.EOS
    assert decode(turn.ids[:-1]) == "seen: what is the answer" and turn.ids[-1] == EOS
    assert len(turn.logprobs) == len(turn.ids) and all(map(math.isnan, turn.logprobs))
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("tiny", 50, 0.6, 0.95)
    assert body["seed"] < 2**31
    # A strict server is sent nothing that it may not know. vLLM reads missing fields from the model's config.
    assert ("return_token_ids" in body) is ids
    whole = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert whole.items() <= body.items() if ids else not whole.keys() & body.keys()


def test_a_tool_cannot_write_control_tokens_into_the_text_of_a_prompt():
    eos = tokenizer().eos_token
    asked = [*encode("iron"), EOS, *ContentEncoder(tokenizer())(f"1538 {eos}{eos} C"), EOS]
    with Loopback(server := Server(lambda prompt: "fine", ids=False)) as loopback:
        outcomes(engine(loopback), TurnRequest(id=0, ids=asked, max_tokens=9, probe_tokens=0, seed=1, key=(0, 0, 0)))
    (body,) = server.bodies
    assert [token for token in encode(body["prompt"]) if token == EOS] == [EOS] * asked.count(EOS)
    assert body["prompt"].replace(f"{eos[0]} {eos[1:]}", eos) == decode(asked)


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
@pytest.mark.parametrize("call", ["<search>iron</search>", "<think>x</think> <python>print(1)</python>"])
def test_a_turn_ends_with_its_call_even_if_the_server_continues(ids, call):
    with Loopback(Server(lambda prompt: call + "<result>made up</result> and on and on", ids=ids)) as loopback:
        turn = outcomes(engine(loopback), request(0))[0]
    assert turn.stop is TurnStop.STOP_STRING
    assert decode(turn.ids) == call


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
def test_a_turn_that_runs_out_of_room_has_no_eos(ids):
    with Loopback(Server(lambda prompt: "melting point of iron", ids=ids, finish="length")) as loopback:
        turn = outcomes(engine(loopback), request(0))[0]
    assert turn.stop is TurnStop.LENGTH
    assert decode(turn.ids) == "melting point of iron"


def test_many_turns_run_concurrently_and_a_slow_turn_delays_no_other():
    gate = threading.Event()

    def writes(prompt):
        if prompt.endswith("0"):
            gate.wait(60)
        return f"it is {prompt[-1]}"

    with Loopback(Server(writes, ids=False)) as loopback:
        made = engine(loopback)
        with made.session():
            for i in range(8):
                made.submit(request(i, f"what is {i}"))
            done: dict = {}
            while len(done) < 7:
                done |= {turn.id: turn for turn in made.poll(1.0)}
            assert 0 not in done
            gate.set()
            while len(done) < 8:
                done |= {turn.id: turn for turn in made.poll(1.0)}
    assert [decode(done[i].ids[:-1]) for i in range(8)] == [f"it is {i}" for i in range(8)]


def test_a_turn_rejected_by_the_server_fails_alone_and_immediately():
    def writes(prompt):
        return Reply({"error": "too long"}, status=400) if prompt.endswith("1") else "fine"

    with Loopback(server := Server(writes, ids=False)) as loopback:
        done = outcomes(engine(loopback), *(request(i, f"what is {i}") for i in range(3)))
    assert [type(done[i]).__name__ for i in range(3)] == ["Turn", "TurnFailed", "Turn"]
    assert done[1].reason == "The server answered 400."
    assert len(server.bodies) == 3


def test_temporary_failures_are_retried(monkeypatch):
    monkeypatch.setattr("arpo_trl.rollout.engines.completions.RETRY_S", 0.01)
    tries: list[str] = []

    def writes(prompt):
        tries.append(prompt)
        return Reply("busy", status=503) if len(tries) < 3 else "fine"

    with Loopback(Server(writes, ids=False)) as loopback:
        turn = outcomes(engine(loopback), request(0))[0]
    assert decode(turn.ids[:-1]) == "fine"
    assert len(tries) == 3


@pytest.mark.parametrize("ids", [True, False], ids=["token ids", "text"])
@pytest.mark.parametrize(
    "cut",
    [
        {"choices": [{"text": "", "finish_reason": "abort"}]},
        {"choices": [{"text": "", "finish_reason": "error"}]},
        {"choices": [{"text": "", "finish_reason": "content_filter"}]},
        {"error": {"message": "EngineCore encountered an issue", "code": 500}},
        {"error": {"message": "busy", "code": 429}},
    ],
    ids=["abort", "error", "content filter", "code 500", "code 429"],
)
def test_a_cut_answer_is_not_a_finished_turn(monkeypatch, ids, cut):
    monkeypatch.setattr("arpo_trl.rollout.engines.completions.RETRY_S", 0.01)
    half = {"choices": [{"text": "half", "token_ids": encode("half")}]}
    replies = [Reply(stream=lambda out: (event(out, half), event(out, cut), out.write(b"data: [DONE]\n\n")))]
    with Loopback(Server(lambda prompt: replies.pop() if replies else "whole", ids=ids)) as loopback:
        turn = outcomes(engine(loopback), request(0))[0]
    assert decode(turn.ids[:-1]) == "whole"


def test_empty_events_and_a_missing_last_line_end_do_no_harm():
    last = b'data: {"choices": [{"text": "done", "finish_reason": "stop"}]}'
    with Loopback(
        Server(lambda prompt: Reply(stream=lambda out: out.write(b"data:\n\n" + last)), ids=False)
    ) as loopback:
        turn = outcomes(engine(loopback), request(0))[0]
    assert decode(turn.ids[:-1]) == "done"


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (lambda out: event(out, {"choices": [{"text": "half a"}]}), "sent an incomplete answer"),
        (lambda out: out.write(b'data: {"choices": [{"te'), "sent an incomplete answer"),
        (lambda out: out.write(b"data: {not json}\n\n"), "could not be read"),
        (lambda out: event(out, ["choices"]), "answered with an error"),
        (lambda out: event(out, {"error": {"message": "died"}}), "answered with an error"),
        (lambda out: event(out, {"choices": ["text"]}), "unexpected format"),
        (lambda out: event(out, {"choices": [{"text": 3}]}), "could not be read"),
        (lambda out: event(out, {"choices": [{"text": "", "finish_reason": "length"}]}), "returned an empty answer"),
        (lambda out: out.write(b"data: " + b"x" * (2 << 20)), "answered with more than"),
    ],
)
def test_hostile_answers_fail_their_turn_and_nothing_else(monkeypatch, stream, reason):
    monkeypatch.setattr("arpo_trl.rollout.engines.completions.RETRY_S", 0.01)
    with Loopback(Server(lambda prompt: Reply(stream=stream), ids=False)) as loopback:
        failed = outcomes(engine(loopback), request(0))[0]
    assert isinstance(failed, TurnFailed)
    assert reason in failed.reason


def test_a_turn_of_a_server_that_goes_silent_fails_at_its_deadline_without_another_attempt():
    gate = threading.Event()
    with Loopback(Server(lambda prompt: Reply(stream=lambda out: gate.wait(60)), ids=False)) as loopback:
        made = engine(loopback)
        made._timeout_s = 0.3  # not of the requests for what the server serves
        failed = outcomes(made, request(0))[0]
        gate.set()
    assert failed.reason == "The server has not completed an answer within 0.3 s. Check its log."


def test_the_time_without_a_request_does_not_count_as_unreachable(monkeypatch):
    with Loopback(Server(lambda prompt: "fine", ids=False)) as loopback:
        made = engine(loopback, away_s=0.5)
        asks, refusals = made._ask, [httpx.ConnectError("refused")]

        async def ask(request):
            if refusals:
                raise refusals.pop()
            return await asks(request)

        monkeypatch.setattr(made, "_ask", ask)
        with made.session():
            time.sleep(0.7)  # a tool runs
            made.submit(request(0))
            events = []
            until(lambda: events.extend(made.poll(0.1)) or events)
    assert [decode(event.ids).removesuffix(decode([EOS])) for event in events] == ["fine"]


def test_a_server_that_stays_unreachable_fails_the_rollout_with_an_error():
    with Loopback(Server(lambda prompt: "fine", ids=False)) as loopback:
        made = engine(loopback, away_s=0.2)
    with pytest.raises(EngineError, match=r"is unreachable and has not answered for 0 s. Restart it"):
        outcomes(made, request(0))
    with made.session():
        assert made.poll(0.0) == []


def test_a_turn_does_not_wait_for_a_server_that_stops_but_keeps_its_connection(monkeypatch):
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.05)
    asked, ended = threading.Event(), threading.Event()

    def hang(out):
        asked.set()
        ended.wait(60)

    with Loopback(Server(lambda prompt: Reply(stream=hang), ids=False)) as loopback:
        made = engine(loopback, away_s=0.2)
        with made.session(), pytest.raises(EngineError, match="is unreachable"):
            made.submit(request(0))
            assert asked.wait(60)
            loopback.__exit__()  # closes the port, and not the connection of the turn
            until(lambda: made.poll(0.1))
    ended.set()


def test_the_checks_during_a_turn_have_the_key(monkeypatch):
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.05)
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    ended = threading.Event()
    answers = Server(lambda prompt: Reply(stream=lambda out: ended.wait(60)), ids=False, key="sesame")
    with Loopback(answers) as loopback:
        made = engine(loopback)
        with made.session():
            made.submit(request(0))
            until(lambda: [asked.path for asked in loopback.asked].count("/v1/models") >= 2)  # the engine's own first
        ended.set()
    assert {asked.headers.get("authorization") for asked in loopback.asked} == {"Bearer sesame"}


def test_a_session_that_is_left_early_leaves_nothing_behind():
    gate = threading.Event()
    with Loopback(Server(lambda prompt: Reply(stream=lambda out: gate.wait(60)), ids=False)) as loopback:
        made = engine(loopback)
        with made.session():
            made.submit(request(0))
            time.sleep(0.1)
        gate.set()
        with made.session():
            assert made.poll(0.2) == []


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("localhost:8000", ConfigError, "base_url must be an address like"),
        ("http://me:pass@localhost/v1", ConfigError, "without user name, password or query"),
        (
            "http://127.0.0.1:9/v1",
            EngineError,
            r"http://127.0.0.1:9/v1 did not list its models: the connection failed",
        ),
    ],
)
def test_addresses_that_cannot_be_are_named(url, error, message):
    with pytest.raises(error, match=message) as raised:
        CompletionsEngine(url, None, tokenizer(), SETTINGS)
    assert "pass@" not in str(raised.value)


def test_the_key_comes_from_the_environment_and_a_wrong_one_is_not_repeated(monkeypatch):
    with Loopback(Server(lambda prompt: "fine", ids=True, key="right-key")) as loopback:
        monkeypatch.setenv(KEY_VARIABLE, "wrong-key")
        with pytest.raises(
            ConfigError, match=f"refuses access. Set the environment variable {KEY_VARIABLE}"
        ) as raised:
            engine(loopback)
        assert "wrong-key" not in str(raised.value)
        monkeypatch.setenv(KEY_VARIABLE, "right-key")
        made = engine(loopback)
        assert "right-key" not in repr(vars(made))
        assert outcomes(made, request(0))[0].stop is TurnStop.EOS


def test_of_several_models_one_must_be_named():
    with Loopback(Server(lambda prompt: "fine", ids=True, models=("a", "b"))) as loopback:
        with pytest.raises(ConfigError, match=r"serves \['a', 'b'\]; served_model is None"):
            engine(loopback)
        assert engine(loopback, model="b").model == "b"


def test_a_server_that_gets_ids_must_have_the_models_tokenizer_if_it_can_be_asked():
    tokens: list = [*encode(CANARY_TEXT)]
    server = Server(lambda prompt: "fine", ids=True, models=("other",))

    def answer(asked):
        return Reply(*tokens) if asked.path == "/tokenize" else server(asked)

    with Loopback(answer) as loopback:
        tokens[:] = [{"tokens": encode(CANARY_TEXT)}]
        assert engine(loopback).speaks_ids
        (asked,) = (asked for asked in loopback.asked if asked.path == "/tokenize")
        assert asked.json == {"model": "other", "prompt": CANARY_TEXT, "add_special_tokens": False}
        tokens[:] = [{"tokens": [token + 1 for token in encode(CANARY_TEXT)]}]
        with pytest.raises(ConfigError, match=r"'other' has another tokenizer than model: .*, with other ids\. "):
            engine(loopback)
        for unknown in ("not found", 404), ("only /v1 is open", 403), ({"count": 3}, 200):
            tokens[:] = unknown
            assert engine(loopback).speaks_ids


def test_a_server_that_is_not_vllm_is_detected():
    for reply, message in (
        (Reply({"hello": "world"}), "lists no models under /models"),
        (Reply("no", status=404), "did not list its models: answered 404"),
    ):
        with Loopback(lambda asked, reply=reply: reply) as loopback, pytest.raises(EngineError, match=message):
            engine(loopback)


def test_a_server_adds_the_bos_to_a_text_itself():
    bos = encode("what")[0]

    class WithBos:
        """The tests' tokenizer as one that puts a BOS in front of texts."""

        bos_token_id = bos

        def __call__(self, text):
            return {"input_ids": [bos, *encode(text)]}

        def __getattr__(self, name):
            return getattr(tokenizer(), name)

        def __len__(self):
            return len(tokenizer())

    with Loopback(server := Server(lambda prompt: "fine", ids=False)) as loopback:
        made = CompletionsEngine(loopback.url + "/v1", None, WithBos(), SETTINGS)
        outcomes(
            made, TurnRequest(id=0, ids=[bos, *encode("iron is")], max_tokens=5, probe_tokens=0, seed=0, key=(0, 0, 0))
        )
    assert server.bodies[0]["prompt"] == "iron is"
