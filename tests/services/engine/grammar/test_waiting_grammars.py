from services.engine.grammar.waiting_grammars import MAX_SECONDS_LATER, SECONDS_PER_CHAR, SMALL_CHARS, WaitingGrammars


def test_short_grammars_come_first_and_equal_ones_in_the_order_of_arrival() -> None:
    waiting: WaitingGrammars[str] = WaitingGrammars()
    for name, num_chars in (("large", 5000), ("middle", SMALL_CHARS + 1), ("small", 30), ("also small", 30)):
        waiting.add(name, num_chars, now=7.0)
    assert list(waiting.pop_all()) == ["small", "also small", "middle", "large"]
    assert waiting.pop() is None


def test_a_large_grammar_gives_way_only_for_a_time_that_grows_with_its_length() -> None:
    for num_chars in (1000, 3000, 10**6):
        waiting: WaitingGrammars[str] = WaitingGrammars()
        patience = min(num_chars * SECONDS_PER_CHAR, MAX_SECONDS_LATER)
        waiting.add("large", num_chars, now=0.0)
        waiting.add("later", 1, now=patience)
        waiting.add("sooner", 1, now=patience - 2 * SECONDS_PER_CHAR)
        assert list(waiting.pop_all()) == ["sooner", "large", "later"]


def test_a_place_for_small_grammars_takes_no_large_one() -> None:
    waiting: WaitingGrammars[str] = WaitingGrammars()
    waiting.add("large", SMALL_CHARS + 1, now=0.0)
    assert waiting.pop_small() is None
    waiting.add("small", SMALL_CHARS, now=100.0)
    assert waiting.pop_small() == "small"
    assert waiting.pop() == "large"
