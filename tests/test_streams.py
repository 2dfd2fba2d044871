"""A streamed dataset reaches the ranks in the order of any other dataset, whatever its shards."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.utils import repeat_iterable_dataset

from arpo_trl.errors import ConfigError
from arpo_trl.training.row_checks import check_same_rows
from arpo_trl.training.streams import WholeStream
from resuming import make_trainer
from support import save_tiny_model

ROWS = Dataset.from_list([{"prompt": f"what is {number}"} for number in range(11)])


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_each_rank_gets_the_same_rows_again_where_trl_repeats_a_batch(shards: int) -> None:
    stream = ROWS.to_iterable_dataset(num_shards=shards).shuffle(seed=1, buffer_size=1)
    # Batches of 4 rows for both ranks, each repeated twice: once to sample and once to take from the buffer.
    repeated = repeat_iterable_dataset(stream, mini_repeat_count=1, batch_size=4, repeat_count=2)
    numbers = [[], []]
    for rank in (0, 1):
        loader = DataLoader(WholeStream(repeated), batch_size=2)
        dealt = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        numbers[rank] = [[int(prompt.split()[-1]) for prompt in batch["prompt"]] for batch in dealt]
    in_order = [int(row["prompt"].split()[-1]) for row in stream]
    first, second = in_order[:4], in_order[4:8]
    assert numbers[0] == [first[:2], first[:2], second[:2], second[:2]]
    assert numbers[1] == [first[2:], first[2:], second[2:], second[2:]]


def test_an_epoch_shuffles_the_stream_anew() -> None:
    stream = WholeStream(ROWS.to_iterable_dataset().shuffle(seed=1, buffer_size=8))
    first = list(stream)
    stream.set_epoch(1)
    assert list(stream) != first


def test_the_loaders_of_the_trainer_read_whole_streams(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    stream = ROWS.to_iterable_dataset(num_shards=4)
    made = make_trainer(model, tmp_path / "run", train_dataset=stream)
    for loader in (made.get_train_dataloader(), made.get_eval_dataloader(stream)):
        assert isinstance(loader.dataset, WholeStream)


def test_an_overlong_row_late_in_a_stream_is_shown(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    rows = Dataset.from_list([*ROWS, {"prompt": "tell me " * 3000}])
    made = make_trainer(
        model,
        tmp_path / "run",
        train_dataset=rows.to_iterable_dataset(),
        shuffle_dataset=False,
        max_steps=20,
        save_strategy="no",
    )
    with pytest.raises(ConfigError, match=r"A prompt has \d+ tokens, but the context is .*begins with 'tell me tell"):
        made.train()


@pytest.mark.parametrize("others", ["[{'prompt': 'what is 5'}]", None])
def test_a_stream_that_ranks_read_in_different_orders_is_an_error(monkeypatch, others):
    monkeypatch.setattr(
        "arpo_trl.training.row_checks.gather_object", lambda own: [*own, {"rows": others} if others else own[0]]
    )
    ranks = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match=r"streamed rows in different orders.* a seed") if others else nullcontext():
        check_same_rows({"rows": ROWS.to_iterable_dataset()}, ranks)  # type: ignore[arg-type]
