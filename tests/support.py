"""Helpers of several test files: a tokenizer, a tiny model, tools, and scripted rollouts."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import forked
from arpo_trl import ARPOConfig, ARPOTrainer, cli
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.quickstart.model import build_model, build_tokenizer
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch, Score, TreeSettings
from arpo_trl.rollout.engines.base import Engine, Event, Probe, SamplingParams
from arpo_trl.rollout.engines.scripted import Script, ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.engines.vllm.client import FRESH, ServerFacts
from arpo_trl.rollout.protocols import TagProtocol, ToolProtocol
from arpo_trl.rollout.rules import BranchRule
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.tree import BranchDecision, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.python.sandbox import Limits, Tier, Worker
from arpo_trl.tools.state import PathState
from arpo_trl.tools.toolbox import ToolBox

TEXTS = ["the melting point of iron is 1538 degrees", "print(1538 - 1000)", "what is the answer to a question"]
ANSWER = "<answer>\\boxed{1}</answer>"
ON_CPU: dict[str, Any] = {"use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
"""Settings of a small run that is watched through its log. All others are what users get: bf16 above all."""
EXACT: dict[str, Any] = {"bf16": False}
"""Besides, where a test compares what is equal in float32 only; beside it stands one that takes the default."""


def cases(name: str) -> list[dict[str, Any]]:
    """The rows of tests/cases/<name>.jsonl."""
    path = Path(__file__).with_name("cases") / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS * 3)


def with_template(name: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with a chat template that TRL ships."""
    made = copy.deepcopy(tokenizer())
    made.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    if eos is not None:
        made.add_special_tokens({"eos_token": eos})
    return made


def small_model(config_class: Any, model_class: Any, seed: int = 0, **settings: Any) -> Any:
    """A model of that class with some 25,000 random parameters; `settings` override its configuration."""
    config = config_class(**{**small_settings(), **settings})
    torch.manual_seed(seed)
    return model_class(config)


def small_settings() -> dict[str, Any]:
    """A configuration's, for the tests' tokenizer."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer().eos_token_id,
        "pad_token_id": tokenizer().pad_token_id,
    }


def line_tools(create_state: Callable[[int], PathState]) -> list[Callable[..., Any]]:
    """The tools `write` and `read`, whose calls run on the states that `create_state` makes."""

    def write(text: str) -> str:
        """Write a line.

        Args:
            text: The line.
        """
        raise AssertionError("the state's own is called")

    def read(what: str) -> str:
        """Read all lines.

        Args:
            what: Not used.
        """
        raise AssertionError("the state's own is called")

    write.create_state = read.create_state = create_state  # type: ignore[attr-defined]
    return [write, read]


A_SERVER = ServerFacts(
    model="tiny",
    max_model_len=1024,
    max_logprobs=-1,
    logprobs_mode="processed_logprobs",
    dtype="float32",
    max_lora_rank=None,
    replicas=1,
    weight_version=FRESH,
)
"""A vLLM server with its initial weights, which takes whole models only."""


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of `arpo-trl` with these words."""
    monkeypatch.setattr(sys, "argv", ["arpo-trl", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def command_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `arpo-trl` with these words."""
    status = run_command(monkeypatch, *words)
    out, err = capsys.readouterr()
    return status, out, err


def child_environment(command: Sequence[str | Path], environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that runs `command`. It finds vLLM only if the command names vLLM.

    Many users have none, and without it a process starts a third faster.
    """
    paths = [environment.get("PYTHONPATH")]
    if not any("vllm" in str(word) for word in command):
        paths.insert(0, str(Path(__file__).with_name("without_vllm")))
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


COMPILING = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Environment variables of a process with vLLM in it, which compiles models as it does by default."""
VLLM = COMPILING | {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
"""The same without compilation, which takes g++ 40 s of CPU time at each start."""


def found_with_vllm(script: str, folder: Path, environment: Mapping[str, str] = VLLM) -> Any:
    """What a script of the tests, run in a process of its own with vLLM in it, wrote to `folder`/findings.json."""
    command = [str(Path(__file__).with_name(script)), str(folder)]
    forked.run(command, cwd=folder, env={**os.environ, **environment}, timeout=580)
    return json.loads((folder / "findings.json").read_text("utf-8"))


def tiny_model(seed: int = 0) -> Qwen3ForCausalLM:
    return small_model(Qwen3Config, Qwen3ForCausalLM, seed, head_dim=16, initializer_range=0.05)


def save_tiny_model(folder: Path) -> str:
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def without_a_layer(model: str, folder: Path) -> str:
    """A copy of the model whose files lack the weights of its last layer."""
    file = shutil.copytree(model, folder) / "model.safetensors"
    weights = load_file(file)
    last = max(name.split(".")[2] for name in weights if ".layers." in name)
    save_file({k: v for k, v in weights.items() if f".layers.{last}." not in k}, file, {"format": "pt"})
    return str(folder)


def save_sharp_model(folder: Path) -> str:
    """The quickstart's model for the tests' tokenizer, with distributions that are neither flat nor certain."""
    model = build_model(tokenizer(), seed=0)
    with torch.no_grad():
        model.model.norm.weight.mul_(5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def script(name: str) -> ModuleType:
    """The program behind `train.py` or `sft.py`."""
    return importlib.import_module(f"arpo_trl.scripts.{name}")


def saved_adapter_is_the_trained_one(trainer: Any, model_path: str) -> bool:
    """Whether the adapter that `trainer` saves has changed, and loads with the trained weights."""
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path), trainer.args.output_dir)
    trained = {name: value for name, value in trainer.model.named_parameters() if "lora_" in name}
    read = {name: value for name, value in loaded.named_parameters() if "lora_" in name}
    moved = any(bool(value.any()) for name, value in trained.items() if "lora_B" in name)  # which start at zero
    return moved and read.keys() == trained.keys() and all(torch.equal(read[i], trained[i].cpu()) for i in read)


def sampling_trainer(model: Any, folder: Path, rows: Dataset, **settings: Any) -> ARPOTrainer:
    """A trainer of 2 × 4 completions a rollout with the transformers engine, otherwise with users' defaults."""
    peft_config = settings.pop("peft_config", None)
    defaults = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 24}
    return ARPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        ARPOConfig(str(folder), **{**defaults, "use_cpu": True, "report_to": "none", **settings}),
        rows,
        processing_class=tokenizer(),
        tools=[search],
        peft_config=peft_config,
    )


def sampled_logprobs(made: ARPOTrainer) -> torch.Tensor:
    """(B, T) logprobs of the last rollout's tokens, 0 where it wrote none."""
    assert made._last is not None
    of_leaves = [torch.tensor(leaf.logprobs) for leaf in made._last.rollout.leaves]
    return torch.nn.utils.rnn.pad_sequence(of_leaves, batch_first=True)


def unlike_scored(made: ARPOTrainer) -> torch.Tensor:
    """|sampling − training logprob| of all tokens that a rollout of the first two prompts wrote."""
    made.model.train()
    batch = made._generate_and_score_completions([made.train_dataset[i // 4] for i in range(8)])
    written = batch["completion_mask"] * batch["tool_mask"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    made.model.eval()  # without dropout, which some models have by default
    with torch.no_grad(), made._loss_tokens(written):
        logps, _, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, batch["completion_ids"].size(1))
    assert written.sum() > 50
    return (logps.cpu() - sampled_logprobs(made))[written.bool().cpu()].abs()


def search(query: str) -> str:
    """Search for facts.

    Args:
        query: What to look for.
    """
    return f"facts about {query}"


def python(code: str) -> str:
    """Run Python code.

    Args:
        code: The code.
    """
    return f"ran {code}"


class Scripted:
    """A sampler on a scripted engine, with all its inputs."""

    def __init__(
        self,
        script: Script,
        *,
        leaves: int = 4,
        at_root: int = 2,
        rule: BranchRule | None = None,
        tools: Sequence[Callable[..., object]] = (search, python),
        max_completion_length: int = 400,
        max_length: int = 1000,
        max_tool_calls: int = 3,
        schedule: RolloutSchedule = RolloutSchedule.ROUNDS,
        share_calls: ShareCalls = ShareCalls.OFF,
        probe: int = 4,
        vocab_size: int | None = None,
        timeout_s: float = 20.0,
        concurrency: int = 32,
        max_result_tokens: int | None = None,
        protocol: type[ToolProtocol] = TagProtocol,
        template: str | None = None,
        score: Score | None = None,
    ):
        self.tokenizer = tokenizer() if template is None else with_template(template)
        self.toolbox = ToolBox(tools, timeout_s=timeout_s, concurrency=concurrency)
        self.protocol = protocol(self.tokenizer, self.toolbox.specs, max_result_tokens=max_result_tokens)
        self.eos = int(self.tokenizer.eos_token_id)
        settings = SamplingParams(eos_ids=self.protocol.eos_ids, stop_strings=self.protocol.stop_strings)
        self.engine = ScriptedEngine(self.tokenizer, settings, script, vocab_size=vocab_size)
        self.sampler = TreeSampler(
            self.engine,
            self.toolbox,
            self.protocol,
            TreeSettings(
                num_generations=leaves,
                initial_rollouts=at_root,
                max_completion_length=max_completion_length,
                max_length=max_length,
                max_tool_calls=max_tool_calls,
                entropy_probe_tokens=probe,
                rule=rule or Threshold(),
                schedule=schedule,
                share_calls=share_calls,
            ),
            score,
        )

    def __call__(self, groups: int = 1, seed: int = 0) -> RolloutBatch:
        prompt = self.protocol.encode_prompt([{"role": "user", "content": "what is the answer"}])
        with self.toolbox:
            return self.sampler.sample([GroupRequest(id=i, prompt_ids=prompt) for i in range(groups)], seed=(seed,))


def addresses(run: Scripted) -> list[tuple[int, ...]]:
    """Of the leaves of its only tree."""
    (tree,) = run().trees
    return [leaf.address for leaf in tree.leaves()]


def prompts(made: Scripted, count: int) -> list[GroupRequest]:
    ids = made.protocol.encode_prompt([{"role": "user", "content": "what is the answer"}])
    return [GroupRequest(id=i, prompt_ids=ids) for i in range(count)]


def one_search(request: Any, context: str) -> ScriptedTurn:
    """Each path searches once; what follows is more uncertain."""
    depth = request.key[-1]
    return ScriptedTurn(text=["<search>iron</search>", ANSWER][depth], entropies=[0.1 + depth])


def branching_script(request: Any, context: str) -> ScriptedTurn:
    """Each path searches once; what follows is uncertain; half of the answers are right."""
    if request.key[-1] == 0:
        return ScriptedTurn(text=f"<search>iron {request.key[1]}</search>", entropies=[0.1])
    asked = context.rpartition("what is ")[2][0]
    right = (len(request.key) + request.key[1]) % 2
    return ScriptedTurn(text=f"<answer>\\boxed{{{asked if right else 99}}}</answer>", entropies=[1.0])


def one_fork(text: str, result: str = "1538 degrees", failure: ToolFailure | None = None) -> RolloutTree:
    """root ── turn ── observation ──┬─ turn (0,)
    └─ turn (0, 1, 0)

    Args:
        text: The turn (0,).
        result: The observation.
    """
    made = RolloutTree([1, 2, 3])
    first = made.add_turn(0, [1, 1], "<search>iron</search>", [-0.5, -0.5], [0.25, 0.75])
    call = ExecutedCall(
        name="search",
        arguments={"query": result},
        text=result,
        failure=failure,
        seconds=0.1,
        source=CallSource.EXECUTED,
    )
    seen = made.add_observation(first.index, [2], [call], result)
    seen.decision = BranchDecision(
        entropy_nats=1.0, delta=0.125, probability=0.525, fires=True, granted=1, reason="drew 0.312"
    )
    made.end(made.add_turn(seen.index, [3], text, [-0.5], [1.5]).index, (0,), StopReason.EOS)
    made.end(made.add_turn(seen.index, [4], "cut off", [-0.5], [0.5]).index, (0, 1, 0), StopReason.LENGTH)
    return made


def with_real_vllm(test: Callable[..., None]) -> Any:
    """Marks a test that needs the process with vLLM in it."""
    return pytest.mark.vllm(pytest.mark.slow(test))


def short_deadline(
    box: ToolBox, timeout_s: float, *, of: Callable[[ToolCall], bool] = lambda call: False, opening: int | None = None
) -> None:
    """Gives `timeout_s` to the calls that hang, and to that opening of states, counted from 0. All others keep the
    deadline of the box, so that the load of the machine cannot make them miss it."""
    usual_s, submit, open_states, openings = box._timeout_s, box.submit, box.open, itertools.count()

    def within(seconds: float, start: Callable[[], int]) -> int:
        box._timeout_s = seconds
        try:
            return start()
        finally:
            box._timeout_s = usual_s

    def submitted(call: ToolCall, *given: Any) -> int:
        return within(timeout_s if of(call) else usual_s, lambda: submit(call, *given))

    def opened(states: Any) -> int:
        return within(timeout_s if next(openings) == opening else usual_s, lambda: open_states(states))

    box.submit, box.open = submitted, opened  # type: ignore[assignment, method-assign]


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """Waits for what happens soon, but nobody knows when. Fails if it does not happen."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or only waits for its parent to read its status."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def events_of(engine: Engine, turns: int) -> Iterator[Event]:
    """The engine's events until that many turns have ended."""
    while turns:
        for event in engine.poll(0.05):
            turns -= not isinstance(event, Probe)
            yield event


@cache
def can_isolate(tier: Tier) -> bool:
    """Tests the kernel and not the sandbox: a broken sandbox must fail its tests and not skip them."""
    if tier is Tier.SANDLOCK:
        sandlock = pytest.importorskip("sandlock")
        return bool(sandlock.landlock_abi_version() >= sandlock.min_landlock_abi())
    if tier is Tier.NAMESPACES:
        # Mounting asks for more than the namespace: some distributions give the namespace and no rights in it.
        command = [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "--pid",
            "--fork",
            "mount",
            "-t",
            "tmpfs",
            "none",
            "/tmp",
        ]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            pytest.skip("there is no unshare to ask whether this kernel makes user namespaces")
    return True


@contextmanager
def worker_of(tier: Tier, limits: Limits) -> Iterator[Worker]:
    """A worker of that tier; skips the test if this machine does not support the tier."""
    if not can_isolate(tier):
        pytest.skip(f"this kernel cannot isolate by {tier}")
    worker = Worker(limits, tier=tier, preload=False)
    try:
        yield worker
    finally:
        worker.close()
