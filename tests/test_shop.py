"""The quickstart's shop: the environment, its orders and demonstrations, and the task from start to measurement."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import forked
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.quickstart.model import build_tokenizer
from arpo_trl.quickstart.shop.demonstrations import (
    END,
    NO_MISTAKES,
    Mistakes,
    demonstrate,
    make_demonstrations,
    tokenizer_texts,
)
from arpo_trl.quickstart.shop.environment import CATALOGUE, Shop, least_cost
from arpo_trl.quickstart.shop.orders import make_orders
from arpo_trl.quickstart.shop.task import measure, prepare
from arpo_trl.tools.environments.kind import Forking, environment_kind

ROOT = Path(__file__).parent.parent
# In the shop of seed 4 the shelves are: cheese: Feta 2 (2 pieces), Brie 7 (3); bread: Pita 2 (none), Rye 8 (1).
ORDER = {"kinds": ["cheese", "bread"], "budget": 10, "seed": 4, "id": "x"}


def shop(**changes: Any) -> Shop:
    made = Shop()
    made.reset(**{**ORDER, **changes})
    return made


# The environment -----------------------------------------------------------------------------------------------------


def test_an_order_within_the_budget_is_rewarded_once_it_is_paid() -> None:
    made = Shop()
    assert made.reset(**ORDER) == "Order: cheese, bread. Budget 10"
    assert made.look("cheese") == "2 Feta, 7 Brie"
    assert made.add("Feta") == "Cart 2"
    assert made.look("bread") == "2 Pita, 8 Rye"
    assert made.add("Pita") == "Pita is sold out, try Rye"
    assert made.add("Rye") == "Cart 10"  # 2 + 8
    assert made.get_reward() == 0.0
    assert made.buy("9") == "The cart costs 10"
    assert made.get_reward() == 0.0
    assert made.buy("10") == "Paid 10"
    assert made.get_reward() == 1.0
    assert made.add("Feta") == made.buy("10") == "The cart is paid"


def test_an_order_above_the_budget_cannot_be_paid() -> None:
    made = shop()
    made.add("Brie")
    assert made.add("Rye") == "Cart 15"  # 7 + 8
    assert made.buy("15") == "The budget is 10"
    assert made.get_reward() == 0.0


def test_a_paid_cart_that_is_not_the_order_has_no_reward() -> None:
    part = shop()
    part.add("Feta")
    assert part.buy("2") == "Paid 2" and part.get_reward() == 0.0
    more = shop(budget=99)
    for product in ("Feta", "Brie", "Rye"):
        more.add(product)
    assert more.buy("17") == "Paid 17" and more.get_reward() == 0.0  # 2 + 7 + 8


def test_stock_runs_out_and_missing_products_are_reported() -> None:
    made = shop()
    assert made.add("Rye") == "Cart 8"
    assert made.add("Rye") == "Rye is sold out"  # and so is Pita, the other bread
    assert made.add("Gouda") == "There is no Gouda"  # a cheese, but not on this shelf
    assert made.look("gold") == "There is no gold"
    assert shop().buy("0") == "The cart is empty"


def test_a_fork_shares_no_state_with_its_original() -> None:
    made = shop()
    made.add("Feta")
    fork = made.fork()
    assert fork is not made and fork.digest() == made.digest() and fork.describe() == made.describe()
    fork.add("Rye")
    assert fork.digest() != made.digest()
    assert fork.buy("10") == "Paid 10" and fork.get_reward() == 1.0
    assert made.add("Brie") == "Cart 9" and made.get_reward() == 0.0  # 2 + 7: the fork's bread is not in it
    assert made.add("Rye") == "Cart 17"  # the fork took the last piece of its own shelf


@pytest.mark.parametrize("change", [{"kinds": ["tea", "nut"]}, {"budget": 11}, {"seed": 2}])
def test_digests_of_different_shops_differ(change: dict[str, Any]) -> None:
    assert shop().digest() == shop().digest() != shop(**change).digest()


def test_a_call_changes_the_lines_of_the_description_that_it_touches() -> None:
    made = shop()
    before = made.describe().splitlines()
    made.add("Rye")
    changed = set(made.describe().splitlines()) - set(before)
    assert changed == {"stock of Rye: 0", "cart: Rye"}


def test_the_shop_forks_and_offers_three_tools() -> None:
    kind = environment_kind(Shop, timeout_s=10)
    assert kind.forking is Forking.FORK and set(kind.methods) == {"look", "add", "buy"}
    kind.check_row(list(ORDER))


# Orders and demonstrations -------------------------------------------------------------------------------------------


def test_the_budget_is_the_least_cost_and_at_most_one_more() -> None:
    assert least_cost(["cheese", "bread"], seed=4) == 10  # Feta 2 + Rye 8, since Pita is sold out
    for row in make_orders(0, 200, 0)[0]:
        assert row["budget"] - least_cost(row["kinds"], row["seed"]) in (0, 1)
        assert len(set(row["kinds"])) == 2


def test_train_and_heldout_orders_share_no_shop_and_the_same_seed_makes_the_same_orders() -> None:
    train, heldout = make_orders(3, 300, 100)
    assert len({row["seed"] for row in train + heldout}) == len({row["id"] for row in train + heldout}) == 400
    assert make_orders(3, 300, 100) == (train, heldout)
    assert make_orders(4, 300, 100) != (train, heldout)


def test_the_customer_without_mistakes_fulfils_every_order_and_the_noisy_one_about_half() -> None:
    rng = random.Random(0)
    rewards: dict[Mistakes, list[float]] = {NO_MISTAKES: [], Mistakes(): []}
    for mistakes, found in rewards.items():
        for row in make_orders(0, 500, 0)[0]:
            made = Shop()
            messages = demonstrate(made, row, rng, mistakes)
            assert messages[-1] == {"role": "assistant", "content": END}
            found.append(made.get_reward())
    assert all(rewards[NO_MISTAKES])
    assert 0.35 < sum(rewards[Mistakes()]) / 500 < 0.6


def test_demonstrations_cycle_through_the_orders_with_new_mistakes() -> None:
    orders = make_orders(0, 4, 0)[0]
    rows = make_demonstrations(orders, seed=0, n=40)
    assert rows == make_demonstrations(orders, seed=0, n=40)
    assert [row["messages"][0] for row in rows[:4]] == [row["messages"][0] for row in rows[4:8]]
    assert len({json.dumps(row) for row in rows}) > 8


def test_names_are_distinct_and_each_is_one_token() -> None:
    names = [*CATALOGUE, *(product for shelf in CATALOGUE.values() for product in shelf)]
    assert len(set(names)) == len(names)
    tokenizer = build_tokenizer(tokenizer_texts())
    assert all(tokenizer.tokenize(f" {name}, 3 {name}") == [f"Ġ{name}", ",", "Ġ", "3", f"Ġ{name}"] for name in names)


# The task ------------------------------------------------------------------------------------------------------------


def launch(*words: str) -> None:
    forked.run(words, cwd=ROOT, env=os.environ)


@pytest.mark.slow
def test_the_shop_runs_from_cold_start_to_measurement(tmp_path: Path) -> None:
    data, sft, rl = tmp_path / "data", tmp_path / "sft", tmp_path / "rl"
    prepare(data, seed=0)
    for name, kept in (("demonstrations", 512), ("train", 16), ("heldout", 16)):  # a few rows are enough here
        lines = (data / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (data / f"{name}.jsonl").write_text("".join(lines[:kept]), "utf-8")
    launch(
        *(
            "sft.py",
            "--config",
            "configs/quickstart_sft.yaml",
            "--max_steps",
            "20",
            "--model_name_or_path",
            str(data / "base"),
        ),
        *("--dataset", str(data / "demonstrations.jsonl"), "--output_dir", str(sft)),
    )
    measured = measure(sft, data, 0, temperature=1.0)
    assert len(measured.trees) == len(measured.scores) == 16 and 0 <= measured.accuracy <= 1
    launch(
        *("-m", "arpo_trl.quickstart.shop.train"),
        *("--config", "configs/quickstart_shop.yaml", "--model_name_or_path", str(sft), "--output_dir", str(rl)),
        *("--dataset", str(data / "train.jsonl"), "--eval_dataset", str(data / "heldout.jsonl")),
        *("--max_steps", "1", "--eval_steps", "1", "--trajectory_log_rate", "1"),  # the trees are read below
    )
    steps = [row for row in json.loads((rl / "trainer_state.json").read_text("utf-8"))["log_history"] if "loss" in row]
    (step,) = steps
    # 16 groups of N = 4 paths and M − N = 4 branches. Each path from the root is a reset; a branch is a fork.
    roots = 16 * (4 + step["arpo/tree/topups"])
    assert step["arpo/environments/resets"] == roots
    assert step["arpo/environments/forks"] >= 16 * step["arpo/tree/branches"] == 128 - roots
    assert step["arpo/environments/replays"] == step["arpo/environments/refused_forks"] == 0
    assert 0 <= step["reward"] <= 1
    trees = [tree for file in sorted((rl / "trajectories").glob("step-*.jsonl")) for tree in read_trees(file)]
    assert trees[0].prompt.startswith("<|im_start|>user\nOrder: ")
