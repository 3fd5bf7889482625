import threading
import time

from services.engine.grammar.lane import Lane


def test_a_thread_that_comes_back_at_once_lets_a_waiting_thread_go_first() -> None:
    lane, turns, waits = Lane(1, 1.0), [], threading.Semaphore(0)

    def hold(name: str, num_chars: int) -> None:
        waits.release()
        with lane.place(num_chars):
            turns.append(name)

    with lane.place(9):
        threads = [threading.Thread(target=hold, args=case) for case in (("large", 5000), ("small", 3))]
        for thread in threads:
            thread.start()
            waits.acquire()
        while len(lane) < len(threads):
            time.sleep(0.001)
    with lane.place(4000):  # asks again at once, and waits behind the smaller grammar, but not behind the larger one
        turns.append("again")
    for thread in threads:
        thread.join()
    assert turns == ["small", "again", "large"]


def test_a_lane_has_so_many_places() -> None:
    lane, most, running, lock = Lane(2, 1.0), 0, 0, threading.Lock()
    both = threading.Barrier(2)  # each thread waits for another one that has a place, too

    def hold(num_chars: int) -> None:
        nonlocal most, running
        with lane.place(num_chars):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            both.wait(60)
            with lock:
                running -= 1

    threads = [threading.Thread(target=hold, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2
