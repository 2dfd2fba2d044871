import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from arpo_trl.common.alarm import Alarm
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules import (
    RULES,
    BranchContext,
    BranchDecision,
    BranchRule,
    Candidate,
    LivePath,
    Moment,
    Planned,
    Rounds,
    build_rule,
    grant,
    register_rule,
)
from arpo_trl.rollout.rules.probability import Probability
from arpo_trl.rollout.rules.random import Random
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.released import Released
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import Node, NodeKind, RolloutTree
from arpo_trl.runs.identity import deciding_settings
from arpo_trl.runs.resumable import readable
from arpo_trl.training.reporting import Reporting
from support import ANSWER, ON_CPU, Scripted, addresses


class Coin(BranchContext):
    """A context whose coins all fall alike."""

    def __init__(self, coin: float = 0.0, *, vocab_size: int = 10, remaining: int = 1):
        super().__init__(tree=RolloutTree([0]), vocab_size=vocab_size, remaining=remaining, seed_of=lambda place: 0)
        self.fallen = coin

    def coin(self, candidate: Candidate) -> float:
        return self.fallen


def seen(turn: Sequence[float], root: Sequence[float] = (1.0,), before: Sequence[float] = ()) -> Candidate:
    return Candidate(node=2, address=(0,), depth=1, turn=turn, before=before, root=root)


def decision(delta: float, *, fires: bool = True) -> BranchDecision:
    return BranchDecision(entropy_nats=0.0, delta=delta, probability=0.5, fires=fires)


def served(decisions: Sequence[BranchDecision], remaining: int, wanted: int) -> list[int]:
    deltas = [decision.delta or 0.0 for decision in decisions]
    made = grant(decisions, [wanted] * len(decisions), deltas, remaining)
    return [decision.granted for decision in made]


def test_delta_is_the_difference_of_mean_entropies_over_ln_v():
    # mean(2, 4) − mean(1, 1) = 2; ΔH = 2 / ln V; P = 0.5 + 0.2 · ΔH
    made = Threshold().judge(seen([2.0, 4.0], [1.0, 1.0]), Coin(0.9, vocab_size=100))
    assert made.entropy_nats == 3.0
    assert made.delta == pytest.approx(2 / math.log(100))
    assert made.probability == pytest.approx(0.5 + 0.2 * 2 / math.log(100))


@pytest.mark.parametrize(("turn", "fires"), [(1.0001, True), (1.0, False), (0.9, False)])
def test_threshold_with_the_published_settings_says_that_entropy_rose(turn, fires):
    assert Threshold().judge(seen([turn]), Coin()).fires is fires


def test_threshold_ignores_the_coin_and_may_exceed_one():
    rule = Threshold(branch_probability=0.9, entropy_weight=1.0, branch_threshold=1.0)
    # ΔH = ln 10 / ln 10 = 1; P = 0.9 + 1 = 1.9 > 1
    assert rule.judge(seen([math.log(10)], [0.0]), Coin(0.999)).probability == pytest.approx(1.9)


@pytest.mark.parametrize(("coin", "fires"), [(0.69, True), (0.71, False)])
def test_probability_is_a_coin_with_p(coin, fires):
    # ΔH = 1, P = 0.5 + 0.2 = 0.7
    made = Probability().judge(seen([math.log(10)], [0.0]), Coin(coin))
    assert (made.fires, made.reason) == (fires, f"drew {coin:.3f}")


@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_random_is_blind_to_entropy(entropy):
    assert Random().judge(seen([entropy]), Coin(0.49)).fires
    assert not Random().judge(seen([entropy]), Coin(0.51)).fires


def test_probabilities_of_coins_are_clipped():
    rule = Probability(entropy_weight=100.0)
    assert rule.judge(seen([2.0], [0.0]), Coin(0.999)).probability == 1.0
    assert rule.judge(seen([0.0], [2.0]), Coin()).probability == 0.0
    assert not rule.judge(seen([0.0], [2.0]), Coin()).fires


def test_released_sums_entropies_so_that_short_segments_look_confident():
    # sums of the turn before: 1 · 0.5 − 4 · 0.5 = −1.5, though the means are equal
    made = Released().judge(seen([], [0.5] * 4, before=[0.5]), Coin())
    assert made.delta == pytest.approx(-1.5 / math.log(10))


def test_the_budget_goes_to_the_highest_delta_first():
    assert served([decision(0.1), decision(0.3), decision(0.9, fires=False), decision(0.2)], 2, 1) == [0, 1, 0, 1]


def test_ties_go_to_the_earlier_decision_and_a_fork_gets_the_remaining_leaves():
    assert served([decision(0.1), decision(0.1)], 3, 2) == [2, 1]


def test_ranked_serves_the_highest_entropies_whatever_their_delta():
    # ΔH · ln 10: 0.1 − 0, 2.0 − 2.5, 1.0 − 1.0
    candidates = [seen([0.1], [0.0]), seen([2.0], [2.5]), seen([1.0], [1.0])]
    ranked = Ranked().decide(candidates, Coin(remaining=2))
    assert [made.granted for made in ranked] == [0, 1, 1]
    assert [made.fires for made in ranked] == [False, True, True]


def supply(results: Iterable[int], remaining: int, branches_per_fork: int = 1) -> int:
    live = [LivePath(address=(i,), node=0, results=count) for i, count in enumerate(results)]
    return Threshold(branches_per_fork=branches_per_fork).supply(live, Coin(remaining=remaining))


def test_branches_can_take_the_budget_while_paths_have_results_enough_to_come():
    # one path with 2 results to come: (1 + 1)² − 1 = 3 ≥ 3
    assert supply([2], 3) == 3
    assert supply([1 << 30], 3) == 3


def test_branches_take_one_leaf_for_each_path_with_one_result_to_come():
    assert supply([1, 1], 5) == 2
    assert supply([], 3) == 0


def test_every_extra_turn_per_fork_raises_the_supply_of_branches():
    # Z = 2, one result to come: 3¹ − 1 = 2 of 5
    assert supply([1], 5, branches_per_fork=2) == 2


def test_every_file_of_the_package_registers_the_rule_of_its_name():
    assert {"threshold", "released", "random"} <= {*RULES.own}
    assert [RULES.get(name).name for name in RULES.own] == RULES.own


def test_the_tree_and_the_rules_import_no_torch():
    code = "import sys; from arpo_trl.rollout.rules import RULES; [RULES.get(name) for name in RULES.own]"
    subprocess.run([sys.executable, "-c", f"{code}; assert not {{'torch', 'trl'}} & set(sys.modules)"], check=True)


def test_a_name_belongs_to_one_class():
    class Another(Threshold):
        pass

    with pytest.raises(
        ConfigError, match=r"Another cannot be registered as the branch rule 'random': .*random\.Random"
    ):
        register_rule("random")(Another)


def test_an_unknown_rule_gets_an_error_with_all_rules():
    with pytest.raises(ConfigError, match=r"There is no branch rule 'rnd'; expected one of .*'random'"):
        build_rule("rnd", {}, {})


# Rules from outside the package --------------------------------------------------------------------------------------


@register_rule("widths")
@dataclass(frozen=True, kw_only=True)
class Widths(BranchRule):
    """Leaves by depth: at its m-th result each path becomes widths[m] / widths[m − 1] paths, whatever it reads."""

    moment: ClassVar[Moment] = Moment.RESULT

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(below % above for above, below in pairwise(self.widths)):
            raise ConfigError(f"widths is {self.widths}; expected multiples of one another.")

    def extra(self, depth: int) -> int:
        return self.widths[depth] // self.widths[depth - 1] - 1 if depth < len(self.widths) else 0

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        return BranchDecision(fires=self.extra(candidate.depth) > 0)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        assert all(not candidate.turn for candidate in candidates)  # nothing is written yet
        judged = [self.judge(candidate, context) for candidate in candidates]
        wanted = [self.extra(candidate.depth) for candidate in candidates]
        return grant(judged, wanted, [0.0] * len(judged), context.remaining)

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        total = 0
        for path in live:
            nodes = context.tree.path(path.node)
            first = 1 + sum(node.kind is NodeKind.OBSERVATION for node in nodes)
            total += math.prod(1 + self.extra(depth) for depth in range(first, first + path.results)) - 1
        return total


@register_rule("surest_last")
@dataclass(frozen=True)
class TopRounds(BranchRule):
    """Rounds of `width` branches at the highest entropies per sibling, each once the paths of the last have ended."""

    moment: ClassVar[Moment] = Moment.PATHS_DONE

    width: int = 1

    def start(self, context: BranchContext) -> Any:
        return []

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        siblings = len(context.tree.nodes[candidate.node].children)
        return BranchDecision(
            entropy_nats=candidate.turn[0], delta=candidate.turn[0] / siblings, probability=None, fires=True
        )

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        judged = [self.judge(candidate, context) for candidate in candidates]
        scores = [made.delta or 0.0 for made in judged]
        wanted = [self.branches_per_fork] * len(judged)
        made = grant(judged, wanted, scores, min(self.width, context.remaining))
        context.state.append([decision.granted for decision in made])
        return [replace(decision, fires=decision.granted > 0) for decision in made]

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        return context.remaining  # the next round's


@register_rule("disputed")
@dataclass(frozen=True)
class Disputed(BranchRule):
    """Branches where the leaves below an observation earned different rewards; what is left goes to the root."""

    moment: ClassVar[Moment] = Moment.LEAVES_SCORED

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        node = context.tree.nodes[candidate.node]
        below = [
            reward
            for leaf, reward in zip(context.tree.leaves(), context.rewards, strict=True)
            if any(step is node for step in leaf.nodes)
        ]
        return BranchDecision(fires=max(below) > 0)


def settings(**values: Any) -> ARPOConfig:
    return ARPOConfig(output_dir="/tmp/unused", **ON_CPU, **values)


def two_searches(request, context):
    depth, path = request.key[-1], request.key[1]
    return ScriptedTurn(
        text=f"<search>iron {path} {depth}</search>" if depth < 2 else ANSWER, entropies=[2.0 * path + depth]
    )


def test_a_rule_from_outside_is_chosen_by_name_with_options_of_its_own():
    rule = settings(branch_rule="widths", branch_rule_kwargs={"widths": (1, 3, 6)}).make_branch_rule()
    assert rule == Widths(widths=(1, 3, 6))
    # one path; at its first result three, at the second of each two: 1 · 3 · 2 = 6 leaves, and none from the root
    run = Scripted(two_searches, leaves=6, at_root=1, rule=rule)
    assert addresses(run) == [
        (0,),
        (0, 1, 0),
        (0, 1, 0, 2, 0),
        (0, 1, 1),
        (0, 1, 1, 2, 0),
        (0, 2, 0),
    ]


def test_leaves_beyond_a_rules_supply_start_at_the_root_immediately():
    # widths (1, 2): one path supplies one leaf of three, so two start at the root while it is being written
    run = Scripted(two_searches, leaves=4, at_root=1, rule=Widths(widths=(1, 2)))
    (tree,) = run().trees
    assert tree.topups == 2
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (0, 1, 0), (1,), (2,)]


def test_options_are_read_from_json_text_and_checked_by_the_rule():
    assert settings(branch_rule="surest_last", branch_rule_kwargs='{"width": 2}').make_branch_rule().width == 2
    with pytest.raises(ConfigError, match=r"branch_rule_kwargs has \['with'\], but .* 'surest_last' has \['width'\]"):
        settings(branch_rule="surest_last", branch_rule_kwargs={"with": 2})
    with pytest.raises(ConfigError, match=r"The branch rule 'widths' needs values for \['widths'\]. Set them in"):
        settings(branch_rule="widths")
    with pytest.raises(ConfigError, match="expected multiples of one another"):
        settings(branch_rule="widths", branch_rule_kwargs={"widths": (2, 3)})


def test_a_checkpoint_belongs_to_a_run_with_the_same_options():
    made = settings(branch_rule="surest_last", branch_rule_kwargs='{"width": 2}')
    assert deciding_settings(made)["branch_rule_kwargs"] == {"width": 2}


def test_a_rule_that_waits_decides_again_whenever_its_paths_have_ended():
    run = Scripted(two_searches, leaves=4, at_root=2, rule=TopRounds(width=1))
    rollout = run()
    (tree,) = rollout.trees
    # Entropies under the results: path 0: 1, 2; path 1: 3, 4. Round 1: the 4 branches. Round 2: 4 / 2 siblings = 2
    # falls behind the 3.
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (1,), (1, 1, 0), (1, 2, 0)]
    assert [node.decision.granted for node in tree.observations() if node.decision] == [0, 1, 0, 1]
    assert rollout.trees[0].topups == 0
    # 3 turns, the branch's 1, and then the other's 2
    assert rollout.turns_in_sequence == [6]


def test_a_node_that_branches_in_two_rounds_has_branches_of_both():
    def one_search(request, context):
        return ScriptedTurn(text="<search>iron</search>" if request.key[-1] == 0 else ANSWER, entropies=[1.0])

    run = Scripted(one_search, leaves=3, at_root=1, rule=TopRounds(width=1))
    (tree,) = run().trees
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (0, 1, 0), (0, 1, 1)]
    (observation,) = tree.observations()
    assert observation.decision is not None
    assert (observation.decision.granted, observation.decision.fires) == (2, True)


def test_a_rule_that_waits_and_grants_nothing_leaves_all_to_the_root():
    run = Scripted(lambda request, context: ScriptedTurn(text=ANSWER, entropies=[1.0]), leaves=3, rule=TopRounds())
    assert addresses(run) == [(0,), (1,), (2,)]


def test_a_rule_reads_the_rewards_of_finished_leaves():
    asked = []

    def score(request: int, tree: RolloutTree) -> list[float]:
        asked.append((request, len(tree.leaves())))
        return [float(leaf.address[0]) for leaf in tree.leaves()]

    # path 0 earned 0, path 1 earned 1: both of its results branch, and the one leaf left starts at the root
    run = Scripted(two_searches, leaves=5, at_root=2, rule=Disputed(), score=score)
    assert addresses(run) == [(0,), (1,), (1, 1, 0), (1, 2, 0), (2,)]
    assert asked == [(0, 2)]


@pytest.mark.parametrize("rewards", [[1.0], [1.0, "good"], [None, None], None, [[1.0, 2.0]]])
def test_a_score_that_is_not_one_number_per_leaf_is_an_error(rewards):
    run = Scripted(two_searches, leaves=5, at_root=2, rule=Disputed(), score=lambda request, tree: rewards)
    with pytest.raises(ConfigError, match=r"`score` of a TreeSampler returned .*; expected 2 numbers, one per leaf"):
        run()


def test_a_rule_that_reads_rewards_is_refused_without_a_score_function():
    rule = settings(branch_rule="disputed").make_branch_rule()
    with pytest.raises(ConfigError, match=r"The branch rule 'disputed' reads the rewards .* no `score` function"):
        Scripted(two_searches, rule=rule)


def test_a_rule_that_grants_more_than_the_budget_is_an_error():
    class Greedy(Disputed):
        moment = Moment.PROBE

        def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
            return [BranchDecision(fires=True, granted=3) for _ in candidates]

    with pytest.raises(
        ConfigError, match=r"'disputed' granted \[3\] leaves for 1 observations; .* a sum of at most 1"
    ):
        Scripted(two_searches, leaves=2, at_root=1, rule=Greedy())()


@pytest.mark.parametrize("judged", [None, True, 0.5])
def test_a_judgement_that_is_no_decision_is_an_error(judged):
    class Odd(Disputed):
        moment = Moment.PROBE
        decide = BranchRule.decide

        def judge(self, candidate, context):
            return judged

    with pytest.raises(ConfigError, match=rf"returned {judged} from `judge`; expected a BranchDecision"):
        Scripted(two_searches, leaves=3, at_root=1, rule=Odd())()


@pytest.mark.parametrize("roots", [0, 4])
def test_a_rule_that_starts_no_path_or_too_many_is_an_error(roots):
    class Rootless(Disputed):
        moment = Moment.PROBE

        def roots(self, planned: int, context: BranchContext) -> int:
            return roots

    with pytest.raises(ConfigError, match=rf"'disputed' starts {roots} paths at the root; expected 1 to 3"):
        Scripted(two_searches, leaves=3, at_root=1, rule=Rootless())()


def test_a_rule_may_decide_how_many_paths_start_at_the_root():
    class AllAtOnce(Disputed):
        moment = Moment.PROBE

        def roots(self, planned: int, context: BranchContext) -> int:
            return planned + context.remaining  # M

    rollout = Scripted(two_searches, leaves=3, at_root=1, rule=AllAtOnce())()
    assert [leaf.address for leaf in rollout.trees[0].leaves()] == [(0,), (1,), (2,)]
    assert rollout.trees[0].topups == 0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "'odd' decided None; expected a BranchDecision"),
        (BranchDecision(fires="no"), r"'odd' decided BranchDecision\(.*fires='no'.*expected a BranchDecision"),
        (BranchDecision(fires=True, reason=3), "'odd' decided .*a text as `reason`"),
        (BranchDecision(fires=True, delta="high"), "'odd' decided .*numbers or None"),
    ],
)
def test_a_decision_of_another_kind_is_an_error_with_the_rules_name(returned, message):
    class Odd(BranchRule):
        name = "odd"

        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return returned

        def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
            return [self.judge(candidate, context) for candidate in candidates]

    with pytest.raises(ConfigError, match=message):
        Scripted(two_searches, leaves=2, at_root=1, rule=Odd())()


def test_numbers_of_numpy_and_torch_become_pythons():
    class Foreign(BranchRule):
        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            numbers = {"delta": np.float32(0.5), "probability": torch.tensor(0.25), "entropy_nats": math.nan}
            return BranchDecision(fires=np.float64(1.0) > 0, granted=np.int64(1), **numbers)

    tree = Scripted(two_searches, leaves=2, at_root=1, rule=Foreign())().trees[0]
    (decision,) = [node.decision for node in tree.observations() if node.decision and node.decision.granted]
    assert json.loads(json.dumps(dataclasses.asdict(decision))) == {
        **{"fires": True, "granted": 1, "delta": 0.5, "probability": 0.25, "entropy_nats": None, "reason": ""}
    }


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"mine": "high"}, "The metric 'mine' of the branch rule 'measuring' is 'high'; expected a number"),
        ({"tree/leaves": 1.0}, "'measuring' has a metric 'tree/leaves', which is one of the package's"),
        ([1.0], r"'measuring' returned \[1.0\] from `metrics`; expected numbers by name"),
        ({1: 1.0}, "'measuring' returned {1: 1.0} from `metrics`"),
    ],
)
def test_a_metric_that_cannot_be_logged_is_an_error_with_the_rules_name(metrics, message):
    class Measuring(Disputed):
        name = "measuring"

        def metrics(self):
            return metrics

    tally = Tally()
    tally.totals["tree/leaves"] += 4
    settings = SimpleNamespace(rule=Measuring(), initial_rollouts=1, num_generations=2)
    trainer = SimpleNamespace(tree_sampler=SimpleNamespace(settings=settings))
    with pytest.raises(ConfigError, match=message):
        Reporting._learn(trainer, [], [], tally)


@pytest.mark.parametrize("granted", [-1, 1.5, "1", None])
def test_a_number_of_branches_that_is_not_whole_names_the_rule(granted):
    class Odd(BranchRule):
        name = "odd"

        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return BranchDecision(fires=True, granted=granted)

    with pytest.raises(ConfigError, match=rf"'odd' returned `granted` .*{granted}.* from `judge`; expected whole"):
        Scripted(two_searches, leaves=2, at_root=1, rule=Odd())()


def test_decisions_of_another_type_name_the_rule_and_its_method():
    class Odd(Random):
        name = "odd"

        def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
            return None

    with pytest.raises(ConfigError, match="'odd' returned None from `decide`; expected"):
        Scripted(two_searches, leaves=2, at_root=1, rule=Odd(branch_probability=1.0))()


def test_judge_may_set_the_number_of_branches():
    class Uneven(BranchRule):
        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return BranchDecision(fires=candidate.depth < 3, granted=2 if candidate.depth == 1 else 0)

    context = BranchContext(tree=RolloutTree([0]), vocab_size=10, remaining=4, seed_of=hash)
    seen_at = [dataclasses.replace(seen([]), depth=depth) for depth in (1, 2, 3)]
    made = Uneven(branches_per_fork=3).decide(seen_at, context)
    # two at the first, three wanted but two left at the second, and none at the third, which does not fire
    assert [decision.granted for decision in made] == [2, 2, 0]


def test_more_branches_than_the_top_ups_are_planned_for_are_an_error():
    class Three(BranchRule):
        name = "three"

        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return BranchDecision(fires=True, granted=3)

    class Declared(Three):
        sets_branches = True

        def most_branches(self, above: int = 0) -> int:
            return 3

    with pytest.raises(ConfigError, match=r"'three' returned `granted` 3 .*`most_branches` returns 1\. .*override"):
        Scripted(two_searches, leaves=4, at_root=1, rule=Three())()
    tree = Scripted(two_searches, leaves=4, at_root=1, rule=Declared())().trees[0]
    assert next(node.decision.granted for node in tree.observations() if node.decision) == 3


def test_a_state_that_no_checkpoint_could_give_back_is_an_error():
    state = {"score": [1.0, 2], "name": "text", "weights": torch.ones(2), "none": None}
    assert readable(state, "It") is state
    for wrong in (np.float64(1.0), np.ones(2), lambda: None, Disputed()):
        with pytest.raises(
            ConfigError, match=r"It cannot be read back from a checkpoint .* Expected numbers of Python"
        ):
            readable({"score": wrong}, "It")


def test_a_number_of_paths_that_is_not_whole_is_an_error():
    class Half(Disputed):
        moment = Moment.PROBE
        name = "half"

        def roots(self, planned: int, context: BranchContext) -> int:
            return 1.5

    with pytest.raises(ConfigError, match=r"'half' returned 1\.5 from `roots`; expected a whole number"):
        Scripted(two_searches, leaves=2, at_root=1, rule=Half())()


@pytest.mark.parametrize("picked", [[], None, [3], [-1], ["1"], [1.5], [0, 0, 0]])
def test_a_pick_outside_the_places_is_an_error(picked):
    class Astray(Rounds):
        name = "astray"

        def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
            return picked

    with pytest.raises(ConfigError, match=r"'astray' picked .*; expected 1 to 2 indices from 0 to 2"):
        Scripted(two_searches, leaves=3, at_root=1, rule=Astray())()


@pytest.mark.parametrize("planned", [[], [0, 0], [2, 0, 3], [2, -3], [1.5], None])
def test_a_plan_without_children_is_an_error(planned):
    class Lost(Planned):
        name = "lost"

        def plan(self, leaves: int, planned_: int, context: BranchContext) -> Sequence[int]:
            return planned

    with pytest.raises(ConfigError, match=r"'lost' planned .*; expected the number of roots, .* Correct its `plan`"):
        Scripted(two_searches, leaves=3, at_root=1, rule=Lost())()


def test_a_rule_brings_its_own_alarms():
    class Measured(Disputed):
        alarms = (Alarm(metric="disputed/share", limit=0.5, advice="{share} of the groups are disputed.", count=2),)

    tally = Tally()
    tally.add("disputed/share", 2.0, 3)
    assert Alarms(Measured()).check(tally) == ["arpo/disputed/share: 67% of the groups are disputed."]
    assert Alarms(Disputed()).check(tally) == []

    class Braces(Disputed):
        alarms = (Alarm(metric="disputed/share", limit=0.5, advice="Set {x: 1}.", count=2),)

    assert Alarms(Braces()).check(tally) == ["arpo/disputed/share: Set {x: 1}."]


def test_draws_of_a_place_are_its_own_and_repeat():
    context = BranchContext(tree=RolloutTree([0]), vocab_size=10, remaining=1, seed_of=hash)
    assert context.generator(0, 1).random() == context.generator(0, 1).random()
    assert context.generator(0, 1).random() != context.generator(0, 2).random()
    assert context.coin(seen([])) == context.generator(0, 1).random()


@pytest.mark.parametrize("name", RULES.own)
def test_every_rule_states_its_bias(name):
    assert "\n\nBias: " in str(sys.modules[RULES.get(name).__module__].__doc__)


@dataclass(frozen=True, kw_only=True)
class Late(Planned):
    """All branches at the second result."""

    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        return [planned, 1, leaves]


def test_a_planned_rule_only_says_how_many_children_paths_have():
    def two_searches(request, context):
        return ScriptedTurn(text=f"<search>{request.key}</search>" if request.key[-1] < 2 else ANSWER)

    (tree,) = Scripted(two_searches, leaves=5, at_root=2, rule=Late())().trees
    # 3 + 2 leaves
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (0, 2, 0), (0, 2, 1), (1,), (1, 2, 0)]
