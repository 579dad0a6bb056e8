"""Active time: pauses, hidden tabs, closed laptops, reloads, and the server's clock."""

import pytest

from cxr_jax.study.timing import agrees_with_server, measure


def tab(*events):
    return [{"kind": kind, "t": float(moment)} for moment, kind in events]


def beats(first, last):
    return [(moment, "heartbeat") for moment in range(first, last, 10)]


def test_counts_from_first_paint_to_signature():
    found = measure({"a": tab((3, "task_shown"), *beats(13, 40), (45, "sign"))})
    assert found.active == pytest.approx(42) and found.paused == 0


def test_pauses_hidden_tabs_and_gaps_do_not_count():
    events = tab(
        (0, "task_shown"),
        (10, "pause"),
        (500, "resume"),
        (510, "hidden"),
        (530, "visible"),
        (540, "heartbeat"),
        (4000, "heartbeat"),  # the laptop was closed
        (4005, "sign"),
    )
    found = measure({"a": events})
    assert found.active == pytest.approx(10 + 10 + 10 + 5)
    assert found.paused == pytest.approx(490 + 20 + 3460)


def test_reload_adds_up_and_what_follows_the_signature_does_not():
    first = tab((0, "task_shown"), (10, "heartbeat"), (20, "heartbeat"))
    second = tab((1, "task_resumed"), (11, "sign"), (20, "heartbeat"))
    assert measure({"a": first, "b": second}).active == pytest.approx(30)


def test_batches_out_of_order_are_put_in_order():
    events = tab((0, "task_shown"), *beats(10, 60), (60, "sign"))
    assert measure({"a": events[::-1]}) == measure({"a": events})


def test_idle_is_kept_apart_and_a_film_that_was_never_shown_has_no_time():
    events = tab((0, "task_shown"), *beats(10, 60), (60, "sign"))
    events.insert(5, {"kind": "idle", "t": 50.0, "seconds": 35.0})
    assert measure({"a": events}).idle == 35
    assert not measure({"a": tab((5, "heartbeat"))}).is_shown


def test_nobody_is_idle_in_a_pause_or_behind_another_window():
    # The input that ends a pause also ends ten minutes without input.
    events = tab((0, "task_shown"), (10, "pause"), (610, "resume"), (620, "sign"))
    events.insert(2, {"kind": "idle", "t": 609.9, "seconds": 605.0})
    found = measure({"a": events})
    assert found.active == pytest.approx(20) and found.idle == pytest.approx(5.1)
    twice = tab((0, "task_shown"), *beats(10, 60), (60, "sign"))
    twice += [{"kind": "idle", "t": 50.0, "seconds": seconds} for seconds in (40.0, 35.0)]
    assert measure({"a": twice}).idle == 40


def test_signature_that_was_refused_stops_no_clock():
    events = tab(
        (0, "task_shown"), (10, "sign"), (20, "heartbeat"), (30, "sign"), (40, "heartbeat")
    )
    assert measure({"a": events}).active == pytest.approx(30)


def test_tab_that_is_out_counts_only_while_it_had_the_task():
    # Left open behind the other one, it goes on telling of its time.
    first = tab((0, "task_shown"), (10, "heartbeat"), (12, "hidden"), *beats(20, 100))
    second = tab((0, "task_resumed"), *beats(10, 80), (80, "sign"))
    found = measure({"a": first, "b": second}, {"a": 15.0})
    assert found.active == pytest.approx(12 + 80) and found.paused == pytest.approx(3)
    assert agrees_with_server(found, 95)


def test_clock_that_runs_ahead_of_the_server_is_found_out():
    found = measure({"a": tab((0, "task_shown"), *beats(10, 60), (60, "sign"))})
    assert agrees_with_server(found, 59) and not agrees_with_server(found, 50)
    assert agrees_with_server(found, 0.06, speed=1000)
