"""`one_ahead` gives the same items, passes errors on in their place, and leaves no thread behind."""

import os
import signal
import threading

import pytest

from scfm.data import ahead
from scfm.data.ahead import one_ahead


@pytest.fixture(autouse=True, params=[1, 2], ids=["one processor", "two processors"])
def processors(request, monkeypatch):
    monkeypatch.setattr(ahead, "_n_processors", lambda: request.param)
    yield request.param
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scfm-ahead")]


def test_items_come_in_order_and_one_ahead_in_another_thread(processors):
    made = []

    def items():
        for number in range(5):
            made.append(threading.current_thread())
            yield number

    with one_ahead(items()) as numbers:
        assert list(numbers) == [0, 1, 2, 3, 4]
    assert {thread is threading.main_thread() for thread in made} == {processors == 1}
    with one_ahead([]) as nothing:
        assert list(nothing) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_comes_in_the_place_of_its_item(error):
    def items():
        yield 0
        yield 1
        raise error("third")

    seen = []

    def use():
        with one_ahead(items()) as numbers:
            for number in numbers:
                seen.append(number)

    with pytest.raises(error, match="third"):
        use()
    assert seen == [0, 1]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_of_the_caller_and_ctrl_c_end_the_thread(error):
    def use():
        with one_ahead(iter(range(10))) as numbers:
            for _ in numbers:
                if error is KeyError:
                    raise KeyError
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(error):
            use()
    finally:
        signal.signal(signal.SIGINT, before)
