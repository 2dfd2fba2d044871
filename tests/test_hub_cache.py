import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

from arpo_trl.common.hub_cache import cache_remedy, can_write
from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.net.hub_dataset import load_from_hub
from arpo_trl.scripts.sft import load_rows

REMEDY = "Set HF_HOME to a folder that can be written."


def test_a_missing_folder_can_be_written_if_the_nearest_folder_above_it_can(tmp_path):
    (tmp_path / "file").touch()
    assert can_write(tmp_path) and can_write(tmp_path / "a" / "b")
    assert not can_write(tmp_path / "file") and not can_write(tmp_path / "file" / "b")


def test_only_errors_of_the_cache_or_of_a_folder_above_it_are_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "models"))
    of = {path: cache_remedy(PermissionError(13, "denied", path)) for path in map(str, (
        tmp_path / "home" / "datasets" / "rows.lock", tmp_path / "models", tmp_path, tmp_path / "rows.jsonl",
    ))}  # fmt: skip
    assert list(of.values()) == [REMEDY, REMEDY, REMEDY, None]
    led = OSError("a model cannot be downloaded")
    led.__cause__ = PermissionError(13, "denied", str(tmp_path))
    assert cache_remedy(led) == REMEDY
    assert cache_remedy(ConnectionError("refused")) is None


def test_a_download_that_the_cache_refuses_is_no_matter_of_the_name_or_the_connection(monkeypatch, tmp_path, hub):
    hub.repos["models", "me/model"] = {"config.json": b"{}", "tokenizer_config.json": b"{}"}
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    with pytest.raises(ConfigError) as raised:
        load_pretrained("tokenizer", "me/model", AutoTokenizer.from_pretrained, cache_dir=cache)
    assert str(raised.value).endswith(REMEDY), raised.value


@pytest.mark.parametrize(
    "load", [lambda: list(load_from_hub("me/rows", "train")), lambda: load_rows("me/rows", "train")]
)
def test_rows_of_the_hub_that_the_cache_refuses_are_no_matter_of_their_name(monkeypatch, load):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(Path(constants.HF_HOME).parent))

    monkeypatch.setattr("datasets.load_dataset", denied)
    monkeypatch.setattr("arpo_trl.scripts.sft.load_dataset", denied)
    with pytest.raises(DataError, match=re.escape(REMEDY)):
        load()
