"""The gradient of each credit on a small task with known values, against the exact policy gradient.

A path has two turns with two actions each. Two paths start at the root and each has two second turns, so M = 4. A turn
is one token. Its policy is a logistic unit with parameter θ, so the score of action a is a − p. There are 2⁶ trees:
expectations are exact sums over them, and samples of trees are draws of their numbers.
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

from arpo_trl.rollout.credit import CREDITS, SharedPrefixWeight, build_credit
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.tree import RolloutTree, StopReason
from arpo_trl.training.baselines import Baseline, BatchMean, Running, ScoredLeaves, ScoreNorm

FIRST = 0.6
"""Probability of action 1 in the first turn."""
SECOND = (0.2, 0.5)
"""The same in the second turn, after each first action."""
REWARD = ((0.0, 1.0), (0.4, 0.6))
"""By first and second action: a fork after action 0 matters much, one after action 1 little."""
SAMPLES = 20_000

V = [(1 - p) * R[0] + p * R[1] for p, R in zip(SECOND, REWARD, strict=True)]
J = (1 - FIRST) * V[0] + FIRST * V[1]
# dJ/dθ of a logistic unit is p · (1 − p) · (value of action 1 − value of action 0), times the chance to get there
EXACT = torch.tensor(
    [
        FIRST * (1 - FIRST) * (V[1] - V[0]),
        (1 - FIRST) * SECOND[0] * (1 - SECOND[0]) * (REWARD[0][1] - REWARD[0][0]),
        FIRST * SECOND[1] * (1 - SECOND[1]) * (REWARD[1][1] - REWARD[1][0]),
    ],
    dtype=torch.float64,
)

Actions = Sequence[tuple[int, Sequence[int]]]
"""For each path at the root, its first action and the second actions under it."""


def chance(p: float, action: int) -> float:
    return p if action else 1 - p


def grow(actions: Actions) -> tuple[RolloutTree, list[tuple[int, int]], float]:
    """A tree, the actions of its leaves in order, and its probability."""
    made, leaves, probability = RolloutTree([9]), [], 1.0
    for root, (first, seconds) in enumerate(actions):
        probability *= chance(FIRST, first)
        turn = made.add_turn(0, [1], "", [math.log(chance(FIRST, first))], [])
        seen = made.add_observation(turn.index, [2], [], "")
        for j, second in enumerate(seconds):
            p = chance(SECOND[first], second)
            probability *= p
            end = made.add_turn(seen.index, [3], "", [math.log(p)], [])
            made.end(end.index, (root,) if j == 0 else (root, 1, j - 1), StopReason.EOS)
            leaves.append((first, second))
    return made, leaves, probability


def balanced() -> list[Actions]:
    """All trees of two paths with two second turns each."""
    subtree = [(first, seconds) for first in (0, 1) for seconds in itertools.product((0, 1), repeat=2)]
    return list(itertools.product(subtree, repeat=2))


def independent(number: int) -> list[Actions]:
    """All trees of paths that share nothing."""
    return list(itertools.product([(first, (second,)) for first in (0, 1) for second in (0, 1)], repeat=number))


def lopsided() -> list[Actions]:
    """All trees in which only first action 1 branches: how many leaves a path becomes depends on the path."""
    subtree = [(0, (second,)) for second in (0, 1)] + [(1, seconds) for seconds in itertools.product((0, 1), repeat=2)]
    return list(itertools.product(subtree, repeat=2))


def against_j(tree: RolloutTree, rewards: torch.Tensor) -> torch.Tensor:
    """Advantages with the exact mean as baseline, so that only the credit can be biased."""
    return rewards - J


class Gradients:
    """Each tree's gradient (3,), the mean over its leaves, and each tree's probability."""

    def __init__(
        self,
        trees: Sequence[Actions],
        credit: Credit,
        advantages_of: Callable[[RolloutTree, torch.Tensor], torch.Tensor] = against_j,
    ):
        made = [grow(actions) for actions in trees]
        self.probability = torch.tensor([probability for _, _, probability in made], dtype=torch.float64)
        assert float(self.probability.sum()) == pytest.approx(1)
        self.of_tree = torch.stack([self._gradient(tree, leaves, credit, advantages_of) for tree, leaves, _ in made])
        self.expected = self.probability @ self.of_tree

    def _gradient(self, tree, leaves, credit, advantages_of) -> torch.Tensor:
        rewards = torch.tensor([REWARD[first][second] for first, second in leaves], dtype=torch.float64)
        # After the result of first action 0 the answer is likely, although action 1 has the higher value.
        after = {
            leaf.nodes[1].index: (0.9, 0.1)[first] for leaf, (first, _) in zip(tree.leaves(), leaves, strict=True)
        }
        credit.answer_probabilities = [{0: 0.5, **after}] if credit.reads_answers else ()
        entropies = torch.tensor([[_entropy(FIRST), _entropy(SECOND[first])] for first, _ in leaves]).double()
        z = (entropies - entropies.mean()) / entropies.std()
        credit.entropy_scores = torch.stack([z[:, 0], torch.zeros(len(leaves)), z[:, 1]], dim=1)
        given, weights = credit([tree], rewards, advantages_of(tree, rewards))
        given = (given if given.dim() == 2 else given.unsqueeze(1)).expand(len(leaves), 3)
        if weights is not None:
            given = given * weights
        total = torch.zeros(3, dtype=torch.float64)
        for row, (first, second) in enumerate(leaves):
            total[0] += given[row, 0] * (first - FIRST)
            total[1 + first] += given[row, 2] * (second - SECOND[first])
        return total / len(leaves)

    def sampled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard error over `SAMPLES` trees."""
        drawn = torch.multinomial(self.probability, SAMPLES, True, generator=torch.Generator().manual_seed(0))
        values = self.of_tree[drawn]
        return values.mean(dim=0), values.std(dim=0) / math.sqrt(SAMPLES)


def _entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def credit(name: str, *, copies: SharedPrefixWeight = SharedPrefixWeight.PER_LEAF, **options: object) -> Credit:
    return build_credit(name, options, copies)


UNBIASED = [
    ("soft", {}),
    ("hard", {}),
    ("tree", {}),
    ("tree", {"average": "children"}),  # which are alike in a balanced tree
    ("siblings", {}),
    ("gigpo", {"omega": 0.0}),
    ("cbpo", {"weight": 0.0}),
    ("aepo", {"weight": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), UNBIASED)
def test_unbiased_credits_give_the_exact_gradient(name, options):
    gradients = Gradients(balanced(), credit(name, **options))
    torch.testing.assert_close(gradients.expected, EXACT, rtol=0, atol=1e-6)
    mean, error = gradients.sampled()
    assert ((mean - EXACT).abs() < 3 * error).all()


BIASED = [
    ("tree", {"average": "entropy"}),
    ("tree", {"average": "softmax"}),
    ("tree", {"difference": True}),
    ("siblings", {"decay": 0.5}),
    ("gigpo", {}),
    ("tree_grpo", {}),
    ("cbpo", {"weight": 1.0}),  # with its default of .2 the bias is at most a tenth, about what 20,000 samples resolve
    ("aepo", {}),
    ("igpo", {}),
]


@pytest.mark.parametrize(("name", "options"), BIASED)
def test_biased_credits_are_further_off_than_samples_explain(name, options):
    mean, error = Gradients(balanced(), credit(name, **options)).sampled()
    assert ((mean - EXACT).abs() > 3 * error).any()


def test_the_bias_of_every_credit_is_stated_and_measured():
    """`once` has the bias of the credit that it wraps, and a test of its own."""
    assert {name for name, _ in (*UNBIASED, *BIASED)} | {SharedPrefixWeight.ONCE} == set(CREDITS.own)
    for name in CREDITS.own:
        assert "\n\nBias: " in str(sys.modules[CREDITS.get(name).__module__].__doc__), name


def ratio(name: str, **options: object) -> list[float]:
    """The expected gradient of each parameter, relative to the exact one."""
    return (Gradients(balanced(), credit(name, **options)).expected / EXACT).tolist()


def test_soft_is_biased_where_multiplicity_depends_on_the_path():
    first, after_0, after_1 = (Gradients(lopsided(), credit("soft")).expected / EXACT).tolist()
    assert after_1 > 1.1 * after_0  # paths that branch count more
    assert abs(first / after_0 - 1) > 0.1


def test_once_makes_late_turns_count_twice_as_much_as_early_ones():
    # two first turns and four second turns, over M = 4
    for name in ("soft", "siblings"):
        once = Gradients(balanced(), credit(name, copies=SharedPrefixWeight.ONCE)).expected / EXACT
        assert once.tolist() == pytest.approx([0.5, 1.0, 1.0])


def test_the_difference_to_the_node_above_shrinks_a_turn_by_its_share():
    # among two second turns each is half of what it is compared with
    assert ratio("tree", difference=True) == pytest.approx([1.0, 0.5, 0.5])


def test_a_decay_shrinks_early_turns_by_its_factor():
    assert ratio("siblings", decay=0.5) == pytest.approx([0.5, 1.0, 1.0])


@pytest.mark.parametrize("average", ["entropy", "softmax"])
def test_entropy_weights_shift_the_values_of_early_turns_to_surprising_children(average):
    first, *later = ratio("tree", average=average)
    assert later == pytest.approx([1.0, 1.0])
    # after action 0 reward 1 is rare, so it counts more than it should: action 0 looks better than it is
    assert first < 0.99


def test_z_scores_overweigh_forks_that_matter_little():
    # after action 1 rewards differ by .2, after action 0 by 1
    for name in ("gigpo", "tree_grpo"):
        _, matters, hardly = ratio(name)
        assert hardly > 2 * matters


def test_gigpo_leaves_first_turns_alone():
    assert ratio("gigpo")[0] == pytest.approx(1.0)


def test_cbpo_overweighs_forks_of_varied_ends_within_its_limits():
    first, matters, hardly = ratio("cbpo")
    assert first == pytest.approx(1.0)
    assert 0.9 <= hardly < matters <= 1.1


def test_aepo_overweighs_uncertain_decisions():
    first, certain, uncertain = ratio("aepo")  # entropies .67, .50 and .69
    assert certain < first < uncertain


def test_igpo_rewards_turns_that_make_the_answer_likely():
    first, *_ = ratio("igpo")
    assert first < 0  # towards action 0, against the reward


# Baselines -----------------------------------------------------------------------------------------------------------


def mean_baseline(tree: RolloutTree, rewards: torch.Tensor) -> torch.Tensor:
    return rewards - rewards.mean()


def with_baseline(baseline: Baseline) -> Callable[[RolloutTree, torch.Tensor], torch.Tensor]:
    def advantages(tree: RolloutTree, rewards: torch.Tensor) -> torch.Tensor:
        trained = torch.ones(len(rewards), dtype=torch.bool)
        scored = ScoredLeaves(
            leaves=tree.leaves(), rewards=rewards, of_all_ranks=rewards, trained=trained, size=len(rewards)
        )
        return rewards - baseline(scored)

    return advantages


def test_the_group_mean_shrinks_an_edge_by_its_share_of_the_leaves():
    # of four leaves a first turn has two, a second turn one
    shrunk = Gradients(balanced(), credit("soft"), mean_baseline).expected / EXACT
    assert shrunk.tolist() == pytest.approx([0.5, 0.75, 0.75])
    alone = Gradients(independent(4), credit("soft"), mean_baseline).expected / EXACT
    assert alone.tolist() == pytest.approx([0.75] * 3)
    batch = Gradients(independent(4), credit("soft"), with_baseline(BatchMean())).expected / EXACT
    assert batch.tolist() == pytest.approx([0.75] * 3)


def test_a_running_baseline_from_earlier_rollouts_has_no_bias():
    earlier = Running(decay=0.999)
    earlier.state = 0.3
    unchanged = with_baseline(earlier)

    def advantages(tree: RolloutTree, rewards: torch.Tensor) -> torch.Tensor:
        earlier.state = 0.3
        return unchanged(tree, rewards)

    made = Gradients(independent(4), credit("soft"), advantages)
    torch.testing.assert_close(made.expected, EXACT, rtol=0, atol=1e-6)


def test_score_norms_lower_the_variance_that_the_mean_baseline_leaves():
    """Up to scale: both baselines include the leaf itself, so each gradient is compared after scaling it to EXACT."""

    def relative_variance(advantages: Callable[[RolloutTree, torch.Tensor], torch.Tensor]) -> float:
        made = Gradients(independent(4), credit("soft"), advantages)
        scale = float(made.expected @ EXACT / (EXACT @ EXACT))
        spread = ((made.of_tree / scale - made.expected / scale) ** 2).sum(dim=1)
        return float(made.probability @ spread)

    weighted = with_baseline(ScoreNorm(per_sequence=False, cap=None))
    assert relative_variance(weighted) < relative_variance(mean_baseline)
