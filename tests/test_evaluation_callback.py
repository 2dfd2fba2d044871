import dataclasses
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.evaluation.benchmarks import BENCHMARKS
from arpo_trl.evaluation.callback import EvaluationCallback
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine
from evaluating import asked_number, boxed, questions
from support import ON_CPU, python, save_tiny_model, search, tokenizer

ROWS = Dataset.from_list([{"prompt": [{"role": "user", "content": "what is 9"}], "answer": ["9"], "task": "math"}] * 8)


def script(request, context):
    """Right about 0, and about 1 in the first of two samples."""
    number = asked_number(context)
    return boxed(number if number == "0" or (number == "1" and request.key[0] % 2 == 0) else 7)


@pytest.fixture
def trainer(tmp_path):
    engine = ScriptedEngine(
        tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,), stop_strings=("</search>",)), script
    )
    return ARPOTrainer(
        model=save_tiny_model(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=ARPOConfig(
            output_dir=str(tmp_path / "run"),
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=60,
            max_steps=4,
            save_strategy="steps",
            save_steps=4,
            **{**ON_CPU, "logging_steps": 4},
        ),
        train_dataset=ROWS,
        tools=[search, python],
        engine=engine,
    )


def test_a_suite_runs_every_n_steps_and_is_logged_and_in_the_model_card(trainer, tmp_path):
    asked = questions("0", "1", "2", name="sums")
    trainer.add_callback(EvaluationCallback(trainer, [asked], every_steps=2, samples=2))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "eval/sums/math" in row]
    assert [row["step"] for row in logged] == [2, 4]
    # question 0: 1, 1; question 1: 1, 0; question 2: 0, 0
    assert logged[0]["eval/sums/math"] == pytest.approx(0.5)
    assert logged[0]["eval/sums/pass@2"] == pytest.approx(2 / 3)
    assert logged[0]["eval/sums/failed"] == 0
    (training,) = [row for row in trainer.state.log_history if "loss" in row]
    assert training["step"] == 4 and training["reward"] == 0.5  # the mean over all four steps, not cleared in between
    card = (tmp_path / "run/README.md").read_text()
    assert card.count("## Evaluation") == 1
    assert "At step 4:" in card and "| sums | math equality | 0.500 | " in card


def test_a_trainer_with_environments_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(ARPOTrainer, "has_environments", True)
    with pytest.raises(ConfigError, match=r"the trainer has an environment_factory, .* Evaluate with eval_dataset"):
        EvaluationCallback(trainer, [questions("0", name="sums")], every_steps=2)


def test_the_callback_on_the_page_evaluates(trainer, tmp_path, monkeypatch):
    """The page's benchmark, with its questions in a file. The script is right about 0 and wrong about 5."""
    rows = [{"question": f"what is {gold}", "answer": f"so\n#### {gold}"} for gold in (0, 5)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = dataclasses.replace(BENCHMARKS["gsm8k"], file=str(tmp_path / "gsm8k.jsonl"))
    monkeypatch.setitem(BENCHMARKS, "gsm8k", local)
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"trainer": trainer})
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, EvaluationCallback)]
    callback.evaluate()
    assert trainer.state.log_history[-1]["eval/gsm8k/math"] == 0.5


def test_evaluations_repeat_and_leave_training_as_it_was(trainer):
    callback = EvaluationCallback(trainer, [questions("0", "1")], every_steps=1, samples=2)
    first = callback.evaluate()
    assert first["sums"]["score"] == callback.evaluate()["sums"]["score"] == pytest.approx(0.75)
    assert trainer.tree_sampler.settings.num_generations == 4


def test_a_card_without_evaluation_has_no_evaluation_section(trainer, tmp_path):
    trainer.create_model_card()
    assert "## Evaluation" not in (tmp_path / "run/README.md").read_text()


def test_steps_are_at_least_one(trainer):
    with pytest.raises(ConfigError, match="every_steps is 0; expected at least 1"):
        EvaluationCallback(trainer, [questions("0")], every_steps=0)


def test_benchmarks_of_the_same_name_are_an_error(trainer):
    with pytest.raises(ConfigError, match=r"Two benchmarks are named 'sums', .* Give each its own"):
        EvaluationCallback(trainer, [questions("0", name="sums"), questions("1", name="sums")], every_steps=2)
