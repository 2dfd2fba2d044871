"""Pushing, with the real client against a server that speaks the Hub's protocol."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from urllib.parse import quote

import huggingface_hub
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.common.imports import load_callable
from arpo_trl.errors import ConfigError, DataError, HubError, Interrupted
from arpo_trl.logs.curves import PANELS
from arpo_trl.publishing import push as hub_module
from arpo_trl.publishing.model_card import drop_paths
from arpo_trl.publishing.push import BackgroundPush, Snapshot, prepare_repo, push_run, push_snapshot, refuse_secrets
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.runs.checkpoints import SavedState
from hub_server import TOKEN, Hub
from loopback import Reply
from support import ON_CPU, command_output, python, save_tiny_model, script, search, tokenizer

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)], "task": "math"} for i in range(4)]
)
STOPS = ("</search>", "</python>")


def one_search(request, context):
    """Each path searches once; what follows is uncertain."""
    if request.key[-1] == 0:
        return ScriptedTurn(text=f"<search>iron {request.key[1]}</search>", entropies=[0.1])
    return ScriptedTurn(text=f"<answer>\\boxed{{{len(request.key)}}}</answer>", entropies=[1.0])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def trainer(model_path: str, folder: Path, *, peft_config=None, **settings) -> ARPOTrainer:
    return ARPOTrainer(
        model=model_path,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=ARPOConfig(
            **{
                "output_dir": str(folder),
                "num_generations": 4,
                "per_device_train_batch_size": 4,
                "max_completion_length": 120,
                "max_steps": 2,
                "save_strategy": "steps",
                "save_steps": 1,
                **ON_CPU,
                "entropy_probe_tokens": 4,
                "trajectory_log_rate": 1.0,
                "push_to_hub": True,
                "hub_model_id": "me/policy",
                **settings,
            }
        ),
        train_dataset=ROWS,
        tools=[search, python],
        engine=ScriptedEngine(
            tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,), stop_strings=STOPS), one_search
        ),
        peft_config=peft_config,
    )


def whole_run(folder: Path, model_path: str) -> Path:
    """What a run without a push leaves, saved by hand."""
    AutoModelForCausalLM.from_pretrained(model_path).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# At the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_ends_with_one_commit_of_model_card_and_curves(hub, model_path, tmp_path):
    made = trainer(model_path, tmp_path / "run", hub_strategy="end")
    made.train()
    assert hub.commits == []
    assert made.push_to_hub().commit_url == f"{hub.url}/me/policy/commit/{1:040x}"
    (commit,) = hub.commits
    assert (commit.kind, commit.repo, commit.message) == ("models", "me/policy", "End of training")
    assert set(commit.files) == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "trainer_state.json", "training_config.yaml", "README.md"),
        *(f"curves/{panel.name}.png" for panel in PANELS),
    }
    assert hub.parts  # the weights were long enough to go up in parts
    card = commit.files["README.md"].decode()
    assert set(re.findall(r"\]\((curves/\w+\.png)\)", card)) == {name for name in commit.files if "curves" in name}
    assert commit.files["curves/reward.png"].startswith(b"\x89PNG")
    received = written(tmp_path / "received", commit.files)
    loaded = AutoModelForCausalLM.from_pretrained(received)
    for name, value in made.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert AutoTokenizer.from_pretrained(received).chat_template == tokenizer().chat_template
    assert not list((tmp_path / "run").glob(".push-*"))


@pytest.mark.slow
def test_an_adapter_is_pushed_as_an_adapter_and_loads_from_the_hub(hub, model_path, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
    made = trainer(model_path, tmp_path / "run", hub_strategy="end", learning_rate=0.1, peft_config=adapter)
    made.train()
    made.push_to_hub()
    (commit,) = hub.commits
    assert "model.safetensors" not in commit.files
    card = commit.files["README.md"].decode()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card
    received = tmp_path / "received"
    received.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (received / name).write_bytes(commit.files[name])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), str(received))
    trained = {name: value for name, value in made.model.named_parameters() if "lora_" in name}
    assert any(value.abs().sum() > 0 for name, value in trained.items() if "lora_B" in name)
    assert len(trained) == 4
    for name, value in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, trained[name])


@pytest.mark.slow
def test_trajectories_go_up_as_a_dataset_that_loads(hub, model_path, tmp_path):
    hub.repos["datasets", "me/trees"] = {"data/evaluation.parquet": b"earlier", "data/mine.parquet": b"other"}
    made = trainer(model_path, tmp_path / "run", hub_strategy="end", hub_trajectories_id="trees")
    made.train()
    made.push_to_hub()
    (_, commit) = hub.commits
    assert set(hub.repos["datasets", "me/trees"]) == {"README.md", "data/train.parquet", "data/mine.parquet"}
    assert (commit.kind, commit.repo) == ("datasets", "me/trees")
    assert set(commit.files) == {"README.md", "data/train.parquet"}
    received = written(tmp_path / "received", commit.files)
    rows = load_dataset(str(received), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 8  # 2 steps × 1 prompt × 4 leaves
    assert [row["step"] for row in rows] == [0] * 4 + [1] * 4
    row = rows[0]
    assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant"]
    assert row["completion"][1] == {"role": "tool", "content": "facts about iron 0", "name": "search"}
    (call,) = row["tool_calls"]
    assert (call["name"], json.loads(call["arguments"]), call["ok"]) == ("search", {"query": "iron 0"}, True)
    assert (row["stop_reason"], row["rollout"], row["shared_with"]) == ("eos", "step-000000", 2)
    assert "what is" in row["prompt"]
    # rewards 0, 1, 0, 1: mean 0.5, std 0.5774
    assert [round(row["advantage"], 2) for row in rows][:4] == [-0.87, 0.87, -0.87, 0.87]


@pytest.mark.slow
def test_a_run_creates_its_branch_at_the_start_and_pushes_to_it(hub, model_path, tmp_path, capsys, monkeypatch):
    made = trainer(model_path, tmp_path / "run", hub_revision="second-try", hub_strategy="every_save", max_steps=1)
    assert hub.revisions == {("me/policy", "second-try"): {}}
    trainer(model_path, tmp_path / "other", hub_revision="second-try", hub_strategy="end")  # it exists now
    made.train()
    made.push_to_hub()
    made.push_to_hub(revision="third-try")
    branches = {name: set(files) for (_, name), files in hub.revisions.items()}
    assert "model.safetensors" in branches["second-try"] and branches["second-try"] == branches["third-try"]
    assert hub.repos["models", "me/policy"] == {}
    hub.fault = lambda asked: Reply({"error": "Internal Error"}, 500) if "/preupload/" in asked.path else None
    with pytest.raises(HubError) as failure:
        made.push_to_hub()
    command = str(failure.value).rpartition("push it later with: arpo-trl ")[2].split()
    assert command[-2:] == ["--revision", "second-try"]
    hub.fault = lambda asked: None
    hub.revisions.clear()
    assert command_output(monkeypatch, capsys, *command)[0] == 0
    assert "model.safetensors" in hub.revisions["me/policy", "second-try"]
    assert hub.repos["models", "me/policy"] == {}


# While training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("every_save", []),
        ("checkpoint", ["last-checkpoint/"]),
        ("all_checkpoints", ["checkpoint-1/", "checkpoint-2/"]),
    ],
)
def test_saves_go_up_as_hub_strategy_says(hub, model_path, tmp_path, strategy, places):
    made = trainer(model_path, tmp_path / "run", hub_strategy=strategy, hub_always_push=True, save_total_limit=1)
    made.train()
    assert [commit.message for commit in hub.commits] == ["Step 1", "Step 2"]
    first, second = (set(commit.files) for commit in hub.commits)
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= first
    assert {"model.safetensors", "README.md"} <= second
    held = hub.repos["models", "me/policy"]
    optimizers = [name for name in held if name.endswith("/optimizer.pt")]
    assert optimizers == [f"{place}optimizer.pt" for place in places]
    assert not any("training_args.bin" in name or name.startswith("trajectories") for name in held)
    made.push_to_hub()
    assert hub.commits[-1].message == "End of training"
    assert "model.safetensors" not in hub.commits[-1].files  # step 2 has sent it: unchanged files stay away
    saved = (tmp_path / "run/model.safetensors").read_bytes()
    assert held["model.safetensors"] == saved
    for place in places[-1:]:
        received = written(tmp_path / "received", {name: held[name] for name in held if name.startswith(place)})
        resumed = trainer(model_path, tmp_path / "new", push_to_hub=False, hub_model_id=None, max_steps=3)
        resumed.train(resume_from_checkpoint=str(received / place))
        assert [row["step"] for row in resumed.state.log_history if "reward" in row] == [1, 2, 3]


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_snapshot_has_the_state_of_training_only_in_a_checkpoint(tmp_path):
    model = {"model.safetensors", "pytorch_model.bin", "config.json", "modeling_mine.py", "trainer_state.json"}
    state = {
        *("optimizer.bin", "optimizer_1.bin", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin"),  # of FSDP
        *("zero_to_fp32.py", "zero_to_torch.py", "arpo_state.json"),  # the first two of DeepSpeed
    }
    checkpoint = tmp_path / "checkpoint-1"
    written(checkpoint, dict.fromkeys({*model, *state, "training_args.bin"}, b"x"))
    with Snapshot(run=tmp_path, model=checkpoint, checkpoint=(checkpoint, "last-checkpoint")) as folder:
        assert {path.name for path in folder.iterdir()} == {*model, "last-checkpoint"}
        assert {path.name for path in (folder / "last-checkpoint").iterdir()} == {*model, *state}


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "evaluation.md"], ["model.safetensors"]),
        (["model.safetensors"], ["adapter_config.json", "adapter_model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["model.safetensors"]),
        (["pytorch_model.bin", "adapter_model.bin"], ["model-00001-of-00001.safetensors"]),
        (
            ["last-checkpoint/global_step10/rank_0.pt"],
            ["model.safetensors", "last-checkpoint/global_step20/rank_0.pt"],
        ),
    ],
)
def test_a_push_replaces_the_earlier_model_and_nothing_else(hub, tmp_path, earlier, now):
    others = ["notes.md", "checkpoint-1/model.safetensors", "checkpoint-1/adapter_config.json", "model/model.bin"]
    if "last-checkpoint" not in now[-1] + earlier[0]:
        others.append("last-checkpoint/model.safetensors")
    same = ["config.json", now[0]]
    hub.repos["models", "me/policy"] = dict.fromkeys([*earlier, *others, *same], b"x")
    last = tmp_path / "checkpoint-2"
    written(tmp_path, dict.fromkeys(["config.json", *(name for name in now if "/" not in name)], b"x"))
    written(last, {name.partition("/")[2]: b"x" for name in now if "/" in name})
    checkpoint = (last, "last-checkpoint") if last.exists() else None
    push_snapshot("me/policy", Snapshot(run=tmp_path, model=tmp_path, checkpoint=checkpoint), message="m")
    assert set(hub.repos["models", "me/policy"]) == {"config.json", *now, *others}


def test_a_card_of_peft_goes_up_without_paths_of_this_machine(hub, model_path, tmp_path):
    run = whole_run(tmp_path / "run", model_path)
    paths = f"base_model: {model_path}\ndatasets:\n- rows.jsonl\n- me/rows\n"
    tags = f"tags:\n- lora\n- 2024\n- base_model:adapter:{model_path}\n- base_model:adapter:me/base\n"
    (run / "README.md").write_text(f"---\n{paths}{tags}---\n# Mine\n")
    push_run(run, "me/policy", None)
    card = ModelCard(hub.repos["models", "me/policy"]["README.md"].decode())
    assert card.data.to_dict() == {
        "datasets": ["me/rows"],
        "tags": ["lora", 2024, "base_model:adapter:me/base"],
    }
    assert card.text.strip() == "# Mine"


def test_names_on_the_hub_stay_on_a_card_with_and_without_a_namespace(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nbase_model: gpt2\ndatasets: [gsm8k, me/rows, ./rows, a/b/c]\n---\n")
    drop_paths(card)
    assert ModelCard.load(card).data.to_dict() == {"base_model": "gpt2", "datasets": ["gsm8k", "me/rows"]}


def test_a_card_whose_metadata_cannot_be_read_stays_as_it_is(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [\n---\n# Mine\n")
    with Snapshot(run=tmp_path, model=tmp_path) as folder:
        assert (folder / "README.md").read_bytes() == (tmp_path / "README.md").read_bytes()


@pytest.mark.slow
def test_no_second_push_starts_during_a_push(hub, model_path, tmp_path):
    arrived, last = threading.Event(), tmp_path / "run/model.safetensors"

    def slow(asked):
        if "/preupload/" in asked.path:
            arrived.set()
            while not last.exists():
                time.sleep(0.01)
        return None

    hub.fault = slow
    made = trainer(model_path, tmp_path / "run", hub_strategy="every_save", max_steps=3)
    steps = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **_):
            assert arrived.wait(60)
            steps.append(state.global_step)

    made.add_callback(Watch())
    made.train()
    assert steps == [1, 2, 3]  # training did not wait
    assert [commit.message for commit in hub.commits] == ["Step 1"]  # but its end did, once the model was on disk
    # what went up is the state of step 1, not what was in the folder when it was sent
    assert hub.commits[0].files["model.safetensors"] == (tmp_path / "run/checkpoint-1/model.safetensors").read_bytes()


def test_a_snapshot_is_unaffected_by_rotation_and_rewriting(tmp_path, model_path):
    run_folder = tmp_path / "run"
    checkpoint = whole_run(run_folder / "checkpoint-1", model_path)
    (run_folder / "README.md").write_text("first")
    weights = (checkpoint / "model.safetensors").read_bytes()
    with Snapshot(run=run_folder, model=checkpoint, checkpoint=(checkpoint, "last-checkpoint")) as folder:
        shutil.rmtree(checkpoint)
        (run_folder / "README.md").write_text("second")
        assert (folder / "model.safetensors").read_bytes() == weights
        assert (folder / "last-checkpoint/model.safetensors").read_bytes() == weights
        assert (folder / "README.md").read_text() == "first"
    assert [path.name for path in run_folder.iterdir()] == ["README.md"]


def test_a_snapshot_that_cannot_be_taken_does_not_stop_training(hub, model_path, tmp_path, caplog, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    made = trainer(model_path, tmp_path / "run", hub_strategy="every_save")
    monkeypatch.setattr(hub_module, "_take", full)
    made.train()
    assert made.state.global_step == 2
    assert caplog.text.count("No space left on device. Training continues.") == 2
    assert not list((tmp_path / "run").glob(".push-*"))


def test_files_of_a_killed_process_are_removed_at_the_next_start_and_not_those_of_another_push(
    hub, model_path, tmp_path
):
    run = whole_run(tmp_path / "run", model_path)
    (run / ".push-left").mkdir()
    with Snapshot(run=run, model=run) as living:
        trainer(model_path, run)
        assert list(run.glob(".push-*")) == [living]
        assert (living / "model.safetensors").exists()
    assert not living.exists()


def test_a_snapshot_that_cannot_be_taken_leaves_that_of_another_push(tmp_path, model_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    run = whole_run(tmp_path / "run", model_path)
    with Snapshot(run=run, model=run) as living:
        monkeypatch.setattr(hub_module, "_take", full)
        with pytest.raises(HubError, match="could not be written"):
            Snapshot(run=run, model=run)
        assert list(run.glob(".push-*")) == [living]
        assert (living / "model.safetensors").exists()


@pytest.mark.slow
def test_a_failed_push_while_training_is_a_warning_and_the_end_makes_up_for_it(hub, model_path, tmp_path, caplog):
    hub.fault = lambda asked: Reply("<h1>Bad gateway</h1>", 502) if "/commit/" in asked.path else None
    made = trainer(model_path, tmp_path / "run", hub_strategy="every_save", hub_always_push=True)
    with caplog.at_level(logging.WARNING, logger="arpo_trl.publishing.push"):
        made.train()
    assert made.state.global_step == 2
    assert caplog.text.count("Pushing to me/policy failed: the Hub answered 502") == 2
    assert "Training continues, and the next save retries the push." in caplog.text
    hub.fault = lambda asked: None
    made.push_to_hub()
    assert [commit.message for commit in hub.commits] == ["End of training"]


def test_a_failed_push_in_the_background_names_the_command_that_works_later(
    hub, model_path, tmp_path, caplog, monkeypatch
):
    waiting = []
    monkeypatch.setattr(BackgroundPush, "wait_at_exit", lambda push: waiting.append(push))
    made = trainer(model_path, tmp_path / "run", hub_strategy="end")
    hub.fault = lambda asked: Reply({"error": "Internal Error"}, 500) if "/commit/" in asked.path else None
    assert made.push_to_hub(blocking=False) is None
    made._push.wait()
    assert waiting == [made._push]
    (message,) = [record.getMessage() for record in caplog.records if "Pushing to" in record.getMessage()]
    assert message.endswith(f"push it later with: arpo-trl push {tmp_path / 'run'} --repo me/policy")


def test_a_signal_ends_a_push_at_once_and_its_line_names_the_command_that_works_later(hub, model_path, tmp_path):
    made, ended = trainer(model_path, tmp_path / "run", hub_strategy="end", hub_revision="v1"), threading.Event()

    def silent(asked):
        if "/commit/" in asked.path:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(60)

    hub.fault = silent
    try:
        with made.interrupts.listening(), pytest.raises(Interrupted) as stopped:
            made.push_to_hub()
    finally:
        ended.set()
        made._push.wait()
    assert stopped.value.exit_status == 143
    assert str(stopped.value).endswith(
        f"The run is complete in {tmp_path / 'run'}; push it later with: arpo-trl push {tmp_path / 'run'} "
        "--repo me/policy --revision v1"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == "qwen3"
    assert not list((tmp_path / "run").glob(".push-*"))


@pytest.mark.slow
def test_the_end_of_a_program_waits_for_a_push_in_the_background(hub, model_path, tmp_path):
    hub.repos["models", "me/policy"] = {}
    folder = whole_run(tmp_path / "run", model_path)
    shutil.copyfile(folder / "tokenizer.json", folder / "more.bin")  # two files go up in a pool of threads
    program = """
import sys
from pathlib import Path
from arpo_trl.publishing.push import BackgroundPush, Snapshot, push_snapshot
push, run = BackgroundPush(), Path(sys.argv[1])
push.start(lambda: push_snapshot("me/policy", Snapshot(run=run, model=run), message="late"))
push.wait_at_exit()
"""
    client = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        **{"env": os.environ | client, "capture_output": True, "text": True, "timeout": 120},
    )
    assert ended.returncode == 0 and [commit.message for commit in hub.commits] == ["late"], ended.stderr
    assert not list(folder.glob(".push-*"))


def test_a_tracker_that_fails_before_a_push_does_not_stop_it(hub, model_path, tmp_path, caplog):
    class Breaks(TrainerCallback):
        def on_push_begin(self, args, state, control, **_):
            raise OSError("no space for a dashboard")

    made = trainer(model_path, tmp_path / "run", hub_strategy="end", max_steps=1)
    made.add_callback(Breaks())
    made.train()
    made.push_to_hub()
    assert len(hub.commits) == 1
    assert "A tracker failed before a push: OSError: no space for a dashboard" in caplog.text


# Trouble -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "/api/repos/create",
        "/auth-check/write",
        "/api/validate-yaml",
        "/tree/",
        "/preupload/",
        "/objects/batch",
        "/lfs/",
        "/commit/",
    ],
)
@pytest.mark.parametrize("answer", [Reply("<h1>Service Unavailable</h1>", 503), Reply("<h1>Oops</h1>", 500)])
def test_a_request_to_the_hub_is_retried_after_any_single_failure(hub, model_path, tmp_path, place, answer):
    failed = []

    def once(asked):
        if place in asked.path and not failed:
            failed.append(asked.path)
            return answer
        return None

    hub.fault = once
    folder = whole_run(tmp_path / "run", model_path)
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    repo_id = prepare_repo("policy", setting="hub_model_id")
    push_snapshot(repo_id, Snapshot(run=folder, model=folder), message="m")
    assert failed
    assert len(hub.commits) == 1
    assert hub.repos["models", "me/policy"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_failed_last_push_loses_nothing_and_names_the_command_that_works_later(
    hub, model_path, tmp_path, capsys, monkeypatch
):
    made = trainer(model_path, tmp_path / "run", hub_strategy="end")
    made.train()
    hub.fault = lambda asked: Reply({"error": "Internal Error"}, 500)
    with pytest.raises(HubError) as failure:
        made.push_to_hub()
    message = str(failure.value)
    assert "Pushing to me/policy failed: the Hub answered 500." in message
    command = message.rpartition("push it later with: ")[2].split()
    assert command == ["arpo-trl", "push", str(tmp_path / "run"), "--repo", "me/policy"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in made.model.state_dict().items())
    assert not list((tmp_path / "run").glob(".push-*"))
    hub.fault = lambda asked: None
    capsys.readouterr()
    status, out, _ = command_output(monkeypatch, capsys, *command[1:])
    assert (status, out) == (0, f"Pushed: {hub.url}/me/policy/commit/{1:040x}\n")
    assert {"model.safetensors", "README.md", "curves/reward.png"} <= set(hub.commits[0].files)


def test_train_py_that_cannot_push_ends_with_one_line_and_a_status_and_the_model_on_disk(
    hub, model_path, tmp_path, capsys, monkeypatch
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what is 1", "answer": "1", "task": "math"}\n')
    (tmp_path / "corpus.jsonl").write_text('"iron melts"\n')
    words = [
        *("train.py", "--model_name_or_path", model_path, "--dataset", str(tmp_path / "rows.jsonl")),
        *(
            "--output_dir",
            str(tmp_path / "run"),
            "--tools",
            "search",
            "--search_index",
            str(tmp_path / "corpus.jsonl"),
        ),
        *("--num_generations", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "8"),
        *("--max_steps", "1", "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true"),
        *("--push_to_hub", "true", "--hub_model_id", "me/policy"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    hub.fault = lambda asked: Reply({"error": "Internal Error"}, 500) if "/commit/" in asked.path else None
    with pytest.raises(SystemExit) as end:
        script("train").main()
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.splitlines()[-1] == (
        f"HubError: Pushing to me/policy failed: the Hub answered 500. The run is complete in {tmp_path / 'run'}; "
        f"push it later with: arpo-trl push {tmp_path / 'run'} --repo me/policy"
    )
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "README.md", "training_config.yaml"} <= saved
    monkeypatch.setattr(sys, "argv", [*words[:-1], "them/policy", "--overwrite_output_dir", "true"])
    others(hub)
    with pytest.raises(SystemExit) as end:
        script("train").main()
    assert end.value.code == 2
    assert "ConfigError: hub_model_id requires the model repository 'them/policy'" in capsys.readouterr().err


def test_an_unreachable_hub_at_the_end_is_reported(hub, model_path, tmp_path):
    folder = whole_run(tmp_path / "run", model_path)
    hub.server.server.shutdown()
    hub.server.server.server_close()
    with pytest.raises(HubError, match=r"the Hub could not be reached \(ConnectError\)\. The run is complete in"):
        push_snapshot("me/policy", Snapshot(run=folder, model=folder), message="m")


@pytest.mark.slow
def test_a_request_to_a_silent_hub_times_out(hub, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "ANSWER_TIMEOUT_S", 0.2)
    hub_module._limit_silence.cache_clear()
    released = threading.Event()
    hub.fault = lambda asked: released.wait(60) and None
    folder = whole_run(tmp_path / "run", model_path)
    try:
        with pytest.raises(HubError, match=r"the Hub could not be reached \(ReadTimeout\)"):
            push_snapshot("me/policy", Snapshot(run=folder, model=folder), message="m")
    finally:
        released.set()
        hub_module._limit_silence.cache_clear()


# Before the start ----------------------------------------------------------------------------------------------------


def others(hub: Hub) -> None:
    hub.repos["models", "them/policy"] = {}
    hub.repos["datasets", "them/trees"] = {}


@pytest.mark.parametrize(
    ("settings", "token", "message"),
    [
        (
            {"hub_model_id": "them/policy"},
            TOKEN,
            "hub_model_id .*'them/policy', but the Hub answered 403: the token has no",
        ),
        ({"hub_model_id": "them/new"}, TOKEN, "hub_model_id .*'them/new', but the Hub answered 40[34]"),
        ({"hub_trajectories_id": "them/trees"}, TOKEN, "hub_trajectories_id requires the dataset repository 'them/tr"),
        ({}, "hf_anotherTokenAltogether", "but the Hub answered 401: the token is missing or not valid"),
        ({}, "", "but the Hub answered 401: the token is missing"),
        (
            {"hub_revision": "refs/pr/1"},
            TOKEN,
            "hub_revision requires the branch 'refs/pr/1' of me/policy, which cannot be created: the Hub answered 400",
        ),
        (
            {"hub_model_id": "a/b/c"},
            TOKEN,
            "hub_model_id requires the model repository 'a/b/c', which is no valid id .*Set hub_model_id to letters",
        ),
    ],
)
def test_a_repository_that_cannot_be_written_to_is_known_before_the_model_is_loaded(
    hub, tmp_path, monkeypatch, settings, token, message
):
    others(hub)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=message) as refused:
        trainer("no such model", tmp_path / "run", **settings)
    ways = (
        "Set HF_TOKEN to a token with write access to it",
        "Set hub_model_id to letters",
        "omit it to push to main",
    )
    assert any(way in str(refused.value) for way in ways)
    assert not token or token not in str(refused.value)
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_known_at_the_start(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"could not be reached \(ConnectError\).*run `arpo-trl push` afterwards"):
        trainer("no such model", tmp_path / "run")


def test_being_offline_is_known_at_the_start(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="OfflineModeIsEnabled"):
        trainer("no such model", tmp_path / "run")


def test_a_run_without_a_push_asks_the_hub_nothing(hub, model_path, tmp_path):
    made = trainer(model_path, tmp_path / "run", push_to_hub=False, hub_model_id=None)
    made.train()
    assert hub.server.asked == []


def test_a_repository_named_after_the_folder_is_private_if_requested(hub, model_path, tmp_path):
    made = trainer(model_path, tmp_path / "my-run", hub_model_id=None, hub_private_repo=True)
    assert made.hub_model_id == "me/my-run"
    assert hub.private == {"me/my-run"}


def test_a_run_writes_its_local_paths_as_paths(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_path, "models/tiny")
    made = trainer("models/tiny", Path("run"), push_to_hub=False, hub_model_id=None)
    made.create_model_card(dataset_name=["models/tiny", "me/rows"])
    settings = yaml.safe_load(Path("run/training_config.yaml").read_text())
    assert settings["model_name_or_path"] == "./models/tiny"
    assert settings["dataset"] == ["./models/tiny", "me/rows"]


def test_a_model_that_a_script_saves_has_the_runs_card(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saved_tools.py").write_text("def lookup(name: str) -> str: ...\n")
    adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
    settings = {"push_to_hub": False, "hub_model_id": None, "save_strategy": "no"}
    made = trainer(model_path, Path("run"), **settings, peft_config=adapter)
    made.save_model()
    card = ModelCard.load("run/README.md")  # peft's names the folder of the base model, and has no content
    assert card.data.base_model is None and "trained with Agentic Reinforced Policy Optimization" in card.text
    assert "As in training; also pass its tools, as `--tools my_module:my_function`:" in card.text
    made.tools = [load_callable("saved_tools:lookup", "tools")]
    made.save_model()
    card = ModelCard.load("run/README.md")
    assert "With its tools, as in training:" in card.text and "--tools saved_tools:lookup" in card.text


# Secrets -------------------------------------------------------------------------------------------------------------


def test_a_file_that_holds_a_secret_of_the_environment_stops_the_push(hub, model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "serper-0123456789")
    folder = whole_run(tmp_path / "run", model_path)
    (folder / "notes.md").write_text("asked with serper-0123456789")
    with pytest.raises(HubError, match=r"notes\.md .* SERPER_API_KEY, .*no secret, unset the variable") as refused:
        push_snapshot("me/policy", Snapshot(run=folder, model=folder), message="m")
    assert "0123456789" not in str(refused.value)
    assert hub.server.asked == []


def test_a_secret_is_found_as_json_and_urls_write_it(tmp_path, monkeypatch):
    secret = 'p"ss\\w/ord+0123'
    monkeypatch.setenv("SHOP_PASSWORD", secret)
    for text in (secret, json.dumps({"key": secret}), f"https://host/?p={quote(secret, safe='')}"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(HubError, match=r"a\.json contains the secret in SHOP_PASSWORD"):
            refuse_secrets([tmp_path / "a.json"])
    monkeypatch.setenv("SHOP_PASSWORD", "caf\udce9-geheim")  # a byte that is not UTF-8
    (tmp_path / "a.json").write_bytes(b"caf\xe9-geheim")
    with pytest.raises(HubError, match=r"a\.json contains the secret in SHOP_PASSWORD"):
        refuse_secrets([tmp_path / "a.json"])


def test_trajectories_that_hold_a_secret_stay_here(hub, tmp_path, monkeypatch, model_path):
    made = trainer(model_path, tmp_path / "run", hub_strategy="end", hub_trajectories_id="trees", max_steps=1)
    made.train()
    monkeypatch.setenv("SOME_TOKEN", "facts about iron")
    with pytest.raises(HubError, match=r"step-000000-rank0\.jsonl contains the secret in SOME_TOKEN"):
        made.push_to_hub()
    assert [commit.kind for commit in hub.commits] == ["models"]


def test_a_token_of_a_login_is_a_secret_as_well(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "token").write_text("hf_storedByALogin")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "a.md").write_text("with hf_storedByALogin in it")
    with pytest.raises(HubError, match=r"a\.md contains the secret in HF_TOKEN or `hf auth login`"):
        refuse_secrets([tmp_path / "a.md"])


def test_what_the_client_says_is_passed_on_without_secrets(hub, model_path, tmp_path, monkeypatch):
    def fails(self, **_):
        raise ValueError(f"could not send {TOKEN}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fails)
    folder = whole_run(tmp_path / "run", model_path)
    with pytest.raises(HubError, match=r"ValueError: could not send \[key\]\. The run is complete") as refused:
        push_snapshot("me/policy", Snapshot(run=folder, model=folder), message="m")
    assert TOKEN not in "".join(traceback.format_exception(refused.value))


def test_short_values_and_other_variables_are_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "text")
    monkeypatch.setenv("MY_NAME", "some longer text")
    (tmp_path / "a.md").write_text("some longer text")
    refuse_secrets([tmp_path / "a.md"])


@pytest.mark.parametrize("value", ["question", "Europe/Paris", "12345678", sys.executable])
def test_a_value_that_ordinary_text_may_contain_stops_a_push_only_as_the_token(tmp_path, monkeypatch, value):
    (tmp_path / "a.md").write_text(f"about {value}")
    monkeypatch.setenv("PROMPT_KEY", value)
    refuse_secrets([tmp_path / "a.md"])
    monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises(HubError, match=r"a\.md contains the secret in HF_TOKEN"):
        refuse_secrets([tmp_path / "a.md"])


# The commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{folder}/run",), "ConfigError: No repository is given. Pass --repo, --trajectories or both."),
        (("{folder}/none", "--repo", "me/a"), "DataError: {folder}/none contains no model and no adapter;"),
        (("{folder}/run", "--trajectories", "me/a"), "DataError: {folder}/run/trajectories contains no logged trees."),
        (("{folder}/run", "--repo", "them/policy"), "ConfigError: --repo requires the model repository 'them/policy'"),
        (
            ("{folder}/run", "--repo", "me/a", "--evaluation", "{folder}"),
            "results.json is not a result of `arpo-trl eval`",
        ),
    ],
)
def test_a_push_that_cannot_work_is_one_line(hub, model_path, tmp_path, capsys, monkeypatch, arguments, message):
    others(hub)
    whole_run(tmp_path / "run", model_path)
    capsys.readouterr()
    status, out, err = command_output(
        monkeypatch, capsys, "push", *(argument.format(folder=tmp_path) for argument in arguments)
    )
    assert (status, out) == (2, "")
    assert message.format(folder=tmp_path) in err and err.count("\n") == 1
    assert hub.commits == []


def test_a_folder_without_weights_is_not_pushed(hub, model_path, tmp_path):
    run = written(whole_run(tmp_path / "run", model_path), {"training_args.bin": b"x", "optimizer.bin": b"x"})
    (run / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"run contains no model and no adapter; expected .* weights \(\.safetensors"):
        push_run(run, "me/policy", None)
    with pytest.raises(HubError, match=r"run contains no weights, so nothing was pushed"):
        push_snapshot("me/policy", Snapshot(run=run, model=run), message="m")
    assert hub.commits == [] and not list(run.glob(".push-*"))


@pytest.mark.parametrize("flag", ["evaluation", "revision"])
def test_what_belongs_to_a_model_repository_is_refused_without_one(tmp_path, flag):
    with pytest.raises(ConfigError, match=f"--{flag} is given without --repo.* Pass --repo, or omit --{flag}"):
        push_run(tmp_path, None, "me/trees", **{flag: "x"})


@pytest.mark.slow
def test_an_evaluation_is_added_to_the_card_of_a_finished_run(hub, model_path, tmp_path, capsys, monkeypatch):
    made = trainer(model_path, tmp_path / "run", push_to_hub=False, hub_model_id=None)
    made.train()
    made.save_model()
    made.save_state()
    evaluation = tmp_path / "eval"
    evaluation.mkdir()
    summary = {
        **{"title": "GSM8K", "metric": "math", "score": 0.5, "interval": [0.4, 0.6], "questions": 10, "samples": 10},
        **{"failed": 0, "missing": 0, "unjudged": 0, "tools": {}},
    }
    (evaluation / "results.json").write_text(json.dumps({"benchmarks": {"gsm8k": summary}}))
    status, _, _ = command_output(
        monkeypatch,
        capsys,
        *("push", str(tmp_path / "run"), "--repo", "me/late", "--evaluation", str(evaluation), "--private"),
    )
    assert status == 0
    (commit,) = hub.commits
    card = commit.files["README.md"].decode()
    assert "## Evaluation" in card and "| GSM8K | math equality | 0.500 | 0.400 – 0.600 | 10 |" in card
    assert 'from_pretrained("me/late")' in card
    assert "me/late" in hub.private


@pytest.mark.slow
def test_a_pushed_checkpoint_has_a_card_and_can_still_be_resumed(hub, model_path, tmp_path, capsys, monkeypatch):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
    made = trainer(model_path, tmp_path / "run", push_to_hub=False, hub_model_id=None, peft_config=adapter)
    made.train()
    checkpoint = tmp_path / "run/checkpoint-1"
    assert (checkpoint / "README.md").is_file()  # peft's
    assert command_output(monkeypatch, capsys, "push", str(checkpoint), "--repo", "me/early")[0] == 0
    (commit,) = hub.commits
    card = commit.files["README.md"].decode()
    assert 'from_pretrained("me/early")' in card and "--max-completion-length 120" in card
    assert "training_config.yaml" in commit.files
    SavedState.of(checkpoint).check_files()
    assert not list(checkpoint.glob(".push-*"))


def test_background_pushes_do_not_outlive_their_wait():
    push, done = BackgroundPush(), []
    push.start(lambda: done.append(time.sleep(0.05)))
    push.start(lambda: done.append(time.sleep(0.05)))  # waits for the first
    push.wait()
    assert len(done) == 2 and not push.is_running
