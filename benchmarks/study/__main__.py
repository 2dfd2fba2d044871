"""The study of branch rules, credits and baselines. Run it in the root of a checkout:

    OMP_NUM_THREADS=1 python -m benchmarks.study a b c --jobs 2

Part a trains on a tabular task with exact accuracies, part b measures gradients of frozen policies, part c trains the
quickstart's model. Each result is one file under --output. A stopped run can be resumed: results that have a file are
not computed again. At the end, or without a part, the program writes the page and its figure from the files.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from arpo_trl.errors import ConfigError

from . import files, frozen, page, tabular, training
from .arms import Arm, frozen_arms, seeds_of, tabular_arms, tabular_seeds_of, trained_arms
from .processes import Jobs, end_with_study, fork_server, run_all
from .task import SCENARIOS

SEEDS = {"a": 200, "c": 8}
FEW_SEEDS = {"a": 20, "c": 3}
"""Seeds of the main comparisons of a part, and of its other arms."""
COLD_START_S, TRAINED_ARM_S, TABULAR_RUN_S = 230.0, 200.0, 0.12
CHECKPOINTS_S, HALF_REFERENCE_S, FROZEN_ARM_S = 100.0, 65.0, 17.0
"""CPU seconds of one cold start, arm and seed, and tabular run; of the checkpoints, one half of a checkpoint's
reference, and each of its arms. For the estimate at the start."""


def available(arms: Sequence[Arm], errors: list[str]) -> list[Arm]:
    """The arms that the package can run. Adds a message to `errors` for each reason why others cannot."""
    found, refused = [], defaultdict[str, list[str]](list)
    for arm in arms:
        try:
            arm.settings()
            found.append(arm)
        except ConfigError as error:
            refused[str(error)].append(arm.name)
    errors += [f"{reason} So these arms cannot run: {'; '.join(names)}." for reason, names in refused.items()]
    return found


def announce(part: str, jobs: int, seconds: float, workers: int, before: float = 0.0) -> None:
    """Print the time that a part takes: `seconds` on all workers, after `before` on one."""
    minutes = (before + seconds / workers) / 60
    print(f"Part {part}: {jobs} to run, about {minutes:.0f} minutes on {workers} idle cores.", flush=True)


# Part a --------------------------------------------------------------------------------------------------------------


def tabular_file(output: Path, scenario: str, arm: Arm) -> Path:
    return output / "a" / files.slug(scenario) / f"{files.slug(arm.name)}.json"


def part_a(options: argparse.Namespace, errors: list[str]) -> None:
    arms, most, budget = available(tabular_arms(), errors), options.seeds or SEEDS["a"], tabular.Budget()
    jobs = []
    for scenario in SCENARIOS:
        for arm in arms:
            path = tabular_file(options.output, scenario, arm)
            seeds = tabular_seeds_of(arm, scenario, most, min(FEW_SEEDS["a"], most))
            if missing := {*map(str, range(seeds))} - tabular.finished(path, budget).keys():
                jobs.append((path, scenario, arm, missing, budget))
    announce("a", len(jobs), sum(len(job[3]) for job in jobs) * TABULAR_RUN_S, options.jobs)
    with ProcessPoolExecutor(options.jobs, mp_context=fork_server(), initializer=end_with_study) as pool:
        for (path, *_), future in [(job, pool.submit(tabular.run, *job)) for job in jobs]:
            if (error := future.exception()) is not None:
                errors.append(f"{path.stem}: {type(error).__name__}: {error}")


# Part b --------------------------------------------------------------------------------------------------------------


def part_b(options: argparse.Namespace, errors: list[str]) -> None:
    output, logs, arms = options.output, options.output / "logs", available(frozen_arms(), errors)
    wanted = [(step, arm) for step in frozen.CHECKPOINTS for arm in arms]
    missing = [(step, arm) for step, arm in wanted if not frozen.result_file(output, step, arm).exists()]
    halves = [(step, half) for step in dict.fromkeys(step for step, _ in missing) for half in (0, 1)]
    halves = [(step, half) for step, half in halves if not frozen.reference_file(output, step, half).exists()]
    seed, models = output / "seed0", frozen.models_folder(output)
    alone: list[tuple[Path, float, Jobs]] = [
        (seed / "sft", COLD_START_S, {"cold 0": partial(training.cold_start, seed, 0)}),
        (models, CHECKPOINTS_S, {"checkpoints": partial(frozen.make_checkpoints, seed, models)}),
    ]
    alone = [job for job in alone if missing and not job[0].exists()]
    seconds = FROZEN_ARM_S * len(missing) + HALF_REFERENCE_S * len(halves)
    announce("b", len(missing), seconds, options.jobs, sum(before for _, before, _ in alone))
    for _, _, job in alone:
        if not run_all(job, 1, logs, errors, threads=options.jobs):
            return
    references = {
        f"reference {step} {half}": partial(frozen.write_reference, output, step, half) for step, half in halves
    }
    run_all(references, options.jobs, logs, errors)
    for step in frozen.CHECKPOINTS:
        paths = [frozen.reference_file(output, step, half) for half in (0, 1)]
        if all(path.exists() for path in paths):
            cosine = frozen.cosine(*(torch.load(path) for path in paths))
            found = {"cosine_of_halves": cosine, "batches": frozen.REFERENCE_BATCHES}
            files.write(paths[0].with_name("reference.json"), found)
    alike = defaultdict[tuple[int, str], list[Arm]](list)
    for step, arm in missing:
        alike[step, arm.sampling].append(arm)
    longest_first = sorted(alike.items(), key=lambda job: -len(job[1]))
    measured = {f"b {step} {of}": partial(frozen.write_arms, output, step, same) for (step, of), same in longest_first}
    run_all(measured, options.jobs, logs, errors)


# Part c --------------------------------------------------------------------------------------------------------------


def part_c(options: argparse.Namespace, errors: list[str]) -> None:
    most, logs, jobs = options.seeds or SEEDS["c"], options.output / "logs", []
    for arm in available(trained_arms(), errors):
        for seed in range(seeds_of(arm, most, min(FEW_SEEDS["c"], most))):
            found = files.read(training.result_file(options.output, seed, arm))
            if found is None or found["planned_steps"] != options.steps:
                jobs.append((seed, arm))
    # Seed by seed, so that a stopped run has pairs. Arms with few seeds come after the main comparisons.
    jobs.sort(key=lambda job: (seeds_of(job[1], most, 0) == 0, job[0]))
    cold = sorted({seed for seed, _ in jobs if not (options.output / f"seed{seed}" / "sft").exists()})
    seconds = len(cold) * COLD_START_S + len(jobs) * TRAINED_ARM_S * options.steps / training.STEPS
    announce("c", len(jobs), seconds, options.jobs)
    cold_starts = {f"cold {seed}": partial(training.cold_start, options.output / f"seed{seed}", seed) for seed in cold}
    run_all(cold_starts, options.jobs, logs, errors)
    for dynamic in (False, True):
        trained = {
            f"c {seed} {arm.name}": partial(training.train_arm, options.output, seed, arm, options.steps)
            for seed, arm in jobs
            if arm.dynamic == dynamic
        }
        run_all(trained, options.jobs, logs, errors)


PARTS: dict[str, Callable[[argparse.Namespace, list[str]], None]] = {"a": part_a, "b": part_b, "c": part_c}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="a, b, c; none: only write the page")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="default: runs/study")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--seeds", type=int, help=f"seeds of the main comparisons of a and c (default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=training.STEPS, help=f"of c (default: {training.STEPS})")
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"), help="default: docs/study.md")
    options = parser.parse_args(given)
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"there is no part {unknown[0]!r}; expected a, b or c")
    errors: list[str] = []
    for part in sorted(set(options.parts)):
        PARTS[part](options, errors)
    page.write(options.output, options.page)
    print(f"Page: {options.page}")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
