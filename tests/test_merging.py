import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from arpo_trl.common.adapters import check_adapter, tokenizer_of
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.engines import load_tokenizer
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.publishing.merging import merge_adapter
from loopback import Reply
from support import command_output, save_tiny_model, small_model, tokenizer, without_a_layer

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path):
    """A trained adapter's folder, with a chat template of its own."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    mine = AutoTokenizer.from_pretrained(base)
    mine.chat_template = "{{ 'mine' }}"
    mine.save_pretrained(folder)
    return folder


def test_the_merged_model_is_base_plus_adapter_with_its_tokenizer(base, adapter, tmp_path):
    merge_adapter(str(adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not isinstance(merged, PeftModel)
    assert not any("lora" in name for name in merged.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = plain(IDS).logits
        expected = PeftModel.from_pretrained(plain, adapter)(IDS).logits
        got = merged(IDS).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-2)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded.chat_template == "{{ 'mine' }}"
    assert loaded.get_vocab() == tokenizer().get_vocab()
    assert (tmp_path / "merged/generation_config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_an_adapter_on_another_base_than_its_own_is_reported(base, adapter, tmp_path, caplog):
    other = save_tiny_model(tmp_path / "other")
    merge_adapter(str(adapter), tmp_path / "merged", base=base)
    assert "was trained on" not in caplog.text
    merge_adapter(str(adapter), tmp_path / "of other", base=other)
    assert f"The adapter {str(adapter)!r} was trained on {base!r}, but is added to {other!r}." in caplog.text
    caplog.clear()
    path = adapter / "adapter_config.json"
    for named, is_other in {"/gone/base": False, "me/other": False, "me/another": True}.items():
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
        merge_adapter(str(adapter), tmp_path / f"without {Path(named).name}", base=other)
        assert (f"was trained on {named!r}" in caplog.text) == is_other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_on_a_model_that_was_merged_in_memory_is_reported(base, adapter, caplog, dtype):
    def check(model):
        check_adapter(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), Accelerator(cpu=True))

    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    check(loaded)
    check(small_model(Qwen3Config, Qwen3ForCausalLM))  # has no name
    assert "The adapter is trained on a model" not in caplog.text
    check(PeftModel.from_pretrained(loaded, adapter).merge_and_unload())
    assert f"weights are not those of {base!r} (model.layers.0.self_attn.q_proj.weight differs)" in caplog.text


def test_an_adapter_without_a_tokenizer_gets_its_bases(base, adapter, tmp_path):
    for path in adapter.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    merge_adapter(str(adapter), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer().chat_template


@pytest.mark.parametrize("layers", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=" ".join)
def test_an_adapter_of_one_of_two_tied_layers_leaves_the_other_as_it_was(base, tmp_path, layers):
    tied = AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    lora = LoraConfig(r=4, target_modules=["q_proj", *layers], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), lora)
    model.save_pretrained(tmp_path / "adapter-of-layers")
    tokenizer().save_pretrained(tmp_path / "adapter-of-layers")
    merge_adapter(str(tmp_path / "adapter-of-layers"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, model.eval()(IDS).logits, atol=1e-5)


def resized(base, folder, **lora):
    """An adapter's model with five more tokens than `base`, saved in `folder`."""
    torch.manual_seed(1)
    more = AutoModelForCausalLM.from_pretrained(base)
    more.resize_token_embeddings(more.config.vocab_size + 5)
    model = get_peft_model(more, LoraConfig(r=4, init_lora_weights=False, **lora)).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("layers", [["lm_head"], ["embed_tokens"]], ids=" ".join)
def test_an_adapter_of_one_of_two_tied_layers_may_have_new_tokens(base, tmp_path, layers):
    tied = AutoModelForCausalLM.from_pretrained(base)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    model = resized(tmp_path / "tied", tmp_path / "adapter", target_modules=layers)
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
        torch.testing.assert_close(merged, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "is_whole"), [(["lm_head"], False), (["embed_tokens"], False), (["lm_head", "embed_tokens"], True)]
)
def test_an_adapter_without_all_weights_of_its_new_tokens_is_refused(base, tmp_path, layers, is_whole):
    model = resized(base, tmp_path / "adapter", target_modules=layers)
    if is_whole:
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
        with torch.no_grad():
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
            torch.testing.assert_close(merged, model(IDS).logits, atol=1e-4, rtol=1e-4)
        return
    has = (
        rf"trained with 322 tokens, its base model has 317, .* only of \S*{layers[0]}\. .*: \[embed_tokens, lm_head\]"
    )
    with pytest.raises(ConfigError, match=has):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_loses_what_was_trained_says_how_much(tmp_path, caplog):
    """Each weight is 1, and its trained difference 1/512 or 1/64. The digits of bfloat16 there are 1/128 apart."""
    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"), dtype=torch.bfloat16)
    for layer in base.model.layers:
        torch.nn.init.ones_(layer.self_attn.q_proj.weight)
    base.save_pretrained(tmp_path / "base")

    def merge(difference: float, name: str, dtype: str | None = None) -> torch.Tensor:
        adapted = get_peft_model(base, LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
        for weight_name, weight in adapted.named_parameters():
            if "lora_" in weight_name:
                torch.nn.init.constant_(weight, 1.0 if "lora_A" in weight_name else difference)
        adapted.save_pretrained(tmp_path / f"adapter-{name}")
        adapted.unload()
        caplog.clear()
        merge_adapter(str(tmp_path / f"adapter-{name}"), tmp_path / name, dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[0].self_attn.q_proj.weight

    assert (merge(1 / 512, "lost") == 1).all()
    assert "Merging loses 100% of what was trained: " in caplog.text and "the digits of bfloat16" in caplog.text
    assert "Merge with --dtype float32" in caplog.text
    assert (merge(1 / 64, "kept") == 1 + 1 / 64).all() and "Merging loses" not in caplog.text
    assert (merge(1 / 512, "exact", "float32") == 1 + 1 / 512).all() and "Merging loses" not in caplog.text


def test_a_sum_that_is_too_large_for_float16_is_refused(base, adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1e4 * weight for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match="too large for float16"):
        merge_adapter(str(adapter), tmp_path / "merged", dtype="float16")


def test_a_dtype_is_that_of_the_result(base, adapter, tmp_path):
    merge_adapter(str(adapter), tmp_path / "merged", dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype is torch.bfloat16


def test_adapter_and_base_may_be_in_the_home_directory(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(base)
    merge_adapter("~/adapter", tmp_path / "merged", base="~/base")
    assert (tmp_path / "merged/config.json").is_file()


def test_a_merged_run_keeps_its_card(adapter, tmp_path):
    (adapter / "training_config.yaml").write_text("model_name_or_path: Qwen/Qwen3-8B\nuse_peft: true\nlora_r: 4\n")
    (adapter / "evaluation.md").write_text("half are right")
    merge_adapter(str(adapter), tmp_path / "merged", repo_id="me/whole")
    card = (tmp_path / "merged/README.md").read_text()
    assert "library_name: transformers" in card and "base_model: Qwen/Qwen3-8B" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/whole")' in card
    assert "half are right" in card and "| LoRA rank | 4 |" in card


def test_the_card_names_the_base_into_which_the_adapter_is_merged(hub, base, adapter, tmp_path):
    hub.repos["models", "me/whole-base"] = files_of(Path(base))
    (adapter / "training_config.yaml").write_text("model_name_or_path: me/base-bnb-4bit\nuse_peft: true\n")
    merge_adapter(str(adapter), tmp_path / "merged", base="me/whole-base")
    card = (tmp_path / "merged/README.md").read_text()
    assert "base_model: me/whole-base\n" in card
    assert "[me/whole-base]" in card and "[me/base-bnb-4bit]" not in card


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter_on_the_hub_keeps_its_card_and_needs_no_tokenizer(hub, base, adapter, tmp_path):
    (adapter / "training_config.yaml").write_text("use_peft: true\nlora_r: 4\n")
    (adapter / "evaluation.md").write_text("half are right")
    files = files_of(adapter)
    hub.repos["models", "me/adapter"] = files
    hub.repos["models", "me/bare"] = {name: files[name] for name in files if name.startswith("adapter_")}
    merge_adapter("me/adapter", tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert "half are right" in card and "| LoRA rank | 4 |" in card
    assert (tmp_path / "merged/training_config.yaml").read_bytes() == files["training_config.yaml"]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ 'mine' }}"
    merge_adapter("me/bare", tmp_path / "bare")
    assert not (tmp_path / "bare/README.md").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").chat_template == tokenizer().chat_template


@pytest.mark.parametrize("offline", [False, True])
def test_an_adapter_whose_tokenizer_is_unknown_is_not_one_without(hub, base, adapter, monkeypatch, offline, caplog):
    """Its own template would be replaced by that of its base."""
    hub.repos["models", "me/adapter"] = files_of(adapter)
    hub.fault = lambda asked: Reply(status=503) if asked.path.endswith("tokenizer_config.json") else None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    if offline:
        own = tokenizer_of("me/adapter", base, "main", trust_remote_code=False)
        assert own.chat_template == tokenizer().chat_template
        assert "has no tokenizer of the adapter 'me/adapter', so that of its base model is used" in caplog.text
    else:
        with pytest.raises(ConfigError, match="The tokenizer of 'me/adapter' cannot be loaded"):
            tokenizer_of("me/adapter", base, "main", trust_remote_code=False)


def test_an_adapter_that_is_known_to_have_no_tokenizer_gets_its_bases_offline(hub, base, adapter, monkeypatch, caplog):
    files = files_of(adapter)
    hub.repos["models", "me/bare"] = {name: files[name] for name in files if name.startswith("adapter_")}
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        own = tokenizer_of("me/bare", base, "main", trust_remote_code=False)
        assert own.chat_template == tokenizer().chat_template
    assert "has no tokenizer" not in caplog.text


def test_the_base_is_loaded_in_the_revision_of_the_training(hub, base, adapter, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path / "other")
    hub.repos["models", "me/base"] = files_of(Path(base)) | files_of(tmp_path / "other")
    hub.revisions["me/base", "v1"] = files_of(Path(base))

    def is_trained_revision(name: str, **options) -> bool:
        merge_adapter(str(adapter), tmp_path / name, **options)
        return bool(AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight.any())

    changed_config(adapter, base_model_name_or_path="me/base", revision="v1")
    assert is_trained_revision("by-name")
    assert is_trained_revision("by-option", base="me/base")
    changed_config(adapter, base_model_name_or_path="me/other")
    assert not is_trained_revision("of-another-model", base="me/base")


def changed_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_merged_is_named(base, adapter, tmp_path):
    output = tmp_path / "merged"
    with pytest.raises(
        DataError, match=r"base\d* is not an adapter: it has no readable adapter_config.json\. .* use_peft"
    ):
        merge_adapter(base, output)
    with pytest.raises(DataError, match="nowhere is not an adapter"):
        merge_adapter(str(tmp_path / "nowhere"), output)
    with pytest.raises(DataError, match=r"no/where:else is not an adapter"):
        merge_adapter("no/where:else", output)
    with pytest.raises(ConfigError, match="--dtype is 'float12'; expected a dtype such as bfloat16"):
        merge_adapter(str(adapter), output, dtype="float12")
    with pytest.raises(
        DataError, match=r"The base model '.*gone' of .* cannot be loaded: .* Name another one with --base"
    ):
        merge_adapter(str(adapter), output, base=str(tmp_path / "gone"))
    changed_config(adapter, base_model_name_or_path="runs/base")
    with pytest.raises(DataError, match=re.escape(f"there is no such folder in {Path.cwd()}, and the Hub does not")):
        merge_adapter(str(adapter), output)
    changed_config(adapter, base_model_name_or_path=None)
    with pytest.raises(DataError, match=r"adapter does not name its base model. Name it with --base"):
        merge_adapter(str(adapter), output)
    assert not output.exists()
    output.symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"merged exists\. Pass a new folder"):
        merge_adapter(str(adapter), output)
    output.unlink()
    output.mkdir()
    with pytest.raises(ConfigError, match=r"merged exists\. Pass a new folder"):
        merge_adapter(str(adapter), output)


@pytest.mark.parametrize(
    ("of", "file", "content", "error", "message"),
    [
        ("adapter", "adapter_config.json", b"[" * 5000, DataError, "is not an adapter"),
        ("adapter", "adapter_model.safetensors", b"PK", DataError, "does not fit its base model"),
        ("adapter", "tokenizer.json", b"null", ConfigError, "The tokenizer of .* cannot be loaded"),
        ("adapter", "tokenizer_config.json", b"\xff\xfe", ConfigError, "The tokenizer of .* cannot be loaded"),
        ("adapter", "tokenizer_config.json", rb'{"a": "\ud800"}', DataError, "The tokenizer of .* cannot be saved"),
        ("base", "config.json", b"[" * 5000, DataError, "The base model .* cannot be loaded"),
        ("base", "model.safetensors", b"", DataError, "The base model .* cannot be loaded"),
    ],
)
def test_a_broken_file_is_an_error_of_the_model_that_it_belongs_to(
    base, adapter, tmp_path, of, file, content, error, message
):
    copied = shutil.copytree(base, tmp_path / "base")
    ({"base": copied, "adapter": adapter}[of] / file).write_bytes(content)
    with pytest.raises(error, match=message):
        merge_adapter(str(adapter), tmp_path / "merged", base=str(copied))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_an_adapter_is_refused_with_the_order_of_merges(base, adapter, tmp_path):
    second = shutil.copytree(adapter, tmp_path / "second")
    changed_config(second, base_model_name_or_path=str(adapter))
    message = re.escape(
        f"is an adapter itself; expected a whole model. Merge it first (arpo-trl merge {adapter} --out"
    )
    with pytest.raises(ConfigError, match=rf"{message}.* pass FOLDER as --base"):
        merge_adapter(str(second), tmp_path / "merged")
    with pytest.raises(ConfigError, match=rf"{message}.* set model to FOLDER and adapter to .*second"):
        load_tokenizer(EvalSettings(model=str(second)))


def test_a_base_model_whose_files_lack_weights_is_refused(base, adapter, tmp_path):
    broken = without_a_layer(base, tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"weights of Qwen3ForCausalLM are missing from the files of '.*broken'"):
        merge_adapter(str(adapter), tmp_path / "merged", base=broken)


def test_another_models_adapter_is_refused(adapter, tmp_path):
    other = small_model(Qwen3Config, Qwen3ForCausalLM, head_dim=32)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="does not fit its base model"):
        merge_adapter(str(adapter), tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


def test_the_command_merges_and_pushes(hub, adapter, tmp_path, capsys, monkeypatch):
    words = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--push-to-hub", "whole"]
    status, out, _ = command_output(monkeypatch, capsys, *words)
    assert status == 0
    assert out == f"Merged model saved in {tmp_path / 'merged'}\nPushed: {hub.url}/me/whole/commit/{1:040x}\n"
    (commit,) = hub.commits
    assert (commit.repo, commit.message) == ("me/whole", "Merged model")
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(commit.files)
