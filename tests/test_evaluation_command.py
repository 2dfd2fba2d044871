"""`arpo-trl eval` and `arpo-trl compare` as users run them."""

import copy
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from arpo_trl import cli, command_line
from arpo_trl.common.adapters import of_revision
from arpo_trl.errors import ConfigError
from arpo_trl.evaluation.benchmarks import BENCHMARKS
from arpo_trl.evaluation.command import _ProgressBar, compare_runs, load_all
from arpo_trl.evaluation.engines import _load_model, _weights, load_tokenizer, make_sampler
from arpo_trl.evaluation.samples import Records, key_of
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from evaluating import asked_number, boxed, completions, record, save_tokenizer
from loopback import Loopback, Reply
from support import command_output, save_tiny_model, search, small_model, tokenizer, with_template, without_a_layer

HEAVY = ("torch", "transformers", "trl", "datasets", "numpy")


def sampler_of(settings: EvalSettings, toolbox: ToolBox) -> TreeSampler:
    return make_sampler(settings, toolbox, load_tokenizer(settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(folder: Path, name: str = "gsm8k", count: int = 4) -> Path:
    rows = [{"question": f"what is {i}", "answer": f"thus\n#### {i}"} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(prompt: str) -> str:
    """A model behind a server: looks iron up once, then answers with the number asked for, 3 excepted."""
    if "1538 degrees" not in prompt:
        return "<search>iron</search>"
    number = asked_number(prompt)
    return boxed(number if number != "3" else "7")


def recorded(folder: Path) -> str:
    path = folder / "searches.json"
    path.write_text(json.dumps({"iron": "1538 degrees"}))
    return str(path)


def flags(folder: Path, url: str, **other) -> list[str]:
    given = {"--model": save_tokenizer(folder / "tokenizer"), "--base-url": url + "/v1", "--data": str(folder)}
    given |= {"--search-recorded": recorded(folder), "--output": str(folder / "run"), **other}
    return ["eval", "--benchmarks", "gsm8k", "--tools", "search", *(word for pair in given.items() for word in pair)]


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_table_and_a_folder_with_everything(monkeypatch, capsys, here):
    data(here)
    with Loopback(completions(answers)) as server:
        status, out, _ = command_output(monkeypatch, capsys, *flags(here, server.url))
    assert status == 0
    assert "| GSM8K | math equality | 0.750 | " in out and "| 4 | 4 | 0 | 1.00 |" in out
    folder = here / "run"
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "samples.jsonl",
        "results.json",
        "report.md",
        "report.html",
    }
    results = json.loads((folder / "results.json").read_text())
    gsm8k = results["benchmarks"]["gsm8k"]
    assert (gsm8k["score"], gsm8k["tools"]["search"]["calls"], results["suites"]) == (0.75, 4, {"reasoning": 0.75})
    settings = results["settings"]
    assert (settings["temperature"], settings["top_p"], settings["context"]) == (0.6, 0.95, 32768)  # the paper's
    assert settings["tool_call_limits"] == ["python=5", "search=10"]
    assert results["versions"]["transformers"] and "git_commit" in results
    assert len(list(Records(folder / "samples.jsonl").values())) == 4


def test_results_of_a_server_name_the_served_model_and_no_weights(monkeypatch, capsys, caplog, here):
    data(here)
    with Loopback(completions(answers)) as server:
        words = flags(here, server.url)
        assert command_output(monkeypatch, capsys, *words)[0] == 0
        assert "serves 'tiny', but model is" in caplog.text
        caplog.clear()
        named = [*words, "--served-model", "tiny", "--resume"]
        assert command_output(monkeypatch, capsys, *named)[0] == 0
        assert "serves 'tiny'" not in caplog.text
        server.answer = lambda asked: Reply({"data": [{"id": "big"}]}) if asked.method == "GET" else Reply("", 404)
        status, _, err = command_output(monkeypatch, capsys, *words, "--resume")
    assert status == 2 and 'settings.served_model is "tiny" there and "big" here' in err
    results = json.loads((here / "run/results.json").read_text())
    assert (results["weights"], results["settings"]["served_model"]) == (None, "tiny")


def test_failed_samples_are_status_1_and_resume_tries_them_again(monkeypatch, capsys, here):
    data(here)
    broken = threading.Event()
    broken.set()

    def writes(prompt):
        return 3 if broken.is_set() and asked_number(prompt) == "1" else answers(prompt)

    with Loopback(completions(writes)) as server:
        words = flags(here, server.url, **{"--output": str(here / "a run")})
        status, out, _ = command_output(monkeypatch, capsys, *words)
        assert status == 1
        again = f"To try again, run the command with: --output '{here}/a run' --resume"
        assert f"1 sample(s) failed or are missing. {again}" in out
        broken.clear()
        before = len(server.asked)
        status, out, _ = command_output(monkeypatch, capsys, *words, "--resume")
    assert status == 0 and "| 0.750 |" in out
    assert len(server.asked) - before <= 4  # models, probe, and two turns of the one that was missing


def test_a_judge_that_is_down_leaves_no_score_until_resume_judges(monkeypatch, capsys, here):
    questions = here / "own.jsonl"
    rows = [{"question": f"what is {i}", "answer": str(i)} for i in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = here / "eval.yaml"
    config.write_text(
        json.dumps(
            {
                "benchmarks": ["own"],
                "custom": [
                    {
                        "name": "own",
                        "file": questions.name,
                        "question": "question",
                        "answer": "answer",
                        "scorer": "judge",
                    }
                ],
            }
        )
    )
    down = threading.Event()
    down.set()

    def judges(asked):
        return Reply(status=401) if down.is_set() else Reply({"choices": [{"message": {"content": "Incorrect"}}]})

    with Loopback(completions(answers)) as server, Loopback(judges) as judge:
        words = [word for word in flags(here, server.url) if word not in ("--benchmarks", "gsm8k")]
        at = words.index("--data")
        del words[at : at + 2]
        words += ["--config", str(config), "--judge-url", judge.url + "/v1", "--judge-model", "wise"]
        status, out, error = command_output(monkeypatch, capsys, *words)
        assert status == 1
        assert re.search(r"\| LLM judge \| — \| .* \| 4 \| 4 \| 1 \|", out) and "failed or are missing" not in out
        assert "1 sample(s) have no verdict of the judge, so its score is open. To try again, run" in out
        assert "1 without a verdict" in error and "score 1.000" not in error.split("4/4")[-1]
        down.clear()
        status, out, _ = command_output(monkeypatch, capsys, *words, "--resume")
    assert status == 0 and "| LLM judge | 0.750 |" in out


def test_a_lost_server_keeps_finished_samples_and_gives_status_1(monkeypatch, capsys, here):
    data(here, count=2)
    monkeypatch.setattr("arpo_trl.rollout.engines.completions.RETRY_S", 0.05)
    made = []

    class Impatient(CompletionsEngine):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings, away_s=0.2)
            made.append(self)

    monkeypatch.setattr("arpo_trl.evaluation.engines.CompletionsEngine", Impatient)
    server = Loopback(completions(answers))
    with server:

        def then_gone(prompt):
            if asked_number(prompt) == "1":
                threading.Thread(target=server.server.server_close).start()
                made[0]._url = "http://127.0.0.1:9/v1"
                made[0]._last_answer_s = 0.0
            return answers(prompt)

        server.answer = completions(then_gone)
        status, out, _ = command_output(monkeypatch, capsys, *flags(here, server.url), "--concurrency", "1")
    assert status == 1
    assert "EngineError: The completions server is unreachable" in out and "Finished samples are kept" in out
    assert [one["number"] for one in Records(here / "run/samples.jsonl").values()] == [0]


def test_an_engine_in_process_takes_any_dataset_several_samples_and_yaml(monkeypatch, capsys, here, model):
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "what is 1", "answer": "1", "task": "math"}) + "\n")
    (here / "eval.yaml").write_text(
        f"model: {model}\ndata: rows.jsonl\ntools: []\nsamples: 5\nmax_completion_length: 8\n"
    )
    status, out, _ = command_output(
        monkeypatch, capsys, "eval", "--config", "eval.yaml", "--samples", "2"
    )  # the flag wins
    assert status == 0
    assert "| rows | math equality | 0.000 | 0.000 – 0.000 | 1 | 2 | 0 | 0.00 |" in out
    (folder,) = (here / "runs/eval").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["benchmarks"]["rows"]["pass_at_k"] == {"1": 0.0, "2": 0.0}


def test_evaluations_that_start_in_the_same_second_have_folders_of_their_own(monkeypatch, capsys, here):
    class Frozen(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr("arpo_trl.evaluation.command.datetime", Frozen)
    data(here)
    with Loopback(completions(answers)) as server:
        words = flags(here, server.url)[:-2]
        for _ in range(3):
            assert command_output(monkeypatch, capsys, *words)[0] == 0
        assert command_output(monkeypatch, capsys, *words, "--tool-call-limits", "nonsense=1")[0] == 2
    name = "tokenizer-20260102-030405"
    assert {path.name for path in (here / "runs/eval").iterdir()} == {name, f"{name}-2", f"{name}-3"}


def test_greedy_answers_are_the_same_through_transformers_and_through_a_server(monkeypatch, capsys, here, model):
    """The server is the model itself: what it writes for a text, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    data(here, count=3)
    policy = AutoModelForCausalLM.from_pretrained(model)

    def writes(prompt: str) -> str:
        ids = torch.tensor([tokenizer().encode(prompt, add_special_tokens=False)])
        out = policy.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return tokenizer().decode(out, skip_special_tokens=False)

    shared = ["eval", "--model", model, "--data", here, "--temperature", "0", "--max-completion-length", "8"]
    shared += ["--tools", "search", "--search-recorded", recorded(here)]
    assert command_output(monkeypatch, capsys, *shared, "--output", here / "in-process")[0] == 0
    with Loopback(completions(writes)) as server:
        assert (
            command_output(
                monkeypatch, capsys, *shared, "--base-url", server.url + "/v1", "--output", here / "server"
            )[0]
            == 0
        )
    texts = [
        {r["number"]: [s["text"] for s in r["trajectory"]] for r in Records(here / name / "samples.jsonl").values()}
        for name in ("in-process", "server")
    ]
    assert texts[0] == texts[1]


def test_an_adapter_is_evaluated_with_its_model(monkeypatch, capsys, here, model):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    data(here, count=1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(here / "adapter")
    shared = ("eval", "--model", model, "--data", here, "--max-completion-length", "4")
    shared += ("--tools", "search", "--search-recorded", recorded(here))
    assert command_output(monkeypatch, capsys, *shared, "--adapter", here / "adapter", "--output", "run")[0] == 0
    status, _, err = command_output(monkeypatch, capsys, *shared, "--adapter", here / "nowhere", "--output", "other")
    assert status == 2 and "The adapter of" in err


def test_an_adapter_is_evaluated_as_it_was_trained(here, model):
    """Merged into bfloat16 weights it would be rounded."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(here / "base")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(here / "base"), lora).save_pretrained(here / "adapter")
    settings = EvalSettings(model=str(here / "adapter"))
    evaluated = _load_model(settings, _weights(settings))
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "base"), here / "adapter")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(evaluated(ids).logits, trained(ids).logits)


def test_an_adapter_is_evaluated_with_its_revision_and_its_tokenizer(monkeypatch, capsys, here, model, hub):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    hub.repos["models", "me/base"] = {}  # the main revision is no model
    hub.revisions["me/base", "v1"] = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    base = AutoModelForCausalLM.from_pretrained("me/base", revision="v1")
    adapted = get_peft_model(base, of_revision(LoraConfig(target_modules=["q_proj"]), "v1"))
    adapted.save_pretrained(here / "adapter")
    shared = ("--model", "me/base", "--adapter", here / "adapter", "--max-completion-length", "4")
    shared += ("--tools", "search", "--search-recorded", recorded(here))
    data(here, count=1)
    assert command_output(monkeypatch, capsys, "eval", *shared, "--data", here, "--output", "run")[0] == 0
    alone = ("--model", here / "adapter", *shared[4:])
    assert command_output(monkeypatch, capsys, "eval", *alone, "--data", here, "--output", "alone")[0] == 0
    own = copy.deepcopy(tokenizer())
    own.chat_template = "{{ 'own' }}"
    own.save_pretrained(here / "adapter")
    found = load_tokenizer(EvalSettings(model="me/base", adapter=str(here / "adapter")))
    assert found.chat_template == "{{ 'own' }}"


def test_code_of_a_model_runs_only_if_it_is_trusted(monkeypatch, capsys, here):
    save_tiny_model(here / "model")
    code = "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
    code += "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
    code += "class Own(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    (here / "model/own.py").write_text(code)
    config = json.loads((here / "model/config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (here / "model/config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    data(here, count=1)
    words = ("eval", "--model", here / "model", "--data", here, "--max-completion-length", "4", "--tools", "search")
    words += ("--search-recorded", recorded(here))
    status, _, err = command_output(monkeypatch, capsys, *words, "--output", "refused")
    assert status == 2 and "trust_remote_code" in err
    assert command_output(monkeypatch, capsys, *words, "--trust-remote-code", "--output", "trusted")[0] == 0


# Killed --------------------------------------------------------------------------------------------------------------


def evaluate_in_child(words: list[str]) -> multiprocessing.Process:
    """The command in a process of its own; forked, since importing it all again would take most of the time."""

    def main() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        sys.argv = ["arpo-trl", *words]
        cli.main()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def killed_run(
    folder: Path, url: str, delays: list[float], lines_first: list[int], may_end: threading.Event
) -> list[dict]:
    """The samples of a run that was killed after each of `delays` s beyond so many finished samples, and resumed. It
    ends when `may_end` is set, after the last kill."""
    words = [*flags(folder, url), "--temperature", "0", "--concurrency", "2"]
    log = folder / "run/samples.jsonl"
    resume: list[str] = []
    for delay, lines in zip(delays, lines_first, strict=True):
        process = evaluate_in_child([*words, *resume])
        while process.is_alive() and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        resume = ["--resume"]
    may_end.set()
    process = evaluate_in_child([*words, *resume])
    process.join(120)
    assert process.exitcode == 0
    return list(Records(log).values())


@pytest.mark.slow
def test_a_run_that_is_killed_at_20_random_moments_ends_like_one_that_is_not(here):
    kills, may_end = 20, threading.Event()

    def slowly(prompt):
        time.sleep(0.04)
        if asked_number(prompt) == "9":
            may_end.wait(120)
        return answers(prompt)

    for name in ("whole", "killed"):
        (here / name).mkdir()
        data(here / name, count=10)  # questions are told apart by one digit
    draw = random.Random(os.getpid())
    with Loopback(completions(slowly)) as server:
        whole = killed_run(here / "whole", server.url, [], [], may_end)
        may_end.clear()
        delays = [draw.uniform(0, 0.06) for _ in range(kills)]
        killed = killed_run(here / "killed", server.url, delays, [9 * i // kills for i in range(kills)], may_end)
    assert len(killed) == 10

    def plain(records):
        kept = {}
        for one in records:
            steps = [
                (s["role"], s["text"], [(c["name"], c["text"]) for c in s.get("calls", ())]) for s in one["trajectory"]
            ]
            assert key_of(one) not in kept
            kept[key_of(one)] = (one["prediction"], one["scores"], one["golds"], one["tokens"], steps)
        return kept

    assert plain(killed) == plain(whole), delays
    results = [
        json.loads((here / name / "run/results.json").read_text())["benchmarks"]["gsm8k"]
        for name in ("whole", "killed")
    ]
    for one in results:
        del one["seconds"], one["tools"]["search"]["seconds"]
    assert results[0] == results[1]


def test_ctrl_c_keeps_finished_samples_writes_the_report_and_gives_status_1(here):
    def slowly(prompt):
        time.sleep(0.3)
        return answers(prompt)

    data(here, count=10)
    log = here / "run/samples.jsonl"
    with Loopback(completions(slowly)) as server:
        process = evaluate_in_child([*flags(here, server.url), "--concurrency", "1"])
        while not log.exists() or not log.read_bytes():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
    assert process.exitcode == 1
    summary = json.loads((here / "run/results.json").read_text())["benchmarks"]["gsm8k"]
    assert 1 <= summary["samples"] == 10 - summary["missing"] < 10


# Checks and comparisons ----------------------------------------------------------------------------------------------


def test_the_self_check_needs_no_model_and_lists_golds_that_cannot_be(monkeypatch, capsys, here):
    path = data(here, count=3)
    status, out, _ = command_output(monkeypatch, capsys, "eval", "--self-check", "--data", here)
    assert status == 0 and "| gsm8k | math equality | 3 | 1.0000 | 0.0000 |" in out
    with path.open("a") as file:
        file.write(json.dumps({"question": "?", "answer": "}:x:{"}) + "\n")
    status, out, _ = command_output(monkeypatch, capsys, "eval", "--self-check", "--data", here)
    assert status == 1 and "gsm8k, question 3: '}:x:{' does not score 1 by math equality, exact match" in out
    assert "gsm8k, question 3: only equal text matches '}:x:{'" in out
    assert not (here / "runs").exists()


def test_an_evaluation_reports_the_system_prompt_of_plain_questions(monkeypatch, capsys, caplog, here):
    data(here, "questions", count=3)
    for prompt, reports in (([], True), (["--system-prompt", "deepsearch"], False)):
        logging.getLogger("arpo_trl").setLevel(logging.NOTSET)
        caplog.clear()
        assert (
            command_output(monkeypatch, capsys, "eval", "--self-check", "--data", here / "questions.jsonl", *prompt)[0]
            == 0
        )
        assert ('3 row(s) have the system prompt "reasoning"' in caplog.text) == reports


def test_two_runs_are_compared(monkeypatch, capsys, here):
    data(here)
    for name, writes in (("a", lambda prompt: boxed("0")), ("b", answers)):
        with Loopback(completions(writes)) as server:
            words = flags(here, server.url, **{"--output": str(here / name)})
            assert command_output(monkeypatch, capsys, *words, *(["--top-p", "0.5"] if name == "b" else []))[0] == 0
    _, out, _ = command_output(monkeypatch, capsys, "compare", "a", "a")
    assert "reason for a difference" not in out
    status, out, _ = command_output(monkeypatch, capsys, "compare", "a", "b")
    assert "reason for a difference:\n- top_p: 0.95 in A, 0.5 in B\n\n" in out
    assert status == 0
    assert "| gsm8k | math equality | 4 | 0.250 | 0.750 | +0.500 | " in out and "| 0 | 2 | 0.5000 |" in out
    assert (here / "b/against-a.png").exists()
    file = data(here)
    file.write_text(file.read_text().replace("#### 3", "#### 7"))
    with Loopback(completions(answers)) as server:
        words = flags(
            here, server.url, **{"--output": str(here / "c"), "--top-p": "0.5", "--system-prompt": "Add them."}
        )
        assert command_output(monkeypatch, capsys, *words)[0] == 0
    _, out, _ = command_output(monkeypatch, capsys, "compare", "b", "c")
    assert "\n- golds of gsm8k: different for 1 of 4 common question(s)\n- prompts of gsm8k: different for 4 of" in out
    status, _, err = command_output(monkeypatch, capsys, "compare", "a", "nowhere")
    assert status == 2 and "nowhere contains no results.json" in err


def test_the_progress_bar_has_the_score_so_far_and_does_not_grow():
    with Progress(disable=True) as progress:
        task = progress.add_task("sums", total=300, score="")
        bar = _ProgressBar(progress, task, BENCHMARKS["gsm8k"])
        sizes = []
        for number in range(300):
            bar.add(record(number, float(number % 4 > 0)))
            sizes.append(len(pickle.dumps({name: each for name, each in vars(bar).items() if name != "_progress"})))
        assert progress.tasks[0].fields["score"] == "score 0.750"  # 225 of 300
        assert max(sizes) - min(sizes) < 20  # digits of the counts
        bar.add(record(300, None))
        bar.add(record(301, 1.0, scores={"math": None, "judge": None}))
        assert progress.tasks[0].fields["score"] == " [red]1 failed[/] [red]1 without a verdict[/]"


def test_the_benchmarks_are_listed_and_no_id_is_broken(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = command_output(monkeypatch, capsys, "eval", "--list-benchmarks")
    assert status == 0 and "openai/gsm8k main test" in out
    assert [b.name for b in BENCHMARKS.values() if f"\n{b.name} " not in f"\n{out}"] == []
    assert [b.hub_id for b in BENCHMARKS.values() if b.hub_id and b.hub_id not in out] == []


# Usage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_is_there_in_no_time_and_names_every_setting():
    code = (
        "import sys, time; sys.argv = ['arpo-trl', 'eval', '--help']\n"
        "from arpo_trl.cli import main\n"
        "try: main()\n"
        f"finally: print(sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    for name in EvalSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout
    assert "Exit status: 0 success, 1 some samples failed, 2 usage error." in " ".join(done.stdout.split())


@pytest.mark.parametrize("benchmarks", [None, 2, [2]])
def test_benchmarks_of_another_type_are_named(benchmarks):
    with pytest.raises(ConfigError, match=r"benchmarks is .*; expected"):
        EvalSettings(model="m", benchmarks=benchmarks)


def test_no_limits_of_tools_are_none_in_a_file_too():
    assert EvalSettings(model="m", tool_call_limits="none").call_limits() == {}


@pytest.mark.parametrize("settings", ["plot.xyz", "plot"])
def test_a_comparison_writes_pictures_only(settings):
    with pytest.raises(ConfigError, match=rf"--plot is {settings}; expected a file that ends in \.png"):
        compare_runs(Path("a"), Path("b"), Path(settings))


def test_two_benchmarks_of_ones_own_need_two_names(here):
    mine = {"name": "mine", "file": "a", "question": "q", "answer": "a", "scorer": "math"}
    with pytest.raises(ConfigError, match="custom has two benchmarks with the name 'mine'"):
        load_all(EvalSettings(model="m", custom=[mine, mine | {"name": "Mine"}]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "m"), "No benchmark is selected. Pass --benchmarks, --suite or --data."),
        (("--benchmarks", "gsm8"), "There is no benchmark 'gsm8'; did you mean gsm8k"),
        (("--suite", "maths"), "suite is 'maths'; expected one of"),
        (("--suite", "all", "--benchmarks", "gsm8k"), "benchmarks and suite are both set"),
        (("--data", "gsm8k.jsonl"), "model is missing"),
        (("--model", "nowhere", "--data", "gsm8k.jsonl"), "The tokenizer of 'nowhere' cannot be loaded"),
        (("--model", "m", "--tempratur", "1"), "There is no setting 'tempratur'; did you mean 'temperature'"),
        (("--model", "m", "--samples", "0"), "samples is 0; expected an integer of at least 1"),
        (("--model", "m", "--temperature", "-1"), "temperature is -1.0"),
        (("--model", "m", "--top-p", "0"), "top_p is 0.0"),
        (("--model", "m", "--engine", "sglang"), "engine is 'sglang'; expected one of ['transformers', 'vllm']"),
        (("--model", "m", "--judge-cache", "v.jsonl"), "judge_cache is set without"),
        (("--model", "m", "--tool-call-limits", "python"), "tool_call_limits contains 'python'"),
        (("--model", "m", "--judge-url", "http://x"), "Only one of judge_url and judge_model is set"),
        (("--model", "m", "--resume"), "resume is set without output"),
        (("--model", "m", "--base-url", "http://x/v1", "--engine", "vllm"), "base_url is set together with"),
        (("--benchmarks", "gsm8k,math", "--data", "gsm8k.jsonl"), "2 benchmarks are selected; expected one. Name one"),
        (("--benchmarks", "gaia"), "GAIA could not be loaded from the Hub. It is gated"),
        (("--config", "nowhere.yaml"), "The --config file cannot be read"),
        (("--data", "broken.jsonl", "--benchmarks", "gsm8k"), "broken.jsonl, line 2: not valid JSON"),
        (("--data", "nogold.jsonl", "--benchmarks", "gsm8k"), "nogold.jsonl, line 1: no answer"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(monkeypatch, capsys, here, words, message):
    data(here)
    (here / "broken.jsonl").write_text('{"question": "?", "answer": "1"}\n{"question\n')
    (here / "nogold.jsonl").write_text('{"question": "?"}\n')
    status, out, err = command_output(
        monkeypatch, capsys, "eval", "--tools", "search", "--search-recorded", recorded(here), *words
    )
    assert (status, out) == (2, "")
    loading, error = err.splitlines()
    assert loading == "arpo-trl eval: loading PyTorch and TRL …"
    assert message in error


def test_broken_rows_can_be_left_out(monkeypatch, capsys, here):
    data(here, count=1)
    with (here / "gsm8k.jsonl").open("a") as file:
        file.write("{torn\n")
    assert command_output(monkeypatch, capsys, "eval", "--self-check", "--data", here)[0] == 2
    status, out, _ = command_output(monkeypatch, capsys, "eval", "--self-check", "--data", here, "--skip-bad")
    assert status == 0 and "| gsm8k | math equality | 1 |" in out
    (here / "mine.jsonl").write_text('{"question": "What?", "answer": "1"}\n')
    status, _, err = command_output(
        monkeypatch, capsys, "eval", "--self-check", "--data", here / "mine.jsonl", "--skip-bad"
    )
    assert status == 2 and "skip_bad is set, but it applies to benchmarks only" in err


def test_a_model_whose_files_lack_weights_is_an_error(monkeypatch, capsys, here, model):
    data(here)
    words = ("--data", "gsm8k.jsonl", "--model", without_a_layer(model, here / "broken"), "--tools", "python")
    status, _, err = command_output(monkeypatch, capsys, "eval", *words)
    assert status == 2 and "weights of Qwen3ForCausalLM are missing from the files of" in err
    status, _, err = command_output(monkeypatch, capsys, "ask", words[3], "?", "--tools", "python")
    assert status == 2 and "weights of Qwen3ForCausalLM are missing from the files of" in err


def test_a_token_without_an_embedding_is_an_error(monkeypatch, capsys, here):
    data(here)
    small_model(Qwen3Config, Qwen3ForCausalLM, vocab_size=len(tokenizer()) - 20).save_pretrained(here / "few")
    with_template("qwen3").save_pretrained(here / "few")
    words = ("--data", "gsm8k.jsonl", "--model", "few", "--tools", "python")
    status, _, err = command_output(monkeypatch, capsys, "eval", *words)
    assert status == 2 and "ConfigError: The prompt of the first question contains the token" in err
    status, _, err = command_output(monkeypatch, capsys, "ask", "few", "what is the", "--tools", "python")
    assert status == 2 and "DataError: The text contains the token" in err and "but the model has only 297" in err


def test_a_model_without_a_chat_template_is_an_error(monkeypatch, capsys, here):
    import copy

    data(here)
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    bare.save_pretrained(here / "bare")
    with Loopback(completions(answers)) as server:
        words = flags(here, server.url, **{"--model": str(here / "bare")})
        status, _, err = command_output(monkeypatch, capsys, *words)
    assert status == 2 and "has no chat template; expected one, to render questions as prompts" in err


def test_a_chat_template_that_leaves_out_the_system_message_is_an_error(monkeypatch, capsys, here):
    import copy

    data(here)
    without = copy.deepcopy(tokenizer())
    without.chat_template = "{% for each in messages if each.role == 'user' %}<|user|>{{ each.content }}{% endfor %}"
    without.save_pretrained(here / "without")
    with Loopback(completions(answers)) as server:
        words = flags(here, server.url, **{"--model": str(here / "without")})
        status, _, err = command_output(monkeypatch, capsys, *words)
        assert status == 2 and "The first question: the tokenizer's chat template leaves out the system" in err
        assert command_output(monkeypatch, capsys, *words, "--system-prompt", "")[0] == 0


def test_the_folder_of_a_different_run_is_refused(monkeypatch, capsys, here):
    data(here)
    with Loopback(completions(answers)) as server:
        words = flags(here, server.url)
        assert command_output(monkeypatch, capsys, *words)[0] == 0
        status, _, err = command_output(monkeypatch, capsys, *words, "--resume", "--temperature", "1")
        assert status == 2 and "contains a different run: settings.temperature is 0.6 there and 1.0 here" in err
        status, _, err = command_output(monkeypatch, capsys, *words)
        assert status == 2 and "already contains this run" in err
        data(here, count=3)
        status, _, err = command_output(monkeypatch, capsys, *words, "--resume")
        assert status == 2 and "contains a different run: questions.gsm8k is" in err
        assert command_output(monkeypatch, capsys, *words[:-1], here / "other", "--concurrency", "1")[0] == 0


def test_a_limit_for_a_tool_that_is_not_offered_is_refused(monkeypatch, capsys, here):
    data(here)
    with Loopback(completions(answers)) as server:
        status, _, err = command_output(
            monkeypatch, capsys, *flags(here, server.url), "--tool-call-limits", "serach=3"
        )
    assert status == 2 and "tool_call_limits names 'serach', but the tools are ['search']" in err


def test_limits_of_tools_reach_the_model(monkeypatch, capsys, here):
    data(here, count=1)

    def insists(prompt):
        return boxed("0") if "No search calls are left" in prompt else "<search>iron</search>"

    with Loopback(completions(insists)) as server:
        status, out, _ = command_output(
            monkeypatch, capsys, *flags(here, server.url), "--tool-call-limits", "search=2"
        )
    assert status == 0 and "| 3.00 |" in out
    (one,) = Records(here / "run/samples.jsonl").values()
    calls = [call["failure"] for step in one["trajectory"] if step["role"] == "tool" for call in step["calls"]]
    assert calls == [None, None, "call_limit"]


def test_no_key_gets_into_a_folder(monkeypatch, capsys, here):
    data(here)
    monkeypatch.setenv("COMPLETIONS_API_KEY", "secret-one")
    monkeypatch.setenv("JUDGE_API_KEY", "secret-two")
    with Loopback(completions(answers)) as server:
        judge = {"--judge-url": server.url + "/v1", "--judge-model": "wise"}
        status, out, err = command_output(monkeypatch, capsys, *flags(here, server.url, **judge))
        assert status == 1  # one answer was wrong by the rule, and this server judges nothing
        assert {asked.headers.get("authorization") for asked in server.asked} == {
            "Bearer secret-one",
            "Bearer secret-two",
        }
    written = out + err + "".join(path.read_text() for path in (here / "run").iterdir())
    assert "secret-" not in written and server.url not in written


@pytest.mark.parametrize(
    ("yaml", "benchmarks", "limits"),
    [
        ("benchmarks: gsm8k", ["gsm8k"], {"python": 5, "search": 10}),
        ("benchmarks: gsm8k, math", ["gsm8k", "math"], {"python": 5, "search": 10}),
        ("benchmarks: [gsm8k, math]\ntool_call_limits: {python: 1}", ["gsm8k", "math"], {"python": 1}),
        ("tool_call_limits: [search=3]", [], {"search": 3}),
    ],
)
def test_lists_may_be_written_as_yaml_has_them(here, yaml, benchmarks, limits):
    (here / "eval.yaml").write_text(yaml)
    (settings,) = command_line.parse_settings((EvalSettings,), ["--config", "eval.yaml"])
    assert (settings.benchmarks, settings.call_limits()) == (benchmarks, limits)


def test_missing_vllm_is_an_error(monkeypatch, capsys, here, model):
    data(here)
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = ("--model", model, "--engine", "vllm", "--data", here, "--search-recorded", recorded(here))
    status, _, err = command_output(monkeypatch, capsys, "eval", "--tools", "search", *words)
    assert status == 2 and "engine is 'vllm', but vLLM cannot be imported" in err


def test_a_folder_of_benchmarks_is_evaluated_benchmark_by_benchmark_and_levels_are_shown(monkeypatch, capsys, here):
    data(here)
    rows = [{"problem": f"what is {i}", "answer": str(i), "level": i % 2} for i in range(3)]
    (here / "math500.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Loopback(completions(answers)) as server:
        words = [word for word in flags(here, server.url) if word not in ("--benchmarks", "gsm8k")]
        status, out, _ = command_output(monkeypatch, capsys, *words)
    assert status == 0 and "| MATH500 | math equality | 1.000 |" in out and "| GSM8K |" in out
    results = json.loads((here / "run/results.json").read_text())
    assert results["benchmarks"]["math500"]["levels"]["0"]["questions"] == 2
    assert results["suites"] == {"reasoning": 0.875}


def test_a_turn_ends_where_the_models_generation_config_stops_too(tmp_path):
    folder = save_tiny_model(tmp_path)
    eos = tokenizer().eos_token_id
    GenerationConfig(eos_token_id=[7, eos]).save_pretrained(folder)
    with ToolBox([search]) as toolbox:
        sampler = sampler_of(EvalSettings(model=folder, benchmarks=["gsm8k"]), toolbox)
        assert sampler.protocol.eos_ids == (eos, 7)
        assert sampler.engine.settings.eos_ids == (eos, 7)
        (tmp_path / "generation_config.json").unlink()
        assert sampler_of(EvalSettings(model=folder, benchmarks=["gsm8k"]), toolbox).protocol.eos_ids == (eos,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": "vllm"}, r"not passed on to vLLM.*or sample with transformers \(engine: transformers\)"),
        ({"base_url": "http://127.0.0.1:9/v1"}, r"not passed on to the server.*without base_url"),
    ],
)
def test_a_rule_of_the_models_generation_config_is_applied_or_refused(tmp_path, changes, says):
    """transformers applies it: a suppressed token has no probability (tests/test_distribution.py)."""
    folder = save_tiny_model(tmp_path)
    GenerationConfig(suppress_tokens=[7], eos_token_id=tokenizer().eos_token_id).save_pretrained(folder)
    with ToolBox([search]) as toolbox:
        with pytest.raises(ConfigError, match="sets suppress_tokens, .*" + says):
            sampler_of(EvalSettings(model=folder, benchmarks=["gsm8k"], **changes), toolbox)
        sampler_of(EvalSettings(model=folder, benchmarks=["gsm8k"]), toolbox)
