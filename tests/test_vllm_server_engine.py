"""The server engine against real vLLM servers on loopback. Most tests share one server."""

import contextlib
import copy
import threading
from collections import Counter

import httpx
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.rollout.batch import GroupRequest, TreeSettings
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.topk_entropy import entropy_from_top_k
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.engines.vllm.client import CANARY_TEXT, FRESH, ServerClient, check_server
from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine
from arpo_trl.rollout.engines.vllm.weights import DiskTransfer, ServedWeights
from arpo_trl.rollout.protocols import ContentEncoder, TagProtocol
from arpo_trl.rollout.rules.random import Random
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from servers import running
from support import (
    EXACT,
    ON_CPU,
    events_of,
    python,
    save_sharp_model,
    saved_adapter_is_the_trained_one,
    search,
    tokenizer,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [tokenizer().encode("the melting point of iron " * (1 + i % 4)) for i in range(12)]
EOS = int(tokenizer().eos_token_id)
PROBE = tokenizer().encode(CANARY_TEXT)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_sharp_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with running(model_path, log, "--enable-lora", "--max-lora-rank", "8") as made:
        yield made


@pytest.fixture(scope="module")
def half_server(model_path, tmp_path_factory):
    """A server that computes in the default precision of training."""
    log = tmp_path_factory.mktemp("half_server") / "log"
    with running(model_path, log, "--dtype", "bfloat16", "--enable-lora", "--max-lora-rank", "8") as made:
        yield made


@pytest.fixture
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def logprobs_of(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()


class Setup:
    """An engine on servers, with a step to turn and a model to change."""

    def __init__(self, model, folder, *servers, stop=(), top_logprobs=20, tolerance=0.01, away_s=60.0, **settings):
        self.step = 0
        self.settings = SamplingParams(eos_ids=(EOS,), stop_strings=tuple(stop), **settings)
        self.clients = [ServerClient(server.url, timeout_s=120.0) for server in servers]
        facts = [check_server(client, tokenizer(), top_logprobs) for client in self.clients]
        accelerator = Accelerator(cpu=True)
        self.transfer = DiskTransfer(model, accelerator, tokenizer(), folder, facts)
        self.weights = ServedWeights(
            self.clients,
            facts,
            self.transfer,
            accelerator,
            lambda: (self.step, 0),
            lambda ids: logprobs_of(model, ids),
            PROBE,
            tolerance,
        )
        self.engine = VLLMServerEngine(
            tokenizer(),
            self.settings,
            self.weights,
            vocab_size=model.config.vocab_size,
            top_logprobs=top_logprobs,
            away_s=away_s,
            request_s=120.0,
        )

    def run(self, requests, during=lambda turns: None):
        """Everything that happened, turns by id and probes by id."""
        turns, probes = {}, {}
        with self.engine.session():
            for request in requests:
                self.engine.submit(request)
            for event in events_of(self.engine, len(requests)):
                (turns if isinstance(event, Turn) else probes)[event.id] = event
                during(turns)
        return turns, probes


ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)], "task": "math"} for i in range(8)]
)


def trainer(model_path, folder, server, *, rows=ROWS, eval_dataset=None, peft_config=None, **settings) -> ARPOTrainer:
    """One that samples through the server, 8 leaves a step, rewarded so that something is learned."""
    settings = {"max_steps": 2, "save_strategy": "no", "vllm_server_timeout": 60.0, **settings}
    return ARPOTrainer(
        model=model_path,
        reward_funcs=lambda completions, **columns: [float(i % 3) for i in range(len(completions))],
        args=ARPOConfig(
            str(folder),
            use_vllm=True,
            vllm_mode="server",
            vllm_server_urls=[server.url],
            weight_sync="disk",
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=60,
            entropy_probe_tokens=5,
            learning_rate=1e-3,
            **{**ON_CPU, **settings},
        ),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        tools=[search, python],
        peft_config=peft_config,
    )


class KillAfterStep(TrainerCallback):
    def __init__(self, server, step):
        self.server, self.step = server, step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.server.kill()


def requests(which=range(12), max_tokens=24, probe=5, seed=100):
    return [
        TurnRequest(id=i, ids=PROMPTS[i], max_tokens=max_tokens, probe_tokens=probe, seed=seed + i, key=(i, 0))
        for i in which
    ]


def full_forward(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0].float()
    return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]


def test_logprobs_are_those_of_a_full_forward_and_entropies_within_their_bound(server, model, tmp_path):
    turns, probes = Setup(model, tmp_path, server).run(requests())
    assert len(turns) == 12 and probes
    errors, bounds = [], []
    for i, turn in turns.items():
        expected = full_forward(model, PROMPTS[i], turn.ids)
        chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-3, rtol=1e-3)
        exact = (-(expected.exp() * expected).sum(-1)[:5]).tolist()
        for row, entropy, estimate in zip(expected, exact, turn.entropies, strict=False):
            bound = entropy_from_top_k(row.topk(20).values.tolist(), model.config.vocab_size).error
            assert abs(estimate - entropy) <= bound + 1e-3
            errors.append(abs(estimate - entropy))
            bounds.append(bound)
        if i in probes:
            assert probes[i].entropies == turn.entropies
    assert sum(errors) / len(errors) < 0.15  # nats, of entropies of 0 to ln V = 6.2


def test_entropies_agree_with_the_transformers_engines_on_the_same_tokens(server, model, tmp_path):
    """Greedy, so that both write the same; with every logprob asked for there is no tail to estimate."""
    ours, _ = Setup(model, tmp_path, server, temperature=0.0).run(requests())
    exact_engine = TransformersEngine(
        tokenizer(), SamplingParams(eos_ids=(EOS,), temperature=0.0), lambda: contextlib.nullcontext(model)
    )
    with exact_engine.session():
        for request in requests():
            exact_engine.submit(request)
        written = events_of(exact_engine, len(requests()))
        exact = {event.id: event for event in written if isinstance(event, Turn)}
    assert {i: turn.ids for i, turn in ours.items()} == {i: turn.ids for i, turn in exact.items()}
    for i, turn in ours.items():
        assert turn.entropies == pytest.approx(exact[i].entropies, abs=1.0)


def test_a_repeated_run_samples_the_same_and_other_seeds_do_not(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    first, _ = setup.run(requests())
    again, _ = setup.run(requests())
    other, _ = setup.run(requests(seed=900))
    assert {i: turn.ids for i, turn in first.items()} == {i: turn.ids for i, turn in again.items()}
    assert sum(first[i].ids != other[i].ids for i in first) > 8


def test_chunked_prompts_sample_the_same_tokens_as_alone(server, model, tmp_path):
    """40 prompts of 200 tokens do not fit into one step of 2,048."""
    setup = Setup(model, tmp_path, server)
    long = [
        TurnRequest(
            id=i, ids=[40 + i, *(PROMPTS[3] * 50)[:199]], max_tokens=12, probe_tokens=4, seed=500 + i, key=(i, 0)
        )
        for i in range(40)
    ]
    together, _ = setup.run(long)
    alone = {request.id: setup.run([request])[0][request.id] for request in long[::8]}
    assert len(together) == 40
    assert {i: together[i].ids for i in alone} == {i: turn.ids for i, turn in alone.items()}


def test_equal_prompts_with_different_seeds_write_different_turns(server, model, tmp_path):
    same = [
        TurnRequest(id=i, ids=PROMPTS[3], max_tokens=12, probe_tokens=4, seed=70 + i, key=(0, i)) for i in range(6)
    ]
    turns, _ = Setup(model, tmp_path, server).run(same)
    assert len({tuple(turn.ids) for turn in turns.values()}) > 3


def test_a_probe_precedes_its_turn_and_the_turn_continues_from_it(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    wanted = requests(max_tokens=200, probe=4)
    with setup.engine.session():
        for request in wanted:
            setup.engine.submit(request)
        seen = list(events_of(setup.engine, len(wanted)))
    order = [(event.id, type(event)) for event in seen]
    long = {event.id for event in seen if isinstance(event, Turn) and len(event.ids) > 4}
    assert long
    for i in long:
        assert order.index((i, Probe)) < order.index((i, Turn))
        assert order.count((i, Probe)) == 1


def test_each_turn_has_its_own_length_budget(server, model, tmp_path):
    wanted = [
        TurnRequest(id=i, ids=PROMPTS[i], max_tokens=1 + 3 * i, probe_tokens=5, seed=i, key=(i, 0)) for i in range(8)
    ]
    turns, _ = Setup(model, tmp_path, server).run(wanted)
    for request in wanted:
        turn = turns[request.id]
        assert 1 <= len(turn.ids) <= request.max_tokens
        assert (turn.stop is TurnStop.LENGTH) <= (len(turn.ids) == request.max_tokens)
        assert len(turn.logprobs) == len(turn.ids)
        assert len(turn.entropies) == min(5, len(turn.ids))


def test_a_fully_used_context_is_not_an_error(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    prompt = (PROMPTS[3] * 100)[: setup.engine.max_length - 3]
    turns, _ = setup.run([TurnRequest(id=0, ids=prompt, max_tokens=3, probe_tokens=2, seed=1, key=(0, 0))])
    assert 1 <= len(turns[0].ids) <= 3
    assert setup.engine.max_length == 1024  # the server's, not the model's 4096


def test_eos_ends_a_turn_and_stays_in_its_ids(server, model, tmp_path):
    eos = Setup(model, tmp_path / "a", server).run(requests([2]))[0][2].ids[8]  # becomes the end
    setup = Setup(model, tmp_path / "b", server)
    setup.engine._settings = SamplingParams(eos_ids=(eos,))
    setup.engine._params["stop_token_ids"] = [eos]
    turn = setup.run(requests([2]))[0][2]
    assert turn.stop is TurnStop.EOS
    assert turn.ids.index(eos) == len(turn.ids) - 1


@pytest.mark.parametrize("place", [2, 7, 12])
def test_a_stop_string_ends_a_turn_after_the_token_that_completes_it(server, model, tmp_path, place):
    """Stop strings made of what the model writes: within the probe, across its end, after it; of parts of tokens."""
    free = Setup(model, tmp_path / "a", server).run(requests([1], probe=8))[0][1]
    text = [tokenizer().decode(free.ids[: n + 1]) for n in range(len(free.ids))]
    start = len(text[place - 1]) - 1  # the last character of one token …
    stop = text[place + 1][start : len(text[place]) + 1]  # … to the first of the one after the next
    end = next(n for n in range(len(free.ids)) if stop in text[n])
    turn = Setup(model, tmp_path / "b", server, stop=[stop]).run(requests([1], probe=8))[0][1]
    assert turn.stop is TurnStop.STOP_STRING
    assert turn.ids == free.ids[: end + 1]


def test_a_stop_string_of_an_earlier_turn_ends_nothing_where_a_request_begins_within_a_character(
    server, model, tmp_path
):
    """vLLM then takes the prompt for part of what it wrote."""
    encode = ContentEncoder(tokenizer())
    prompt = encode("x</search> and é")[:-1]
    assert tokenizer().decode(prompt).endswith("\ufffd")
    body = {
        "prompt": prompt,
        "max_tokens": 20,
        "stop": ["</search>"],
        "skip_special_tokens": False,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body | {"seed": 3}, timeout=60.0).json()["choices"][0]
    assert answer["finish_reason"] == "stop"  # should this fail, vLLM no longer does so
    turns, _ = Setup(model, tmp_path, server, stop=["</search>"]).run(
        [TurnRequest(id=0, ids=prompt, max_tokens=20, probe_tokens=5, seed=3, key=(0, 0))]
    )
    assert len(turns[0].ids) == 20 or turns[0].stop is TurnStop.EOS


def test_a_turn_continues_from_the_stop_string_that_ended_it(server, model, tmp_path):
    free = Setup(model, tmp_path / "a", server).run(requests([1]))[0][1]
    stop = tokenizer().decode(free.ids[7:8])
    setup = Setup(model, tmp_path / "b", server, stop=[stop])
    first = setup.run(requests([1]))[0][1]
    assert first.stop is TurnStop.STOP_STRING
    rest = setup.run(
        [TurnRequest(id=2, ids=PROMPTS[1] + first.ids, max_tokens=9, probe_tokens=3, seed=5, key=(1, 0), after=1)]
    )[0][2]
    turn = first.followed_by(rest)
    assert rest.ids
    assert len(turn.logprobs) == len(turn.versions) == len(turn.ids)
    expected = full_forward(model, PROMPTS[1], turn.ids)
    chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-3, rtol=1e-3)


def test_a_special_token_is_a_stop_string_too(server, model, tmp_path):
    with torch.no_grad():  # makes it likely
        tag = tokenizer().convert_tokens_to_ids("</search>")
        model.lm_head.weight[tag] = 0.05
    setup = Setup(model, tmp_path, server, stop=["</search>"], temperature=2.0)
    turns, _ = setup.run(requests(max_tokens=400))
    stopped = [turn for turn in turns.values() if turn.stop is TurnStop.STOP_STRING]
    assert stopped
    for turn in stopped:
        assert turn.ids.index(tag) == len(turn.ids) - 1


def test_settings_shape_the_distribution_that_logprobs_and_entropies_speak_of(server, model, tmp_path):
    turns, _ = Setup(model, tmp_path, server, top_k=2, temperature=0.7).run(requests())
    for i, turn in turns.items():
        assert all(value <= 0.6932 for value in turn.entropies)  # at most ln 2 with two tokens
        expected = full_forward(model, PROMPTS[i], turn.ids) / 0.7
        kept = expected.topk(2).values
        chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1) - kept.logsumexp(-1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-3, rtol=1e-3)


def test_a_turn_that_joins_later_is_written_meanwhile(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    with setup.engine.session():
        setup.engine.submit(TurnRequest(id=0, ids=PROMPTS[0], max_tokens=900, probe_tokens=4, seed=1, key=(0, 0)))
        setup.engine.submit(TurnRequest(id=1, ids=PROMPTS[1], max_tokens=3, probe_tokens=4, seed=1, key=(1, 0)))
        done = [event.id for event in events_of(setup.engine, 2) if isinstance(event, Turn)]
    assert done == [1, 0]


def test_a_session_that_fails_leaves_nothing_behind(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    with pytest.raises(RuntimeError), setup.engine.session():
        setup.engine.submit(TurnRequest(id=0, ids=PROMPTS[0], max_tokens=900, probe_tokens=4, seed=1, key=(0, 0)))
        raise RuntimeError
    assert not [thread for thread in threading.enumerate() if thread.name == "vllm-server-engine"]
    assert len(setup.run(requests([1]))[0]) == 1


def test_requests_outside_a_session_and_without_room_are_refused(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    with pytest.raises(EngineError, match="outside a session"):
        setup.engine.submit(requests([0])[0])
    with setup.engine.session(), pytest.raises(EngineError, match="expected at least 1 of each"):
        setup.engine.submit(TurnRequest(id=0, ids=PROMPTS[0], max_tokens=0, probe_tokens=5, seed=1, key=(0, 0)))


def test_what_a_server_refuses_is_an_error_that_names_it(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    too_long = TurnRequest(id=0, ids=PROMPTS[3] * 200, max_tokens=10, probe_tokens=5, seed=1, key=(0, 0))
    with pytest.raises(EngineError, match=rf"{server.url} could not complete a request .*context length"):
        setup.run([too_long])


def test_trees_branch_after_results_and_every_token_has_the_logprob_of_its_path(server, model, tmp_path):
    """A model that closes calls it never opened: each is refused, and each refusal branches while leaves are left."""
    with torch.no_grad():
        model.lm_head.weight[tokenizer().convert_tokens_to_ids("</search>")] = 0.05
    setup = Setup(model, tmp_path, server, stop=["</search>"], temperature=2.0)
    toolbox = ToolBox([search])
    protocol = TagProtocol(tokenizer(), toolbox.specs)
    always = Random(branch_probability=1.0)
    sampler = TreeSampler(
        setup.engine,
        toolbox,
        protocol,
        TreeSettings(
            num_generations=6,
            initial_rollouts=2,
            max_completion_length=400,
            max_length=1024,
            max_tool_calls=3,
            entropy_probe_tokens=5,
            rule=always,
        ),
    )
    with toolbox:
        rollout = sampler.sample([GroupRequest(id=i, prompt_ids=PROMPTS[i]) for i in range(3)], seed=(1,))
    assert sum(len(node.children) > 1 for tree in rollout.trees for node in tree.observations()) >= 3
    for tree in rollout.trees:
        for leaf in tree.leaves():
            expected = (full_forward(model, tree.root.ids, leaf.ids) / 2.0).log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(leaf.ids).unsqueeze(1)).squeeze(1)
            written = torch.tensor(leaf.mask).bool()
            torch.testing.assert_close(torch.tensor(leaf.logprobs)[written], chosen[written], atol=2e-3, rtol=1e-3)


# Weights -------------------------------------------------------------------------------------------------------------


def shift(model, scale=0.02):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def test_new_weights_change_the_samples_and_are_synced_once_per_step(server, model, tmp_path):
    setup = Setup(model, tmp_path, server)
    first, _ = setup.run(requests())
    shift(model)
    unsynced, _ = setup.run(requests())  # the step has not moved on
    assert {i: turn.ids for i, turn in unsynced.items()} == {i: turn.ids for i, turn in first.items()}
    setup.step = 1
    second, _ = setup.run(requests())
    assert {i: turn.ids for i, turn in second.items()} != {i: turn.ids for i, turn in first.items()}
    for i, turn in second.items():
        expected = full_forward(model, PROMPTS[i], turn.ids).gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), expected, atol=1e-3, rtol=1e-3)
    assert [folder.name for folder in tmp_path.iterdir()] == [setup.weights.version]  # older ones are gone
    assert setup.clients[0].weight_version().startswith(f"{setup.weights.version}.")


def test_broken_weights_are_noticed_after_the_sync(server, model, tmp_path, monkeypatch):
    setup = Setup(model, tmp_path, server)
    setup.run(requests([0]))
    shift(model)
    wrong = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)
    shift(wrong)
    monkeypatch.setattr(setup.transfer._parameters, "model", wrong)
    setup.step = 1
    with pytest.raises(EngineError, match=rf"{server.url} does not serve the trainer's weights"):
        setup.run(requests([0]))


def test_a_server_that_loads_nothing_is_noticed_even_within_the_tolerance(server, model, tmp_path, monkeypatch):
    setup = Setup(model, tmp_path, server, tolerance=5.0)
    setup.run(requests([0]))
    monkeypatch.setattr(ServerClient, "load_weights", lambda self, folder: None)  # answers 200, loads nothing
    shift(model, 0.05)
    setup.step = 1
    with pytest.raises(EngineError, match=rf"{server.url} still serves old weights"):
        setup.run(requests([0]))


def test_only_the_adapter_is_sent_if_the_server_accepts_adapters(server, model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    setup = Setup(adapted, tmp_path, server)
    assert setup.transfer.sends_adapter
    # earlier tests have left other weights in the base
    setup.clients[0].load_weights(model.name_or_path)
    for step in range(3):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        setup.step = step
        turns, _ = setup.run(requests([0, 1]))
        for i, turn in turns.items():
            expected = full_forward(adapted, PROMPTS[i], turn.ids)
            chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-3, rtol=1e-3)
    files = sorted(path.name for path in (tmp_path / setup.weights.version).iterdir())
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    served = [entry["id"] for entry in httpx.get(f"{server.url}/v1/models").json()["data"]]
    assert setup.weights.version in served and len(served) == 2


@pytest.mark.parametrize("settings", [{"r": 64}, {"r": 4, "use_dora": True}, {"r": 4, "modules_to_save": ["norm"]}])
def test_an_adapter_that_vllm_cannot_take_is_merged(server, model, tmp_path, settings):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **settings)).eval()
    setup = Setup(adapted, tmp_path, server)
    assert not setup.transfer.sends_adapter
    shift(adapted)
    turns, _ = setup.run(requests([0]))
    expected = full_forward(adapted, PROMPTS[0], turns[0].ids)
    chosen = expected.gather(1, torch.tensor(turns[0].ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(turns[0].logprobs), chosen, atol=1e-3, rtol=1e-3)


# Restarts ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)  # two starts of a server
def test_a_rollout_continues_with_current_weights_after_its_server_is_killed_and_restarted(
    server, model_path, model, tmp_path
):
    setup = Setup(model, tmp_path / "weights", server, away_s=170.0)
    shift(model)  # so that what the restarted server starts with is stale
    killed = []

    def kill_once(turns):
        if turns and not killed:
            killed.append(set(turns))
            server.kill()
            server.start()

    wanted = [
        TurnRequest(id=i, ids=PROMPTS[i], max_tokens=40 + 150 * (i % 2), probe_tokens=5, seed=i, key=(i, 0))
        for i in range(12)
    ]
    turns, _ = setup.run(wanted, during=kill_once)
    assert len(turns) == 12
    assert killed and len(killed[0]) < 12
    for i, turn in turns.items():
        expected = full_forward(model, PROMPTS[i], turn.ids)
        chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(turn.logprobs), chosen, atol=1e-3, rtol=1e-3)
    # And where it stays away, the step fails with its name, and a resumed run goes on from the one before.
    saved = {"save_strategy": "steps", "save_steps": 1}
    made = trainer(model_path, tmp_path / "run", server, vllm_server_timeout=1.0, **saved, **EXACT)
    made.add_callback(KillAfterStep(server, 1))
    with pytest.raises(EngineError, match=rf"{server.url} (was unreachable|did not come up|failed at)"):
        made.train()
    assert made.state.global_step == 1
    server.start().wait()
    resumed = trainer(model_path, tmp_path / "run", server, **EXACT)
    resumed.train(resume_from_checkpoint=True)
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2]
    assert resumed.state.log_history[-2]["sampling/sampling_logp_difference/mean"] < 1e-4  # both in float32


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_through_a_server_samples_from_the_weights_that_it_updates(
    half_server, model_path, tmp_path, caplog, lora
):
    """In the default precision: float32 weights, or an adapter on bfloat16 ones, under bfloat16's autocast."""
    ServerClient(half_server.url, timeout_s=60.0).load_weights(model_path)  # another test has left its own
    settings = {}
    if lora:
        settings["peft_config"] = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])
        settings["model_init_kwargs"] = {"dtype": "bfloat16"}
    made = trainer(model_path, tmp_path, half_server, max_steps=3, **settings)
    assert "Training computes in" not in caplog.text
    assert made.tree_sampler.settings.max_length == 1024  # the server's
    made.train()
    log = [row for row in made.state.log_history if "loss" in row]
    assert len(log) == 3
    for row in log:
        assert 0.0 < row["sampling/sampling_logp_difference/mean"] < 0.02
        assert row["sampling/importance_sampling_ratio/max"] <= 3.0  # token_truncate
    assert made.vllm_importance_sampling_mode == "token_truncate"
    version = made.tree_sampler.engine._weights.version
    assert version.endswith("-3")  # one sync a step
    assert [folder.name for folder in (tmp_path / "served_weights").iterdir()] == [version]
    assert not lora or saved_adapter_is_the_trained_one(made, model_path)


def test_a_different_precision_or_distribution_than_trained_is_logged(server, model_path, tmp_path, caplog):
    ServerClient(server.url, timeout_s=60.0).load_weights(model_path)
    trainer(model_path, tmp_path, server, top_p=0.95)
    assert "top_p make vLLM's sampling distribution differ from the trained distribution" in caplog.text
    assert f"Training computes in bfloat16, but {server.url} in float32" in caplog.text
    assert "Set bf16: false for the trainer, or start the server with --dtype bfloat16." in caplog.text


def test_a_prompt_longer_than_the_server_allows_is_refused_before_the_first_step(server, model_path, tmp_path):
    rows = Dataset.from_list([{"prompt": "iron " * 1100, "answer": ["1"], "task": "math"}])
    with pytest.raises(ConfigError, match=r"Dataset row 0: .* but the context is 1024, .*a server's --max-model-len"):
        trainer(model_path, tmp_path, server, rows=rows)


# What is wrong before the first step -------------------------------------------------------------------------------


def test_too_few_logprobs_are_refused_with_the_flag_to_change(server):
    with pytest.raises(ConfigError, match=r"at most 20 logprobs, but entropy_top_logprobs is 21.*--max-logprobs 21"):
        check_server(ServerClient(server.url, timeout_s=60.0), tokenizer(), 21)


def test_another_tokenizer_is_refused(server):
    other = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(tokenizer().backend_tokenizer))
    other.add_tokens(["1,538 °C"])
    with pytest.raises(ConfigError, match="another tokenizer than the trainer"):
        check_server(ServerClient(server.url, timeout_s=60.0), other, 20)


def test_another_model_is_refused_before_weights_are_sent(server, model_path, model, tmp_path):
    client = ServerClient(server.url, timeout_s=60.0)
    client.load_weights(model_path)
    client.reset_prefix_cache()
    client.set_weight_version(FRESH)  # as if it had just been started
    setup = Setup(model, tmp_path, server)
    setup.weights.check_model()  # the trainer's own is fine
    shift(model, 0.2)
    with pytest.raises(ConfigError, match=rf"{server.url} serves .* not the trainer's model"):
        Setup(model, tmp_path, server).weights.check_model()


# Weights that arrive during a rollout --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_turns_continue_with_new_weights_and_every_token_has_the_logprob_of_its_version(
    server, model_path, model, tmp_path, adapter
):
    ServerClient(server.url, timeout_s=60.0).load_weights(model_path)  # another test has left its own
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    setup = Setup(model, tmp_path, server)
    before = copy.deepcopy(model).eval()
    moved = []

    def move_once(turns):
        if not moved:
            moved.append(True)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if not adapter or "lora_B" in name:
                        parameter.add_(0.05 * torch.randn(parameter.shape))
            setup.step = 1
            setup.engine.sync()

    wanted = [TurnRequest(id=i, ids=PROMPTS[i], max_tokens=600, probe_tokens=5, seed=i, key=(i, 0)) for i in range(12)]
    turns, _ = setup.run(wanted, during=move_once)
    assert moved and len(turns) == 12
    versions = {version for turn in turns.values() for version in turn.versions}
    assert versions == {0, 1}
    for i, turn in turns.items():
        assert len(turn.versions) == len(turn.ids) == len(turn.logprobs)
        assert turn.versions == sorted(turn.versions)
        assert len(turn.entropies) == min(5, len(turn.ids))
        for version, by in ((0, before), (1, model)):
            of = [n for n, sampled_by in enumerate(turn.versions) if sampled_by == version]
            expected = full_forward(by, PROMPTS[i], turn.ids)
            chosen = expected.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(turn.logprobs)[of], chosen[of], atol=2e-3, rtol=2e-3)


class RestartsServer(TrainerCallback):
    """Kills and restarts the server during the updates before some steps, while rollouts run ahead."""

    def __init__(self, server, steps):
        self.server, self.steps = server, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.server.kill()
            self.server.start()


@pytest.mark.timeout(600)  # a start of a server
def test_rollouts_run_ahead_through_weight_updates_an_evaluation_and_a_restart(server, model_path, tmp_path):
    ServerClient(server.url, timeout_s=60.0).load_weights(model_path)  # another test has left its own
    rows = Dataset.from_list([{"prompt": f"what is {i}", "answer": [str(i)], "task": "math"} for i in range(16)])
    made = trainer(
        model_path,
        tmp_path,
        server,
        rows=rows,
        eval_dataset=rows.select(range(2)),
        rollouts_ahead=2,
        max_steps=8,
        vllm_server_timeout=170.0,
        eval_strategy="steps",
        eval_steps=3,
        trajectory_log_rate=1.0,
        **EXACT,
    )
    made.add_callback(RestartsServer(server, [4]))
    made.train()
    log = [row for row in made.state.log_history if "loss" in row]
    assert [row["step"] for row in log] == list(range(1, 9))
    assert log[0]["arpo/ahead/staleness_max"] == 0.0
    assert max(row["arpo/ahead/staleness_max"] for row in log) == 2.0
    # Sampling and training logprobs agree exactly, except those of older weights
    difference = [row["sampling/sampling_logp_difference/mean"] for row in log]
    assert difference[0] < 1e-4 < 1e-3 < max(difference)
    assert len([row for row in made.state.log_history if "eval_reward" in row]) == 3  # steps 3, 6 and 8
    evaluated = [tree for file in sorted((tmp_path / "trajectories").glob("eval-*")) for tree in read_trees(file)]
    assert {tree.step for tree in evaluated} == {3, 6, 8}
    for logged in evaluated:
        assert {version for node in logged.tree.turns() for version in node.versions} == {logged.step}
    trees = [tree for file in sorted((tmp_path / "trajectories").glob("step-*")) for tree in read_trees(file)]
    assert Counter(tree.prompt for tree in trees) == {tree.prompt: 1 for tree in trees}  # 16 rows, each once
    assert len(trees) == 16
    for logged in trees:
        for node in logged.tree.turns():
            assert len(node.versions) == len(node.ids)
            assert all(logged.step - 2 <= version <= logged.step for version in node.versions)
