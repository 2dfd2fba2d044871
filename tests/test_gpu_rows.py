"""benchmarks/gpu.sh on a CPU: every row prints a result or an error, and no row blocks the others."""

import os
import re
import stat
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import forked
import quickstart_engines
import real_size
import update
from arpo_trl.command_line import parse_settings
from card import peak_flops, shown
from support import VLLM, script
from update import all_pairs, distinct_tokens, make_rows, step_flops

ROOT = Path(__file__).parents[1]


def gpu_sh(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "benchmarks/gpu.sh", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def tiny_row(*command: str) -> list[list[str]]:
    """The cells of the lines of a table that a row's program writes with its header, tiny and on a CPU."""
    command = (*command, "--device", "cpu", "--tiny", "--header")
    written = forked.run(command, cwd=ROOT, env=os.environ | VLLM, timeout=280, vllm=True)
    return [line.strip("|").split("|") for line in written.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_a_row_that_hangs_or_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    python = tmp_path / "python"  # the rows' interpreter, so that some of them end otherwise than well
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '    *"--row 300 16 none"*) echo "| the header |"; sleep 60 ;;\n'
        '    *"--row 300 16 half"*) echo "loading" >&2; echo "Boom: a | b" >&2; echo >&2; exit 1 ;;\n'
        '    *--row*) echo "| $3 $4 |" ;;\n'
        '    *) echo "On a CPU" ;;\n'
        "esac\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    done = gpu_sh("--tiny", "--output", str(tmp_path), "b", PYTHON=str(python), ROW_S="2")
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[:3] == [
        "| the header |",
        "| update_300_none | > 2 s |",
        "| update_300_half | failed with 1: Boom: a / b |",
    ]
    assert len(table) == 3 + 4  # the four shapes after prompts of 1,000 and 4,000 tokens
    assert (tmp_path / "gpu.md").read_text("utf-8") == done.stdout
    assert "loading" in (tmp_path / "gpu/update_300_half.log").read_text("utf-8")


@pytest.mark.slow
def test_rows_beyond_the_time_limit_are_listed(tmp_path: Path) -> None:
    done = gpu_sh("--tiny", "--output", str(tmp_path), "d", "e", ALL_S="0")
    said = "not run: the limit of 0 s is reached; run this part again |"
    told = [line for line in done.stdout.splitlines() if line.endswith(said)]
    assert [line.split()[1] for line in told] == ["about", "step_trl", "step_full", "step_half", "probing"]


@pytest.mark.slow
def test_words_that_mean_nothing_are_refused_before_anything_runs() -> None:
    done = gpu_sh("--output", "/nowhere", "f")
    assert (done.returncode, done.stdout) == (2, "")
    assert "f is none of --tiny, --output FOLDER, a, b, c, d, e" in done.stderr


@pytest.mark.slow
def test_a_row_of_the_update_has_a_cell_for_each_column() -> None:
    header, _, row = tiny_row("benchmarks/update.py", "--row", "1000", "16", "half", "--repeats", "1")
    assert len(header) == len(row)
    assert [cell.strip() for cell in row[:3]] == ["50", "16", "half"]
    # 16 rows of 50 + 24 tokens, of which differ: the prompt's 50, 12 in each of 8 pairs, and 12 in each row
    assert float(row[7]) == pytest.approx(16 * 74 / (50 + 8 * 12 + 16 * 12), abs=0.005)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_step_at_a_real_size_branches_half_way_and_is_split_into_phases() -> None:
    header, _, row = tiny_row("benchmarks/real_size.py", "half", "--steps", "3", "--budget", "200")
    cells = dict(zip((name.strip() for name in header), row, strict=True))
    step, *phases = (float(cells[f"{name} s"]) for name in ("step", "generate", "logprobs", "update", "sync"))
    assert sum(phases) == pytest.approx(step, abs=0.03)
    # In each of 2 groups 2 paths start, write 32 of their 64 tokens and branch: less than 2 · (2 · 32 + 4 · 32)
    assert 2 * 2 * 32 < float(cells["tokens sampled"]) < 2 * (2 * 32 + 4 * 32)


def test_the_distinct_tokens_of_rows_are_those_of_their_trie() -> None:
    # 1 2 3 │ 1 2 4 │ 9 2 3: the 2 after 9 is another one
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [9, 2, 3]])
    assert distinct_tokens(ids) == (4 + 3, (1 + 2 + 3 + 3) + (1 + 2 + 3))
    assert all_pairs(ids) == 3 * 6
    deep, _, _ = make_rows(10, 4, "deep", 8)
    assert distinct_tokens(deep)[0] == 10 + 2 + 2 * 2 + 4 * 4


def test_the_flops_of_a_step_are_those_of_its_matrices_and_pairs() -> None:
    # tiny: 2 layers of width 64 with one head of 64 for queries, keys and values, and an inner width of 256:
    # 4 · 64² + 3 · 64 · 256 = 65,536 parameters a layer; the head 64 · 8,000 = 512,000
    assert step_flops("tiny", tokens=10, completions=4, pairs=55) == pytest.approx(
        6 * (2 * 65_536 * 10 + 512_000 * 4) + 12 * 2 * 64 * 55
    )


def test_a_device_whose_peak_is_not_known_has_no_utilisation() -> None:
    assert shown(1.0 / peak_flops(torch.device("cpu")), ".1%") == "—"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA L40", 181.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("NVIDIA A100-SXM4-80GB", 312.0)],
)
def test_a_gpu_has_the_peak_of_its_own_data_sheet(name: str, tflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == tflops * 1e12


def test_the_tables_in_the_results_have_the_columns_that_the_rows_print() -> None:
    results = (ROOT / "docs/results.md").read_text("utf-8").partition("\n## On a GPU\n")[2]
    heads = re.findall(r"^\|(.*)\|\n\|[-:|]+\|$", results, re.MULTILINE)
    columns = (update.CARD_COLUMNS, quickstart_engines.COLUMNS, real_size.STEP_COLUMNS, real_size.PROBE_COLUMNS)
    assert [head.strip() for head in heads] == [column.strip() for column in columns]


def test_the_commands_to_try_name_settings_that_exist() -> None:
    text = (ROOT / "docs/gpu.md").read_text("utf-8")
    commands = re.findall(r"train\.py (--config [^`]*)`", text)
    assert len(commands) == 3
    for command in commands:
        # on a CPU neither float16 nor bfloat16 of a GPU is to be had
        words = [word if word != "true" or before not in ("--bf16", "--fp16") else "false"
                 for before, word in pairwise(["", *command.split()])]  # fmt: skip
        parse_settings(script("train").SETTINGS, [*words, "--use_cpu", "true"])
