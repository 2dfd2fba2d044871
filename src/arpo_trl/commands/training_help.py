"""The help of `arpo-trl train` and `arpo-trl sft`. It is read from a file, since importing the settings takes seconds.

After a change of a setting, `python -m arpo_trl.commands.training_help` writes the file again. A test compares them.
`--help-all` shows every setting, TRL's included, from the settings themselves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from arpo_trl.commands.launch import LAUNCH_FLAGS, OF_SHOP
from arpo_trl.common.flags import CommandParser
from arpo_trl.common.settings import default_of, help_of
from arpo_trl.common.shipped import ACCELERATE_CONFIGS, CONFIGS, shipped_names

HELP_FILE = Path(__file__).with_name("settings.json")

PURPOSE = {
    "train": "Trains a tool-using policy. Settings come from the YAML file of --config and from flags. Flags take "
    "precedence.",
    "sft": "Trains a model on demonstrations. Settings come from the YAML file of --config and from flags. Flags take "
    "precedence.",
}
OFTEN_SET = (
    *("model_name_or_path", "output_dir", "max_steps", "num_train_epochs", "learning_rate", "max_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16", "use_cpu"),
    *("temperature", "beta", "use_vllm", "vllm_mode", "use_peft", "lora_r"),
    *("save_steps", "resume_from_checkpoint", "logging_steps", "report_to", "seed"),
)  # fmt: skip
"""Settings of transformers, TRL and PEFT that the short help shows."""

Setting = dict[str, str]
"""The name, help and default of a setting, and the values that it accepts."""


def collect() -> dict[str, dict[str, list[Setting]]]:
    """Program → title of a group → its settings, from the dataclasses that define them. Imports TRL."""
    from trl import GRPOConfig, ModelConfig, SFTConfig

    from arpo_trl.common.settings import ToolLimits
    from arpo_trl.config import ARPOConfig
    from arpo_trl.scripts import sft, train
    from arpo_trl.tools.builtin import ToolArguments

    limits = [field.name for field in dataclasses.fields(ToolLimits)]
    changed = [name for name in ARPOConfig.__annotations__ if not name.startswith("_") and name not in OFTEN_SET]
    own = [name for name in changed if name not in limits]
    return {
        "train": {
            "data and scoring": _settings(train.TrainArguments),
            "tools": _settings(ToolArguments) + _settings(ARPOConfig, limits),
            "ARPO": _settings(ARPOConfig, own),
            "often set, of TRL": _settings(ModelConfig, OFTEN_SET) + _settings(ARPOConfig, OFTEN_SET, GRPOConfig),
        },
        "sft": {
            "data": _settings(sft.ColdStartArguments),
            "often set, of TRL": _settings(ModelConfig, OFTEN_SET)
            + _settings(sft.ColdStartConfig, OFTEN_SET, SFTConfig),
        },
    }  # fmt: skip


def _settings(kind: Any, names: Iterable[str] | None = None, described_in: Any = None) -> list[Setting]:
    """The fields of the dataclass `kind`, or only the ones in `names`. `described_in` contains help texts that `kind`
    lacks."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    elsewhere = {field.name: field for field in dataclasses.fields(described_in or kind)}
    found = []
    for name in fields if names is None else (name for name in names if name in fields):
        field = fields[name]
        text = help_of(field) or help_of(elsewhere[name])
        values = str(field.metadata.get("metavar", ""))
        found.append({"name": name, "help": text, "values": values, "default": _default(field)})
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    """The default as text, empty without one."""
    value = default_of(field)
    if value is dataclasses.MISSING or value is None or value == "" or value == [] or value == {}:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.value if isinstance(value, Enum) else value)


def as_json(settings: dict[str, dict[str, list[Setting]]]) -> str:
    return json.dumps(settings, indent=1, ensure_ascii=False) + "\n"


def print_help(program: str, words: Sequence[str]) -> bool:
    """Prints the help if `words` request it. Returns whether they do."""
    if "--help-all" in words:
        subprocess.run([sys.executable, "-m", f"arpo_trl.scripts.{program}", "--help"], check=False)
        return True
    if not words or {"-h", "--help"} & set(words):
        _parser(program).print_help()
        return True
    return False


def _parser(program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"arpo-trl {program}",
        usage=f"arpo-trl {program} --config NAME_OR_FILE [--accelerate NAME] [--SETTING VALUE …]",
        description=PURPOSE[program],
        epilog="--help-all shows all settings. Exit status: 0 success, 2 an error in the settings or the data, 128 "
        "plus its number after a signal.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        add_help=False,
    )
    start = parser.add_argument_group("start")
    shipped = [name for name in shipped_names(CONFIGS) if name != OF_SHOP]
    names = [name for name in shipped if name.endswith("_sft") == (program == "sft")]
    start.add_argument(
        "--config", metavar="NAME_OR_FILE", help=f"YAML file of settings, or one of: {', '.join(names)}"
    )
    start.add_argument(
        "--accelerate",
        metavar="NAME",
        help=f"how to distribute: {', '.join(shipped_names(ACCELERATE_CONFIGS))} (default: single)",
    )
    for name, text in LAUNCH_FLAGS.items():
        start.add_argument(f"--{name}", metavar=name.split("_")[-1].upper(), help=text)
    groups: dict[str, list[Setting]] = json.loads(HELP_FILE.read_text("utf-8"))[program]
    for title, settings in groups.items():
        group = parser.add_argument_group(title)
        for setting in settings:
            default = f" (default: {setting['default']})" if setting["default"] else ""
            metavar = setting["values"] or setting["name"].split("_")[-1].upper()
            text = (setting["help"] + default).replace("%", "%%")
            group.add_argument(f"--{setting['name']}", metavar=metavar, help=text)
    return parser


if __name__ == "__main__":
    HELP_FILE.write_text(as_json(collect()), "utf-8")
