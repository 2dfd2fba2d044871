"""The study of branch rules, credits and baselines. Run it in the root of a checkout:

    OMP_NUM_THREADS=1 python -m benchmarks.study a b c --jobs 2

Part a trains on a tabular task with exact accuracies, part b measures gradients of frozen policies, part c trains the
quickstart's model. Each result is one file under --output. A stopped run can be resumed: results that have a file are
not computed again. At the end, or without a part, the program writes the page and its figure from the files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from arpo_trl.common.files import whole_file
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.batch import RolloutBatch

from . import files, frozen, page, tabular, training
from .arms import LEAVES, Arm, frozen_arms, grpo, seeds_of, tabular_arms, tabular_seeds_of, trained_arms
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
    context = get_context("forkserver")
    context.set_forkserver_preload([tabular.__name__])  # one import of torch for all processes
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for (path, *_), future in [(job, pool.submit(tabular.run, *job)) for job in jobs]:
            if (error := future.exception()) is not None:
                errors.append(f"{path.stem}: {type(error).__name__}: {error}")


# Part b --------------------------------------------------------------------------------------------------------------


def reference_file(output: Path, step: int, half: int) -> Path:
    return output / "b" / str(step) / f"reference{half}.pt"


def of_checkpoint(output: Path, step: int) -> tuple[Path, Path]:
    """The model of a checkpoint, and its data."""
    return output / "b" / "models" / str(step), output / "seed0" / "data"


def one_reference(output: Path, step: int, half: int) -> None:
    """Measure a half of the reference gradient of a checkpoint."""
    path = reference_file(output, step, half)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        torch.save(frozen.reference(*of_checkpoint(output, step), half), partial)


def one_sampling(output: Path, step: int, sampling: str) -> None:
    """Measure all missing arms with one way of sampling at one checkpoint."""
    target = torch.stack([torch.load(reference_file(output, step, half)) for half in (0, 1)]).mean(dim=0)
    (model, data), rollouts = of_checkpoint(output, step), list[RolloutBatch]()
    for arm in available(frozen_arms(), []):
        path = frozen.result_file(output, step, arm)
        if arm.sampling == sampling and not path.exists():
            files.write(path, frozen.measure(model, data, arm, rollouts, target) | {"step": step})


def part_b(options: argparse.Namespace, errors: list[str]) -> None:
    output = options.output
    wanted = [(step, arm) for step in frozen.CHECKPOINTS for arm in available(frozen_arms(), errors)]
    missing = [(step, arm) for step, arm in wanted if not frozen.result_file(output, step, arm).exists()]
    halves = [(step, half) for step in dict.fromkeys(step for step, _ in missing) for half in (0, 1)]
    halves = [(step, half) for step, half in halves if not reference_file(output, step, half).exists()]
    alone: dict[tuple[str, ...], tuple[Path, float]] = {
        ("cold", "0"): (output / "seed0" / "sft", COLD_START_S),
        ("checkpoints",): (output / "b" / "models", CHECKPOINTS_S),
    }
    before = {words: seconds for words, (made, seconds) in alone.items() if missing and not made.exists()}
    seconds = FROZEN_ARM_S * len(missing) + HALF_REFERENCE_S * len(halves)
    announce("b", len(missing), seconds, options.jobs, sum(before.values()))
    for words in before:
        if not run_all([words], options, errors, threads=options.jobs):
            return
    run_all([("reference", str(step), str(half)) for step, half in halves], options, errors)
    for step in frozen.CHECKPOINTS:
        paths = [reference_file(output, step, half) for half in (0, 1)]
        if all(path.exists() for path in paths):
            cosine = frozen.cosine(*(torch.load(path) for path in paths))
            found = {"cosine_of_halves": cosine, "batches": frozen.REFERENCE_BATCHES}
            files.write(paths[0].with_name("reference.json"), found)
    samplings = Counter((step, arm.sampling) for step, arm in missing)
    run_all([("b", str(step), sampling) for (step, sampling), _ in samplings.most_common()], options, errors)


# Part c --------------------------------------------------------------------------------------------------------------


def trained_file(output: Path, seed: int, arm: Arm) -> Path:
    return output / f"seed{seed}" / "arms" / f"{files.slug(arm.name)}.json"


def one_training(output: Path, seed: int, arm: Arm, steps: int) -> None:
    calls = None
    if arm.dynamic:  # with the call budget of GRPO without dynamic sampling
        equal = files.read(trained_file(output, seed, Arm(**grpo(LEAVES), baseline=arm.baseline)))
        if equal is None:
            raise ConfigError(f"{arm.name} trains for the calls of GRPO M = {LEAVES}, which has no result yet.")
        calls = equal["tool_calls_executed"]
    result = training.train(output / f"seed{seed}", arm, seed, steps, calls)
    files.write(trained_file(output, seed, arm), result | {"planned_steps": steps})


def part_c(options: argparse.Namespace, errors: list[str]) -> None:
    most, jobs = options.seeds or SEEDS["c"], []
    for arm in available(trained_arms(), errors):
        for seed in range(seeds_of(arm, most, min(FEW_SEEDS["c"], most))):
            found = files.read(trained_file(options.output, seed, arm))
            if found is None or found["planned_steps"] != options.steps:
                jobs.append((seed, arm))
    # Seed by seed, so that a stopped run has pairs. Arms with few seeds come after the main comparisons.
    jobs.sort(key=lambda job: (seeds_of(job[1], most, 0) == 0, job[0]))
    cold = sorted({seed for seed, _ in jobs if not (options.output / f"seed{seed}" / "sft").exists()})
    seconds = len(cold) * COLD_START_S + len(jobs) * TRAINED_ARM_S * options.steps / training.STEPS
    announce("c", len(jobs), seconds, options.jobs)
    run_all([("cold", str(seed)) for seed in cold], options, errors)
    names = [arm.name for arm in trained_arms()]
    for dynamic in (False, True):
        now = [("c", str(seed), str(names.index(arm.name))) for seed, arm in jobs if arm.dynamic == dynamic]
        run_all(now, options, errors)


def run_all(
    commands: Sequence[tuple[str, ...]], options: argparse.Namespace, errors: list[str], *, threads: int = 1
) -> bool:
    """Run this program once for each command, `--jobs` at a time, and return whether all succeed.

    Their output is in logs. Each command has `threads` threads.
    """
    logs = options.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def run(words: tuple[str, ...]) -> bool:
        start, log = time.perf_counter(), logs / f"{files.slug('-'.join(words))}.log"
        command = [sys.executable, "-m", __package__, "--output", str(options.output)]
        command += ["--steps", str(options.steps), "--one", *words]
        with log.open("w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            status = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode
        if status:
            errors.append(f"{' '.join(words)} failed; see {log}")
        state = "failed" if status else "done"
        print(
            f"{time.strftime('%H:%M:%S')} {' '.join(words)}: {state}, {time.perf_counter() - start:.0f} s", flush=True
        )
        return not status

    with ThreadPoolExecutor(options.jobs) as pool:
        return all([*pool.map(run, commands)])  # a list: one failure does not cancel the other commands


def run_one(words: Sequence[str], options: argparse.Namespace) -> None:
    match words:
        case ["cold", seed]:
            training.cold_start(options.output / f"seed{seed}", int(seed))
        case ["checkpoints"]:
            frozen.make_checkpoints(options.output / "seed0", options.output / "b" / "models")
        case ["reference", step, half]:
            one_reference(options.output, int(step), int(half))
        case ["b", step, sampling]:
            one_sampling(options.output, int(step), sampling)
        case ["c", seed, number]:
            one_training(options.output, int(seed), trained_arms()[int(number)], options.steps)


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
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if unknown := sorted(set(options.parts) - PARTS.keys()):
        parser.error(f"there is no part {unknown[0]!r}; expected a, b or c")
    if options.one:
        run_one(options.one, options)
        return 0
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
