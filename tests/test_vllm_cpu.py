"""vLLM's CPU build takes new weights with every CPU kernel. Each kernel is simulated in a separate process."""

import pytest
import torch

from arpo_trl.rollout.engines.vllm.cpu_weights import _pad_gate_and_up, _taking_unpacked
from support import found_with_vllm, with_real_vllm

KERNELS = ["onednn", "sgl", "zentorch"]
LAYERS = ["UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"]


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict:
    return found_with_vllm("vllm_loading.py", tmp_path_factory.mktemp("loading"))


@with_real_vllm
@pytest.mark.parametrize("layer", [f"{kernels} {layer}" for kernels in KERNELS for layer in LAYERS] + ["convolution"])
def test_a_layer_follows_new_weights_whatever_kernel_vllm_would_pack_them_for(findings, layer):
    assert findings["prepared"][layer]
    # should this fail, vLLM no longer packs there, or what it is told is not what it asks
    assert not findings["of vLLM itself"][layer]


@with_real_vllm
def test_a_server_without_weight_updates_is_not_patched(findings):
    assert findings["left alone"] == findings["of vLLM itself"]


@with_real_vllm
def test_experts_follow_new_weights_however_they_come(findings):
    old, new = 0, 1
    for state, near, far in (("loaded", old, new), ("moved", new, old), ("reloaded", old, new)):
        difference = findings["experts"][state]
        assert difference[near] < 0.03 < 0.5 < difference[far], state


def test_experts_gate_and_up_are_padded_each():
    # one expert: gate 1 2, up 3 4
    assert _pad_gate_and_up(torch.tensor([[1, 2, 3, 4]]), 1).tolist() == [[1, 2, 0, 3, 4, 0]]
    weight = torch.tensor([[[1, 1], [2, 2]]])  # gate (1, 1), up (2, 2), of a hidden size of 2
    assert _pad_gate_and_up(weight, 1).tolist() == [[[1, 1], [0, 0], [2, 2], [0, 0]]]
    assert _pad_gate_and_up(weight, 0) is weight


def test_a_convolution_gets_its_weight_and_its_layout_as_loaded():
    given = {}
    convolve = _taking_unpacked(lambda **arguments: given.update(arguments))
    weight = torch.arange(8.0).view(2, 1, 4)  # two channels, width 4
    convolve(x="x", weight=weight, is_vnni=True)
    assert given["weight"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (given["x"], given["is_vnni"]) == ("x", False)
