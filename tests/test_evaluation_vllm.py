"""Real vLLM, in process and as a server, gives the same greedy answers as transformers."""

import json
import os
import sys
from pathlib import Path

import pytest

import forked
from arpo_trl import cli
from arpo_trl.evaluation.samples import Records
from servers import running
from support import VLLM, save_sharp_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def words(folder: Path, model: str, name: str, *more: str) -> list[str]:
    """The command line of one evaluation."""
    return [
        *("eval", "--model", model, "--data", str(folder / "gsm8k.jsonl"), "--benchmarks", "gsm8k"),
        *("--output", str(folder / name), "--tools", "search", "--search-recorded", str(folder / "searches.json")),
        *("--temperature", "0", "--max-completion-length", "24", "--dtype", "float32", *more),
    ]


def written(folder: Path) -> list:
    """What each sample wrote and read, by question."""
    records = sorted(Records(folder / "samples.jsonl").values(), key=lambda record: record["number"])
    return [
        [(step["text"], [call["text"] for call in step.get("calls", ())]) for step in record["trajectory"]]
        for record in records
    ]


def evaluated(folder: Path, model: str, name: str, *more: str) -> list:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["arpo-trl", *words(folder, model, name, *more)])
        cli.main()
    assert not end.value.code
    return written(folder / name)


def evaluated_with_vllm(folder: Path, model: str) -> list:
    """In a process of its own, since vLLM sets up torch.distributed."""
    (folder / "command.py").write_text("from arpo_trl.cli import main; main()")
    command = [str(folder / "command.py"), *words(folder, model, "vllm", "--engine", "vllm")]
    forked.run(command, cwd=folder, env=os.environ | VLLM, timeout=280)
    return written(folder / "vllm")


def test_all_three_engines_give_the_same_greedy_answers(tmp_path):
    model = save_sharp_model(tmp_path / "model")
    rows = [{"question": f"what is {i}", "answer": f"#### {i}"} for i in range(8)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "searches.json").write_text(json.dumps({"iron": "1538 degrees"}))
    expected = evaluated(tmp_path, model, "transformers")
    assert len(expected) == 8
    assert evaluated_with_vllm(tmp_path, model) == expected
    with running(model, tmp_path / "log") as server:
        assert evaluated(tmp_path, model, "server", "--base-url", f"{server.url}/v1") == expected
