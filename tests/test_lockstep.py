import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forked
from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines import lockstep
from arpo_trl.rollout.engines.lockstep import LockstepEngine
from support import ANSWER, Scripted

HERE = Path(__file__).parent
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """The results of two ranks, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    forked.run([*launcher, str(HERE / "lockstep_ranks.py"), str(folder)], cwd=HERE, env=os.environ)
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in (0, 1)]


def test_every_rank_gets_the_trees_of_its_own_prompts(ranks):
    """One rank has nothing to roll out, the other three prompts, numbers 3 to 5: the first keeps stepping for it."""
    first, second = (rank["uneven"] for rank in ranks)
    assert first["leaves"] == []
    assert second["leaves"] == [[f"<answer>\\boxed{{{group}}}</answer>"] * 4 for group in (3, 4, 5)]


def test_all_ranks_see_the_same_requests_in_the_same_order_in_every_session(ranks):
    first, second = (rank["uneven"] for rank in ranks)
    assert first["sessions"] == second["sessions"]
    assert [len(session) > 12 for session in first["sessions"]] == [True, True]


def test_a_rank_whose_tools_all_run_does_not_hold_up_the_others(ranks):
    """The first rank's search takes until the second's answers are asked for."""
    first, second = (rank["waits"] for rank in ranks)
    assert [len(said["leaves"]) for said in (first, second)] == [1, 1]
    for session in first["sessions"]:
        answers = [group for group, *_, depth in session if depth == 1]  # turns after a search, in order
        assert answers == sorted(answers, reverse=True)
        assert set(answers) == {0, 3}


def test_an_engine_that_samples_otherwise_on_one_rank_stops_the_group(ranks):
    for rank in ranks:
        assert "sampled other tokens than the group's first" in rank["diverges"]["error"]


def test_a_rank_that_fails_stops_the_others(ranks):
    first, second = (rank["fails"] for rank in ranks)
    assert second["error"] == "RuntimeError: broken here"
    assert first["error"] == "EngineError: The tensor parallel group stopped: RuntimeError on rank 1: broken here"


def test_a_signal_that_reaches_one_rank_first_is_an_interrupt_on_all(ranks):
    assert [rank["interrupted"]["error"] for rank in ranks] == ["Interrupted: Interrupted by SIGTERM."] * 2


def test_a_rank_that_is_lost_is_an_error_and_no_endless_wait(monkeypatch):
    def gather(*_):
        raise RuntimeError("Timed out waiting 1800000ms for recv operation")

    made = Scripted(lambda request, context: ANSWER)
    monkeypatch.setattr(lockstep.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(lockstep.dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(lockstep.dist, "all_gather_object", gather)
    made.sampler.engine = LockstepEngine(made.engine, group=None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"A rank of the tensor parallel group is lost \(RuntimeError: Timed out"):
        made()


def test_the_engine_runs_on_the_stream_of_the_session_in_every_session(monkeypatch):
    """Device and stream are properties of a thread, and each session has a new one."""
    stream, chosen = SimpleNamespace(device=torch.device("cuda", 1)), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("set_device", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda value: chosen.append((threading.current_thread().name, value)))
    monkeypatch.setattr(lockstep.dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(lockstep.dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(lockstep.dist, "all_gather_object", lambda rounds, mine, group: rounds.__setitem__(0, mine))
    engine = LockstepEngine(Scripted(lambda request, context: ANSWER).engine, group=None)  # type: ignore[arg-type]
    for _ in range(2):
        with engine.session():
            pass
    assert chosen == [("lockstep", stream.device), ("lockstep", stream)] * 2
