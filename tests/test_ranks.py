"""Training on two ranks, with DDP, ZeRO-2, ZeRO-3 and FSDP2, equals training on one, and never deadlocks."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils import cpp_extension
from transformers import AutoModelForCausalLM, PreTrainedModel

import environment_ranks
import training_ranks
import uneven_ranks
from arpo_trl.quickstart.stages import prepare
from ranks import DEADLINE_S, EXACT, EXTENSIONS, Ended, launch, launched
from servers import running
from serving import free_port
from support import VLLM

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WAYS = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    training_ranks.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The runs on one rank, with TRL's padded batches: the folder, and what was seen."""
    folder = tmp_path_factory.mktemp("alone")
    said: dict[str, Any] = {}
    for run in training_ranks.RUNS:
        made = training_ranks.trainer(str(base), folder / run, run, 1, shared_prefix_forward="off")
        said[run] = training_ranks.train(made, folder / run)
        if run == "plain":
            said["evaluated"] = training_ranks.evaluate(made)
    return folder, said


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare(folder, seed=0)
    rows = (folder / "watched.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "watched.jsonl").write_text("".join(rows[:8]), "utf-8")
    return folder


def quickstart(data: Path, output: Path, *flags: str) -> list[str]:
    """The flags of train.py for the quickstart's second stage: two steps of two groups, on two ranks, in bf16."""
    return [
        *("--use_cpu", "true", "--model_name_or_path", str(data / "base")),
        *("--dataset", str(data / "train.jsonl"), "--eval_dataset", str(data / "watched.jsonl")),
        *("--search_index", str(data / "corpus.jsonl"), "--output_dir", str(output), "--max_steps", "2"),
        *("--per_device_train_batch_size", "8", "--eval_steps", "2", "--per_device_eval_batch_size", "4"),
        *("--max_completion_length", "64"),  # the model is untrained, and would write all that it may
        *("--bf16", "true", "--gradient_checkpointing", "true", "--trajectory_log_rate", "1", *flags),
    ]


@pytest.fixture(scope="module", params=WAYS)
def together(request, base, data, tmp_path_factory) -> tuple[str, Path, list[dict[str, Any]]]:
    """The runs on two ranks: how they share the model, the folder, and what each rank has seen."""
    way = request.param
    folder = tmp_path_factory.mktemp(way)
    (folder / "model").symlink_to(base)
    # For one of them, each rank has one evaluation group and the half of one.
    straddling = ("--per_device_eval_batch_size", "3", "--num_generations_eval", "2") if way == "ddp" else ()
    flags = quickstart(data, folder / "quickstart", *straddling)
    launch(way, "tests/training_ranks.py", way, str(folder), *flags, launcher=EXACT)
    return way, folder, [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def saved(folder: Path) -> dict[str, torch.Tensor]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return {name: weights.detach() for name, weights in model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm())


@pytest.mark.parametrize("run", training_ranks.RUNS)
def test_trees_rewards_and_advantages_are_those_of_one_rank(alone, together, run):
    _, _, ranks = together
    expected = alone[1][run]["groups"]
    found = sorted(
        (row for rank in ranks for row in rank[run]["groups"]), key=lambda row: (row["rollout"], row["group"])
    )
    assert [(row["rollout"], row["group"]) for row in found] == [(row["rollout"], row["group"]) for row in expected]
    pairs = list(zip(found, expected, strict=True))
    equal = [ours["ids"] == theirs["ids"] and ours["rewards"] == theirs["rewards"] for ours, theirs in pairs]
    # After an update the weights are equal up to rounding, which on some CPUs changes a token that is drawn. A step
    # with other weights than these changes every group.
    assert all(equal[: training_ranks.GROUPS])
    assert sum(equal[training_ranks.GROUPS :]) >= len(equal[training_ranks.GROUPS :]) / 2
    for is_equal, (ours, theirs) in zip(equal, pairs, strict=True):
        assert not is_equal or ours["advantages"] == pytest.approx(theirs["advantages"], abs=1e-5)
    assert sum(row["calls"] for row in expected) > 0
    assert any(len(set(row["rewards"])) > 1 for row in expected)


@pytest.mark.parametrize("run", ["plain", "reference", "later"])
def test_the_update_with_shared_prefixes_is_the_padded_one_of_one_rank(alone, together, base, run):
    """Also: what is saved is whole, and loads, with accelerate's defaults for saved weights (`SAVED_IN_PARTS`) too."""
    _, folder, _ = together
    before, expected, found = saved(base), saved(alone[0] / run / "first"), saved(folder / run / "first")
    assert distance(expected, before) > 1e-3
    assert distance(found, expected) / distance(expected, before) < 1e-3


def test_an_adapter_is_trained_and_saved_whole(alone, together):
    _, folder, _ = together
    name = "adapter/first/adapter_model.safetensors"
    expected, found = load_file(alone[0] / name), load_file(folder / name)
    trained = {name: weights for name, weights in expected.items() if "lora_B" in name}  # from 0
    assert (
        distance(found, expected) / distance(trained, {name: 0 * weights for name, weights in trained.items()}) < 1e-3
    )


def test_sampling_and_training_distributions_are_equal_in_the_default_precision(together, base):
    _, folder, ranks = together
    for rank in ranks:
        assert rank["default"]["mean"] < 0.02
        assert rank["default"]["largest"] < 0.3
    assert 1e-3 < distance(saved(folder / "default" / "final"), saved(base)) < 10


def test_an_adapter_is_merged_for_servers_without_adapters(together, base):
    _, folder, _ = together
    sent = served(folder / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter" / "final")
    for name, weights in adapted.merge_and_unload().named_parameters():
        torch.testing.assert_close(sent[name], weights.detach(), atol=1e-6, rtol=1e-5)


def test_an_evaluation_is_shared_out_also_where_it_leaves_a_rank_nothing(alone, together):
    for rank in together[2]:
        assert rank["evaluated"] == alone[1]["evaluated"]


def test_an_evaluation_before_the_training_changes_no_weight_or_is_refused(together):
    way, folder, ranks = together
    refusal = {
        "zero2": ["ConfigError: evaluate() was called before train(), which ZeRO-2 does not support."],
        "fsdp2": ["ConfigError: evaluate() was called before train(), which FSDP does not support."],
        "zero3": [None, "ConfigError: This trainer has already trained or evaluated, and its DeepSpeed engine"],
    }
    for rank in ranks:
        for found, expected in zip(rank["evaluated_first"], refusal.get(way, [None, None]), strict=True):
            assert found == expected or found.startswith(expected)
    if way == "ddp":  # also: both ranks have trained one model
        assert distance(saved(folder / "second" / "final"), saved(folder / "default" / "final")) == 0


def served(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "served" / "arpo-sent").glob("*.safetensors")
    return load_file(file)


def test_weights_for_servers_are_whole_and_a_failed_write_stops_every_rank(together):
    _, folder, ranks = together
    sent, trained = served(folder / "plain"), saved(folder / "plain" / "final")
    assert sent.keys() >= trained.keys()
    assert all(torch.equal(sent[name], weights) for name, weights in trained.items())
    for rank in ranks:
        assert rank["unwritable"].startswith("EngineError: The weights cannot be written to weight_sync_dir")


def test_forwards_that_all_ranks_must_take_together_are_refused(together):
    way, _, ranks = together
    for rank in ranks:
        if way == "zero3":
            assert "ds3_gather_for_generation is false on 2 ranks" in rank["ungathered"]
        else:
            assert rank["ungathered"] is None


def test_ranks_that_have_different_amounts_to_do_all_finish(together):
    """Each kind of step did what it is called, and the means of both ranks are logged."""
    first, second = (rank["uneven"] for rank in together[2])
    assert first["steps"] == second["steps"] == training_ranks.UNEVEN_STEPS
    assert [shape["calls"] for shape in first["shapes"]] == [0, uneven_ranks.MAX_CALLS, 1, 0]
    assert [shape["calls"] for shape in second["shapes"]] == [uneven_ranks.MAX_CALLS, 0, 1, 0]
    assert [shape["timeouts"] for shape in second["shapes"]] == [0, 0, uneven_ranks.LEAVES, 0]
    assert [first["shapes"][3]["tokens"], second["shapes"][3]["tokens"]] == [[8, 8], [uneven_ranks.MAX_TOKENS] * 2]
    for rank in (first, second):
        assert rank["last"]["arpo/tree/leaves"] == 2 * uneven_ranks.LEAVES
        assert rank["last"]["arpo/alarm/truncated"] == 0.5
        assert rank["last"]["completions/mean_length"] == (8 + uneven_ranks.MAX_TOKENS) / 2


def test_environments_branch_on_each_rank_and_all_are_closed(together):
    """Also where a path of one rank gets no environment, and its calls hang."""
    way, _, ranks = together
    if way not in training_ranks.WITH_ENVIRONMENTS:
        assert "environments" not in ranks[0]
        return
    first, second = (rank["environments"] for rank in ranks)
    for rank in (first, second):
        assert len(rank["losses"]) == environment_ranks.STEPS and all(map(math.isfinite, rank["losses"]))
        assert rank["live"] == 0 and rank["each closed once"]
    # Two groups of four leaves in each of two steps; a path without an environment has no reward of them
    assert (first["checked"]["equal"], second["checked"]["equal"]) == (16, 15)
    assert (first["checked"]["late"], second["checked"]["late"]) == (0, 2)
    logged = first["metrics"]
    assert logged == second["metrics"] and logged["failed"] == [1, 0]
    # Without failures, on each rank: 2 branches of the group that replays, and 2 of the copied one. These fork, or
    # replay where a copy has no room, or are refused where their prefix's path is in the call that hangs.
    assert logged["replays"][1] >= 4
    assert logged["replays"][1] + logged["forks"][1] + logged["refused_forks"][1] >= 8
    assert sum(logged["forks"]) > 0
    assert max(logged["live_max"]) <= 2 * environment_ranks.LEAVES


def train(way: str, data: Path, output: Path, *flags: str, deadline_s: float = DEADLINE_S) -> Ended:
    """As a user launches it, in the precision of TRL and of the launch."""
    settings = quickstart(data, output, *flags)
    return launch(way, "train.py", "--config", "configs/quickstart.yaml", *settings, deadline_s=deadline_s)


def check_the_quickstart(output: Path, data: Path) -> None:
    history = json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"]
    steps = [row for row in history if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["arpo/tree/leaves"] == 16 and "reward" in row for row in steps)
    assert any("eval_reward" in row for row in history)
    assert {file.name for file in (output / "trajectories").glob("step-*")} == {
        f"step-{step:06d}-rank{rank}.jsonl" for step in (0, 1) for rank in (0, 1)
    }
    found, base = saved(output), saved(data / "base")
    assert {name: weights.shape for name, weights in found.items()} == {n: w.shape for n, w in base.items()}
    assert all(weights.isfinite().all() for weights in found.values())


def test_the_quickstart_trains(together, data):
    _, folder, _ = together
    check_the_quickstart(folder / "quickstart", data)


@pytest.mark.timeout(900)
def test_the_quickstart_trains_with_its_optimizer_on_the_cpu(data, tmp_path, monkeypatch):
    """Also where a build of it was killed. DeepSpeed compiles it the first time that a machine needs it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", EXTENSIONS)
    left = Path(cpp_extension._get_build_directory("cpu_adam", verbose=False)) / "lock"
    left.touch()
    os.utime(left, (0, 0))
    done = train("zero3_offload", data, tmp_path, deadline_s=880.0)
    waits = hasattr(cpp_extension, "FileBaton")  # not in PyTorch 2.15, whose lock files stay
    assert (f"{left} is the lock of a build that was killed" in done.output) == waits != left.exists()
    check_the_quickstart(tmp_path, data)


def test_two_nodes_train_together(tmp_path):
    """Each with a launcher of its own, here on one machine; ranks that differ, too."""
    port = free_port()
    nodes = [
        ("--machine_rank", str(node), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
        for node in (0, 1)
    ]
    script = ("benchmarks/uneven_ranks.py", str(tmp_path), "--steps", "4")
    with (
        launched("multi_node_zero3", *script, launcher=nodes[0]) as first,
        launched("multi_node_zero3", *script, launcher=nodes[1]) as second,
    ):
        for node in (first, second):
            done = node.wait()
            assert done.code == 0, done.output[-6000:]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) for rank in (0, 1)]
    assert [rank["last"]["arpo/tree/leaves"] for rank in seen] == [2 * uneven_ranks.LEAVES] * 2


def sampled_by_vllm(way: str, data: Path, output: Path, *flags: str) -> None:
    train(way, data, output, "--use_vllm", "true", "--eval_strategy", "no", *flags)
    history = json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"]
    steps = [row for row in history if "loss" in row]
    assert [row["arpo/tree/leaves"] for row in steps] == [16, 16]
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.02 for row in steps)


@pytest.mark.vllm
def test_two_ranks_sample_from_one_server(data, tmp_path):
    """Its weights come from both ranks' parts, by way of a folder; each asks for its own turns. That these weights are
    whole with each way to share the model, a test above shows."""
    with running(str(data / "base"), tmp_path / "log") as server:
        server_mode = ("--vllm_mode", "server", "--vllm_server_urls", server.url, "--weight_sync", "disk")
        sampled_by_vllm("fsdp2", data, tmp_path, *server_mode)


@pytest.mark.vllm
def test_two_ranks_sample_each_from_its_own_vllm(data, tmp_path, monkeypatch):
    for name, value in VLLM.items():
        monkeypatch.setenv(name, value)
    sampled_by_vllm("zero3", data, tmp_path, "--vllm_mode", "colocate", "--vllm_max_model_length", "1024")
