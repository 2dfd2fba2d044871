import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import transformers
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import resuming
from arpo_trl.errors import Interrupted
from arpo_trl.runs import interrupts as running
from arpo_trl.runs.checkpoints import Checkpoints
from arpo_trl.runs.interrupts import SAME_S, Interrupts, _forks
from forked import Fork
from resuming import BOUND_S, make_trainer, outcome, save_calling_model
from support import VLLM, python, save_sharp_model

HERE = Path(__file__).parent
ROOT = HERE.parent
STEPS = 7
BUFFERED = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
}
AFTER_EPOCH = {
    "max_steps": -1,
    "num_train_epochs": 1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "per_device_eval_batch_size": 8,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_reward",
}


ENVIRONMENTS = {"environment_factory": resuming.Notes, "tools": [python], "tool_timeout_s": 3.0}
"""After an interrupt the run waits for that long for an environment whose method hangs."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_calling_model(tmp_path_factory.mktemp("model"))


def train(model: str, output: Path, resume: bool = False, **settings) -> None:
    trainer = make_trainer(model, output, **{"max_steps": STEPS, "save_steps": 100, **settings})
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)


@pytest.fixture(scope="module")
def left_alone(model, tmp_path_factory):
    made: dict[str, dict] = {}

    def get(**settings) -> dict:
        if (key := repr(sorted(settings.items()))) not in made:
            folder = tmp_path_factory.mktemp("whole")
            train(model, folder, **settings)
            made[key] = outcome(folder)
        return made[key]

    return get


def interrupting(name: str, call: int):
    """Stands in for `wait_while_told`: at that call of `name` a signal comes, and the call would take for ever."""
    calls, lock = 0, threading.Lock()

    def wait(caller: str) -> None:
        nonlocal calls
        with lock:
            calls += caller == name
            comes = caller == name and calls == call
        if comes:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)

    return wait


@pytest.mark.slow
@pytest.mark.parametrize(
    ("waits", "call", "step", "settings"),
    [
        ("reward", 3, 2, {}),
        ("reward", 6, 5, {}),  # the first step of the second epoch: its batches are drawn, and so is a random number
        ("search", 4, None, {}),
        ("reward", 2, 4, BUFFERED),  # a generation batch serves four steps
        ("reward", 4, 2, {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}),
        ("reward", 6, 5, AFTER_EPOCH),
        ("search", 4, None, ENVIRONMENTS),
        ("reset", 18, None, ENVIRONMENTS),  # a step has 4 to 8 of them, with those of replays
    ],
    ids=[
        *("reward", "new epoch", "tool", "buffered", "evaluation", "evaluation after the last step"),
        *("call of an environment", "reset"),
    ],
)
def test_an_interrupted_run_resumes_like_an_uninterrupted_run(
    model, left_alone, waits, call, step, settings, tmp_path, monkeypatch
):
    """The step that was cut short, or the evaluation after it, is repeated from where the one before it ended."""
    monkeypatch.setattr(resuming, "wait_while_told", interrupting(waits, call))
    start = time.monotonic()
    with pytest.raises(Interrupted) as interrupted:
        train(model, tmp_path, **settings)
    assert time.monotonic() - start < BOUND_S
    assert interrupted.value.exit_status == 143
    (saved,) = Checkpoints(tmp_path).all()
    if step is not None:
        assert saved.name == f"checkpoint-{step}"
    assert f"is saved in {saved}. To resume, run the same command" in str(interrupted.value)
    monkeypatch.setattr(resuming, "wait_while_told", lambda caller: None)
    train(model, tmp_path, True, **settings)
    assert outcome(tmp_path) == left_alone(**settings)


@pytest.mark.slow
def test_an_evaluation_after_the_last_step_that_is_interrupted_twice_costs_no_rows(
    model, left_alone, tmp_path, monkeypatch
):
    """Step 7 is the second one of the second epoch, and steps 8 and 9 are trained when the run is continued."""
    settings = {
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "constant",
    }
    for call, resume in ((STEPS + 1, False), (1, True)):
        monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", call))
        with pytest.raises(Interrupted):
            train(model, tmp_path, resume, **settings)
    monkeypatch.setattr(resuming, "wait_while_told", lambda caller: None)
    train(model, tmp_path, True, max_steps=9, **settings)
    assert outcome(tmp_path) == left_alone(max_steps=9, **settings)


@pytest.mark.slow
def test_an_interrupted_evaluation_of_a_users_callback_costs_nothing_but_itself(model, left_alone, tmp_path):
    """It begins when a step has ended, but not the one before it: a generation batch serves four steps."""
    settings = {**BUFFERED, "max_steps": STEPS, "save_steps": 100, "per_device_eval_batch_size": 8}
    made = make_trainer(model, tmp_path, **settings)

    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                made.evaluate(resuming.ROWS.select(range(4)))

    made.add_callback(Evaluates())
    with pytest.raises(Interrupted, match="Step 2 is saved"):
        made.train()
    train(model, tmp_path, True, **settings)
    found, expected = outcome(tmp_path), left_alone(**settings)
    assert (found["weights"], found["trees"]) == (expected["weights"], expected["trees"])
    assert found["history"][-2]["num_tokens"] == expected["history"][-2]["num_tokens"]


def test_an_interrupt_in_the_first_step_leaves_no_checkpoint(model, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", 1))
    with pytest.raises(Interrupted, match="No step was finished yet"):
        train(model, tmp_path)
    assert Checkpoints(tmp_path).all() == []


@pytest.mark.slow
def test_a_step_that_is_saved_is_not_saved_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", 3))
    with pytest.raises(Interrupted, match="Step 2 is saved"):
        train(model, tmp_path, save_steps=2)
    written = Checkpoints(tmp_path).find(True).written
    monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", 1))
    with pytest.raises(Interrupted, match="Step 2 is saved"):
        train(model, tmp_path, True, save_steps=2)
    assert Checkpoints(tmp_path).find(True).written == written


@pytest.mark.parametrize("save_steps", [1, 100])
def test_an_interrupts_checkpoint_has_everything_whatever_the_others_have(model, tmp_path, monkeypatch, save_steps):
    monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", 2))
    with pytest.raises(Interrupted):
        train(model, tmp_path, save_only_model=True, save_steps=save_steps)
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").exists()


@pytest.mark.slow
def test_a_repeated_evaluation_keeps_a_checkpoint_to_resume_from(model, tmp_path, monkeypatch):
    class Killed(TrainerCallback):
        def on_step_begin(self, *_, **__):
            raise MemoryError("at the first step after the evaluation")

    settings = {"save_only_model": True, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    monkeypatch.setattr(resuming, "wait_while_told", interrupting("reward", 3))
    with pytest.raises(Interrupted):
        train(model, tmp_path, save_steps=100, **settings)
    written = Checkpoints(tmp_path).find(True).written
    monkeypatch.setattr(resuming, "wait_while_told", lambda caller: None)
    trainer = make_trainer(model, tmp_path, save_steps=100, **settings)
    trainer.add_callback(Killed())
    with pytest.raises(MemoryError):
        trainer.train(resume_from_checkpoint=True)
    assert Checkpoints(tmp_path).find(True).written > written
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()


def test_an_async_reward_is_not_waited_for(model, tmp_path):
    import asyncio

    async def slow(completions, **_):
        if calls:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(1000)
        calls.append(1)
        return [float(len(completion)) for completion in completions]

    calls: list[int] = []
    trainer = make_trainer(model, tmp_path, reward_funcs=slow, max_steps=3)
    with pytest.raises(Interrupted, match="Step 1 is saved"):
        trainer.train()


def test_an_interrupt_can_be_sent_to_other_ranks():
    for sent in (Interrupted(signal.SIGTERM), Interrupted(signal.SIGINT, "Step 2 is saved.")):
        got = pickle.loads(pickle.dumps(sent))
        assert (type(got), got.signum, str(got)) == (Interrupted, sent.signum, str(sent))


def test_the_handlers_of_before_are_back_afterwards(model, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(model, tmp_path, max_steps=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_end_of_a_child_does_not_stop_the_run():
    before = signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does once a data loader has workers
    try:
        interrupts = Interrupts()
        with interrupts.listening():
            os.kill(os.getpid(), signal.SIGCHLD)
            time.sleep(0.3)
            interrupts.check()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.slow
def test_a_child_that_lives_on_does_not_hold_up_the_end():
    with Interrupts().listening():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))  # as a persistent worker
        child.start()
    child.kill()
    child.join()


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_forked_process_ends_by_sigterm_ignores_ctrl_c_and_stops_nothing(in_main_thread):
    """A reward that runs code with a time limit in a process: in the main thread, or ahead of the update."""
    interrupts, ends = Interrupts(), []

    def fork() -> None:
        context = multiprocessing.get_context("fork")
        for target, arguments in ((time.sleep, (60,)), (signal.raise_signal, (signal.SIGINT,))):
            child = context.Process(target=target, args=arguments)
            child.start()
            if target is time.sleep:
                child.terminate()  # perhaps before the child runs at all
            child.join()
            ends.append(child.exitcode)

    with interrupts.listening():
        if in_main_thread:
            fork()
        else:
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        time.sleep(0.2)  # what a child wrote into the pipe would be read by now
        interrupts.check()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint((signal.SIGINT, signal.SIGTERM))
    assert ends == [-signal.SIGTERM, 0]


@pytest.mark.slow
@pytest.mark.parametrize("writes", [True, False])
def test_a_run_whose_log_has_no_reader_goes_on_to_its_last_line(writes):
    """As after Ctrl-C in `… | tee run.log`, which ends `tee`."""
    script = f"""
        import sys
        from arpo_trl.runs.interrupts import Interrupts, _forks
        stream = sys.stdout  # as of a progress bar from before
        with Interrupts().listening():
            print("trains", flush=True)
            sys.stdin.readline()
            if {writes}:
                print("saves", file=stream, flush=True)
                print("held until the exit")
        assert not {{"write", "flush"}} & vars(stream).keys()
        print("how to resume", flush=True)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "trains\n"
    run.stdout.close()
    _, said = run.communicate("\n", timeout=BOUND_S)
    assert (run.returncode, "BrokenPipeError" in said) == (0, False), said


def test_a_run_whose_terminal_is_closed_goes_on(monkeypatch):
    """A run in the background, which ignores SIGHUP."""
    terminal, own = os.openpty()
    with os.fdopen(own, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with Interrupts().listening():
            os.close(terminal)
            print("trains", flush=True)
            print("held until the end")
        print("how to resume", flush=True)


def begin_with_a_thread(number: int, **_) -> None:
    """Stands in for numpy and torch, which start threads on a machine with several cores."""
    threading.Thread(target=time.sleep, args=(BOUND_S,), daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_workers_that_load_data_are_ended_by_the_run_only(model, tmp_path, monkeypatch, start):
    """A batch system sends SIGTERM to all processes of a job, and the run still has to save."""
    monkeypatch.setattr(transformers.trainer, "seed_worker", begin_with_a_thread)
    trainer = make_trainer(model, tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context=start)
    batches = iter(trainer.get_train_dataloader())
    next(batches)  # the worker has begun
    (worker,) = multiprocessing.active_children()
    for _ in range(5):  # the system chooses one of its threads
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        time.sleep(0.05)
    next(batches)
    assert worker.is_alive()
    del batches
    worker.join(BOUND_S)
    assert worker.exitcode == 0


LEAVE_WORKERS = """
    import multiprocessing
    from torch.utils.data import DataLoader
    from arpo_trl.runs.interrupts import until_the_run_ends

    def train(start):
        global batches
        workers = dict(num_workers=2, worker_init_fn=until_the_run_ends(None), multiprocessing_context=start)
        batches = iter(DataLoader(range(9), **workers))
        next(batches)
        print(*(worker.pid for worker in batches._workers), flush=True)

    {call}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "train('fork')",
        "train('forkserver')",
        # as notebook_launcher and torch.multiprocessing start ranks: without atexit functions
        "rank = multiprocessing.get_context('fork').Process(target=train, args=('fork',)); rank.start(); rank.join()",
    ],
    ids=["fork", "forkserver", "a rank that is a process of multiprocessing"],
)
def test_workers_that_are_left_end_with_the_run(call):
    script = LEAVE_WORKERS.format(call=call)
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=BOUND_S
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert not any(psutil.pid_exists(int(pid)) for pid in ended.stdout.split())


def test_a_signal_while_a_reward_forks_ends_the_reward_after_the_fork():
    """Python drops what is raised within the functions of `register_at_fork`."""
    interrupts, forked = Interrupts(), False
    with interrupts.listening(), pytest.raises(Interrupted), interrupts.raising():
        _forks.before()
        os.kill(os.getpid(), signal.SIGTERM)
        _forks.in_parent()
        forked = True
        time.sleep(BOUND_S)
        raise AssertionError("the reward runs to its end")
    assert forked


def test_one_ctrl_c_is_no_second_one_when_a_reward_forks_later(monkeypatch):
    """A reward that catches everything forks a process for each completion. A second one at that time is heard."""
    interrupts, stopped = Interrupts(), []
    monkeypatch.setattr(running, "stop_at_once", stopped.append)
    with interrupts.listening():
        with interrupts.raising():
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGINT)
            time.sleep(SAME_S + 0.2)
            with pytest.raises(Interrupted) as interrupted:
                _forks.before()
                _forks.in_parent()
                time.sleep(BOUND_S)
        time.sleep(0.2)
        assert (interrupted.value.signum, stopped) == (signal.SIGINT, [])
        signal.raise_signal(signal.SIGINT)
    assert stopped == [130]


def test_streams_without_a_file_are_left_as_they_are(monkeypatch):
    class Tee:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Tee())
    with Interrupts().listening():
        sys.stdout.write("lost")
    assert not vars(sys.stdout)


def test_outside_the_main_thread_signals_stay_with_whoever_has_them():
    seen = []

    def listen() -> None:
        interrupts = Interrupts()
        with interrupts.listening():
            seen.append((interrupts.active, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


@pytest.mark.slow
def test_a_second_ctrl_c_is_heard_however_many_files_are_open():
    script = """
        import os, resource, signal, time
        from arpo_trl.runs.interrupts import SAME_S, Interrupts
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        with Interrupts().listening():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SAME_S + 0.5)  # sooner, it would be the first one again
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)  # it is killed in here, or else leaves with 0
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (130, False), ended.stderr


# Processes -----------------------------------------------------------------------------------------------------------


class Run:
    """resuming.py as a process, which comes to a wait in its third step."""

    def __init__(self, model: str, folder: Path, waits: str, *words: str, **variables: str):
        self.output, self.hang, self.log = folder / "run", folder / "hang", folder / "log"
        launcher, flags = (words, ()) if words[:1] == ("-m",) else ((), words)
        words = (*launcher, str(HERE / "resuming.py"), model, str(self.output), "--max_steps", str(STEPS), *flags)
        paths = [str(ROOT / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "HANG": str(self.hang), "PYTHONPATH": os.pathsep.join(paths), **variables}
        self.process = Fork(words, cwd=Path.cwd(), env=environment, log=self.log)
        self.until(lambda: list(self.output.glob("trajectories/step-000001*")))
        self.hang.write_text(waits, "utf-8")
        self.until(self.hang.with_suffix(".there").exists)
        self.family: list[psutil.Process] = []
        self.look()

    def look(self) -> None:
        """Takes note of the processes that there are now."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def until(self, condition) -> None:
        end = time.monotonic() + BOUND_S
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return self.log.read_text("utf-8", errors="replace")[-4000:]

    def left(self) -> list[psutil.Process]:
        """What is still there of it, after a while to end in."""
        _, alive = psutil.wait_procs(self.family, timeout=BOUND_S)
        return alive

    def close(self) -> None:
        for process in (*self.family, psutil.Process(self.process.pid) if self.process.poll() is None else None):
            if process is not None and process.is_running():
                process.kill()
        self.process.wait()


@pytest.fixture
def started(model, tmp_path):
    runs = []

    def start(waits: str, *words: str, model: str = model, **variables: str) -> Run:
        runs.append(Run(model, tmp_path, waits, *words, **variables))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def commands(processes: list[psutil.Process]) -> str:
    said = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has just ended
            said.append(" ".join(process.cmdline()))
    return "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_script_prints_how_to_resume_and_leaves_no_process(started, number, status):
    """In the middle of a call of the sandbox, of an MCP server, and of the reader of pages, which is halted there."""
    run = started("search", "--save_steps", "100", TOOLS="1")

    def all_are_at_work() -> bool:
        run.look()
        for process in run.family:
            if "tools/visit/worker.py" in commands([process]):
                process.suspend()  # else it would soon be done, whoever ends it
        return all(
            script in commands(run.family)
            for script in ("tools/python/worker.py", "mcp_server.py", "tools/visit/worker.py", "sleep 1000")
        )

    run.until(all_are_at_work)
    run.process.send_signal(number)
    assert run.process.wait(BOUND_S) == status, run.said()
    assert commands(run.left()) == ""
    (saved,) = Checkpoints(run.output).all()
    assert (
        f"is saved in {saved}. To resume, run the same command with --resume_from_checkpoint true, in a script"
        in run.said()
    )
    assert "Traceback" not in run.said()


@pytest.mark.vllm
@pytest.mark.slow
def test_no_process_of_a_colocated_vllm_is_left(started, tmp_path_factory):
    model = save_sharp_model(tmp_path_factory.mktemp("model"))
    colocated = ("--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_max_model_length", "512")
    run = started("reward", *colocated, model=model, **VLLM)
    run.process.terminate()
    assert run.process.wait(BOUND_S) == 143, run.said()
    assert commands(run.left()) == ""
    assert Checkpoints(run.output).all()


@pytest.mark.slow
def test_a_killed_script_resumes_like_an_uninterrupted_run(model, left_alone, started):
    """SIGKILL in the third step, before its checkpoint; the longer form is benchmarks/kill_training.py."""
    run = started("reward", "--save_steps", "1")
    run.process.kill()
    assert run.process.wait(BOUND_S) == -signal.SIGKILL
    assert Checkpoints(run.output).all()
    train(model, run.output, True)
    assert outcome(run.output) == left_alone()


@pytest.mark.slow
def test_a_second_ctrl_c_immediately_stops_code_that_ignores_signals(started):
    """The launcher's copy of the first one, a moment later, is no second one."""
    run = started("deaf")
    run.process.send_signal(signal.SIGINT)
    run.until(lambda: "stopping with a checkpoint" in run.said())  # two at the same time would be one
    run.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(2.0)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(BOUND_S) == 130
    assert run.left() == []
    assert "Ctrl-C again stops immediately." in run.said()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_run_ends_with_its_launcher(started):
    """`accelerate launch` on one process hands no signal on."""
    config = ROOT / "accelerate_configs" / "single.yaml"
    run = started("search", "-m", "accelerate.commands.launch", "--config_file", str(config))
    run.process.terminate()
    run.process.wait(BOUND_S)
    assert run.left() == []
    assert "To resume, run the same command" in run.said()
