"""accelerate and DeepSpeed accept every setting of each file in accelerate_configs."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

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
CHOSEN = ("compute_environment", "distributed_type")
"""What accelerate reads from the file to choose the launcher; everything else becomes an argument of it."""


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
    written = yaml.safe_load(file.read_text("utf-8"))
    top = {name: value for name, value in written.items() if not isinstance(value, dict) and name not in CHOSEN}
    for name, value in {**top, **config.deepspeed_config, **config.fsdp_config}.items():
        assert getattr(arguments, name) == value, name


def test_several_nodes_need_neither_ssh_nor_a_hostfile():
    """By default DeepSpeed would start the other nodes itself, over pdsh; here each node starts its own processes."""
    file = next(file for file in FILES if file.stem == "multi_node_zero3")
    flags = ["--config_file", str(file), "--main_process_ip", "trainer0", "--machine_rank", "1", "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    arguments.deepspeed_fields_from_accelerate_config = ""  # set by the launcher on its way
    command, _ = prepare_deepspeed_cmd_env(arguments)
    assert command is None
    assert [int(arguments.nnodes), int(arguments.node_rank), int(arguments.nproc_per_node)] == [2, 1, 8]
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "trainer0:29500")
