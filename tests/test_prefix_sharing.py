import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import flash_attention_mask
from trl.trainer.utils import add_fused_lm_head

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.options import SharedPrefixForward
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.training.prefix_attention import attend, attention_calls
from arpo_trl.training.prefix_sharing import (
    COSTS,
    EXTENDS,
    NO_LABEL,
    forward_pack,
    forward_packs,
    pack_rows,
    pays,
    rounding,
    share_prefixes,
    why_not_shared,
    why_packs_differ,
)
from arpo_trl.training.preflight import prepare_prefix_sharing
from support import EXACT, ON_CPU, save_tiny_model, search, small_model, tokenizer

FAMILIES = [(Qwen3Config, Qwen3ForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]

CPU = torch.device("cpu")


def batch(*rows: tuple[list[int], list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ids, mask, T) of rows given as (prompt, completion), padded as TRL does."""
    before = max(len(prompt) for prompt, _ in rows)
    after = max(len(completion) for _, completion in rows)
    ids = torch.full((len(rows), before + after), pad)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        span = slice(before - len(prompt), before + len(completion))
        ids[i, span] = torch.tensor(prompt + completion)
        mask[i, span] = 1
    return ids, mask, after


def model_of(config_class, model_class, **settings) -> PreTrainedModel:
    model = small_model(config_class, model_class, initializer_range=0.2, **settings)
    add_fused_lm_head(model, 0.8, False, ("log_probs", "entropy"))
    share_prefixes(model)
    return model


def padded(model: torch.nn.Module, ids, mask, after) -> tuple[torch.Tensor, torch.Tensor]:
    """What TRL computes."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-after] = -100
    out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return out.log_probs[:, -after:], out.entropy[:, -after:]


def gradients(model: torch.nn.Module, logprobs: torch.Tensor, entropies: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum in which every token has a weight of its own."""
    weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
    model.zero_grad()
    (logprobs * weights + entropies * weights.flip(0)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(model: torch.nn.Module, rows, relative: float = 1e-5) -> None:
    expected, found = padded(model, *rows), forward_pack(model, pack_rows(*rows))
    for one, other in zip(expected, found, strict=True):
        assert ((one - other).norm() / one.norm()).item() < relative
        assert torch.equal(one == 0, other == 0)  # padding
    before, after = gradients(model, *expected), gradients(model, *forward_pack(model, pack_rows(*rows)))
    assert len(before) == len(after) > 0
    difference = torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)]).norm()
    assert (difference / torch.cat([a.flatten() for a in before]).norm()).item() < relative


def random_rows(seed: int):
    """Two prompts, six completions each of few different tokens, so that they share at random."""
    rng = random.Random(seed)
    return batch(
        *(
            (prompt, [rng.randrange(1, 4) for _ in range(rng.randrange(1, 12))])
            for prompt in ([rng.randrange(1, 5) for _ in range(rng.randrange(1, 8))] for _ in range(2))
            for _ in range(6)
        )
    )


# The layout ----------------------------------------------------------------------------------------------------------


def test_rows_are_laid_out_as_a_trie():
    # row 0: 1 1 | 2 2 4 3 3      row 1: 1 1 | 2 2 4 5      row 2: 1 1 | 6 6 6
    pack = pack_rows(*batch(([1, 1], [2, 2, 4, 3, 3]), ([1, 1], [2, 2, 4, 5]), ([1, 1], [6, 6, 6])))
    # shared with the row before: 1 1 2 2 (the 4 before they part is repeated), then 1 (the second 1 is repeated)
    assert pack.ids.tolist() == [[1, 1, 2, 2, 4, 3, 3, 4, 5, 1, 6, 6, 6]]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 1, 2, 3, 4]]
    no = NO_LABEL
    assert pack.labels.tolist() == [[no, 2, 2, 4, 3, 3, no, 5, no, 6, 6, 6, no]]
    # the first 1 is in all rows; 1 2 2 in rows 0 and 1, which end at 9; 4 3 3 in row 0 alone, which ends at 7
    assert pack.paths.edges == ((0, 1, 13), (1, 4, 9), (4, 7, 7), (7, 9, 9), (9, 13, 13))
    assert (pack.leaf_tokens, pack.padded_tokens) == (7 + 6 + 5, 3 * 7)
    # for each completion token where the token before it stands
    assert pack.sources[0].tolist() == [1, 2, 3, 4, 5]
    assert pack.sources[1][:4].tolist() == [1, 2, 3, 7]
    assert pack.sources[2][:3].tolist() == [9, 10, 11]
    assert pack.real.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2]


def test_equal_rows_are_one_and_a_row_inside_another_costs_nothing():
    pack = pack_rows(*batch(([1], [2, 3]), ([1], [2, 3]), ([1], [2, 3, 4]), ([1], [2])))
    assert pack.ids.tolist() == [[1, 2, 3, 4]]
    assert pack.labels.tolist() == [[2, 3, 4, NO_LABEL]]
    assert pack.leaf_tokens == 3 + 3 + 4 + 2
    assert pack.real.sum() == 2 + 2 + 3 + 1


def test_a_path_goes_through_edges_of_several_earlier_rows():
    # sorted: 1 2 3 4, then 1 2 3 5 6 (shares 1 2), then 1 2 3 5 7 (shares 1 2 of the first and 3 of the second)
    pack = pack_rows(*batch(([1], [2, 3, 5, 7]), ([1], [2, 3, 4]), ([1], [2, 3, 5, 6])))
    assert pack.ids.tolist() == [[1, 2, 3, 4, 3, 5, 6, 5, 7]]
    assert pack.paths.edges == ((0, 2, 9), (2, 4, 4), (4, 5, 9), (5, 7, 7), (7, 9, 9))


def test_a_prompt_of_one_row_may_be_a_completion_of_another():
    pack = pack_rows(*batch(([1, 2, 3], [4]), ([1], [2, 3, 4])))
    assert pack.ids.tolist() == [[1, 2, 3, 4]]
    assert pack.labels.tolist() == [[2, 3, 4, NO_LABEL]]
    assert pack.sources[0][:1].tolist() == [2]
    assert pack.sources[1].tolist() == [0, 1, 2]


def test_only_wanted_tokens_get_a_label_and_a_shared_one_gets_it_if_any_row_wants_it():
    # row 0: 1 | 2 3 4      row 1: 1 | 2 5; row 0 wants 2 and 4, row 1 only 5
    rows = batch(([1], [2, 3, 4]), ([1], [2, 5]))
    pack = pack_rows(*rows, torch.tensor([[1, 0, 1], [0, 1, 1]]))
    assert pack.ids.tolist() == [[1, 2, 3, 4, 2, 5]]  # the 2 before they part is repeated
    no = NO_LABEL
    assert pack.labels.tolist() == [[2, no, 4, no, 5, no]]
    assert pack.real.tolist() == [[True, False, True], [False, True, False]]  # the last column of row 1 is padding
    assert pack.sources[pack.real].tolist() == [0, 2, 4]


def test_tokens_without_wanted_logprobs_do_not_affect_other_tokens():
    rows = random_rows(1)
    wanted = torch.rand(len(rows[0]), rows[2], generator=torch.Generator().manual_seed(0)) < 0.5
    model = model_of(*FAMILIES[0])
    everything = forward_pack(model, pack_rows(*rows))
    some = forward_pack(model, pack_rows(*rows, wanted))
    for all_of, found in zip(everything, some, strict=True):
        torch.testing.assert_close(found, all_of * wanted)


def test_a_pack_is_padded_to_a_multiple_with_an_unused_edge():
    rows = batch(([1], [2, 3, 4]), ([1], [2, 5]))
    plain, filled = pack_rows(*rows), pack_rows(*rows, multiple_of=8)
    assert filled.ids.tolist() == [[*plain.ids[0].tolist(), 0, 0]]  # 1 2 3 4 2 5, and two more
    assert filled.paths.edges == ((0, 1, 6), (1, 4, 4), (4, 6, 6), (6, 8, 8))
    assert filled.positions[0, 6:].tolist() == [0, 1]
    assert filled.labels[0, 6:].tolist() == [NO_LABEL] * 2
    assert torch.equal(filled.sources, plain.sources)
    assert len(pack_rows(*rows, multiple_of=3)) == 6  # as it was


def test_padding_between_tokens_is_an_error():
    ids, _, after = batch(([1, 2], [3, 4]))
    for hole in ([1, 0, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="padding"):
            pack_rows(ids, torch.tensor([hole]), after)


def test_a_pack_never_contains_more_tokens_than_the_padded_batch():
    for seed in range(50):
        rows = random_rows(seed)
        assert len(pack_rows(*rows)) <= int(rows[1].sum())


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0].model_type)
def test_logprobs_entropies_and_gradients_are_those_of_the_padded_batch(family):
    model = model_of(*family)
    for seed in range(8):
        assert_same(model, random_rows(seed))


@pytest.mark.parametrize(
    "rows",
    [
        batch(([1, 2], [3])),
        batch(([1], [2, 3, 4]), ([1], [2, 3, 4])),
        batch(([1, 2, 3], [4]), ([1], [2, 3, 4, 5, 6])),
        batch(([5], [6, 7, 8]), ([1], [2]), ([9, 9], [9, 9, 9, 9])),  # nothing shared
    ],
    ids=["one row", "equal rows", "a prompt inside a completion", "nothing shared"],
)
def test_degenerate_batches_are_computed_like_any_other(rows):
    assert_same(model_of(*FAMILIES[0]), rows)


def test_gradient_checkpointing_changes_nothing():
    model = model_of(*FAMILIES[0])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model, random_rows(0))


def test_an_adapters_gradients_are_exact_too():
    model = small_model(*FAMILIES[1], initializer_range=0.2)
    add_fused_lm_head(model, 1.0, False, ("log_probs", "entropy"))
    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False))
    share_prefixes(adapted.get_base_model())
    assert why_not_shared(adapted.get_base_model(), CPU) is None
    assert_same(adapted, random_rows(1))


def test_bfloat16_is_as_close_as_its_rounding():
    model = model_of(*FAMILIES[0]).bfloat16()
    assert_same(model, random_rows(2), relative=0.05)


def test_ordinary_batches_are_computed_as_before():
    plain = small_model(*FAMILIES[0])
    ids, mask, _ = random_rows(3)
    before = plain(input_ids=ids, attention_mask=mask).logits
    share_prefixes(plain)
    attention = AttentionInterface()["sdpa"]
    share_prefixes(small_model(*FAMILIES[1]))
    assert AttentionInterface()["sdpa"] is attention  # twice is once
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(before, plain(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("name", [name for name in EXTENDS if "flash" in name])
def test_flash_attention_keeps_its_name_by_which_it_finds_its_kernel(name, monkeypatch):
    def flash(module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
        assert (module.config._attn_implementation, mask) == (name, None)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, flash_attention_mask)
    model, other = (small_model(*FAMILIES[0], initializer_range=0.2) for _ in range(2))
    add_fused_lm_head(model, 0.8, False, ("log_probs", "entropy"))
    for each in (model, other):
        each.config._attn_implementation = name
    ids = torch.arange(1, 9)[None]
    before = other(ids).logits
    on = SharedPrefixForward.ON
    assert prepare_prefix_sharing([model], Accelerator(cpu=True), on, aux_loss=False, noise=False, sharded=False)
    assert model.config._attn_implementation == name
    assert torch.equal(other(ids).logits, before)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: small_model(MistralConfig, MistralForCausalLM, sliding_window=4), "sliding"),
        (lambda: small_model(MixtralConfig, MixtralForCausalLM, num_local_experts=2), "experts"),
        (lambda: small_model(Qwen3Config, Qwen3ForCausalLM, attention_dropout=0.1), "dropout"),
        (lambda: small_model(OPTConfig, OPTForCausalLM, ffn_dim=48, word_embed_proj_dim=32), "dropout"),
        (lambda: small_model(Qwen3Config, Qwen3ForCausalLM, attn_implementation="eager"), "eager"),
        (
            lambda: get_peft_model(
                small_model(Qwen3Config, Qwen3ForCausalLM), LoraConfig(lora_dropout=0.05)
            ).get_base_model(),
            "dropout",
        ),
    ],
    ids=["sliding window", "experts", "attention dropout", "dropout without a module", "eager", "LoRA dropout"],
)
def test_a_model_for_which_packs_are_not_exact_is_recognised(make, reason):
    assert reason in why_not_shared(make(), CPU)


def test_a_model_that_keeps_packs_from_its_attention_is_found_out_before_training():
    model = model_of(NemotronConfig, NemotronForCausalLM)  # its layers hand no keywords on
    assert why_not_shared(model, CPU) is None  # nothing is known against it
    assert "passes packs to the attention of only 0 of its 2 layers" in why_packs_differ(model)


def test_a_model_that_takes_packs_is_compared_with_its_padded_self(monkeypatch):
    model = model_of(*FAMILIES[0])
    assert why_packs_differ(model) is None
    assert why_packs_differ(model.bfloat16()) is None
    monkeypatch.setattr(
        "arpo_trl.training.prefix_sharing.attend", lambda *args, scaling: 2 * attend(*args, scaling=scaling)
    )
    assert "packed and padded rows differ by" in why_packs_differ(model.float())


def test_differences_of_logprobs_are_in_standard_deviations_and_the_coarsest_dtype_limits_them():
    model, expected = model_of(*FAMILIES[0]), torch.tensor([-3.0, 0.0, 3.0])  # a deviation of 3
    assert rounding(model, expected + 0.03, expected) == (pytest.approx(0.01), 1e-3)
    model.get_input_embeddings().bfloat16()
    assert rounding(model, expected, expected) == (0.0, 0.1)


# In the trainer ------------------------------------------------------------------------------------------------------

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)]} for i in range(8)]
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def trainer(model_path: str, folder: Path, peft_config: LoraConfig | None = None, **settings) -> ARPOTrainer:
    def script(request, context):
        if request.key[-1] == 0:
            return ScriptedTurn(text=f"<search>iron {request.key[1]}</search>", entropies=[0.1])
        return ScriptedTurn(
            text=f"{request.key}{' word' * request.key[1]}<answer>\\boxed{{1}}</answer>", entropies=[1.0]
        )

    def reward(completions, **columns):
        return [float(sum(completion[-1]["content"].encode()) % 4) for completion in completions]

    eos = (int(tokenizer().eos_token_id),)
    made = ARPOTrainer(
        model_path,
        reward,
        ARPOConfig(
            **{
                "output_dir": str(folder),
                "num_generations": 4,
                "per_device_train_batch_size": 8,
                "max_completion_length": 120,
                "max_steps": 2,
                "learning_rate": 1e-3,
                "save_strategy": "no",
                **ON_CPU,
                "rollout_schedule": "rounds",
                "entropy_probe_tokens": 4,
                **settings,
            }
        ),
        ROWS,
        tools=[search],
        engine=ScriptedEngine(tokenizer(), SamplingParams(eos_ids=eos, stop_strings=("</search>",)), script),
        peft_config=peft_config,
    )
    return made


def weights(made: ARPOTrainer) -> torch.Tensor:
    made.train()
    made.toolbox.close()
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.1}, {"num_iterations": 2}, {"loss_type": "dapo"}, {"shared_prefix_weight": "once"}],
    ids=str,
)
@pytest.mark.parametrize(("precision", "most"), [({}, 0.1), (EXACT, 1e-4)], ids=["default", "float32"])
def test_training_with_shared_prefixes_is_training_without(model_path, tmp_path, settings, precision, most):
    sgd = {"optim": "sgd", "learning_rate": 0.1}  # Adam would blow up the rounding of tiny gradients
    settings = {**settings, **precision, **sgd}
    made = trainer(model_path, tmp_path / "on", shared_prefix_forward="on", **settings)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in made.model.parameters()])
    shared = weights(made)
    alone = weights(trainer(model_path, tmp_path / "off", shared_prefix_forward="off", **settings))
    assert (alone - before).norm() > 1e-3
    assert ((shared - alone).norm() / (alone - before).norm()).item() < most
    assert made.state.log_history[0]["arpo/update/sharing_ratio"] > 1.5


def test_tool_results_get_no_logits(model_path, tmp_path, monkeypatch):
    packs = []
    monkeypatch.setattr(
        "arpo_trl.training.shared_update.forward_packs",
        lambda model, given: packs.extend(given) or forward_packs(model, given),
    )
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", num_iterations=2, max_steps=1)
    made.train()
    made.toolbox.close()
    old, new = packs[:2]  # logprobs before the step, and the step's own
    assert torch.equal(old.labels, new.labels)
    observed = {
        token for tree in made._last.rollout.trees for node in tree.nodes if node.calls for token in node.ids
    } - {token for tree in made._last.rollout.trees for node in tree.turns() for token in node.ids}
    assert observed
    assert observed & set(new.ids.flatten().tolist())
    assert not observed & set(new.labels.flatten().tolist())


def test_a_padded_forward_has_logprobs_of_the_same_tokens_as_a_pack(model_path, tmp_path, monkeypatch):
    """`auto` may pack a rollout and pad its update. Then a token outside of the loss must not differ."""
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", **EXACT)
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    mask = batch["completion_mask"] * batch["tool_mask"]
    ids, attention = (torch.cat([batch[f"prompt_{of}"], batch[f"completion_{of}"]], 1) for of in ("ids", "mask"))

    def logprobs() -> torch.Tensor:
        with torch.no_grad(), made._loss_tokens(mask):
            return made._get_per_token_logps_and_entropies(made.model, ids, attention, mask.size(1))[0]

    packed = logprobs()
    monkeypatch.setattr(made, "_packs", lambda *_: [])
    padded = logprobs()
    made.toolbox.close()
    assert (batch["completion_mask"] > mask).any()  # there are results of tools
    assert (padded[mask == 0] == 0).all() and (padded[mask == 1] != 0).all()
    torch.testing.assert_close(packed * mask, padded, atol=1e-5, rtol=0)


def test_the_time_of_logprobs_is_that_of_rollouts(model_path, tmp_path):
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", beta=0.1)
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    assert made._metrics["train"]["arpo/time/logprobs_s"][-1] > 0  # of the reference model
    made.model.eval()
    with torch.no_grad():  # an evaluation
        made._compute_loss(made.model, batch)
    made.toolbox.close()
    assert made._spans.take("logprobs") == 0.0


def completions_of(micro_batch) -> list[tuple[int, ...]]:
    """Without padding."""
    rows = zip(micro_batch["completion_ids"], micro_batch["completion_mask"], strict=True)
    return [tuple(row[mask.bool()].tolist()) for row, mask in rows]


def test_micro_batches_hold_whole_trees_of_the_same_generation_batch(model_path, tmp_path):
    settings = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", **settings)
    made.model.train()
    inputs = made._prepare_inputs([dict(ROWS[i // 4]) for i in range(16)])
    batches = made._buffered_inputs
    assert inputs is batches[0]
    assert "leaf" not in inputs
    prompts = [{tuple(row) for row in batch["prompt_ids"].tolist()} for batch in batches]
    assert all(len(found) == 1 for found in prompts)  # one tree each
    assert len(set.union(*prompts)) == 4
    leaves = {tuple(leaf.ids) for tree in made._last.rollout.trees for leaf in tree.leaves()}
    assert {row for batch in batches for row in completions_of(batch)} == leaves
    assert all(len(batch["advantages"]) == 4 for batch in batches)
    made.toolbox.close()


SEVERAL = {
    **{"per_device_train_batch_size": 4, "initial_rollouts": 4, "optim": "sgd", "learning_rate": 0.1, "max_steps": 4},
    **{"bf16": False, "logging_steps": 1},  # exactness in float32 is what these are about
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 4, "loss_type": "dapo"},
        {"gradient_accumulation_steps": 4, "loss_type": "bnpo"},
        {"gradient_accumulation_steps": 4, "loss_type": "dr_grpo", "beta": 0.1},
        {"gradient_accumulation_steps": 4, "top_entropy_quantile": 0.5},
        {"gradient_accumulation_steps": 4, "entropy_coef": 0.1},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 4, "num_iterations": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
    ],
    ids=str,
)
def test_without_branches_each_optimizer_step_is_that_of_trls_micro_batches(model_path, tmp_path, settings):
    """As `shared_prefix_forward="off"`, whose batches are GRPO's bit for bit: the same losses, the same weights."""
    made, after = {}, {}
    for way in ("on", "off"):  # one after the other, since rows are shuffled by the process's generator
        made[way] = trainer(model_path, tmp_path / way, shared_prefix_forward=way, **SEVERAL, **settings)
        before = torch.cat([parameter.detach().flatten().clone() for parameter in made[way].model.parameters()])
        after[way] = weights(made[way])
    assert (after["off"] - before).norm() > 1e-3
    assert ((after["on"] - after["off"]).norm() / (after["off"] - before).norm()).item() < 1e-4
    losses, grads = (
        {way: [row[name] for row in of.state.log_history if "loss" in row] for way, of in made.items()}
        for name in ("loss", "grad_norm")
    )
    assert len(losses["on"]) == 4
    assert losses["on"] == pytest.approx(losses["off"], abs=2e-4)
    assert grads["on"] == pytest.approx(grads["off"], rel=1e-3)


def test_auto_packs_if_a_layer_is_faster_with_its_launches_and_attention_calls(model_path, tmp_path):
    # 3 rows of 1,000 + 200 tokens: 3,600 padded; 1,000 + 3 · 200 in the pack, and the prompt's last token twice more.
    # A CPU's kernel runs for the prompt, for each completion, and from all completions to the prompt: five times.
    pack = pack_rows(*batch(*(([7] * 1000, [row] * 200) for row in (1, 2, 3))))
    assert (pack.padded_tokens, len(pack)) == (3600, 1602)
    assert attention_calls(pack.paths.edges) == 5
    # saved: 1,998 tokens · 72 · hidden² / 1e11 per second; added: 5 · 1e-4 s. Equal at a hidden size of 18.6.
    assert not pays(pack, 18)
    assert pays(pack, 19)
    # On a GPU the padded batch must take longer than the launches: 3,600 · 72 · hidden² / 2e14 = 6e-3 s at 2,151.7.
    on_gpu = replace(pack, ids=pack.ids.to("meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COSTS, "meta", COSTS["cuda"])
        assert not pays(on_gpu, 2151)
        assert pays(on_gpu, 2152)
    # where nothing is saved, nothing pays
    assert not pays(pack_rows(*batch(([1], [2, 3]), ([4], [5, 6]))), 1 << 20)


@pytest.mark.parametrize(("way", "packed"), [("auto", 0), ("on", 1)])
def test_how_often_micro_batches_are_packed_is_logged(model_path, tmp_path, way, packed):
    made = trainer(model_path, tmp_path, shared_prefix_forward=way)  # a model so small that packing does not pay
    made.train()
    made.toolbox.close()
    row = made.state.log_history[0]
    assert row["arpo/update/packed"] == packed
    assert ("arpo/update/sharing_ratio" in row) == bool(packed)


def test_packs_are_filled_up_as_trl_pads(model_path, tmp_path, monkeypatch):
    packs = []
    monkeypatch.setattr(
        "arpo_trl.training.shared_update.forward_packs",
        lambda model, given: packs.extend(given) or forward_packs(model, given),
    )
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", pad_to_multiple_of=64, max_steps=1)
    made.train()
    made.toolbox.close()
    assert packs and all(len(pack) % 64 == 0 for pack in packs)


def test_parts_of_a_tree_contain_leaves_with_a_common_branch(model_path, tmp_path):
    """Two paths start at each root and branch once: a micro-batch of two rows holds a path and its branch."""
    settings = {"per_device_train_batch_size": 2, "steps_per_generation": 8, "gradient_accumulation_steps": 8}
    made = trainer(model_path, tmp_path, shared_prefix_forward="on", initial_rollouts=2, **settings)
    made.model.train()
    made._prepare_inputs([dict(ROWS[i // 4]) for i in range(16)])
    addresses = {tuple(leaf.ids): leaf.address for tree in made._last.rollout.trees for leaf in tree.leaves()}
    found = [[addresses[row] for row in completions_of(batch)] for batch in made._buffered_inputs]
    assert sorted(found) == [[(0,), (0, 1, 0)]] * 4 + [[(1,), (1, 1, 0)]] * 4
    made.toolbox.close()


def test_on_is_an_error_and_auto_a_warning_where_packs_are_not_exact(model_path, tmp_path, caplog):
    dropping = LoraConfig(lora_dropout=0.05)
    with pytest.raises(ConfigError, match=r"'on'.*dropout to 0"):
        trainer(model_path, tmp_path / "on", shared_prefix_forward="on", peft_config=dropping)
    with pytest.raises(ConfigError, match=r"'on'.*neftune_noise_alpha is set"):
        trainer(model_path, tmp_path / "noise", shared_prefix_forward="on", neftune_noise_alpha=5.0)
    made = trainer(model_path, tmp_path / "auto", peft_config=dropping)
    assert "dropout to 0" in caplog.text
    made.train()
    assert "arpo/update/sharing_ratio" not in made.state.log_history[0]
    made.toolbox.close()
