"""Collects in a separate process everything that the tests check about colocated vLLM: `python … FOLDER`.

It is a separate process because vLLM in the trainer's process sets up torch.distributed and its environment variables,
which no other test should inherit. It writes FOLDER/findings.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import EngineError
from arpo_trl.rollout.engines.base import Engine, Probe, SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.topk_entropy import entropy_from_top_k
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.engines.weights import FixedWeights
from arpo_trl.training.preflight import LAUNCHER_VARIABLES
from support import ON_CPU, python, save_sharp_model, saved_adapter_is_the_trained_one, search, tokenizer

PROMPTS = [tokenizer().encode("the melting point of iron " * (1 + i % 4)) for i in range(12)]
ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)], "task": "math"} for i in range(8)]
)


def requests(max_tokens: int = 24, probe: int = 5) -> list[TurnRequest]:
    return [
        TurnRequest(id=i, ids=PROMPTS[i], max_tokens=max_tokens, probe_tokens=probe, seed=100 + i, key=(i, 0))
        for i in range(len(PROMPTS))
    ]


def run(engine: Engine, wanted: list[TurnRequest], *, late: int = 0) -> tuple[dict[int, Turn], list[tuple[int, str]]]:
    """Turns by id and the order of events; the last `late` requests join one by one between steps."""
    turns, order = {}, []
    with engine.session():
        waiting = list(wanted[len(wanted) - late :])
        for request in wanted[: len(wanted) - late]:
            engine.submit(request)
        while len(turns) < len(wanted):
            if waiting:
                engine.submit(waiting.pop(0))
            for event in engine.poll(0.0):
                order.append((event.id, "probe" if isinstance(event, Probe) else "turn"))
                if isinstance(event, Turn):
                    turns[event.id] = event
    return turns, order


def compare(model: Any, turns: dict[int, Turn]) -> dict[str, float]:
    """How far logprobs and entropies are from a full forward of the trainer's model."""
    logprobs, entropies, excess = [], [], []
    for i, turn in turns.items():
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[i] + turn.ids])).logits[0].float()
        rows = logits.log_softmax(-1)[len(PROMPTS[i]) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(turn.ids).unsqueeze(1)).squeeze(1)
        logprobs += (chosen - torch.tensor(turn.logprobs)).abs().tolist()
        for row, estimate in zip(rows, turn.entropies, strict=False):
            off = abs(estimate + float((row.exp() * row).sum()))
            entropies.append(off)
            excess.append(off - entropy_from_top_k(row.topk(20).values.tolist(), len(row)).error)
    return {
        "logprobs": sum(logprobs) / len(logprobs),
        "entropies": sum(entropies) / len(entropies),
        "entropies_beyond_bound": max(excess),
    }


def make_trainer(folder: Path, peft_config: LoraConfig | None = None, **settings: Any) -> tuple[ARPOTrainer, str]:
    model_path = save_sharp_model(folder / "model")
    trainer = ARPOTrainer(
        model=model_path,
        reward_funcs=lambda completions, **columns: [float(i % 3) for i in range(len(completions))],
        args=ARPOConfig(
            str(folder / "out"),
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=512,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=60,
            entropy_probe_tokens=5,
            max_steps=2,
            learning_rate=1e-3,
            save_strategy="no",
            **ON_CPU,
            **settings,
        ),
        train_dataset=ROWS,
        tools=[search, python],
        peft_config=peft_config,
    )
    return trainer, model_path


LATER: dict[str, Any] = {
    **{"branch_rule": "uniform", "advantage_attribution": "aepo", "advantage_baseline": "score_norm"},
    **{"dynamic_sampling_rounds": 1, "importance_sampling_level": "turn", "clip_keeps_gradient": True},
}
"""Settings of later papers that read what an engine returns, or what the update compares with it."""


def with_adapter(folder: Path) -> dict[str, Any]:
    """The results of training an adapter, with `LATER`."""
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    trainer, model_path = make_trainer(folder, lora, model_init_kwargs={"dtype": "bfloat16"}, **LATER)
    trainer.train()
    findings = {
        "log": [row for row in trainer.state.log_history if "loss" in row],
        "saved": saved_adapter_is_the_trained_one(trainer, model_path),
    }
    engine = trainer.tree_sampler.engine
    engine._weights._synced = None
    trained, _ = run(engine, requests())
    findings["trained"] = compare(trainer.model.eval(), trained)
    saved = AutoModelForCausalLM.from_pretrained(model_path, dtype="bfloat16").state_dict()
    base = trainer.model.unload().state_dict()
    findings["base_changed"] = [name for name, weight in base.items() if not torch.equal(weight, saved[name])]
    return findings


def with_all_weights(folder: Path) -> dict[str, Any]:
    trainer, model_path = make_trainer(folder)
    engine = trainer.tree_sampler.engine
    assert isinstance(engine, VLLMColocateEngine)
    model = trainer.model
    findings: dict[str, Any] = {"max_length": trainer.tree_sampler.settings.max_length}

    syncs = []
    generation = trainer.vllm_generation
    sync = generation.sync_weights
    generation.sync_weights = lambda: (syncs.append(trainer.state.global_step), sync())[1]
    first, order = run(engine, requests())
    again, _ = run(engine, requests())
    late, _ = run(engine, requests(), late=6)
    findings["first"] = compare(model, first)
    findings["again_equal"] = sum(first[i].ids == again[i].ids for i in first)
    findings["late_equal"] = sum(first[i].ids == late[i].ids for i in first)
    findings["probes_first"] = all(
        order.index((i, "probe")) < order.index((i, "turn")) for i, kind in order if kind == "probe"
    )
    findings["probes"] = sum(kind == "probe" for _, kind in order)
    findings["lengths"] = [len(turn.ids) for turn in first.values()]

    text = [tokenizer().decode(first[1].ids[: n + 1]) for n in range(len(first[1].ids))]
    stop = text[5][len(text[3]) - 1 : len(text[4]) + 1]  # from the end of one token, past the probe, into another
    stopping = VLLMColocateEngine(
        generation.llm,
        tokenizer(),
        SamplingParams(eos_ids=(int(tokenizer().eos_token_id),), stop_strings=(stop,)),
        FixedWeights(),
        vocab_size=engine.vocab_size,
        top_logprobs=20,
    )
    stopped, _ = run(stopping, requests())
    end = next(n for n in range(len(text)) if stop in text[n])
    findings["stopped"] = {"stop": stopped[1].stop.value, "equal": stopped[1].ids == first[1].ids[: end + 1]}
    early, _ = run(stopping, requests(probe=10))  # the stop string is within the probe, in which vLLM decodes nothing
    findings["stopped_in_probe"] = {
        "stop": early[1].stop.value,
        "equal": early[1].ids == first[1].ids[: end + 1],
        "entropies": len(early[1].entropies) == end + 1,
    }

    try:
        with engine.session():
            engine.submit(requests()[0])
            raise RuntimeError
    except RuntimeError:
        findings["left_behind"] = len(engine._drafts)
    findings["after_failure"] = len(run(engine, requests())[0])

    syncs.clear()
    trainer.train()
    findings["syncs"] = list(syncs)
    findings["log"] = [row for row in trainer.state.log_history if "loss" in row]
    engine._weights._synced = None
    trained, _ = run(engine, requests())
    findings["trained"] = compare(model.eval(), trained)
    findings["untrained"] = compare(AutoModelForCausalLM.from_pretrained(model_path), trained)

    generation.sync_weights = lambda: None  # as if weights did not arrive
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine._weights._synced = None
    try:
        run(engine, requests())
    except EngineError as error:
        findings["stale"] = str(error)
    return findings


def main(folder: Path) -> None:
    findings = with_all_weights(folder / "all")
    findings["launched"] = sorted(name for name in LAUNCHER_VARIABLES if name in os.environ)
    findings["next"] = str(ARPOConfig(str(folder / "next"), **ON_CPU).distributed_state.distributed_type)
    gc.collect()
    findings["adapter"] = with_adapter(folder / "adapter")
    (folder / "findings.json").write_text(json.dumps(findings), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
