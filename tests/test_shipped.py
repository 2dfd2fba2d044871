"""Shipped files run unchanged: the example of the README, and one step of each file in configs/.

The tests have no GPU and no models or data from the Hub. So they replace the model by a tiny one of its family, the
data, the lengths, the number of steps, and `use_cpu`. vLLM is its CPU build, which has no sleep mode, and one server
stands for several.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import forked
import shipped
from arpo_trl.quickstart.corpus import passages
from arpo_trl.quickstart.demonstrations import make_demonstrations
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.tasks import make_tasks
from arpo_trl.tools.search.index import LocalIndex, search_tool
from servers import running
from shipped import (
    ALONE,
    CONFIGS,
    IN_PAIRS,
    NO_SLEEP,
    SERVED,
    check,
    replaced,
    run,
    save_data,
    save_family,
    settings,
)
from support import VLLM

pytestmark = pytest.mark.slow

ROOT = CONFIGS.parent
BASELINES = [f"quickstart_{name}.yaml" for name in ("dapo", "dr_grpo", "grpo", "reinforce_plus_plus")]
REASONING = ["reasoning_10k.yaml", "recommended.yaml"]
HERE = ["quickstart.yaml", *BASELINES, "quickstart_sft.yaml", *REASONING]
SHOP = "quickstart_shop.yaml"
"""tests/test_shop.py runs it."""
QUANTIZED = "reasoning_qwen2.5_7b_qlora.yaml"
"""tests/test_qlora.py runs it."""


def test_every_configuration_is_run_by_one_of_these_tests():
    # tests/test_shipped_ranks.py runs IN_PAIRS.
    assert sorted([*ALONE, *IN_PAIRS, *SERVED, *HERE, QUANTIZED, SHOP]) == sorted(
        path.name for path in CONFIGS.iterdir()
    )


def test_no_configuration_writes_into_the_folder_of_another():
    folders = [yaml.safe_load(path.read_text("utf-8"))["output_dir"] for path in CONFIGS.iterdir()]
    assert len({*folders, "runs/quickstart/rl", "runs/quickstart/sft"}) == len(folders) + 2  # those of `quickstart`


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_data(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """One of each family, by the family's name."""
    folder = tmp_path_factory.mktemp("models")
    return {name: save_family(name, folder / name) for name in shipped.FAMILIES}


def test_the_example_of_the_readme_trains(models, tmp_path):
    """As printed. The model that it names is one of the family's layout in the folder where it is run."""
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (named,) = re.findall(r'model="(.*?)"', example)
    (tmp_path / named).parent.mkdir(parents=True)
    (tmp_path / named).symlink_to(models["Qwen2.5-3B"])
    row = {"prompt": "what is 3", "answer": "3", "task": "math"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "example.py").write_text(example)
    written = forked.run(["example.py"], cwd=tmp_path, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    if not torch.accelerator.is_available():
        assert written.count("No accelerator was found: use_cpu is set to true") == 1
    assert "train_loss" in written


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> tuple[Path, Path]:
    """The quickstart's data, some of it, and the output of its stage 1, whose file is run by this."""
    folder = tmp_path_factory.mktemp("quickstart")
    corpus = passages()
    train, _ = make_tasks(0, 64, 0)
    index = search_tool(LocalIndex(corpus), top_k=2)
    written = {"corpus": corpus, "train": train, "demonstrations": make_demonstrations(train, index, 0, 640)}
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    save_cold_start_base(folder / "base")
    run(
        "quickstart_sft.yaml",
        *("--model_name_or_path", str(folder / "base"), "--dataset", str(folder / "demonstrations.jsonl")),
        *("--output_dir", str(folder / "sft"), "--max_steps", "40"),
        name="sft",
    )
    return folder, folder / "sft"


@pytest.mark.parametrize("config", ["quickstart.yaml", *BASELINES])
def test_the_quickstart_trains(school, config, tmp_path):
    data, model = school
    run(
        config,
        *("--model_name_or_path", str(model), "--dataset", str(data / "train.jsonl")),
        *("--eval_dataset", str(data / "train.jsonl"), "--search_index", str(data / "corpus.jsonl")),
        *("--output_dir", str(tmp_path), "--max_steps", "1", "--max_completion_length", "128"),
    )
    check(config, tmp_path)


@pytest.mark.parametrize("config", REASONING)
def test_the_papers_and_the_recommended_settings_train(models, data, tmp_path, config):
    run(config, *replaced(config, models, data, tmp_path))
    check(config, tmp_path)


@pytest.mark.vllm
def test_runs_with_vllm_in_the_trainers_process_train(models, data, tmp_path):
    words = []
    for config in ALONE:
        words += [config, *replaced(config, models, data, tmp_path / config), *NO_SLEEP, "--"]
    forked.run([shipped.__file__, *words], cwd=ROOT, env=os.environ | VLLM, timeout=580)
    for config in ALONE:
        check(config, tmp_path / config)


@pytest.mark.vllm
@pytest.mark.parametrize("name", shipped.FAMILIES)
def test_runs_with_vllm_in_servers_train(name, models, data, tmp_path):
    configs = [config for config in SERVED if shipped.family(config) == name]
    rank = max(settings(config)["lora_r"] for config in configs)
    lengths = ("--max-model-len", "12000", "--enable-lora", "--max-lora-rank", str(rank))  # as the files' heads say
    with running(models[name], tmp_path / "log", *lengths) as server:
        for config in configs:
            run(config, *replaced(config, models, data, tmp_path / config), "--vllm_server_urls", server.url)
            check(config, tmp_path / config)
