"""`arpo-trl view`: the content of the page, its content security policy, and its behaviour in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.common.user_files import read_json
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.logs.curves import PANELS, curves
from arpo_trl.logs.metrics import Tally
from arpo_trl.logs.trajectories import LoggedTree, TrajectoryLog, logged_trees, read_trees
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import RolloutTree, StopReason
from arpo_trl.tools.calls import ToolFailure
from arpo_trl.viewing.history import history_of_tallies, tally_logged, whole_history
from arpo_trl.viewing.page import changes, index_of, newest, page
from arpo_trl.viewing.page_tree import as_json, summary, tree_data
from arpo_trl.viewing.run import LogFile, RunReader, log_history
from arpo_trl.viewing.server import ViewServer
from browser import Tab
from support import Scripted, one_fork, one_search, run_command

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def logged(
    step: int = 4, group: int = 0, text: str = "1538 degrees", failure: ToolFailure | None = None
) -> LoggedTree:
    """The tree `one_fork`."""
    return LoggedTree(
        step=step,
        group=group,
        prompt=f"question {group}: {text}",
        tree=one_fork(text, text, failure),
        rewards=[1.0, -1.0],
        advantages=[0.75, -0.75],
        rule={"name": "threshold", "branch_threshold": 0.5},
        answers=["1538"],
        spans={1: (0.0, 0.5), 2: (0.5, 0.75), 3: (0.75, 1.0), 4: (0.75, 1.25)},
    )


def flat(step: int, group: int, rewards: list[float | None], entropy: float = 0.5) -> LoggedTree:
    """Paths of one turn each."""
    made = RolloutTree([1])
    for i in range(len(rewards)):
        made.end(made.add_turn(0, [1], "an answer", [-0.5], [entropy]).index, (i,), StopReason.EOS)
    return LoggedTree(
        step=step, group=group, prompt=f"flat {group}", tree=made, rewards=rewards, advantages=[0.0] * len(rewards)
    )


def file(name: str = "step-000004-rank0.jsonl") -> LogFile:
    found = LogFile.of(Path(name))
    assert found is not None
    return found


def save(run: Path, *trees: LoggedTree, name: str = "step-000004") -> Path:
    path = TrajectoryLog(run / "trajectories", 1.0, 0, 0).write(name, trees)
    assert path is not None
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps: a plain group, and one with a failed call and hostile text."""
    folder = tmp_path / "run"
    save(folder, logged(3), name="step-000003")
    save(folder, logged(), logged(group=1, text=HOSTILE, failure=ToolFailure.TIMEOUT))
    history = [{"step": 4, "reward": 0.25, "arpo/entropy/root": 0.5}, {"step": 5, "reward": 0.5}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def read(folder: Path, max_leaves: int = 20_000) -> RunReader:
    reader = RunReader(folder, max_leaves)
    reader.refresh()
    return reader


def blocks(html: str) -> list[Any]:
    """The JSON in the page: the index, then the trees."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)]


# Data ----------------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_group_counts_its_tree() -> None:
    assert summary(file(), 0, logged(failure=ToolFailure.TIMEOUT)) == {
        **{"key": "step-000004-rank0.jsonl:0", "file": "step-000004-rank0.jsonl", "kind": "step", "step": 4},
        **{"group": 0, "prompt": "question 0: 1538 degrees", "rewards": [1.0, -1.0]},
        # one of the two turns under the result is a branch; turns of 2, 1 and 1 tokens; the means are 0.5, 1.5, 0.5
        **{"branches": 1, "calls": 1, "failed": 1, "tokens": 4, "highest": 1.5},
    }


def test_a_trees_data_have_tokens_by_role_decisions_and_outcomes() -> None:
    data = tree_data(logged())
    assert (data["prompt_tokens"], [node["tokens"] for node in data["nodes"]]) == (3, [3, 2, 1, 1, 1])
    assert data["leaf_tokens"] == 8  # two paths of 2 + 1 + 1
    assert data["rule"] == {"name": "threshold", "branch_threshold": 0.5}
    first, seen, own, branch = data["nodes"][1:]
    assert seen["decision"] == {
        **{"entropy_nats": 1.0, "delta": 0.125, "probability": 0.525, "fires": True, "granted": 1},
        "reason": "drew 0.312",
    }
    assert (first["path"], own["path"], branch["path"]) == ("0", "0", "0,1,0")
    assert branch["end"] == {"address": (0, 1, 0), "reward": -1.0, "advantage": -0.75, "tokens": 4}
    assert (branch["stop"], branch["span"]) == ("length", [0.75, 1.25])


def test_the_page_contains_the_newest_trees_that_fit_and_at_least_one(run: Path) -> None:
    chosen, left_out = newest(read(run, 4))  # two leaves each
    assert [tree.summary["key"] for _, tree in chosen] == ["step-000004-rank0.jsonl:0", "step-000004-rank0.jsonl:1"]
    assert left_out == 1
    assert [newest(read(run, count))[1] for count in (6, 5, 1)] == [0, 1, 2]


def test_only_the_trees_of_the_page_are_held_and_no_tokens(run: Path) -> None:
    """The log of a long run is larger than the memory."""
    for step in range(5, 9):
        save(run, logged(step), name=f"step-{step:06}")
    history = [{"step": 7, "reward": 0.5}]  # of the rollouts 0 to 6
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    reader = read(run, 4)

    def held(reader: RunReader) -> dict[int, tuple[int, bool, bool]]:
        return {
            file.step: (read.count, read.trees is not None, read.tally is not None)
            for file, read in sorted(reader.files.items(), key=lambda item: item[0])
        }

    few = dict.fromkeys((5, 6), (1, False, False))
    assert held(reader) == {3: (1, False, False), 4: (2, False, False), **few, 7: (1, True, True), 8: (1, True, True)}
    save(run, logged(9), name="step-000009")
    reader.refresh()
    assert held(reader)[7] == (1, False, True) and held(reader)[9] == (1, True, True)
    rewards = next(panel["lines"] for panel in index_of(reader)["panels"])["reward (training)"]
    assert [step for step, _ in rewards] == [7, 8, 9, 10]
    for step in (8, 9):  # a resumed run removes the steps that it repeats
        (run / f"trajectories/step-{step:06}-rank0.jsonl").unlink()
    reader.refresh()
    assert [tree.summary["step"] for _, tree in newest(reader)[0]] == [6, 7]


def test_files_sort_by_step_with_an_evaluation_before_the_training_rollout_of_its_step() -> None:
    names = [
        "eval-000004-rank0.jsonl",
        "step-000004-rank0.jsonl",
        "step-000004.1-rank0.jsonl",
        "step-000010-rank0.jsonl",
    ]
    assert [each.path.name for each in sorted(map(file, reversed(names)))] == names
    assert LogFile.of(Path("step-000001-rank0.jsonl.partial-0a1b2c3d")) is None
    assert file("step-000004.1-rank0.jsonl").rollout == "step-000004.1"


def test_the_history_is_the_runs_or_else_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    assert log_history(tmp_path) == []
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    assert log_history(tmp_path) == [{"step": 10}]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 12}, {"train_loss": 1}]}')
    assert log_history(tmp_path) == log_history(tmp_path / "trajectories") == [{"step": 12}]
    (tmp_path / "checkpoint-13").mkdir()  # the run is continued
    (tmp_path / "checkpoint-13/trainer_state.json").write_text('{"log_history": [{"step": 13}]}')
    assert log_history(tmp_path) == [{"step": 13}]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 13}, {"step": 13, "train_loss": 1}]}')
    assert log_history(tmp_path) == [{"step": 13}, {"step": 13, "train_loss": 1}]
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(DataError, match=r"trainer_state\.json"):
        log_history(tmp_path)


def test_a_file_that_is_removed_before_it_is_read_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run removes the trees of the steps that it repeats, and a run its old checkpoints."""

    def read_after_removal(path: Path) -> Any:
        if path.name == "step-000003-rank0.jsonl":
            path.unlink()
        return read_trees(path)

    monkeypatch.setattr("arpo_trl.viewing.run.read_trees", read_after_removal)
    reader = read(run)
    assert [file.step for file in reader.files] == [4]
    seen = reader.revision
    reader.refresh()
    assert (reader.revision, [file.step for file in reader.files]) == (seen + 1, [4])

    def history_after_removal(path: Path) -> Any:
        if path.parent.name == "checkpoint-9":
            path.unlink()
        return read_json(path)

    for step in (8, 9):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    (run / "trainer_state.json").unlink()
    monkeypatch.setattr("arpo_trl.viewing.run.read_json", history_after_removal)
    assert log_history(run) == [{"step": 8}]


def test_curves_have_the_named_and_the_matching_metrics_that_are_numbers() -> None:
    reward, entropy, *_ = PANELS
    history = [
        {"step": 1, "reward": 0.5, "arpo/entropy/after_calculator": 1.25},
        {"step": 2, "reward": float("nan"), "arpo/entropy/root": 0.25},
        {"step": 2, "eval_arpo/accuracy": 0.75},
    ]
    assert curves(reward, history) == {"reward (training)": [(1, 0.5)], "accuracy (held out)": [(2, 0.75)]}
    assert curves(entropy, history) == {"at the root": [(2, 0.25)], "after calculator": [(1, 1.25)]}


def tally(tree: LoggedTree) -> Tally:
    tally_logged(tree, made := Tally())
    return made


def test_logged_trees_continue_the_curves_after_the_history() -> None:
    # Rewards 1 and −1; a turn of mean 0.5 at the root; 1.5 and 0.5 after search; paths of 8 tokens, 5 of them stored.
    (of_trees,) = history_of_tallies({7: [tally(logged(6))]})
    assert (of_trees["step"], of_trees["reward"], of_trees["arpo/entropy/root"]) == (7, 0.0, 0.5)
    assert (of_trees["arpo/entropy/after_search"], of_trees["arpo/tree/sharing_ratio"]) == (1.0, 1.6)
    # A step's files of two ranks, and a leaf to which no reward applies: (1 − 1 + 0.5) / 3.
    (of_ranks,) = history_of_tallies({7: [tally(logged(6)), tally(flat(6, 1, [0.5, None]))]})
    assert of_ranks["reward"] == pytest.approx(1 / 6)
    rows, first = whole_history([{"step": 5, "reward": 0.5}], {4: [tally(logged(4))], 6: [tally(logged(6))]})
    assert ([row["step"] for row in rows], first) == ([5, 7], 7)
    assert whole_history([{"step": 5, "reward": 0.5}], {4: [tally(logged(4))]})[1] is None


# Hostile text --------------------------------------------------------------------------------------------------------


def test_no_text_ends_a_script_or_carries_hidden_characters(run: Path) -> None:
    html = page(read(run))
    scripts = re.findall(r"<script[^>]*>.*?</script>", html, re.DOTALL)
    assert len(scripts) == html.count("<script") == html.count("</script") == 5  # index, three trees, the page's own
    assert not set(html) & set("\x1b\u202e")
    index, _, _, tree = blocks(html)
    assert tree["nodes"][2]["calls"][0]["text"] == HOSTILE.replace("\x1b", "␛").replace("\u202e", "‹U+202E›")
    assert [group["group"] for group in index["groups"]] == [0, 0, 1]


def test_json_for_the_page_is_valid_javascript() -> None:
    assert (
        as_json({"<": [float("nan"), float("inf"), None, "\ud800"]})
        == '{"\\u003c":["NaN","Infinity",null,"‹U+D800›"]}'
    )


def test_the_pages_policy_allows_its_own_script_and_no_request(run: Path) -> None:
    html = page(read(run))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert re.match(
        r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-[^']+'; connect-src 'none'", policy
    )
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


# The command and the server ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["tree"], ["tree", "--step", "4"], ["view"]])
def test_a_broken_file_does_not_hide_the_others(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    """For example after a copy that was interrupted."""
    (run / "trajectories/step-000004-rank7.jsonl").write_text('{"step": 4, "gr')
    assert run_command(monkeypatch, words[0], str(run), *words[1:]) == 0
    assert "step-000004-rank7.jsonl, line 1: not valid JSON" in caplog.text and "This file is left out." in caplog.text
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ["tree", "timeline"])
def test_a_step_whose_files_are_all_broken_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "step-000002-rank0.jsonl").write_text('{"step": 2, "gr')
    assert run_command(monkeypatch, name, str(tmp_path), "--step", "2") == 2
    assert f"{tmp_path} has no readable trees of step" in capsys.readouterr().err


def test_the_command_writes_the_page_and_prints_its_path(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "view", str(run)) == 0
    assert capsys.readouterr().out.startswith(f"{run}/view.html (0.")
    assert len(blocks((run / "view.html").read_text("utf-8"))[0]["groups"]) == 3
    other = run.parent / "other.html"
    assert run_command(monkeypatch, "view", str(run), "--output", str(other), "--leaves", "2") == 0
    index, *trees = blocks(other.read_text("utf-8"))
    assert (len(index["groups"]), len(trees), index["left_out"]) == (1, 1, 2)


def test_showing_a_run_imports_no_engine() -> None:
    """torch and transformers take seconds."""
    code = "import sys, arpo_trl.viewing.page, arpo_trl.viewing.plot; print({'torch', 'trl'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_folder_without_logged_trees_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "view", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"DataError: {tmp_path} has no logged trees. Pass the output_dir")
    assert run_command(monkeypatch, "view", str(tmp_path / "nowhere")) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.fixture
def server(run: Path) -> Iterator[ViewServer]:
    with ViewServer(RunReader(run), 0) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: ViewServer, path: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=headers), timeout=60) as answer:
        return json.loads(answer.read())


def test_the_server_returns_changes_since_a_revision(run: Path, server: ViewServer) -> None:
    first = ask(server, "changes?after=0")
    assert ([group["step"] for group in first["groups"]], first["files"]) == (
        [3, 4, 4],
        ["step-000003-rank0.jsonl", "step-000004-rank0.jsonl"],
    )
    assert ask(server, f"changes?after={first['revision']}") == {"revision": first["revision"]}
    save(run, logged(5), name="step-000005")
    (run / "trajectories/step-000003-rank0.jsonl").unlink()
    second = ask(server, f"changes?after={first['revision']}")
    assert [group["step"] for group in second["groups"]] == [5]
    assert second["files"] == ["step-000004-rank0.jsonl", "step-000005-rank0.jsonl"]
    assert second["groups"][0]["tree"]["prompt"] == "question 0: 1538 degrees"


def test_a_page_gets_every_tree_from_a_server_that_was_started_again(run: Path) -> None:
    before = read(run)
    save(run, logged(5), name="step-000005")
    again = read(run)
    for asked in (before.revision, again.revision + 40):
        change = changes(again, asked)
        assert (change["revision"], len(change["groups"])) == (again.revision, 4)


def test_the_curves_of_a_revision_are_computed_once(
    run: Path, server: ViewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def counting(*arguments: Any) -> Any:
        computed.append(1)
        return whole_history(*arguments)

    monkeypatch.setattr("arpo_trl.viewing.page.whole_history", counting)
    first = server.reader.revision + 1
    for revision in (first, first + 1):
        if revision > first:
            save(run, logged(5), name="step-000005")
        for after in (0, revision - 1, revision):
            assert ask(server, f"changes?after={after}")["revision"] == revision
        assert len(computed) == revision - first + 1


def test_a_page_that_is_closed_before_its_answer_leaves_no_traceback(
    server: ViewServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, closed, ended, end = threading.Event(), threading.Event(), threading.Event(), server.shutdown_request

    @contextmanager
    def lock() -> Iterator[None]:
        asked.set()
        assert closed.wait(60.0)
        yield

    def shutdown_request(request: Any) -> None:  # the last thing that the thread of a request does
        end(request)
        ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(server, "lock", lock())
        patched.setattr(server, "shutdown_request", shutdown_request)
        with socket.create_connection(server.server_address[:2]) as page:
            page.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n")
            assert asked.wait(60.0)
            page.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        closed.set()
        assert ended.wait(60.0)
    assert capsys.readouterr().err == ""
    assert ask(server, "changes")["files"]


def test_a_client_that_does_not_read_its_answer_blocks_no_other(
    run: Path, server: ViewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.viewing.server.page", lambda *_, **__: "x" * (64 << 20))  # more than a socket holds
    with socket.create_connection(server.server_address[:2]) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert slow.recv(1)
        assert ask(server, "changes")["files"]
        assert ask(server, f"changes?after={'9' * 5000}")["files"]


def test_the_server_answers_this_machine_only_and_tells_errors(run: Path, server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(server, "changes", Host="evil.example:80")
    assert ask(server, "changes", Host="127.0.0.1")  # of port 80
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, "etc/passwd")
    (run / "trainer_state.json").write_text("[]")
    with pytest.raises(urllib.error.HTTPError, match="500") as error:
        ask(server, "changes")
    assert "trainer_state.json is []; expected" in json.loads(error.value.read())["error"]
    with pytest.raises(ConfigError, match=f"Port {server.server_address[1]} of 127.0.0.1 cannot be used"):
        ViewServer(RunReader(run), server.server_address[1])


# In a browser --------------------------------------------------------------------------------------------------------


def open_page(tab: Tab, run: Path) -> None:
    (run / "view.html").write_text(page(read(run)), "utf-8")
    tab.open((run / "view.html").as_uri())


@pytest.fixture
def shown(run: Path, tab: Tab) -> Tab:
    open_page(tab, run)
    return tab


LISTED = "[...document.querySelectorAll('.group')].map((row) => row.firstChild.textContent)"


def choose(tab: Tab, **boxes: bool | str) -> list[str]:
    """What the list shows once these filters, by id, are set and all others cleared."""
    tab.run("document.getElementById('clear').click()")
    for name, value in boxes.items():
        if isinstance(value, bool):
            tab.run(f"document.getElementById('{name}').click()")
        else:
            tab.run(f"document.getElementById('{name}').value = {json.dumps(value)}; filter()")
    return list(tab.run(LISTED))


@pytest.mark.slow
@pytest.mark.browser
def test_each_filter_and_each_order_changes_the_list(tmp_path: Path, tab: Tab) -> None:
    """Groups a to d. Only a and c branch, only b and c have a wrong leaf, d has no reward; mean rewards 0.75, 0.25
    and 0; highest entropies 1.5, 2.5, 1.5 and 0.5."""
    a = dataclasses.replace(logged(3), rewards=[1.0, 0.5])
    (call,) = a.tree.nodes[2].calls
    a.tree.nodes[2].calls = [dataclasses.replace(call, arguments={"code": 'print("x")\n', "lines": [12, 34]})]
    c = logged(group=1, text=HOSTILE, failure=ToolFailure.TIMEOUT)
    save(tmp_path, a, name="step-000003")
    save(tmp_path, flat(4, 0, [0.0, 0.5], entropy=2.5), c)
    save(tmp_path, flat(5, 0, [None, None]), name="step-000005")
    open_page(tab, tmp_path)
    names = {
        **{"step 3 · group 0 · 1 branch": "a", "step 4 · group 0": "b"},
        **{"step 4 · group 1 · 1 branch · 1 failed": "c", "step 5 · group 0": "d"},
    }

    def listed(**boxes: bool | str) -> str:
        return "".join(names[row] for row in choose(tab, **boxes))

    assert listed() == listed(order="newest") == "dbca"
    assert listed(order="oldest") == "abcd"
    assert listed(order="worst") == "cbad"
    assert listed(order="entropy") == "bacd"
    assert listed(wrong=True) == "bc"
    assert listed(branched=True) == "ca"
    assert listed(failed=True) == "c"
    assert listed(step="4") == "bc"
    assert listed(low="0.25") == "ba"
    assert listed(high="0.25") == "bc"
    assert listed(low="0.1", high="0.5", wrong=True) == "b"
    assert listed(search="ONERROR") == "c"  # also what is markup, in any case
    assert listed(search='print("x")') == listed(search="[12,34]") == "a"  # values of arguments
    assert listed(search="entropies") == listed(search="query") == ""  # names of fields and arguments are not text


@pytest.mark.slow
@pytest.mark.browser
def test_a_long_run_has_its_curves(run: Path, tab: Tab) -> None:
    rows = [{"step": step, "reward": step % 7} for step in range(1, 150_001)]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    open_page(tab, run)
    assert tab.run("document.querySelectorAll('polyline').length") == 1
    assert tab.run("document.body.dataset.ready") == "true"


@pytest.mark.slow
@pytest.mark.browser
def test_opening_a_page_parses_and_renders_only_what_is_shown(tmp_path: Path, tab: Tab) -> None:
    save(tmp_path, *(flat(4, i, [1.0, 0.0]) for i in range(60)))
    open_page(tab, tmp_path)
    assert tab.run("[blocks.size, trees.size, texts.size]") == [60, 1, 0]
    assert len(tab.run(LISTED)) == 50
    assert tab.run("document.querySelectorAll('.path').length") == 2  # those of the first group
    tab.run("document.querySelectorAll('.group')[1].click()")
    assert tab.run("[trees.size, texts.size, document.querySelectorAll('.path').length]") == [2, 0, 2]
    choose(tab, search="flat 59")
    assert tab.run("texts.size") == 60


@pytest.mark.slow
@pytest.mark.browser
def test_the_rest_of_long_lists_and_texts_is_shown_on_request(tmp_path: Path, tab: Tab) -> None:
    """50 groups of step 3, and in step 4 one with 60 paths, of which path 0 forks."""
    wide = RolloutTree([1])
    for i in range(60):
        turn = wide.add_turn(0, [1], "w" * 3000, [-0.5], [0.5])
        seen = wide.add_observation(turn.index, [2], [], "seen")
        wide.end(wide.add_turn(seen.index, [3], "done", [-0.5], [0.5]).index, (i,), StopReason.EOS)
    wide.end(wide.add_turn(2, [3], "branch", [-0.5], [0.5]).index, (0, 1, 0), StopReason.EOS)
    save(tmp_path, *(flat(3, i, [1.0]) for i in range(50)), name="step-000003")
    save(tmp_path, dataclasses.replace(flat(4, 0, [1.0] * 61), tree=wide))
    history = [{"step": step, "reward": 0.5} for step in (4, 5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    open_page(tab, tmp_path)

    def press(text: str) -> None:
        tab.run(
            f"[...document.querySelectorAll('button')].find((each) => each.textContent.startsWith('{text}')).click()"
        )

    def paths(kind: str = "") -> int:
        return int(tab.run(f"document.querySelectorAll('.path{kind}').length"))

    assert (paths(), paths("[open]")) == (50, 0)  # a large tree is opened path by path
    press("Show 10 of 10 more paths")
    assert paths() == 60
    press("Expand all")
    assert paths() == paths("[open]") == 62  # with the two of the fork
    assert tab.run("document.querySelector('.path pre').textContent.length") < 1600
    press("Show all 3,000 characters")
    assert tab.run("document.querySelector('.path pre').textContent") == "w" * 3000
    press("Collapse all")
    assert paths("[open]") == 0

    assert (len(tab.run(LISTED)), tab.run("document.getElementById('page').textContent")) == (50, "page 1 of 2")
    press("Next")
    assert (tab.run(LISTED), tab.run("document.getElementById('page').textContent")) == (
        ["step 3 · group 49"],
        "page 2 of 2",
    )
    press("‹ Previous")
    assert len(tab.run(LISTED)) == 50
    for side, steps in (("left", {"3"}), ("right", {"4"})):  # the curve's steps count the finished ones: 4 and 5
        tab.run(
            "(() => { const curve = document.querySelector('#curves svg'), box = curve.getBoundingClientRect();"
            f"curve.dispatchEvent(new MouseEvent('click', {{ clientX: box.{side} }})); }})()"
        )
        assert {row.split()[1] for row in tab.run(LISTED)} == steps
    assert tab.errors == []


@pytest.mark.slow
@pytest.mark.browser
def test_the_colours_of_a_tree_are_those_of_its_legend(shown: Tab) -> None:
    """Turns of 0.25 and 0.75, of 1.5 and of 0.5 nats. The scale ends at the highest mean of the run, 1.5."""
    shown.run("show('step-000004-rank0.jsonl:0')")

    def colours(selector: str, part: str) -> list[str]:
        code = f"[...document.querySelectorAll('{selector}')].map((each) => getComputedStyle(each).{part})"
        return list(shown.run(code))

    legend = colours(".scale i", "backgroundColor")
    assert len(set(legend)) == 11  # 0, 0.15, …, 1.5 nats
    cells = colours(".node .cells i", "backgroundColor")
    assert (cells[1], cells[2]) == (legend[5], legend[10])
    first, highest, low = colours(".node:has(.of-model)", "borderLeftColor")
    assert highest == legend[10] and first == low != highest
    assert legend[3] != first != legend[4]  # 0.5 is between 0.45 and 0.6


@pytest.mark.slow
@pytest.mark.browser
def test_a_tree_shows_decisions_and_rewards(shown: Tab) -> None:
    shown.run("show('step-000004-rank0.jsonl:0')")
    text = shown.run("document.getElementById('tree').innerText")
    assert "Step 4, group 0" in text
    assert "Branched: 1 extra turn — H 1.0000, ΔH +0.125000, P 0.525000, drew 0.312, τ 0.5 (threshold)" in text
    assert "branch 0,1,0 · reward -1.00 · advantage −0.75 · cut off by the length limit · 4 tokens" in text
    assert re.search(r"expected\s+1538", text)
    assert re.search(r"prompt 3\s+model 4\s+tool 1", text)
    assert shown.run("document.querySelectorAll('#tree .path[open]').length") == 3
    shown.run(
        "[...document.querySelectorAll('#tree button')].find((each) => each.innerText === 'Collapse all').click()"
    )
    assert shown.run("document.querySelectorAll('#tree .path[open]').length") == 0
    shown.run("document.querySelectorAll('.leaves button')[1].click()")  # opens the way down to that leaf
    assert shown.run("document.querySelector('.path.target summary').innerText").startswith("branch 0,1,0")


@pytest.mark.slow
@pytest.mark.browser
def test_the_continuing_path_is_before_a_branch_that_started_earlier(tmp_path: Path, tab: Tab) -> None:
    tree = logged()
    made = RolloutTree([1])
    first = made.add_turn(0, [1], "call", [-0.5], [0.5])
    seen = made.add_observation(first.index, [2], [], "result")
    for address in ((0, 1, 0), (0,)):
        made.end(made.add_turn(seen.index, [3], "x", [-0.5], [0.5]).index, address, StopReason.EOS)
    save(tmp_path, dataclasses.replace(tree, tree=made, spans={}), name="step-000000")
    open_page(tab, tmp_path)
    names = tab.run(
        "[...document.querySelectorAll('#tree .path > summary > .strong:first-child')].map((each) => each.innerText)"
    )
    assert names[:3] == ["path 0", "path 0", "branch 0,1,0"]


@pytest.mark.slow
@pytest.mark.browser
def test_hostile_text_stays_text_and_nothing_is_requested(shown: Tab) -> None:
    shown.run("show('step-000004-rank0.jsonl:1')")
    assert "<img src=x onerror=alert(1)>" in shown.run("document.getElementById('tree').innerText")
    assert shown.run("document.title").endswith(" · arpo-trl")
    assert shown.run("document.querySelectorAll('img, iframe, object, link').length") == 0
    assert shown.errors == []
    assert {url for url in shown.requests if url != "about:blank"} == {shown.run("location.href.split('#')[0]")}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_follows_the_systems_colours(run: Path, shown: Tab, width: int) -> None:
    backs = []
    for dark in (False, True):
        shown.open((run / "view.html").as_uri(), width, dark=dark)
        shown.run("document.querySelector('.group').click()")
        assert shown.run("document.documentElement.scrollWidth") <= width
        backs.append(shown.run("getComputedStyle(document.body).backgroundColor"))
    assert backs == ["rgb(255, 255, 255)", "rgb(18, 22, 29)"]
    for wanted in ("dark", "light", "auto"):
        shown.run("document.getElementById('theme').click()")
        assert shown.run("document.getElementById('theme').innerText") == f"Theme: {wanted}"
    assert shown.run("document.querySelectorAll('#curves svg').length") == len(blocks(page(read(run)))[0]["panels"])


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_of_a_live_run_shows_new_steps(run: Path, server: ViewServer, tab: Tab) -> None:
    tab.open(server.url)
    assert len(tab.run(LISTED)) == 3
    save(run, logged(5), name="step-000005")
    tab.until("index.groups.length === 4")
    assert tab.run(LISTED)[0] == "step 5 · group 0 · 1 branch"
    tab.run("document.querySelector('.group').click()")
    assert "Step 5, group 0" in tab.run("document.getElementById('tree').innerText")
    assert [error for error in tab.errors if "favicon" not in error] == []


@pytest.mark.slow
@pytest.mark.browser
def test_what_the_sampler_makes_is_shown(tmp_path: Path, tab: Tab) -> None:
    rollout = Scripted(one_search, leaves=4, at_root=2)()
    trees = logged_trees(
        rollout.trees, [1.0] * 4, [0.0] * 4, step=0, first_group=0, decode=str, rule=Threshold(), spans=rollout.spans
    )
    save(tmp_path, *trees, name="step-000000")
    open_page(tab, tmp_path)
    assert tab.run("document.querySelectorAll('#tree .path').length") == 6  # two paths, each forked into two
    assert tab.run("document.querySelectorAll('#tree .decision.granted').length") == 2
