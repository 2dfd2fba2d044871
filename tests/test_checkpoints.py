import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

from arpo_trl import ARPOConfig
from arpo_trl.errors import CheckpointError, ConfigError
from arpo_trl.publishing import mixin as publishing
from arpo_trl.publishing.merging import merge_adapter
from arpo_trl.publishing.mixin import Publishing
from arpo_trl.publishing.model_card import Card
from arpo_trl.publishing.trained_settings import EvaluationSettings
from arpo_trl.rewards import HierarchicalReward
from arpo_trl.runs import checkpoints, identity, resumable
from arpo_trl.runs.checkpoints import STATE_FILE, Checkpoints, SavedState
from arpo_trl.runs.identity import RunIdentity, dataset_identity, deciding_settings, frozen_weights
from arpo_trl.tools.spec import ToolSet
from arpo_trl.training.trainer import ARPOTrainer
from resuming import ROWS, make_trainer, outcome, save_calling_model
from support import ON_CPU, python, save_tiny_model, search, tiny_model, tokenizer

STEPS = 7  # two of ten prompts a step: an epoch has five
RUNS = {
    "plain": {},
    # A generation batch serves 8 micro-batches, that is 4 steps; a log covers 3: both are cut by most checkpoints.
    "buffered": {
        "per_device_train_batch_size": 4,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 3,
        "max_steps": 10,
        "log_completions": True,
    },
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8},
    "streamed": {"train_dataset": ROWS.to_iterable_dataset()},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_calling_model(tmp_path_factory.mktemp("model"))


def train(model: str | PreTrainedModel, output: Path, resume: str | bool | None = None, **settings) -> ARPOTrainer:
    trainer = made(model, output, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def made(model: str | PreTrainedModel, output: Path, **settings) -> ARPOTrainer:
    trainer = make_trainer(model, output, **{"max_steps": STEPS, **settings})
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of each of RUNS, trained to its end once."""
    folders: dict[str, Path] = {}

    def folder(run: str) -> Path:
        if run not in folders:
            folders[run] = tmp_path_factory.mktemp(run)
            train(model, folders[run], **RUNS[run])
        return folders[run]

    return folder


def ended_after(whole: Path, step: int, folder: Path) -> Path:
    """A copy of a run as if it had been killed in step `step` + 1 or later."""
    shutil.copytree(whole, folder)
    for path in Checkpoints(folder).all():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    return folder


@pytest.mark.slow
def test_a_training_after_one_that_failed_within_a_step_begins_anew(model, tmp_path, monkeypatch):
    """As in a notebook. A rollout serves 8 micro-batches, that is 4 steps."""
    trainer = made(model, tmp_path, **{**RUNS["buffered"], "max_steps": 4, "save_strategy": "no"})
    events: list[str] = []
    weights: list[tuple[int, int]] = []
    generate, compute = trainer._generate_and_score_completions, trainer.compute_loss

    def rollout(rows):
        assert not trainer._metrics["train"]
        events.append("rollout")
        weights.append((trainer.state.global_step, trainer.loads))  # by which an engine knows the weights it has
        return generate(rows)

    def update(*args, **kwargs):
        events.append("update")
        if len(weights) == 1 and events.count("update") == 3:
            raise RuntimeError("CUDA out of memory")
        return compute(*args, **kwargs)

    monkeypatch.setattr(trainer, "_generate_and_score_completions", rollout)
    monkeypatch.setattr(trainer, "compute_loss", update)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert events == ["rollout", *["update"] * 3]
    events.clear()
    trainer.train()
    assert events == ["rollout", *["update"] * 8]
    assert len(set(weights)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "step"),
    [
        ("plain", 2),
        ("plain", 5),
        ("plain", 6),
        ("plain", 7),
        ("buffered", 1),
        ("buffered", 4),
        ("buffered", 6),
        ("evaluated", 2),
        ("streamed", 3),
        ("streamed", 5),
        ("streamed", 6),
        ("lora", 3),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_run(model, whole, run, step, tmp_path):
    """Metrics, weights and trees, bit for bit; step 5 ends an epoch, 4 a generation batch, 7 the run."""
    left_alone = outcome(whole(run))
    assert any(row.get("arpo/tools/calls_made", 0) > 0 for row in left_alone["history"])
    assert any(abs(row.get("grad_norm", 0)) > 0.01 for row in left_alone["history"])
    train(model, ended_after(whole(run), step, tmp_path / "run"), True, **RUNS[run])
    assert outcome(tmp_path / "run") == left_alone


class EndEpochAt(TrainerCallback):
    """Ends the epoch after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop |= state.global_step == self.step


@pytest.mark.slow
def test_after_an_epoch_that_a_callback_has_ended_a_resumed_run_has_the_same_rows(model, tmp_path):
    """Two epochs, of 2 steps and of 5; 8 steps would be the most. A run resumes within each, between them, and at the
    end."""

    def trained(folder: Path, resume: bool) -> int:
        trainer = made(model, folder, max_steps=8)
        trainer.add_callback(EndEpochAt(2))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.global_step

    assert trained(tmp_path / "whole", False) == 7
    for step in (1, 2, 4, 7):
        folder = ended_after(tmp_path / "whole", step, tmp_path / str(step))
        assert trained(folder, True) == 7
        assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_resumed_run_with_a_reference_adapter_has_its_trained_adapter(model, tmp_path):
    """With beta, TRL adds a second adapter to a model that has one: the copy "ref"."""
    get_peft_model(tiny_model(), RUNS["lora"]["peft_config"]).save_pretrained(tmp_path / "cold_start")

    def run(folder: Path, resume: bool | None = None) -> dict[str, torch.Tensor]:
        base = AutoModelForCausalLM.from_pretrained(model)
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "cold_start"), is_trainable=True)
        trainer = train(adapted, folder, resume, max_steps=3, beta=0.1)
        return {name: weight.detach() for name, weight in trainer.model.named_parameters() if ".lora_" in name}

    weights = run(tmp_path / "whole")
    assert any((weights[name] != weights[name.replace("default", "ref")]).any() for name in weights)
    resumed = run(ended_after(tmp_path / "whole", 2, tmp_path / "run"), True)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_files_of_an_earlier_run_are_not_trees_of_the_resumed_run(model, whole, tmp_path):
    folder = ended_after(whole("plain"), 6, tmp_path / "run")
    for stray in ("step-000006-rank1.jsonl", "step-000099-rank0.jsonl", "eval-000007-rank0.jsonl"):
        (folder / "trajectories" / stray).write_text("{}\n", "utf-8")
    train(model, folder, True)
    assert sorted(path.name for path in (folder / "trajectories").iterdir()) == [
        f"step-{step:06d}-rank0.jsonl" for step in range(7)
    ]


def test_true_without_a_checkpoint_starts_afresh_and_says_so(model, tmp_path, caplog):
    trainer = train(model, tmp_path, "true", max_steps=1, save_strategy="no")
    assert trainer.state.global_step == 1
    assert "A new run starts" in caplog.text


@pytest.mark.slow
def test_a_new_run_in_a_folder_with_checkpoints_is_refused(model, whole):
    with pytest.raises(ConfigError, match=r"contains checkpoint-7 of an earlier run.*resume_from_checkpoint to true"):
        train(model, whole("plain"))


# Whole or not there --------------------------------------------------------------------------------------------------


def test_a_checkpoint_lists_its_files_and_gets_its_name_last(model, tmp_path, monkeypatch):
    """When transformers is done, nobody who looks for checkpoints finds one yet."""
    seen = []
    finish = Checkpoints.finish

    def watch(self, step, **facts):
        seen.append((get_last_checkpoint(tmp_path), (self.unfinished / "checkpoint-1" / "model.safetensors").exists()))
        return finish(self, step, **facts)

    monkeypatch.setattr(Checkpoints, "finish", watch)
    train(model, tmp_path, max_steps=1)
    assert seen == [(None, True)]
    state = SavedState.of(tmp_path / "checkpoint-1")
    state.check_files()
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "arpo_memory_0.pt"} <= set(state.files)
    assert not (tmp_path / checkpoints.UNFINISHED).exists()
    (tmp_path / "checkpoint-1/training_args.bin").unlink()  # as in a checkpoint from the Hub
    state.check_files()


@pytest.mark.slow
def test_a_checkpoint_has_the_settings_of_its_run(whole, tmp_path):
    for run in (whole("plain"), whole("lora")):
        of_run = EvaluationSettings.of_run(run)
        assert of_run is not None and of_run.values["max_completion_length"] == 48
        assert EvaluationSettings.of_run(run / "checkpoint-3") == of_run
        card = Card.of(run / "checkpoint-3", "me/policy")
        assert card.settings == Card.of(run, "me/policy").settings
        assert "training_config.yaml" in SavedState.of(run / "checkpoint-3").files
    merge_adapter(str(whole("lora") / "checkpoint-3"), tmp_path / "merged")
    assert EvaluationSettings.of_run(tmp_path / "merged") == EvaluationSettings.of_run(whole("lora"))
    assert "## How it was trained" in (tmp_path / "merged/README.md").read_text("utf-8")


def test_a_rank_that_does_not_save_writes_no_settings(model, tmp_path, monkeypatch):
    """transformers 5.24 calls `_save` on all ranks, and checks `should_save` there."""
    trainer = made(model, tmp_path)
    monkeypatch.setattr(Trainer, "_save", lambda *_: None)
    monkeypatch.setattr(ARPOConfig, "should_save", False)
    trainer._save(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(ARPOConfig, "should_save", True)
    (tmp_path / "final").mkdir()
    trainer._save(str(tmp_path / "final"))
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["training_config.yaml"]


@pytest.mark.slow
def test_a_half_written_checkpoint_is_never_picked_up(model, whole, tmp_path):
    folder = ended_after(whole("plain"), 6, tmp_path / "run")
    half = folder / checkpoints.UNFINISHED / "checkpoint-7"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert train(model, folder, True).state.global_step == STEPS
    assert outcome(folder) == outcome(whole("plain"))


@pytest.mark.slow
def test_a_checkpoint_that_was_whole_but_not_yet_renamed_is_not_lost(whole, tmp_path):
    folder = ended_after(whole("plain"), 6, tmp_path / "run")
    (folder / checkpoints.UNFINISHED).mkdir()
    (folder / "checkpoint-6").rename(folder / checkpoints.UNFINISHED / "checkpoint-6")
    Checkpoints(folder).clear()
    assert [path.name for path in Checkpoints(folder).all()][-1] == "checkpoint-6"


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_named_if_requested(whole, tmp_path):
    folder = ended_after(whole("plain"), 7, tmp_path / "run")
    weights = folder / "checkpoint-7" / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    here = Checkpoints(folder)
    assert here.find(True).step == 5
    with pytest.raises(CheckpointError) as error:
        here.find(str(folder / "checkpoint-7"))
    assert str(error.value) == (
        f"{weights} has {size - 1:,} bytes; it was written with {size:,}. "
        f"The last complete checkpoint is {folder / 'checkpoint-5'}."
    )
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is missing"):
        here.find(str(folder / "checkpoint-6"))


@pytest.mark.slow
def test_a_damaged_checkpoint_that_is_not_used_is_in_the_log(model, whole, tmp_path, caplog):
    folder = ended_after(whole("plain"), 6, tmp_path / "run")
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    train(model, folder, resume=True)
    assert "A checkpoint is not used: " in caplog.text and "optimizer.pt is missing" in caplog.text


@pytest.mark.slow
def test_an_invalid_memory_file_of_the_right_size_is_named(model, whole, tmp_path):
    folder = ended_after(whole("plain"), 6, tmp_path / "run")
    memory = folder / "checkpoint-6" / "arpo_memory_0.pt"
    memory.write_bytes(b"\0" * memory.stat().st_size)
    with pytest.raises(CheckpointError, match=r"arpo_memory_0\.pt cannot be read"):
        train(model, folder, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"step": 7}'])
def test_without_any_whole_checkpoint_true_is_an_error(whole, tmp_path, content):
    shutil.copytree(whole("plain") / "checkpoint-7", tmp_path / "checkpoint-7")
    state = tmp_path / "checkpoint-7" / STATE_FILE
    state.unlink() if content is None else state.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is complete.*arpo_state\.json"):
        Checkpoints(tmp_path).find(True)


def test_a_path_that_is_not_a_folder_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a folder, true or false\..*contains no complete checkpoint"):
        Checkpoints(tmp_path).find("elsewhere")


@pytest.mark.slow
def test_the_checkpoint_written_last_is_the_last_whatever_its_step(whole, tmp_path):
    folder = ended_after(whole("plain"), 7, tmp_path / "run")
    state = folder / "checkpoint-3" / STATE_FILE
    later = json.loads(state.read_text("utf-8"))
    later["written"] += 1000
    state.write_text(json.dumps(later), "utf-8")
    assert Checkpoints(folder).find("true").step == 3


@pytest.mark.slow
def test_a_clock_that_was_set_back_costs_no_checkpoint(model, tmp_path, monkeypatch):
    train(model, tmp_path, max_steps=2)
    monkeypatch.setattr("arpo_trl.runs.checkpoints.time.time", lambda now=time.time: now() - 3600)
    train(model, tmp_path, max_steps=4, save_total_limit=2, resume=True)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["checkpoint-3", "checkpoint-4"]
    assert Checkpoints(tmp_path).find(True).step == 4


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_patience_of_early_stopping_is_part_of_a_checkpoint(model, tmp_path, count):
    evaluated = {**RUNS["evaluated"], "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": None}
    made = make_trainer(model, tmp_path, **evaluated, max_steps=3, metric_for_best_model="eval_reward")
    for _ in range(count):
        made.add_callback(EarlyStoppingCallback(9, early_stopping_threshold=100.0))
    made.train()
    again = make_trainer(model, tmp_path, **evaluated, max_steps=4, metric_for_best_model="eval_reward")
    patience = [EarlyStoppingCallback(9, early_stopping_threshold=100.0) for _ in range(count)]
    for callback in patience:
        again.add_callback(callback)
    again.train(resume_from_checkpoint=True)
    # the first of four evaluations is the best
    assert [callback.early_stopping_patience_counter for callback in patience] == [3] * count
    assert set(patience) <= set(again.callback_handler.callbacks)


@pytest.mark.slow
def test_old_checkpoints_go_when_the_new_one_is_whole(model, tmp_path):
    trainer = train(model, tmp_path, max_steps=3, save_total_limit=1)
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["checkpoint-3"]
    assert trainer.state.global_step == 3


def test_the_best_checkpoint_is_known_by_its_own_place(model, tmp_path):
    evaluated = {**RUNS["evaluated"], "eval_steps": 1, "max_steps": 2}
    trainer = train(model, tmp_path, **evaluated, load_best_model_at_end=True, metric_for_best_model="eval_reward")
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    # Others may read the weights if they may read the rest.
    assert (best / "model.safetensors").stat().st_mode == (best / "config.json").stat().st_mode
    said = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text("utf-8"))
    assert said["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    assert trainer.loads == 2  # an engine with a copy of the weights copies them again
    trainer.create_model_card()
    assert f", the best of 2 steps, from {best.name.replace('checkpoint-', 'step ')}." in (
        tmp_path / "README.md"
    ).read_text("utf-8")
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert Card.of(tmp_path, "me/policy").best_step == trainer.state.best_global_step


@pytest.mark.slow
@pytest.mark.parametrize("first", ["moved", "run"])
def test_the_best_checkpoint_is_kept_and_loaded_if_the_run_has_moved_or_is_named_otherwise(
    model, tmp_path, monkeypatch, first
):
    calls = itertools.count()

    def falling(completions, **_):  # the first evaluation is the best
        return [-float(next(calls)) for _ in completions]

    evaluated = {**RUNS["evaluated"], "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    evaluated |= {"metric_for_best_model": "eval_reward", "reward_funcs": [falling]}
    monkeypatch.chdir(tmp_path)
    train(model, Path(first), **evaluated, max_steps=2)
    os.rename(first, "run")
    again = train(model, tmp_path / "run", **evaluated, max_steps=4, resume=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-1")
    assert [path.name for path in Checkpoints(tmp_path / "run").all()] == ["checkpoint-1", "checkpoint-4"]
    assert again.loads == 2  # a second time by the best checkpoint


def test_a_checkpoint_is_written_where_the_run_began(model, tmp_path, monkeypatch):
    """A tool that a rollout ahead runs may change the working folder at any time."""

    class Moves(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            os.chdir(tmp_path / "other")

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(model, Path("run"), max_steps=1, save_steps=1)
    trainer.add_callback(Moves())
    trainer.train()
    assert (tmp_path / "run/checkpoint-1").is_dir() and not list((tmp_path / "other").iterdir())


def test_resuming_and_publishing_stand_side_by_side():
    bases = ARPOTrainer.__bases__
    assert Publishing in bases and any(issubclass(base, resumable.Resumable) for base in bases)
    assert resumable.Resumable.__bases__ == Publishing.__bases__ == (GRPOTrainer,)
    assert "publishing" not in Path(resumable.__file__).read_text("utf-8")
    assert "resumable" not in Path(publishing.__file__).read_text("utf-8")


def test_only_whole_checkpoints_are_pushed(model, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Publishing,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, SavedState.of(Path(folder)).step)),
    )
    trainer = made(model, tmp_path, max_steps=1)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [(str(tmp_path / "checkpoint-1"), 1)]


class LimitedFrom(TrainerCallback):
    """From a step on no file may be larger than some bytes."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_keeps_the_earlier_one(model, tmp_path):
    trainer = made(model, tmp_path, max_steps=3, save_total_limit=1)
    trainer.add_callback(LimitedFrom(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"checkpoint-3 could not be written to {tmp_path} (" in str(error.value)
    assert f"{tmp_path / 'checkpoint-2'} is complete. Raise the limit (ulimit -f unlimited)" in str(error.value)
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / ".unfinished").exists()
    assert Checkpoints(tmp_path).find(True).step == 2


def test_space_is_the_remedy_of_a_full_disk_only(model, tmp_path):
    trainer = made(model, tmp_path)
    error = trainer._could_not_save(3, PermissionError(errno.EACCES, "Permission denied", "optimizer.pt"))
    assert "'optimizer.pt'). There is no earlier checkpoint. Correct the cause, then resume" in str(error)
    lost = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert "Another process has ended or lost its connection" in str(trainer._could_not_save(3, lost))
    full = str(trainer._could_not_save(3, OSError(errno.ENOSPC, "No space left on device")))
    assert "MB are free there. There is no earlier checkpoint. Free some space, then resume" in full


def test_a_read_only_folder_is_refused_before_the_model_is_loaded():
    with pytest.raises(ConfigError, match=r"output_dir /proc/self cannot be written"):
        make_trainer("no/model", Path("/proc/self"))


# Of this run ---------------------------------------------------------------------------------------------------------


def search_for_some(query: str, most: int = 3) -> str:
    """Search for facts.

    Args:
        query: What to look for.
        most: How many facts.
    """
    return f"{most} facts about {query}"


search_for_some.__name__ = "search"


def identity_with(*tools: Any) -> RunIdentity:
    parameters = {name: spec.undescribed_parameters for name, spec in ToolSet(tools).specs.items()}
    of_tools: dict[str, Any] = {"tools": list(parameters), "tools_parameters": parameters}
    return RunIdentity(settings={}, model={}, dataset=None, rewards=[], processes=1, sharding=None, **of_tools)


def saved_by(identity: dict[str, Any]) -> SavedState:
    state: dict[str, Any] = {"written": 0.0, "between_generations": True, "owes_evaluation": False, "passes": 0}
    return SavedState(folder=Path("run"), step=1, steps_in_pass=1, identity=identity, versions={}, files={}, **state)


def test_a_tool_of_the_same_name_with_other_parameters_is_another_tool():
    state = saved_by(identity_with(search).as_dict())
    state.check_same_run(identity_with(search))
    expected = r"run was written by another run: tools_parameters.search.properties.most is null there and \{.*\} here"
    with pytest.raises(ConfigError, match=expected):
        state.check_same_run(identity_with(search_for_some))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_new_run_from_a_checkpoint_of_another_run_begins_with_a_whole_model(tmp_path, kind):
    folder = tmp_path / "my run"
    (adapted() if kind == "adapter" else tiny_model()).save_pretrained(folder)
    state = dataclasses.replace(saved_by(identity_with(search).as_dict()), folder=folder)
    with pytest.raises(ConfigError) as raised:
        state.check_same_run(identity_with(search_for_some))
    way = f"set model_name_or_path to {folder}"
    if kind == "adapter":
        way = f"merge the adapter (arpo-trl merge '{folder}' --output FOLDER) and set model_name_or_path to FOLDER"
    assert f"To start a new run from the weights, {way}. Choose another output_dir." in str(raised.value)


def test_a_tool_may_be_described_otherwise():
    def described(query: str) -> str:
        """Look things up.

        Args:
            query: A few words.
        """
        return query

    described.__name__ = "search"
    saved_by(identity_with(search).as_dict()).check_same_run(identity_with(described))


def of_this_run(**values: Any) -> RunIdentity:
    return dataclasses.replace(identity_with(), **values)


def with_batches(processes: int, per_device: int, accumulated: int, generated: int = 16) -> RunIdentity:
    settings = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated}
    steps = {"steps_per_generation": generated // (processes * per_device), "generation_batch_size": generated}
    return of_this_run(processes=processes, settings=settings | steps)


def test_another_number_of_processes_trains_the_same_rows_in_a_step():
    state = saved_by(with_batches(2, 4, 2).as_dict())  # 16 rows
    for processes, per_device, accumulated in ((1, 8, 2), (1, 4, 4), (1, 16, 1), (4, 2, 2), (4, 4, 1)):
        state.check_same_run(with_batches(processes, per_device, accumulated))
    expected = "per_device_train_batch_size × gradient_accumulation_steps × processes is 16 there and 8 here"
    for processes, per_device, accumulated in ((1, 8, 1), (1, 4, 2), (4, 2, 1)):
        with pytest.raises(ConfigError, match=rf"another run: {expected}\. To resume, restore the old value"):
            state.check_same_run(with_batches(processes, per_device, accumulated))
    with pytest.raises(ConfigError, match="generation_batch_size is 16 there and 32 here"):
        state.check_same_run(with_batches(1, 8, 2, generated=32))


def test_a_reward_with_other_settings_is_another_reward():
    (task, paper) = ({"hierarchical": {"accuracy": accuracy}} for accuracy in ("task", "paper_f1"))
    state = saved_by(of_this_run(reward_settings=task).as_dict())
    state.check_same_run(of_this_run(reward_settings=task))
    expected = r'reward_settings.hierarchical.accuracy is "task" there and "paper_f1" here'
    with pytest.raises(ConfigError, match=expected):
        state.check_same_run(of_this_run(reward_settings=paper))


def test_frozen_weights_are_compared_where_both_runs_have_read_them():
    state = saved_by(of_this_run(frozen_weights="a").as_dict())
    state.check_same_run(of_this_run(frozen_weights="a"))
    state.check_same_run(of_this_run())
    saved_by(of_this_run().as_dict()).check_same_run(of_this_run(frozen_weights="b"))
    with pytest.raises(ConfigError, match='frozen_weights is "a" there and "b" here'):
        state.check_same_run(of_this_run(frozen_weights="b"))


def adapted(seed: int = 0, **settings: Any) -> PeftModel:
    """A new adapter on a model of that seed. The adapter is never the same."""
    model = tiny_model(seed)
    torch.manual_seed(time.time_ns())
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))


def test_frozen_weights_are_those_under_an_adapter_or_of_a_reference_model():
    assert frozen_weights(adapted()) == frozen_weights(adapted(r=4)) != frozen_weights(adapted(1))
    assert frozen_weights(tiny_model()) == frozen_weights(tiny_model()) != frozen_weights(tiny_model(1))
    with_ref = adapted()
    with_ref.add_adapter("ref", with_ref.peft_config["default"])
    assert frozen_weights(with_ref) == frozen_weights(adapted())


def test_what_a_start_computes_anew_is_not_read():
    trained = adapted(modules_to_save=["embed_tokens"])
    digest = frozen_weights(trained)
    with torch.no_grad():
        trained.get_input_embeddings().original_module.weight += 1  # replaced by the trained copy
    assert frozen_weights(trained) == digest
    assert frozen_weights(adapted(init_lora_weights="pissa")) is None
    quantized = torch.nn.Module()
    quantized.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert frozen_weights(quantized) is None


OTHER_ROWS = Dataset.from_list([*ROWS.select(range(9)), {**ROWS[9], "answer": ["10"]}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_generations": 2, "initial_rollouts": 2}, "num_generations is 4 there and 2 here"),
        ({"initial_rollouts": 1}, "initial_rollouts is 2 there and 1 here"),
        ({"seed": 1}, "seed is 42 there and 1 here"),
        ({"learning_rate": 2e-3}, "learning_rate is 0.001 there and 0.002 here"),
        ({"branch_rule": "random"}, 'branch_rule is "threshold" there and "random" here'),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size is 8 there and 4 here"),
        ({"num_iterations": 2}, "num_iterations is 1 there and 2 here"),
        ({"max_completion_length": 47}, "max_completion_length is 48 there and 47 here"),
        ({"train_dataset": ROWS.select(range(8))}, "dataset.rows is 10 there and 8 here"),
        ({"train_dataset": OTHER_ROWS}, r"dataset.content is "),
        ({"tools": [search]}, r'tools is ["search", "python"] there and ["search"] here'),
        (
            {"tools": [search_for_some, python]},
            'tools_parameters.search.properties.most is null there and {"type": "integer',
        ),
        ({"peft_config": LoraConfig(r=4)}, "model.parameters is "),
    ],
)
def test_a_run_with_different_results_is_rejected(model, whole, change, told):
    with pytest.raises(ConfigError) as error:
        train(model, whole("plain"), True, **change)
    assert "checkpoint-7 was written by another run: " in str(error.value)
    assert told in str(error.value)
    assert "model_name_or_path" in str(error.value)


@pytest.mark.slow
def test_a_resumed_run_has_the_weights_that_no_checkpoint_contains(model, whole, tmp_path, caplog):
    other = tmp_path / "other"
    tiny_model(1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    folder = tmp_path / "lora"
    shutil.copytree(whole("lora"), folder)
    adapter = dataclasses.replace(RUNS["lora"]["peft_config"], base_model_name_or_path=None)
    with pytest.raises(ConfigError, match=r'frozen_weights is "\w+" there and "\w+" here'):
        train(str(other), folder, True, peft_config=adapter)
    # A run under FSDP has not read the frozen weights, so that its checkpoint knows the model by its name only.
    state = folder / "checkpoint-7" / STATE_FILE
    values = json.loads(state.read_text("utf-8"))
    values["identity"]["frozen_weights"] = None
    state.write_text(json.dumps(values), "utf-8")
    train(str(other), folder, True, peft_config=adapter)
    assert f"was trained on {model}, and this run puts it on {other}" in caplog.text
    train(model, tmp_path / "ref", max_steps=1, beta=0.1)
    with pytest.raises(ConfigError, match=r'frozen_weights is "\w+" there and "\w+" here'):
        train(str(other), tmp_path / "ref", True, max_steps=2, beta=0.1)
    train(model, tmp_path / "ref", True, max_steps=2, beta=0.1)
    # Without an adapter and a reference model the checkpoint contains every weight.
    shutil.copytree(whole("plain"), tmp_path / "plain")
    assert train(str(other), tmp_path / "plain", True).state.global_step == STEPS


@pytest.mark.slow
def test_a_resumed_run_compares_answers_in_the_same_way(model, tmp_path):
    train(model, tmp_path, max_steps=1, reward_funcs=HierarchicalReward())
    with pytest.raises(
        ConfigError, match=r'reward_settings.hierarchical.accuracy is "task" there and "paper_f1" here'
    ):
        train(model, tmp_path, True, reward_funcs=HierarchicalReward("paper_f1"))
    train(model, tmp_path, True, max_steps=2, reward_funcs=HierarchicalReward())


@pytest.mark.slow
def test_another_model_is_refused(whole, tmp_path):
    shallow = json.loads((whole("plain") / "checkpoint-7" / "config.json").read_text("utf-8"))
    other = Path(save_tiny_model(tmp_path / "other"))
    config = json.loads((other / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == shallow["num_hidden_layers"] == 2
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}), "utf-8")
    with pytest.raises(ConfigError, match=r"model\.parameters is [\d]+ there and [\d]+ here"):
        train(str(other), whole("plain"), True)


@pytest.mark.slow
def test_what_only_logs_saves_or_goes_further_may_change(model, whole, tmp_path):
    folder = ended_after(whole("plain"), 7, tmp_path / "run")
    trainer = train(
        model, folder, True, logging_steps=2, save_steps=4, max_steps=8, trajectory_log_rate=0.5, run_name="other"
    )
    assert trainer.state.global_step == 8


@pytest.mark.slow
def test_skipping_no_data_is_refused(model, whole):
    with pytest.raises(ConfigError, match="ignore_data_skip is set"):
        train(model, whole("plain"), True, ignore_data_skip=True)


def test_an_updated_reference_model_is_refused(model, tmp_path):
    moving = {"sync_ref_model": True, "beta": 0.1}
    train(model, tmp_path, max_steps=1, **moving)
    with pytest.raises(
        ConfigError, match=r"sync_ref_model is set, but checkpoints do not contain the reference model"
    ):
        train(model, tmp_path, True, max_steps=2, **moving)


def test_a_run_cannot_resume_from_a_checkpoint_of_only_the_model(model, tmp_path):
    train(model, tmp_path, max_steps=1, save_only_model=True)
    with pytest.raises(CheckpointError, match=r"contains only the model \(save_only_model\)"):
        train(model, tmp_path, True, max_steps=2)


@pytest.mark.slow
def test_a_checkpoint_of_more_processes_is_spread_where_nothing_is_cut(model, whole, tmp_path):
    """Two processes of 4 rows made the same global batches as one of 8 does."""
    folder = ended_after(whole("plain"), 6, tmp_path / "run")

    def of_two(**changes) -> None:
        file = folder / "checkpoint-6" / STATE_FILE
        state = json.loads(file.read_text("utf-8"))
        state["identity"] |= {"processes": 2}
        state["identity"]["settings"]["per_device_train_batch_size"] = 4
        state["identity"] |= {key: value for key, value in changes.items() if key in state["identity"]}
        state |= {key: value for key, value in changes.items() if key in state}
        file.write_text(json.dumps(state), "utf-8")

    of_two(between_generations=False)
    with pytest.raises(
        ConfigError, match=r"2 processes, but this run has 1; it contains the untrained rest of a generation"
    ):
        train(model, folder, True)
    of_two(between_generations=True, sharding="DeepSpeed ZeRO-3")
    with pytest.raises(ConfigError, match=r"ZeRO-3 saves one part of the optimizer per process\. Start 2 processes"):
        train(model, folder, True)
    of_two(sharding=None)
    assert train(model, folder, True).state.global_step == STEPS
    assert outcome(folder)["trees"].keys() == outcome(whole("plain"))["trees"].keys()


@pytest.mark.slow
def test_a_checkpoint_of_more_processes_is_continued_where_the_last_step_of_an_epoch_is_short(model, tmp_path):
    """An epoch is one generation of 6 micro-batches, and so a step of 4 and one of 2."""
    settings = {
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 6},
        **{"train_dataset": ROWS.select(range(6)), "max_steps": 4},
    }
    train(model, tmp_path / "whole", **settings)
    folder = ended_after(tmp_path / "whole", 2, tmp_path / "run")
    file = folder / "checkpoint-2" / STATE_FILE
    state = json.loads(file.read_text("utf-8"))
    state["identity"]["processes"] = 2
    state["identity"]["settings"]["per_device_train_batch_size"] = 2
    file.write_text(json.dumps(state), "utf-8")
    train(model, folder, True, **settings)
    assert outcome(folder)["trees"].keys() == outcome(tmp_path / "whole")["trees"].keys()


def test_a_dataset_is_known_by_its_rows_in_order_not_by_how_it_came_about():
    rows = dataset_identity(ROWS)
    assert dataset_identity(Dataset.from_list(list(ROWS))) == rows
    assert dataset_identity(ROWS.select(range(5, 10)).select([])) != rows
    assert dataset_identity(ROWS.select(reversed(range(10)))) != rows
    assert dataset_identity(ROWS.select(list(range(10)))) == rows
    assert dataset_identity(ROWS.to_iterable_dataset()) is None


def test_the_lists_of_settings_name_settings():
    """A name that TRL has dropped would say nothing."""
    names = {field.name for field in fields(ARPOConfig)}
    assert names >= identity._FREE_SETTINGS | identity._DECIDING_TRAINING_ARGUMENTS | checkpoints._BATCH_SETTINGS


def test_the_limits_of_a_machine_may_change():
    limits = {"tool_concurrency": 2, "tool_concurrency_per_tool": {"search": 1}, "environment_concurrency": 8}
    settings = {"output_dir": "run", "num_generations": 4, "per_device_train_batch_size": 4, **ON_CPU}
    assert deciding_settings(ARPOConfig(**settings, **limits)) == deciding_settings(ARPOConfig(**settings))


def test_changed_versions_are_logged(monkeypatch):
    monkeypatch.setattr(checkpoints, "version", lambda name: "2" if name == "trl" else "1")
    assert checkpoints.changed_versions(dict.fromkeys(checkpoints.VERSIONS, "1")) == ["trl 1 → 2"]
