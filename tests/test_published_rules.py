"""The rules of later papers: surprisal (AT²PO), uniform (Tree-GRPO), cbpo and aepo."""

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.metrics import Tally, tally_trees
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules import (
    BranchContext,
    BranchDecision,
    BranchRule,
    BudgetSplit,
    Candidate,
    LivePath,
    Planned,
    Rounds,
)
from arpo_trl.rollout.rules.aepo import AEPO
from arpo_trl.rollout.rules.aepo_released import ReleasedAEPO
from arpo_trl.rollout.rules.cbpo import CBPO
from arpo_trl.rollout.rules.probability import Probability
from arpo_trl.rollout.rules.random import Random
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.released import Released
from arpo_trl.rollout.rules.schedule import Schedule
from arpo_trl.rollout.rules.surprisal import Surprisal
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.rules.uniform import Uniform
from arpo_trl.rollout.tree import RolloutTree
from support import ANSWER, ON_CPU, Scripted

LN10 = math.log(10)


class Grown(BranchContext):
    """A context with a tree grown by hand; V = 10, and every coin falls like `coin`."""

    def __init__(self, *, remaining: int = 8, coin: float = 0.5):
        super().__init__(
            tree=RolloutTree([0]), vocab_size=10, remaining=remaining, seed_of=lambda place: hash((7, place))
        )
        self.fallen = coin

    def coin(self, candidate: Candidate) -> float:
        return self.fallen

    def turn(self, parent: int, *, logprobs: Sequence[float] = (-1.0,), entropies: Sequence[float] = ()) -> int:
        return self.tree.add_turn(parent, [1] * len(logprobs), "", list(logprobs), entropies).index

    def result(self, parent: int, granted: int | None = None) -> int:
        node = self.tree.add_observation(parent, [2], [], "")
        if granted is not None:
            node.decision = BranchDecision(fires=granted > 0, granted=granted)
        return node.index

    def below(self, granted: Sequence[int]) -> int:
        """The last of a path's observations, after others that branched like that."""
        node = 0
        for count in granted:
            node = self.result(self.turn(node), count)
        return self.result(self.turn(node))


def candidate(node: int, delta: float = 0.0, address: tuple[int, ...] = (0,), depth: int = 1) -> Candidate:
    """ΔH is `delta` for V = 10."""
    return Candidate(node=node, address=address, depth=depth, turn=[1 + delta * LN10], before=[], root=[1.0])


def settings(rule: str, **values: Any) -> ARPOConfig:
    return ARPOConfig(output_dir="/tmp/unused", **ON_CPU, branch_rule=rule, **values)


# surprisal -----------------------------------------------------------------------------------------------------------


def surprising() -> tuple[Grown, list[Candidate]]:
    """Two paths with one result each: mean −log π 2.0 and 2.2 at the root, 2.05 and 1.0 under the results."""
    grown = Grown(remaining=4)
    results = [grown.result(grown.turn(0, logprobs=logprobs)) for logprobs in ([-1.0, -3.0], [-2.2])]
    grown.turn(results[0], logprobs=[-2.05])
    grown.turn(results[1], logprobs=[-1.0])
    return grown, [candidate(results[0]), candidate(results[1], address=(1,))]


def test_surprisal_ranks_root_and_results_by_the_most_surprising_turn_less_siblings():
    grown, candidates = surprising()
    rule = Surprisal(rounds=2)
    scores = [rule.score(grown.tree.nodes[node], grown.tree) for node in (0, *(made.node for made in candidates))]
    # root: 2.2 − .05 · 1 sibling; the results have one turn each
    assert scores == pytest.approx([2.15, 2.05, 1.0])


def test_surprisal_gives_a_round_to_the_k_best_places():
    grown, candidates = surprising()
    rule = Surprisal(rounds=2)
    grown.state = rule.start(grown)  # K = 4 / 2 = 2
    decisions = rule.decide(candidates, grown)
    assert [made.granted for made in decisions] == [1, 0]
    assert [made.reason for made in decisions] == [
        "round 1: 1 of 2 paths, score 2.050 nats",
        "round 1: 0 of 2 paths, score 1.000 nats",
    ]
    grown.remaining -= 1
    assert rule.supply([], grown) == 2  # one of the 3 left starts at the root now, 2 are the next round's
    # with .2 nats a sibling the root falls behind to 2.0, but is still the second of two
    rule = Surprisal(rounds=4, penalty=0.2)
    grown.remaining = 4
    grown.state = rule.start(grown)  # K = 1
    assert [made.granted for made in rule.decide(candidates, grown)] == [1, 0]
    assert rule.supply([], grown) == 4


def one_search(request, context):
    return ScriptedTurn(text=f"<search>{request.seed}</search>" if request.key[-1] == 0 else ANSWER)


def test_surprisal_rounds_follow_one_another():
    # Every logprob is −.5. Round 1: the root (one turn, first of equals) and the result of path 0. Round 2: .45 at
    # both, and .5 at the result of the new path 1; K = 2 takes it and the root.
    rollout = Scripted(one_search, leaves=5, at_root=1, rule=Surprisal(rounds=2))()
    assert [leaf.address for leaf in rollout.trees[0].leaves()] == [(0,), (0, 1, 0), (1,), (1, 1, 0), (2,)]
    assert rollout.turns_in_sequence == [6]  # three waves of two turns
    assert [node.decision.reason for node in rollout.trees[0].observations() if node.decision] == [
        "round 1: 1 of 2 paths, score 0.500 nats; round 2: 0 of 2 paths, score 0.450 nats",
        "round 2: 1 of 2 paths, score 0.500 nats",
    ]


@pytest.mark.parametrize("rule", [Surprisal(rounds=2), Uniform(rounds=2)])
def test_without_tool_calls_there_are_no_more_waves_than_rounds(rule):
    # K = 4, and the root is the only place
    rollout = Scripted(lambda request, context: ScriptedTurn(text=ANSWER), leaves=16, at_root=8, rule=rule)()
    assert len(rollout.trees[0].leaves()) == 16
    assert rollout.turns_in_sequence == [1 + 2]
    assert rollout.trees[0].topups == 8


def test_the_rest_of_a_round_starts_at_the_root():
    # K = 6 and the root and two results are places: one path at each, and three more at the root
    rollout = Scripted(one_search, leaves=8, at_root=2, rule=Surprisal(rounds=1))()
    found = [leaf.address for leaf in rollout.trees[0].leaves()]
    assert found == [(0,), (0, 1, 0), (1,), (1, 1, 0), (2,), (3,), (4,), (5,)]
    assert rollout.turns_in_sequence == [4]  # two waves of two turns
    reasons = [node.decision.reason for node in rollout.trees[0].observations() if node.decision]
    assert reasons == ["round 1: 1 of 6 paths, score 0.500 nats"] * 2


# uniform -------------------------------------------------------------------------------------------------------------


def test_uniform_draws_root_and_results_alike_with_replacement():
    counted: Counter[int] = Counter()
    for seed in range(600):
        grown = Grown(remaining=4)
        grown.seed_of = lambda place, seed=seed: seed
        results = [grown.result(grown.turn(0)) for _ in range(2)]
        rule = Uniform()
        grown.state = rule.start(grown)
        granted = [made.granted for made in rule.decide([candidate(node) for node in results], grown)]
        at_root = 4 - sum(granted)
        grown.remaining -= sum(granted)
        assert rule.supply([], grown) == 0  # all of the round start now, at the root or not
        counted.update(dict(enumerate((at_root, *granted))))
        counted["twice"] += max(granted) > 1
    # 2,400 draws of three places: 800 each, standard deviation √(2400 · ⅓ · ⅔) = 23
    assert all(abs(counted[place] - 800) < 3 * 23 for place in range(3))
    assert counted["twice"] > 0


def test_uniform_waits_and_spends_all_in_its_rounds():
    rollout = Scripted(one_search, leaves=6, at_root=2, rule=Uniform(rounds=1))()
    assert len(rollout.trees[0].leaves()) == 6
    assert rollout.turns_in_sequence[0] <= 4  # two waves of at most two turns


def test_rounds_differ_by_at_most_one_branch():
    # 5 branches in 4 rounds
    sizes = []

    class Counted(Uniform):
        def pick(self, places, count, context):
            sizes.append(count)
            return super().pick(places, count, context)

    rollout = Scripted(one_search, leaves=7, at_root=2, rule=Counted(rounds=4))()
    assert len(rollout.trees[0].leaves()) == 7
    assert sizes == [2, 1, 1, 1]


def test_a_logprob_that_the_engine_could_not_compute_does_not_count():
    context = Grown()
    node = context.tree.nodes[context.turn(0, logprobs=[-1.0, math.nan, -3.0])]
    assert node.known_logprobs == [-1.0, -3.0]
    assert Surprisal().score(context.tree.root, context.tree) == 2.0
    unknown = Grown()
    unknown.turn(0, logprobs=[math.nan])
    assert Surprisal().score(unknown.tree.root, unknown.tree) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # P is at most α + |β|, since ΔH is in [−1, 1]
        ({"rule": "threshold", "branch_threshold": 0.7}, "its P is at most 0.7, and must exceed 0.7. Lower bra"),
        ({"rule": "threshold", "entropy_weight": 0}, "its P is at most 0.5, and must exceed 0.5"),
        ({"rule": "threshold", "entropy_weight": -0.1, "branch_threshold": 0.6}, "P is at most 0.6"),
        ({"rule": "random", "branch_probability": 0}, "'random' never branches: its P is at most 0, .* Raise"),
        ({"rule": "probability", "branch_probability": 0, "entropy_weight": 0}, "'probability' never branches"),
        ({"rule": "released", "branch_probability": 0, "entropy_weight": 0}, "'released' never branches"),
        ({"rule": "aepo", "branch_threshold": 1}, "'aepo' never branches: its P is at most 0.7"),
        ({"rule": "cbpo", "branch_rule_kwargs": {"least": 1}}, "'cbpo' never branches: its P is at most 1, .* l"),
        ({"rule": "cbpo", "branch_rule_kwargs": {"base": 0, "slope": 0}}, "'cbpo' never branches"),
        # (1 + 1)¹ = 2 leaves from the first path
        ({"max_tool_calling_iterations": 1, "initial_rollouts": 1}, "the N = 1 first paths become at most 2 of M = 8"),
        # one decision about the results of the first path: 1 · (1 + 6) = 7
        (
            {"rule": "ranked", "max_tool_calling_iterations": 6, "initial_rollouts": 1},
            "the N = 1 first paths become at most 7 of M = 8",
        ),
        ({"rule": "aepo", "initial_rollouts": 7}, "N = 7 first paths have ended, .* Lower initial_rollouts, or raise"),
        (
            {"rule": "aepo_released", "entropy_weight": 0, "branch_threshold": 1},
            "P is at most 1, and must exceed 1. Lower branch_threshold, or raise entropy_weight",
        ),
        # below one branch P is at most 1 / 2², so a path branches once
        (
            {"rule": "cbpo", "initial_rollouts": 1, "branch_rule_kwargs": {"power": 2, "least": 0.5}},
            "the N = 1 first paths become at most 2 of M = 8",
        ),
        # (1 + 2)² = 9, but 2 with one branch along a path
        (
            {"rule": "cbpo", "initial_rollouts": 1, "branch_rule_kwargs": {"per_path": 1}},
            "the N = 1 first paths become at most 2 of M = 8",
        ),
    ],
)
def test_a_rule_that_cannot_spend_its_budget_is_refused(values, message):
    config = {"num_generations": 8, "per_device_train_batch_size": 8}
    with pytest.raises(ConfigError, match=message):
        settings(**config | {"rule": "threshold", "max_tool_calling_iterations": 4} | values)
    nothing = {"initial_rollouts": 8, "branch_rule_kwargs": None}
    settings(**config | {"rule": "threshold"} | values | nothing)  # nothing has to branch


def test_aepo_with_two_leaves_advises_only_what_helps():
    with pytest.raises(ConfigError, match=r"no leaf of M = 2 is left for branches\. Raise num_generations\."):
        settings(rule="aepo", num_generations=2, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    "values",
    [
        {"rule": "aepo_released", "branch_threshold": 1},  # u + γ·ΔH
        {"rule": "aepo", "max_tool_calling_iterations": 1},  # it starts further paths itself
        {"rule": "ranked", "initial_rollouts": 1, "max_tool_calling_iterations": 7},  # 1 · (1 + 7) = 8
        {"rule": "uniform", "initial_rollouts": 1, "max_tool_calling_iterations": 1},  # the root is a place
        {"initial_rollouts": 1, "max_tool_calling_iterations": 3},  # 2³ = 8
        {"initial_rollouts": 2, "max_tool_calling_iterations": 1, "branches_per_fork": 3},  # 2 · (1 + 3) = 8
        {"initial_rollouts": 1, "max_tool_calling_iterations": 10**6},
        {"initial_rollouts": 1, "branches_per_fork": 10**12},
        # two results with (2 + 1)(2 + 1) ≥ 8 of the 4 branches along a path
        {"rule": "cbpo", "initial_rollouts": 1, "max_tool_calling_iterations": 2},
    ],
)
def test_a_rule_that_can_spend_its_budget_is_accepted(values):
    settings(**{"rule": "threshold", "num_generations": 8, "per_device_train_batch_size": 8} | values)


@pytest.mark.parametrize("rule", ["surprisal", "uniform"])
def test_rounds_need_leaves_to_spend(rule):
    config = {"num_generations": 4, "per_device_train_batch_size": 4, "initial_rollouts": 2}
    with pytest.raises(ConfigError, match=r"rounds is 3, but only 2 leaves are left .*M − N = 4 − 2.*Lower rounds"):
        settings(rule, branch_rule_kwargs={"rounds": 3}, **config)
    settings(rule, **config | {"initial_rollouts": 4})  # nothing branches, so nothing is missing
    with pytest.raises(ConfigError, match="rounds is 0; expected an integer of at least 1"):
        settings(rule, branch_rule_kwargs={"rounds": 0}, **config)
    with pytest.raises(ConfigError, match=r"sets the number of branches itself\. Remove branches_per_fork"):
        settings(rule, branches_per_fork=2, **config)
    settings(rule, branch_rule_kwargs={"rounds": 2}, **config)


# cbpo ----------------------------------------------------------------------------------------------------------------


def test_cbpo_divides_the_probability_by_the_branches_so_far():
    # ΔH = .2: clip(.2 + 2 · .2) = .6
    rule, grown = CBPO(), Grown()
    made = rule.judge(candidate(grown.below([]), 0.2), grown)
    assert (made.probability, made.fires) == (pytest.approx(0.6), True)
    # two branches above: .6 / 3^.2 = .6 / 1.24573
    assert rule.judge(candidate(grown.below([1, 0, 1]), 0.2), grown).probability == pytest.approx(0.6 / 1.24573, 1e-5)
    # ΔH = 1 is clipped to 1, ΔH = −1 to 0; ΔH = .025 is .25, which is not more than .25
    assert rule.judge(candidate(grown.below([]), 1.0), grown).probability == 1.0
    assert rule.judge(candidate(grown.below([]), -1.0), grown).probability == 0.0
    assert not CBPO(base=0.25).judge(candidate(grown.below([]), 0.0), grown).fires


@pytest.mark.parametrize(
    ("above", "delta", "granted"),
    [
        ([], 0.2, 3),  # .6, .6 / (2 · 2)^.2 = .455, .6 / (3 · 3)^.2 = .387: the most per node
        ([2], 0.2, 2),  # .6 / 3^.2 = .482, .6 / (4 · 2)^.2 = .396, and then the path has 4
        ([3, 1], 0.2, 0),  # the path has 4
        ([], 0.05, 1),  # .3, .3 / 4^.2 = .227
        ([3], 0.05, 0),  # .3 / 4^.2 = .227
        ([], 0.0, 0),  # .2
    ],
)
def test_cbpo_asks_again_for_each_branch(above, delta, granted):
    grown = Grown()
    (made,) = CBPO().decide([candidate(grown.below(above), delta)], grown)
    assert (made.granted, made.fires) == (granted, granted > 0)


def test_cbpo_reserves_leaves_for_the_maximum_branches_of_a_result():
    # one result to come: up to 3 branches; two: 4² − 1
    live = [LivePath(address=(0,), node=0, results=1)]
    assert CBPO().supply(live, Grown(remaining=8)) == 3
    assert CBPO(per_node=1).supply(live, Grown(remaining=8)) == 1
    assert CBPO().supply([LivePath(address=(0,), node=0, results=2)], Grown(remaining=20)) == 15


def test_cbpo_counts_branches_without_overflow_and_without_a_loop_over_its_limits():
    # 2^−500 < .25: one branch, also with 5000, where 2^5000 is no float
    assert CBPO(power=500.0).most_branches() == CBPO(power=5000.0).most_branches() == 1
    with pytest.raises(ConfigError, match="the N = 6 first paths become at most 12 of M = 16 leaves"):
        settings("cbpo", branch_rule_kwargs={"power": 5000.0})
    # (1 + j)² < 4^5 = 1024 for j ≤ 30: 31 branches
    assert CBPO(per_node=10**12, per_path=10**12).most_branches() == 31
    # P does not fall
    assert CBPO(power=0.0, per_node=10**12, per_path=10**12).most_branches(1) == 10**12 - 1


def test_cbpo_starts_with_6_of_16():
    assert settings("cbpo").initial_rollouts == 6
    with pytest.raises(ConfigError, match="per_node is 0; expected an integer of at least 1"):
        settings("cbpo", branch_rule_kwargs={"per_node": 0})


# aepo ----------------------------------------------------------------------------------------------------------------


def after_first_paths(rule: BudgetSplit, coin: float = 0.5) -> Grown:
    grown = Grown(coin=coin, remaining=15)
    assert rule.roots(1, grown) == 1
    return grown


@pytest.mark.parametrize(
    ("above", "delta", "fires"),
    [
        ([], 0.1, True),  # .5 + .2 · .1 = .52 > .5
        ([1], 0.6, False),  # .62 · .8 = .496
        ([1], 0.7, True),  # .64 · .8 = .512
        ([1, 1], 0.9, False),  # .68 · .6 = .408
        ([1, 1, 1, 0], 0.1, True),  # in a row: none
        ([], 0.0, False),  # .5
    ],
)
def test_aepo_as_in_the_paper_lowers_p_with_consecutive_branches(above, delta, fires):
    rule = AEPO()
    grown = after_first_paths(rule)
    made = rule.judge(candidate(grown.below(above), delta, address=(1,)), grown)
    assert made.fires is fires
    if above == [1, 1]:
        assert made.probability == pytest.approx(0.408)
    # .56 · .9
    made = AEPO(penalty=0.05).judge(candidate(grown.below([1, 1]), 0.3, address=(1,)), grown)
    assert made.probability == pytest.approx(0.504)


@pytest.mark.parametrize(("coin", "fires"), [(0.53, True), (0.52, False)])
def test_aepo_as_released_draws(coin, fires):
    # two in a row: (u + .2 · .15) · .9 ≥ .5 for u ≥ .52556, so with probability .47444
    rule = ReleasedAEPO()
    grown = after_first_paths(rule, coin)
    made = rule.judge(candidate(grown.below([1, 1]), 0.15, address=(1,)), grown)
    assert (made.fires, made.probability) == (fires, pytest.approx(1 - (0.5 / 0.9 - 0.03)))
    assert made.reason == f"2 consecutive branches above, drew {coin:.3f}"
    # twenty in a row leave nothing
    made = rule.judge(candidate(grown.below([1] * 20), 0.15, address=(1,)), grown)
    assert (made.fires, made.probability) == (False, 0.0)


@pytest.mark.parametrize(
    ("rule", "weight", "m"),
    [
        # H_root .5, H_tool mean(1.5, 2.5) = 2 nats; ΔH' = −1.5 / ln 10 = −.65144
        (AEPO, 0.5, 7),  # 16 · σ(−.32572) = 16 · .41928 = 6.708
        (ReleasedAEPO, 0.5, 7),  # ⌊6.708⌋ + 1
        (AEPO, 2.0, 3),  # 16 · σ(−1.30288) = 16 · .21367 = 3.419
        (ReleasedAEPO, 2.0, 4),
        (AEPO, 0.0, 8),  # half
        (ReleasedAEPO, 0.0, 9),
        (AEPO, 20.0, 0),  # at least one more starts all the same
        (AEPO, 1e6, 0),
    ],
)
def test_aepo_splits_the_leaves_by_the_entropies_of_the_first_path(rule, weight, m):
    def measured(request, context):
        depth = request.key[-1]
        text = f"<search>{request.key}</search>" if depth < 2 else ANSWER
        return ScriptedTurn(text=text, entropies=[[0.5, 1.5, 2.5][depth]])

    alpha = {"branch_probability": 1.0} if rule is AEPO else {}
    split = rule(split_weight=weight, penalty=0.0, branches_per_fork=6, **alpha)
    rollout = Scripted(measured, leaves=16, at_root=1, rule=split, vocab_size=10)()
    (tree,) = rollout.trees
    assert len(tree.leaves()) == 16
    first = [node for node in tree.observations() if node.decision and node.parent == 1]
    assert [node.decision.granted for node in first] == [0]  # the first path does not branch
    assert first[0].decision.reason == "a first path, which is only measured"
    assert first[0].decision.fires is None
    if rule is AEPO:  # α = 1
        tally = Tally()
        tally_trees([tree], tally)
        assert tally.values().get("tree/fire_rate", 1.0) == 1.0  # of the decisions that it made
    if rule is AEPO:  # α = 1 fires everywhere, so that branches take all that is left
        assert len(tree.root.children) == max(2, m)
        assert tree.topups == max(1, m - 1)


def test_aepo_without_a_result_uses_half():
    rollout = Scripted(lambda request, context: ANSWER, leaves=8, at_root=1, rule=AEPO())()
    # 8 · σ(0) = 4: three more start at the root, and when they have no result either, the last four
    (tree,) = rollout.trees
    assert (len(tree.leaves()), tree.topups) == (8, 7)
    assert rollout.turns_in_sequence == [3]


def test_aepo_measures_one_path_by_default():
    assert settings("aepo").initial_rollouts == 1
    assert settings("aepo", initial_rollouts=3).initial_rollouts == 3
    with pytest.raises(ConfigError, match=r"has \['form'\], but the branch rule 'aepo' has .*'penalty'"):
        settings("aepo", branch_rule_kwargs={"form": "coded"})


# all -----------------------------------------------------------------------------------------------------------------

RULES = [Surprisal(), Uniform(rounds=2), CBPO(), AEPO(), ReleasedAEPO(), Schedule(widths=[2, 2, 2]), Schedule()]


def named(rule: BranchRule) -> str:
    return f"{rule.name}-{getattr(rule, 'widths', '')}"


def uneven(request, context):
    """Paths of different depths, some with malformed calls, some too long."""
    draws = random.Random(request.seed)
    text = draws.choice([ANSWER, "<search> </search>", *[f"<search>{request.seed}</search>"] * 3])
    entropies = [draws.random() * 2]
    return ScriptedTurn(text=text, entropies=entropies, polls=draws.randrange(1, 4), ends=draws.random() < 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("at_root", [1, 2, 7, 8])
def test_every_tree_has_exactly_m_leaves_whatever_fails(rule, at_root):
    def search(query: str) -> str:
        """Search.

        Args:
            query: What.
        """
        if int(query) % 4 == 0:
            raise OSError("no network")
        return query

    run = Scripted(uneven, leaves=8, at_root=at_root, rule=rule, tools=[search], max_completion_length=120)
    for tree in run(groups=8).trees:
        tree.check(8)


@pytest.mark.parametrize("rule", [*RULES, Threshold(), Probability(), Random(), Ranked(), Released()], ids=named)
def test_every_decision_says_what_decided(rule):
    decisions = [
        node.decision
        for tree in Scripted(uneven, leaves=8, at_root=2, rule=rule)(groups=4).trees
        for node in tree.observations()
        if node.decision is not None
    ]
    assert len(decisions) > 10
    assert all(made.reason or made.probability is not None for made in decisions)
    assert all(made.fires for made in decisions if made.granted)
    if isinstance(rule, Planned | Rounds):  # which want no more than there is
        assert all(made.granted for made in decisions if made.fires)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_evaluation_asks_no_rule(rule):
    run = Scripted(uneven, leaves=8, at_root=2, rule=rule)
    run.sampler.settings = run.sampler.settings.without_branching(3)
    for tree in run(groups=3).trees:
        assert [leaf.address for leaf in tree.leaves()] == [(0,), (1,), (2,)]


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_trees_do_not_depend_on_the_tools_timing(rule):
    def slow(order: int):
        def search(query: str) -> str:
            """Search.

            Args:
                query: What.
            """
            time.sleep(random.Random(int(query) + order).random() * 0.003)
            return query

        return search

    def grown(order: int) -> list[Any]:
        run = Scripted(uneven, leaves=8, at_root=2, rule=rule, tools=[slow(order)])
        return [[(leaf.address, leaf.turns) for leaf in tree.leaves()] for tree in run(groups=4).trees]

    assert grown(1) == grown(2)


@pytest.mark.parametrize("rule", [Surprisal(), Uniform(rounds=2)], ids=named)
def test_a_rule_that_waits_gives_the_same_tree_in_any_order(rule):
    def script(order: int):
        def turn(request, context):
            made = uneven(request, context)
            polls = random.Random(request.seed + order).randrange(1, 5)
            return ScriptedTurn(text=made.text, entropies=made.entropies, polls=polls)

        return turn

    def search(query: str) -> str:
        """Search.

        Args:
            query: What.
        """
        return query

    def grown(order: int) -> list[Any]:
        run = Scripted(script(order), leaves=8, at_root=2, rule=rule, tools=[search], schedule=RolloutSchedule.OVERLAP)
        return [[(leaf.address, leaf.turns) for leaf in tree.leaves()] for tree in run(groups=4).trees]

    assert grown(1) == grown(2)
