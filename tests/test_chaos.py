"""Failing tools do not damage a rollout: M leaves per group, and only harmless text in the results."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from transformers import TrainerControl

from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.spec import tool_spec
from support import ANSWER, Scripted, python, search, tokenizer


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks/chaos.py"
    spec = importlib.util.spec_from_file_location("chaos", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def texts(benchmark) -> dict[str, list[str]]:
    return benchmark.failure_texts([search, python])


def calls_twice(request, context):
    *_, depth = request.key
    text = [f"<search>iron {request.key}</search>", f"<python>{request.seed}</python>", ANSWER][min(depth, 2)]
    return ScriptedTurn(text=text, entropies=[float(depth)], polls=1 + request.seed % 2)


def sample(benchmark, *, groups, ways=(), rate=1.0):
    chaos = benchmark.Chaos(rate=rate, seed=0, slow_s=2.0, ways=ways)
    run = Scripted(
        calls_twice,
        leaves=6,
        at_root=3,
        tools=[chaos(search), chaos(python)],
        timeout_s=1.0 if not ways or ways[0] in benchmark.SLOW else 20.0,
        max_result_tokens=40,
        schedule=RolloutSchedule.OVERLAP,
    )
    return chaos, run(groups)


def check(rollout):
    control = set(tokenizer().added_tokens_decoder)
    for tree in rollout.trees:
        tree.check(6)
        assert len({leaf.nodes[-1].index for leaf in tree.leaves()}) == 6
        for node in tree.observations():
            assert node.text
            node.text.encode("utf-8")
            assert "\0" not in node.text
            assert [token in control for token in node.ids].count(True) == 2  # the wrapper's own
        for leaf in tree.leaves():
            assert leaf.turns[-1] == ANSWER  # each path got its results and went on to answer


@pytest.mark.slow
def test_every_group_keeps_its_leaves_with_all_seven_failures_among_its_calls(benchmark):
    chaos, rollout = sample(benchmark, groups=8, rate=0.5)
    check(rollout)
    assert set(chaos.counts) == {"useful", *benchmark.WAYS}
    failures = {call.failure for tree in rollout.trees for leaf in tree.leaves() for call in leaf.calls}
    assert failures == {None, "error", "timeout"}


# What the model reads of each failure, and how it counts.
READS = {
    "exception": ("Error: RuntimeError: chaos", "error"),
    "hang": ("Error: the search call took longer than 1 s.", "timeout"),
    "10 MB": ("01234567", None),
    "invalid UTF-8": ("caf", None),
    "control tokens": ("<|endoftext|><|im_end|>", None),
    "empty": ("", None),
    "slow drip": ("Error: the search call took longer than 1 s.", "timeout"),
}


def test_there_is_an_expectation_for_each_of_the_seven_ways(benchmark):
    assert list(READS) == list(benchmark.WAYS)


@pytest.mark.slow
@pytest.mark.parametrize("way", READS)
def test_a_failure_of_one_kind_is_a_text_for_the_model_and_the_one_it_was_taught(benchmark, texts, way):
    chaos, rollout = sample(benchmark, groups=1, ways=(way,))
    check(rollout)
    assert set(chaos.counts) == {way}
    text, failure = READS[way]
    first = next(node for node in rollout.trees[0].observations() if node.tool == "search")
    assert first.calls[0].failure == failure
    assert first.text.startswith(text)
    protocol = TagProtocol(tokenizer(), {}, max_result_tokens=40)
    number = list(benchmark.WAYS).index(way)
    for node in rollout.trees[0].observations():
        assert node.ids == protocol.encode_observation([(node.tool, texts[node.tool][number])])


def test_a_calm_wrapper_changes_nothing(benchmark):
    chaos, rollout = sample(benchmark, groups=1, rate=0.0)
    assert set(chaos.counts) == {"useful"}
    assert all(call.ok for leaf in rollout.trees[0].leaves() for call in leaf.calls)
    assert tool_spec(chaos(search)) == tool_spec(search)


def test_training_ends_with_the_step_that_makes_the_calls_enough(benchmark):
    chaos, control = benchmark.Chaos(rate=0.0, seed=0), TrainerControl()
    enough = benchmark.EnoughCalls(chaos, useful=2)
    stops = []
    for _ in range(3):
        chaos(search)("iron")
        enough.on_step_end(None, None, control)
        stops.append(control.should_training_stop)
    assert stops == [False, True, True]
