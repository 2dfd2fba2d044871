import io
import json
import math

import pytest
import torch
from rich.console import Console

from arpo_trl.logs.alarms import ALARMS, REPEAT_EVERY, Alarms
from arpo_trl.logs.metrics import Tally, tally_functions, tally_rewards, tally_rollout
from arpo_trl.logs.render import render_tree
from arpo_trl.logs.trajectories import TrajectoryLog, logged_trees, read_trees
from arpo_trl.rollout.batch import RolloutBatch, RolloutTimes, SampledGroup
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules import RULES
from arpo_trl.rollout.rules.base import FIRE_RATE_COUNT
from arpo_trl.rollout.rules.probability import Probability
from arpo_trl.rollout.rules.random import Random
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.released import Released
from arpo_trl.rollout.rules.schedule import Schedule
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import BranchDecision, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolFailure
from arpo_trl.training.baselines import ScoredLeaves, tally_baseline
from support import ANSWER, Scripted

TIMES = RolloutTimes(total_s=10.0, forward_s=6.0, tool_wait_s=2.0, sync_s=1.5)


def call(name: str, query: str, *, failure=None, seconds=0.0, source="executed") -> ExecutedCall:
    failed = None if failure is None else ToolFailure(failure)
    return ExecutedCall(
        name=name, arguments={"query": query}, text="text", failure=failed, seconds=seconds, source=CallSource(source)
    )


def decision(delta: float, *, fires: bool, granted: int = 0) -> BranchDecision:
    return BranchDecision(entropy_nats=1.0, delta=delta, probability=0.5 + 0.2 * delta, fires=fires, granted=granted)


def tree_by_hand() -> RolloutTree:
    """Three leaves; tokens in brackets.

    root ── turn 1 [4] ── search [10] ──┬─ turn 3 [6] ── python [5] ── turn 5 [3]   eos, answers
                                        └─ turn 6 [7]                               length
         ── turn 7 [2] ── refusal [8] ──── turn 9 [1]                               eos, says nothing
    """
    tree = RolloutTree([0] * 50)

    def turn(parent: int, tokens: int, entropies: list[float], text: str = "words") -> int:
        return tree.add_turn(parent, [1] * tokens, text, [-0.5] * tokens, entropies).index

    def seen(parent: int, tokens: int, made: ExecutedCall, decided: BranchDecision) -> int:
        node = tree.add_observation(parent, [2] * tokens, [made], "text")
        node.decision = decided
        return node.index

    first = turn(0, 4, [0.1, 0.3])  # mean 0.2
    searched = seen(first, 10, call("search", "iron", seconds=2.0), decision(0.3, fires=True, granted=1))
    second = turn(searched, 6, [1.0, 2.0])  # 1.5
    computed = seen(second, 5, call("python", "1/0", failure="error", seconds=1.0), decision(-0.1, fires=False))
    tree.end(turn(computed, 3, [0.5], ANSWER), (0,), StopReason.EOS)
    tree.end(turn(searched, 7, [0.5]), (0, 1, 0), StopReason.LENGTH)
    other = turn(0, 2, [0.4])
    refused = seen(
        other, 8, call("empty", "", failure="bad_call", source="refused"), decision(0.1, fires=True, granted=0)
    )
    tree.end(turn(refused, 1, [0.2]), (1,), StopReason.EOS)
    tree.check(3)
    return tree


def tallied(*trees: RolloutTree, topups: int = 1, chain: int = 3) -> Tally:
    tally = Tally()
    for tree in trees:
        tree.topups = topups
    groups = [SampledGroup(tree=tree, turns_in_sequence=chain) for tree in trees]
    tally_rollout(RolloutBatch(groups=groups, times=TIMES), tally)
    return tally


EXPECTED = {
    "tree/groups": 1,
    "tree/leaves": 3,
    # leaves 4+10+6+5+3 = 28, 4+10+7 = 21, 2+8+1 = 11: 60 tokens; nodes 4+10+6+5+3+7+2+8+1 = 46
    "tree/sharing_ratio": 60 / 46,
    "tree/branches": 1,
    "tree/topups": 1,
    "tree/turns_in_sequence": 3,
    "tree/generated_tokens": 4 + 6 + 3 + 7 + 2 + 1,
    # after the first result: search granted 1, refusal fired but granted 0; after the second: python
    "tree/forks_depth_1": 1 / 2,
    "tree/forks_depth_2": 0,
    "tree/fire_rate": 2 / 3,
    "tree/fire_rate_search": 1,
    "tree/fire_rate_python": 0,
    "tree/fire_rate_refusal": 1,
    "entropy/delta": (0.3 - 0.1 + 0.1) / 3,
    "entropy/root": (0.2 + 0.4) / 2,
    "entropy/after_search": (1.5 + 0.5) / 2,
    "entropy/after_python": 0.5,
    "entropy/after_refusal": 0.2,
    # leaf 3 holds a refusal and no answer; leaf 2 was cut but had searched
    "alarm/unparsed": 1 / 3,
    "alarm/truncated": 1 / 3,
    "alarm/call_limit": 0,
    # calls per leaf 2, 1, 1; on paths 4, in the tree 3
    "tools/calls_per_leaf": 4 / 3,
    "tools/calls_saved_by_sharing": 1,
    "tools/calls_made": 2,
    "tools/calls_executed": 2,
    "tools/calls_distinct": 2,
    "tools/calls_shared": 0,
    "tools/calls_saved_by_cache": 0,
    "tools/refused": 1,
    "tools/search/failed": 0,
    "tools/search/timed_out": 0,
    "tools/search/degraded": 0,
    "tools/search/stopped": 0,
    "tools/search/cache_hits": 0,
    "tools/search/seconds_p50": 2.0,
    "tools/search/seconds_p95": 2.0,
    "tools/python/failed": 1,
    "tools/python/timed_out": 0,
    "tools/python/degraded": 0,
    "tools/python/stopped": 0,
    "tools/python/cache_hits": 0,
    "tools/python/seconds_p50": 1.0,
    "tools/python/seconds_p95": 1.0,
    "time/rollout_s": 10.0,
    "time/decode_s": 6.0,
    "time/tool_wait_s": 2.0,
    "time/sync_s": 1.5,
    "time/sampler_share": 0.5 / 10,
}


def test_every_metric_of_a_small_tree_equals_the_count_by_hand():
    assert tallied(tree_by_hand()).values() == pytest.approx(EXPECTED)


def test_values_come_sorted_by_name():
    assert list(tallied(tree_by_hand()).values()) == sorted(EXPECTED)


def test_joined_and_cached_calls_are_saved_not_executed():
    tree = RolloutTree([0])
    for i, made in enumerate(
        [
            call("search", "iron", seconds=4.0),
            call("search", "iron", seconds=4.0, source="joined"),
            call("search", "iron", source="cached"),
            call("search", "gold", failure="timeout", seconds=2.0),
            call("python", "while True: pass", failure="stopped", seconds=5.0),
            call("python", "1", seconds=1.0),
        ]
    ):
        turn = tree.add_turn(0, [1], "words", [-0.5], [0.1])
        seen = tree.add_observation(turn.index, [2], [made], "text")
        tree.end(tree.add_turn(seen.index, [1], ANSWER, [-0.5], [0.1]).index, (i,), StopReason.EOS)
    values = tallied(tree).values()
    assert values["tools/calls_executed"] == 4
    assert values["tools/calls_saved_by_cache"] == 2
    assert values["tools/calls_distinct"] == 4  # iron and gold, the loop and the 1
    assert (values["tools/python/failed"], values["tools/python/stopped"]) == (1 / 2, 1 / 2)
    assert values["tools/search/failed"] == 1 / 4
    assert values["tools/search/timed_out"] == 1 / 4
    assert values["tools/search/cache_hits"] == 1 / 4
    # of the executed ones only, 4 and 2: median 3, 95th percentile 2 + 0.95 · (4 − 2)
    assert values["tools/search/seconds_p50"] == pytest.approx(3.0)
    assert values["tools/search/seconds_p95"] == pytest.approx(3.9)


def test_distinct_calls_are_counted_over_all_trees_of_a_rollout():
    values = tallied(tree_by_hand(), tree_by_hand()).values()
    assert values["tools/calls_executed"] == 4
    assert values["tools/calls_distinct"] == 2


def test_counts_of_a_rollout_add_up_and_group_means_stay():
    one, two = tallied(tree_by_hand()).values(), tallied(tree_by_hand(), tree_by_hand()).values()
    totals = {"tree/groups", "tree/leaves", "tools/refused"} | {
        f"tools/calls_{name}" for name in ("made", "executed", "saved_by_cache", "saved_by_sharing")
    }
    for name in EXPECTED:
        assert two[name] == pytest.approx(one[name] * (2 if name in totals else 1)), name


def test_calls_on_paths_are_those_in_the_trees_and_those_saved_by_sharing():
    values = tallied(tree_by_hand(), tree_by_hand()).values()
    on_paths = values["tools/calls_per_leaf"] * values["tree/leaves"]
    in_trees = values["tools/calls_executed"] + values["tools/calls_saved_by_cache"] + values["tools/refused"]
    assert on_paths == pytest.approx(in_trees + values["tools/calls_saved_by_sharing"])


def test_a_scripted_rollout_is_counted_as_it_was_sampled():
    def one_search(request, context):
        if request.key[-1] == 0:
            return ScriptedTurn(text=f"<search>iron {request.key[1]}</search>", entropies=[0.1])
        return ScriptedTurn(text=ANSWER, entropies=[1.0 if request.key[1] == 0 else 0.05])

    rollout = Scripted(one_search, leaves=5, at_root=2, vocab_size=10)()
    tally = Tally()
    tally_rollout(rollout, tally)
    values = tally.values()
    # Path 0 fires and branches once (Z = 1), path 1 does not; of the budget of 3 two are topped up, paths 2 and 3,
    # whose results have no budget left and do not fire (0.05 < 0.1).
    assert [leaf.address for leaf in rollout.trees[0].leaves()] == [(0,), (0, 1, 0), (1,), (2,), (3,)]
    assert values["tree/branches"] == 1
    assert values["tree/topups"] == 2
    assert values["tree/branches"] + values["tree/topups"] == 5 - 2
    assert values["tree/fire_rate"] == 1 / 4
    assert values["tools/calls_executed"] == 4
    assert values["tools/calls_saved_by_sharing"] == 1
    assert values["alarm/unparsed"] == 0
    assert values["entropy/after_search"] == pytest.approx((1.0 + 1.0 + 3 * 0.05) / 5)
    assert values["entropy/delta"] == pytest.approx((0.9 - 3 * 0.05) / 4 / math.log(10))


def test_paths_without_call_or_answer_are_unparsed_and_cut_ones_truncated():
    tally = Tally()
    babble = Scripted(lambda r, c: ScriptedTurn(text="word " * 50, ends=False), leaves=2, max_completion_length=10)
    tally_rollout(babble(), tally)
    values = tally.values()
    assert (values["alarm/unparsed"], values["alarm/truncated"]) == (1, 1)
    assert values["tree/sharing_ratio"] == 1
    assert "tree/fire_rate" not in values  # no decision, no rate


def test_a_call_without_room_for_its_result_is_counted_and_is_no_lack_of_protocol(tmp_path):
    """Its result of 100 words does not fit; the model never sees it, and reward functions do not get it."""
    tally = Tally()

    def search(query: str) -> str:
        """Searches.

        Args:
            query: What to find.
        """
        return "word " * 100

    grown = Scripted(lambda r, c: "<search>iron</search>", leaves=2, max_completion_length=40, tools=[search])()
    tally_rollout(grown, tally)
    values = tally.values()
    assert (values["alarm/unparsed"], values["alarm/truncated"]) == (0, 1)
    found = [values[f"tools/{name}"] for name in ("calls_made", "calls_per_leaf", "calls_saved_by_sharing")]
    assert found == [2, 1, 0]
    assert values["tools/search/failed"] == 0
    (tree,) = grown.trees
    assert [leaf.calls for leaf in tree.leaves()] == [[], []]
    assert [[call.name for call in leaf.nodes[-1].unread] for leaf in tree.leaves()] == [["search"], ["search"]]
    log = TrajectoryLog(tmp_path, 1.0, 0, 0)
    logged = logged_trees([tree], [0.0, 0.0], [0.0, 0.0], step=1, first_group=0, decode=str)
    (read,) = read_trees(log.write("step-1", logged))
    assert read.tree.calls() == tree.calls()
    shown = io.StringIO()
    Console(file=shown, width=200).print(render_tree(read))
    assert shown.getvalue().count("no room for the result of search") == 2


def test_alarms_continue_from_a_checkpoint_of_a_version_with_fewer():
    alarms = Alarms(Random(), ["search"])
    alarms.load_state_dict(Alarms(Random()).state_dict())
    assert alarms.check(heard(1.0)) != []


def test_a_path_that_calls_after_the_limit_is_counted():
    tally = Tally()
    tally_rollout(Scripted(lambda r, c: "<search>more</search>", leaves=2, max_tool_calls=1)(), tally)
    assert tally.values()["alarm/call_limit"] == 1


def test_merging_two_tallies_is_tallying_both():
    def plain(request, context):
        return ANSWER

    rollouts = [
        Scripted(plain, leaves=2)(),
        RolloutBatch(groups=[SampledGroup(tree=tree_by_hand(), turns_in_sequence=3)], times=TIMES),
    ]
    both, merged = Tally(), Tally()
    for rollout in rollouts:
        tally_rollout(rollout, both)
        alone = Tally()
        tally_rollout(rollout, alone)
        merged.merge(json.loads(json.dumps(alone.plain())))  # as it travels between ranks
    assert merged.values() == pytest.approx(both.values())
    # one leaf of three, none of two
    assert merged.values()["alarm/unparsed"] == 1 / 5


def test_a_mean_over_uneven_ranks_weighs_every_observation_alike():
    merged = Tally()
    for values in ([1.0, 1.0, 1.0], [0.0]):
        rank = Tally()
        for value in values:
            rank.add("share", value)
        merged.merge(rank.plain())
    assert merged.values() == {"share": 0.75}


def test_searches_answered_with_a_notice_are_counted_and_rung_about():
    tree = RolloutTree([0])
    for i, failure in enumerate(["degraded", None, "error", None]):
        turn = tree.add_turn(0, [1], "words", [-0.5], [0.1])
        seen = tree.add_observation(turn.index, [2], [call("search", f"iron {i}", failure=failure)], "text")
        tree.end(tree.add_turn(seen.index, [1], ANSWER, [-0.5], [0.1]).index, (i,), StopReason.EOS)
    tally = tallied(tree)
    assert tally.values()["tools/search/degraded"] == 1 / 4
    assert tally.values()["tools/search/failed"] == 2 / 4
    (message,) = Alarms(Random()).check(tally)
    assert message.startswith("arpo/tools/search/degraded: 25% of the searches got a notice instead of results")


def test_a_tool_of_which_every_call_fails_is_reported_after_50_calls():
    alarms = Alarms(Random(), ["search", "python"])
    assert alarms.check(heard(1.0, 30, "tools/python/failed")) == []
    (message,) = alarms.check(heard(1.0, 30, "tools/python/failed"))
    assert message.startswith("arpo/tools/python/failed: 100% of the last calls of python failed. ")
    assert alarms.check(heard(0.99, 100, "tools/search/failed")) == []


def test_an_alarm_that_waits_for_a_count_is_repeated_every_50_rollouts_too():
    alarms = Alarms(Random(), ["python"])
    heard_in = [i for i in range(1, 121) if alarms.check(heard(1.0, 10, "tools/python/failed"))]
    assert heard_in == [5, 55, 105]


def test_a_reward_function_that_gives_nothing_is_reported_after_200_rewards():
    alarms = Alarms(Random(), (), ["accuracy", "format", "tone"])
    for rollouts in range(1, 6):
        tally = Tally()
        # accuracy applies to 80 of the 90 rollouts, format is always right, tone varies below 0 in the second
        columns = {"accuracy": [0.0] * 80 + [math.nan] * 10, "format": [1.0] * 90, "tone": [-1.0] * 90}
        columns["tone"][0] -= float(rollouts == 2)
        tally_functions({**columns, "of_others": [math.nan] * 90}, tally)
        assert "alarm/unrewarded/of_others" not in tally.values()
        messages = alarms.check(tally)
        assert len(messages) == (rollouts == 3)  # 240 rewards
    assert tally.values()["alarm/unrewarded/accuracy"] == 1 and tally.values()["alarm/unrewarded/format"] == 0


def test_a_ratio_without_a_denominator_is_left_out():
    tally = Tally()
    tally.add("ratio", 0.0, 0.0)
    assert tally.values() == {}


def heard(share: float, count: float = 100, metric: str = "alarm/truncated") -> Tally:
    tally = Tally()
    tally.add(metric, share * count, count)
    return tally


@pytest.mark.parametrize(("share", "rings"), [(0.0, False), (0.49, False), (0.5, True), (1.0, True)])
def test_an_alarm_is_raised_at_its_limit_and_above(share, rings):
    messages = Alarms(Threshold()).check(heard(share))
    assert len(messages) == rings
    if rings:
        assert messages[0].startswith(f"arpo/alarm/truncated: {share:.0%} of the rollouts were truncated")


def test_no_alarm_is_raised_without_counts():
    assert Alarms(Threshold()).check(Tally()) == []
    assert Alarms(Threshold()).check(heard(0.0, 0)) == []


def test_a_persistent_alarm_is_logged_once_and_again_after_a_while():
    alarms = Alarms(Threshold())
    said = [bool(alarms.check(heard(1.0))) for _ in range(2 * REPEAT_EVERY + 1)]
    assert [i for i, now in enumerate(said) if now] == [0, REPEAT_EVERY, 2 * REPEAT_EVERY]


def test_an_alarm_that_returns_is_logged_at_once():
    alarms = Alarms(Threshold())
    outage, fine = heard(1.0), heard(0.0)
    said = [bool(alarms.check(rollout)) for rollout in [outage, *[fine] * REPEAT_EVERY, outage, fine, outage]]
    assert [i for i, now in enumerate(said) if now] == [0, REPEAT_EVERY + 1]


@pytest.mark.parametrize(("share", "said"), [(1.0, "fire the branch rule, so"), (0.0, "Only 0% of the tool results")])
def test_an_extreme_fire_rate_is_reported_once_per_run_after_enough_decisions(share, said):
    alarms = Alarms(Threshold())
    rollout = heard(share, FIRE_RATE_COUNT / 2, "tree/fire_rate")
    messages = [alarms.check(rollout) for _ in range(4 * REPEAT_EVERY)]
    assert [i for i, now in enumerate(messages) if now] == [1]
    assert said in messages[1][0]


def test_a_fire_rate_is_taken_over_all_decisions_since_the_last_look():
    alarms = Alarms(Probability())
    half = FIRE_RATE_COUNT / 2
    # (1.0 + 0.7) / 2 = 0.85 is below 90 %; then (1.0 + 0.9) / 2 = 0.95 is not
    shares = [1.0, 0.7, 1.0, 0.9]
    assert [len(alarms.check(heard(share, half, "tree/fire_rate"))) for share in shares] == [0, 0, 0, 1]


@pytest.mark.parametrize("rule", [Random(), Ranked(), Released()])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_fire_rate_of_other_rules_raises_no_alarm(rule, share):
    assert Alarms(rule).check(heard(share, FIRE_RATE_COUNT, "tree/fire_rate")) == []


@pytest.mark.parametrize(
    "alarm",
    dict.fromkeys([*ALARMS, *(alarm for name in RULES.own for alarm in RULES.get(name).alarms)]),
    ids=lambda alarm: f"{alarm.metric} {alarm.limit} {alarm.advice[-60:-30]}",
)
def test_every_alarm_listens_to_a_mean_that_exists(alarm):
    tally = Tally()
    tally_rewards([[0.0, 1.0]], tally)
    rewards = torch.tensor([0.0, 1.0])
    scored = ScoredLeaves(leaves=(), rewards=rewards, of_all_ranks=rewards, trained=rewards > 0, size=2)
    tally_baseline(scored, rewards, rewards, tally)
    rule = Schedule()
    other = {"ends": [0.0, 1.0], "leaves": 4, "made": 0.5}
    rule.load_state_dict({"score": [1.0, 1.0], "calls": [1.0, 0.0], "variance": {0: 0.2, 1: 0.1}} | other)
    for name, value in rule.metrics().items():
        tally.add(name, value)
    assert alarm.metric in {*tallied(tree_by_hand()).sums, *tally.sums}
    assert "{" not in alarm.advice.format(share="95%")


def test_groups_that_earned_one_reward_everywhere_are_counted():
    tally = Tally()
    nan = math.nan
    tally_rewards([[0.5, 0.5], [0.5, 1.0], [1.0, 1.0], [nan, nan]], tally)
    assert tally.values() == {"alarm/zero_variance_groups": 0.5}  # 2 of 4: what no function rewards equals nothing
    alone = Tally()
    tally_rewards([[1.0], [1.0]], alone)
    assert alone.values() == {}
