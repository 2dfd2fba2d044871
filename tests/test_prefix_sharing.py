import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.prefix_sharing import (
    NO_LABEL,
    _attend_by_blocks,
    _blocks_fault,
    attend,
    forward_pack,
    pack_rows,
    share_prefixes,
    why_not_shared,
)
from arpo_trl.rollout.engines.base import SamplingSettings
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
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
    assert pack.edges == ((0, 1, 13), (1, 4, 9), (4, 7, 7), (7, 9, 9), (9, 13, 13))
    assert pack.leaf_tokens == 7 + 6 + 5
    # for each completion token where the token before it stands
    assert pack.sources[0].tolist() == [1, 2, 3, 4, 5]
    assert pack.sources[1][:4].tolist() == [1, 2, 3, 7]
    assert pack.sources[2][:3].tolist() == [9, 10, 11]
    assert pack.real.tolist() == [[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2]
    # the first 1 is in all rows; 1 2 2 in rows 0 and 1, which end at 9; 4 3 3 in row 0 alone, which ends at 7
    assert pack.ends.tolist() == [13, 9, 9, 9, 7, 7, 7, 9, 9, 13, 13, 13, 13]


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
    assert pack.edges == ((0, 2, 9), (2, 4, 4), (4, 5, 9), (5, 7, 7), (7, 9, 9))


def test_where_one_rows_prompt_is_anothers_completion_both_get_what_they_want():
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


def test_tokens_that_nobody_wants_change_nothing_for_the_others():
    rows = random_rows(1)
    wanted = torch.rand(len(rows[0]), rows[2], generator=torch.Generator().manual_seed(0)) < 0.5
    model = model_of(*FAMILIES[0])
    everything = forward_pack(model, pack_rows(*rows))
    some = forward_pack(model, pack_rows(*rows, wanted))
    for all_of, found in zip(everything, some, strict=True):
        torch.testing.assert_close(found, all_of * wanted)


def test_padding_between_tokens_is_an_error():
    ids, _, after = batch(([1, 2], [3, 4]))
    for hole in ([1, 0, 1, 1], [0, 0, 0, 0]):
        with pytest.raises(ValueError, match="padding"):
            pack_rows(ids, torch.tensor([hole]), after)


def test_a_pack_never_holds_more_tokens_than_the_padded_batch():
    for seed in range(50):
        rows = random_rows(seed)
        assert len(pack_rows(*rows)) <= int(rows[1].sum())


# What is computed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0].model_type)
def test_logprobs_entropies_and_gradients_are_those_of_the_padded_batch(family):
    model = model_of(*family)
    for seed in range(8):
        assert_same(model, random_rows(seed))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_query_sees_by_blocks_and_by_edges_what_is_on_its_path():
    for seed in range(8):
        pack = pack_rows(*random_rows(seed))
        size = len(pack)
        query, key, value = (torch.randn(1, heads, size, 16, requires_grad=True) for heads in (4, 2, 2))
        sees = torch.tensor([[k <= q < end for k, end in enumerate(pack.ends.tolist())] for q in range(size)])
        expected = scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True)
        found = attend(query, key, value, pack, scaling=0.3)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn_like(found)
        for mine, theirs in zip(
            *(torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        leaves = query.detach(), key.detach(), value.detach()  # it has no backward on a CPU
        by_blocks = _attend_by_blocks(*leaves, pack, 0.3)
        torch.testing.assert_close(by_blocks, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_works_on_this_gpu():
    assert _blocks_fault(torch.device("cuda", 0)) is None


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
    share_prefixes(plain)  # twice is once
    assert torch.equal(before, plain(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: small_model(MistralConfig, MistralForCausalLM, sliding_window=4), "sliding"),
        (lambda: small_model(MixtralConfig, MixtralForCausalLM, num_local_experts=2), "experts"),
        (lambda: small_model(Qwen3Config, Qwen3ForCausalLM, attention_dropout=0.1), "dropout"),
        (lambda: small_model(Qwen3Config, Qwen3ForCausalLM, attn_implementation="eager"), "eager"),
        (
            lambda: get_peft_model(
                small_model(Qwen3Config, Qwen3ForCausalLM), LoraConfig(lora_dropout=0.05)
            ).get_base_model(),
            "dropout",
        ),
    ],
    ids=["sliding window", "experts", "attention dropout", "eager", "LoRA dropout"],
)
def test_a_model_for_which_packs_are_not_exact_is_recognised(make, reason):
    assert reason in why_not_shared(make(), CPU)


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
            return ScriptedTurn(f"<search>iron {request.key[1]}</search>", entropies=[0.1])
        return ScriptedTurn(f"{request.key}<answer>\\boxed{{1}}</answer>", entropies=[1.0])

    def reward(completions, **columns):
        return [float(len(completion[-1]["content"]) % 4) for completion in completions]

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
        engine=ScriptedEngine(tokenizer(), SamplingSettings(eos, ("</search>",)), script),
        peft_config=peft_config,
    )
    return made


def weights(made: ARPOTrainer) -> torch.Tensor:
    made.train()
    made.toolbox.close()
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


@pytest.mark.parametrize(
    "settings",
    [{}, {"beta": 0.1}, {"num_iterations": 2}, {"loss_type": "dapo"}, {"shared_prefix_weight": "once"}],
    ids=str,
)
@pytest.mark.parametrize(("precision", "most"), [({}, 0.03), (EXACT, 1e-4)], ids=["default", "float32"])
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
        "arpo_trl.trainer.forward_pack", lambda model, pack: packs.append(pack) or forward_pack(model, pack)
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


def test_parts_of_a_tree_hold_what_branched_off_together(model_path, tmp_path):
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
    made = trainer(model_path, tmp_path / "auto", peft_config=dropping)
    assert "dropout to 0" in caplog.text
    made.train()
    assert "arpo/update/sharing_ratio" not in made.state.log_history[0]
    made.toolbox.close()
