"""The memory table, the tests and the commands in docs/distributed.md are correct."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from memory import SHAPES, Shape, table

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "distributed.md").read_text("utf-8")


def test_the_memory_table_equals_its_scripts_output():
    shown = re.search(r"<!-- python benchmarks/memory\.py -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == table()


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_as_transformers_and_peft_count_them(name):
    shape = SHAPES[name]
    kind, model_class = (Qwen3Config, Qwen3ForCausalLM) if shape.head_norms else (Qwen2Config, Qwen2ForCausalLM)
    config = kind(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        **({"head_dim": shape.head} if shape.head_norms else {}),
    )
    with torch.device("meta"):
        model = model_class(config)
        assert model.num_parameters() == shape.parameters
        adapted = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == shape.adapter(32)


def test_a_small_shape_by_hand():
    # A layer: q, k, v 4×4, 4×2, 4×2; o 4×4; gate, up 4×8, down 8×4; two norms of 4. Then a norm, and a head of 10×4.
    shape = Shape(layers=1, width=4, heads=2, kv_heads=1, head=2, inner=8, vocab=10, tied=True)
    assert shape.parameters == (16 + 8 + 8 + 16 + 3 * 32 + 8) + 4 + 40
    assert shape.adapter(1) == 8 + 6 + 6 + 8 + 3 * 12
    assert shape.kv_cache(10) == 10 * 2 * 2 * 2  # keys and values, one head of 2, 2 bytes each
    # Per token 4 of the layer's input, and 6·4 + 3·4 + 4·2 + 4·8 within it, 2 bytes each
    assert shape.activations(10) == 10 * 2 * (4 + 24 + 12 + 8 + 32)


def test_every_test_file_and_every_configuration_that_it_names_is_there():
    assert all((ROOT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)`", TEXT))
    assert all((ROOT / name).exists() for name in re.findall(r"(?:accelerate_configs|configs)/\w+\.yaml", TEXT))
    described = set(re.findall(r"^\| `(\w+\.yaml)` \|", TEXT, re.MULTILINE))
    assert described == {file.name for file in (ROOT / "accelerate_configs").glob("*.yaml")}


def test_its_shell_scripts_are_shell_scripts():
    for script in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
