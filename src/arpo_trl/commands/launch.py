"""Starts a training program through accelerate, as `accelerate launch` does, from any folder.

    launch("arpo_trl.scripts.train", ["--config", "quickstart", "--num_processes", "4", "--seed", "1"])

`--accelerate NAME` selects a shipped accelerate configuration. The flags in `LAUNCH_FLAGS` are passed to accelerate,
all others to the program.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from arpo_trl.command_line import CONFIG_TWICE, report_errors
from arpo_trl.common.flags import NEAR, in_words, nearest
from arpo_trl.common.shipped import ACCELERATE_CONFIGS, CONFIGS, file_or_shipped, shipped_file, shipped_names
from arpo_trl.common.user_files import user_path
from arpo_trl.common.waiting import say_loading
from arpo_trl.errors import ConfigError

LAUNCH_FLAGS = {
    "config_file": "your own accelerate configuration, instead of --accelerate",
    "num_processes": "number of processes on all nodes together: one for each GPU",
    "num_machines": "nodes",
    "machine_rank": "number of this node, counted from 0",
    "main_process_ip": "address of node 0",
    "main_process_port": "port of node 0",
    "gpu_ids": "the GPUs to use, such as 0,1",
    "mixed_precision": "no, fp16 or bf16",
}
"""Flag of `accelerate launch` → its meaning. A --config_file sets all other options of accelerate."""

OWN_FLAGS = ("accelerate", "config", *LAUNCH_FLAGS)
"""The flags that are not settings. No setting's name is similar to one of these, or a prefix of it."""

OF_SHOP = "quickstart_shop"
"""The shipped configuration that is for neither `train` nor `sft`, but for a program of its own."""

DEFAULT = "single"
MOST_THREADS = 4
"""A small model on a CPU does not get faster with more threads. OMP_NUM_THREADS overrides it."""


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments for `accelerate launch` and for the program, with the names of shipped files resolved.

    Raises:
        ConfigError: A named file does not exist, a flag is misspelt or lacks its value, --config is given twice, or
            --accelerate and --config_file are both set.
    """
    for_accelerate: list[str] = []
    for_program: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or name not in OWN_FLAGS:
            if word.startswith("--") and (near := nearest(name, OWN_FLAGS, cutoff=NEAR)):
                raise ConfigError(f"There is no flag --{name}; did you mean --{near}?")
            for_program.append(word)
            continue
        if equals:
            value = word.partition("=")[2]
        elif rest:
            value = rest.pop(0)
        else:
            raise ConfigError(f"--{name} is set without a value.")
        if name == "config":
            if "--config" in for_program:
                raise ConfigError(CONFIG_TWICE)
            for_program += ["--config", str(file_or_shipped(CONFIGS, value))]
        elif name == "accelerate":
            for_accelerate += ["--config_file", str(shipped_file(ACCELERATE_CONFIGS, value))]
        else:
            for_accelerate += [f"--{name}", str(user_path(value, f"--{name}")) if name == "config_file" else value]
    if for_accelerate.count("--config_file") > 1:
        raise ConfigError("--accelerate and --config_file are both set, or set twice; expected one configuration.")
    return for_accelerate, for_program


def launch(program: str, words: Sequence[str]) -> int:
    """Runs `program`, a module or a path that ends with .py, under accelerate. Returns its exit status.

    Without --accelerate and --config_file, the user's default configuration of accelerate is used if there is one,
    and the shipped "single" otherwise.

    Raises:
        ConfigError: See `split_words`. Or accelerate rejects the value of a flag, its configuration cannot be read, or
            it fails. Or the configuration starts one process, and --num_processes or --num_machines is more than 1,
            which accelerate would ignore. Or the nodes cannot form one run, or --config is the shop's, which has a
            program of its own.
    """
    for_accelerate, for_program = split_words(words)
    if program.startswith("arpo_trl.scripts.") and "--config" in for_program:
        _refuse_of_shop(for_program[for_program.index("--config") + 1])
    say_loading(f"arpo-trl {os.path.basename(program).removesuffix('.py').rpartition('.')[2]}")
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import DistributedType
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "--config_file" not in for_accelerate and not os.path.isfile(default_config_file):
        for_accelerate = ["--config_file", str(shipped_file(ACCELERATE_CONFIGS, DEFAULT)), *for_accelerate]
        # By default accelerate gives a process one thread.
        os.environ.setdefault("OMP_NUM_THREADS", str(min(MOST_THREADS, os.cpu_count() or 1)))
    kind = [] if program.endswith(".py") else ["--module"]
    parser = launch_command_parser()
    parser.error = _refuse
    arguments = parser.parse_args([*for_accelerate, *kind, program, *for_program])
    file = arguments.config_file or default_config_file
    try:
        configuration = load_config_from_file(arguments.config_file)
    except Exception as error:  # accelerate raises many kinds for a file that is missing, broken or of another version
        raise ConfigError(
            f"The accelerate configuration {file} cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Correct it, or choose a shipped one with --accelerate "
            f"{', '.join(shipped_names(ACCELERATE_CONFIGS))}."
        ) from error
    for name in ("num_processes", "num_machines"):
        number = getattr(arguments, name) or 1
        if number > 1 and configuration.distributed_type == DistributedType.NO:
            raise ConfigError(
                f"--{name} is {number}, but the configuration {file} starts one process (distributed_type: NO). "
                "Choose one for several processes, such as --accelerate ddp."
            )
    _check_nodes(arguments, configuration)
    _leave_signals_to_the_program()
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as ended:
        return _status(ended.returncode)
    except ChildFailedError as failed:  # raised by torchrun
        return _status(failed.get_first_failure()[1].exitcode)
    except SignalException as stopped:  # also by torchrun, once the program has ended on the signal
        return 128 + stopped.sigval
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:  # of accelerate and torchrun
        raise ConfigError(
            f"accelerate cannot run {program} with the configuration {file} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Correct the configuration or the flags."
        ) from error
    return 0


def _check_nodes(arguments: Namespace, configuration: Any) -> None:
    """Checks the number of processes, and that the nodes can form one run, for the flags and a configuration.

    Raises:
        ConfigError: A node would start no or other processes than expected, or would not find the others.
    """
    from accelerate.utils import DistributedType

    def value(name: str) -> Any:
        flag = getattr(arguments, name)
        return getattr(configuration, name, None) if flag is None else flag

    processes, machines, rank = value("num_processes"), value("num_machines") or 1, value("machine_rank") or 0
    if processes is not None and processes < 1:
        raise ConfigError(f"num_processes is {processes}; expected at least 1. Set --num_processes.")
    if machines <= 1:
        return
    told = f"num_machines is {machines}"
    is_deepspeed = configuration.distributed_type == DistributedType.DEEPSPEED
    if is_deepspeed and configuration.deepspeed_config.get("deepspeed_multinode_launcher") != "standard":
        if shutil.which("deepspeed") is None:
            raise ConfigError(
                f"{told}, and DeepSpeed is to start the other nodes itself, but the program deepspeed is not on the "
                "path. Start the command on each node, with --accelerate multi_node_zero3 (or "
                "deepspeed_multinode_launcher: standard)."
            )
        return
    if value("main_process_ip") is None:
        raise ConfigError(
            f"{told}, but main_process_ip is not set, so that the nodes would not find each other. Set "
            "--main_process_ip to the address of node 0, on each node."
        )
    if not 0 <= rank < machines:
        raise ConfigError(
            f"{told} and machine_rank is {rank}; expected the number of this node, from 0 to {machines - 1}. Set "
            "--machine_rank."
        )
    if processes is not None and processes % machines:
        raise ConfigError(
            f"{told}, but num_processes is {processes}: the number of processes on all nodes together, equally many "
            "on each. Set --num_processes to a multiple of the number of nodes."
        )


def _refuse_of_shop(config: str) -> None:
    file = shipped_file(CONFIGS, OF_SHOP)
    if file.samefile(config):
        raise ConfigError(
            f"The configuration {OF_SHOP} is for a program of its own, with an environment. Run arpo-trl quickstart "
            "--task shop, which makes its data and its model, and then accelerate launch -m "
            f"arpo_trl.quickstart.shop.train --config {shlex.quote(str(file))}."
        )


def _refuse(message: str) -> NoReturn:
    """Replaces the `error` of accelerate's parser, which would print all of accelerate's flags."""
    raise ConfigError(re.sub(r"^argument (--\w+)[^:]*", r"\1", in_words(message)) + ".")


def _leave_signals_to_the_program() -> None:
    """The program writes a checkpoint on Ctrl-C, which a terminal also sends to it, and on signals that may be sent to
    this process alone. This process waits for it. torchrun replaces the handler of SIGTERM with its own."""
    import psutil

    def hand_on(number: int, _: object) -> None:
        if number == signal.SIGINT and _is_in_foreground():
            return
        children = psutil.Process().children()
        for child in children:
            with suppress(psutil.Error):  # it has just ended
                child.send_signal(number)
        if not children:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, hand_on)
    signal.signal(signal.SIGTERM, hand_on)


def _is_in_foreground() -> bool:
    """Whether Ctrl-C in a terminal reaches this process, and so also the processes that it has started."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _status(code: int) -> int:
    """A shell's exit status for the exit code of a process, which is negative after a signal."""
    return code if code >= 0 else 128 - code


def _program(name: str, words: Sequence[str]) -> int:
    from arpo_trl.commands.training_help import print_help

    return 0 if print_help(name, words) else launch(f"arpo_trl.scripts.{name}", words)


train, sft = partial(_program, "train"), partial(_program, "sft")


def quickstart(words: Sequence[str]) -> int:
    """Runs the quickstart in this process and returns its exit status."""
    from arpo_trl.quickstart.__main__ import run

    run(words)
    return 0


@report_errors
def _launch() -> int:
    return launch(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":  # the quickstart's stages
    raise SystemExit(_launch())
