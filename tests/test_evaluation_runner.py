import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.benchmarks import Scorer
from arpo_trl.evaluation.runner import MOST_WAITING, SCORING_THREADS, RunFolder, run_benchmark
from arpo_trl.evaluation.samples import Records, SampleLog, key_of, repair
from arpo_trl.rewards.judge import LLMJudge
from arpo_trl.rollout.batch import Finished
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from evaluating import Evaluating, asked_number, boxed, questions, record, write_lines
from loopback import Loopback, Reply
from support import search

IDENTITY = {"settings": {"temperature": 0.6}, "model": "m"}


def sums(request, context):
    """Searches once, then answers with the number asked for."""
    return f"<search>iron {request.key[0]}</search>" if request.key[-1] == 0 else boxed(asked_number(context))


def without_seconds(records):
    """What must not depend on when and how fast samples were made."""
    kept = []
    for one in sorted(records, key=key_of):
        plain = json.loads(json.dumps({**one, "seconds": 0}))
        for step in plain.get("trajectory", ()):
            for call in step.get("calls", ()):
                call["seconds"] = 0
        kept.append(plain)
    return kept


# Records -------------------------------------------------------------------------------------------------------------


def test_a_record_contains_all_data_of_a_sample():
    (good, wrong) = Evaluating(sums)(questions("0", "7"))
    assert (good["prediction"], good["scores"], good["fault"], good["stop"]) == (
        "0",
        {"math": 1.0, "em": 1.0},
        None,
        "eos",
    )
    assert (wrong["prediction"], wrong["scores"]["math"], wrong["golds"]) == ("1", 0.0, ["7"])
    assert (good["question"], good["id"], good["benchmark"], good["error"]) == ("what is 0", "0", "sums", None)
    first, result, last = good["trajectory"]
    assert (first["role"], first["text"]) == ("assistant", "<search>iron 0</search>")
    (call,) = result["calls"]
    assert (result["role"], call["name"], call["arguments"], call["text"]) == (
        "tool",
        "search",
        {"query": "iron 0"},
        "facts about iron 0",
    )
    assert last["text"] == boxed(0)
    assert good["tokens"]["generated"] == first["tokens"] + last["tokens"]
    assert good["tokens"]["observed"] == result["tokens"] > 0
    assert good["tokens"]["prompt"] > 0 and good["seconds"] > 0


def test_samples_of_a_question_are_seeded_apart_and_whatever_else_runs():
    evaluating = Evaluating(sums, samples=3, concurrency=1)
    evaluating(questions("0", "1"))
    seeds = {request.key: request.seed for request in evaluating.scripted.engine.requests}
    assert len(set(seeds.values())) == len(seeds) == 2 * 3 * 2  # questions, samples, turns
    again = Evaluating(sums, samples=3, concurrency=6)
    again(questions("0", "1"))
    assert {request.key: request.seed for request in again.scripted.engine.requests} == seeds
    elsewhere = Evaluating(sums, samples=3)
    elsewhere(questions("0", "1", name="others"))
    assert not {request.seed for request in elsewhere.scripted.engine.requests} & set(seeds.values())


def test_a_tag_in_the_code_of_a_chat_templates_call_is_no_fault():
    call = {"name": "python", "arguments": {"code": "print('<answer>')"}}

    def script(request, context):
        return boxed(0) if request.key[-1] else f"<tool_call>\n{json.dumps(call)}\n</tool_call>"

    settings = {"protocol": ChatTemplateProtocol, "template": "qwen3", "max_length": 4000}
    (one,) = Evaluating(script, **settings)(questions("0"))
    assert (one["error"], one["fault"], one["scores"]["math"]) == (None, None, 1.0)


def test_an_answer_in_a_bad_format_counts_by_the_papers_rule_and_its_fault_is_reported():
    (one,) = Evaluating(lambda r, c: f"{boxed(0)} and more")(questions("0"))
    assert (one["prediction"], one["scores"]["math"], one["fault"]) == ("0", 1.0, "text_after_answer")
    # the paper's format also checks the tags of python, which this run lacks
    (open_tag,) = Evaluating(lambda r, c: f"done</python> {boxed(0)}", tools=[search])(questions("0"))
    assert (open_tag["scores"]["math"], open_tag["fault"]) == (1.0, "unbalanced_tags")
    (none,) = Evaluating(lambda r, c: "it is 0")(questions("0"))
    assert (none["prediction"], none["scores"]["math"], none["fault"]) == (None, 0.0, "no_answer")


def test_a_prompt_that_cannot_be_rendered_or_does_not_fit_fails_alone():
    asked = questions("0", "1", "2")
    asked.rows[1]["prompt"] = [{"role": "user", "content": "iron " * 2000}]
    evaluating = Evaluating(sums)
    encode = evaluating.scripted.protocol.encode_prompt

    def encode_or_break(prompt):
        if prompt[-1]["content"] == "what is 2":
            raise TypeError("no such role")
        return encode(prompt)

    evaluating.scripted.protocol.encode_prompt = encode_or_break
    fine, long, broken = evaluating(asked)
    assert fine["error"] is None
    assert "no room for a completion" in long["error"]
    assert broken["error"] == "TypeError: no such role" and "scores" not in broken


def test_an_answer_that_breaks_a_scorer_fails_alone(monkeypatch):
    def breaks(prediction, row, judge):
        if prediction == "1":
            raise RuntimeError("cannot score this")
        return {"math": 1.0, "em": 1.0}

    monkeypatch.setattr("arpo_trl.evaluation.runner.score", breaks)
    records = Evaluating(sums)(questions("0", "1", "2"))
    assert [one["error"] for one in records] == [None, "RuntimeError: cannot score this", None]


def test_a_disk_that_is_full_ends_the_run():
    def full(record):
        raise OSError(28, "No space left on device")

    evaluating = Evaluating(sums)
    asked = questions("0", "1")
    with evaluating.scripted.toolbox, pytest.raises(OSError, match="No space left"):
        evaluating.evaluator.run(asked, evaluating.evaluator.keys(asked), full)


def test_a_full_disk_is_an_error_that_names_the_file(monkeypatch, tmp_path):
    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left") as raised:
            RunFolder(tmp_path / "run", IDENTITY, resume=False)
    assert raised.value.filename == str(tmp_path / "run" / "run.json")
    with RunFolder(tmp_path / "run", IDENTITY, resume=False) as folder:  # a second attempt is not refused
        folder.log.close()
    log = SampleLog(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as raised:
        log.write({"number": 0})
    assert raised.value.filename == "/dev/full"
    with pytest.raises(OSError, match="No space left"):  # the line is still in the buffer
        log.close()


# The judge -----------------------------------------------------------------------------------------------------------


def judge_says(reply: str):
    return lambda asked: Reply({"choices": [{"message": {"content": reply}}]})


def test_the_judges_verdict_is_beside_the_rules_score_and_right_answers_are_not_sent():
    with Loopback(judge_says("Correct")) as server:
        judge = LLMJudge(server.url + "/v1", "wise")
        right, close = Evaluating(lambda r, c: boxed("paris france"), judge=judge)(
            questions("paris france", "paris", scorer=Scorer.JUDGE)
        )
        assert len(server.asked) == 1
    assert right["scores"] == {"f1": 1.0, "f1_paper": 1.0, "em": 1.0, "judge": 1.0}
    assert close["scores"] == {"f1": pytest.approx(2 / 3), "f1_paper": pytest.approx(2 / 3), "em": 0.0, "judge": 1.0}


def test_without_a_judge_there_is_no_score_of_that_name():
    (one,) = Evaluating(sums)(questions("0", scorer=Scorer.JUDGE))
    assert "judge" not in one["scores"]


def test_a_nonsense_reply_of_the_judge_is_no_verdict_and_is_retried_on_resume(tmp_path):
    asked = questions("paris", scorer=Scorer.JUDGE)
    with Loopback(judge_says("I like turtles")) as server:
        evaluating = Evaluating(lambda r, c: boxed("lutetia"), judge=LLMJudge(server.url + "/v1", "wise"))
        with RunFolder(tmp_path / "run", IDENTITY, resume=False) as folder, evaluating.scripted.toolbox:
            run_benchmark(evaluating.evaluator, asked, folder, lambda record: None)
    (one,) = Records(tmp_path / "run/samples.jsonl").values()
    assert one["scores"]["judge"] is None and one["error"] is None

    def must_not_sample(request, context):
        raise AssertionError("only the judge was missing")

    with Loopback(judge_says("Incorrect")) as server:
        evaluating = Evaluating(must_not_sample, judge=LLMJudge(server.url + "/v1", "wise"))
        with RunFolder(tmp_path / "run", IDENTITY, resume=True) as folder, evaluating.scripted.toolbox:
            run_benchmark(evaluating.evaluator, asked, folder, lambda record: None)
    (again,) = Records(tmp_path / "run/samples.jsonl").values()
    assert again == {**one, "scores": {**one["scores"], "judge": 0.0}}


def unjudged(number, verdict=None, **other):
    """A wrong answer of which the judge's verdict is missing, unless given."""
    return record(number, 0.0, scores={"math": 0.0, "em": 0.0, "judge": verdict}, **other)


def test_repair_keeps_samples_without_a_verdict_in_the_file(tmp_path):
    rows = [record(0, 1.0), unjudged(1), unjudged(0, benchmark="other")]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    done, again = repair(path)
    assert (done, again) == ({("gsm8k", 0, 0)}, rows[1:])
    assert list(Records(path).values()) == rows


def test_a_later_line_of_a_sample_replaces_the_first(tmp_path):
    rows = [unjudged(0), record(1, 1.0), unjudged(0, 1.0), unjudged(2), unjudged(2)]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    assert list(Records(path).values()) == [rows[1], rows[2], rows[4]]
    assert repair(path) == ({("gsm8k", 0, 0), ("gsm8k", 1, 0)}, [rows[4]])
    assert list(Records(path).values()) == [rows[1], rows[2], rows[4]]


def test_an_interrupt_while_the_judge_is_asked_again_waits_for_no_verdict_and_loses_no_sample(tmp_path):
    asked = questions("paris", "rome", scorer=Scorer.JUDGE)
    with Loopback(judge_says("I like turtles")) as server:
        evaluating = Evaluating(lambda r, c: boxed("lutetia"), judge=LLMJudge(server.url + "/v1", "wise"))
        with RunFolder(tmp_path / "run", IDENTITY, resume=False) as folder, evaluating.scripted.toolbox:
            run_benchmark(evaluating.evaluator, asked, folder, lambda record: None)
    before = sorted(Records(tmp_path / "run/samples.jsonl").values(), key=key_of)
    asking, interrupted = threading.Event(), threading.Event()

    class Slow:
        def verdicts(self, judgements):
            if judgements[0].golds == ("rome",):
                asking.set()
                assert interrupted.wait(60)
            return [True]

    def interrupts(record):
        assert asking.wait(60)
        raise KeyboardInterrupt

    evaluating = Evaluating(sums, judge=Slow())
    with RunFolder(tmp_path / "run", IDENTITY, resume=True) as folder, evaluating.scripted.toolbox:
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(evaluating.evaluator, asked, folder, interrupts)
        assert not interrupted.is_set()  # the second verdict has not arrived
    interrupted.set()
    paris, rome = sorted(Records(tmp_path / "run/samples.jsonl").values(), key=key_of)
    assert paris == {**before[0], "scores": {**before[0]["scores"], "judge": 1.0}}
    assert rome == before[1]


def test_an_interrupt_while_samples_wait_for_the_judge_records_them_without_asking_it(tmp_path):
    """The judge answers the 16 threads' first questions after the interrupt. The other samples wait for a thread."""
    asked = questions(*map(str, range(21)), scorer=Scorer.JUDGE)
    interrupted, judged = threading.Event(), []

    class Slow:
        def verdicts(self, judgements):
            judged.extend(judgements)
            assert interrupted.wait(60)
            return [True]

    def script(request, context):
        if request.key[0] < 20:
            return boxed("wrong")
        while len(judged) < SCORING_THREADS:
            time.sleep(0.01)
        threading.Timer(0.2, interrupted.set).start()
        raise KeyboardInterrupt

    evaluating = Evaluating(script, concurrency=1, judge=Slow())
    with (
        RunFolder(tmp_path / "run", IDENTITY, resume=False) as folder,
        evaluating.scripted.toolbox,
        pytest.raises(KeyboardInterrupt),
    ):
        run_benchmark(evaluating.evaluator, asked, folder, lambda record: None)
    verdicts = [record["scores"]["judge"] for record in Records(tmp_path / "run/samples.jsonl").values()]
    assert (len(judged), sorted(verdicts, key=str)) == (16, [1.0] * 16 + [None] * 4)


# Resuming ------------------------------------------------------------------------------------------------------------


def test_few_samples_wait_for_their_scores_and_an_interrupt_loses_none_of_them():
    full, beyond, scored = threading.Event(), threading.Event(), threading.Event()
    excess, written = [], []

    def outcomes(*_):
        for number in range(MOST_WAITING + 1):
            event = {MOST_WAITING - 1: full, MOST_WAITING: beyond}.get(number, threading.Event())
            event.set()
            yield Finished(id=number, group=None, error="lost", seconds=0.0)

    def sink(record):
        scored.wait()
        written.append(record["number"])

    def watch():
        full.wait()
        excess.append(beyond.wait(0.2))
        if excess == [True]:
            scored.set()  # the test fails instead of hanging
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def interrupt(*_):
        scored.set()
        raise KeyboardInterrupt

    evaluating = Evaluating(sums)
    evaluating.evaluator.outcomes = outcomes
    watcher = threading.Thread(target=watch)
    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        watcher.start()
        with evaluating.scripted.toolbox, pytest.raises(KeyboardInterrupt):
            evaluating.evaluator.run(questions(*["0"] * MOST_WAITING), [], sink)
    finally:
        watcher.join()
        signal.signal(signal.SIGINT, handler)
    assert excess == [False]
    assert sorted(written) == list(range(MOST_WAITING))


def run_in(folder_path, asked, script=sums, *, resume=False, samples=1):
    evaluating = Evaluating(script, samples=samples)
    with RunFolder(folder_path, IDENTITY, resume=resume) as folder, evaluating.scripted.toolbox:
        run_benchmark(evaluating.evaluator, asked, folder, lambda record: None)
    return list(Records(folder_path / "samples.jsonl").values())


def test_samples_are_written_as_they_finish(tmp_path):
    seen = threading.Event()
    path = tmp_path / "run/samples.jsonl"

    def script(request, context):
        return ScriptedTurn(text=boxed(0), polls=1 if request.key[0] == 0 else 10**9)

    def watch(record):
        assert [one["number"] for one in Records(path).values()] == [0]  # on the disk while the other still runs
        seen.set()

    evaluating = Evaluating(script, concurrency=2)
    engine, poll = evaluating.scripted.engine, evaluating.scripted.engine.poll

    def poll_until_seen(timeout_s=0.0):
        if seen.is_set():
            for running in engine._running:
                running.polls_until_done = 0
        return poll(timeout_s)

    engine.poll = poll_until_seen
    asked = questions("0", "0")
    records = []
    with RunFolder(tmp_path / "run", IDENTITY, resume=False) as folder, evaluating.scripted.toolbox:
        run_benchmark(
            evaluating.evaluator, asked, folder, lambda r: (watch(r) if not records else None, records.append(r))
        )
    assert len(records) == 2


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_a_resumed_run_ends_like_an_uninterrupted_run(tmp_path, kept):
    asked = questions(*"01234")
    whole = run_in(tmp_path / "whole", asked)
    path = tmp_path / "cut"
    run_in(path, asked)
    lines = (path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    torn = lines[kept][: len(lines[kept]) // 2] if kept < 5 else b""
    (path / "samples.jsonl").write_bytes(b"".join(lines[:kept]) + torn)
    resumed = run_in(path, asked, resume=True)
    assert without_seconds(resumed) == without_seconds(whole)


def test_failed_samples_are_retried_and_finished_ones_are_not(tmp_path):
    asked = questions("0", "1")
    attempts = []

    def fails_first(request, context):
        attempts.append(asked_number(context))
        if asked_number(context) == "1" and len(attempts) < 3:
            raise RuntimeError("out of memory")
        return boxed(asked_number(context))

    first = run_in(tmp_path / "run", asked, fails_first)
    assert sorted(one["error"] or "" for one in first) == ["", "RuntimeError: out of memory"]
    second = run_in(tmp_path / "run", asked, fails_first, resume=True)
    assert [one["error"] for one in second] == [None, None]
    assert attempts == ["0", "1", "1"]


def test_repair_keeps_each_sample_once_and_drops_incomplete_failed_and_invalid_lines(tmp_path):
    good = record(0, 1.0)
    path = write_lines(tmp_path / "samples.jsonl", [{**good, "seconds": 9}, record(1, None), good, {"other": 1}])
    with path.open("ab") as file:
        file.write(b"\xff\xfe broken\n" + json.dumps(record(2, 0.0)).encode() + b"\n" + b'{"benchmark": "gsm8k", "num')
    done, unjudged = repair(path)
    assert done == {("gsm8k", 0, 0), ("gsm8k", 2, 0)} and unjudged == []
    assert list(Records(path).values()) == [good, record(2, 0.0)]


def test_records_are_read_by_their_keys(tmp_path):
    rows = [record(0, 1.0, question="ü" * 9), record(1, 0.0), record(0, 0.5)]
    path = write_lines(tmp_path / "samples.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))  # as some editors save it
    records = Records(path)
    assert (len(records), list(records)) == (2, [("gsm8k", 1, 0), ("gsm8k", 0, 0)])
    assert records["gsm8k", 0, 0] == rows[2]  # the last line of a sample
    (path.parent / "one").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows[0]).encode())
    assert Records(path.parent / "one")["gsm8k", 0, 0] == rows[0]


def test_a_last_line_without_a_newline_counts_as_incomplete(tmp_path):
    path = write_lines(tmp_path / "samples.jsonl", [record(0, 1.0)])
    path.write_text(path.read_text() + json.dumps(record(1, 1.0)))
    assert repair(path)[0] == {("gsm8k", 0, 0)}


def test_invalid_unicode_in_model_output_is_written(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl")
    log.write({**record(0, 1.0), "prediction": "\ud800 \x00 \u2028"})
    log.close()
    (read,) = Records(tmp_path / "samples.jsonl").values()
    assert read["prediction"] == "? \x00 \u2028"


def test_an_invalid_record_is_named_when_results_are_read(tmp_path):
    path = write_lines(tmp_path / "samples.jsonl", [record(0, 1.0), {"a": 1}])
    with pytest.raises(DataError, match=r"samples.jsonl, line 2: not a sample .* no 'benchmark'.* Resume"):
        list(Records(path).values())
    with pytest.raises(DataError, match="There is no"):
        list(Records(tmp_path / "nowhere.jsonl").values())


# Folders -------------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_different_run_is_refused_and_the_difference_named(tmp_path):
    RunFolder(tmp_path / "run", IDENTITY, resume=False).log.close()
    other = {"settings": {"temperature": 1.0}, "model": "m", "questions": {"a": "b"}}
    with pytest.raises(
        ConfigError,
        match=r"a different run: questions is null there and .* here; settings.temperature is 0.6 there and 1.0 here",
    ):
        RunFolder(tmp_path / "run", other, resume=True)


def test_the_folder_of_the_same_run_needs_resume(tmp_path):
    RunFolder(tmp_path / "run", IDENTITY, resume=False).log.close()
    with pytest.raises(ConfigError, match="already contains this run"):
        RunFolder(tmp_path / "run", IDENTITY, resume=False)
    RunFolder(tmp_path / "run", IDENTITY, resume=True).log.close()


def test_folders_with_other_files_or_that_cannot_be_created_are_rejected(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not empty and contains no evaluation"):
            RunFolder(path, IDENTITY, resume=False)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file/below", IDENTITY, resume=False)
    (tmp_path / "empty").mkdir()
    RunFolder(tmp_path / "empty", IDENTITY, resume=False).log.close()


HOLDER = """
import sys
from arpo_trl.evaluation.runner import RunFolder
with RunFolder(sys.argv[1], {}, resume=False) as folder:
    folder.log.write({"number": 0})
    print("running", flush=True)
    sys.stdin.read()
"""


def test_a_live_run_keeps_its_folder_and_its_samples(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live:
        assert live.stdout is not None and live.stdout.readline() == "running\n"
        said = rf"output .*run is in use by another run \(process {live.pid} on .+\).* or choose another output\."
        with pytest.raises(ConfigError, match=said):
            RunFolder(tmp_path / "run", {}, resume=True)
        assert (tmp_path / "run/samples.jsonl").read_text() == '{"number": 0}\n'
        live.communicate()
    with RunFolder(tmp_path / "run", {}, resume=True):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "samples.jsonl"]


def test_the_lock_of_a_run_that_was_killed_at_its_start_is_no_other_file(tmp_path):
    (tmp_path / "_lock").touch()
    RunFolder(tmp_path, IDENTITY, resume=False).log.close()


def test_a_half_written_description_of_a_killed_run_is_ignored(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json.partial-0a1b2c3d").write_text('{"mod')
    RunFolder(tmp_path / "run", IDENTITY, resume=True).log.close()
    assert json.loads((tmp_path / "run/run.json").read_text()) == IDENTITY


def test_an_invalid_description_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json: not valid JSON .* Choose another output folder"):
        RunFolder(tmp_path / "run", IDENTITY, resume=True)
