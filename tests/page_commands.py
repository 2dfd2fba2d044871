"""The shell commands of the pages, the reasons why tests do not run some of them, and replacements for names in the
others."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs/mistakes.md")  # test_newcomer.py makes its mistakes
PROGRAMS = ("arpo-trl", "python", "make", "pip", "accelerate", "vllm", "srun")

IN_A_CHECKOUT = (
    "the scripts of a checkout: test_ranks.py, test_hub.py and test_shop.py run them, test_docs.py reads each command"
)
MANY_GPUS = "several GPUs or nodes: test_docs.py reads each command, test_ranks.py trains on two ranks"
NOT_RUN = {
    r"make |python -m venv |\. \.venv": "sets up a checkout; CI starts with it",
    r"pip install ": "installs packages",
    r"(python (-m )?|accelerate launch .*|)benchmarks[/.]": "measures for minutes or hours, in a checkout",
    r"python (-m pytest|tests/|docs/|-X |-I |-m arpo_trl\.commands\.training_help)": "work on the project itself",
    r"python train\.py|accelerate launch( …)? .*train\.py|srun ": IN_A_CHECKOUT,
    r"accelerate (config|launch --cpu)$": "a program of accelerate",
    r"arpo-trl (train|sft) .*--accelerate (zero3|multi_node_zero3)": MANY_GPUS,
    r"arpo-trl train --config reasoning_10k": "a model of 3B: test_scripts.py trains a tiny one with its settings",
    r"vllm serve|python -m vllm\.|arpo-trl eval .*--engine vllm": "vLLM: test_vllm_cpu.py, test_evaluation_vllm.py",
    r"arpo-trl eval .*--search-provider serper": "a paid service: test_search_providers.py answers in its place",
    r"arpo-trl (push|merge .*--push-to-hub)": "a key of the Hub: test_hub.py answers in its place",
    r"(export |for |done$)": "a part of a script for a cluster",
}  # fmt: skip
"""Start of a command, as a regular expression → why no test runs it from an installed package."""

BY_PROJECT = ("arpo-trl new my-agent", "cd my-agent", "arpo-trl train --config config.yaml", "arpo-trl new FOLDER")
"""What the fixture `project` runs."""

STANDS_FOR = {
    "dongguanting/Qwen2.5-3B-ARPO": "model", "Qwen/Qwen3-8B": "model", "BASE": "model", "RUN": "runs/first",
    "PASSAGES": "corpus.jsonl", "passages.jsonl": "corpus.jsonl", "QUESTION": "What is the capital of Peru?",
    "runs/eval/sft": "runs/eval/mine", "runs/eval/rl": "runs/eval/mine", "aime24,hotpotqa": "gsm8k",
    "search_cache.sqlite": "cache.sqlite",
}  # fmt: skip
"""A word of a command → what the test has in its place."""
OF_PAGE = {
    "checkpoints.md": {"CHECKPOINT": "runs/adapter"},
    "hub.md": {"runs/mine": "runs/adapter"},
    "start.md": {"runs/eval/mine": "runs/eval/start"},
    "tools.md": {"FOLDER": "INDEX"},
    "evaluation.md": {"FOLDER": "questions", "all": "reasoning"},
    "results.md": {"FOLDER": "questions"},
}
"""The same for one page."""
SMALLER = {
    "eval --model": ["--limit", "2", "--max-completion-length", "24", "--data", "questions"],
    "train --config config.yaml --learning_rate": ["--max_steps", "1", "--overwrite_output_dir", "true"],
    "sft --config quickstart_sft": ["--max_steps", "1", "--per_device_train_batch_size", "2"],
    "train --config quickstart": [
        *("--max_steps", "1", "--num_generations", "2", "--initial_rollouts", "1", "--eval_strategy", "no"),
        *("--per_device_train_batch_size", "2", "--max_completion_length", "16"),
    ],
}
"""Start of a command of arpo-trl → flags that it does not have and that make it small, or keep it off the Hub."""


DRIVER = """
import contextlib, io, json, sys, traceback
from arpo_trl.cli import main

answers = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:], said, status = words, io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            traceback.print_exc()
    answers.append([status, said.getvalue()[-3000:]])
with open("answers.json", "w") as file:
    json.dump(answers, file)
"""
"""Runs commands one after the other in one process, since each would import torch again."""


SMALL_QUICKSTART = """
from dataclasses import replace
from functools import partial
from arpo_trl.quickstart import __main__ as quickstart, stages

search, steps = stages.SEARCH, ("--max_steps", "2", "--per_device_train_batch_size", "32", "--eval_steps", "2")
stages.N_DEMONSTRATIONS = 800
stages.TASKS["search"] = replace(
    search,
    prepare=partial(stages.prepare, n_train=64, n_heldout=24),
    cold_start=("--max_steps", "50"),
    flags=lambda data: (*search.flags(data), *steps, "--trajectory_log_rate", "1"),
)
quickstart.main()
"""
"""The quickstart with few questions and steps, all of whose trees are logged."""


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    @property
    def reason(self) -> str | None:
        """The reason why no test runs it; None if a test runs it."""
        return next((reason for start, reason in NOT_RUN.items() if re.match(start, self.text)), None)

    def words(self) -> list[str]:
        """The words after `arpo-trl`, with what stands in for what they name."""
        stands_for = STANDS_FOR | OF_PAGE.get(self.page, {})
        words = [stands_for.get(word, word) for word in shlex.split(self.text)[1:]]
        for start, flags in SMALLER.items():
            if shlex.join(words).startswith(start):
                words += [word for i in range(0, len(flags), 2) if flags[i] not in words for word in flags[i : i + 2]]
        return words


def fill(project: Path) -> None:
    """Puts into a project that has trained what the pages' commands name."""
    runs = project / "runs"
    for name in ("quickstart/rl", "quickstart/sft", "mine", "seed0", "seed1"):
        shutil.copytree(runs / "first", runs / name)
    log = runs / "quickstart/rl/trajectories"
    rows = [json.loads(line) for line in (log / "step-000009-rank0.jsonl").read_text("utf-8").splitlines()]
    write_rows(log / "step-000015-rank0.jsonl", [{**row, "step": 15} for row in rows])
    for name in ("train", "heldout", "watched"):
        (runs / "quickstart/data").mkdir(exist_ok=True)
        shutil.copy(project / "questions.jsonl", runs / f"quickstart/data/{name}.jsonl")
    shutil.copy(project / "demonstrations.jsonl", runs / "quickstart/data")
    shutil.copytree(project / "model", runs / "quickstart/data/base")
    passages = [{"id": "1", "contents": "The capital of Peru is Lima."}]
    for path in (project / "corpus.jsonl", runs / "quickstart/data/corpus.jsonl"):
        write_rows(path, passages)
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}", "level": 1} for i in range(3)]
    for name in ("aime24", "aime25", "math500", "gsm8k", "math", "hotpotqa"):
        write_rows(project / f"questions/{name}.jsonl", sums)
    (project / "search_cache.json").write_text('{"iron": "It melts at 1,538 °C."}', "utf-8")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(project / "model"), LoraConfig(target_modules="all-linear")
    )
    adapter.peft_config["default"].base_model_name_or_path = "model"
    adapter.save_pretrained(runs / "adapter")
    shutil.copy(runs / "first/training_config.yaml", runs / "adapter")
    evaluation = {"model": "runs/mine", "benchmarks": "gsm8k,hotpotqa", "search_index": "corpus.jsonl"}
    evaluation |= {"data": "questions", "limit": 2, "max_completion_length": 24}
    (project / "eval.yaml").write_text(json.dumps(evaluation), "utf-8")  # JSON is YAML


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def page_commands() -> list[Command]:
    """The commands of the pages' blocks, and those in backticks that have more than a program's name."""
    found: dict[Command, None] = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if language in ("", "bash")]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        without = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without)]
        lines += [code for code in inline if re.match(rf"(?:{'|'.join(PROGRAMS)}) (?:-|\w+ \S|\w+\.py)", code)]
        for line in lines:
            line = re.sub(r"(^|\s+)#.*", "", " ".join(line.split()))  # without the comment
            line = re.sub(
                r"^(?:[A-Z_]+=(?:\$\(\(.*?\)\)|\S+) )+| \[[^]]*\]", "", line
            )  # nor variables and what may be left out
            if line:
                found[Command(page.name, line)] = None
    return list(found)
