"""A small run for tests that stop it before its end: `python resuming.py MODEL OUTPUT [--name value…]`.

It takes every setting of ARPOConfig. While the file $HANG exists, the functions named in it ("search", "reward")
start a child process, create the file $HANG.there, and wait; "deaf" is a reward that ignores interrupts. If $TOOLS is
set, the run also has the tools with processes, and a long call of each runs while "search" waits. If $WHOLE names a
folder, the same processes do another run from the start after the resumed run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.command_line import parse_settings, report_errors
from arpo_trl.errors import ToolError
from arpo_trl.runs.interrupts import follow_launcher
from arpo_trl.tools.builtin import ToolArguments, build_tools
from loopback import Loopback, Reply
from support import ON_CPU, python, tiny_model, tokenizer

ROWS = Dataset.from_list([{"prompt": f"what is {i}", "answer": [str(i)], "task": "math"} for i in range(10)])
BOUND_S = 120.0
"""For a machine that is busy: how long a test waits for what takes a second."""
TIMES = ("time", "per_second", "seconds_p", "latency", "reset_s", "fork_s", "replay_s")
SETTINGS = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 48,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    **ON_CPU,
    "rollout_schedule": "rounds",
    "entropy_probe_tokens": 4,
    "tool_cache": True,
    "trajectory_log_rate": 1.0,
}


def save_calling_model(folder: Path) -> str:
    """A random model that often calls `search`, closes what it opens, and ends its turns."""
    model = tiny_model()
    often = tokenizer().convert_tokens_to_ids(["<search>", "</search>", str(tokenizer().eos_token)])
    with torch.no_grad():
        # Every token brings 1 in the first dimension, which so is about √32 after the last norm, and serves as a bias.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[often, 0] = 0.85
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


LONG_CALLS: list[Callable[[], Any]] = []
"""Calls that go on for long in a process of their own."""


def tools_with_processes() -> list[Callable[..., Any]]:
    """The sandbox, a reader of pages and an MCP server."""
    page = Loopback(lambda asked: Reply("<p>long " * 1_000_000, headers={"Content-Type": "text/html"})).__enter__()
    server = {"command": sys.executable, "args": [str(Path(__file__).with_name("mcp_server.py"))], "tools": ["slow"]}
    arguments = ToolArguments(
        tools=["python", "visit"],
        python_timeout_s=BOUND_S,
        visit_timeout_s=BOUND_S,
        visit_allowed_hosts=[page.url.removeprefix("http://")],
        mcp_servers=[server],
        mcp_timeout_s=BOUND_S,
    )
    sandbox, visit, slow = tools = build_tools(arguments)
    LONG_CALLS.extend(
        [lambda: sandbox("while True: pass"), lambda: visit(page.url), lambda: asyncio.run(slow(text="x"))]
    )
    return tools


def quietly(call: Callable[[], Any]) -> None:
    """Makes a call whose server or process is killed."""
    with contextlib.suppress(ToolError):
        call()


def wait_while_told(name: str) -> None:
    hang = Path(os.environ.get("HANG", "/nonexistent"))
    if not hang.exists() or name not in hang.read_text("utf-8"):
        return
    child = subprocess.Popen(["sleep", "1000"])
    for call in LONG_CALLS:
        threading.Thread(target=quietly, args=(call,), daemon=True).start()
    hang.with_suffix(".there").touch()
    while hang.exists():
        with contextlib.suppress(KeyboardInterrupt) if name == "deaf" else contextlib.nullcontext():
            time.sleep(0.05)
    child.kill()
    child.wait()


def search(query: str) -> str:
    """Search for facts.

    Args:
        query: What to look for.
    """
    wait_while_told("search")
    return f"facts about {query[:8]}"


class Notes:
    """An environment whose `search` also finds what the path has looked for before."""

    def reset(self, **row: Any) -> None:
        wait_while_told("reset")
        self.seen: list[str] = []

    def search(self, query: str) -> str:
        """Search for facts.

        Args:
            query: What to look for.
        """
        wait_while_told("search")
        self.seen.append(query[:4])
        return f"facts about {' '.join(self.seen[-2:])}"

    def get_reward(self) -> float:
        return len(self.seen) / 10

    def close(self) -> None:
        """So that every path has an object of its own."""


def some_reward(completions: list[Any], **_: Any) -> list[float]:
    """A number that depends on every character, so that two runs do not have the same number by chance."""
    wait_while_told("reward")
    wait_while_told("deaf")
    return [zlib.crc32(repr(completion).encode()) % 100 / 100 for completion in completions]


def make_trainer(model: str | PreTrainedModel, output: Path, **settings: Any) -> ARPOTrainer:
    arguments = ("peft_config", "train_dataset", "eval_dataset", "tools", "reward_funcs", "environment_factory")
    kwargs = {name: settings.pop(name) for name in arguments if name in settings}
    evaluates = settings.get("eval_strategy", "no") != "no"
    return ARPOTrainer(
        model=model,
        args=ARPOConfig(output_dir=str(output), **{**SETTINGS, **settings}),
        **{
            "train_dataset": ROWS,
            "eval_dataset": ROWS.select(range(4)) if evaluates else None,
            "tools": [search, python],
            "reward_funcs": some_reward,
            **kwargs,
        },
    )


def outcome(folder: Path) -> dict[str, Any]:
    """The data that must not depend on interruptions of a run: its weights, its best checkpoint, its trees, and all
    logged values except times."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    weights = [*last.glob("*.safetensors"), *last.glob("global_step*/*model_states.pt")]
    return {
        "history": [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in state["log_history"]],
        "best": state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name,
        "weights": {path.name: zlib.crc32(path.read_bytes()) for path in weights},
        "trees": {path.name: _trees(path) for path in (folder / "trajectories").iterdir()},
    }


def _trees(file: Path) -> list[Any]:
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also break within a string
        rows = [json.loads(line) for line in lines]
    nodes = [node for row in rows for node in row["nodes"]]
    for call in [call for node in nodes for call in (*node.get("calls", ()), *node.get("unread", ()))]:
        del call["seconds"]
    for row in rows:
        row.pop("spans", None)  # times, too
    return rows


def run(model: str, output: str, words: list[str]) -> None:
    defaults = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    (args,) = parse_settings([ARPOConfig], ["--output_dir", output, *defaults, *words])
    tools = [search, *(tools_with_processes() if "TOOLS" in os.environ else [python])]
    trainer = ARPOTrainer(model=model, reward_funcs=some_reward, args=args, train_dataset=ROWS, tools=tools)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    print("done", trainer.state.global_step)


@report_errors
def main() -> None:
    follow_launcher()
    model, output, *words = sys.argv[1:]
    run(model, output, words)
    if (whole := os.environ.get("WHOLE")) is not None:
        run(model, whole, words[: words.index("--resume_from_checkpoint")])


if __name__ == "__main__":
    main()
