"""`ARPOTrainer` with N = M is a drop-in replacement for `GRPOTrainer`: both train the same way.

The cases are those of GRPO users: models, data sets, reward functions and settings, with precision and checkpointing
as TRL sets them. Each case is trained with `ARPOTrainer`, and then with `GRPOTrainer` on the same sampled
completions, because only sampling may differ. `docs/from-grpo.md` lists what `ARPOTrainer` rejects.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.chat_template_utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError, DataError, RewardError
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from support import small_model, with_template

M = 3
TEXTS = ["iron melts at", "the answer is", "what is", "print(1538", "degrees of", "a question", "the point of"]
TEXT = Dataset.from_dict({"prompt": TEXTS})
CHAT = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TEXTS]})
MODELS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2_5", {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen3", {"head_dim": 16}),
    "tied": (Qwen2Config, Qwen2ForCausalLM, "qwen2_5", {"tie_word_embeddings": True}),
    "moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        "qwen3",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "reward": (Qwen2Config, Qwen2ForSequenceClassification, "qwen2_5", {"num_labels": 1}),
    "other reward": (LlamaConfig, LlamaForSequenceClassification, "llama3_2", {"num_labels": 1}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny models, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, (config, model, template, settings) in MODELS.items():
        made = small_model(config, model, initializer_range=0.05, **settings)
        made.config.max_position_embeddings = 4096  # tools have long schemas in this tokenizer
        made.save_pretrained(root / name)
        with_template(template).save_pretrained(root / name)
    return {name: str(root / name) for name in MODELS}


class Recorded(ARPOTrainer):
    """Keeps what was rolled out."""

    def __init__(self, *args: Any, **given: Any):
        super().__init__(*args, **given)
        self.rollouts: list[dict[str, Any]] = []

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        made = super()._rollout(prompts, trainer)
        self.rollouts.append({"prompts": prompts, **made})
        return made


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def letters(completions, **kwargs):
    """Numbers that depend on every character: a group with equal rewards, which trains nothing, is no chance event."""
    return [zlib.crc32(repr(completion).encode()) % 100 / 10 for completion in completions]


def content_length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


async def letters_later(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


def not_applicable(completions, **kwargs):
    return [None] * len(completions)


def names_all_that_trl_hands_over(prompts, completions, completion_ids, value, trainer_state, log_extra, log_metric):
    log_metric("values", float(sum(value)))
    log_extra("step", [trainer_state.global_step] * len(completions))
    return [float(abs(len(completion) - near)) for completion, near in zip(completions, value, strict=True)]


class Counted:
    async def __call__(self, completion_ids, **kwargs):
        return torch.tensor([float(len(set(ids))) for ids in completion_ids])


@dataclass
class Case:
    """What a run is given besides the usual; functions of the models' folders where something is loaded for it."""

    settings: dict[str, Any] = field(default_factory=dict)
    given: Callable[[dict[str, str]], dict[str, Any]] = lambda models: {}
    moves: bool = True
    """Whether every parameter that can be trained is another one afterwards."""


def _with(**given: Any) -> Callable[[dict[str, str]], dict[str, Any]]:
    return lambda models: given


def _adapted(models: dict[str, str]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": get_peft_model(AutoModelForCausalLM.from_pretrained(models["qwen2"], dtype="float32"), LORA)}


LORA = LoraConfig(init_lora_weights=False)
"""Both halves of the adapter have a gradient at the first step."""
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
CASES: dict[str, Case] = {
    "text": Case(),
    "messages": Case(given=_with(train_dataset=CHAT)),
    "float32": Case({"bf16": False}),
    "no checkpointing": Case({"gradient_checkpointing": False}),
    **{
        f"loss {kind}": Case({"loss_type": kind, "gradient_accumulation_steps": 2})
        for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    },
    **{f"scaled by {kind}": Case({"scale_rewards": kind}) for kind in ("group", "batch", False)},
    "evaluation": Case(EVALUATED, _with(eval_dataset=TEXT.select(range(2)))),
    "one leaf in evaluation": Case(EVALUATED | {"num_generations_eval": 1}, _with(eval_dataset=TEXT.select([0]))),
    "evaluation at the start": Case(
        EVALUATED | {"eval_on_start": True, "loss_type": "grpo"}, _with(eval_dataset=TEXT.select(range(2)))
    ),
    "several evaluations": Case(EVALUATED, _with(eval_dataset={"a": TEXT.select([0]), "b": CHAT.select([1])})),
    "several iterations": Case({"num_iterations": 2, "max_steps": 2}),
    "ratios of sequences": Case({"num_iterations": 2, "max_steps": 2, "importance_sampling_level": "sequence"}),
    "generated for several steps": Case({"steps_per_generation": 2, "max_steps": 2}),
    "generation batch": Case({"generation_batch_size": 6, "max_steps": 2}),
    "group over micro-batches": Case({"num_generations": 6, "gradient_accumulation_steps": 2}),
    "adapter to be made": Case(given=_with(peft_config=LORA)),
    "adapter that is there": Case(given=_adapted),
    "adapter that is there, with a reference": Case({"beta": 0.1}, _adapted),
    "reference model": Case({"beta": 0.1}),
    "reference model without correction": Case({"beta": 0.1, "use_bias_correction_kl": False}),
    "reference model that follows": Case(
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 2}
    ),
    "head in float32": Case({"cast_lm_head_to_fp32": True}, lambda models: {"model": models["qwen3"]}),
    "tied head in float32": Case({"cast_lm_head_to_fp32": True}, lambda models: {"model": models["tied"]}),
    "mixture of experts": Case(given=lambda models: {"model": models["moe"]}, moves=False),
    "tokens of high entropy": Case({"top_entropy_quantile": 0.2}),
    "entropy bonus": Case({"entropy_coef": 0.1, "use_adaptive_entropy": True}),
    "filtered sampling": Case({"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1}),
    "off-policy mask": Case({"off_policy_mask_threshold": 0.5}),
    "off-policy mask, filtered sampling": Case({"off_policy_mask_threshold": 0.01, "top_k": 5, "top_p": 0.5}),
    "two-sided clipping": Case({"delta": 2.0}),
    "truncated ones masked": Case({"mask_truncated_completions": True}, moves=False),
    "padded": Case({"pad_to_multiple_of": 8}),
    "template's arguments": Case(
        {"chat_template_kwargs": {"enable_thinking": False}},
        lambda models: {"model": models["qwen3"], "train_dataset": CHAT},
    ),
    "workers": Case({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "completions in the log": Case({"log_completions": True}),
    "unused columns removed": Case(
        {"remove_unused_columns": True}, _with(train_dataset=TEXT.add_column("turns_taken", TEXTS))
    ),
    "streamed": Case(given=_with(train_dataset=TEXT.to_iterable_dataset(), eval_dataset=TEXT.to_iterable_dataset())),
    "reward model": Case(given=lambda models: {"reward_funcs": models["reward"]}),
    "reward model of messages": Case(
        given=lambda models: {"reward_funcs": models["reward"], "train_dataset": CHAT},
    ),
    "reward model of another family": Case(
        given=lambda models: {
            "reward_funcs": AutoModelForSequenceClassification.from_pretrained(models["other reward"]),
            "reward_processing_classes": AutoTokenizer.from_pretrained(models["other reward"]),
            "train_dataset": CHAT,
        }
    ),
    "reward of messages": Case(given=_with(reward_funcs=content_length, train_dataset=CHAT)),
    "two rewards, weighed": Case({"reward_weights": [0.7, 0.3]}, _with(reward_funcs=[length, letters])),
    "two rewards, each normalised": Case(
        {"multi_objective_aggregation": "normalize_then_sum"}, _with(reward_funcs=[length, letters])
    ),
    "function and model": Case(given=lambda models: {"reward_funcs": [length, models["reward"]]}),
    "async rewards": Case(given=_with(reward_funcs=[length, letters_later, Counted()])),
    "a reward that does not apply": Case(given=_with(reward_funcs=[length, not_applicable])),
    "no reward that applies": Case(given=_with(reward_funcs=not_applicable), moves=False),
    "a reward that names its arguments": Case(
        given=_with(
            reward_funcs=names_all_that_trl_hands_over,
            train_dataset=TEXT.add_column("value", list(range(len(TEXT)))),
        )
    ),
    "null answers": Case(given=_with(train_dataset=TEXT.add_column("answer", [None] * len(TEXT)))),
    "answers with fields": Case(given=_with(train_dataset=TEXT.add_column("answer", [{"value": 1}] * len(TEXT)))),
    "blank system message": Case(
        given=_with(
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": text}]} for text in TEXTS]
            )
        )
    ),
    "calls in the prompt": Case(
        given=_with(
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": [
                            {"role": "user", "content": text},
                            {
                                "role": "assistant",
                                "content": None,
                                "tool_calls": [
                                    {"type": "function", "function": {"name": "f", "arguments": {"of": text}}}
                                ],
                            },
                            {"role": "tool", "name": "f", "content": "3"},
                        ]
                    }
                    for text in TEXTS
                ]
            )
        )
    ),
}


def trained(
    kind: type[GRPOTrainer],
    folder: Path,
    case: Case,
    models: dict[str, str],
    replay=None,
    own: Any = MappingProxyType({}),
) -> Any:
    """`own`: settings that `GRPOConfig` does not have."""
    settings = {
        "output_dir": str(folder),
        "learning_rate": 0.1,
        "num_generations": M,
        "per_device_train_batch_size": M,
        "max_completion_length": 8,
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **case.settings,
    }
    given = {"model": models["qwen2"], "reward_funcs": letters, "train_dataset": TEXT, **case.given(models)}
    if kind is GRPOTrainer:
        args = GRPOConfig(**settings)
    else:
        args = ARPOConfig(**{"initial_rollouts": settings["num_generations"], "loss_type": "dapo", **settings, **own})
    trainer = kind(args=args, **given)
    if replay is not None:
        trainer.rollout_func = replay
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    moved = [not torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items()]
    assert all(moved) or not case.moves, [name for name, has in zip(before, moved, strict=True) if not has]
    return trainer


COMPARED = re.compile(r"(eval_)?(\w_)?(loss|grad_norm|reward|reward_std|kl|entropy|rewards/.*|completions/.*|values)")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_grpo_runs_train_equally(name, models, tmp_path):
    expected, found = (run.state.log_history[0] for run in trained_by_both(CASES[name], models, tmp_path))
    assert expected.keys() <= found.keys()
    compared = [key for key in expected if COMPARED.fullmatch(key)]
    assert len(compared) >= 9
    for key in compared:
        value = expected[key]
        assert found[key] == (None if value is None else pytest.approx(value, rel=0.03, abs=0.01)), key


PACKED = {
    "one step": {},
    "several iterations and micro-batches": {"num_iterations": 2, "gradient_accumulation_steps": 4, "max_steps": 2},
    "several steps of a generation": {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 2},
    "a loss of the micro-batch": {"loss_type": "bnpo", "gradient_accumulation_steps": 2},
    "tokens of high entropy": {"top_entropy_quantile": 0.3, "gradient_accumulation_steps": 2},
    "a reference": {"beta": 0.1, "num_iterations": 2, "max_steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_packs_train_equally(name, models, tmp_path):
    # In bfloat16 rounding would hide differences.
    case = Case({"bf16": False, "learning_rate": 1e-3, "temperature": 0.7, **PACKED[name]})
    theirs, ours = trained_by_both(case, models, tmp_path, own={"shared_prefix_forward": "on"})
    steps = [row for row in ours.state.log_history if "loss" in row]
    assert [row["arpo/update/packed"] for row in steps] == [1.0] * len(steps)
    for expected, found in zip(theirs.state.log_history, steps, strict=False):
        for key in ("loss", "grad_norm", "entropy", *(["kl"] if case.settings.get("beta") else [])):
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key
    for (at, mine), weight in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, weight, atol=1e-4, rtol=1e-3, msg=lambda text, at=at: f"{at}: {text}")


def trained_by_both(case: Case, models: dict[str, str], folder: Path, **own: Any) -> tuple[Any, Recorded]:
    """`GRPOTrainer` and `ARPOTrainer` after training on the same completions."""
    ours = trained(Recorded, folder / "ours", case, models, **own)
    rollouts = iter(ours.rollouts)

    def replay(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        made = next(rollouts)
        assert made["prompts"] == prompts
        assert made["prompt_ids"] == trainer._tokenize_prompts(prompts)[0]
        return {key: made[key] for key in ("prompt_ids", "completion_ids", "logprobs", "env_mask")}

    theirs = trained(GRPOTrainer, folder / "theirs", case, models, replay)
    assert next(rollouts, None) is None
    return theirs, ours


# What is not about training ------------------------------------------------------------------------------------------


def config(folder: Path, **settings: Any) -> ARPOConfig:
    return ARPOConfig(str(folder), use_cpu=True, report_to="none", **settings)


def test_the_arguments_are_those_of_grpo_and_an_engine():
    theirs = inspect.signature(GRPOTrainer.__init__).parameters
    ours = dict(inspect.signature(ARPOTrainer.__init__).parameters)
    assert ours.pop("engine").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(ours) == list(theirs)
    assert [of.default for of in ours.values()] == [of.default for of in theirs.values()]


def test_arguments_may_be_given_by_their_place(models, tmp_path):
    made = ARPOTrainer(models["qwen2"], models["reward"], config(tmp_path), TEXT, TEXT, tools=None)
    assert made.eval_dataset is TEXT
    assert made.tools == []


def test_a_reward_may_name_only_its_arguments_and_return_any_sequence_of_numbers(models, tmp_path):
    def named(completions, stop_reason):  # with GRPO an error: it would be handed prompts as well
        return (float(len(completion)) for completion in completions)

    class Asking:
        async def __call__(self, turns):
            return [float(len(turn)) for turn in turns]

    case = Case(given=_with(reward_funcs=[named, Asking(), letters]))
    assert trained(ARPOTrainer, tmp_path, case, models).state.global_step == 1


def test_a_reward_with_an_unknown_argument_gets_an_error_with_the_available_columns(models, tmp_path):
    def wants(completions, gold, **kwargs):
        return [0.0] * len(completions)

    case = Case(given=_with(reward_funcs=wants))
    with pytest.raises(RewardError, match=r"'wants' requires \['gold'\], .* Available: completion_ids, completions"):
        trained(ARPOTrainer, tmp_path, case, models)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["turns", "turns_without_calls", "tool_calls", "stop_reason"])
def test_a_column_that_rollouts_fill_is_refused_by_its_name(models, tmp_path, name, streamed):
    rows = TEXT.add_column(name, TEXTS)
    case = Case(given=_with(train_dataset=rows.to_iterable_dataset() if streamed else rows))
    with pytest.raises(DataError, match=rf"has the column\(s\) \['{name}'\], .* Rename the column"):
        trained(ARPOTrainer, tmp_path, case, models)


def multiply(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    return a * b


def written(row: int, turn: int, tool: str, wrong: str) -> str:
    """One right call, one wrong call, no call at all; then the last turn."""
    if turn or row == 2:
        return "so"
    call = [f'{{"name": "{tool}", "arguments": {{"a": 3, "b": 4}}}}', wrong][row]
    return f"<tool_call>\n{call}\n</tool_call>"


@pytest.mark.parametrize(
    ("tool", "wrong"),
    [
        (multiply, '{"name": "multiply", "arguments": {"a": 3, "c": 4}}'),  # no such argument
        (multiply_later, '{"name": "multiply_later", "arguments": {"a": 3, "c": 4}}'),
        (multiply, '{"name": "divide", "arguments": {"a": 3, "b": 4}}'),  # no such tool
    ],
)
def test_tools_are_counted_and_shown_to_rewards_as_by_trls_own_loop(tool, wrong, models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models["qwen3"])
    seen: dict[str, list[Any]] = {}
    shown: list[list[int]] = []

    class TrlsLoop(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args: Any, **kwargs: Any):
            turn = int(len(prompt_ids) < M)  # the second has but the rows that called
            texts = [written(row, turn, tool.__name__, wrong) for row in range(len(prompt_ids))]
            return [tok(text)["input_ids"] + [tok.eos_token_id] for text in texts], None

    def script(request, context):
        return written(request.key[1], request.key[-1], tool.__name__, wrong)

    engine = ScriptedEngine(tok, SamplingParams(eos_ids=(tok.eos_token_id,)), script)
    for kind, given in ((TrlsLoop, {}), (ARPOTrainer, {"engine": engine})):

        def reward(completions, name=kind.__name__, **kwargs):
            seen[name] = completions
            return [float(len(completion)) for completion in completions]

        protocol = {"tool_protocol": "chat_template"} if kind is ARPOTrainer else {}
        case = Case(
            {"max_completion_length": 400, **protocol},
            _with(model=models["qwen3"], train_dataset=CHAT, tools=[tool], reward_funcs=reward, **given),
            moves=False,
        )
        made = trained(kind, tmp_path / kind.__name__, case, models)
        assert made.tools == [tool]
        prompt = CHAT[0]["prompt"]
        shown.append(
            made.protocol.encode_prompt(prompt) if kind is ARPOTrainer else made._tokenize_prompts([prompt])[0][0]
        )
        log = made.state.log_history[0]
        assert log["tools/call_frequency"] == pytest.approx(2 / 3)
        assert log["tools/failure_frequency"] == pytest.approx(1 / 2)
    assert shown[0] == shown[1]
    theirs, ours = seen["TrlsLoop"], seen["ARPOTrainer"]
    assert ours[0] == theirs[0]
    assert [message["role"] for message in ours[0]] == ["assistant", "tool", "assistant"]
    assert ours[0][0]["tool_calls"] == [
        {"type": "function", "function": {"name": tool.__name__, "arguments": {"a": 3, "b": 4}}}
    ]
    assert ours[2] == theirs[2]
    # What a model reads of its mistakes is our own text.
    assert "error" in str(theirs[1][1].pop("content")).lower() and "Error" in ours[1][1].pop("content")
    assert ours[1] == theirs[1]


def test_a_call_without_room_for_its_result_counts_as_in_trls_own_loop(models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models["qwen3"])
    call = written(0, 0, "multiply", "")
    ids = tok(call)["input_ids"] + [tok.eos_token_id]

    class TrlsLoop(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args: Any, **kwargs: Any):
            return [ids for _ in prompt_ids], None

    engine = ScriptedEngine(tok, SamplingParams(eos_ids=(tok.eos_token_id,)), lambda request, context: call)
    for kind, given in ((TrlsLoop, {}), (ARPOTrainer, {"engine": engine})):
        protocol = {"tool_protocol": "chat_template"} if kind is ARPOTrainer else {}
        case = Case(
            {"max_completion_length": len(ids) + 2, **protocol},
            _with(model=models["qwen3"], train_dataset=CHAT, tools=[multiply], reward_funcs=letters, **given),
            moves=False,
        )
        log = trained(kind, tmp_path / kind.__name__, case, models).state.log_history[0]
        assert (log["tools/call_frequency"], log["tools/failure_frequency"]) == (1.0, 0.0)


@pytest.mark.parametrize("shared_prefix_forward", ["auto", "on"])
def test_a_group_without_a_token_in_the_loss_does_not_lower_the_metrics_of_the_others(
    shared_prefix_forward, models, tmp_path
):
    """Whole trees in one micro-batch: the first group's completions are all truncated."""
    tok = AutoTokenizer.from_pretrained(models["qwen2"])

    def script(request, context):
        return ScriptedTurn(text="the answer is " + "iron " * (request.key[1] + 1), ends=request.key[0] % 2 == 1)

    logs = []
    for forward in ("off", shared_prefix_forward):
        case = Case(
            {
                "mask_truncated_completions": True,
                "gradient_accumulation_steps": 2,
                "max_completion_length": 20,
                "beta": 0.1,
                "bf16": False,  # in bfloat16 packs round differently than padded rows
            },
            _with(engine=ScriptedEngine(tok, SamplingParams(eos_ids=(tok.eos_token_id,)), script)),
            moves=False,
        )
        own = {"shared_prefix_forward": forward}
        run = trained(ARPOTrainer, tmp_path / forward, case, models, own=own)
        logs.append(run.state.log_history[0])
    assert logs[0]["completions/clipped_ratio"] == 0.5
    for name in ("loss", "grad_norm", "entropy", "kl"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3, abs=1e-5), name


class Counter:
    """An environment as TRL's users write them: a row's start value, and a method that adds to it."""

    def reset(self, start: int, **row: Any) -> str:
        self.total = start
        return f" from {start}"

    def add(self, a: int) -> int:
        """Adds to the total.

        Args:
            a: How much.
        """
        self.total += a
        return self.total

    async def double(self) -> int:
        """Doubles the total."""
        self.total *= 2
        return self.total

    def get_reward(self) -> float:
        return float(self.total)


def counted(row: int, turn: int) -> str:
    """Row 0 adds 3 and doubles in one turn, row 1 adds 5, row 2 calls nothing; then the last turn."""
    calls = [['{"name": "add", "arguments": {"a": 3}}', '{"name": "double", "arguments": {}}']]
    calls += [['{"name": "add", "arguments": {"a": 5}}'], []]
    return "so" if turn else "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls[row]) or "so"


def test_an_environment_is_used_as_by_trls_own_loop(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tok = AutoTokenizer.from_pretrained(models["qwen3"])
    seen: dict[str, Any] = {}
    schemas = []

    class TrlsLoop(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args: Any, **kwargs: Any):
            turn = int(len(prompt_ids) < M)  # the second has but the rows that called
            return [tok(counted(row, turn))["input_ids"] + [tok.eos_token_id] for row in range(len(prompt_ids))], None

    engine = ScriptedEngine(
        tok, SamplingParams(eos_ids=(tok.eos_token_id,)), lambda request, _: counted(request.key[1], request.key[-1])
    )
    for kind, given in ((TrlsLoop, {}), (ARPOTrainer, {"engine": engine})):

        def reward(prompts, completions, environments, name=kind.__name__, **kwargs):
            totals = [environment.total for environment in environments]
            seen[name] = (prompts, completions, totals, sorted(kwargs))
            return [0.5 * total for total in totals]

        protocol = {"tool_protocol": "chat_template"} if kind is ARPOTrainer else {}
        case = Case(
            {"max_completion_length": 400, "reward_weights": [2.0], **protocol},
            _with(
                model=models["qwen3"],
                train_dataset=CHAT.add_column("start", [2] * len(CHAT)),
                tools=[multiply],
                environment_factory=Counter,
                reward_funcs=reward,
                **given,
            ),
            moves=False,
        )
        made = trained(kind, tmp_path / kind.__name__, case, models)
        log = made.state.log_history[0]
        assert [tool.__name__ for tool in made.tools] == ["multiply", "add", "double"]
        schemas.append([get_json_schema(tool) for tool in made.tools])
        # Totals (2 + 3) · 2 = 10, 2 + 5 = 7 and 2, mean 19 / 3; weights 2 and 1 on half of it and on it
        assert log["rewards/Counter/mean"] == pytest.approx(19 / 3)
        assert log["rewards/reward/mean"] == pytest.approx(19 / 6)
        assert log["reward"] == pytest.approx(2 * 19 / 3)
        assert log["tools/call_frequency"] == pytest.approx(1)
        seen[f"{kind.__name__} loss"] = log["loss"]
    assert schemas[0] == schemas[1]
    theirs, ours = seen["TrlsLoop"], seen["ARPOTrainer"]
    assert ours[0] == theirs[0]
    assert [prompt[-1]["content"][-7:] for prompt in ours[0]] == [" from 2"] * 3
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2] == [10, 7, 2]
    assert set(theirs[3]) <= set(ours[3])
    assert seen["ARPOTrainer loss"] == pytest.approx(seen["TrlsLoop loss"], rel=0.03, abs=0.01)


class Words:
    """Another environment, whose method has the name of one of `Counter`, and no reward of its own."""

    def reset(self, **row: Any) -> None:
        assert "environment" not in row and row["start"] == 2
        self.words: list[str] = []

    def add(self, word: str, often: int) -> str:
        """Adds a word.

        Args:
            word: Which.
            often: How often.
        """
        self.words += [word] * often
        return " ".join(self.words)


SEVERAL = CHAT.add_column("start", [2] * len(CHAT)).add_column("environment", ["count", "words"] * 3 + ["count"])


def adds(prompt: str, turn: int) -> str:
    """The first turn calls `add` in the way of the environment that the prompt shows, and a tool that both have."""
    call = '{"word": "iron", "often": 2}' if "How often." in prompt else '{"a": 3}'
    calls = [f'{{"name": "add", "arguments": {call}}}', '{"name": "multiply", "arguments": {"a": 3, "b": 4}}']
    return "so" if turn else "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def test_each_row_chooses_one_of_several_environments_as_in_trl(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tok = AutoTokenizer.from_pretrained(models["qwen3"])
    seen: dict[str, Any] = {}
    shown: list[list[int]] = []

    class TrlsLoop(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args: Any, **kwargs: Any):
            turn = len(shown) >= 2 * M
            shown.extend(list(ids) for ids in prompt_ids)
            return [tok(adds(tok.decode(ids), turn))["input_ids"] + [tok.eos_token_id] for ids in prompt_ids], None

    engine = ScriptedEngine(
        tok, SamplingParams(eos_ids=(tok.eos_token_id,)), lambda request, text: adds(text, request.key[-1])
    )
    for kind, given in ((TrlsLoop, {}), (ARPOTrainer, {"engine": engine})):

        def reward(prompts, completions, environments, environment, name=kind.__name__, **kwargs):
            seen[name] = (prompts, completions, [type(each) for each in environments], environment, sorted(kwargs))
            return [0.5] * len(completions)

        protocol = {"tool_protocol": "chat_template"} if kind is ARPOTrainer else {}
        case = Case(
            {"max_completion_length": 400, "per_device_train_batch_size": 2 * M, **protocol},
            _with(
                model=models["qwen3"],
                train_dataset=SEVERAL,
                tools=[multiply],
                environment_factory={"count": Counter, "words": Words, "again": Counter},
                reward_funcs=reward,
                **given,
            ),
            moves=False,
        )
        log = trained(kind, tmp_path / kind.__name__, case, models).state.log_history[0]
        assert log["rewards/Counter/mean"] == pytest.approx(5)  # 2 + 3, without the rows of `Words`
        assert [name for name in log if name.startswith("rewards/")].count("rewards/Counter/mean") == 1
        assert log["tools/call_frequency"] == pytest.approx(2) and log["tools/failure_frequency"] == 0
        seen[f"{kind.__name__} numbers"] = [log["reward"], log["reward_std"], log["loss"]]
    theirs, ours = seen["TrlsLoop"], seen["ARPOTrainer"]
    firsts = [request.ids for request in engine.requests if request.key[-1] == 0]
    assert sorted(firsts) == sorted(shown[: 2 * M])  # each prompt shows the tools of its environment alone
    assert ours[:4] == theirs[:4] and set(theirs[4]) <= set(ours[4])
    assert {Counter, Words} == set(ours[2])
    assert {message["content"] for completion in ours[1] for message in completion if message["role"] == "tool"} == {
        "5", "iron iron", "12"
    }  # fmt: skip
    assert seen["ARPOTrainer numbers"] == pytest.approx(seen["TrlsLoop numbers"], rel=0.03, abs=0.01)


@pytest.mark.parametrize(
    ("reward_funcs", "weights", "factory", "names", "expected"),
    [
        (None, None, Counter, ["Counter"], [1.0]),
        (letters, [0.5], Counter, ["letters", "Counter"], [0.5, 1.0]),
        # one reward for each class, not for each name
        (letters, None, {"count": Counter, "words": Words, "again": Counter}, ["letters", "Counter"], [1.0, 1.0]),
    ],
)
def test_an_environment_gives_the_rewards_and_tools_that_it_gives_in_trl(
    reward_funcs, weights, factory, names, expected, models, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    settings = {"use_cpu": True, "report_to": "none", "reward_weights": weights}
    given = {"train_dataset": SEVERAL, "environment_factory": factory}
    theirs = GRPOTrainer(models["qwen3"], reward_funcs, GRPOConfig(str(tmp_path / "theirs"), **settings), **given)
    settings["tool_protocol"] = "chat_template"
    ours = ARPOTrainer(models["qwen3"], reward_funcs, ARPOConfig(str(tmp_path / "ours"), **settings), **given)
    for made in (theirs, ours):
        assert made.reward_func_names == names
        assert made.reward_weights.tolist() == expected
        assert {tool.__name__ for tool in made.tools} == {"add", "double"}


@pytest.mark.parametrize(
    ("factories", "rows", "message"),
    [
        ({"count": Counter}, SEVERAL, "A row has environment = 'words', which is not among the environments of"),
        (
            {"count": Counter},
            CHAT.add_column("environment", [["count"]] * len(CHAT)),
            r"A row has environment = \['count'\], which is not among the environments of",
        ),
        ({"count": Counter}, CHAT, r"has only the columns \['prompt'\]. Add a column 'environment' with one of"),
        ({"count": Counter}, None, "requires a `train_dataset` whose rows select one of them. Pass a dataset with"),
        ({}, SEVERAL, "environment_factory is an empty dict"),
    ],
)
def test_rows_that_choose_no_environment_are_an_error_at_the_start(factories, rows, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        ARPOTrainer(models["qwen3"], letters, config(tmp_path), rows, environment_factory=factories)


def test_an_environment_may_own_the_data(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    prompts = []

    class Owner(Counter):
        def reset(self, start: int = 3, **row: Any) -> str:
            self.given = sorted(row)
            prompts.append(self.given)
            return super().reset(start, **row)

    case = Case({"tool_protocol": "chat_template"}, _with(reward_funcs=None, environment_factory=Owner), moves=False)
    for i, (rows, given, factory) in enumerate(
        [
            (None, ["prompt"], Owner),
            (Dataset.from_dict({"start": [1, 2]}), [], Owner),
            (Dataset.from_dict({"environment": ["own", "own"]}), [], {"own": Owner, "words": Words}),
        ]
    ):
        prompts.clear()
        case.given = _with(model=models["qwen3"], reward_funcs=None, train_dataset=rows, environment_factory=factory)
        made = trained(ARPOTrainer, tmp_path / str(i), case, models)
        assert prompts == [given] * M
        assert made.state.log_history[0]["rewards/Owner/mean"] > 0


@pytest.mark.parametrize("several", [False, True])
def test_an_environment_may_have_no_tools(several, models, tmp_path):
    seen = []

    class Riddle:
        def reset(self, **row: Any) -> str:
            return "What am I?"

        def get_reward(self) -> float:
            return 2.0

    def reward(completions, prompts, environments):
        seen.append((prompts[0][-1]["content"], len({id(each) for each in environments}), len(environments)))
        return letters(completions)

    factory: Any = {"riddle": Riddle, "count": Counter} if several else Riddle
    rows = Dataset.from_dict({"environment": ["riddle"] * 2, "start": [1, 2]}) if several else None
    given = _with(model=models["qwen3"], train_dataset=rows, environment_factory=factory, reward_funcs=reward)
    case = Case({"tool_protocol": "chat_template"}, given, moves=False)
    made = trained(ARPOTrainer, tmp_path, case, models)
    assert seen == [("What am I?", M, M)]
    assert made.state.log_history[0]["rewards/Riddle/mean"] == 2
    assert made._environments.instances.live == 0


def test_calls_by_tags_are_shown_to_rewards_in_the_same_way(models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models["qwen2"])
    seen = []

    def reward(completions, turns, **kwargs):
        seen.extend(zip(completions, turns, strict=True))
        return letters(completions)

    def script(request, context):
        return "so" if request.key[-1] else "<find>iron</find>"

    def find(query: str) -> str:
        """Finds.

        Args:
            query: What.
        """
        return f"{query}: a metal"

    engine = ScriptedEngine(tok, SamplingParams(eos_ids=(tok.eos_token_id,), stop_strings=("</find>",)), script)
    given = _with(train_dataset=CHAT, tools=[find], reward_funcs=reward, engine=engine)
    trained(ARPOTrainer, tmp_path, Case({"max_completion_length": 100}, given, moves=False), models)
    completion, turns = seen[0]
    call = {"type": "function", "function": {"name": "find", "arguments": {"query": "iron"}}}
    assert completion == [
        {"role": "assistant", "content": "<find>iron</find>", "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": "iron: a metal"},
        {"role": "assistant", "content": "so"},
    ]
    assert turns == ["<find>iron</find>", "so"]


def test_logprobs_and_the_loss_of_rows_made_by_hand_are_those_of_trl(models, tmp_path):
    usual = {"model": models["qwen2"], "reward_funcs": length, "train_dataset": TEXT}
    theirs = GRPOTrainer(args=GRPOConfig(str(tmp_path / "theirs"), use_cpu=True, report_to="none"), **usual)
    ours = ARPOTrainer(args=config(tmp_path / "ours", loss_type="dapo"), **usual)
    prompt, completion = torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.tensor([[8, 9, 10, 11], [8, 12, 13, 0]])
    rows = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "advantages": torch.tensor([1.0, -0.5]),
        "num_items_in_batch": torch.tensor(7),
    }
    found = []
    for made in (theirs, ours):
        made.model.eval()
        made.current_gradient_accumulation_steps = 1
        ids = torch.cat([prompt, completion], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        with torch.no_grad():
            logprobs = made._get_per_token_logps_and_entropies(made.model, ids, mask, 4)[0]
        loss = made._compute_loss(made.model, rows | {"old_per_token_logps": logprobs + 0.05})
        found.append((logprobs, loss.item()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=0.03, abs=0.01)


def test_the_default_settings_allow_evaluation(tmp_path):
    made = config(tmp_path, eval_strategy="steps", eval_steps=1)
    assert made.per_device_eval_batch_size == made.num_generations == 16


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"reward_funcs": None}, ValueError, "No reward source provided"),
        ({"train_dataset": None}, ValueError, "`train_dataset` is required"),
        ({"train_dataset": [{"prompt": "what is"}]}, TypeError, "must be a `Dataset` or `IterableDataset`"),
        ({"reward_processing_classes": [None, None]}, ValueError, "must match the number of reward functions"),
        ({"peft_config": {"r": 4}}, TypeError, "must be a `peft.PeftConfig` instance"),
    ],
)
def test_a_mistake_is_the_error_that_it_is_with_grpo(given, error, message, models, tmp_path):
    usual = {"model": models["qwen2"], "reward_funcs": length, "train_dataset": TEXT}
    for kind, args in ((GRPOTrainer, GRPOConfig(str(tmp_path), use_cpu=True)), (ARPOTrainer, config(tmp_path))):
        with pytest.raises(error, match=message):
            kind(args=args, **{**usual, **given})


@pytest.mark.parametrize("name", ["_generate_single_turn", "_tokenize_prompts", "_get_tool_suffix_ids"])
def test_a_subclass_with_a_method_that_would_never_be_called_is_an_error(name, models, tmp_path):
    own = type("Own", (ARPOTrainer,), {name: lambda self, *given: None})
    with pytest.raises(ConfigError, match=f"Own overrides {name}, which would never be called: .*pass `engine`"):
        own(models["qwen2"], length, config(tmp_path), TEXT)


def test_the_tokenizer_of_a_reward_model_stands_beside_a_reward_of_the_environment(models, tmp_path):
    tok = AutoTokenizer.from_pretrained(models["reward"])
    rows = CHAT.add_column("start", list(range(len(CHAT))))

    def made(classes):
        given = {"reward_processing_classes": classes, "environment_factory": Counter}
        settings = config(tmp_path, tool_protocol="chat_template")
        return ARPOTrainer(models["qwen3"], models["reward"], settings, rows, **given)

    for classes in (tok, [tok]):
        assert made(classes).reward_processing_classes == [tok, None]
    with pytest.raises(ConfigError, match=r"classes \(2\) must match the number of reward functions \(1\)"):
        made([tok, tok])


def test_the_defaults_that_differ_are_in_the_table():
    text = (Path(__file__).parents[1] / "docs/from-grpo.md").read_text("utf-8")
    table = text.partition("<!-- defaults -->")[2].partition("<!-- end -->")[0]
    described = {name: (theirs, ours) for name, theirs, ours in re.findall(r"\| `(\w+)` \| (.*?) \| (.*?) \|", table)}
    theirs = {of.name: of.default for of in dataclasses.fields(GRPOConfig)}
    ours = {of.name: of.default for of in dataclasses.fields(ARPOConfig)}
    assert described == {
        name: (str(default), str(ours[name])) for name, default in theirs.items() if ours[name] != default
    }


def test_the_trainer_logs_the_defaults_that_are_used_and_differ_once(models, tmp_path, caplog):
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "max_steps": 1}
    with caplog.at_level("INFO", logger="arpo_trl"):
        ARPOTrainer(models["qwen2"], length, config(tmp_path, **settings), TEXT).train()
    (said,) = [record.getMessage() for record in caplog.records if "differ from TRL's" in record.getMessage()]
    assert "loss_type grpo (TRL's: dapo)" in said
    assert "num_generations" not in said


@pytest.mark.parametrize(("version", "warnings"), [(None, 0), ("1.15.0", 1), ("1.17.0", 1), ("1.16.1.dev0", 0)])
def test_another_version_of_trl_is_a_warning(models, tmp_path, monkeypatch, caplog, version, warnings):
    of = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "trl" and version else of(name))
    ARPOTrainer(models["qwen2"], length, config(tmp_path), TEXT)
    said = [record.getMessage() for record in caplog.records if "private methods of trl" in record.getMessage()]
    assert len(said) == warnings
    assert all(f"trl is {version}" in message and "pip install 'trl" in message for message in said)


@pytest.mark.parametrize(("paths", "warnings"), [(1, ["branch_threshold is 0.9"]), (2, [])])
def test_a_changed_setting_that_the_branch_rule_does_not_read_is_a_warning(models, tmp_path, caplog, paths, warnings):
    settings = {"num_generations": 2, "initial_rollouts": paths, "branch_rule": "random", "branch_probability": 0.9}
    ARPOTrainer(models["qwen2"], length, config(tmp_path, branch_threshold=0.9, **settings), TEXT)
    expected = [f"[RANK 0] {start}, but the branch rule 'random' does not read it." for start in warnings]
    assert [text for text in caplog.messages if "does not read" in text] == expected
