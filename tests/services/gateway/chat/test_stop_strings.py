from __future__ import annotations

import random
import time
import tracemalloc
from itertools import pairwise

from services.gateway.chat.stop_strings import StopMatcher, StopStrings


def _first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the pair (text before the first stop string, True if there is a stop string).

    The function is slow and obvious: it looks for the shortest prefix of the text that ends with a stop string.
    """
    for end in range(len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, ended))], True
    return text, False


def _match(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(StopStrings(stops)), ""
    for piece in pieces:
        new, is_stopped = matcher.push(piece)
        shown += new
        if is_stopped:
            return shown, True
        text = "".join(pieces)
        held = matcher._held
        assert text.startswith(shown + held)
        assert not held or any(stop.startswith(held) for stop in stops), (
            "text is held back although it begins no stop string"
        )
    return shown + matcher.flush(), False


def test_stop_strings_wherever_the_text_is_cut() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(14)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(5)))
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        assert _match(pieces, stops) == _first_stop(text, stops)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(StopStrings(["<end>"]))
    pushed = [matcher.push(piece) for piece in ["a<", "en", "x", "<", "b"]]
    assert pushed == [("a", False), ("", False), ("<enx", False), ("", False), ("<b", False)]


def test_matching_is_linear_in_the_worst_case() -> None:
    matcher = StopMatcher(StopStrings(["a" * 20_000 + "b"]))
    start = time.thread_time()
    matcher.push("a" * 200_000)
    assert time.thread_time() - start < 5


def test_matchers_share_the_tables_but_not_the_text() -> None:
    stops = StopStrings(["abc"])
    first, second = StopMatcher(stops), StopMatcher(stops)
    assert first.push("ab") == ("", False)
    assert second.push("c") == ("c", False)
    assert first.push("c") == ("", True)
    assert (first.stop, second.stop) == ("abc", "")


def test_many_choices_need_the_tables_once() -> None:
    stops = StopStrings([f"{n}" * 16_000 for n in range(4)])
    tracemalloc.start()
    try:
        matchers = [StopMatcher(stops) for _ in range(128)]
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(matchers) == 128
    assert used < 128 * 1024
