"""Runs on two processes resume after a kill, and after a stop of each rank."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from arpo_trl.errors import ConfigError
from arpo_trl.runs.checkpoints import Checkpoints
from ranks import EXACT, Running, launch, launched
from resuming import make_trainer, outcome, save_calling_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = "tests/resuming.py"
STEPS = ("--max_steps", "4", "--per_device_train_batch_size", "4")
RESUME = ("--resume_from_checkpoint", "true")
BOUND_S = 100.0
"""torch's launcher gives ranks 30 s to follow one that is gone, or a signal, before it kills them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_calling_model(tmp_path_factory.mktemp("model"))


def until(condition, running: Running) -> None:
    end = time.monotonic() + 2 * BOUND_S
    while not condition():
        said = running.output()
        assert "ChildFailedError" not in said and "done 4" not in said, said[-8000:]
        assert time.monotonic() < end, running.output()[-4000:]
        time.sleep(0.02)


def hanging(running: Running, output: Path, hang: Path, after: str) -> list[psutil.Process]:
    """The ranks, once all wait for rewards in a step later than the one that left `after`."""
    until(lambda: list(output.glob(after)), running)
    hang.write_text("reward", "utf-8")
    until(hang.with_suffix(".there").exists, running)
    hang.with_suffix(".there").unlink()
    return running.ranks()


def all_end(ranks: list[psutil.Process]) -> bool:
    _, running = psutil.wait_procs(ranks, timeout=30)
    return not running


@pytest.mark.parametrize("way", ["ddp", "zero3", "fsdp2"])
def test_killed_or_stopped_ranks_resume_like_an_uninterrupted_run(way, model, tmp_path):
    """First, where ranks share one optimizer, all are killed while both write a checkpoint. Then rank 1 is killed:
    rank 0 must not wait for it. Then rank 1 alone is told to stop: rank 0 stops with it. Then the run goes to its end.
    """
    whole, output, hang = tmp_path / "whole", tmp_path / "run", tmp_path / "hang"
    command = (way, SCRIPT, model, str(output), *STEPS)
    waiting = {"HANG": str(hang)}
    share_optimizer = way != "ddp"
    if share_optimizer:
        with launched(*command) as running:
            until((output / "checkpoint-1").exists, running)
            until((output / ".unfinished").exists, running)
            for rank in running.ranks():
                rank.kill()

    with launched(*command, *(RESUME if share_optimizer else ()), environment=waiting) as running:
        ranks = hanging(running, output, hang, "checkpoint-1")
        ranks[1].kill()
        ended = running.wait(BOUND_S)
        assert ended.code != 0
        assert all_end(ranks)
    hang.unlink()

    steps = len(Checkpoints(output).all())
    with launched(*command, *RESUME, environment=waiting) as running:
        ranks = hanging(running, output, hang, f"trajectories/step-{steps:06d}*")
        ranks[1].send_signal(signal.SIGTERM)
        ended = running.wait(BOUND_S)
        assert ended.code != 0
        assert "To resume, run the same command" in ended.output
        assert all_end(ranks)
    hang.unlink()

    launch(*command, *RESUME, environment={"WHOLE": str(whole)})
    assert outcome(output) == outcome(whole)
    if share_optimizer:
        parts = "global_step4/*rank_1*optim_states.pt" if way == "zero3" else "optimizer.bin"
        assert list((output / "checkpoint-4").glob(parts))


def test_a_run_resumes_with_another_number_of_processes_if_its_batches_stay_the_same(model, tmp_path):
    """Two steps on two ranks of 4 rows, two more on one process of 8, against four on one process.

    In float32: in bfloat16 rows are rounded otherwise beside others, and so sampled otherwise.
    """
    whole, output = tmp_path / "whole", tmp_path / "run"
    constant = {"lr_scheduler_type": "constant", "bf16": False}
    alone = make_trainer(model, whole, max_steps=4, **constant)
    alone.train()
    alone.toolbox.close()

    flags = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--lr_scheduler_type", "constant")
    launch("ddp", SCRIPT, model, str(output), *flags, "--bf16", "False", launcher=EXACT)
    smaller = make_trainer(model, output, max_steps=4, per_device_train_batch_size=4, **constant)
    smaller.toolbox.close()
    with pytest.raises(ConfigError, match="generation_batch_size is 8 there and 4 here"):
        smaller.train(resume_from_checkpoint=True)
    resumed = make_trainer(model, output, max_steps=4, **constant)
    resumed.train(resume_from_checkpoint=True)
    resumed.toolbox.close()
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2, 3, 4]

    def paths(folder: Path, step: int) -> list[list[list[int]]]:
        with (folder / f"trajectories/step-{step:06d}-rank0.jsonl").open(encoding="utf-8") as lines:
            return [[node["ids"] for node in json.loads(line)["nodes"]] for line in lines]

    for step in (2, 3):
        assert paths(output, step) == paths(whole, step)
    for before, after in zip(alone.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
