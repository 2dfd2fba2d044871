import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arpo_trl.command_line import report_errors

ROOT = Path(__file__).parents[1]


def test_ctrl_c_ends_a_command_in_one_line_with_the_status_of_a_shell(monkeypatch, capsys):
    @report_errors
    def main() -> None:
        raise KeyboardInterrupt

    for rank, said in (("0", "Interrupted.\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 130
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "words", [["train.py"], ["sft.py"], ["-m", "arpo_trl.scripts.train"], ["-m", "arpo_trl.scripts.sft"]], ids=str
)
def test_ctrl_c_during_the_imports_of_a_program_is_one_line(tmp_path, words):
    (tmp_path / "datasets.py").write_text("raise KeyboardInterrupt\n")  # the first import that takes long
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert [line for line in ended.stderr.splitlines() if "loading PyTorch" not in line] == ["Interrupted."]
    assert ended.returncode == -signal.SIGINT  # a shell reports 130


def test_other_errors_during_imports_keep_their_traceback(tmp_path):
    (tmp_path / "datasets.py").write_text("raise KeyError('a bug')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    ended = subprocess.run(
        [sys.executable, "train.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" in ended.stderr and ended.stderr.endswith("KeyError: 'a bug'\n")
    assert ended.returncode == 1
