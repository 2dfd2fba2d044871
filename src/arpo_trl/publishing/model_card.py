"""Writes the documentation of a run into its folder: model card, training curves and settings.

    README.md              the card
    curves/*.png           the panels of `logs/curves.py`
    training_config.yaml   settings to repeat the run with `train.py --config`, without defaults and secrets
    evaluation.md          the last evaluation, if there was one

The card can be rewritten from the folder's files, for another repository or after a merge.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from arpo_trl.common.files import write_whole
from arpo_trl.common.run_files import ADAPTER_CONFIG, CURVES, EVALUATION, TRAINER_STATE, TRAINING_CONFIG
from arpo_trl.common.settings import default_of
from arpo_trl.common.user_files import expect, has_form_of_path, read_json, read_text, read_yaml
from arpo_trl.common.yaml_values import as_yaml
from arpo_trl.data.fields import SUFFIXES
from arpo_trl.logs.curves import PANELS, Panel, curves
from arpo_trl.logs.picture import picture, save
from arpo_trl.publishing.trained_settings import SAME_NAME, EvaluationSettings
from arpo_trl.visible import get_logger, with_texts, without_credentials

logger = get_logger(__name__)

TAGS = ("arpo-trl", "arpo", "trl", "reinforcement-learning")
TOOL_TAGS = ("agent", "tool-use")
VERSIONS = ("arpo-trl", "trl", "transformers", "peft", "torch", "datasets", "tokenizers")

SHOWN_SETTINGS = {
    "num_generations": "leaves per prompt (M)",
    "initial_rollouts": "paths from the root (N)",
    "branch_rule": "branch rule",
    "branch_rule_kwargs": "options of the branch rule",
    "entropy_probe_tokens": "tokens whose entropy is measured (k)",
    "branch_probability": "α",
    "entropy_weight": "β",
    "branch_threshold": "τ",
    "branches_per_fork": "extra turns per fork (Z)",
    "advantage_attribution": "credit of shared tokens",
    "shared_prefix_weight": "weight of shared tokens",
    "tools": "tools",
    "tool_protocol": "tool protocol",
    "max_tool_calling_iterations": "maximum tool results per path",
    "max_completion_length": "maximum tokens per path",
    "temperature": "temperature",
    "loss_type": "loss",
    "beta": "weight of the KL term",
    "learning_rate": "learning rate",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA α",
}
"""Setting → its label on the card."""

_SECRET_NAME = re.compile(r"(^|_)(token|key|secret|password)$", re.IGNORECASE)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The content of a model card. `settings` has the content of `training_config.yaml`. `history` is a trainer's log
    history, and `best_step` its `best_global_step`. `title` is that of the card; None: the name of the repository.

    Card(repo_id="me/policy", settings=describe(args), history=trainer.state.log_history,
         base_model="Qwen/Qwen3-0.6B", is_adapter=False).write(Path("output"))
    """

    repo_id: str
    settings: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    base_model: str | None
    is_adapter: bool
    best_step: int | None = None
    evaluation: str | None = None
    title: str | None = None
    extra_tags: Sequence[str] = field(default=())

    @classmethod
    def of(cls, folder: Path, repo_id: str) -> Card | None:
        """Reads the card of a finished run from its folder; None if the folder has no `training_config.yaml`.

        Raises:
            DataError: A file in the folder does not have the format that a run writes.
        """
        config, state = folder / TRAINING_CONFIG, folder / TRAINER_STATE
        if not config.is_file():
            return None
        adapter, evaluation = folder / ADAPTER_CONFIG, folder / EVALUATION
        settings = read_yaml(config) or {}
        expect(settings, dict, str(config))
        base = settings.get("model_name_or_path")
        if adapter.is_file():
            described = read_json(adapter)
            expect(described, {"base_model_name_or_path?": str | None}, str(adapter))
            named = described.get("base_model_name_or_path")
            if named and base != f"./{named}":  # a path by `as_path`, which peft's file does not show
                base = named
        history, best_step = [], None
        if state.is_file():
            said = read_json(state)
            expect(said, {"log_history": [dict], "best_global_step?": int | None}, str(state))
            history, best_step = said["log_history"], said.get("best_global_step")
        return cls(
            repo_id=repo_id,
            settings=settings,
            history=history,
            base_model=base,
            is_adapter=adapter.is_file(),
            best_step=best_step,
            evaluation=read_text(evaluation) if evaluation.is_file() else None,
        )

    def write(self, folder: Path) -> None:
        """Writes card, curves and settings to `folder`, each file atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw_curves(self.history, folder / CURVES)
        write_settings(folder, self.settings)
        if self.evaluation is not None:
            write_whole(folder / EVALUATION, self.evaluation.strip() + "\n")
        write_whole(folder / "README.md", self.text(drawn))

    def text(self, drawn: Iterable[Panel]) -> str:
        """The card in Markdown. `drawn`: the panels with a picture."""
        import jinja2
        from huggingface_hub import ModelCardData

        base = self.base_model if self.base_model is not None and is_hub_id(self.base_model) else None
        given = (self.settings.get(name) for name in ("dataset", "eval_dataset"))
        named = (name for names in given for name in (names if isinstance(names, list) else [names]))
        datasets = list(dict.fromkeys(name for name in named if isinstance(name, str) and is_hub_id(name)))
        uses_tools = self.settings.get("tools") != []
        data = ModelCardData(
            library_name="peft" if self.is_adapter else "transformers",
            pipeline_tag="text-generation",
            base_model=base,
            base_model_relation=None if base is None else "adapter" if self.is_adapter else "finetune",
            datasets=datasets or None,
            tags=list(dict.fromkeys([*TAGS, *(TOOL_TAGS if uses_tools else ()), *self.extra_tags])),
        )
        source = files("arpo_trl.publishing").joinpath("model_card.md.jinja").read_text("utf-8")
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(source).render(
            card_data=data.to_yaml(),
            name=self.title or self.repo_id.rpartition("/")[2],
            uses_tools=uses_tools,
            knows_tools="tools" not in EvaluationSettings.of(self.settings).left_out,
            repo_id=self.repo_id,
            base_model=base,
            is_adapter=self.is_adapter,
            datasets=datasets,
            steps=max((row["step"] for row in self.history if "reward" in row), default=0),
            best_step=self._loaded_step(),
            settings={label: _cell(value) for label, value in self._shown()},
            command=self._evaluation(base),
            curves={panel.name: panel.title for panel in drawn},
            folder=CURVES,
            evaluation=self.evaluation,
            versions={name: version(name) for name in VERSIONS},
            config=as_yaml(dict(self.settings)),
            fence=_fence,
        )

    def _loaded_step(self) -> int | None:
        """The step of the weights if training has ended and loaded the best ones; None: the last step."""
        has_ended = any("train_runtime" in row for row in self.history)  # no checkpoint has this row
        return self.best_step if has_ended and self.settings.get("load_best_model_at_end") else None

    def _evaluation(self, base: str | None) -> str:
        """The command that evaluates the model with the settings of its training."""
        model = [base or "BASE", "--adapter", self.repo_id] if self.is_adapter else [self.repo_id]
        command = shlex.join(["arpo-trl", "eval", "--model", *model, "--data", "questions.jsonl"])
        return f"{command} {EvaluationSettings.of(self.settings).flags()}".rstrip()

    def _shown(self) -> Iterable[tuple[str, Any]]:
        from arpo_trl.config import ARPOConfig

        defaults = {item.name: item.default for item in dataclasses.fields(ARPOConfig)}
        for name, label in SHOWN_SETTINGS.items():
            value = self.settings.get(name, defaults.get(name))
            if value not in (None, []) and (self.settings.get("use_peft") or not name.startswith("lora_")):
                yield label, value


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `training_config.yaml` with `settings` to `folder`."""
    write_whole(folder / TRAINING_CONFIG, as_yaml(dict(settings)))


def _fence(content: str) -> str:
    """A Markdown fence that is longer than every run of backticks in `content`."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))


def describe(*groups: Any) -> dict[str, Any]:
    """The settings in these dataclasses that differ from their defaults, as YAML values without secrets.

    Values whose names end in token, key, secret or password are omitted, and so are the arguments of MCP servers. User
    name, password and query are removed from URLs. A text for the model that would lose something is omitted, with a
    warning.
    """
    from arpo_trl.common.devices import has_accelerator  # slow to import

    described: dict[str, Any] = {}
    for group in groups:
        for item in dataclasses.fields(group):
            if not item.init:
                continue
            value = getattr(group, item.name)
            if value == default_of(item) or item.name in _DERIVED or _SECRET_NAME.search(item.name):
                continue
            if item.name == "use_cpu" and not has_accelerator():  # every run on this machine gets this value
                continue
            plain = _plain(value)
            if item.name in SAME_NAME and plain != with_texts(str, value):  # evaluation would use an altered text
                _say_omitted(item.name)
                continue
            described[item.name] = plain
    return described


@functools.cache  # once, not at each save
def _say_omitted(name: str) -> None:
    logger.warning(
        f"{name} contains a possible secret, such as an address with a query, so {TRAINING_CONFIG} does not contain "
        f"{name}. Set it yourself when you evaluate the model or repeat the run."
    )


_DERIVED = {
    "generation_batch_size", "model_init_kwargs", "accelerator_config", "router_mapping", "hub_model_id",
    "overwrite_output_dir", "resume_from_checkpoint",
}  # fmt: skip
"""Settings that follow from other settings, or that belong to one repository, machine or start of a run."""


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if not _SECRET_NAME.search(str(key)) and key != "args"
        }
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return without_credentials(str(value))


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a repository id, and no such path exists on this machine."""
    return _has_form_of_id(name) and not Path(name).exists()


def drop_paths(path: Path) -> None:
    """Removes paths of this machine from the metadata of a card that peft or TRL wrote. The Hub rejects them.

    A card whose metadata cannot be read stays as it is.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(path)
    except Exception:  # errors of YAML and of the Hub's own checks
        return
    data = card.data.to_dict()
    for name, prefix in (("base_model", ""), ("datasets", ""), ("tags", "base_model:")):
        given = data.get(name) or []
        named = given if isinstance(given, list) else [given]
        kept = [each for each in named if not (str(each).startswith(prefix) and _is_path(str(each).split(":")[-1]))]
        if kept != named:
            setattr(card.data, name, kept or None)
            write_whole(path, str(card))


def _is_path(name: str) -> bool:
    return has_form_of_path(name) or name.endswith(SUFFIXES) or Path(name).exists()


def as_path(name: Any) -> Any:
    """`name`, or a list of names, with ./ before each path on this machine that has the form of a repository id.

    So it is no repository id on another machine or in another folder either.
    """
    if isinstance(name, (list, tuple)):
        return [as_path(each) for each in name]
    return f"./{name}" if isinstance(name, str) and _has_form_of_id(name) and Path(name).exists() else name


def _has_form_of_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(SUFFIXES)


def draw_curves(history: Sequence[Mapping[str, Any]], folder: Path) -> list[Panel]:
    """Draws the panels for which `history` has two or more points into `folder`; returns them."""
    found = [(panel, curves(panel, history)) for panel in PANELS]
    drawn = [(panel, lines) for panel, lines in found if any(len(points) > 1 for points in lines.values())]
    for panel, lines in drawn:
        folder.mkdir(parents=True, exist_ok=True)
        save(picture(panel, {folder: lines}), folder / f"{panel.name}.png", dpi=120)
    return [panel for panel, _ in drawn]


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
    return text.replace("|", "\\|").replace("\n", " ")
