"""The programs in benchmarks/ start: their imports, their own flags, and the settings of what they launch.

`mypy` checks their calls of the package. It cannot check the command lines that they launch.
"""

import importlib
import sys
from pathlib import Path

import pytest

import chaos
import compare_rules
import instructions
import shop
import vllm_parity
from arpo_trl.command_line import parse_settings
from study import training

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
        (compare_rules, lambda to: compare_rules.cold_start(to, 0)),
        *(
            (compare_rules, lambda to, name=name: compare_rules.train(to, 0, name, 1))
            for name in compare_rules.VARIANTS
        ),
        (vllm_parity, lambda to: vllm_parity.train(to, 0, "transformers", 1)),
        (vllm_parity, lambda to: vllm_parity.train(to, 0, "colocate", 1)),
        (shop, lambda to: shop.cold_start(to)),
        (shop, lambda to: shop.train(to, to / "run", 0, next(iter(shop.VARIANTS)), 1, 0.0)),
        (chaos, lambda to: chaos.run(to, 0, 0.3, steps=1, useful=1)),
        (training, lambda to: training.cold_start(to, 0)),
    ],
)
def test_what_a_benchmark_launches_takes_its_settings(module, launch, tmp_path, monkeypatch):
    for name in ("CHAOS_RATE", "CHAOS_SEED", "CHAOS_COUNTS", "CHAOS_USEFUL"):
        monkeypatch.setenv(name, "")  # which is set back afterwards
    if hasattr(module, "prepare"):
        monkeypatch.setattr(module, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(module, "launch", checked)
    with pytest.raises(Launched):
        launch(tmp_path)


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
