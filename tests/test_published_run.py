"""One run of train.py on two processes, pushed and tracked, with planted secrets: the data at the Hub and the
trackers.

All tests use this one run, because its start takes most of the time.
"""

import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from wandb.proto.wandb_internal_pb2 import Record

from arpo_trl.logs.trajectories import read_trees
from hub_server import TOKEN, Hub
from support import child_environment, save_tiny_model

ROOT = Path(__file__).parents[1]
SECRETS = {
    **{f"{name}_API_KEY": f"planted-{name.lower()}-0123456789" for name in ("SERPER", "BRAVE", "JUDGE", "OPENAI")},
    "WANDB_API_KEY": "planted0wandb0123456789" + "0" * 17,  # 40 characters, as wandb wants them
    "VLLM_API_KEY": "planted-vllm-0123456789",
}
METRIC = "arpo/tree/branches"
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@dataclass
class Finished:
    folder: Path
    model: str
    hub: Hub
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    model = save_tiny_model(folder / "model")
    rows = [{"prompt": f"what is {i}", "answer": str(i), "task": "math"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "corpus.jsonl").write_text('"iron melts"\n')
    settings = {
        **{"model_name_or_path": model, "dataset": str(folder / "rows.jsonl"), "output_dir": str(folder / "out")},
        **{"tools": ["search"], "search_index": str(folder / "corpus.jsonl"), "use_cpu": True},
        **{"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 24, "max_steps": 2},
        **{"entropy_probe_tokens": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]},
        **{"push_to_hub": True, "hub_model_id": "me/policy", "hub_strategy": "checkpoint", "hub_always_push": True},
        **{"report_to": ["tensorboard", "wandb", "trackio"], "trackio_static_space_id": False, "project": "planting"},
        **{"hub_trajectories_id": "me/trees", "trajectory_log_rate": 1.0},
        **{"learning_rate": 0.01, "run_name": "the-run", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "judge"},
        "accuracy": "judge",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with Hub() as hub:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB", "RANK"))},
            **SECRETS,
            **{"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            **{"WANDB_MODE": "offline", "WANDB_DIR": str(folder / "wandb"), "HF_HOME": str(folder / "hf")},
            **{"TRACKIO_DIR": str(folder / "trackio"), "CI": "true"},
        }
        (folder / "wandb").mkdir()
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("train.py", "--config", str(folder / "run.yaml")),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=child_environment(command, environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=580,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        yield Finished(folder, model, hub, done.stdout + done.stderr)


def test_only_the_main_process_pushes(finished):
    models = [commit.message for commit in finished.hub.commits if commit.kind == "models"]
    assert models == ["Step 1", "Step 2", "End of training"]
    assert [commit.repo for commit in finished.hub.commits if commit.kind == "datasets"] == ["me/trees"]


def test_the_adapter_on_the_hub_is_the_one_that_was_trained(finished, tmp_path):
    held = finished.hub.repos["models", "me/policy"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(held[name])
        assert held[name] == (finished.folder / "out" / name).read_bytes()
        assert held[f"last-checkpoint/{name}"] == (finished.folder / "out/checkpoint-2" / name).read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(finished.model), str(tmp_path))


def test_the_card_has_the_settings_of_all_parts_of_the_run(finished):
    held = finished.hub.repos["models", "me/policy"]
    written = yaml.safe_load(held["training_config.yaml"])
    given = yaml.safe_load((finished.folder / "run.yaml").read_text())
    assert {name for name in given if written.get(name) == given[name]} >= {
        *("model_name_or_path", "dataset", "output_dir", "tools", "search_index", "num_generations", "learning_rate"),
        *("use_peft", "lora_r", "report_to", "judge_url", "hub_trajectories_id", "trajectory_log_rate"),
    }
    assert "hub_model_id" not in written  # another push may go elsewhere
    card = held["README.md"].decode()
    assert "| tools | search |" in card and "| LoRA rank | 4 |" in card
    assert "![Shape of the trees](curves/sharing.png)" in card


def test_the_trajectories_of_all_ranks_are_in_the_dataset(finished):
    logs = sorted((finished.folder / "out/trajectories").glob("*.jsonl"))
    assert {log.stem.rpartition("-")[2] for log in logs} == {"rank0", "rank1"}
    leaves = sum(len(tree.tree.leaves()) for log in logs for tree in read_trees(log))
    assert leaves == 2 * 2 * 4  # steps × ranks × leaves
    for tree in (tree for log in logs for tree in read_trees(log)):
        assert f"what is {tree.answers[0]}" in tree.prompt  # each tree has its own row's answer
    import pyarrow.parquet as pq

    (finished.folder / "train.parquet").write_bytes(finished.hub.repos["datasets", "me/trees"]["data/train.parquet"])
    table = pq.read_table(finished.folder / "train.parquet")
    assert (table.num_rows, sorted(set(table["rank"].to_pylist()))) == (leaves, [0, 1])


# Tracking ------------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_metrics(finished):
    (log,) = (finished.folder / "out/runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(log.parent))
    events.Reload()
    points = events.Scalars(f"train/{METRIC}")
    assert [point.step for point in points] == [1, 2]
    assert {"train/reward", "train/arpo/tree/leaves", "train/arpo/time/rollout_s"} <= set(events.Tags()["scalars"])
    assert any(name.startswith("runs/") for name in finished.hub.repos["models", "me/policy"])


def wandb_records(content: bytes) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, behind a header of 7 bytes."""
    assert content.startswith(b":W&B")
    position, data = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # the rest of a block that is too short for a record's head is filled up
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(data)
            data = b""


def test_an_offline_wandb_run_has_the_metrics(finished):
    (file,) = (finished.folder / "wandb").rglob("run-*.wandb")
    steps = []
    for record in wandb_records(file.read_bytes()):
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if f"train/{METRIC}" in items:
            steps.append(json.loads(items["train/global_step"]))
    assert steps == [1, 2]


def test_trackio_has_the_metrics(finished):
    (file,) = (finished.folder / "trackio").rglob("planting.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    logged = [json.loads(metrics) for _, metrics in rows]
    assert [row["train/global_step"] for row in logged if f"train/{METRIC}" in row] == [1, 2]
    assert {name for name, _ in rows} == {"the-run"}


def test_trackio_has_a_tree_of_each_rollout_as_traces(finished):
    (file,) = (finished.folder / "trackio").rglob("planting.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT metadata, messages FROM traces").fetchall()
    steps = sorted(json.loads(metadata)["step"] for metadata, _ in rows)
    assert steps == [0] * 4 + [1] * 4  # a tree has four leaves
    assert all(
        [message["role"] for message in json.loads(messages)][:2] == ["user", "assistant"] for _, messages in rows
    )


# Secrets -------------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_any_file_output_or_commit(finished):
    planted = [value.encode() for value in (*SECRETS.values(), TOKEN)]
    places = {str(path): path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    kept = {re.sub(r".*/", "", name) for name in places}
    assert {"training_args.bin", "trainer_state.json", "adapter_config.json", "training_config.yaml"} <= kept
    places["what was printed"] = finished.output.encode()
    for commit in finished.hub.commits:
        places |= {f"{commit.message}: {name}": content for name, content in commit.files.items()}
    assert len(places) > 60
    assert [(name, value) for name, content in places.items() for value in planted if value in content] == []
