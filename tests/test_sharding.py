from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from arpo_trl.common.adapters import check_adapter, check_saved
from arpo_trl.errors import CheckpointError, ConfigError
from arpo_trl.training.sharding import _parameter_groups, check_launch, local_forwards
from support import tiny_model


def launched(
    ranks: int = 2, *, zero: int | None = None, fsdp: int | None = None, checkpoints: bool = False, parallel: int = 1
) -> Any:
    """What check_launch and check_adapter look at of an accelerator."""
    return SimpleNamespace(
        num_processes=ranks,
        is_main_process=True,
        device=torch.device("cpu"),
        state=SimpleNamespace(
            deepspeed_plugin=None if zero is None else SimpleNamespace(zero_stage=zero),
            fsdp_plugin=None
            if fsdp is None
            else SimpleNamespace(fsdp_version=fsdp, activation_checkpointing=checkpoints),
        ),
        parallelism_config=SimpleNamespace(non_data_parallel_size=parallel),
    )


@pytest.mark.parametrize(
    "accelerator", [launched(1), launched(), launched(zero=2), launched(zero=3), launched(fsdp=2)], ids=str
)
def test_working_configurations_are_accepted(accelerator):
    check_launch(accelerator, gathers=True)


def test_one_process_alone_needs_no_gathering():
    check_launch(launched(1, zero=3), gathers=False)
    check_launch(Accelerator(cpu=True), gathers=False)


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (launched(zero=3), r"false on 2 ranks: .* hang\. Set it to true, .* one copy of the weights"),
        (launched(fsdp=1), r"FSDP version 1 .* fsdp_version: 2"),
        (launched(4, parallel=2), r"splits each sample over 2 ranks .*vllm_tensor_parallel_size"),
    ],
    ids=["zero3", "fsdp1", "parallel"],
)
def test_what_would_hang_is_refused_with_the_way_out(accelerator, message):
    with pytest.raises(ConfigError, match=message):
        check_launch(accelerator, gathers=accelerator.state.deepspeed_plugin is None)


def test_a_trained_head_whose_gradients_fsdp_would_not_sum_is_refused():
    def adapter(*saved: str) -> Any:
        return get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=list(saved)))

    for model in (tiny_model(), adapter(), adapter("embed_tokens")):
        check_adapter(model, launched(fsdp=2))
    for accelerator in (launched(1, fsdp=2), launched(), launched(zero=3)):
        check_adapter(adapter("lm_head"), accelerator)
    with pytest.raises(ConfigError, match=r"trains the language modeling head .* under FSDP, .*zero3\.yaml"):
        check_adapter(adapter("lm_head"), launched(fsdp=2))


def test_an_adapter_whose_weights_fsdp_would_rename_is_refused():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    check_adapter(tiny_model(), launched(fsdp=2, checkpoints=True))  # all weights are saved under their names
    for ranks in (1, 2):
        with pytest.raises(
            ConfigError, match=r"Set fsdp_activation_checkpointing: false .* gradient_checkpointing: true"
        ):
            check_adapter(adapted, launched(ranks, fsdp=2, checkpoints=True))


def test_an_adapter_is_not_saved_without_weights():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    check_saved(tiny_model(), {})
    check_saved(adapted, None)
    check_saved(adapted, adapted.state_dict())
    renamed = {name.replace(".self_attn.", "._wrapped.self_attn."): w for name, w in adapted.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"adapter 'default' would be saved without weights"):
        check_saved(adapted, renamed)


def test_single_tokens_of_tied_embeddings_are_refused():
    for tied in (False, True):
        model = tiny_model()
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]))
        with pytest.raises(ConfigError, match=r"single tokens .* shares with its head") if tied else nullcontext():
            check_adapter(adapted, launched(1))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(launched(2), gathers=True)
    with pytest.raises(ConfigError, match=r"2 processes were started, but .* use_cpu: true"):
        check_launch(launched(1), gathers=True)


def test_fsdp_that_accelerate_left_out_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launch(launched(fsdp=2), gathers=True)
    with pytest.raises(ConfigError, match=r"accelerate does not shard on device type cpu: .*ddp\.yaml"):
        check_launch(launched(), gathers=True)


def test_an_unsharded_model_is_sampled_unchanged():
    model = tiny_model()
    with local_forwards(model, model):
        before = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.equal(before, model(torch.tensor([[1, 2, 3]])).logits)


@pytest.mark.parametrize(
    ("state", "groups"),
    [
        ({"_fsdp_param_group": None}, []),
        ({"_fsdp_param_group": "of the layer"}, ["of the layer"]),
        ({"_fsdp_param_groups": ["of the experts", "of the rest"]}, ["of the experts", "of the rest"]),
    ],
    ids=["2.11, no weights of its own", "2.11", "2.13"],
)
def test_the_groups_of_an_fsdp2_module_are_found_in_old_and_new_torch(state, groups):
    module: Any = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(**state))
    assert _parameter_groups(module) == groups
