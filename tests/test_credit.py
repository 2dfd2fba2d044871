import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.rollout.credit import CREDITS, SharedPrefixWeight, attributions, build_credit, register_credit
from arpo_trl.rollout.credit.base import Credit, attribute, mean_over_leaves, token_nodes
from arpo_trl.rollout.credit.once import Once, first_copies
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.rules import BranchContext, BranchDecision, BranchRule, Candidate, register_rule
from arpo_trl.rollout.tree import RolloutTree, StopReason
from support import ANSWER, ON_CPU, save_tiny_model, search, tokenizer

# Three leaves; rows 0 and 1 share node 1 (two tokens) and node 2 (one), row 2 is alone.
#   row 0:  1 1 2 3
#   row 1:  1 1 2 4 4
#   row 2:  5 5
NODES = torch.tensor([[1, 1, 2, 3, -1], [1, 1, 2, 4, 4], [5, 5, -1, -1, -1]])
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0])


def test_hard_credits_a_shared_node_with_the_mean_of_its_leaves():
    # (1 − 0.5) / 2 = 0.25 on nodes 1 and 2
    expected = [[0.25, 0.25, 0.25, 1.0, 0.0], [0.25, 0.25, 0.25, -0.5, -0.5], [2.0, 2.0, 0.0, 0.0, 0.0]]
    assert mean_over_leaves(ADVANTAGES, NODES).tolist() == expected


def test_once_keeps_the_first_copy_of_each_node():
    expected = [[True, True, True, True, False], [False, False, False, True, True], [True, True, False, False, False]]
    assert first_copies(NODES).tolist() == expected


def test_once_gives_every_node_a_total_weight_of_one_whatever_its_leaves():
    kept = first_copies(NODES)
    for node, tokens in {1: 2, 2: 1, 3: 1, 4: 2, 5: 2}.items():
        assert int((kept & (node == NODES)).sum()) == tokens


def test_a_leaf_outside_the_loss_leaves_its_copy_and_its_mean_to_the_others():
    """`mask_truncated_completions` excludes truncated leaves, here row 0, the first row of nodes 1 and 2."""
    trained = torch.tensor([False, True, True])
    kept = [[False] * 5, [True] * 5, [True, True, False, False, False]]
    assert first_copies(NODES, trained).tolist() == kept
    expected = [[0.0] * 5, [-0.5] * 5, [2.0, 2.0, 0.0, 0.0, 0.0]]
    assert mean_over_leaves(ADVANTAGES, NODES, trained).tolist() == expected


def test_without_shared_nodes_attribution_changes_nothing():
    alone = torch.tensor([[1, 1, 2], [3, 4, -1]])
    assert first_copies(alone).tolist() == [[True, True, True], [True, True, False]]
    assert mean_over_leaves(ADVANTAGES[:2], alone).tolist() == [[1.0, 1.0, 1.0], [-0.5, -0.5, 0.0]]


def test_a_node_shared_by_all_leaves_of_a_group_is_credited_with_zero():
    # GRPO advantages of a group sum to zero, so a prefix of all its leaves learns nothing from hard credit
    nodes = torch.tensor([[1, 2], [1, 3], [1, 4]])
    assert mean_over_leaves(torch.tensor([1.0, 0.5, -1.5]), nodes)[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_hard_and_soft_have_the_same_gradient_under_a_token_level_loss():
    # The shared token's logits are the same in both rows, so Σ A_i ∇logp = d · mean(A) ∇logp.
    weight = torch.randn(7, requires_grad=True)
    token_logits = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        mask = NODES >= 0
        logps = torch.stack([torch.stack([weight[token_logits.get(int(n), 5)] for n in row]) for row in NODES])
        loss = -(torch.exp(logps - logps.detach()) * advantages * mask).sum() / mask.sum()
        return torch.autograd.grad(loss, weight)[0]

    soft = gradient(ADVANTAGES.unsqueeze(1))
    hard = gradient(mean_over_leaves(ADVANTAGES, NODES))
    torch.testing.assert_close(soft, hard)


# A credit from outside the package -----------------------------------------------------------------------------------


@register_credit("lone_tokens")
class LoneTokens(Credit):
    """Trains what a single leaf has with its reward, and shared tokens half as much with nothing."""

    weighs: ClassVar[bool] = True

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        nodes = token_nodes(trees)
        shared = torch.zeros(nodes.shape, dtype=torch.bool)
        for node in nodes[nodes >= 0].unique():
            of = nodes == node
            shared |= of & (of.any(dim=1).sum() > 1)
        return rewards.unsqueeze(1) * ~shared, 1.0 - 0.5 * shared


def tree(answers: int = 2) -> RolloutTree:
    """One search, then so many answers of 1, 2, … tokens."""
    made = RolloutTree([9])
    turn = made.add_turn(0, [1, 1], "<search>iron</search>", [-0.5] * 2, [])
    seen = made.add_observation(turn.index, [2], [], "text")
    for i in range(answers):
        answer = made.add_turn(seen.index, [3] * (i + 1), ANSWER, [-0.5] * (i + 1), [])
        made.end(answer.index, (0,) if i == 0 else (0, 1, i - 1), StopReason.EOS)
    return made


def test_the_layout_numbers_the_nodes_of_all_trees_and_pads_to_the_longest_leaf():
    # tree 0: turn 1, observation 2, answers 3 and 4; tree 1 begins at its number of nodes, 5
    expected = [[1, 1, 2, 3, -1], [1, 1, 2, 4, 4], [6, 6, 7, 8, -1]]
    assert token_nodes([tree(), tree(1)]).tolist() == expected


@pytest.mark.parametrize("kind", CREDITS.own)
def test_without_shared_nodes_every_credit_leaves_the_batch_alone(kind):
    advantages = torch.tensor([1.0, -1.0])
    made, weights = CREDITS.get(kind)()([tree(1), tree(1)], advantages, advantages)
    assert made is advantages
    assert weights is None


def test_credits_of_a_tree_equal_the_values_by_hand():
    advantages = torch.tensor([1.0, -0.5])
    assert CREDITS.get("soft")()([tree()], advantages, advantages)[0] is advantages
    # a row has the shared 2 + 1 tokens, then its own; (1 − 0.5) / 2 = 0.25
    expected = [[0.25, 0.25, 0.25, 1.0, 0.0], [0.25, 0.25, 0.25, -0.5, -0.5]]
    hard, none = CREDITS.get("hard")()([tree()], advantages, advantages)
    once, weights = CREDITS.get("once")()([tree()], advantages, advantages)
    assert hard.tolist() == once.tolist() == expected
    assert none is None
    assert weights is not None
    assert weights.tolist() == [[True, True, True, True, False], [False, False, False, True, True]]


# Credits that compare branches ---------------------------------------------------------------------------------------


def forked() -> RolloutTree:
    """Two paths from the root, of which the first branches twice.

    root ─┬─ 1 ── 2 ─┬─ 3                     rows 0
          │          └─ 4 ── 5 ─┬─ 6               1
          │                     └─ 7               2
          └─ 8                                     3
    """
    made = RolloutTree([9])
    made.add_turn(0, [1], "", [-0.5], [])
    made.add_observation(1, [2], [], "")
    made.add_turn(2, [3], "", [-1.0], [])
    made.add_turn(2, [3], "", [-3.0], [])
    made.add_observation(4, [2], [], "")
    made.add_turn(5, [3], "", [-1.0], [])
    made.add_turn(5, [3], "", [-2.0], [])
    made.add_turn(0, [1], "", [-0.5], [])
    for node, address in ((3, (0,)), (6, (0, 1, 0)), (7, (0, 1, 0, 2, 0)), (8, (1,))):
        made.end(node, address, StopReason.EOS)
    return made


REWARDS = torch.tensor([1.0, 2.0, 6.0, 0.0])


def credited(name: str, **options: object) -> list[list[float]]:
    """What a credit gives the turns of `forked`, leaf by leaf, with the rewards as advantages."""
    made, weights = build_credit(name, options, SharedPrefixWeight.PER_LEAF)([forked()], REWARDS, REWARDS)
    assert weights is None
    turns = [[0, 2], [0, 2, 4], [0, 2, 4], [0]]  # columns of a row
    assert made.shape == (4, 5)
    return [[round(float(made[row, i]), 5) for i in columns] for row, columns in enumerate(turns)]


@pytest.mark.parametrize("name", ["soft", "hard", "once", "siblings", "tree", "gigpo", "tree_grpo"])
def test_a_tree_is_credited_like_alone_beside_another_tree(name):
    """The other credits compare the trees of a batch: z-scores over branch points, turns or tokens."""
    alone, of_alone = CREDITS.get(name)()([forked()], REWARDS, REWARDS)
    both = torch.cat([torch.tensor([3.0, -1.0]), REWARDS])
    made, weights = CREDITS.get(name)()([tree(), forked()], both, both)
    torch.testing.assert_close(made[2:], alone)
    assert (weights is None) == (of_alone is None)
    if weights is not None:
        assert weights[2:].tolist() == of_alone.tolist()


def test_a_turns_value_is_the_mean_of_its_leaves():
    # turn 1: (1 + 2 + 6) / 3 = 3; turn 4: (2 + 6) / 2 = 4
    assert credited("tree") == [[3, 1], [3, 4, 2], [3, 4, 6], [0]]
    # minus the value above: turn 3: 1 − 3, turn 4: 4 − 3, turns 6 and 7: 2 − 4 and 6 − 4
    assert credited("tree", difference=True) == [[3, -2], [3, 1, -2], [3, 1, 2], [0]]


def test_a_turns_value_is_an_average_of_its_children():
    # turn 4: 4; turn 1: (1 + 4) / 2 = 2.5
    assert credited("tree", average="children") == [[2.5, 1], [2.5, 4, 2], [2.5, 4, 6], [0]]
    # by entropies 1 and 2: turn 4 = (2 + 2 · 6) / 3 = 14/3; 1 and 3: turn 1 = (1 + 3 · 14/3) / 4 = 3.75
    assert credited("tree", average="entropy") == [[3.75, 1], [3.75, 4.66667, 2], [3.75, 4.66667, 6], [0]]
    # softmax: turn 4 = (2 + e · 6) / (1 + e) = 4.92423; turn 1 = (1 + e² · 4.92423) / (1 + e²) = 4.45645
    assert credited("tree", average="softmax") == [[4.45645, 1], [4.45645, 4.92423, 2], [4.45645, 4.92423, 6], [0]]


def test_children_weigh_by_entropies_of_any_size_and_those_without_logprobs_by_none():
    # .1 and .3: (.1 · 2 + .3 · 6) / .4 = 5; the third has no logprobs
    made = RolloutTree([9])
    turn = made.add_turn(0, [1], "", [-0.5], [])
    seen = made.add_observation(turn.index, [2], [], "")
    for i, logprob in enumerate((-0.1, -0.3, math.nan)):
        leaf = made.add_turn(seen.index, [3], "", [logprob], [])
        made.end(leaf.index, (0,) if i == 0 else (0, 1, i - 1), StopReason.EOS)
    advantages = torch.tensor([2.0, 6.0, 100.0])
    credit = build_credit("tree", {"average": "entropy"}, SharedPrefixWeight.PER_LEAF)
    values, _ = credit([made], advantages, advantages)
    assert values[:, 0].tolist() == pytest.approx([5.0] * 3)


def test_siblings_are_compared_without_the_turn_itself():
    # turn 1: its mean 3, at the root nothing is compared; turn 3: 1 − 4; turn 4: 4 − 1; turn 6: 2 − 6; turn 7: 6 − 2
    assert credited("siblings") == [[3, -3], [3, 3, -4], [3, 3, 4], [0]]
    # turn 1 has one later fork in row 0 and two in rows 1 and 2
    assert credited("siblings", decay=0.5) == [[1.5, -3], [0.75, 1.5, -4], [0.75, 1.5, 4], [0]]


def test_branches_count_alike_however_many_leaves_they_have():
    made = RolloutTree([9])
    seen = made.add_observation(made.add_turn(0, [1], "", [-0.5], []).index, [2], [], "").index
    one, several, other = (made.add_turn(seen, [3], "", [-0.5], []).index for _ in range(3))
    below = made.add_observation(several, [2], [], "").index
    leaves = [(one, (0,)), *((made.add_turn(below, [3], "", [-0.5], []).index, (0, 1, 0, i)) for i in range(3))]
    for node, address in [*leaves, (other, (0, 1, 1))]:
        made.end(node, address, StopReason.EOS)
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    values, _ = CREDITS.get("siblings")()([made], rewards, rewards)
    assert values[0, 2] == 1 - (3 + 9) / 2  # the branch with the leaves 2, 3 and 4 counts once


def test_gigpo_adds_the_z_score_among_the_leaves_of_an_observation():
    # γ 1: under node 2 rewards 1, 2, 6 with mean 3 and deviation √((4 + 1 + 9) / 2) = 2.64575; under node 5 2 and 6
    # with mean 4 and deviation 2.82843
    a, b, c, d = -2 / 2.64575, -1 / 2.64575, 3 / 2.64575, 2 / 2.82843
    expected = [[1, 1 + a], [2, 2 + b, 2 - d], [6, 6 + c, 6 + d], [0]]
    assert credited("gigpo", gamma=1.0) == [pytest.approx(row, abs=1e-4) for row in expected]
    # γ .5: under node 2 the leaves of turn 4 end one turn later than that of turn 3: returns .5, .5 and 1.5
    z = 1 / math.sqrt(3)  # mean 5/6, deviation 1/√3: −1/3 · √3 = −.57735 and 2/3 · √3 = 1.15470
    assert [row[1] for row in credited("gigpo", gamma=0.5)[:3]] == pytest.approx([1 - z, 2 - z, 6 + 2 * z], abs=1e-4)


def test_tree_grpo_adds_the_z_score_within_the_turns_subtree_at_the_root():
    # rows 0 to 2 as in the test above, row 3 is alone in its subtree
    a, b, c = -2 / 2.64575, -1 / 2.64575, 3 / 2.64575
    expected = [[1 + a] * 2, [2 + b] * 3, [6 + c] * 3, [0]]
    assert credited("tree_grpo") == [pytest.approx(row, abs=1e-4) for row in expected]


def test_cbpo_enlarges_advantages_after_a_fork_with_varied_outcomes():
    # CBV: node 2 √(14/3) = 2.16025, node 5 2; z of two values: ±1/√2 = ±.70711, within |A|/2 but for A = 1
    expected = [[1, 1 + 0.2 * 0.5], [2, 2 + 0.2 * 0.70711, 2 - 0.2 * 0.70711]]
    assert credited("cbpo")[:2] == [pytest.approx(row, abs=1e-4) for row in expected]


def test_cbpo_lowers_advantages_after_a_fork_with_equal_outcomes():
    # CBV: node 2 √2, node 5 exactly 0: z = ±.70711
    rewards = torch.tensor([1.0, 4.0, 4.0, 0.0])
    made, _ = build_credit("cbpo", {}, SharedPrefixWeight.PER_LEAF)([forked()], rewards, rewards)
    assert made[1, [0, 2, 4]].tolist() == pytest.approx([4, 4 + 0.2 * 0.70711, 4 - 0.2 * 0.70711], abs=1e-4)


@pytest.mark.parametrize("weight", list(SharedPrefixWeight))
def test_cbpo_compares_branch_points_of_all_ranks(weight):
    """CBV of `tree()` is .5 here and 0 on the other rank: z = ±1/√2. One branch point alone has no deviation."""
    credit = build_credit("cbpo", {}, weight)
    advantages = torch.tensor([2.0, -2.0])
    alone, _ = credit([tree()], torch.tensor([1.0, 0.0]), advantages)
    assert alone[0, 3] == 2
    credit.gathered = lambda values: [*values, 0.0]
    made, _ = credit([tree()], torch.tensor([1.0, 0.0]), advantages)
    assert made[:, 3].tolist() == pytest.approx([2 + 0.2 * 0.70711, -2 - 0.2 * 0.70711], abs=1e-4)


def test_cbpo_is_called_for_its_branch_points_on_every_rank():
    credit, asked = build_credit("cbpo", {}, SharedPrefixWeight.PER_LEAF), []
    credit.gathered = lambda values: asked.append(values) or [0.5]
    made, _ = credit([tree(answers=1)], torch.tensor([1.0]), torch.tensor([1.0]))
    assert (made.tolist(), asked) == ([1.0], [[]])


@pytest.mark.parametrize("average", ["children", "entropy", "softmax"])
def test_turns_without_logprobs_have_equal_weights(average):
    made = RolloutTree([9])
    turn = made.add_turn(0, [1], "", [math.nan], [])
    seen = made.add_observation(turn.index, [2], [], "text")
    for i, address in enumerate(((0,), (0, 1, 0))):
        made.end(made.add_turn(seen.index, [3 + i], "", [math.nan], []).index, address, StopReason.EOS)
    advantages = torch.tensor([3.0, -1.0])
    values, _ = build_credit("tree", {"average": average}, SharedPrefixWeight.PER_LEAF)([made], advantages, advantages)
    assert values[:, [0, 2]].tolist() == [[1.0, 3.0], [1.0, -1.0]]


def test_a_leaf_without_reward_does_not_spoil_its_siblings():
    rewards = torch.tensor([1.0, math.nan, 6.0, 0.0])
    for name in attributions():
        if name in CREDITS.own:
            made, _ = build_credit(name, {}, SharedPrefixWeight.PER_LEAF)([forked()], rewards, rewards.nan_to_num())
            assert made.isfinite().all(), name


@pytest.mark.parametrize("why", ["no reward", "not in the loss"])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # turn 1: (1 + 6) / 2; turn 3: 1 − 6; turn 4: 6 − 1; turn 7 has no sibling to be compared with
        ("siblings", {}, [[3.5, -5], [0, 0, 0], [3.5, 5, 6], [0]]),
        ("tree", {"difference": True}, [[3.5, -2.5], [0, 0, 0], [3.5, 2.5, 0], [0]]),
        # turn 4 has one child that counts: 6; turn 1: (1 + 6) / 2
        ("tree", {"average": "children"}, [[3.5, 1], [0, 0, 0], [3.5, 6, 6], [0]]),
    ],
)
def test_a_leaf_that_is_not_compared_gets_nothing_and_changes_nothing(why, name, options, expected):
    """Row 1 of `forked`."""
    credit = build_credit(name, options, SharedPrefixWeight.PER_LEAF)
    rewards = REWARDS.clone()
    if why == "no reward":
        rewards[1] = math.nan
    else:
        credit.trained = torch.tensor([True, False, True, True])
    made, _ = credit([forked()], rewards, rewards.nan_to_num())
    assert [[float(made[row, 2 * i]) for i in range(len(of_row))] for row, of_row in enumerate(expected)] == expected


def test_hard_and_once_take_means_over_the_leaves_in_the_loss():
    for weight, rows in ((SharedPrefixWeight.PER_LEAF, [0, 2]), (SharedPrefixWeight.ONCE, [2])):
        credit = build_credit("hard", {}, weight)
        credit.trained = torch.tensor([weight is SharedPrefixWeight.PER_LEAF, False, True, True])
        made, weights = credit([forked()], REWARDS, REWARDS)
        # turn 1: (1 + 6) / 2 in rows 0 and 2; without row 0 its only copy is row 2's, with 6
        assert [float(made[row, 0]) for row in rows] == ([3.5, 3.5] if len(rows) == 2 else [6.0])
        if weights is not None:
            assert weights[:, 0].tolist() == [False, False, True, True]


def test_igpo_gives_a_turn_its_own_and_later_rewards():
    credit = build_credit("igpo", {"gamma": 0.5}, SharedPrefixWeight.PER_LEAF)
    assert credit.reads_answers
    credit.answer_probabilities = [{0: 0.1, 2: 0.3, 5: 0.2}]
    made, weights = credit([forked()], REWARDS, REWARDS)
    assert weights is None
    # by leaf: (.2, 1), (.2, −.1, 2), (.2, −.1, 6), (0)
    earned = torch.tensor([0.2, 1, 0.2, -0.1, 2, 0.2, -0.1, 6, 0], dtype=torch.float64)
    z = ((earned - earned.mean()) / earned.std()).tolist()
    assert made[0, [0, 2]].tolist() == pytest.approx([z[0] + 0.5 * z[1], z[1]], abs=1e-5)
    expected = [z[5] + 0.5 * z[6] + 0.25 * z[7], z[6] + 0.5 * z[7], z[7]]
    assert made[2, [0, 2, 4]].tolist() == pytest.approx(expected, abs=1e-5)
    assert made[3, 0].tolist() == pytest.approx(z[8], abs=1e-5)
    assert made[:3, 1].tolist() == [0.0] * 3  # the result


def test_aepo_enlarges_the_advantages_of_uncertain_tokens():
    credit = build_credit("aepo", {}, SharedPrefixWeight.PER_LEAF)
    assert credit.reads_entropies
    advantages = torch.tensor([2.0, -1.0])
    assert credit([tree()], advantages, advantages) == (advantages, None)  # in evaluation
    credit.entropy_scores = torch.tensor([[-1.0, 1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, -2.0, 0.0]])
    made, weights = credit([tree()], advantages, advantages)
    assert weights is None
    expected = torch.tensor([[1.6, 2.4, 2.0, 2.0, 2.8], [-1.0, -1.0, -1.0, -0.6, -1.0]])
    torch.testing.assert_close(made, expected)


def test_a_credit_that_changes_its_arguments_changes_nothing_else():
    class InPlace(Credit):
        def __call__(self, trees, rewards, advantages):
            rewards -= rewards.mean()
            advantages *= 2
            return advantages, None

    rewards, advantages = torch.tensor([1.0, 0.0]), torch.tensor([0.5, -0.5])
    made, _ = attribute(InPlace(), [tree()], rewards, advantages, 5)
    assert (made.tolist(), rewards.tolist(), advantages.tolist()) == ([1.0, -1.0], [1.0, 0.0], [0.5, -0.5])


def test_a_credit_that_changes_its_argument_is_checked_like_others():
    class InPlace(Credit):
        def __call__(self, trees, rewards, advantages):
            advantages /= advantages.std()
            return advantages, None

    with pytest.raises(ConfigError, match=r"returned advantages that are not finite .* such as nan for leaf 0 of 2"):
        attribute(InPlace(), [tree()], torch.zeros(2), torch.zeros(2), 5)


def test_a_credits_result_is_padded_to_the_batch():
    advantages = torch.tensor([1.0, -0.5])
    made, weights = attribute(Once(), [tree()], advantages, advantages, width=8)
    assert weights is not None
    assert made.shape == weights.shape == (2, 8)
    assert made[:, 5:].abs().sum() == weights[:, 5:].sum() == 0


def test_a_credit_of_another_shape_is_an_error():
    class Narrow(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages.unsqueeze(1), None

    with pytest.raises(ConfigError, match=r"returned advantages of shape \(2, 1\); expected .* \(2, 5\)"):
        attribute(Narrow(), [tree()], torch.zeros(2), torch.zeros(2), width=8)


def test_the_example_of_the_docstring_works():
    class WinnersOnly(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages.clamp(min=0), None

    made, weights = attribute(WinnersOnly(), [tree()], torch.zeros(2), torch.tensor([0.5, -0.5]), width=8)
    assert (made.tolist(), weights) == ([0.5, 0.0], None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2), "returned Tensor; expected a tuple of advantages, and weights or None"),
        (([0.0, 0.0], None), r"returned advantages of type list; expected a tensor of shape \(2, 5\)"),
        (
            (torch.tensor([0.0, math.nan]), None),
            "returned advantages that are not finite or exceed .*, such as nan for leaf 1 of 2",
        ),
        (
            (torch.full((2, 5), math.inf), None),
            "returned advantages that are not finite or exceed .*, such as inf for leaf 0",
        ),
        (
            (torch.zeros(2), torch.full((2, 5), math.nan)),
            "returned weights that are not finite or exceed .*, such as nan",
        ),
        ((torch.full((2, 5), 1e38), None), "returned advantages that are not finite or exceed 1e.18, such as 9.9"),
        ((torch.zeros(2, dtype=torch.complex64), None), "returned advantages of torch.complex64 and torch.strided"),
        ((torch.zeros(2), torch.ones(2, 5)), "returned weights, but `weighs` of its class is False"),
        ((torch.zeros(2), torch.ones(2)), r"returned weights of shape \(2,\); expected"),
    ],
)
def test_a_credit_that_would_destroy_the_model_is_an_error(returned, message):
    class Odd(Credit):
        name = "odd"

        def __call__(self, trees, rewards, advantages):
            return returned

    with pytest.raises(ConfigError, match=f"The credit 'odd' {message}"):
        attribute(Odd(), [tree()], torch.zeros(2), torch.zeros(2), width=8)


def test_what_a_credit_returns_on_padding_and_for_leaves_without_advantage_does_not_count():
    class Partial(Credit):
        def __call__(self, trees, rewards, advantages):
            made = advantages.unsqueeze(1).repeat(1, 6).requires_grad_()
            return made.masked_fill(token_nodes(trees) < 0, math.nan), None

    # rows of 4, 5 and 6 tokens
    made, _ = attribute(Partial(), [tree(3)], torch.zeros(3), torch.tensor([2.0, math.nan, 1.0]), width=8)
    assert made.shape == (3, 8) and not made.requires_grad
    assert made[0, :4].eq(2.0).all() and made[2, :6].eq(1.0).all()


def test_naming_the_credits_imports_no_torch():
    code = (
        "import sys; from arpo_trl.rollout.credit import attributions; print(attributions(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("] False\n")
    assert {"soft", "hard"} <= {*eval(done.stdout.removesuffix(" False\n"))}


def test_once_wraps_the_credit_that_gives_the_advantages():
    advantages = torch.tensor([1.0, -0.5])
    for attribution in attributions():
        if attribution not in CREDITS.own:
            continue
        alone = build_credit(attribution, {}, SharedPrefixWeight.PER_LEAF)
        wrapped = build_credit(attribution, {}, SharedPrefixWeight.ONCE)
        assert (alone.name, wrapped.name) == (attribution, "once")
        assert wrapped.reads_entropies == alone.reads_entropies
        made, weights = wrapped([tree()], advantages, advantages)
        given, _ = alone([tree()], advantages, advantages)
        assert weights is not None
        assert weights.tolist() == [[True, True, True, True, False], [False, False, False, True, True]]
        per_token = given if given.dim() == 2 else given.unsqueeze(1).expand(2, 5)
        torch.testing.assert_close(made[0, :3], per_token[:, :3].mean(dim=0))


def test_once_keeps_the_advantages_of_single_tokens():
    """A shared token has the mean of its own advantages in its leaves, not that of its turn."""
    # Column 0: (1 + 3) / 2, column 1: (2 − 4) / 2, column 2: (5 + 6) / 2; row 1 has its last two columns alone.
    given = torch.tensor([[1.0, 2.0, 5.0, 7.0, 0.0], [3.0, -4.0, 6.0, 8.0, 9.0], [0.5, 1.5, 0.0, 0.0, 0.0]])
    expected = [[2.0, -1.0, 5.5, 7.0, 0.0], [2.0, -1.0, 5.5, 8.0, 9.0], [0.5, 1.5, 0.0, 0.0, 0.0]]
    assert mean_over_leaves(given, NODES).tolist() == expected

    class PerToken(Credit):
        def __call__(self, trees, rewards, advantages):
            return given[:2], None

    made, _ = Once(PerToken())([tree()], ADVANTAGES[:2], ADVANTAGES[:2])
    assert made.tolist() == expected[:2]


def test_the_weights_of_a_wrapped_credit_apply_to_the_first_copies():
    advantages = torch.tensor([1.0, -0.5])
    _, weights = Once(LoneTokens())([tree()], advantages, advantages)
    assert weights.tolist() == [[0.5, 0.5, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("attribution", "options", "message"),
    [
        (
            "soft",
            {"decay": 1.0},
            r"_kwargs has \['decay'\], but the credit 'soft' has no options",
        ),
        ("siblings", {"omega": 1.0}, r"the credit 'siblings' has \['decay'\]"),
        ("siblings", {"decay": 1.5}, r"decay is 1.5; expected a number in \(0, 1\]"),
        ("tree", {"average": "median"}, r"average is 'median'; expected one of"),
        ("igpo", {"template": "<answer>"}, "template is '<answer>'; expected a text with {answer} in it"),
        ("igpo", {"template": None}, "advantage_attribution_kwargs: template is None; expected a text with"),
        ("tree", {"difference": "false"}, "difference is 'false'; expected true or false"),
        ("gigpo", {"gama": 0.9}, "Did you mean 'gamma' instead of 'gama'"),
        ("aepo", {"reads_entropies": False}, r"has \['weight'\]"),
    ],
)
def test_options_that_a_credit_does_not_take_are_errors(tmp_path, attribution, options, message):
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(str(tmp_path), advantage_attribution=attribution, advantage_attribution_kwargs=options, **ON_CPU)


def test_a_rule_and_a_credit_from_outside_train_by_name(tmp_path):
    @register_rule("everywhere")
    @dataclass(frozen=True)
    class Everywhere(BranchRule):
        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return BranchDecision(fires=True)

    def script(request, context):
        return ScriptedTurn(text="<search>iron</search>" if request.key[-1] == 0 else ANSWER, entropies=[1.0])

    eos = (tokenizer().eos_token_id,)
    args = ARPOConfig(
        str(tmp_path / "run"),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=120,
        max_steps=1,
        branch_rule="everywhere",
        advantage_attribution="lone_tokens",
        rollout_schedule="rounds",
        trajectory_log_rate=1.0,
        save_strategy="no",
        **ON_CPU,
    )
    made = ARPOTrainer(
        save_tiny_model(tmp_path / "model"),
        lambda completions, **_: [float(i) for i in range(len(completions))],
        args,
        Dataset.from_list([{"prompt": [{"role": "user", "content": f"what is {i}"}]} for i in range(4)]),
        tools=[search],
        engine=ScriptedEngine(tokenizer(), SamplingParams(eos_ids=eos, stop_strings=("</search>",)), script),
    )
    made.train()
    (logged,) = read_trees(next((tmp_path / "run" / "trajectories").glob("step-*")))
    # two paths at the root, and each of their results branches once
    assert [leaf.address for leaf in logged.tree.leaves()] == [(0,), (0, 1, 0), (1,), (1, 1, 0)]
    assert [node.decision for node in logged.tree.observations()] == [BranchDecision(fires=True, granted=1)] * 2
    assert logged.rule["name"] == "everywhere"
    assert set(logged.spans) == {node.index for node in logged.tree.nodes[1:]}
    made.model.train()
    batch = made._generate_and_score_completions([made.train_dataset[0]] * 4)
    (tree_of_batch,) = made._last.rollout.trees
    turn, seen, answer = (len(node.ids) for node in tree_of_batch.leaves()[1].nodes)
    # leaf 1 earned 1: nothing on what it shares with leaf 0, and its reward on its own answer
    assert batch["advantages"][1, : turn + seen + answer].tolist() == [0.0] * (turn + seen) + [1.0] * answer
    # two turns of two leaves each at half weight, and four answers
    assert float(batch["num_items_in_batch"]) == 2 * 2 * 0.5 * turn + 4 * answer


def test_rewards_that_are_equal_up_to_rounding_add_nothing():
    """As float32, 0.1 + 0.6 is 0.70000005 and 0.0 + 0.7 is 0.69999999."""
    tree = RolloutTree([1])
    first = tree.add_turn(0, [2], "a", [-1.0], [0.0])
    result = tree.add_observation(first.index, [3], [], "r")
    for number, address in enumerate([(0,), (0, 1, 0)]):
        turn = tree.add_turn(result.index, [4 + number], "b", [-1.0], [0.0])
        tree.end(turn.index, address, StopReason.EOS)
    rewards = torch.tensor([[0.0, 0.7], [0.1, 0.6]]).sum(dim=1)
    assert rewards[0] != rewards[1]
    advantages = torch.tensor([0.58, 0.58])
    for name in ("tree_grpo", "cbpo", "gigpo"):
        credit = build_credit(name, {}, SharedPrefixWeight.PER_LEAF)
        found, _ = credit([tree, tree], rewards.repeat(2), advantages.repeat(2))
        assert found.tolist() == [pytest.approx([0.58] * 3)] * 4
