"""The study: exact values and a gradient by hand, paired intervals, the page, and a tiny run of each part."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from arpo_trl.errors import ConfigError
from arpo_trl.quickstart import stages
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch, RolloutTimes, SampledGroup
from arpo_trl.rollout.credit import CREDITS
from arpo_trl.rollout.rules import RULES
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.toolbox import ToolBox
from study import __main__ as command
from study import files, frozen, page, training
from study.arms import (
    MAIN_BASELINES,
    PAPER,
    Arm,
    frozen_arms,
    grpo,
    seeds_of,
    tabular_arms,
    tabular_seeds_of,
    trained_arms,
)
from study.processes import run_all
from study.tabular import Budget, _Run, policy_gradient, scores, train
from study.task import SCENARIOS, Task, compute, look_up
from support import has_ended, until

LOOK, ANSWER = 0, 1
SHOW = "print(__import__('torch').get_num_threads(), __import__('os').environ['OMP_NUM_THREADS'])"


def two_states(look: float, look_again: float, calls: int = 2) -> Task:
    """Nothing found, and found. A look-up finds; an answer is right once something was found."""
    chances = np.array([[look, 1 - look], [look_again, 1 - look_again]])
    return Task(
        shares=np.array([1.0]),
        moves=np.array([[[1], [1]]]),
        rewards=np.array([0.0, 1.0]),
        seen=np.array([0, 1]),
        tools=["look_up"],
        calls=calls,
        logits=np.log(chances),
        offsets=np.zeros((1, 2, 2)),
    )


def test_the_value_of_two_states_is_that_by_hand():
    # Look with 0.8. Then answer with 0.75, or look again with 0.25 and answer with 0.75; or look once more, which gets
    # the notice, and answer with 0.75 in the last turn: 0.8 · (0.75 + 0.25 · (0.75 + 0.25 · 0.75)) = 0.7875.
    task = two_states(0.8, 0.25)
    assert task.value(task.logits) == pytest.approx(0.7875)


def test_without_calls_only_the_last_turn_after_the_notice_answers():
    # No result may come, so nothing is ever found.
    task = two_states(0.8, 0.25, calls=0)
    assert task.value(task.logits) == 0.0


def test_the_sampler_earns_the_exact_value_in_the_mean():
    # 3,000 paths with success probability 0.7875: a standard error of 0.0075, and 4 of them.
    task = two_states(0.8, 0.25)
    with ToolBox([look_up, compute]) as toolbox:
        trees = _Run(task, Arm(leaves=100, roots=100).config(2), 0, toolbox).sample(task.logits, 0, 4500)
    earned = [reward for tree in trees for reward in scores(task, tree)]
    assert len(earned) >= 3000
    assert np.mean(earned) == pytest.approx(0.7875, abs=0.03)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_path_of_each_scenario_starts_between_a_tenth_and_a_third(scenario):
    task = SCENARIOS[scenario]
    assert 0.1 < task.value(task.logits) < 0.33
    assert task.probabilities(task.logits).sum(axis=-1) == pytest.approx(1.0)


def test_the_gradient_of_one_leaf_is_that_by_hand():
    # The first of two leaves: look, answer. Two tokens, each with advantage 3, weight 1/2 in its leaf and 1/2 in the
    # batch: factors 0.75. The gradient of log p by the logits is one-hot − p: (1 − 0.8, −0.2) in the first state,
    # (−0.25, 1 − 0.75) in the second. The second leaf has advantage 0.
    task = two_states(0.8, 0.25)
    with ToolBox([look_up, compute]) as toolbox:
        for seed in range(50):
            trees = _Run(task, Arm(leaves=2, roots=2).config(2), seed, toolbox).sample(task.logits, 0, 0)
            if len(trees[0].leaves()[0].turns) == 2:
                break
    gradient = policy_gradient(task, task.logits, trees, torch.tensor([3.0, 0.0]), None)
    assert gradient == pytest.approx(0.75 * np.array([[0.2, -0.2], [-0.25, 0.25]]))


def test_an_arm_learns_and_the_same_seed_repeats():
    budget = Budget(steps=4, calls_per_step=40)
    first, again = (train(SCENARIOS["as is"], Arm().config(6), 0, budget) for _ in range(2))
    assert first["accuracies"] == again["accuracies"]
    assert first["accuracy"] > first["accuracies"][0] + 0.05
    # A step never stops before its calls are spent, and only the last prompt exceeds them.
    assert 160 <= first["calls"] < 160 + 8 * 7


# Arms ----------------------------------------------------------------------------------------------------------------


def test_all_rules_and_credits_of_the_registries_take_part():
    arms = tabular_arms()
    assert {arm.rule for arm in arms} == set(RULES.names)
    assert {arm.credit for arm in arms} == set(CREDITS.names) - {"aepo", "igpo"}  # which read the model
    assert {arm.credit for arm in frozen_arms()} == set(CREDITS.names)
    assert len({arm.name for arm in arms}) == len(arms)
    assert len({files.slug(arm.name) for arm in arms}) == len(arms)
    assert len({files.slug(arm.name) for arm in trained_arms()}) == len(trained_arms())


def test_an_arm_with_shared_calls_has_the_setting_and_its_own_name():
    arm = Arm(**grpo(8), shares=True)
    assert (arm.name, arm.settings()["share_calls"]) == ("GRPO M = 8, shared calls, soft, mean", "history")
    assert "share_calls" not in Arm(**grpo(8)).settings()


def test_an_arm_whose_rule_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="There is no branch rule 'best'"):
        Arm(rule="best").settings()
    errors: list[str] = []
    assert command.available([Arm(), Arm(rule="best"), Arm(rule="best", credit="hard")], errors) == [Arm()]
    (error,) = errors
    assert error.endswith("So these arms cannot run: best N = 2, soft, mean; best N = 2, hard, mean.")


def test_the_main_comparisons_have_more_seeds():
    assert seeds_of(Arm(**grpo(4)), 8, 3) == seeds_of(Arm(baseline="score_norm"), 8, 3) == 8
    assert seeds_of(PAPER, 8, 3) == 8
    assert seeds_of(Arm(rule="ranked"), 8, 3) == seeds_of(Arm(**grpo(8), dynamic=True), 8, 3) == 3
    assert sum(seeds_of(arm, 8, 3) for arm in trained_arms()) == 10 * 8 + 11 * 3
    # The goal compares the rules as is, with the credit "soft" and two baselines.
    of_goal = [arm for arm in tabular_arms() if tabular_seeds_of(arm, "as is", 200, 20) == 200]
    assert len(of_goal) == 2 * len({arm.sampling for arm in tabular_arms()})
    assert {tabular_seeds_of(arm, "uncertain opening", 200, 20) for arm in of_goal} == {20}
    assert tabular_seeds_of(Arm(credit="hard"), "as is", 200, 20) == 20


@pytest.mark.parametrize(
    ("cell", "goal"),
    [
        ("+0.008 ± 0.004 (200)", "resolved"),
        ("-0.021 ± 0.005 (200)", "resolved"),
        ("-0.003 ± 0.004 (200)", "resolved: less than 0.01"),  # from -.007 to +.001
        ("+0.007 ± 0.013 (20)", "missed"),
        ("-0.006 ± 0.007 (20)", "missed"),  # down to -.013
        ("+0.500 (1)", "missed"),
    ],
)
def test_a_difference_is_resolved_if_its_interval_excludes_zero_or_all_that_matters(cell, goal):
    name = "ranked N = 2 − random N = 2"
    trained = [[arm.name] + [""] * 9 for arm in trained_arms()]  # nothing has run
    assert page.goals([[name, cell, "", ""]], trained)[1:] == [[f"tabular, as is: {name}", cell, goal]]


# Intervals and the page ----------------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed_with_students_t():
    # Differences .1, .2, .3: mean .2, standard deviation .1, t(2) = 4.303: half width 4.303 · .1 / √3 = .2484.
    found = files.paired({"0": 0.5, "1": 0.6, "2": 0.8, "9": 1.0}, {"0": 0.4, "1": 0.4, "2": 0.5})
    assert found is not None
    assert (found.mean, found.half, found.n) == (pytest.approx(0.2), pytest.approx(0.2484, abs=1e-4), 3)
    assert str(found) == "+0.200 ± 0.248 (3)"
    assert math.isnan(files.interval([0.5]).half) and str(files.interval([0.5])) == "+0.500 (1)"
    assert files.paired({"0": 0.5}, {"1": 0.5}) is None
    assert [files.read_interval(text) for text in ("not run", "", "0.5")] == [None] * 3
    assert files.read_interval("-0.012 ± 0.004 (8)") == files.Interval(-0.012, 0.004, 8)
    one = files.read_interval("+0.500 (1)")
    assert one is not None and (one.mean, one.n) == (0.5, 1) and math.isnan(one.half)


def trained_row(arm: Arm, seed: int, accuracy: float, calls: int) -> dict:
    found = {"tool_calls_executed": calls, "tool_calls_made": 1.25 * calls, "turns_in_sequence": 4.0}
    return {**arm.as_row(), "seed": seed, "accuracy": accuracy, **found}


def test_the_page_shows_finished_parts_and_lists_missing_ones(tmp_path):
    for seed, (whole, coin) in enumerate([(0.70, 0.71), (0.60, 0.61), (0.65, 0.66)]):
        for arm, accuracy, calls in (
            (Arm(**grpo(8)), whole, 1000),
            (Arm(), coin, 480),
            (Arm(rule="ranked"), coin, 510),
        ):
            files.write(training.result_file(tmp_path, seed, arm), trained_row(arm, seed, accuracy, calls))
    page.write(tmp_path, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text("utf-8")
    # All differences are .01 or 0, so the interval is a point; no GRPO with M = 4 and no threshold has run.
    for row in (
        "| random N = 2, soft, mean | 3 | 0.660 | +0.010 ± 0.000 (3) | not run |  | not run | 0.48 | 0.48 | 1.00 |",
        "| GRPO M = 8, soft, mean | 3 | 0.650 |  | not run | -0.010 ± 0.000 (3) | not run | 1.00 | 1.00 | 1.00 |",
        "| ranked N = 2, soft, mean | 3 | 0.660 | +0.010 ± 0.000 (3) | not run | +0.000 ± 0.000 (3) | not run | 0.51",
    ):
        assert row in text
    assert "| random N = 2, soft, mean | +0.010 ± 0.000 (3) at 0.48 × the calls, 1.00 × the turns | met |" in text
    assert "| ranked N = 2, soft, mean | +0.010 ± 0.000 (3) at 0.51 × the calls, 1.00 × the turns | missed |" in text
    assert "| threshold N = 2, soft, mean | 0 | not run |" in text
    assert (tmp_path / "study.png").stat().st_size > 0


def test_the_page_keeps_the_rows_with_more_seeds(tmp_path):
    """So the results of several machines come together on one page."""
    arms = (Arm(**grpo(8)), Arm(), Arm(rule="ranked"))
    for run, accuracies in (("first", [0.5, 0.6, 0.7]), ("second", [0.1, 0.2])):
        made = arms[:2] if run == "first" else arms
        for seed, accuracy in enumerate(accuracies):
            for arm in made:
                row = trained_row(arm, seed, accuracy, 100)
                files.write(training.result_file(tmp_path / run, seed, arm), row)
        page.write(tmp_path / run, tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text("utf-8")
    runs = [json.loads(line) for line in (tmp_path / "study.jsonl").read_text("utf-8").splitlines()]
    assert len(runs) == 6 and {"name": Arm().name, "seed": 1, "accuracy": 0.2}.items() <= runs[3].items()
    assert "| random N = 2, soft, mean | 3 | 0.600 | +0.000 ± 0.000 (3) |" in text
    assert "| random N = 2, soft, mean, again | 2 | 0.150 | +0.000 ± 0.000 (2) |" in text
    assert "ranked N = 2, soft, mean, again" not in text
    assert "| ranked N = 2, soft, mean | 2 | 0.150 | +0.000 ± 0.000 (2) |" in text
    assert "| random N = 2, soft, mean | +0.000 ± 0.000 (3) at 1.00 × the calls" in text
    page.write(tmp_path / "nothing", tmp_path / "study.md")
    assert (tmp_path / "study.md").read_text("utf-8") == text


def test_the_figure_has_panels_only_for_finished_parts(monkeypatch, tmp_path):
    drawn: list[list[tuple[str, list[str]]]] = []

    def saved(figure, path, **_):
        drawn.append([(axes.get_title()[0], [t.get_text() for t in axes.get_yticklabels()]) for axes in figure.axes])

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", saved)
    found, not_run = str(files.interval([0.1, 0.2])), page.NOT_RUN
    effects = [["one", found, found, not_run], ["two", not_run, not_run, not_run]]
    arms = ((Arm(**grpo(8)), 0), (Arm(), 0), (Arm(rule="ranked"), 1))  # one has no seed in common with GRPO
    trained = page._trained_table({arm.name: {str(seed): trained_row(arm, seed, 0.5, 9)} for arm, seed in arms})
    page.draw(effects, [], tmp_path / "a.png")
    page.draw([], trained, tmp_path / "c.png")
    page.draw(effects, trained, tmp_path / "both.png")
    page.draw([], [], tmp_path / "none.png")
    a, c = ("a", ["one"]), ("c", [Arm().name])
    assert drawn == [[a], [c], [a, c], []]


@pytest.mark.slow
def test_a_tiny_tabular_study_is_resumed_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "tabular_arms", lambda: [Arm(**grpo(4)), Arm(), Arm(rule="best")])
    monkeypatch.setattr(command, "SCENARIOS", {"as is": SCENARIOS["as is"]})
    given = ["a", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path), "--page", str(tmp_path / "study.md")]
    assert command.main(given) == 1
    shown = capsys.readouterr()
    assert "Part a: 2 to run" in shown.out
    assert "There is no branch rule 'best'" in shown.err
    first = command.tabular_file(tmp_path, "as is", Arm()).read_text("utf-8")
    assert sorted(json.loads(first)["runs"]) == ["0", "1"]
    assert re.search(r"\| GRPO M = 4 − random N = 2 \| [+-]0", (tmp_path / "study.md").read_text("utf-8"))
    command.main([*given[:2], "3", *given[3:]])  # only the third seed is new
    assert "Part a: 2 to run" in capsys.readouterr().out
    later = json.loads(command.tabular_file(tmp_path, "as is", Arm()).read_text("utf-8"))["runs"]
    assert {seed: later[seed] for seed in ("0", "1")} == json.loads(first)["runs"]


@pytest.mark.slow
def test_a_cold_start_is_trained_once_for_each_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "N_DEMONSTRATIONS", 64)
    small = partial(stages.prepare, hard=True, n_train=8, n_heldout=2)
    task = replace(training.HARD, prepare=small, cold_start=("--max_steps", "1"))
    for _ in range(2):
        training.cold_start(tmp_path / "seed0", 0, task)
        monkeypatch.setattr(stages, "launch", None)  # the second time nothing is run
    assert {path.name for path in (tmp_path / "seed0").iterdir()} == {"data", "sft"}


@pytest.mark.slow
def test_one_arm_trains_a_step_from_a_cold_start(tmp_path, monkeypatch):
    """The model is untrained: this is about the files, not about its accuracy."""
    monkeypatch.setattr(training, "PROMPTS", 2)
    folder = tmp_path / "seed0"
    stages.prepare(folder / "data", 0, hard=True, n_train=8, n_heldout=2)
    save_cold_start_base(folder / "sft")
    training.train_arm(tmp_path, 0, Arm(), steps=1)
    (row,) = page.trained_rows(tmp_path)[Arm().name].values()
    assert (row["seed"], row["steps"], row["planned_steps"], row["answers"], row["leaves"]) == (0, 1, 1, 2, 16)
    dynamic = Arm(**grpo(8), dynamic=True)
    with pytest.raises(ConfigError, match="trains for the calls of GRPO M = 8, which has no result yet"):
        training.train_arm(tmp_path, 0, dynamic, steps=1)


def test_dynamic_sampling_ends_at_its_budget_with_the_discarded_calls():
    stop, control = training.StopAtCalls(10), SimpleNamespace(should_training_stop=False)
    for executed, discarded, ends in ((4.0, 2.0, False), (3.0, 1.0, True)):  # 6, then 10
        logs = {"arpo/tools/calls_executed": executed, "arpo/resampling/calls_executed": discarded}
        stop.on_log(None, None, control, logs=logs)
        assert control.should_training_stop is ends
    stop.on_log(None, None, control, logs=None)


def fake_trainer(rows: list[int]) -> SimpleNamespace:
    """One prompt a batch, which its two rows repeat. The prompt 7 has the ids [7]."""

    def sample(requests, **_):
        groups = [SampledGroup(tree=RolloutTree(each.prompt_ids), turns_in_sequence=each.id) for each in requests]
        times = RolloutTimes(total_s=1.0, forward_s=0.5, tool_wait_s=0.0, sync_s=0.0)
        return RolloutBatch(groups=groups, times=times)

    return SimpleNamespace(
        args=SimpleNamespace(seed=0),
        get_train_dataloader=lambda: [[{"prompt": row}] * 2 for row in rows],
        protocol=SimpleNamespace(encode_prompt=lambda prompt: [prompt]),
        tree_sampler=SimpleNamespace(sample=sample, settings=SimpleNamespace(num_generations=2)),
    )


def test_batches_are_sampled_together_and_split(monkeypatch):
    monkeypatch.setattr(frozen, "TOGETHER", 2)
    batches = frozen.sample(fake_trainer([5, 6, 7, 8]), 3)  # two together, then one; the fourth is not used
    assert [[tree.root.ids for tree in batch.trees] for batch in batches] == [[[5]], [[6]], [[7]]]
    assert [batch.turns_in_sequence for batch in batches] == [[0], [1], [2]]


def test_an_arm_replays_rollouts_only_for_its_own_prompts():
    trainer = fake_trainer([5, 6])
    batches = frozen.sample(trainer, 2)
    frozen.replay(trainer, batches)
    assert trainer.tree_sampler.sample([GroupRequest(id=0, prompt_ids=[5])]) is batches[0]
    with pytest.raises(ValueError, match="other prompts than the batch of the trainer"):
        trainer.tree_sampler.sample([GroupRequest(id=0, prompt_ids=[5])])


def test_part_b_is_relative_to_grpo_and_to_the_plain_credit(tmp_path):
    for arm, calls, signal, cosines in (
        (Arm(**grpo(8)), 200.0, 0.5, [0.1, 0.1]),
        (Arm(), 100.0, 0.75, [0.1, 0.1]),
        (Arm(credit="once"), 100.0, 0.75, [0.1, 0.3]),
    ):
        for step in frozen.CHECKPOINTS[:2]:
            row = {"cosine": 0.1, "half_width": 0.01, "calls": calls * (1 + step), "signal_per_call": signal}
            files.write(frozen.result_file(tmp_path, step, arm), row | {"cosines": cosines})
    rows = {row[0]: row[1:] for row in page.frozen_rows(tmp_path)}
    cosines = ["0.100 ± 0.010", "0.100 ± 0.010", "not run"]
    assert rows[Arm().name] == [*cosines, "", "0.50", "1.50"]
    # Differences of 0, .2, 0, .2: mean .1, standard deviation .1155, t(3) = 3.182: 3.182 · .1155 / 2 = .184.
    assert rows[Arm(credit="once").name] == [*cosines, "+0.100 ± 0.184 (4)", "0.50", "1.50"]
    assert rows[Arm(baseline="score_norm").name] == ["not run"] * 6


def test_part_b_ends_where_its_cold_start_fails_and_does_not_repeat_it(tmp_path, monkeypatch):
    run: list[str] = []

    def failing(jobs, *_, **__):
        run.extend(jobs)
        return False

    monkeypatch.setattr(command, "run_all", failing)
    command.part_b(SimpleNamespace(output=tmp_path, jobs=2), [])
    assert run == ["cold 0"]
    for made in ("seed0/sft", "b/models"):  # which are whole if they exist
        (tmp_path / made).mkdir(parents=True)
    command.part_b(SimpleNamespace(output=tmp_path, jobs=2), [])
    assert run[1:3] == ["reference 0 0", "reference 0 1"]


def test_part_b_says_once_which_arms_cannot_run(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "frozen_arms", lambda: [Arm(rule="best")])
    errors: list[str] = []
    command.part_b(SimpleNamespace(output=tmp_path, jobs=2), errors)
    (error,) = errors
    assert error.endswith("So these arms cannot run: best N = 2, soft, mean.")


@pytest.mark.slow
def test_each_job_has_its_own_process_threads_and_log_and_may_fail(tmp_path, capfd):
    errors: list[str] = []
    program = partial(stages.launch, "platform", stages.SFT_CONFIG)  # a program of a job, which fails
    jobs = {"one": partial(print, "found"), "two": partial(int, "x"), "three": partial(eval, SHOW), "four": program}
    assert not run_all(jobs, 2, tmp_path, errors, threads=2)
    logs = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert logs["one.log"] == "found\n"
    assert logs["two.log"].endswith("ValueError: invalid literal for int() with base 10: 'x'\n")
    assert logs["three.log"].splitlines() == ["2 2"]
    assert "arpo_trl.scripts.platform" in logs["four.log"]
    assert errors == [f"{name} failed; see {tmp_path / name}.log" for name in ("two", "four")]
    shown = capfd.readouterr()
    assert sorted(line.split()[1] for line in shown.out.splitlines()) == ["four:", "one:", "three:", "two:"]
    assert run_all({"one": partial(print, "found")}, 2, tmp_path, errors)


@pytest.mark.slow
def test_jobs_and_their_programs_end_with_a_killed_study(tmp_path):
    program = (
        "import subprocess, functools, pathlib, study.processes\n"
        "job = functools.partial(subprocess.run, ['sleep', '1000'])\n"
        f"study.processes.run_all({{'long': job}}, 1, pathlib.Path({str(tmp_path)!r}), [])"
    )
    study = psutil.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "benchmarks"})
    until(lambda: any(child.name() == "sleep" for child in study.children(recursive=True)), within_s=300.0)
    children = study.children(recursive=True)
    study.kill()
    study.wait()
    until(lambda: all(has_ended(child.pid) for child in children))


@pytest.mark.slow
def test_a_tiny_part_b_makes_its_checkpoints_and_measures_each_arm(tmp_path, monkeypatch):
    for module, name, value in [
        *((module, "CHECKPOINTS", (1,)) for module in (frozen, page)),
        *((frozen, name, 2) for name in ("BATCHES", "REFERENCE_BATCHES", "REFERENCE_PROMPTS")),
        *((module, "PROMPTS", 1) for module in (frozen, training)),
        *((module, "frozen_arms", lambda: arms) for module in (command, page)),
    ]:
        monkeypatch.setattr(module, name, value)
    arms = [Arm(**grpo(8), baseline=baseline) for baseline in MAIN_BASELINES]
    sampled: list[int] = []
    sample = TreeSampler.sample

    def counted(sampler, requests, **others):
        sampled.append(len(requests))
        return sample(sampler, requests, **others)

    monkeypatch.setattr(TreeSampler, "sample", counted)

    def cold_start(folder, seed):
        """Without training."""
        stages.prepare(folder / "data", seed, hard=True, n_train=8, n_heldout=2)
        save_cold_start_base(folder / "sft")

    monkeypatch.setattr(training, "cold_start", cold_start)

    def run_all(jobs, *_, **__):
        """Each job in this process, in place of one of its own."""
        for job in jobs.values():
            job()
        return True

    monkeypatch.setattr(command, "run_all", run_all)
    given = ["b", "--output", str(tmp_path / "runs"), "--page", str(tmp_path / "study.md")]
    assert command.main(given) == 0
    text = (tmp_path / "study.md").read_text("utf-8")
    # An untrained model earns the same everywhere, so all gradients are 0. Both arms sample the same few calls.
    table = text[text.index("## b.") : text.index("## c.")]
    for baseline in MAIN_BASELINES:
        (row,) = re.findall(rf"\| GRPO M = 8, soft, {baseline} \| 0.000 ± 0.000 \| (.*) \|\n", table)
        difference = "" if baseline == "mean" else "+0.000 ± 0.000 (2)"
        assert row in (f"{difference} | not run | not run", f"{difference} | 1.00 | not run")
    assert "| two halves of the reference | 0.000 |" in text
    # A step to the checkpoint, a batch of two prompts for each half of the reference, and two batches of one prompt,
    # which are sampled together and which both arms share.
    assert sampled == [1, 2, 2, 2]
    assert sorted(path.name for path in (tmp_path / "runs/b/models").iterdir()) == ["0", "1"]
