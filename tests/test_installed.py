"""The commands of an installed wheel, outside the checkout: `python -m pip install --target FOLDER arpo_trl-….whl`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from arpo_trl.logs.curves import PANELS, curves
from evaluating import completions
from forked import Fork
from loopback import Loopback
from page_commands import BY_PROJECT, DRIVER, NOT_RUN, SMALL_QUICKSTART, fill, page_commands
from page_commands import Command as PageCommand

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Command = Callable[..., subprocess.CompletedProcess[str]]
PAGE_COMMANDS = page_commands()
TRAINING = "arpo-trl train --config quickstart"
COLD_START = "arpo-trl sft --config quickstart_sft"
AGAIN = "arpo-trl train --config config.yaml --learning_rate 1e-6"
SERVING = "arpo-trl view runs/quickstart/rl --serve --open"
QUICKSTART = "arpo-trl quickstart"
APART = (*BY_PROJECT, TRAINING, COLD_START, AGAIN, SERVING, QUICKSTART)
"""The commands of the pages that have a test of their own."""
AT_ONCE = [each for each in PAGE_COMMANDS if each.reason is None and each.text not in APART]
"""The commands of the pages that one process runs."""
NOISE = re.compile(
    r"'pin_memory'|missing keys|lm_head\.weight|Setting accelerator|Disabling Triton|stamina"
    r"|(User|Future|Deprecation)Warning"
)
"""What a user is not shown: messages of other packages that are irrelevant there."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the wheel that this checkout makes, and nothing else."""
    built = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built), str(ROOT)]
    subprocess.run(wheel, check=True)
    (file,) = built.glob("arpo_trl-*.whl")
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        assert not [name for name in names if name.startswith(("tests", "benchmarks", "src"))]
        for kind in ("configs", "accelerate_configs"):
            assert {f"arpo_trl/{kind}/{path.name}" for path in (ROOT / kind).glob("*.yaml")} <= names
        archive.extractall(built / "site")
    return built / "site"


@pytest.fixture(scope="module")
def environment(site: Path) -> dict[str, str]:
    """That of a user who has installed the package without its extra for vLLM, and whose browser opens at once."""
    folders = os.pathsep.join([str(ROOT / "tests/without_vllm"), str(site)])
    variables = {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "BROWSER": "true"}
    return {**os.environ, **variables, "ACCELERATE_USE_CPU": "true", "COLUMNS": "120"}


ENTRY = """
import sys
from importlib.metadata import distribution
(entry,) = distribution("arpo-trl").entry_points.select(group="console_scripts", name="arpo-trl")
sys.exit(entry.load()())
"""
CALL = [sys.executable, "-c", ENTRY]
"""What the script `arpo-trl` runs that pip makes from the wheel's entry points."""


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    """The output of every command that `command` and `said` have run."""
    return []


@pytest.fixture(scope="module")
def command(environment: dict[str, str], outputs: list[str]) -> Command:
    """Runs `arpo-trl WORDS` in a folder with the installed package."""

    def run(
        folder: Path, *words: str, status: int = 0, call: Sequence[str] = CALL
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*call, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        outputs.append(done.stdout + done.stderr)
        assert done.returncode == status, (words, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return done

    return run


@pytest.fixture(scope="module")
def quick(site: Path, environment: dict[str, str], outputs: list[str]) -> Command:
    """As `command`, as a fork of a process that has imported torch and the installed package."""
    program = site.parent / "entry.py"
    program.write_text(ENTRY, "utf-8")

    def run(folder: Path, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        with TemporaryDirectory() as written:
            streams = [Path(written, name) for name in ("stdout", "stderr")]
            call = [str(program), *words]
            process = Fork(
                call, cwd=folder, env=environment, log=streams[0], errors=streams[1], vllm=False, package=site
            )
            try:
                process.wait(300.0)
            finally:
                process.kill()
            stdout, stderr = (stream.read_text("utf-8") for stream in streams)
        outputs.append(stdout + stderr)
        assert process.returncode == status, (words, process.returncode, stdout[-2000:], stderr[-4000:])
        return subprocess.CompletedProcess(call, status, stdout, stderr)

    return run


@pytest.fixture(scope="module")
def project(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after the commands that `arpo-trl new` prints."""
    folder = tmp_path_factory.mktemp("home")
    made = command(folder, "new", "my-agent")
    assert "cd my-agent\n    arpo-trl train --config config.yaml" in made.stdout
    assert "Training a tiny model: 100%" in made.stderr
    command(folder / "my-agent", "train", "--config", "config.yaml")
    return folder / "my-agent"


def test_the_package_is_the_installed_one_and_has_a_version(command: Command, site: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"arpo-trl \d+\.\d+\.\d+\S*\n", command(tmp_path, "--version").stdout)
    assert f"in {site}/arpo_trl" in command(tmp_path, "doctor").stdout
    assert len(list(site.glob("arpo_trl-*.dist-info/entry_points.txt"))) == 1  # which `CALL` reads


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("sft", "--help"), ("new", "--help")])
def test_help_imports_nothing_heavy(command: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert command(tmp_path, *words).stdout.startswith("usage: arpo-trl")
    code = (
        f"import sys; sys.argv[1:] = {list(words)!r}\nfrom arpo_trl.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'transformers', 'trl', 'accelerate'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_help_all_has_every_setting_of_trl(command: Command, tmp_path: Path) -> None:
    short, whole = (command(tmp_path, "train", flag).stdout for flag in ("--help", "--help-all"))
    for setting in ("--branch_rule", "--num_generations", "--lora_r"):
        assert setting in short and setting in whole
    assert "--adam_beta1" in whole and "--adam_beta1" not in short


@pytest.mark.parametrize(
    "words",
    [
        *(["train", "--config", "quickstart"], ["sft", "--config", "quickstart_sft"], ["quickstart"], ["new", "mine"]),
        *(["eval", "--model", "m", "--data", "q"], ["ask", "m", "What?"], ["merge", "m", "--output", "merged"]),
        ["compare", "run_a", "run_b"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_says_something_before_it_imports_torch(command: Command, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(3)", "utf-8")
    done = command(tmp_path, *words, status=3)
    assert f"arpo-trl {words[0]}: loading PyTorch and TRL …" in done.stderr
    if words == ["quickstart"]:
        assert done.stdout.startswith("The quickstart builds a tiny model that learns to search and compute.")
        assert "about four minutes on two CPU cores and downloads nothing. All output goes to" in done.stdout


def test_a_new_project_trains_and_its_readme_is_true(quick: Command, project: Path) -> None:
    history = json.loads((project / "runs/first/trainer_state.json").read_text("utf-8"))["log_history"]
    rewards = [row["reward"] for row in history if "reward" in row]
    assert len(rewards) == 10
    # It learns to look up and to copy, mostly: of ten steps the last three sum to 0.3 more than the first three, with
    # a standard deviation of 0.3 between seeds, and so between CPUs. The bound is five of them away.
    assert sum(rewards[-3:]) > sum(rewards[:3]) - 1.2
    drawn = [label for panel in PANELS for label in curves(panel, history)]
    assert {"after lookup", "share of lookup that failed"} <= set(drawn)
    readme = (project / "README.md").read_text("utf-8")
    lines = [line.partition("#")[0].split() for line in readme.split("```")[1].splitlines() if line]
    assert [line[1] for line in lines] == ["train", "tree", "ask", "eval"]
    assert "step 9, group" in quick(project, "tree", "runs/first", "--step", "9").stdout
    asked = quick(project, "ask", "runs/first", "What is the capital of France?", "--temperature", "0")
    assert "<lookup>" in asked.stdout and "Answer: " in asked.stdout
    assert "settings of its training: --tools my_tools:lookup" in asked.stderr
    words = ["--model", "runs/first", "--data", "questions.jsonl", "--limit", "20", "--output", "runs/eval"]
    evaluated = quick(project, "eval", *words)
    assert "settings of its training: --tools my_tools:lookup --max-completion-length 64" in evaluated.stderr
    described = json.loads((project / "runs/eval/results.json").read_text("utf-8"))
    assert described["tools"]["offered"] == ["lookup"]
    assert described["settings"]["max_completion_length"] == 64


@pytest.fixture(scope="module")
def pages_folder(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all that the pages' commands name."""
    folder = tmp_path_factory.mktemp("pages") / "my-agent"
    shutil.copytree(project, folder)
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def said(
    pages_folder: Path, environment: dict[str, str], outputs: list[str]
) -> dict[PageCommand, tuple[int | None, str]]:
    """Exit status and output of each of the pages' commands in `AT_ONCE`. A status of None is a traceback."""
    with Loopback(completions(lambda prompt: "<answer>\\boxed{1}</answer>")) as server:
        words = [each.words() for each in AT_ONCE]
        given = json.dumps(words).replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, given],
            **{"cwd": pages_folder, "env": environment, "capture_output": True, "text": True, "check": False},
        )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((pages_folder / "answers.json").read_text("utf-8"))
    outputs += [done.stdout, done.stderr, *(text for _, text in answers)]
    return {each: (status, text) for each, (status, text) in zip(AT_ONCE, answers, strict=True)}


@pytest.mark.parametrize("shown", AT_ONCE, ids=lambda each: f"{each.page}: {each.text}")
def test_a_command_on_a_page_works(said: dict[PageCommand, tuple[int | None, str]], shown: PageCommand) -> None:
    status, text = said[shown]
    assert status == 0, text


@pytest.mark.parametrize(("text", "output"), [(TRAINING, "mine"), (COLD_START, "my-sft")])
def test_a_shipped_configuration_on_a_page_trains(quick: Command, pages_folder: Path, text: str, output: str) -> None:
    quick(pages_folder, *words_of(text))
    assert (pages_folder / f"runs/quickstart/{output}/model.safetensors").exists()


def words_of(text: str) -> list[str]:
    """The words of a page's command, made small."""
    return next(each for each in PAGE_COMMANDS if each.text == text).words()


def test_the_quickstart_runs_to_its_end(command: Command, tmp_path: Path) -> None:
    done = command(tmp_path, "--output", "q", call=[sys.executable, "-c", SMALL_QUICKSTART])
    shown = done.stdout
    assert shown.startswith("The quickstart builds a tiny model")
    assert shown.index("Stage 1") < shown.index("Held-out accuracy") < shown.index("Stage 2") < shown.index("One tree")
    tree = shown[shown.index("One tree") : shown.index("─ Result")]
    assert re.search(r"\+ \d extra", tree) and "── branch 0," in tree  # a fork, and what started there
    assert "The greedy accuracy starts high and may not change." in " ".join(shown.split())
    assert done.stderr.count("During a rollout the KV cache takes up to") == 1
    assert done.stderr.count("Model-written Python runs isolated by ") == 2  # once in each process with the tool
    summary = json.loads((tmp_path / "q/summary.json").read_text("utf-8"))
    assert (summary["leaves"], summary["steps"]) == (64, 2)
    assert summary["branches"] + summary["topups"] == 32  # M − N = 4 in each of the 8 groups
    assert {"entropy_after_search", "entropy_after_python", "entropy_elsewhere"} < set(summary)
    history = json.loads((tmp_path / "q/rl/trainer_state.json").read_text("utf-8"))["log_history"]
    for panel in PANELS:
        assert set(panel.lines.values()) <= set(curves(panel, history)), panel.name
    assert (tmp_path / "q/quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "q/rl/model.safetensors").exists()


def test_a_run_is_served_as_a_page_says(pages_folder: Path, environment: dict[str, str]) -> None:
    words = [*words_of(SERVING), "--port", "0"]
    with subprocess.Popen([*CALL, *words], cwd=pages_folder, env=environment, stdout=subprocess.PIPE) as served:
        assert served.stdout is not None
        url = served.stdout.readline().decode().split()[0]
        with urllib.request.urlopen(url) as answer:
            assert b"runs/quickstart/rl" in answer.read()
        served.terminate()


def test_every_command_on_a_page_is_run_or_has_a_reason_not_to_be() -> None:
    """A new command on a page is run by the tests above, or gets a line in `page_commands.NOT_RUN`."""
    assert len(PAGE_COMMANDS) > 150 and len(AT_ONCE) >= 40
    left = [each for each in PAGE_COMMANDS if each.reason is None and not each.text.startswith("arpo-trl ")]
    assert {each.text for each in left} == {"cd my-agent"}
    assert set(APART) <= {each.text for each in PAGE_COMMANDS}
    assert [start for start in NOT_RUN if not any(re.match(start, each.text) for each in PAGE_COMMANDS)] == []


@pytest.mark.usefixtures("pages_folder")  # a copy of the project before this test changes it
def test_a_second_training_does_not_replace_the_first(quick: Command, project: Path) -> None:
    before = (project / "runs/first/model.safetensors").stat().st_mtime_ns
    refused = quick(project, "train", "--config", "config.yaml", status=2)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("ConfigError")]
    assert "output_dir runs/first contains a finished model (model.safetensors) of an earlier run" in line
    assert "Traceback" not in refused.stderr
    assert (project / "runs/first/model.safetensors").stat().st_mtime_ns == before
    saved = ("--save_strategy", "steps", "--save_steps", "1")
    quick(project, *words_of(AGAIN), *saved)
    assert len(list((project / "runs/first/trajectories").glob("*.jsonl"))) == 1
    resumed = ("--max_steps", "2", "--resume_from_checkpoint", "true")
    quick(project, *shlex.split(AGAIN)[1:], *saved, *resumed)  # of a model with tied weights
    assert len(list((project / "runs/first/trajectories").glob("*.jsonl"))) == 2


def test_the_cold_start_of_a_project_trains(quick: Command, project: Path) -> None:
    quick(project, "sft", "--config", "sft.yaml", "--max_steps", "2")
    assert (project / "runs/sft/model.safetensors").exists()
    refused = quick(project, "sft", "--config", "sft.yaml", "--max_steps", "2", status=2)
    assert "contains a finished model" in refused.stderr


def test_a_shipped_configuration_is_found_by_its_name(quick: Command, tmp_path: Path) -> None:
    """Its files are not there: the error is that of the training program, with its exit status."""
    refused = quick(tmp_path, "train", "--config", "quickstart", "--accelerate", "single", status=2)
    (line,) = [line for line in refused.stderr.splitlines() if "Error: " in line]
    assert "runs/quickstart" in line


def test_an_earlier_quickstart_is_not_replaced(quick: Command, tmp_path: Path) -> None:
    (tmp_path / "q/rl").mkdir(parents=True)
    (tmp_path / "q/rl/model.safetensors").touch()
    refused = quick(tmp_path, "quickstart", "--output", "q", status=2)
    assert "--output q/rl contains a finished model (model.safetensors)" in refused.stderr


@pytest.mark.usefixtures("project", "said")
def test_no_output_has_noise(outputs: list[str]) -> None:
    """The last test of this file, after all commands."""
    assert [line for text in outputs for line in text.splitlines() if NOISE.search(line)] == []
