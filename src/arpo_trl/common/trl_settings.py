"""Settings of TRL and transformers that are errors here, or mean something else than their own texts say.

Pure: no torch, no TRL, no engine.
"""

from __future__ import annotations

NOT_SAMPLED_WITH = (
    "cache_implementation",
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "use_transformers_paged",
    "vllm_structured_outputs_regex",
)
"""Settings of TRL's sampling. The tree sampler does not read them."""

OF_TRLS_ENCODING = frozenset(
    "packing packing_strategy eval_packing truncation_mode dataset_text_field dataset_kwargs dataset_num_proc "
    "completion_only_loss assistant_only_loss".split()
)
"""Settings of TRL's encoding of a dataset. The cold start encodes the demonstrations itself."""

MEANINGS = {
    **dict.fromkeys(NOT_SAMPLED_WITH, "Not supported by `train.py`: an error."),
    **dict.fromkeys(OF_TRLS_ENCODING, "Not used by `sft.py`, which encodes the demonstrations itself: an error."),
    "max_length": "Maximum length of a demonstration, in tokens. Longer ones are left out, not truncated. None: no "
    "limit.",
    "resume_from_checkpoint": "`true`: the last checkpoint in `output_dir`; without one the run starts from scratch. "
    "Or the path of a checkpoint.",
    "vllm_server_timeout": "Time for which a vLLM server may be unreachable, in seconds. After it the run stops with "
    "an `EngineError`.",
    "hub_token": "An error: set the environment variable `HF_TOKEN`, or log in with `hf auth login`.",
    "ignore_data_skip": "An error when `train.py` resumes a run.",
    "save_on_each_node": "Whether `sft.py` saves on each node. An error in `train.py`, where nodes share "
    "`output_dir`.",
    "train_sampling_strategy": "Sampler for `sft.py`. Not read by `train.py`, where `shuffle_dataset` sets the order.",
    "data_seed": "Random seed of the sampler of `sft.py`. Not read by `train.py`, which shuffles by `seed`.",
}
"""Setting → what it means here, in place of its own text in `--help` and in the documentation."""
