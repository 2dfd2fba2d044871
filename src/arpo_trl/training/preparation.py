"""A trainer's model is prepared once: by the first evaluation or by the training, whichever comes first.

accelerate does not wrap a model again that it has prepared for an evaluation. Without `prepare_again`, an evaluation
before the training leaves the model without DDP, and each rank trains alone, with its own gradients.
"""

from __future__ import annotations

from transformers import Trainer

from arpo_trl.errors import ConfigError

_WAY_OUT = "To evaluate before the training, set eval_on_start to true, or call EvaluationCallback.evaluate."


def check_evaluable(trainer: Trainer) -> None:
    """Check that an evaluation before the training is possible.

    Raises:
        ConfigError: FSDP, or ZeRO with whole parameters, needs the training's optimizer first.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if trainer.accelerator._models or not (trainer.is_fsdp_enabled or (plugin and plugin.zero_stage != 3)):
        return
    way = "FSDP" if plugin is None else f"ZeRO-{plugin.zero_stage}"
    raise ConfigError(f"evaluate() was called before train(), which {way} does not support. {_WAY_OUT}")


def prepare_again(trainer: Trainer) -> None:
    """Let the training prepare a model that an evaluation has prepared.

    Raises:
        ConfigError: DeepSpeed has an engine for it, which cannot be set up again.
    """
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None:
        raise ConfigError(
            "This trainer has already trained or evaluated, and its DeepSpeed engine cannot be set up again. Create a "
            f"new trainer. {_WAY_OUT}"
        )
    model = trainer.model
    if trainer.is_fsdp_enabled or trainer.accelerator.num_processes == 1:
        return
    if model.__dict__.pop("_is_accelerate_prepared", False):  # what DDP wraps has no such mark
        if (forward := model.__dict__.pop("_original_forward", None)) is not None:  # set by mixed precision
            model.forward = forward
        trainer.model_wrapped = model
