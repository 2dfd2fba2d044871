"""Engines and samplers are built the same way for training, evaluation and measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.build import build_sampler, context_of, local_engine, shortest
from arpo_trl.rollout.engines.base import Engine, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.rollout.engines.lockstep import LockstepEngine
from arpo_trl.rollout.engines.scripted import ScriptedEngine
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine
from arpo_trl.rollout.engines.weights import FixedWeights
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.toolbox import ToolBox
from evaluating import asked_number, boxed, completions, questions
from loopback import Loopback
from support import ON_CPU, python, save_tiny_model, search, tiny_model, tokenizer

EOS = int(tokenizer().eos_token_id)
SETTINGS = SamplingParams(eos_ids=(EOS,), stop_strings=("</search>",))


class Echo:
    """An engine from outside the package: it answers each question with the question's own number."""

    vocab_size, forward_s, max_length, has_logprobs = 1000, 0.0, 150, True

    def __init__(self) -> None:
        self.waiting: list[TurnRequest] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def submit(self, request: TurnRequest) -> None:
        self.waiting.append(request)

    def poll(self, timeout_s: float) -> list[Turn]:
        turns, self.waiting = [self.turn(request) for request in self.waiting], []
        return turns

    def turn(self, request: TurnRequest) -> Turn:
        ids = [*tokenizer().encode(boxed(asked_number(tokenizer().decode(request.ids)))), EOS]
        assert len(ids) <= request.max_tokens
        return Turn(
            id=request.id,
            ids=ids,
            logprobs=[-0.5] * len(ids),
            entropies=[0.1] * min(len(ids), request.probe_tokens),
            stop=TurnStop.EOS,
        )


def own_sampler(engine: Engine, **settings):
    toolbox = ToolBox([search, python])
    protocol = TagProtocol(tokenizer(), toolbox.specs)
    settings = {"context": None, "max_completion_length": None, "max_tool_calls": None} | settings
    return build_sampler(engine, toolbox, protocol, **settings)


def test_an_engine_from_outside_the_package_serves_training_and_evaluation(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "what is 3"}], "answer": ["3"], "task": "math"}]
    trainer = ARPOTrainer(
        model=save_tiny_model(tmp_path / "model"),
        reward_funcs=lambda turns, **_: [float("boxed{3}" in written[-1]) for written in turns],
        args=ARPOConfig(
            str(tmp_path / "run"),
            num_generations=4,
            per_device_train_batch_size=4,
            max_steps=1,
            save_strategy="no",
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows * 4),
        tools=[search, python],
        engine=Echo(),
    )
    assert trainer.tree_sampler.settings.max_length == 150  # the engine's; the model's is longer
    trainer.train()
    assert [row["reward"] for row in trainer.state.log_history if "reward" in row] == [1.0]

    records = []
    evaluator = Evaluator(own_sampler(Echo()), samples=1, seed=0, concurrency=2)
    asked = questions("0", "1", "9")  # what is 0, 1, 2
    with evaluator.sampler.toolbox:
        evaluator.run(asked, evaluator.keys(asked), records.append)
    scores = {record["number"]: record["scores"]["math"] for record in records}
    assert scores == {0: 1.0, 1: 1.0, 2: 0.0}


def test_a_path_ends_at_the_smallest_length_that_is_known():
    assert shortest(None, 30, 20) == 20
    assert shortest(None, None) is None
    for engines, context, expected in ((100, 200, 100), (200, 100, 100), (None, 70, 70), (90, None, 90)):
        made = own_sampler(ScriptedEngine(tokenizer(), SETTINGS, str, max_length=engines), context=context)
        assert made.settings.max_length == made.settings.max_completion_length == expected


def test_a_path_without_any_bound_is_refused():
    with pytest.raises(ConfigError, match=r"ScriptedEngine.max_length is None.* Set max_position_embeddings"):
        own_sampler(ScriptedEngine(tokenizer(), SETTINGS, str))


def test_unset_settings_neither_branch_nor_limit_calls():
    made = own_sampler(Echo(), num_generations=6, schedule=RolloutSchedule.ROUNDS).settings
    assert (made.num_generations, made.initial_rollouts, made.max_completion_length) == (6, 6, 150)
    assert made.max_tool_calls > 10**6 and made.schedule is RolloutSchedule.ROUNDS
    branching = own_sampler(Echo(), num_generations=6, initial_rollouts=2, max_tool_calls=0).settings
    assert (branching.initial_rollouts, branching.max_tool_calls) == (2, 0)


def test_a_local_model_bounds_its_engine_by_its_configuration():
    model = tiny_model()
    engine = local_engine(model, tokenizer(), SETTINGS)
    assert engine.max_length == context_of(model) == model.config.max_position_embeddings


def _vllm(length: int) -> SimpleNamespace:
    return SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=length)))


def _served(*lengths: int) -> SimpleNamespace:
    return SimpleNamespace(facts={str(i): SimpleNamespace(max_model_len=length) for i, length in enumerate(lengths)})


@contextmanager
def _shipped() -> Iterator[list[tuple[Engine, int | None]]]:
    """One engine of each kind, and the context that it should state."""
    scripted = ScriptedEngine(tokenizer(), SETTINGS, str, max_length=40)
    sizes = {"vocab_size": 10, "top_logprobs": 2}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Loopback(completions(str)) as server:
            yield [
                (scripted, 40),
                (ScriptedEngine(tokenizer(), SETTINGS, str), None),
                (LockstepEngine(scripted, dist.group.WORLD), 40),
                (TransformersEngine(tokenizer(), SETTINGS, contextlib.nullcontext, max_length=64), 64),
                (VLLMColocateEngine(_vllm(100), tokenizer(), SETTINGS, FixedWeights(), **sizes), 100),
                (VLLMServerEngine(tokenizer(), SETTINGS, _served(90, 80), away_s=1.0, request_s=1.0, **sizes), 80),
                (CompletionsEngine(server.url + "/v1", None, tokenizer(), SETTINGS), None),  # that one does not tell
            ]
    finally:
        dist.destroy_process_group()


def test_every_shipped_engine_has_the_samplers_interface_and_states_its_context():
    members = [name for name in (*Engine.__annotations__, *vars(Engine)) if not name.startswith("_")]
    assert sorted(members) == ["forward_s", "has_logprobs", "max_length", "poll", "session", "submit", "vocab_size"]
    with _shipped() as engines:
        for engine, length in engines:
            assert [name for name in members if not hasattr(engine, name)] == [], type(engine)
            assert engine.max_length == length, type(engine)
