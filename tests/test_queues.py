import queue

from arpo_trl.common.queues import drained


def filled(*items: int) -> queue.SimpleQueue[int]:
    made: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items:
        made.put(item)
    return made


def test_all_items_come_in_their_order():
    assert list(drained(filled(3, 1, 2))) == [3, 1, 2]
    assert list(drained(filled(3, 1), timeout_s=10.0)) == [3, 1]


def test_an_empty_queue_gives_nothing():
    assert list(drained(filled())) == []
    assert list(drained(filled(), timeout_s=0.001)) == []


def test_a_reader_that_stops_early_leaves_the_rest():
    items = filled(1, 2, 3)
    assert next(drained(items)) == 1
    assert list(drained(items)) == [2, 3]
