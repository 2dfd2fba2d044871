"""Colocated vLLM: results from a process with real vLLM, and the order of sleeping and of weight updates."""

import contextlib
import math
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.vllm.colocate import ColocatedWeights, VLLMColocateEngine
from arpo_trl.rollout.engines.weights import FixedWeights
from support import COMPILING, found_with_vllm, tiny_model, tokenizer, with_real_vllm


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict:
    """Here vLLM compiles its model, as for users; in other tests with a colocated vLLM it does not."""
    return found_with_vllm("vllm_colocated.py", tmp_path_factory.mktemp("colocated"), COMPILING)


@with_real_vllm
def test_logprobs_are_the_trainers_and_entropies_within_their_bound(findings):
    assert findings["first"]["logprobs"] < 0.01  # vLLM computes in bfloat16, what it is compared with in float32
    assert findings["first"]["entropies"] < 0.15
    assert findings["first"]["entropies_beyond_bound"] < 0.05


@with_real_vllm
def test_a_repeated_run_samples_the_same(findings):
    assert findings["again_equal"] == 12


@with_real_vllm
def test_turns_that_join_between_steps_are_written_with_the_others(findings):
    # In bfloat16 about one turn in twenty may differ by the rounding of another batch, on some CPUs
    assert findings["late_equal"] >= 6
    assert findings["lengths"] == [24] * 12


@with_real_vllm
def test_each_probe_comes_before_its_turn(findings):
    assert findings["probes_first"] and findings["probes"] == 12


@with_real_vllm
def test_a_stop_string_across_the_end_of_the_probe_ends_a_turn(findings):
    assert findings["stopped"] == {"stop": "stop_string", "equal": True}
    assert findings["stopped_in_probe"] == {"stop": "stop_string", "equal": True, "entropies": True}


@with_real_vllm
def test_a_session_that_fails_leaves_nothing_behind(findings):
    assert findings["left_behind"] == 0
    assert findings["after_failure"] == 12


@with_real_vllm
def test_training_samples_from_the_weights_that_it_updates(findings):
    assert findings["syncs"] == [0, 1]  # a training begins with a sync, and has one a step
    # float32 weights under bfloat16's autocast
    assert [row["sampling/sampling_logp_difference/mean"] < 0.02 for row in findings["log"]] == [True, True]
    assert findings["trained"]["logprobs"] < 0.01 < 0.03 < findings["untrained"]["logprobs"]


@with_real_vllm
def test_weights_that_do_not_arrive_are_noticed(findings):
    assert "vLLM does not have the trainer's weights after a sync" in findings["stale"]


@with_real_vllm
def test_vllms_own_context_is_respected(findings):
    assert findings["max_length"] == 512  # the model's is 4096


@with_real_vllm
def test_the_next_training_of_a_process_is_not_a_launched_one(findings):
    assert findings["launched"] == [] and findings["next"] == "DistributedType.NO"


@with_real_vllm
def test_an_adapter_trains_is_sampled_from_and_is_saved(findings):
    found = findings["adapter"]  # on bfloat16 weights
    assert [row["sampling/sampling_logp_difference/mean"] < 0.02 for row in found["log"]] == [True, True]
    assert found["trained"]["logprobs"] < 0.01
    assert found["saved"]
    assert found["base_changed"] == []


@with_real_vllm
def test_later_settings_train_on_vllms_samples(findings):
    """A baseline from the sampling logprobs, and old logprobs that differ from the policy's, with ratios per turn."""
    for row in findings["adapter"]["log"]:
        assert 0.0 <= row["arpo/baseline/value"] <= 2.0  # rewards are 0, 1 and 2
        assert 0.0 <= row["arpo/update/kept_above_clip"] <= 1.0
        assert row["arpo/resampling/left"] == 0.0
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0.0


class Recorder:
    """TRL's object and vLLM's, as far as a session needs them, writing down what is asked of them."""

    def __init__(self, sleeps: bool):
        self.calls: list[str] = []
        self.enable_sleep_mode = sleeps
        self.model, self.tensor_parallel_size = tiny_model(), 1
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: self.calls.append("wait for ranks"))
        self.llm = self
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=100),
            abort_request=lambda requests: None,
            has_unfinished_requests=lambda: False,
        )

    def sync_weights(self):
        self.calls.append("sync")

    def wake_up(self, tags):
        self.calls.append("wake " + ",".join(tags))

    def sleep(self, level):
        self.calls.append(f"sleep {level}")


def recorded(sleeps: bool, monkeypatch) -> tuple[VLLMColocateEngine, list[str], SimpleNamespace]:
    generation, step = Recorder(sleeps), SimpleNamespace(now=0)
    calls = generation.calls
    monkeypatch.setattr(ColocatedWeights, "_logprobs", lambda self: calls.append("vLLM's logprobs") or [-1.0])
    weights = ColocatedWeights(
        generation, lambda: step.now, lambda ids: calls.append("trainer's logprobs") or [-1.0], [], 0.05
    )
    engine = VLLMColocateEngine(
        generation.llm,
        tokenizer(),
        SamplingParams(eos_ids=(1,)),
        weights,
        vocab_size=10,
        top_logprobs=2,
        sleeps=sleeps,
    )
    return engine, calls, step


SYNC = ["trainer's logprobs", "sync", "vLLM's logprobs"]
AWAKE = ["trainer's logprobs", "sync", "wake kv_cache", "vLLM's logprobs"]
"""The trainer's logprobs first: a sharded model is gathered for them, while vLLM's memory is still free."""


def test_sleep_mode_wakes_once_a_session_with_one_sync_and_never_sleeps_inside(monkeypatch):
    engine, calls, _ = recorded(True, monkeypatch)
    with engine.session():
        assert calls == AWAKE
        calls.clear()
    assert calls == ["sleep 2"]
    calls.clear()
    with engine.session():  # the same step, as an evaluation would: sleeping has discarded the weights
        assert calls == AWAKE


def test_without_sleep_mode_weights_move_once_a_step(monkeypatch):
    engine, calls, step = recorded(False, monkeypatch)
    for now in (0, 0, 1):
        step.now = now
        with engine.session():
            pass
    assert calls == SYNC * 2


@pytest.mark.parametrize(("lora", "size", "waits"), [(True, 2, True), (True, 1, False), (False, 2, False)])
def test_ranks_with_adapters_wait_for_each_other_before_tensor_parallel_vllm_runs(lora, size, waits, monkeypatch):
    """As in TRL's `generate` (huggingface/trl#3671)."""
    engine, calls, _ = recorded(False, monkeypatch)
    generation = engine._weights._generation
    generation.tensor_parallel_size = size
    if lora:
        generation.model = get_peft_model(generation.model, LoraConfig(r=2))
    with engine.session():
        pass
    assert calls == [*SYNC[:2], *["wait for ranks"] * waits, SYNC[2]]


def test_fixed_weights_never_move():
    generation = Recorder(sleeps=False)
    engine = VLLMColocateEngine(
        generation.llm, tokenizer(), SamplingParams(eos_ids=(1,)), FixedWeights(), vocab_size=10, top_logprobs=0
    )
    for _ in range(2):
        with engine.session():
            pass
    assert generation.calls == []


def test_a_failed_sync_is_repeated(monkeypatch):
    engine, calls, _ = recorded(False, monkeypatch)

    def fail():
        raise EngineError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine._weights._generation, "sync_weights", fail)
        with pytest.raises(EngineError), engine.session():
            pass
    with contextlib.suppress(EngineError), engine.session():
        pass
    assert calls == [SYNC[0], *SYNC]
