import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from arpo_trl.common.adapters import tokenizer_of
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.publishing.merging import merge_adapter
from loopback import Reply
from support import command_output, save_tiny_model, small_model, tokenizer

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
