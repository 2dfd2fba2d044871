import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

import arpo_trl
from arpo_trl import command_line
from arpo_trl.errors import ConfigError
from arpo_trl.logs.trajectories import LoggedTree, TrajectoryLog
from arpo_trl.rollout.tree import BranchDecision, RolloutTree, StopReason
from arpo_trl.tools.builtin import ToolArguments, build_tools
from support import ANSWER, Scripted, command_output, run_command


@pytest.fixture
def log(tmp_path) -> Path:
    """A log of two trees: groups 0 and 1."""
    rollout = Scripted(lambda r, c: "<search>iron</search>" if r.key[-1] == 0 else ANSWER, leaves=2, at_root=2)(2)
    trees = [
        LoggedTree(step=4, group=i, prompt=f"question {i}", tree=tree, rewards=[1.0, 0.0], advantages=[0.7, -0.7])
        for i, tree in enumerate(rollout.trees)
    ]
    path = TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("step-000004", trees)
    assert path is not None
    return path


def test_a_terminal_without_a_character_shows_a_question_mark(log, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "latin-1"))
    assert run_command(monkeypatch, "tree", log) == 0
    sys.stdout.flush()
    assert b"question 0\n+-- path 0\n|   +-- ? <search>iron</search>" in printed.getvalue()  # ? for the triangle


@pytest.mark.parametrize("command", ["doctor", "new", "tree", "train"])
def test_a_working_folder_that_was_removed_is_an_error_of_every_command(tmp_path, monkeypatch, capsys, command):
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    status, _, error = command_output(monkeypatch, capsys, command, "x")
    assert status == 2
    assert error == "ConfigError: The current folder no longer exists. Change to one that does (cd).\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("tree", "--help"),
        ("eval", "--help"),
        ("cache", "import", "--help"),
        ("merge", "--help"),
        ("push", "--help"),
    ],
)
def test_help_is_a_success(monkeypatch, capsys, arguments):
    status, out, _ = command_output(monkeypatch, capsys, *arguments)
    assert status == 0
    assert out.startswith("usage: arpo-trl")


@pytest.mark.parametrize(
    "arguments", [(), ("plant",), ("tree",), ("tree", "log", "--step", "x"), ("eval",), ("merge", "a")]
)
def test_wrong_usage_exits_with_2(monkeypatch, capsys, arguments):
    status, out, err = command_output(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert "usage: arpo-trl" in err


@pytest.mark.slow
def test_help_waits_for_no_heavy_import():
    code = (
        "import sys\n"
        "from arpo_trl.cli import main\n"
        "sys.argv = ['arpo-trl', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy or status else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "COMMAND" in done.stdout


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("doctor",), ("view",)])
def test_output_that_nobody_reads_any_more_is_no_error(log, words):
    words = (*words, str(log.parent.parent)) if words == ("view",) else words
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from arpo_trl.cli import main; main()"
    with open(writer, "wb") as unread:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], stdout=unread, stderr=subprocess.PIPE, text=True, timeout=120
        )
    # argparse ends a program by itself after its help
    assert (done.returncode, done.stderr) == (0 if "--help" in words else 1, "")


def test_a_broken_pipe_other_than_standard_outputs_keeps_its_traceback():
    @command_line.report_errors
    def main() -> None:
        raise BrokenPipeError("of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        main()


def test_tree_shows_every_tree_of_a_log(monkeypatch, capsys, log):
    status, out, err = command_output(monkeypatch, capsys, "tree", str(log))
    assert (status, err) == (0, "")
    assert "step 4, group 0  question 0" in out and "step 4, group 1  question 1" in out
    assert "<search>iron</search>" in out
    assert "facts about iron" in out
    assert "reward 1.00" in out


def test_tree_shows_one_group_of_a_file(monkeypatch, capsys, log):
    _, out, _ = command_output(monkeypatch, capsys, "tree", str(log), "--group", "1")
    assert "group 1" in out and "group 0" not in out


def test_tree_of_a_run_lists_its_steps_and_shows_one(monkeypatch, capsys, log):
    later = json.loads(log.read_text().splitlines()[0]) | {"step": 5, "prompt": "a later one"}
    (log.parent / "step-000005-rank0.jsonl").write_text(json.dumps(later) + "\n")
    (log.parent / "eval-000004-rank0.jsonl").write_text(json.dumps(later | {"step": 4, "prompt": "held out"}) + "\n")
    (log.parent.parent / "a run").symlink_to(log.parent)
    for folder in (log.parent.parent, log.parent, log.parent.parent / "a run"):
        _, out, _ = command_output(monkeypatch, capsys, "tree", str(folder))
        # two trees of two leaves with rewards 1 and 0; each path searches once
        assert [line.split() for line in out.splitlines()[1:4]] == [
            *(["4", "evaluation", "1", "2", "0.50", "1", "0", "2", "0"],),
            *(["4", "training", "2", "4", "0.50", "2", "0", "4", "0"],),
            *(["5", "training", "1", "2", "0.50", "1", "0", "2", "0"],),
        ]
        assert f"arpo-trl tree {shlex.quote(str(folder))} --step 5" in out
    _, out, _ = command_output(monkeypatch, capsys, "tree", str(log.parent), "--step", "4")
    assert "step 4, group 0, evaluation  held out" in out and "question 1" in out and "later" not in out
    assert "H: mean entropy" in out  # the legend


def test_on_a_narrow_terminal_the_steps_of_a_run_keep_their_numbers(monkeypatch, capsys, log):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = command_output(monkeypatch, capsys, "tree", str(log.parent))
    assert out.splitlines()[1].split() == ["4", "training", "2", "4", "0.50", "2", "0", "4", "0"]


def test_tree_shows_whole_texts_if_requested(monkeypatch, capsys, log):
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[0]["nodes"][1]["text"] = "word " * 100 + "end"
    log.write_text(json.dumps(rows[0]) + "\n")
    assert "word end" not in command_output(monkeypatch, capsys, "tree", str(log))[1]
    assert "word end" in " ".join(
        command_output(monkeypatch, capsys, "tree", str(log), "--full")[1].replace("│", "").split()
    )


def nested(levels: int) -> LoggedTree:
    """A path that forks after each of its results, with long texts, wide characters and words that do not fit."""
    made, parent = RolloutTree([1]), 0
    text = "a long text " * 30 + "鉄の融点は何度ですか" * 20 + "w" * 200 + "\n" + "a second line"
    for depth in range(1, levels + 1):
        parent = made.add_observation(made.add_turn(parent, [1], text, [-0.5], [0.5]).index, [2], [], text).index
        made.nodes[parent].decision = BranchDecision(
            entropy_nats=1.0, delta=0.1, probability=0.5, fires=True, granted=1, reason="drew 0.312"
        )
        made.end(made.add_turn(parent, [1], text, [-0.5], [0.5]).index, (0, depth, 0), StopReason.EOS)
    made.end(made.add_turn(parent, [1], text, [-0.5], [0.5]).index, (0,), StopReason.EOS)
    leaves = levels + 1
    return LoggedTree(step=123456, group=0, prompt=text, tree=made, rewards=[1.0] * leaves, advantages=[0.0] * leaves)


@pytest.mark.parametrize("words", [["-m", "arpo_trl"], ["-m", "arpo_trl.cli"]], ids=str)
def test_the_package_is_a_program_too(words):
    done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"arpo-trl {arpo_trl.__version__}\n")


@pytest.mark.parametrize("full", [False, True])
def test_tree_fits_80_columns(monkeypatch, capsys, tmp_path, full):
    monkeypatch.setenv("COLUMNS", "80")
    TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write(
        "step-123456", [dataclasses.replace(nested(8), group=i) for i in range(20)]
    )
    TrajectoryLog(tmp_path / "trajectories", 1.0, 0, 0).write("eval-123456", [nested(8)])
    _, table, _ = command_output(monkeypatch, capsys, "tree", str(tmp_path))
    *lines, command = table.splitlines()
    # 20 trees of 9 leaves with reward 1, and 8 forks
    assert lines[2].split() == ["123456", "training", "20", "180", "1.00", "0", "160", "0", "0"]
    assert command.endswith(f"arpo-trl tree {tmp_path} --step 123456")  # in one piece, however long
    _, tree, _ = command_output(
        monkeypatch, capsys, "tree", str(tmp_path), "--step", "123456", "--group", "1", *["--full"] * full
    )
    lines += tree.splitlines()
    assert max(map(cell_len, lines)) <= 80
    assert "…" not in table and ("…" in tree) is not full
    assert "branch 0,8,0" in tree and "drew" in tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{folder}/nowhere.jsonl",), "nowhere.jsonl does not exist. Pass the output_dir of a run"),
        (("{folder}/empty",), "empty has no logged trees. Pass the output_dir of a run, or train with"),
        (("{log}", "--group", "2"), "There is no logged tree of group 2; expected one of 0, 1."),
        (("{folder}", "--step", "9"), "has no logged trees of step 9; it has trees of the steps 4."),
        (("{folder}", "--group", "1"), "--group 1 needs a --step"),
        (("{folder}/broken.jsonl",), "broken.jsonl, line 1: not a logged tree"),
    ],
)
def test_a_display_error_is_one_line_and_status_2(monkeypatch, capsys, log, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text("{}\n")
    arguments = [argument.format(folder=tmp_path, log=log) for argument in arguments]
    status, out, err = command_output(monkeypatch, capsys, "tree", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("DataError: ") and message in err
    assert err.count("\n") == 1


def test_a_runs_name_does_not_steer_the_terminal(monkeypatch, capsys, tmp_path, log):
    run_folder = tmp_path / "a\x1b[2J\u202e"
    shutil.copytree(log.parent, run_folder / "trajectories")
    status, out, _ = command_output(monkeypatch, capsys, "tree", str(run_folder))
    assert status == 0
    assert f"arpo-trl tree '{tmp_path}/a␛[2J‹U+202E›' --step" in out


def test_tree_passes_nothing_on_that_steers_the_terminal(monkeypatch, capsys, log):
    hostile = "\x1b]52;c;Y3VybA==\x07\x1b]0;owned\x07\x1b[2J\x9b2J\u202e"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for row in rows:
        row["prompt"] = hostile
        for node in row["nodes"]:
            node["text"] = hostile
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = command_output(monkeypatch, capsys, "tree", str(log))
    assert status == 0
    assert not set(hostile) & set("\x1b\x07\x9b\u202e") & set(out)
    assert out.count("␛]52;c;Y3VybA==␇␛]0;owned␇␛[2J‹U+009B›2J‹U+202E›") >= 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("judge_url: http://[::1/v1\njudge_model: wise", "ConfigError: judge_url must be an address like http"),
        (
            "judge_url: http://me:hunter2@h/v1\njudge_model: wise",
            "ConfigError: judge_url must be an address like http",
        ),
        ("limit: " + "[" * 3000, r"ConfigError: .*config\.yaml: lists and mappings are nested more than 100 deep"),
        (
            "limit: " + "[" * 101 + "]" * 101,
            r"ConfigError: .*config\.yaml: lists and mappings are nested more than 100",
        ),
        ("limit: 2025-01-31", r"ConfigError: limit is '2025-01-31'; expected an integer"),
        ("limit: [", r"ConfigError: .*config\.yaml is not valid YAML"),
        ("limit: \udcff", r"ConfigError: .*config\.yaml is not UTF-8 text \(byte 7\)"),
    ],
)
def test_settings_of_eval_that_cannot_be_read_are_one_line(monkeypatch, capsys, tmp_path, config, message):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    path = tmp_path / "config.yaml"
    path.write_bytes(f"{config}\nmodel: m\ndata: {tmp_path}\n".encode("utf-8", "surrogateescape"))
    status, out, err = command_output(monkeypatch, capsys, "eval", "--config", str(path))
    assert (status, out) == (2, "")
    assert re.match(message, err.splitlines()[-1]) and "hunter2" not in err


def test_eval_names_an_unknown_tool(monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1", "answer": "2", "task": "math"}) + "\n")
    status, _, err = command_output(
        monkeypatch,
        capsys,
        *("eval", "--model", "unused", "--data", str(tmp_path / "rows.jsonl"), "--tools", "calculator"),
    )
    assert status == 2
    assert "ConfigError: tools is ['calculator']; expected a list of some of" in err


def test_errors_of_ours_are_one_line_and_others_keep_their_traceback(capsys):
    @command_line.report_errors
    def ours() -> None:
        raise ConfigError("a setting is wrong")

    @command_line.report_errors
    def another() -> None:
        raise KeyError("a bug")

    with pytest.raises(SystemExit) as end:
        ours()
    assert end.value.code == 2
    assert capsys.readouterr().err == "ConfigError: a setting is wrong\n"
    with pytest.raises(KeyError, match="a bug"):
        another()


def test_index_builds_and_saves_an_index(monkeypatch, capsys, tmp_path):
    (tmp_path / "passages.jsonl").write_text('"iron melts"\n{"title": "Tin", "text": "it melts too"}\n')
    folder = tmp_path / "index"
    status, out, _ = command_output(monkeypatch, capsys, "index", str(tmp_path / "passages.jsonl"), str(folder))
    assert (status, out) == (0, f"2 passages indexed in {folder}\n")
    (search,) = build_tools(ToolArguments(["search"], search_index=str(folder)))
    assert search("tin") == "Page 1: Tin: it melts too"
    status, _, err = command_output(monkeypatch, capsys, "index", str(tmp_path / "nothing.jsonl"), str(folder))
    assert (status, err.count("\n")) == (2, 1)


def test_an_index_that_does_not_fit_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*_: object, **__: object) -> None:
        raise OSError("300000 requested and 16352 written")  # numpy's words

    (tmp_path / "passages.jsonl").write_text('"iron melts"\n')
    monkeypatch.setattr("bm25s.BM25.save", full)
    folder = tmp_path / "index"
    status, out, err = command_output(monkeypatch, capsys, "index", str(tmp_path / "passages.jsonl"), str(folder))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"OSError: The disk is full: {folder} cannot be written (No space left on device); ")


def test_a_released_cache_is_imported_answers_and_is_exported(monkeypatch, capsys, tmp_path):
    released, cache, out_file = tmp_path / "search_cache.json", str(tmp_path / "c.sqlite"), tmp_path / "out.json"
    released.write_text(json.dumps({"capital of france": "Page 1: Paris."}))
    status, out, err = command_output(
        monkeypatch, capsys, "cache", "import", cache, str(released), "--provider", "brightdata"
    )
    assert (status, out, err) == (0, f"1 queries imported from {released}\n", "")
    (search,) = build_tools(
        ToolArguments(
            ["search"], search_provider="brightdata", search_zone="z", search_cache=cache, search_cache_mode="offline"
        )
    )
    assert search("Capital of France") == "Page 1: Paris."
    assert command_output(monkeypatch, capsys, "cache", "export", cache, str(out_file))[0] == 0
    assert json.loads(out_file.read_text()) == {"capital of france": "Page 1: Paris."}
    counted = json.loads(command_output(monkeypatch, capsys, "cache", "stats", cache)[1])
    assert counted["results"] == {"brightdata": {"found": 1, "empty": 0, "failed": 0}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "nowhere.sqlite"), "There is no search cache nowhere.sqlite"),
        (("import", "c.sqlite", "nowhere.json", "--provider", "serper"), "nowhere.json cannot be read"),
        (
            ("import", "c.sqlite", "in.json", "--provider", "serper", "--top-k", "-3"),
            "--top-k is -3; expected an integer",
        ),
        (("import", "c.sqlite", "in.json", "--provider", "serper", "--top-k", "0"), "of at least 1."),
        (("import", "c.sqlite", "nowhere.json", "--provider", "google"), "no search provider 'google'"),
    ],
)
def test_a_cache_command_that_cannot_work_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = command_output(monkeypatch, capsys, "cache", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
