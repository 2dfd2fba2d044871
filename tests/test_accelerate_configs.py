"""Each file of accelerate_configs is one that accelerate, and DeepSpeed, understand in full."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FILES = sorted((Path(__file__).parent.parent / "accelerate_configs").glob("*.yaml"))
KINDS = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "zero3_offload": DistributedType.DEEPSPEED,
    "multi_node_zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
}


def loaded(file: Path) -> ClusterConfig:
    """By accelerate's own loader, which raises on unknown keys at the top."""
    return load_config_from_file(str(file))


def test_there_is_a_file_for_each_way():
    assert {file.stem: loaded(file).distributed_type for file in FILES} == KINDS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_setting_is_one_of_accelerate_launch(file):
    """accelerate copies the nested settings to its arguments unseen: one that is none of them would do nothing."""
    config = loaded(file)
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.deepspeed_config, *config.fsdp_config} <= set(known)
    parser = launch_command_parser()
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "train.py"]))
    assert arguments.num_processes == config.num_processes
    assert arguments.use_deepspeed == (config.distributed_type == DistributedType.DEEPSPEED)
    assert arguments.use_fsdp == (config.distributed_type == DistributedType.FSDP)
    for name, value in {**config.deepspeed_config, **config.fsdp_config}.items():
        assert getattr(arguments, name) == value
