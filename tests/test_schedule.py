import io
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.estimates import DepthEstimates
from arpo_trl.rollout.rules import build_rule
from arpo_trl.rollout.rules.schedule import Schedule
from arpo_trl.rollout.tree import RolloutTree, StopReason
from learning_ranks import trainer
from ranks import EXACT, launch
from support import ANSWER, ON_CPU, Scripted, addresses, save_tiny_model


def searches(count: int):
    """Each path searches that often and answers."""

    def script(request, context):
        depth = request.key[-1]
        return ScriptedTurn(text=f"<search>iron {request.key}</search>" if depth < count else ANSWER)

    return script


def settings(**values: Any) -> ARPOConfig:
    return ARPOConfig(
        output_dir="/tmp/unused", **ON_CPU, branch_rule="schedule", per_device_train_batch_size=24, **values
    )


def with_estimates(score: list[float], calls: list[float], variance: dict[int, float], **values: Any) -> Schedule:
    rule = Schedule(**values)
    ends = [0.0] * (len(score) - 1) + [1.0]
    made = 0.6 * sum(calls)
    known = {"score": score, "calls": calls, "ends": ends, "variance": variance, "leaves": 8, "made": made}
    rule.load_state_dict(known)
    return rule


BY_HAND = ([1.0, 2.0], [1.0, 0.5], {0: 0.2, 1: 0.15})
"""a = .05, .55; η = 1.6085; for 8 leaves at half the calls widths 2 and 8: `tests/test_estimates.py`."""


def test_every_path_has_the_same_number_of_children_at_each_depth():
    rollout = Scripted(searches(2), leaves=6, at_root=1, rule=Schedule(widths=[1, 3, 2]))()
    (tree,) = rollout.trees
    found = [leaf.address for leaf in tree.leaves()]
    assert found == [(0,), (0, 1, 0), (0, 1, 0, 2, 0), (0, 1, 1), (0, 1, 1, 2, 0), (0, 2, 0)]
    # 1 call, then 3, and nothing is started at the root
    assert (sum(len(node.calls) for node in tree.observations()), tree.topups) == (4, 0)
    reasons = [node.decision.reason for node in tree.observations() if node.decision]
    assert reasons == ["planned width 3, share of leaves 6", *["planned width 2, share of leaves 2"] * 3]


def test_after_the_last_width_nothing_branches():
    run = Scripted(searches(3), leaves=4, at_root=2, rule=Schedule(widths=[2, 2]))
    assert addresses(run) == [(0,), (0, 1, 0), (1,), (1, 1, 0)]


def test_leaves_of_a_path_that_ends_early_start_at_the_root_and_do_not_branch():
    def one_stops(request, context):
        stops = request.key == (0, 0, 1, 1, 1)  # the third child, whose share is 2 leaves
        return ScriptedTurn(text=ANSWER if stops or request.key[-1] == 2 else f"<search>{request.key}</search>")

    run = Scripted(one_stops, leaves=6, at_root=1, rule=Schedule(widths=[1, 3, 2]))
    rollout = run()
    (tree,) = rollout.trees
    found = [leaf.address for leaf in tree.leaves()]
    assert found == [(0,), (0, 1, 0), (0, 1, 0, 2, 0), (0, 1, 1), (0, 2, 0), (1,)]
    assert tree.topups == 1
    # path 1 starts as soon as the child has answered, after 2 turns, and writes 3
    assert rollout.turns_in_sequence == [5]


def test_a_width_of_one_does_not_fire():
    (tree,) = Scripted(searches(2), leaves=2, at_root=1, rule=Schedule(widths=[1, 1, 2]))().trees
    decisions = [node.decision for node in tree.observations()]
    assert [(made.fires, made.granted) for made in decisions] == [(False, 0), (True, 1)]


def test_what_the_limit_of_calls_leaves_no_room_for_starts_at_the_root_at_once():
    # one result per path: of the share of 6 it can become 3
    run = Scripted(searches(3), leaves=6, at_root=1, rule=Schedule(widths=[1, 3, 2]), max_tool_calls=1)
    assert addresses(run) == [(0,), (0, 1, 0), (0, 1, 1), (1,), (2,), (3,)]


def test_the_remainder_of_a_share_goes_to_the_earlier_children():
    # estimated widths before the first estimate: N = 2 roots with 3 + 2 leaves, split at the first results
    run = Scripted(searches(2), leaves=5, at_root=2, rule=Schedule(exploration=0.0))
    assert addresses(run) == [(0,), (0, 1, 0), (0, 1, 1), (1,), (1, 1, 0)]


def test_estimates_decide_the_roots_and_widths():
    run = Scripted(searches(1), leaves=8, at_root=4, rule=with_estimates(*BY_HAND, exploration=0.0))
    # widths 2, 8
    assert addresses(run) == [(i, *rest) for i in (0, 1) for rest in ((), (1, 0), (1, 1), (1, 2))]


def test_estimated_widths_are_those_of_whole_depths(monkeypatch):
    monkeypatch.setattr(DepthEstimates, "widths", lambda *_: [2.0, 4.0, 8.0])
    (tree,) = Scripted(searches(2), leaves=8, at_root=4, rule=Schedule(exploration=0.0))().trees
    assert len(tree.root.children) == 2
    # 2 observations, then 4, and each has two children
    decisions = [node.decision for node in tree.observations()]
    assert [(made.fires, made.granted) for made in decisions] == [(True, 1)] * 6


def test_a_smaller_budget_of_calls_has_fewer_roots():
    # .35 · 8 · 1.5 = 4.2 calls: n_1 = 8 would leave .2 for n_0, which is at least 1. So one root.
    rule = with_estimates(*BY_HAND, exploration=0.0, calls_share=0.35)
    run = Scripted(searches(1), leaves=8, at_root=4, rule=rule)
    assert {address[0] for address in addresses(run)} == {0}


def test_fractions_are_drawn_once_per_prompt():
    # .53125 · 12 = 6.375 calls for n_1 = 8: n_0 = 2.375 is 2 or 3, in the mean of many prompts 2.375
    rule = with_estimates(*BY_HAND, exploration=0.0, calls_share=6.375 / 12)
    rollout = Scripted(searches(1), leaves=8, at_root=4, rule=rule)(groups=80)
    roots = [len(tree.root.children) for tree in rollout.trees]
    assert set(roots) == {2, 3}
    assert sum(roots) / 80 == pytest.approx(2.375, abs=3 * (0.375 * 0.625 / 80) ** 0.5)


def test_exploration_adds_a_child_and_keeps_a_leaf_for_it():
    # independent paths alone are best: v falls at once, all calls come later
    alone = ([1.0, 0.01], [0.0, 1.0], {0: 0.2, 1: 0.0})
    for exploration, roots in ((0.0, 8), (1.0, 7)):
        rule = with_estimates(*alone, exploration=exploration, calls_share=1.0)
        run = Scripted(searches(1), leaves=8, at_root=4, rule=rule)
        (tree,) = run().trees
        assert len(tree.root.children) == roots
    assert [leaf.address for leaf in tree.leaves()][:2] == [(0,), (0, 1, 0)]


@pytest.mark.parametrize(
    ("widths", "leaves"),
    [
        # 2 + 1 roots, of which each would split its share of 3, 3 or 2 leaves at its first result
        ([2.0, 8.0, 8.0], [(0,), (0, 2, 0), (0, 2, 1), (1,), (1, 2, 0), (1, 2, 1), (2,), (2, 2, 0)]),
        # 8 − 1 roots, of which one has a share of 2
        ([8.0, 8.0, 8.0], [(0,), (0, 2, 0), *((i,) for i in range(1, 7))]),
    ],
)
def test_a_depth_below_the_last_split_is_explored_too(monkeypatch, widths, leaves):
    """Otherwise its v is never observed, and the widths stay wrong."""
    monkeypatch.setattr(DepthEstimates, "widths", lambda *_: widths)
    run = Scripted(searches(2), leaves=8, at_root=4, rule=Schedule(exploration=1.0))
    assert addresses(run) == leaves


def of_random_length(rule: Schedule, stops: tuple[float, ...]) -> Scripted:
    """Each path answers after m results with probability stops[m], the last one 1. Each of its turns is wrong with
    probability .2."""

    def script(request, context):
        draws = random.Random(request.seed)
        ends, fault = draws.random() < stops[request.key[-1]], "wrong" * (draws.random() < 0.2)
        return ScriptedTurn(text=fault + (ANSWER if ends else "<search>iron</search>"))

    return Scripted(script, leaves=8, at_root=4, rule=rule, max_tool_calls=len(stops))


@pytest.mark.parametrize(
    ("stops", "least"),
    [
        ((0.02, 0.02, 0.7, 0.7, 1.0), 0.0),
        ((0.02, 0.8, 0.5, 1.0), 0.0),
        # Half of the paths make no call: one path until depth 4 and all others at the root are .93 of the calls
        ((0.5, 0.5, 0.5, 1.0), 0.85),
    ],
)
def test_with_paths_of_random_length_the_share_of_calls_is_the_budget_where_that_is_possible(stops, least):
    rule, independent, reached, made, chains = Schedule(), 0.0, 1.0, 0, []
    for stop in stops:
        reached *= 1 - stop
        independent += reached
    for step in range(30):
        rollout = of_random_length(rule, stops)(groups=4, seed=step)
        rewards = [float("wrong" not in "".join(leaf.turns)) for tree in rollout.trees for leaf in tree.leaves()]
        rule.learn([rule.lesson(rollout.trees, rewards)])
        if step >= 10:
            made += sum(len(tree.calls()) for tree in rollout.trees)
            chains += rollout.turns_in_sequence
    share = made / (20 * 4 * 8 * independent)
    assert share == pytest.approx(0.5, abs=0.07) if not least else share > least
    assert rule.estimates.calls_share == pytest.approx(share, abs=0.1)
    assert sum(chains) / len(chains) <= len(stops) + 1


RULES_OF_ANY_ORDER = [Schedule(widths=[2, 2, 2]), Schedule(), with_estimates(*BY_HAND, calls_share=0.6)]


@pytest.mark.parametrize("rule", RULES_OF_ANY_ORDER, ids=["static", "first", "estimated"])
@pytest.mark.parametrize("schedule", RolloutSchedule)
def test_the_tree_does_not_depend_on_the_order_in_which_paths_finish(rule, schedule):
    def script(order: int):
        def turn(request, context):
            draws = random.Random(request.seed)
            text = f"<search>{request.seed}</search>" if draws.random() < 0.7 else ANSWER
            return ScriptedTurn(text=text, polls=1 + random.Random(request.seed + order).randrange(4))

        return turn

    def unsteady(query: str) -> str:
        """Search.

        Args:
            query: What.
        """
        if int(query) % 3 == 0:
            raise OSError("no network")
        return query

    unsteady.__name__ = "search"

    def grown(order: int) -> list[Any]:
        run = Scripted(script(order), leaves=8, at_root=2, rule=rule, tools=[unsteady], schedule=schedule)
        return [[(leaf.address, leaf.turns) for leaf in tree.leaves()] for tree in run(groups=6).trees]

    first = grown(1)
    assert all(len(leaves) == 8 for leaves in first)
    assert grown(2) == first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": [1, 3, 2]}, r"product is 6, but num_generations \(M\) is 12. Set num_generations: 6"),
        ({"widths": [0, 12]}, r"widths is \[0, 12\]; expected integers of at least 1"),
        ({"widths": "1-3-4"}, "widths is '1-3-4'; expected integers"),
        ({"widths": [True, 12]}, r"widths is \[True, 12\]; expected integers"),
        ({"widths": [1, 12], "calls_share": 0.5}, "widths and calls_share are both set"),
        ({"widths": [1, 12], "exploration": 0.5}, "widths and exploration are both set"),
        ({"calls_share": 0}, r"calls_share is 0; expected a number in \(0, 1\]"),
        ({"exploration": 2.0}, r"exploration is 2.0; expected a number in \[0, 1\]"),
        ({"memory": "long"}, r"memory is 'long'; expected a number in \[0, 1\]"),
    ],
)
def test_widths_that_cannot_be_spent_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        settings(num_generations=12, branch_rule_kwargs=values)


def test_widths_are_refused_where_another_setting_contradicts_them():
    widths = {"branch_rule_kwargs": '{"widths": [2, 3, 2]}', "num_generations": 12}
    assert settings(**widths).initial_rollouts == 2  # from widths, not M // 2
    with pytest.raises(ConfigError, match=r"widths starts with 2 but initial_rollouts \(N\) is 4. Remove"):
        settings(initial_rollouts=4, **widths)
    settings(max_tool_calling_iterations=1, num_generations=4, branch_rule_kwargs={"widths": [2, 2, 1]})
    with pytest.raises(ConfigError, match=r"children at 2 results, but max_tool_calling_iterations allows 1"):
        settings(max_tool_calling_iterations=1, **widths)
    with pytest.raises(ConfigError, match=r"branches_per_fork is 2, but the branch rule 'schedule' sets"):
        settings(branches_per_fork=2, **widths)
    assert settings(num_generations=12, branch_rule_kwargs={"calls_share": 0.4}).initial_rollouts == 6


def test_metrics_are_the_estimates_and_derived_values():
    found = dict(with_estimates(*BY_HAND).metrics())
    assert found.pop("schedule/gain") == pytest.approx(1.60852, rel=1e-3)  # the largest of a hundred budgets
    assert found == pytest.approx(
        {
            "schedule/score_norm_depth_0": 1.0,
            "schedule/score_norm_depth_1": 2.0,
            "schedule/calls_depth_0": 1.0,
            "schedule/calls_depth_1": 0.5,
            "schedule/width_depth_0": 2.0,
            "schedule/width_depth_1": 8.0,
            "schedule/variance_depth_0": 0.2,
            "schedule/variance_depth_1": 0.15,
            "schedule/gain_of_widths": 1.6,
            "schedule/calls_share": 0.6,
            "schedule/budget_used": 1.2,
        }
    )
    assert Schedule(widths=[2, 4]).metrics() == {"schedule/width_depth_0": 2, "schedule/width_depth_1": 8}


@pytest.mark.parametrize(("gain", "warns"), [(1.09, True), (1.2, False)])
def test_a_small_gain_is_an_alarm(gain, warns):
    alarms, tally = Alarms(Schedule()), Tally()
    tally.add("schedule/gain", gain)
    messages = [message for _ in range(10) for message in alarms.check(tally)]
    assert len(messages) == warns
    assert all("at most 109% of what independent paths give" in message for message in messages)


def test_without_estimates_no_budget_is_said_to_be_exceeded():
    """Rewards that are all equal give none. Then N paths start, whatever `calls_share` is."""
    rule = Schedule()
    rollout = Scripted(searches(2), leaves=8, at_root=4, rule=rule)()
    rule.learn([rule.lesson(rollout.trees, [0.0] * 8)])
    assert rule.metrics()["schedule/calls_share"] > 0.5
    assert "schedule/budget_used" not in rule.metrics()


def test_calls_far_above_the_budget_are_an_alarm():
    alarms, messages = Alarms(Schedule()), []
    for _ in range(20):
        tally = Tally()
        tally.add("schedule/budget_used", 1.8)
        messages += alarms.check(tally)
    assert len(messages) == 1 and "The trees make 180% of the calls that calls_share allows" in messages[0]


@pytest.mark.parametrize("values", [{}, {"widths": (1, 2)}])
def test_a_step_without_rewards_has_metrics(values):
    tree = RolloutTree([0])
    for i in range(2):
        tree.end(tree.add_turn(0, [1], "", [-0.5], []).index, (i,), StopReason.EOS)
    rule = build_rule("schedule", {}, values)
    rule.learn([rule.lesson([tree], [math.nan, math.nan])])
    # (1 − p)² of one token with ln p = −0.5; no gain is known
    assert rule.metrics() == {
        "schedule/score_norm_depth_0": pytest.approx((1 - math.exp(-0.5)) ** 2),
        "schedule/calls_depth_0": 0.0,
        **{f"schedule/width_depth_{m}": width for m, width in enumerate(values.get("widths", ()))},
    }


def test_estimates_survive_a_checkpoint():
    rule, restored, file = with_estimates(*BY_HAND), Schedule(), io.BytesIO()
    saved = rule.state_dict()
    torch.save(saved, file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.metrics() == rule.metrics()
    tree = Scripted(searches(1), leaves=2, at_root=1, rule=Schedule(widths=[1, 2]))().trees[0]
    restored.learn([restored.lesson([tree], [1.0, 0.0])])
    assert rule.state_dict() == saved != restored.state_dict()  # a copy, which later steps leave alone


@pytest.mark.slow
def test_a_run_logs_its_estimates_and_a_resumed_one_has_them(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    made = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=1)
    made.train()
    row = made.state.log_history[0]
    assert {"arpo/schedule/variance_depth_0", "arpo/schedule/calls_depth_0"} <= set(row)
    assert row["arpo/schedule/score_norm_depth_0"] > 0
    resumed = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    known = [each.tree_sampler.settings.rule.state_dict() for each in (made, resumed)]
    assert known[0] == known[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_learn_the_same(tmp_path):
    launch("ddp", Path(__file__).with_name("learning_ranks.py"), str(tmp_path), launcher=EXACT)
    known = [json.loads((tmp_path / f"rank{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert known[0] == known[1]
    assert set(known[0]["variance"]) == {"0", "1"}
