"""The commands of `arpo-trl` that start, prepare or inspect a run."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config import config_args
from accelerate.commands.launch import launch_command_parser
from trl import GRPOConfig, SFTConfig

from arpo_trl.commands import ask, doctor, new
from arpo_trl.commands.launch import LAUNCH_FLAGS, _check_nodes, launch, split_words
from arpo_trl.commands.project import my_rewards, my_tools
from arpo_trl.commands.training_help import HELP_FILE, as_json, collect, print_help
from arpo_trl.common.imports import is_import_path, load_callable
from arpo_trl.common.parser import SettingsParser
from arpo_trl.common.shipped import ACCELERATE_CONFIGS, CONFIGS, file_or_shipped, shipped_file, shipped_names
from arpo_trl.common.trl_settings import MEANINGS
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.data.prompts import tags_system_prompt
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.quickstart.task import write_lines
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.python import sandbox
from forked import Fork
from support import can_isolate, save_tiny_model, script

ROOT = Path(__file__).parents[1]


# Launching -----------------------------------------------------------------------------------------------------------


def test_flags_of_accelerate_go_to_accelerate_and_all_others_to_the_program() -> None:
    words = [
        "--num_processes",
        "2",
        "--config",
        "quickstart",
        "--seed",
        "1",
        "--machine-rank=1",
        "--accelerate",
        "zero3",
    ]
    for_accelerate, for_program = split_words(words)
    zero3 = str(ROOT / "accelerate_configs/zero3.yaml")
    assert for_accelerate == ["--num_processes", "2", "--machine_rank", "1", "--config_file", zero3]
    assert for_program == ["--config", str(ROOT / "configs/quickstart.yaml"), "--seed", "1"]
    arguments = launch_command_parser().parse_args([*for_accelerate, "--module", "program", *for_program])
    assert (arguments.training_script, arguments.training_script_args) == ("program", for_program)


def test_a_flag_is_accelerates_or_a_setting_but_not_both() -> None:
    settings = {field.name for kind in script("train").SETTINGS for field in dataclasses.fields(kind)}
    assert settings.isdisjoint({"accelerate", "config", *LAUNCH_FLAGS})
    known = launch_command_parser().parse_args(["program"])
    assert all(hasattr(known, name) for name in LAUNCH_FLAGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate", "zero4"], r"no shipped configuration 'zero4'; expected one of \['ddp'"),
        (["--config", "quick"], r"no shipped configuration 'quick'"),
        (["--config", "mine.yaml"], "mine.yaml does not exist"),
        (["--config"], "--config is set without a value"),
        (["--config", "quickstart", "--config=quickstart"], "--config is set twice"),
        (["--config", "."], "The configuration . is a folder"),
        (["--accelerate", "ddp", "--config_file", "mine.yaml"], "both set, or set twice"),
    ],
)
def test_a_configuration_that_is_not_there_is_an_error_before_the_launch(words, message) -> None:
    with pytest.raises(ConfigError, match=message):
        split_words(words)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_pipe_is_no_configuration(tmp_path, is_there) -> None:
    pipe = tmp_path / "pipe" if is_there else Path("/dev/fd/987654")  # of another process
    if is_there:
        os.mkfifo(pipe)
    with pytest.raises(DataError, match=f"{pipe} is a pipe, which cannot be read here; expected a file. Save"):
        split_words(["--config", str(pipe)])


@pytest.mark.parametrize("given", ["quickstart_shop", str(shipped_file(CONFIGS, "quickstart_shop"))])
@pytest.mark.parametrize("program", ["train", "sft"])
def test_the_configuration_of_the_shop_is_refused_with_the_command_that_takes_it(program, given, capsys) -> None:
    with pytest.raises(
        ConfigError, match=r"accelerate launch -m arpo_trl\.quickstart\.shop\.train --config /.*\.yaml\."
    ):
        launch(f"arpo_trl.scripts.{program}", ["--config", given])
    assert print_help(program, ["--help"])
    assert "quickstart_shop" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--num_processes", "--num_machines"])
def test_several_processes_need_a_configuration_that_starts_them(tmp_path, flag) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "accelerate_configs/single.yaml").read_text("utf-8"), "utf-8")
    for configuration in (["--accelerate", "single"], ["--config_file", str(own)]):
        with pytest.raises(ConfigError, match=rf"{flag} is 4, but .* starts one process .* --accelerate ddp"):
            launch("arpo_trl.scripts.train", [*configuration, flag, "4"])


SAVES = """
import pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: (time.sleep(0.5), pathlib.Path("saved").touch(), sys.exit(128 + number)))
pathlib.Path("there").touch()
signal.pause()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["single"], signal.SIGTERM),
        (["single"], signal.SIGINT),  # without a terminal, which would send it to the program too
        (["ddp", "--num_processes", "1"], signal.SIGTERM),
    ],
)
def test_a_signal_to_the_command_alone_reaches_the_program_which_the_command_waits_for(
    tmp_path, words, number
) -> None:
    (tmp_path / "program.py").write_text(SAVES, "utf-8")
    command = ["-m", "arpo_trl.commands.launch", "program.py", "--accelerate", *words]
    process = Fork(command, cwd=tmp_path, env=os.environ, log=tmp_path / "log")
    try:
        end = time.monotonic() + 120.0
        while not (tmp_path / "there").exists() and time.monotonic() < end:
            assert process.poll() is None, (tmp_path / "log").read_text("utf-8")
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60.0) == 128 + number
    finally:
        process.kill()
    assert (tmp_path / "saved").exists() and "Traceback" not in (tmp_path / "log").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs namespaces")
def test_a_sigterm_ends_the_first_process_of_a_container(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, time\nfrom arpo_trl.command_line import report_errors\n"
        "report_errors(lambda: (pathlib.Path('there').touch(), time.sleep(600)))()\n"
    )
    isolated = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("needs namespaces")
    process = psutil.Popen([*isolated, sys.executable, str(program)], cwd=tmp_path)
    try:
        end = time.monotonic() + 60.0
        while not (tmp_path / "there").exists() and time.monotonic() < end:
            time.sleep(0.02)
        (first,) = process.children()
        first.terminate()
        assert process.wait(60.0) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--config_file", None, r"The accelerate configuration .*own\.yaml cannot be read \(FileNotFoundError: "),
        ("--config_file", "a: [1", r"cannot be read \(ParserError: "),
        ("--config_file", "- 1", r"cannot be read \(AttributeError: "),
        ("--config_file", "use_cpu: true", r"\(ValueError: .*distributed_type.*\)\. Correct it, or .* ddp"),
        (None, "a: [1", r"cannot be read \(ParserError: "),
    ],
)
def test_a_configuration_that_accelerate_cannot_read_is_one_line(tmp_path, monkeypatch, flag, text, message) -> None:
    own = tmp_path / "own.yaml"
    if text is not None:
        own.write_text(text, "utf-8")
    monkeypatch.setattr(config_args, "default_config_file", str(own))
    with pytest.raises(ConfigError, match=message) as raised:
        launch("arpo_trl.scripts.train", [flag, str(own)] if flag else [])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "two"], r"--num_processes: 'two'; expected an integer\."),
        (["--mixed_precision=fp12"], r"--mixed_precision: invalid choice: 'fp12' \(choose from .*\)\."),
    ],
)
def test_a_flag_that_accelerate_rejects_is_one_line(capsys, words, message) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        launch("arpo_trl.scripts.train", words)
    assert "usage" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ddp --gpu_ids 0", r"accelerate cannot run .*ddp\.yaml \(ValueError: Less than two GPU ids .*\)\. Correct"),
        ("zero2 --num_processes 0", "num_processes is 0; expected at least 1"),
        ("zero3 --num_machines 2", "num_machines is 2, .* program deepspeed .* --accelerate multi_node_zero3"),
        ("ddp --num_machines 2", "num_machines is 2, but main_process_ip is not set"),
        ("multi_node_zero3", "num_machines is 2, but main_process_ip is not set"),
        ("multi_node_zero3 --main_process_ip a --machine_rank 2", "machine_rank is 2; expected .* from 0 to 1"),
        ("multi_node_zero3 --main_process_ip a --num_machines 3", "num_processes is 16: .* on all nodes together"),
    ],
)
def test_processes_that_cannot_form_a_run_are_an_error_before_they_start(monkeypatch, words, message) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(ConfigError, match=message):
        launch("no/program.py", ["--accelerate", *words.split()])


def test_nodes_of_a_job_start_as_the_documentation_shows() -> None:
    configuration = config_args.load_config_from_file(str(ROOT / "accelerate_configs/multi_node_zero3.yaml"))
    flags = {"main_process_ip": "node1", "num_processes": None, "num_machines": None, "machine_rank": 1}
    _check_nodes(Namespace(**flags), configuration)
    _check_nodes(Namespace(**flags | {"num_processes": 32, "num_machines": 4, "machine_rank": 3}), configuration)
    _check_nodes(Namespace(**flags | {"num_processes": 8, "num_machines": 1, "machine_rank": None}), configuration)


def test_every_configuration_of_the_checkout_has_a_name(tmp_path, monkeypatch) -> None:
    for kind in (CONFIGS, ACCELERATE_CONFIGS):
        assert shipped_names(kind) == sorted(file.stem for file in (ROOT / kind).glob("*.yaml"))
    monkeypatch.chdir(tmp_path)
    assert file_or_shipped(CONFIGS, "quickstart") == shipped_file(CONFIGS, "quickstart")
    (tmp_path / "quickstart").touch()  # a file of the user comes first
    assert file_or_shipped(CONFIGS, "quickstart") == Path("quickstart")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_or_shipped(CONFIGS, "~/quickstart") == tmp_path / "quickstart"


# Help ----------------------------------------------------------------------------------------------------------------


def test_the_help_has_every_setting_of_ours_as_it_is_now() -> None:
    """If this fails after a change of a setting, run `python -m arpo_trl.commands.training_help`."""
    assert HELP_FILE.read_text("utf-8") == as_json(collect())


def test_the_help_shows_our_settings_with_range_and_default(capsys) -> None:
    assert print_help("train", ["--help"])
    shown = capsys.readouterr().out
    for text in (
        "--branch_rule",
        "--reward",
        "--tools",
        "--accelerate NAME",
        "vllm_reasoning_qwen2.5_7b",
        "--help-all",
    ):
        assert text in shown
    assert "At least 2. (default: 16)" in " ".join(shown.split())
    assert shown.index("--num_generations") < shown.index("--learning_rate")
    assert not print_help("train", ["--config", "quickstart"])


@pytest.mark.parametrize("program", ["train", "sft"])
def test_a_setting_of_trl_means_the_same_in_both_helps(program, capsys) -> None:
    kinds = script(program).SETTINGS
    whole = {action.dest: action.help for action in SettingsParser(kinds)._actions}
    own = {"train": "vllm_server_timeout", "sft": "max_length"}[program]
    for name in (own, "resume_from_checkpoint", "save_on_each_node"):
        assert whole[name] == MEANINGS[name]
    assert print_help(program, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert MEANINGS["resume_from_checkpoint"] in shown
    assert (MEANINGS["max_length"] in shown) == (program == "sft")


def test_every_meaning_is_of_a_setting_of_trl_or_transformers() -> None:
    theirs = {field.name for kind in (SFTConfig, GRPOConfig) for field in dataclasses.fields(kind)}
    ours = {name for kind in script("train").SETTINGS for name in vars(kind).get("__annotations__", ())}
    assert theirs >= MEANINGS.keys()
    assert not MEANINGS.keys() & (ours | {field.name for field in dataclasses.fields(EvalSettings)})


def test_an_option_before_the_question_is_an_error(capsys) -> None:
    with pytest.raises(SystemExit):
        ask.main(["run", "--system-prompt", "Be brief", "Why?"])
    assert "an option stands before the question" in capsys.readouterr().err


# Import paths --------------------------------------------------------------------------------------------------------


def test_a_tool_and_a_reward_are_imported_from_the_current_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_code.py").write_text(
        "def weather(city: str) -> str:\n    return city\ndef good(**_): ...\nclass Good: ...\nn = 1\n"
    )
    (tmp_path / "site-packages").mkdir()
    for name, text in (
        ("broken", "import broken_part"),
        ("broken_part", "\nn"),
        ("cut", "("),
        ("ends", "import argparse\nargparse.ArgumentParser().parse_args(['--port'])"),
        ("needs", "import no_such"),
        ("reads", "import os\n\nKEY = os.environ['NO_SUCH_KEY']"),
        ("asks", "import site_library\n\nsite_library.ask()"),
        ("site-packages/site_library", "def ask():\n    raise OSError('no server')"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    (tool,) = build_tools(ToolArguments(tools=["own_code:weather"]))
    assert tool("Oslo") == "Oslo"
    arguments = script("train").TrainArguments(dataset="rows.jsonl", reward="own_code:good")
    (reward,) = script("train").make_rewards(arguments)
    assert reward.__name__ == "good"
    message = r"'own_code:Good', which is a class.*`reward = Good\(\)` to own_code, and set reward: own_code:reward\."
    with pytest.raises(ConfigError, match=message):
        script("train").make_rewards(script("train").TrainArguments(dataset="rows.jsonl", reward="own_code:Good"))
    for path, message in (
        ("own_code:n", r"has no function or class 'n'; it has \['Good', 'good', 'weather'\]"),
        ("no_such_module:f", "no_such_module cannot be imported .ModuleNotFoundError"),
        ("own_code", "expected an import path such as"),
        ("broken:f", r"broken cannot be imported \(NameError: .*'n'.*\)\. It fails in .*broken_part.py, line 2\."),
        ("ends:f", r"'ends:f', but ends ends the program when .* \(2\)\. It fails in .*ends.py, line 2\. .*__main__"),
        ("cut:f", r"cut cannot be imported \(SyntaxError: .*cut.py, line 1\)\)\.$"),
        ("needs:f", r"No module named 'no_such'\)\. It fails in .*needs.py, line 1\."),
        ("reads:f", r"\(KeyError: 'NO_SUCH_KEY'\)\. It fails in .*reads.py, line 3\."),
        ("asks:f", r"\(OSError: no server\)\. It fails in .*asks.py, line 3\."),
    ):
        with pytest.raises(ConfigError, match=message):
            load_callable(path, "reward")
    with pytest.raises(ConfigError, match="reward is set, so accuracy and the judge are not used"):
        script("train").TrainArguments(dataset="rows.jsonl", reward=["own_code:good"], accuracy="paper_f1")


@pytest.mark.slow
def test_a_reward_of_a_configuration_reads_the_other_fields_of_rows_without_answers(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "golden.py").write_text(
        "def count(completions, gold):\n    return [float(len(words)) for words in gold]\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "Name a fruit.", "gold": ["fig", "date"]}\n', "utf-8")
    settings = {
        "model_name_or_path": save_tiny_model(tmp_path / "model"), "dataset": "rows.jsonl",
        "eval_dataset": "rows.jsonl", "reward": "golden:count", "output_dir": "run", "tools": [], "use_cpu": True,
        "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 8, "max_steps": 1,
        "num_generations_eval": 1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "mine.yaml"])
    script("train").main()
    history = json.loads((tmp_path / "run/trainer_state.json").read_text("utf-8"))["log_history"]
    assert [row["reward"] for row in history if "reward" in row] == [2.0]
    assert [row["eval_reward"] for row in history if "eval_reward" in row] == [2.0]


@pytest.mark.parametrize(("text", "is_path"), [("a:b", 1), ("a.b:c", 1), ("a", 0), ("a:", 0), (":b", 0), ("a b:c", 0)])
def test_an_import_path_has_a_module_and_a_name(text, is_path) -> None:
    assert is_import_path(text) == bool(is_path)


def test_a_tool_that_is_neither_built_in_nor_an_import_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tools is \['serch'\]; expected a list of some of \['search', 'python'"):
        ToolArguments(tools=["serch"])


# new and doctor ------------------------------------------------------------------------------------------------------


def test_the_project_is_consistent() -> None:
    settings = yaml.safe_load((new.TEMPLATE / "config.yaml").read_text("utf-8"))
    assert settings["tools"] == ["my_tools:lookup"] and settings["reward"] == "my_rewards:exact"
    assert len(new.make_questions()) == len(my_tools.CAPITALS) == 35
    assert my_tools.lookup(" France ") == "The capital of France is Paris."
    assert my_tools.lookup("Atlantis") == "There is no country Atlantis."
    turns = [["<lookup>France</lookup>", "<answer>\\boxed{Paris}</answer>"], ["<answer>\\boxed{Rome}</answer>"], ["x"]]
    assert my_rewards.exact(turns=turns, answer=[["Paris"]] * 3) == [1.0, 0.1, 0.0]


def test_the_questions_of_the_project_get_a_system_prompt_once_its_line_is_removed(tmp_path) -> None:
    settings = yaml.safe_load((new.TEMPLATE / "config.yaml").read_text("utf-8"))
    file = tmp_path / settings["dataset"]
    write_lines(file, new.make_questions())
    described = tags_system_prompt([my_tools.lookup])
    asked = {"role": "user", "content": "What is the capital of Albania?"}
    for system, messages in (
        (settings["system_prompt"], [asked]),
        (None, [{"role": "system", "content": described}, asked]),
    ):
        rows = load_arpo_dataset(str(file), system_prompt=system, own_reward=True, default_system_prompt=described)
        assert rows[0]["prompt"] == messages and rows[0]["answer"] == ["Tirana"]


@pytest.mark.parametrize(
    "form", ["{}", "It is {}, in Europe.", "\nIt is\n{}\n", tags_system_prompt([my_tools.lookup])]
)
@pytest.mark.parametrize("answer", ["Paris", "\\text{Paris}", "{1}, {2}"])
def test_the_reward_of_the_project_finds_an_answer_in_the_form_of_the_system_prompt(form, answer) -> None:
    asked = re.search(r"<answer>.*</answer>", form)  # in the system prompt: a short conclusion, \boxed{the answer}
    box = f"\\boxed{{{answer}}}"
    text = asked[0].replace(r"\boxed{the answer}", box) if asked else f"<answer>{form.replace('{}', box)}</answer>"
    turns = [["<lookup>France</lookup>", f"<think>I know.</think>\n{text}"]]
    assert box in text
    assert my_rewards.exact(turns=turns, answer=[[answer]]) == [1.0]
    assert my_rewards.exact(turns=turns, answer=[["Rome"]]) == [0.1]


def test_many_demonstrations_are_wrong_and_most_are_right() -> None:
    rows = new.make_demonstrations(seed=0)
    answers = {f"What is the capital of {country}?": capital for country, capital in my_tools.CAPITALS.items()}
    right = [answers[row["messages"][0]["content"]] in row["messages"][-1]["content"] for row in rows]
    assert 0.4 < sum(right) / len(rows) < 0.8


def test_a_project_does_not_replace_a_folder(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        new.main([str(tmp_path)])
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        new.main([str(tmp_path / "link")])


def test_the_doctor_names_keys_but_not_their_values(monkeypatch, capsys) -> None:
    monkeypatch.setenv("SERPER_API_KEY", "secret-value")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.keys, doctor.space))
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 0)
    monkeypatch.setattr(doctor, "LEAST_MEMORY_GB", 0)
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert "SERPER_API_KEY" in shown and "secret-value" not in shown


def test_the_doctor_finds_a_package_that_has_no_metadata(monkeypatch, tmp_path) -> None:
    """A checkout of vLLM on the path, or a folder of it that was copied, has none."""
    monkeypatch.setattr(doctor, "EXTRAS", {"bare_package": "a test", "absent_package": "another"})
    (tmp_path / "bare_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.subject: finding for finding in doctor.packages()}
    assert (found["bare_package"].verdict, found["bare_package"].text) == ("ok", "version unknown: a test")
    assert found["absent_package"].text == "is not installed: no another"


def test_the_doctor_names_an_optional_package_of_a_version_that_cannot_be_used(monkeypatch) -> None:
    version = metadata.version
    versions = {"mcp": "1.12", "vllm": "0.31.0+cpu", "deepspeed": "0.1"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or version(name))
    found = {finding.subject: finding for finding in doctor.packages()}
    assert [found[name].verdict for name in ("mcp", "vllm", "deepspeed")] == ["note", "ok", "note"]
    assert found["mcp"].text == (
        "is 1.12; expected <3,>=2.3 for tools of MCP servers. To install it: pip install 'mcp<3,>=2.3'"
    )


def test_the_doctor_looks_at_the_cache_that_is_used_and_notes_one_that_cannot_be_used(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    *_, cache = doctor.space()
    assert (cache.subject, cache.verdict) == ("disk, model cache", "ok")
    assert cache.text.endswith(f"GB free in {tmp_path / 'hub'}")

    (tmp_path / "file").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    *_, cache = doctor.space()
    assert cache.verdict == "note"
    assert cache.text == f"{tmp_path / 'file' / 'hub'} cannot be written: set HF_HOME to a folder of yours"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.disk_usage", denied)
    *_, cache = doctor.space()
    assert cache.verdict == "note"
    assert cache.text == f"{tmp_path / 'hub'} cannot be read (Permission denied): set HF_HOME to a folder of yours"


def test_the_doctor_fails_if_training_cannot_work(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.space,))
    monkeypatch.setattr(doctor, "LEAST_DISK_GB", 1e9)
    assert doctor.main([]) == 1
    assert "expected at least 1e+09 GB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_doctor_tests_the_isolation_of_code(monkeypatch) -> None:
    (found,) = doctor.sandbox()
    if any(map(can_isolate, sandbox.ISOLATING)):
        assert found.verdict == "ok" and re.fullmatch("isolates code by (sandlock|namespaces)", found.text)
    else:
        assert found.verdict == "note" and found.text.startswith("cannot isolate code here: sandlock: ")
    monkeypatch.setattr(sandbox, "ISOLATING", (sandbox.Tier.UNSAFE,))
    (found,) = doctor.sandbox()
    assert (found.subject, found.verdict) == ("python tool", "note")
    assert found.text.startswith("cannot isolate code here: unsafe: the sandbox does not isolate Python code here: ")
    assert found.text.endswith(". Remove python from tools, or set python_executor_url")


def test_the_doctor_names_the_devices_with_their_memory_and_what_they_lack(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    (found,) = doctor.devices()
    assert (found.verdict, found.text) == ("note", "no accelerator: training runs on 3 CPU cores")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for name, answer in {
        "is_available": True, "device_count": 2, "mem_get_info": (70e9, 80e9), "get_device_name": "H100",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    new, newer, both = doctor.devices()
    assert (new.subject, new.verdict, new.text) == ("GPU 0", "ok", "H100, 70 of 80 GB free")
    assert newer.subject == "GPU 1"
    assert both.text == "to use all: arpo-trl train --accelerate zero3 --num_processes 2 --config …"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    (old,) = doctor.devices()
    assert old.verdict == "note" and old.text.endswith("; no bfloat16: set bf16: false and fp16: true")
