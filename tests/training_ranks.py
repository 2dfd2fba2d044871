"""Collects in one start everything that test_ranks.py checks about a run on several ranks:
`… training_ranks.py WAY FOLDER [FLAG …]`. The flags are those of train.py, which runs last.

Each rank writes FOLDER/rank<i>.json. The test module does the same runs on one rank in its own process, to compare.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import environment_ranks
import uneven_ranks
from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ArpoError
from arpo_trl.evaluation.callback import EvaluationCallback
from arpo_trl.quickstart.corpus import passages
from arpo_trl.quickstart.demonstrations import make_demonstrations
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.tasks import make_tasks
from arpo_trl.rollout.engines.vllm.weights import DiskTransfer
from arpo_trl.tools.search.index import LocalIndex, search_tool
from arpo_trl.training.sharding import check_launch
from evaluating import questions
from shipped import run as run_train
from support import A_SERVER, EXACT, ON_CPU, python, sampled_logprobs, search

GROUPS, LEAVES = 4, 4
SCHOOL_STEPS = 40
UNEVEN_STEPS = len(uneven_ranks.STEPS)
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 1e3}  # Adam blows up rounding
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"max_steps": 2},
    "adapter": {"max_steps": 2},
    "reference": {
        **{"max_steps": 1, "beta": 0.1, "loss_type": "dapo", "shared_prefix_weight": "once"},
        **{"gradient_accumulation_steps": 2, "advantage_attribution": "aepo"},
    },
    "later": {
        **{"max_steps": 1, "branch_rule": "uniform", "advantage_attribution": "igpo"},
        **{"advantage_baseline": "score_norm", "dynamic_sampling_rounds": 1, "importance_sampling_level": "turn"},
    },
}
"""What is trained in several ways, by name. In float32, in which all of them are equal."""
DEFAULT: dict[str, Any] = {"max_steps": 1, "bf16": True}
"""What is trained besides in the precision that users get."""
SAVED_IN_PARTS = ("adapter", "later")
"""What is trained with accelerate's defaults for saved weights, which the shipped configurations change."""
DEFAULTS_OF_SAVES = {
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
}
WITH_ENVIRONMENTS = ("ddp", "zero3")
"""Ways to share the model that also train with environments. Their rollouts differ only in whether a forward needs
the other rank, and their calls that hang take long."""
SUMMARY = ("samples", "missing", "failed", "metrics")


class Watched(ARPOTrainer):
    """Keeps each rollout's groups under their numbers among all ranks'."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.watched: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        last, rewards = self._last, self._last_rewards
        assert last is not None and rewards is not None
        advantages = batch["advantages"] if batch["advantages"].dim() == 1 else batch["advantages"][:, 0]
        for i, tree in enumerate(last.rollout.trees):
            rows = slice(LEAVES * i, LEAVES * (i + 1))
            self.watched.append(
                {
                    "rollout": last.name,
                    "group": last.first_group + i,
                    "ids": [leaf.ids for leaf in tree.leaves()],
                    "calls": sum(len(leaf.calls) for leaf in tree.leaves()),
                    "rewards": rewards[rows].tolist(),
                    "advantages": advantages[rows].tolist(),
                }
            )
        return batch


def save_model(folder: Path) -> None:
    """The quickstart's untrained model after a short training: some of its paths search and answer."""
    save_cold_start_base(folder, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tasks, _ = make_tasks(0, 64, 0)
    index = search_tool(LocalIndex(passages()), top_k=2)
    shown = [row["messages"] for row in make_demonstrations(tasks, index, 0, 64)]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in shown]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(SCHOOL_STEPS):
        some = slice(16 * (step % 4), 16 * (step % 4 + 1))
        loss = model(batch.input_ids[some], attention_mask=batch.attention_mask[some], labels=labels[some]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def reward(completions: list[Any], turns: list[list[str]], **_: Any) -> list[float]:
    """A reward that varies between paths of a random model."""
    return [float(len("".join(texts)) % 3) for texts in turns]


def trainer(model: str, folder: Path, run: str, ranks: int, **settings: Any) -> Watched:
    """One of `RUNS`, or `DEFAULT`, with the same global batch on any number of ranks."""
    wanted = {**SGD, **RUNS.get(run, DEFAULT), **settings}
    micro_batches = ranks * wanted.get("gradient_accumulation_steps", 1)
    return Watched(
        model=model,
        reward_funcs=reward,
        args=ARPOConfig(
            **{
                "output_dir": str(folder),
                "num_generations": LEAVES,
                "per_device_train_batch_size": GROUPS * LEAVES // micro_batches,
                "max_completion_length": 48,
                "entropy_probe_tokens": 4,
                "rollout_schedule": "rounds",
                "trajectory_log_rate": 0.0,
                "save_strategy": "no",
                **ON_CPU,
                **EXACT,
                **wanted,
            }
        ),
        train_dataset=Dataset.from_list(make_tasks(0, 2 * GROUPS, 0)[0]),
        tools=[search, python],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if run == "adapter" else None,
    )


class SaveFirst(TrainerCallback):
    """Saves the model after the first step."""

    def __init__(self, made: ARPOTrainer, folder: Path):
        self.made, self.folder = made, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.made.save_model(str(self.folder / "first"))


def train(made: Watched, folder: Path) -> dict[str, Any]:
    """Trains and saves, after the first step, too; what was sampled and earned, and the losses."""
    made.add_callback(SaveFirst(made, folder))
    made.train()
    made.save_model(str(folder / "final"))
    made.toolbox.close()
    return {"groups": made.watched, "losses": [row["loss"] for row in made.state.log_history if "loss" in row]}


def sampled_against_trained(made: ARPOTrainer) -> dict[str, float]:
    """How far the logprobs of what is sampled are from those of the training forward, in nats; a collective."""
    made.model.train()
    rows = made.args.per_device_train_batch_size
    batch = made._generate_and_score_completions([made.train_dataset[i // LEAVES] for i in range(rows)])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    wanted = batch["completion_mask"] * batch["tool_mask"]
    with torch.no_grad(), made._loss_tokens(wanted):
        model, length = made.model_wrapped, batch["completion_ids"].size(1)
        logprobs, _, _ = made._get_per_token_logps_and_entropies(model, ids, mask, length)
    off = (logprobs - sampled_logprobs(made))[wanted.bool()].abs()
    return {"mean": float(off.mean()), "largest": float(off.max())}


def evaluate(made: ARPOTrainer) -> list[dict[str, Any]]:
    """What the callback finds for five questions, and for one, which leaves all ranks but the first without any."""
    asked = [questions("0", "1", "2", "3", "4", name="five"), questions("0", name="one")]
    found = EvaluationCallback(made, asked, every_steps=1).evaluate()
    made.toolbox.close()
    return [{name: found[key][name] for name in SUMMARY} for key in ("five", "one")]


def evaluate_first(made: ARPOTrainer, folder: Path) -> list[str | None]:
    """Evaluates, trains and saves; the error of the evaluation, or else that of the training."""
    rows = made.train_dataset.select(range(made.accelerator.num_processes))
    errors = [error_of(lambda: made.evaluate(rows))]
    if errors == [None]:
        errors.append(error_of(made.train))
    if errors == [None, None]:
        made.save_model(str(folder))
    made.toolbox.close()
    return errors


def send(made: ARPOTrainer, folder: Path) -> DiskTransfer:
    """The weights, whole and merged, to a folder for vLLM servers."""
    transfer = DiskTransfer(made.model, made.accelerator, made.processing_class, folder, [A_SERVER])
    transfer.prepare("arpo-sent")
    return transfer


def fail_to_send(made: ARPOTrainer, transfer: DiskTransfer, folder: Path) -> str | None:
    """This rank's error for a folder that the first rank cannot create."""
    if made.accelerator.is_main_process:
        (folder / "arpo-unsent").touch()
    return error_of(lambda: transfer.prepare("arpo-unsent"))


def error_of(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except ArpoError as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(way: str, folder: Path, flags: list[str]) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    said: dict[str, Any] = {}
    for run in RUNS:
        with patch.dict(os.environ, DEFAULTS_OF_SAVES if run in SAVED_IN_PARTS else {}):
            made = trainer(str(folder / "model"), folder / run, run, ranks, shared_prefix_forward="on")
        state, in_parts = made.accelerator.state, run in SAVED_IN_PARTS
        if way == "fsdp2":
            assert (state.fsdp_plugin.state_dict_type.name == "SHARDED_STATE_DICT") == in_parts
        elif way == "zero3":
            assert state.deepspeed_plugin.zero3_save_16bit_model != in_parts
        said[run] = train(made, folder / run)
        transfer = send(made, folder / run / "served")
        if run == "plain":
            said["evaluated"] = evaluate(made)
            said["unwritable"] = fail_to_send(made, transfer, folder / run / "served")
            said["ungathered"] = error_of(lambda made=made: check_launch(made.accelerator, gathers=False))
    made = trainer(str(folder / "model"), folder / "default", "default", ranks)
    made.train()
    said["default"] = sampled_against_trained(made)
    made.save_model(str(folder / "default" / "final"))
    made.toolbox.close()
    made = trainer(str(folder / "model"), folder / "second", "default", ranks, per_device_eval_batch_size=LEAVES)
    said["evaluated_first"] = evaluate_first(made, folder / "second" / "final")
    if way in WITH_ENVIRONMENTS:
        said["environments"] = environment_ranks.train(folder / "environments")
    said["uneven"] = uneven_ranks.train(folder / "uneven", UNEVEN_STEPS)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(said), "utf-8")
    run_train("quickstart.yaml", *flags)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
