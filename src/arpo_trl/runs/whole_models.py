"""`WholeModels`: a trainer whose saved models are whole, whatever the launch says of saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.fsdp import StateDictType
from transformers import Trainer

from arpo_trl.common.adapters import check_saved
from arpo_trl.common.files import share_weights


class WholeModels(Trainer):
    """A `Trainer` that gathers sharded weights whenever it saves a model. A mixin, independent of the others.

    With accelerate's defaults a run would end without a model: under FSDP with sharded state dicts `Trainer` saves
    only the shards of checkpoints, and under ZeRO-3 without `zero3_save_16bit_model` only DeepSpeed's own files. The
    shards from which a run resumes are saved as configured. Saved weights are as readable as their folder. An adapter
    without weights is an error.
    """

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            super().save_model(output_dir, _internal_call)
        else:
            configured, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
            try:
                super().save_model(output_dir, _internal_call)
            finally:
                plugin.state_dict_type = configured
        if self.args.should_save:
            share_weights(Path(output_dir or self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        check_saved(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), state_dict)
        super()._save(output_dir, state_dict)
