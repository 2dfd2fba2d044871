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
from arpo_trl.rollout.credit import CREDITS, SharedPrefixWeight, attributions, credit_name, register_credit
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


def test_credits_of_a_tree_are_what_one_works_out_by_hand():
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


def test_what_a_credit_returns_is_padded_to_the_batch():
    advantages = torch.tensor([1.0, -0.5])
    made, weights = attribute(Once(), [tree()], advantages, advantages, width=8)
    assert weights is not None
    assert made.shape == weights.shape == (2, 8)
    assert made[:, 5:].abs().sum() == weights[:, 5:].sum() == 0


def test_a_credit_of_another_shape_is_an_error_that_says_so():
    class Narrow(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages.unsqueeze(1), None

    with pytest.raises(ConfigError, match=r"returned advantages of shape \(2, 1\); expected .* \(2, 5\)"):
        attribute(Narrow(), [tree()], torch.zeros(2), torch.zeros(2), width=8)


def test_naming_the_credits_imports_no_torch():
    code = (
        "import sys; from arpo_trl.rollout.credit import attributions; print(attributions(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['hard', 'soft'] False"


def test_once_is_chosen_by_the_weight_alone():
    chosen = {
        (attribution, weight): credit_name(attribution, weight)
        for attribution in attributions()
        for weight in SharedPrefixWeight
        if attribution in CREDITS.own
    }
    assert chosen == {
        ("hard", "per_leaf"): "hard",
        ("hard", "once"): "once",
        ("soft", "per_leaf"): "soft",
        ("soft", "once"): "once",
    }


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
