import torch

from arpo_trl.rollout.credit.base import mean_over_leaves
from arpo_trl.rollout.credit.once import first_copies

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
