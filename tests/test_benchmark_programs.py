"""The programs in benchmarks/ start: their imports, their own flags, and the settings of what they launch.

`mypy` checks their calls of the package. It cannot check the command lines that they launch.
"""

import importlib
import pickle
import sys
from pathlib import Path

import pytest

import chaos
import compare_rules
import instructions
import shop
import vllm_parity
from arpo_trl.command_line import parse_settings
from arpo_trl.quickstart import stages

FOLDER = Path("benchmarks")
PROGRAMS = sorted(file.stem for file in FOLDER.glob("*.py") if "ArgumentParser(" in file.read_text("utf-8"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_shows_its_flags(name, monkeypatch, capsys):
    program = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


class Launched(Exception):
    """In place of a run: what would be launched has been checked."""


def checked(script: str, config: Path, *flags: str) -> float:
    """What `launch` would start exists, and takes these settings."""
    if script.endswith(".py"):  # a benchmark that changes train.py, and calls it
        assert Path(script).exists()
        script = "train"
    program = importlib.import_module(script if "." in script else f"arpo_trl.scripts.{script}")
    parse_settings(program.SETTINGS, ["--config", str(config), *flags])
    raise Launched


@pytest.mark.parametrize(
    ("module", "launch"),
    [
        *(
            (compare_rules, lambda to, name=name: compare_rules.train(to, 0, name, 1))
            for name in compare_rules.VARIANTS
        ),
        (vllm_parity, lambda to: vllm_parity.train(to, 0, "transformers", 1)),
        (vllm_parity, lambda to: vllm_parity.train(to, 0, "colocate", 1)),
        (shop, lambda to: shop.train(to, to / "run", 0, next(iter(shop.VARIANTS)), 1, 0.0)),
        (chaos, lambda to: chaos.run(to, 0, 0.3, steps=1, useful=1)),
        *(
            (stages, lambda to, task=task: stages.train_format(task, to, to / "sft", 0))
            for task in stages.TASKS.values()
        ),
    ],
)
def test_what_a_benchmark_launches_takes_its_settings(module, launch, tmp_path, monkeypatch):
    for name in ("CHAOS_RATE", "CHAOS_SEED", "CHAOS_COUNTS", "CHAOS_USEFUL"):
        monkeypatch.setenv(name, "")  # which is set back afterwards
    monkeypatch.setattr(module, "launch", checked)
    with pytest.raises(Launched):
        launch(tmp_path)


def test_a_comparison_resumes_and_ends_in_failure_where_a_run_fails(tmp_path, monkeypatch, capsys):
    started, broken = [], {"ranked N = M/4"}

    def cold_start(folder, seed, task):
        (folder / "sft").mkdir(parents=True, exist_ok=True)

    def train(folder, seed, variant, steps):
        started.append((variant, seed, steps))
        if variant in broken:
            raise SystemExit(1)
        return {"variant": variant, "seed": seed, **dict.fromkeys(compare_rules.COLUMNS, 0.5)}

    def run_here(jobs, at_a_time, logs, errors):
        for name, job in jobs.items():
            try:
                pickle.loads(pickle.dumps(job))()  # as for another process
            except SystemExit:
                errors.append(f"{name} failed")

    for name, stand_in in (("cold_start", cold_start), ("train", train), ("run_all", run_here)):
        monkeypatch.setattr(compare_rules, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["compare_rules", "--seeds", "3", "--steps", "2", "--output", str(tmp_path)])
    assert compare_rules.main() == 1
    assert started == [(variant, 3, 2) for variant in compare_rules.VARIANTS]
    said = capsys.readouterr()
    assert said.out.count("| 1 | 0.500 |") == len(compare_rules.VARIANTS) - 1
    assert said.err == "error: ranked N = M/4, seed 3 failed\n"
    started.clear()
    broken.clear()
    assert compare_rules.main() == 0
    assert started == [("ranked N = M/4", 3, 2)]


def test_training_in_chaos_wraps_the_tools_of_the_program(tmp_path, monkeypatch):
    counts = tmp_path / "calls.json"
    for name, value in {"RATE": "1", "SEED": "0", "COUNTS": str(counts), "USEFUL": "1"}.items():
        monkeypatch.setenv(f"CHAOS_{name}", value)
    for name in ("build_tools", "ARPOTrainer"):
        monkeypatch.setattr(chaos.train, name, getattr(chaos.train, name))
    monkeypatch.setattr(chaos.train, "main", lambda: None)
    monkeypatch.setattr(chaos.atexit, "register", lambda work: work())
    chaos.train_in_chaos()
    (tool,) = chaos.train.build_tools(chaos.train.ToolArguments(tools=["python"]))
    assert tool.__name__ == "python"
    assert counts.exists()
    (callback,) = chaos.train.ARPOTrainer.keywords["callbacks"]
    assert isinstance(callback, chaos.EnoughCalls)


@pytest.mark.parametrize("part", instructions.PARTS)
def test_the_counted_parts_of_a_rollout_run(part):
    instructions.PARTS[part]()
