"""Answers are found in the text and compared as mathematics or as words."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import arpo_trl
import arpo_trl.rewards.math_worker as math_worker_module
from arpo_trl.errors import RewardError
from arpo_trl.rewards import exact_match, extract_answer, math_equal, paper_f1, task_accuracy, token_f1
from arpo_trl.rewards.answers import MAX_MATH_CHARS, normalized_tokens
from arpo_trl.rewards.math_worker import MathWorker, _started, math_worker


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<answer>\boxed{42}</answer>", "42"),
        (r"<answer>It is \[ \boxed{ 42 } \]</answer>", "42"),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", r"\frac{1}{2}"),
        (r"<answer>\boxed{1} or \boxed{2}</answer>", "2"),  # the last box
        (r"<answer>\boxed{1}</answer><answer>\boxed{2}</answer>", "2"),  # of the last answer
        (r"<answer>\boxed{\boxed{5}}</answer>", "5"),
        (r"<answer>\boxed{\{1, 2\}}</answer>", r"\{1, 2\}"),
        (r"<answer>\boxed{\left\{ x \right.}</answer>", r"\left\{ x \right."),  # an escaped brace needs no partner
        (r"<answer>\boxed{7} but \boxed{8</answer>", "7"),  # a box that never closes is none
        ("<answer>\\boxed\n{3}</answer>", "3"),
        (r"<answer>\\boxed{\\frac{1}{2}}</answer>", r"\\frac{1}{2}"),  # escaped twice
        (r"<answer>1 \\\boxed{3}</answer>", "3"),  # after the end of a line
        (r"<answer>\boxed{}</answer>", ""),
        (r"<answer>42</answer>", None),
        (r"\boxed{42}", None),
        (r"<answer>\boxed{42}", None),
        (r"\boxed{42}</answer>", None),
        (r"<answer>\fbox{42}</answer>", None),
        (r"\boxed{1}<answer>none</answer>\boxed{2}", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_in_the_last_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_a_flood_of_unclosed_boxes_has_no_answer() -> None:
    assert extract_answer("<answer>" + r"\boxed{" * 200_000 + "</answer>") is None


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("1/2", "0.5"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac{14}{3}", r"\frac{14}{3}"),
        ("-6", "-6.0"),
        ("1,000", "1000"),
        ("25", "025"),
        ("$18", "18"),
        ("5", r"\$ 5"),
        ("12,", "12"),
        ("274i+1", "1+274i"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"(3,\frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        ("east", r"\text{east}"),
        ("x=5", "5"),
        # units, in words or degrees; percentages; mixed numbers
        ("5 km", "5"),
        ("5", r"5\text{ km}"),
        ("90^\\circ", "90"),
        (r"50\%", "50"),
        ("50%", "0.5"),
        (r"3\frac{1}{2}", "3.5"),
        ("1000", "1{,}000"),
        # lists are sets, whatever their order
        ("1, 2, 3", r"\{3,2,1\}"),
        ("2,1", "1,2"),
        ("①③", "①③"),  # choices as published
    ],
)
def test_equal_mathematics_is_equal(prediction: str, gold: str) -> None:
    assert math_equal(prediction, gold)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("-6", "6"),
        ("12", "1/2"),
        ("1/2", "12"),
        ("0.33", "1/3"),
        ("(2,1)", "(1,2)"),
        ("west", "east"),
        ("", "5"),
        ("5", ""),
    ],
)
def test_different_mathematics_is_not_equal(prediction: str, gold: str) -> None:
    assert not math_equal(prediction, gold)


def test_math_equal_works_outside_the_main_thread() -> None:
    # Texts no other test asks for: an answer from the cache would prove nothing.
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.extend([math_equal("3/8", "0.375"), math_equal("-7", "7")]))
    thread.start()
    thread.join()
    assert verdicts == [True, False]


def test_many_threads_each_get_their_own_reply() -> None:
    worker = math_worker()
    verdicts: dict[int, bool] = {}

    def ask(number: int) -> None:
        verdicts[number] = worker.equal(f"{number}/16", str(number / 16 if number % 2 else number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number % 2 == 1 for number in range(1, 17)}


@pytest.mark.parametrize("tower", ["9**9**9**9", "(" * 300])
def test_an_expression_too_large_to_compute_is_not_equal_and_the_next_is_compared(tower: str) -> None:
    worker = MathWorker(cpu_limit_s=0.5)
    assert not worker.equal(tower, "6")
    assert worker.equal("1/2", "0.5")
    worker.close()


def test_an_expression_beyond_the_length_limit_equals_only_itself() -> None:
    long = "+".join("1" * MAX_MATH_CHARS)
    assert math_equal(long, long)
    assert not math_equal(long, str(MAX_MATH_CHARS))


@pytest.mark.parametrize("hostile", ["\x00\x1b[31m$$$", "\ud800", '"]\n["', r"\left(", "(" * 9, "{" * 9, "\\"])
def test_broken_text_is_not_equal_and_raises_nothing(hostile: str) -> None:
    assert not math_equal(hostile, "6")


def test_text_is_parsed_not_executed(tmp_path: os.PathLike[str]) -> None:
    victim = os.path.join(tmp_path, "made")
    math_equal(f"__import__('os').mkdir('{victim}')", "6")
    assert not os.path.exists(victim)


def test_a_worker_that_died_while_idle_is_replaced() -> None:
    worker = MathWorker()
    assert worker.equal("2/4", "0.5")
    process = worker._process
    assert process is not None
    process.kill()
    process.wait()
    assert worker.equal("2/4", "0.5")
    worker.close()


def test_an_interrupt_during_the_start_of_the_worker_does_not_shift_later_answers() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    worker = MathWorker()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # importing sympy takes longer
        with pytest.raises(KeyboardInterrupt):
            worker.equal("1/2", "0.5")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [worker.equal(*pair) for pair in (("1/2", "0.5"), ("3", "4"), ("2", "2"))] == [True, False, True]
    worker.close()


def test_a_ctrl_c_of_the_terminal_does_not_reach_the_worker_not_even_while_it_starts() -> None:
    process = _started(1.0)
    assert os.getsid(process.pid) == process.pid
    process.kill()
    process.communicate()


@pytest.mark.parametrize("relative", [False, True])
def test_a_worker_runs_the_code_of_the_package_that_starts_it(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy's rule finds everything equal. An isolated interpreter would find the installed package, or none."""
    shutil.copytree(Path(arpo_trl.__file__).parent, tmp_path / "arpo_trl")
    rule = tmp_path / "arpo_trl/rewards/mathematics/equality.py"
    rule.write_text("def equal(prediction, gold):\n    return True\n\n\nis_text = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["" if relative else str(tmp_path), *sys.path])
    monkeypatch.setattr(math_worker_module, "__file__", str(tmp_path / "arpo_trl/rewards/math_worker.py"))
    worker = MathWorker()
    assert worker.equal("1", "2")
    worker.close()


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RewardError, match=r"did not start \(exit code"):
        MathWorker().equal("1", "2")


def test_a_worker_answers_without_a_stderr() -> None:
    code = "from arpo_trl.rewards.math_worker import MathWorker; print(MathWorker().equal('1/2', '0.5'))"
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code], capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_a_worker_that_starts_but_never_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker, file = MathWorker(), tmp_path / "worker.py"
    monkeypatch.setattr(math_worker_module, "__file__", str(file))
    file.write_text("print('ready', flush=True); input()")
    with pytest.raises(RewardError, match="started, but exited with status 0 instead of answering, twice"):
        worker.equal("1", "2")
    file.write_text("import os; print('ready', flush=True); input(); os.kill(os.getpid(), 9)")
    assert not worker.equal("1", "2")
    assert "was killed by signal 9, twice, so an answer counts as not equal" in caplog.text
    file.write_text("import os, signal; print('ready', flush=True); input(); os.kill(os.getpid(), signal.SIGPROF)")
    assert not worker.equal("1", "2")


def test_a_worker_has_no_environment_no_capability_and_few_system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARPO_TEST_CANARY", "canary")
    worker = MathWorker()
    assert worker.equal("1/2", "0.5")
    assert worker._process is not None
    proc = Path(f"/proc/{worker._process.pid}")
    assert (proc / "environ").read_bytes() == b""
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")  # 2: a filter
    limits = (proc / "limits").read_text().splitlines()
    assert {line[:26].strip(): line[26:].split()[:2] for line in limits if "file" in line} == {
        "Max file size": ["0", "0"],
        "Max core file size": ["0", "0"],
        "Max open files": ["64", "64"],
        "Max file locks": ["unlimited", "unlimited"],
    }
    worker.close()


def test_a_worker_waits_with_a_warning_while_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")] * 2

    def popen(*args: object, **settings: object) -> object:
        if failures:
            raise failures.pop()
        return start(*args, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr("subprocess.Popen", popen)
    monkeypatch.setattr("arpo_trl.rewards.math_worker._START_WAIT_S", 0.01)
    worker = MathWorker()
    with pytest.warns(UserWarning, match=r"cannot be started now \(.*temporarily unavailable\); rewards wait") as told:
        assert worker.equal("1/2", "0.5")
    assert [warning.category for warning in told].count(UserWarning) == 2
    worker.close()


def test_a_machine_without_a_process_for_the_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    monkeypatch.setattr("arpo_trl.rewards.math_worker.START_PATIENCE_S", 0.0)
    with pytest.raises(RewardError, match=r"could not be started for 0 s \(.*No such file"):
        MathWorker().equal("1", "2")


def test_words_are_compared_without_case_punctuation_and_articles() -> None:
    assert normalized_tokens("The U.S. Navy's  “Blue-Angels”!") == ["us", "navys", "blueangels"]


def test_text_of_nothing_but_articles_or_punctuation_keeps_its_words() -> None:
    assert normalized_tokens("A.") == ["a"]
    assert normalized_tokens("The The") == ["the", "the"]
    assert normalized_tokens("!!!") == ["!!!"]
    assert normalized_tokens("  ") == []
    assert token_f1("the", ["A"]) == 0.0


def test_chinese_and_japanese_characters_are_single_words() -> None:
    assert normalized_tokens("肖亮，CEO在2024年") == ["肖", "亮", "ceo", "在", "2024", "年"]
    assert normalized_tokens("トヨタ") == ["ト", "ヨ", "タ"]
    # 南京 against 南京大学: precision 2/2, recall 2/4, F1 = 2·2/(2+4)
    assert token_f1("南京", ["南京大学"]) == pytest.approx(2 / 3)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    # common: crystal, dynamics. precision 2/3, recall 2/2, F1 = 2·2/(3+2)
    assert token_f1("Crystal Dynamics Inc.", ["Crystal Dynamics"]) == pytest.approx(0.8)
    # a repeated word counts as often as both have it: common 1, F1 = 2·1/(3+1)
    assert token_f1("yes yes yes", ["yes"]) == pytest.approx(0.5)
    assert token_f1("", ["yes"]) == 0.0


def test_the_best_of_all_golds_counts() -> None:
    assert token_f1("Essex", ["Kent", "Essex county", "Essex"]) == 1.0
    assert exact_match("the essex", ["Kent", "Essex"])
    assert not exact_match("Essex county", ["Kent", "Essex"])
    assert not exact_match("", [""])


def test_paper_f1_strips_signs_and_fraction_bars() -> None:
    # What makes it a parity setting only: these are wrong answers.
    assert paper_f1("-6", ["6"]) == 1.0
    assert paper_f1("1/2", ["12"]) == 1.0
    assert paper_f1("0.5", ["1/2"]) == 0.0
    # punctuation beyond ASCII stays, and Chinese is not split
    assert paper_f1("“Essex”", ["Essex"]) == 0.0
    assert paper_f1("南京", ["南京大学"]) == 0.0
    assert paper_f1("the", ["A"]) == 0.0


def test_accuracy_follows_the_task() -> None:
    assert task_accuracy("-6", ["7", "-6.0"], "math") == 1.0
    assert task_accuracy("-6", ["6"], "math") == 0.0
    assert task_accuracy("Lowy", ["Frank Lowy"], "qa") == pytest.approx(2 / 3)  # 2·1/(1+2)
    with pytest.raises(RewardError, match=r"task is 'code'; expected one of \('math', 'qa'\)"):
        task_accuracy("1", ["1"], "code")
