import pytest
import torch

from arpo_trl.errors import ConfigError
from arpo_trl.training.dealing import LEAF, deal_trees, leaves_per_tree, micro_batches_of_one_step


def batch(*leaves: int) -> dict:
    """A micro-batch of these leaves, whose rows can be told by their ids."""
    rows = torch.tensor(leaves)
    return {
        "completion_ids": torch.stack([rows, rows + 100], dim=1),
        LEAF: rows,
        "advantages": rows * 0.5,
        "texts": [str(leaf) for leaf in leaves],  # as a subclass may add them
        "num_items_in_batch": torch.tensor(7),
        "ref_per_token_logps": None,
    }


def rows_of(batches) -> list[list[int]]:
    return [made["completion_ids"][:, 0].tolist() for made in batches]


def test_rows_of_a_tree_stand_together_in_leaf_order_trees_in_the_order_of_their_first_rows():
    # trees of 2: 2 3 | 4 5 | 0 1, in the order in which the shuffled rows name them
    dealt = deal_trees([batch(2, 5), batch(1, 3), batch(4, 0)], 3, 2)
    assert rows_of(dealt) == [[2, 3], [4, 5], [0, 1]]


def test_a_tree_that_does_not_fit_is_cut_between_leaves_that_branched_off_apart():
    # one tree of 4 leaves, whose leaves 0 1 and 2 3 branched off together
    assert rows_of(deal_trees([batch(3, 0), batch(2, 1)], 2, 4)) == [[0, 1], [2, 3]]


def test_rows_stay_in_their_block_of_micro_batches():
    # Blocks of 2 micro-batches, trees 0 to 3 and 4 to 7. First 0 3 2 5: 0 2 3 of one tree, 5 of the other; then
    # 1 6 4 7: 1 of the first tree, 4 6 7 of the second.
    dealt = deal_trees([batch(0, 3), batch(2, 5), batch(1, 6), batch(4, 7)], 2, 4)
    assert rows_of(dealt) == [[0, 2], [3, 5], [1, 4], [6, 7]]


def test_all_columns_of_a_row_move_with_it_and_values_without_rows_stay():
    for made in deal_trees([batch(2, 1), batch(0, 3)], 2, 2):
        rows = made["completion_ids"][:, 0]
        assert torch.equal(made["completion_ids"][:, 1], rows + 100)
        assert torch.equal(made["advantages"], rows * 0.5)
        assert made["texts"] == [str(leaf) for leaf in rows.tolist()]
        assert int(made["num_items_in_batch"]) == 7
        assert made["ref_per_token_logps"] is None
        assert LEAF not in made


def test_the_batches_given_are_left_as_they_are():
    given = [batch(1, 2), batch(0, 3)]
    deal_trees(given, 2, 2)
    assert rows_of(given) == [[1, 2], [0, 3]]
    assert LEAF in given[0]


@pytest.mark.parametrize(
    ("generation", "accumulation", "together"), [(8, 4, 4), (4, 8, 4), (4, 6, 2), (3, 4, 1), (1, 1, 1)]
)
def test_a_block_crosses_neither_an_optimizer_step_nor_a_generation_batch(generation, accumulation, together):
    assert micro_batches_of_one_step(generation, accumulation) == together


def test_whole_groups_make_trees_and_other_rows_only_where_nothing_branches():
    assert leaves_per_tree(["a", "a", "b", "b"], 2, branches=True) == 2
    assert leaves_per_tree(["a", "a", "b", "b"], 2, branches=False) == 2
    assert leaves_per_tree(["a", "b", "b", "c"], 2, branches=False) == 1  # groups that begin on another rank
    assert leaves_per_tree(["a", "a", "a"], 2, branches=False) == 1
    with pytest.raises(
        ConfigError, match="received 3 rows, which is not a multiple of the group size 2; a tree cannot span"
    ):
        leaves_per_tree(["a", "a", "a"], 2, branches=True)
    with pytest.raises(ConfigError, match="received 2 rows"):
        leaves_per_tree(["a", "b"], 2, branches=True)
