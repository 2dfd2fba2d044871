import dataclasses
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from trl import get_peft_config, get_quantization_config

from arpo_trl.command_line import parse_settings
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.publishing.model_card import describe
from arpo_trl.quickstart.shop import train as shop
from arpo_trl.rollout.rules.random import Random
from arpo_trl.rollout.rules.threshold import Threshold
from support import script

ROOT = Path(__file__).parent.parent
SERVER = {"use_vllm": True, "vllm_mode": "server"}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def config(**settings) -> ARPOConfig:
    return ARPOConfig("unused", use_cpu=True, **settings)


def parse(name: str, file: Path, *flags: str) -> tuple:
    return parse_settings(script(name).SETTINGS, ["--config", str(file), "--use_cpu", "true", *flags])


def parse_shipped(shipped: Path, file: Path) -> tuple:
    """`file`, with the settings of the program that the shipped configuration is for."""
    if "shop" in shipped.stem:
        return parse_settings(shop.SETTINGS, ["--config", str(file), "--use_cpu", "true"])
    return parse("sft" if "sft" in shipped.stem else "train", file)


def written(folder: Path, **settings) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"dataset": "rows.jsonl", "output_dir": "unused", **settings}))
    return file


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("num_generations", 16),
        ("entropy_probe_tokens", 20),
        ("branch_probability", 0.5),
        ("entropy_weight", 0.2),
        ("branch_threshold", 0.5),
        ("branches_per_fork", 1),
        ("branch_rule", "threshold"),
        ("initial_rollouts", 8),  # M // 2
        ("advantage_attribution", "soft"),
        ("shared_prefix_weight", "per_leaf"),
        ("loss_type", "grpo"),
        ("beta", 0.0),
    ],
)
def test_the_defaults_are_the_papers(name, default):
    assert getattr(config(), name) == default


def test_the_default_batch_is_one_group():
    made = config()
    assert made.generation_batch_size == made.num_generations == 16


@pytest.mark.parametrize(("m", "n"), [(2, 1), (7, 3), (8, 4)])
def test_n_is_half_of_m_by_default(m, n):
    assert config(num_generations=m, per_device_train_batch_size=m).initial_rollouts == n


@pytest.mark.parametrize("n", [1, 3, 8])
def test_n_may_be_anything_from_one_to_m(n):
    assert config(num_generations=8, initial_rollouts=n).initial_rollouts == n


def test_a_branch_rule_is_created_from_its_settings():
    values = {
        "branch_probability": 0.1,
        "entropy_weight": 0.3,
        "branch_threshold": 0.3,
        "branches_per_fork": 2,
    }
    assert config(branch_rule="random", **values).make_branch_rule() == Random(
        branch_probability=0.1, branches_per_fork=2
    )
    assert config(**values).make_branch_rule() == Threshold(**values)


def test_the_servers_are_those_that_are_listed_or_the_one_that_trl_would_ask():
    assert config(**SERVER).server_urls == ["http://0.0.0.0:8000"]
    assert config(**SERVER, vllm_server_base_url="http://a:1").server_urls == ["http://a:1"]
    assert config(**SERVER, vllm_server_urls=["http://a:1", "http://b:2"]).server_urls == ["http://a:1", "http://b:2"]


def test_corrections_for_vllm_are_made_token_by_token():
    assert config().vllm_importance_sampling_mode == "token_truncate"  # TRL's default is a ratio per sequence


def test_every_setting_of_ours_explains_itself():
    own = [field for field in fields(ARPOConfig) if field.name in ARPOConfig.__annotations__]
    assert len(own) > 15
    assert [field.name for field in own if not field.metadata.get("help")] == []


@pytest.mark.parametrize("symbol", ["M:", "N:", "k:", "alpha:", "beta:", "tau:", "Z:"])
def test_the_papers_symbols_stand_in_the_help(symbol):
    helps = [str(field.metadata.get("help")) for field in fields(ARPOConfig)]
    assert sum(text.startswith(symbol) for text in helps) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1; expected an integer of at least 2"),
        ({"num_generations": None}, "num_generations is None; expected an integer of at least 2"),
        ({"num_generations": 4.0}, "num_generations is 4.0; expected an integer of at least 2"),
        (
            {"num_generations": 4, "initial_rollouts": 5},
            r"initial_rollouts \(N\) is 5 but num_generations \(M\) is 4; expected an integer with 1 ≤ N ≤ M",
        ),
        ({"initial_rollouts": 0}, "initial_rollouts is 0; expected an integer of at least 1"),
        ({"initial_rollouts": 2.5}, "initial_rollouts is 2.5; expected an integer of at least 1"),
        ({"branches_per_fork": 0}, "branches_per_fork is 0; expected an integer of at least 1"),
        ({"entropy_probe_tokens": 0}, "entropy_probe_tokens is 0; expected an integer of at least 1"),
        ({"entropy_probe_tokens": 2.5}, "entropy_probe_tokens is 2.5; expected an integer of at least 1"),
        ({"branch_probability": 1.1}, r"branch_probability is 1.1; expected a number in \[0, 1\]"),
        ({"branch_probability": -0.1}, r"branch_probability is -0.1; expected a number in \[0, 1\]"),
        ({"branch_threshold": 1.1}, r"branch_threshold is 1.1; expected a number in \[0, 1\]"),
        ({"branch_threshold": float("nan")}, r"branch_threshold is nan; expected a number in \[0, 1\]"),
        ({"trajectory_log_rate": 2}, r"trajectory_log_rate is 2; expected a number in \[0, 1\]"),
        ({"entropy_weight": float("inf")}, "entropy_weight is inf; expected a finite number"),
        (
            {"branch_rule_kwargs": {"beam": 2}},
            r"branch_rule_kwargs has \['beam'\], but .* 'threshold' has no options",
        ),
        (
            {"branch_rule_kwargs": {"branch_threshold": 0.6}},
            r"branch_rule_kwargs has \['branch_threshold'\], but .* 'threshold' has no options",
        ),
        ({"branch_rule_kwargs": [1]}, r"branch_rule_kwargs is \[1\]; expected options of the branch rule"),
        ({"branch_rule_kwargs": 0}, "branch_rule_kwargs is 0; expected options of the branch rule"),
        ({"branch_rule_kwargs": ""}, "branch_rule_kwargs is ''; expected options of the branch rule"),
        ({"branch_rule_kwargs": '{"beam": '}, "branch_rule_kwargs is '{\"beam\": '; expected JSON such as .* Correct"),
        ({"branch_rule_kwargs": {"branch_threshold": 0.6}}, "branch_threshold is a separate setting: set it there"),
        (
            {"branch_rule": "schedule", "branch_rule_kwargs": {"width": [16]}},
            "Did you mean 'widths' instead of 'width'",
        ),
        (
            {"branch_rule": "cbpo", "branch_rule_kwargs": {"slope": "2"}},
            "branch_rule_kwargs: slope is '2'; expected a finite number",
        ),
        (
            {"branch_rule": "schedule", "branch_rule_kwargs": {"widths": [16]}},
            r"branch_rule_kwargs is .* but initial_rollouts \(N\) is 16 and num_generations \(M\) is 16",
        ),
        (
            {"max_tool_calling_iterations": 0},
            "max_tool_calling_iterations is 0, but .* Set initial_rollouts: 16, which is GRPO",
        ),
        ({"clip_keeps_gradient": "off"}, "clip_keeps_gradient is 'off'; expected true or false"),
        ({"tool_cache": None}, "tool_cache is None; expected true or false"),
        ({"branch_rule": "treshold"}, "branch_rule is 'treshold'; expected one of .*'ranked'.*'threshold'"),
        ({"rollout_schedule": "eager"}, r"rollout_schedule is 'eager'; expected one of \['overlap', 'rounds'\]"),
        ({"advantage_attribution": "mean"}, r"advantage_attribution is 'mean'; expected one of .*'hard'.*'soft'"),
        ({"advantage_attribution": "once"}, r"advantage_attribution is 'once'; expected one of .*'hard'.*'soft'"),
        ({"shared_prefix_weight": "two"}, r"shared_prefix_weight is 'two'; expected one of \['per_leaf', 'once'\]"),
        ({"max_tool_calling_iterations": -1}, "max_tool_calling_iterations is -1; expected an integer of at least 0"),
        ({"max_tool_result_tokens": 15}, "max_tool_result_tokens is 15; expected an integer of at least 16 tokens"),
        ({"tool_protocol": "xml"}, r"tool_protocol is 'xml'; expected one of \['tags', 'chat_template'\]"),
        ({"max_completion_length": 0}, "max_completion_length is 0; expected an integer of at least 1"),
        ({"tool_concurrency": 0}, "tool_concurrency is 0; expected an integer of at least 1"),
        ({"tool_concurrency_per_tool": {"search": 0}}, "tool_concurrency_per_tool is .* integers of at least 1"),
        (
            {"tool_concurrency_per_tool": "search"},
            "tool_concurrency_per_tool is 'search'; expected a mapping of tools to integers",
        ),
        ({"tool_timeout_s": 0.0}, "tool_timeout_s is 0.0; expected a number of more than 0 seconds"),
        ({"tool_timeout_s": float("nan")}, "tool_timeout_s is nan; expected a number of more than 0 seconds"),
        ({"use_vllm": True, "vllm_mode": "remote"}, "vllm_mode is 'remote'; expected 'colocate' or 'server'"),
        ({"vllm_server_urls": ["http://a"]}, "vllm_server_urls is set, .* Set use_vllm: true and vllm_mode: server"),
        (SERVER | {"vllm_server_urls": []}, "expected at least one URL, without duplicates"),
        (SERVER | {"vllm_server_urls": ["http://a", "http://a"]}, "expected at least one URL, without duplicates"),
        (SERVER | {"vllm_server_urls": ["http://a", "http://a/v1/"]}, "expected at least one URL, without duplicates"),
        (SERVER | {"vllm_server_urls": ["http://a"], "vllm_server_base_url": "http://b"}, "are both set"),
        ({"save_on_each_node": True}, "save_on_each_node is set, but a checkpoint has files of every process"),
        ({"weight_sync_dir": "/shared"}, "weight_sync_dir is set, but weight_sync is 'nccl', which writes no files"),
        ({"weight_sync": "post"}, r"weight_sync is 'post'; expected one of \['nccl', 'disk'\]"),
        ({"weight_sync_tolerance": 0.0}, "weight_sync_tolerance is 0.0; expected a number of more than 0 nats"),
        ({"vllm_request_timeout_s": -1.0}, "vllm_request_timeout_s is -1.0; expected a number of more than 0 seconds"),
        ({"entropy_top_logprobs": 0}, "entropy_top_logprobs is 0; expected an integer of at least 1"),
        (
            SERVER | {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
            "loss_type is 'vespo' but vllm_importance_sampling_mode is 'sequence_mask'",
        ),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs sets num_beams, .* does not support. Remove it"),
        ({"generation_kwargs": {"top_p": 0.9}}, "generation_kwargs sets top_p, .* Set top_p to 0.9 instead"),
        (
            SERVER | {"generation_kwargs": {"min_tokens": 2}},
            "sets min_tokens, which is not passed on to vLLM",
        ),
        (
            {"loss_type": "dr_grpo", "max_completion_length": None},
            "loss_type is 'dr_grpo', which divides .* but max_completion_length is None. Set it to a number of tokens",
        ),
        ({"reward_weights": 1.0}, r"reward_weights is 1\.0; expected a list of finite numbers"),
        ({"reward_weights": [0.5, float("nan")]}, r"reward_weights is \[0\.5, nan\]; expected a list of finite"),
        ({"reward_weights": ["a"]}, r"reward_weights is \['a'\]; expected"),
        ({"scale_rewards": "maybe"}, "scale_rewards is 'maybe'; expected 'group', 'batch' or 'none'"),
        ({"top_k": -5}, "top_k is -5; expected an integer of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5; expected an integer"),
        ({"min_p": 2}, r"min_p is 2; expected a number in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected a number of more than 0"),
        ({"top_entropy_quantile": -1}, r"top_entropy_quantile is -1; expected a number in \[0, 1\]"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1; expected a number of more than 0"),
        ({"cache_implementation": "static"}, "cache_implementation is set, .* Unset it"),
        ({"use_transformers_paged": True}, "use_transformers_paged is set, .* Unset it"),
        (
            {"transformers_continuous_batching_config": {"block_size": 16}},
            "transformers_continuous_batching_config is set, .* Unset it",
        ),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "load_best_model_at_end is set, but eval_strategy is 'no', so no checkpoint is the best one. Set",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "reward"},
            "save_strategy: best is set, but eval_strategy is 'no'",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),  # TRL's own objection
    ],
)
def test_a_bad_value_is_an_error_that_names_it_and_the_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ({"per_device_train_batch_size": 24}, 24),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}, 24),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 6}, 24),
        ({"per_device_train_batch_size": 8}, 8),
    ],
)
def test_groups_must_fill_the_ranks_generation_batch(settings, batch):
    with pytest.raises(ConfigError, match=rf"num_generations \(16\) does not divide .* \({batch} = .* multiple of 16"):
        config(**settings)


def test_a_group_must_not_span_ranks_even_if_the_global_batch_contains_whole_groups(monkeypatch):
    monkeypatch.setattr(ARPOConfig, "world_size", 2)
    # 2 ranks × 8: one group of 16 over both
    with pytest.raises(ConfigError, match="a tree cannot span ranks"):
        config(per_device_train_batch_size=8, generation_batch_size=16)


def test_an_evaluation_batch_is_any_batch_that_trl_accepts(monkeypatch):
    settings = {"num_generations": 4, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ConfigError, match=r"global eval batch size \(6 \* 1\) must be divisible .* \(4\)"):
        config(per_device_eval_batch_size=6, **settings)
    assert config(per_device_eval_batch_size=6, num_generations_eval=3, **settings).num_generations_eval == 3
    monkeypatch.setattr(ARPOConfig, "world_size", 2)
    assert (
        config(per_device_eval_batch_size=6, **settings).per_device_eval_batch_size == 6
    )  # three groups on two ranks


def test_a_misspelt_yaml_key_is_an_error_that_names_the_nearest_setting(tmp_path):
    file = written(tmp_path, branch_threshhold=0.6)
    with pytest.raises(ConfigError, match="no setting 'branch_threshhold'; did you mean 'branch_threshold'"):
        parse("train", file)


def test_a_misspelt_key_is_named_before_the_effect_of_its_absence(tmp_path):
    # 16 leaves, the default, do not divide 4
    file = written(tmp_path, num_generation=4, per_device_train_batch_size=4)
    with pytest.raises(ConfigError, match="no setting 'num_generation'; did you mean 'num_generations'"):
        parse("train", file)


def test_an_unknown_yaml_key_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no setting 'zzzzzz'. Remove it"):
        parse("train", written(tmp_path, zzzzzz=1))


def test_a_misspelt_flag_is_an_error_too(tmp_path):
    with pytest.raises(ConfigError, match="no setting 'branch_rle'; did you mean 'branch_rule'"):
        parse("train", written(tmp_path), "--branch_rle", "random")


def test_a_word_that_belongs_to_no_flag_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"'random' does not belong to a setting; expected --name value"):
        parse("train", written(tmp_path), "random")


def test_a_bad_value_in_yaml_is_the_configs_own_error(tmp_path):
    with pytest.raises(ConfigError, match=r"initial_rollouts \(N\) is 99"):
        parse("train", written(tmp_path, initial_rollouts=99))


@pytest.mark.parametrize("text", ["- a list", "branch_rule: [unclosed"])
def test_a_file_without_a_mapping_is_an_error(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"The --config file .*(contains a list; expected|while parsing)"):
        parse("train", file)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: .*nowhere\.yaml"):
        parse("train", tmp_path / "nowhere.yaml")


def test_places_per_tool_are_a_mapping_in_yaml_and_json_in_a_flag(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("tool_concurrency_per_tool: {search: 8}\nuse_cpu: true\noutput_dir: out\n")
    (from_file,) = parse_settings([ARPOConfig], ["--config", str(file)])
    (from_flag,) = parse_settings(
        [ARPOConfig], ["--config", str(file), "--tool_concurrency_per_tool", '{"python": 2}']
    )
    assert (from_file.tool_places, from_flag.tool_places) == ({"search": 8}, {"python": 2})


@pytest.mark.parametrize("make", [ARPOConfig, script("sft").ColdStartConfig])
def test_without_an_accelerator_the_cpu_is_used_and_one_rank_logs_it(make, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert make("unused").use_cpu and make("unused").bf16
    assert caplog.text.count("No accelerator was found: use_cpu is set to true") == 2
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    assert make("unused").use_cpu and make("unused", use_cpu=True).use_cpu
    assert caplog.text == ""


@pytest.mark.parametrize("make", [ARPOConfig, script("sft").ColdStartConfig])
def test_with_an_accelerator_the_cpu_is_not_taken(make, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert not make("unused", bf16=False).use_cpu
    assert caplog.text == ""


def test_flags_win_over_the_file(tmp_path):
    file = written(tmp_path, branch_rule="random", branch_threshold=0.6)
    _, _, made, _ = parse("train", file, "--branch_rule", "ranked")
    assert (made.branch_rule, made.branch_threshold) == ("ranked", 0.6)


@pytest.mark.parametrize("file", [file for file in CONFIGS if "vllm" in file.stem], ids=lambda file: file.name)
def test_a_published_run_has_the_published_batch(file):
    """128 prompts a step in mini-batches of 16, for the 14 B model 64 in 8, on 8 GPUs, or 4 beside servers."""
    *_, made, model = parse("train", file)
    prompts, mini_batch = (64, 8) if "14b" in file.stem else (128, 16)
    ranks = 4 if "lora" in file.stem else 8
    leaves = made.num_generations
    assert ranks * made.per_device_train_batch_size * made.steps_per_generation == prompts * leaves
    assert ranks * made.per_device_train_batch_size * made.gradient_accumulation_steps == mini_batch * leaves
    assert (leaves, made.initial_rollouts) == ((12, 6) if "14b" in file.stem else (16, 8))
    assert made.use_vllm and model.use_peft == ("lora" in file.stem)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_parses(file):
    parse_shipped(file, file)


@pytest.mark.parametrize("file", [file for file in CONFIGS if "sft" not in file.stem], ids=lambda file: file.name)
def test_the_settings_that_a_run_writes_down_are_its_own_again(file, tmp_path):
    groups = parse_shipped(file, file)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(describe(*groups)))
    for first, second in zip(groups, parse_shipped(file, tmp_path / "again.yaml"), strict=True):
        first, second = dataclasses.asdict(first), dataclasses.asdict(second)
        assert {name: value for name, value in first.items() if second[name] != value} == {}


def test_settings_of_generate_that_change_nothing_are_accepted():
    kwargs = {"do_sample": True, "use_cache": True, "renormalize_logits": True, "num_beams": 1}
    assert ARPOConfig("unused", use_cpu=True, generation_kwargs=kwargs).generation_kwargs == kwargs
    with pytest.raises(ConfigError, match="generation_kwargs sets do_sample, which the tree sampler does not support"):
        ARPOConfig("unused", use_cpu=True, generation_kwargs={"do_sample": False})


def test_the_qlora_configuration_quantizes_to_4_bits_under_an_adapter():
    *_, model = parse("train", ROOT / "configs/reasoning_qwen2.5_7b_qlora.yaml")
    quantization = get_quantization_config(model)
    assert quantization.load_in_4bit and quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_compute_dtype is torch.bfloat16
    assert get_peft_config(model).r == 32


@pytest.mark.parametrize("file", [file for file in CONFIGS if "lora" in file.stem], ids=lambda file: file.name)
def test_shipped_adapters_have_no_dropout_which_would_keep_prefixes_from_being_shared(file):
    *_, model = parse("train", file)
    assert model.use_peft and model.lora_dropout == 0.0


# The Hub, and secrets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "flag"])
def test_a_token_is_rejected_in_every_position_and_not_quoted(tmp_path, capsys, place):
    file = written(tmp_path, **({"hub_token": "hf_planted0123456789"} if place == "file" else {}))
    flags = ("--hub_token", "hf_planted0123456789") if place == "flag" else ()
    with pytest.raises(ConfigError, match=r"hub_token is set, .* set the environment variable HF_TOKEN") as refused:
        parse("train", file, *flags)
    assert "planted" not in str(refused.value) + "".join(capsys.readouterr())


@pytest.mark.parametrize("token", ["hf_planted0123456789", True])
def test_a_token_in_model_init_kwargs_is_rejected_unless_it_names_the_saved_one(tmp_path, token):
    given = {"model_init_kwargs": {"token": token}}
    if token is True:
        assert ARPOConfig(str(tmp_path), use_cpu=True, **given).model_init_kwargs == {"token": True}
        return
    with pytest.raises(ConfigError, match=r"the token of model_init_kwargs is set, .* HF_TOKEN") as refused:
        ARPOConfig(str(tmp_path), use_cpu=True, **given)
    assert "planted" not in str(refused.value)


def test_a_trajectories_dataset_wants_a_push(tmp_path):
    with pytest.raises(ConfigError, match="hub_trajectories_id is set without push_to_hub"):
        parse("train", written(tmp_path, hub_trajectories_id="me/trees"))


@pytest.mark.parametrize(
    "settings",
    [
        {"vllm_server_base_url": "http://me:planted@host:8000"},
        {"vllm_server_base_url": "http://host:8000?api_key=planted"},
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_urls": ["http://host:1", "http://planted@host:2"]},
    ],
)
def test_an_address_with_a_key_is_refused_and_not_quoted(tmp_path, settings):
    with pytest.raises(ConfigError, match=r"without user name, password or query\. .* VLLM_API_KEY") as refused:
        parse("train", written(tmp_path, **settings))
    assert "planted" not in str(refused.value)


def test_servers_with_a_key_are_refused_with_trls_transfer_which_sends_none(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    with pytest.raises(ConfigError, match=r"weight_sync is 'nccl', but VLLM_API_KEY is set.* weight_sync: disk"):
        config(**SERVER)
    assert config(**SERVER, weight_sync="disk").server_urls
    assert config(use_vllm=True, vllm_mode="colocate").weight_sync == "nccl"  # and not used
    monkeypatch.delenv("VLLM_API_KEY")
    assert config(**SERVER).weight_sync == "nccl"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no such file"), ("{", "line 1"), ("[]", "expected dict")]
)
def test_a_deepspeed_file_that_is_no_config_is_named(tmp_path, content, message):
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^deepspeed is '{file}', .*{message}"):
        config(deepspeed=str(file))
