"""The state machine: tables of events and the actions they lead to; test_random_lives.py has the rest."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from shmpool.dispatch.state import (
    SWEEPS,
    Action,
    Again,
    Break,
    Fail,
    Machine,
    Recall,
    Retire,
    Send,
    Start,
    Stop,
    Watch,
)


def on_demand(
    workers: int = 2, *, limit: int | None = None, ahead: int = 1, most: int = 4
) -> Machine:
    return Machine(workers, limit, False, ahead, most, 1000)


def all_at_once(workers: int = 2, *, ahead: int = 1, most: int = 4) -> Machine:
    return Machine(workers, None, True, ahead, most, 1000)


def with_ready_workers(machine: Machine, count: int) -> Machine:
    """Bring ``count`` workers up, by way of tasks where they are started on demand; all are idle then, 0 the latest."""
    starts = machine.started()
    if not starts:
        starts = [a for task in range(-count, 0) for a in machine.submitted(task)]
    for start in reversed(starts):
        assert isinstance(start, Start)
        for action in machine.ready(start.worker):
            assert isinstance(action, Send)
            machine.answered(action.worker, action.task, 1_000_000)
    return machine


# ---------------------------------------------------------------- starting


def test_a_pool_that_starts_all_starts_them_before_the_first_task():
    machine = all_at_once(3)
    assert machine.started() == [Start(0), Start(1), Start(2)]
    assert machine.submitted(10) == [], "nobody is ready yet"


def test_a_pool_on_demand_starts_nobody_before_the_first_task():
    assert on_demand(3).started() == []


def test_each_task_that_finds_nobody_idle_starts_a_worker_up_to_the_limit():
    machine = on_demand(2)
    assert machine.submitted(0) == [Start(0)]
    assert machine.submitted(1) == [Start(1)]
    assert machine.submitted(2) == []


def test_an_idle_worker_is_used_before_another_is_started():
    machine = with_ready_workers(on_demand(2), 1)
    assert machine.submitted(0) == [Send(0, 0)]
    assert Start(1) in machine.submitted(1)


def test_of_those_that_are_idle_the_one_that_worked_last_is_used():
    """Its memory is warm, and it has what earlier results lay in, for the next."""
    machine = with_ready_workers(all_at_once(3), 3)
    for task in range(3):
        machine.submitted(task)
    for worker in (1, 2, 0):
        machine.answered(worker, worker, 1)
    assert machine.submitted(3) == [Send(3, 0)]
    machine.answered(0, 3, 1)
    assert [*machine.submitted(4), *machine.submitted(5)] == [Send(4, 0), Send(5, 2)]


def test_the_worker_that_gets_ready_first_gets_the_oldest_task():
    machine = on_demand(2)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.ready(1) == [Send(0, 1), Send(1, 1)], "one is sent ahead"


def test_a_second_ready_worker_takes_back_what_was_sent_ahead_to_the_first():
    machine = on_demand(2)
    machine.submitted(0)
    machine.submitted(1)
    machine.ready(0)
    assert machine.ready(1) == [Recall(0, 1)]
    assert machine.recalled(0, [1]) == [Send(1, 1)]


def test_when_a_process_cannot_be_started_others_go_on():
    machine = on_demand(2)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.start_failed(1)
    actions = machine.ready(0)
    assert Start(2) in actions, "a later event tries again"
    assert [a for a in actions if isinstance(a, Send)] == [Send(0, 0), Send(1, 0)]


def test_when_the_only_process_cannot_be_started_that_is_said():
    machine = on_demand(2)
    machine.submitted(0)
    assert not machine.start_failed(0)
    assert machine.broke() == [Fail(0, None)]


def test_tasks_that_no_worker_can_be_started_for_fail_and_the_next_one_tries_again():
    machine = on_demand(2)
    for task in range(3):
        machine.submitted(task, timed=True, retries=1)
    assert machine.start_failed(1)
    assert not machine.start_failed(0)
    assert machine.starved() == [Fail(0, None), Fail(1, None), Fail(2, None)]
    assert machine.submitted(3) == [Start(2)]
    assert machine.ready(2) == [Send(3, 2)]


def test_a_closing_pool_whose_last_tasks_nobody_can_run_stops():
    machine = on_demand(1)
    machine.submitted(0)
    machine.closed()
    assert not machine.start_failed(0)
    assert machine.starved() == [Fail(0, None), Stop()]


def test_a_pool_whose_first_workers_cannot_be_started_asks_for_them_again():
    machine = all_at_once(2)
    assert machine.started() == [Start(0), Start(1)]
    machine.unstarted()
    assert machine.started() == [Start(2), Start(3)]


# ---------------------------------------------------------------- sending ahead


def test_one_task_is_sent_ahead_of_need_and_no_more_while_tasks_are_long():
    machine = with_ready_workers(all_at_once(1), 1)
    assert machine.submitted(0) == [Send(0, 0)]
    assert machine.submitted(1) == [Send(1, 0)]
    assert machine.submitted(2) == []
    assert machine.answered(0, 0, 1_000_000) == [Send(2, 0)]


def test_short_tasks_are_sent_ahead_in_numbers_but_no_more_than_allowed():
    machine = with_ready_workers(all_at_once(1, most=4), 1)
    for task in range(200):
        machine.submitted(task)
    sent: deque[int] = deque([0, 1])
    for _ in range(100):
        actions = machine.answered(0, sent.popleft(), 1)
        sent += [a.task for a in actions if isinstance(a, Send)]
    assert len(sent) == 5, "one is running, four wait"
    assert list(sent) == list(range(sent[0], sent[0] + 5))


def test_when_tasks_become_long_again_less_is_sent_ahead():
    machine = with_ready_workers(all_at_once(1, most=4), 1)
    for task in range(200):
        machine.submitted(task)
    sent: deque[int] = deque([0, 1])
    for duration in [1] * 100 + [1_000_000] * 10:
        actions = machine.answered(0, sent.popleft(), duration)
        sent += [a.task for a in actions if isinstance(a, Send)]
    assert len(sent) == 2


def test_a_worker_that_was_sent_much_when_tasks_were_short_gets_no_more_once_they_are_long():
    """It has not answered since, and is not looked at again until a new task comes."""
    machine = with_ready_workers(on_demand(2, most=8), 2)
    for task in range(80):
        [send] = machine.submitted(task)
        assert machine.answered(send.worker, task, 1) == []
    sent = deque(machine.submitted_all(range(100, 108)))
    assert Counter(send.worker for send in sent) == {0: 4, 1: 4}
    first = sent.popleft()
    assert machine.answered(first.worker, first.task, 1_000_000) == []
    assert machine.submitted(200) == [], "each has more than one task to come"
    while sent:
        send = sent.popleft()
        sent += machine.answered(send.worker, send.task, 1_000_000)
    assert send.task == 200
    assert machine.closed() == [Stop()]


def test_tasks_that_are_sent_ahead_are_spread_over_the_busy_workers():
    machine = with_ready_workers(all_at_once(2), 2)
    sends = [a for task in range(4) for a in machine.submitted(task)]
    assert Counter(a.worker for a in sends) == {0: 2, 1: 2}


# ---------------------------------------------------------------- recall


def test_a_worker_that_becomes_idle_takes_half_of_what_the_busiest_has_not_begun():
    machine = with_ready_workers(all_at_once(2, ahead=4), 2)
    machine.submitted(0)
    machine.submitted(1)
    for task in range(2, 8):
        machine.submitted(task)
    of_1 = [1, 3, 5, 7]
    for task in of_1[:-1]:
        assert machine.answered(1, task, 1_000_000) == []
    assert machine.answered(1, 7, 1_000_000) == [Recall(0, 2)], "0 runs one and has three waiting"
    assert machine.recalled(0, [2, 4])[0] == Send(2, 1)


def test_when_several_workers_are_idle_each_takes_a_task_that_waits_behind_another():
    machine = with_ready_workers(all_at_once(3, ahead=4), 3)
    for task in range(9):
        machine.submitted(task)  # 0, 3, 6 to the first; 1, 4, 7; 2, 5, 8
    assert machine.answered_all(2, [(2, 1), (5, 1), (8, 1)]) == [Recall(0, 1)]
    assert machine.recalled(0, []) == [], "it has run them all, but its answers are on their way"
    assert machine.answered_all(0, [(0, 1), (3, 1), (6, 1)]) == [Recall(1, 1)]
    assert machine.recalled(1, [4]) == [Send(4, 0), Recall(1, 1)], "the other is idle as well"
    assert machine.recalled(1, [7]) == [Send(7, 2)]


def test_a_recall_that_brings_nothing_is_not_followed_by_another():
    machine = on_demand(2)
    machine.submitted(0)
    machine.submitted(1)
    machine.ready(0)
    assert machine.ready(1) == [Recall(0, 1)]
    assert machine.recalled(0, []) == []


def test_a_worker_whose_only_task_is_cancelled_takes_one_that_waits_behind_another():
    machine = with_ready_workers(all_at_once(2), 2)
    for task in range(3):
        machine.submitted(task)
    assert machine.recalled(1, [1], unwanted=1) == [Recall(0, 1)]
    assert machine.recalled(0, [2]) == [Send(2, 1)]


def test_nothing_is_recalled_from_a_worker_with_one_task():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0)
    assert machine.answered(0, 0, 1) == []


# ---------------------------------------------------------------- cancelled, refused


def test_a_cancelled_task_makes_room_for_the_next():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.dropped(0, 1) == [Send(2, 0)]


def test_a_pending_task_that_is_withdrawn_is_never_sent():
    machine = on_demand(1)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.withdrawn(0) == []
    assert machine.ready(0) == [Send(1, 0)]


def test_withdrawing_a_task_that_was_sent_does_nothing():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0)
    assert machine.withdrawn(0) == []
    machine.closed()
    assert machine.answered(0, 0, 1) == [Stop()]


def test_withdrawing_the_last_task_of_a_closing_pool_stops_it():
    machine = on_demand(1)
    machine.submitted(0)
    machine.closed()
    assert machine.withdrawn(0) == [Stop()]


def test_a_refused_task_is_sent_again_when_the_worker_has_answered():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0)
    assert machine.submitted(1) == [Send(1, 0)]
    assert machine.refused(0, 1) == []
    assert machine.submitted(2) == [], "the socket is still full"
    assert machine.answered(0, 0, 1_000_000) == [Send(1, 0), Send(2, 0)]


def test_a_refused_task_goes_to_another_worker_that_becomes_idle():
    machine = with_ready_workers(all_at_once(2), 2)
    for task in range(3):
        machine.submitted(task)
    machine.refused(0, 2)
    assert machine.answered(1, 1, 1_000_000)[0] == Send(2, 1)


def test_tasks_that_are_refused_together_keep_their_order():
    machine = with_ready_workers(all_at_once(1, ahead=3), 1)
    for task in range(4):
        machine.submitted(task)
    for task in (1, 2, 3):  # in the order in which they were sent
        machine.refused(0, task)
    actions = machine.answered(0, 0, 1_000_000)
    assert [a.task for a in actions if isinstance(a, Send)] == [1, 2, 3]


def test_a_cancelled_task_does_not_count_towards_the_limit_of_tasks():
    machine = on_demand(1, limit=1)
    machine.submitted(0)
    assert machine.ready(0) == [Send(0, 0)]
    assert machine.dropped(0, 0) == []


# ---------------------------------------------------------------- death


@pytest.mark.parametrize("start_all", [False, True])
def test_the_task_that_a_dead_worker_ran_fails_and_the_unread_ones_are_sent_again(start_all):
    machine = Machine(1, None, start_all, 3, 3, 1000)
    with_ready_workers(machine, 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.died(0, [1, 2]) == [Fail(0, 0), Start(1)]
    assert machine.ready(1) == [Send(1, 1), Send(2, 1)]


def test_what_a_dead_worker_had_not_read_goes_before_newer_tasks():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(4):
        machine.submitted(task)
    machine.died(0, [1])
    sent = machine.ready(1)
    assert sent == [Send(1, 1), Send(2, 1)]


def test_a_dead_worker_without_tasks_fails_nothing():
    machine = with_ready_workers(all_at_once(2), 2)
    assert machine.died(0, []) == [Start(2)]


def test_on_demand_a_dead_worker_is_replaced_only_when_there_is_work():
    machine = with_ready_workers(on_demand(2), 1)
    assert machine.died(0, []) == []
    assert machine.submitted(5) == [Start(1)]


def test_a_worker_that_dies_after_its_task_was_read_but_before_it_ran_loses_only_that_task():
    machine = with_ready_workers(all_at_once(1), 1)
    assert machine.submitted(0) == [Send(0, 0)]
    assert machine.died(0, [0]) == [Start(1)]
    assert machine.ready(1) == [Send(0, 1)]


def test_the_death_of_a_retired_worker_is_no_news():
    machine = on_demand(1, limit=1)
    machine.submitted(0)
    machine.ready(0)
    assert machine.answered(0, 0, 1) == [Retire(0)]
    assert machine.died(0, []) == []


# ---------------------------------------------------------------- stillborn workers


def test_three_workers_in_a_row_that_die_before_they_are_ready_break_the_pool():
    machine = on_demand(1)
    assert machine.submitted(0) == [Start(0)]
    assert machine.died(0, []) == [Start(1)]
    assert machine.died(1, []) == [Start(2)]
    assert machine.died(2, []) == [Break(2)]
    assert machine.broke() == [Fail(0, None)]
    assert machine.broken


def test_a_worker_that_gets_ready_clears_the_count():
    machine = all_at_once(1)
    machine.started()
    assert machine.died(0, []) == [Start(1)]
    assert machine.died(1, []) == [Start(2)]
    machine.ready(2)
    assert machine.died(2, []) == [Start(3)]
    assert machine.died(3, []) == [Start(4)]


def test_a_broken_pool_fails_what_is_running_and_what_is_pending_and_starts_nobody():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.broke() == [Fail(0, None), Fail(1, None), Fail(2, None)]
    assert [a for a in machine.died(0, []) if isinstance(a, Start)] == []


# ---------------------------------------------------------------- retirement


def test_a_worker_is_sent_no_more_tasks_than_it_may_run():
    machine = on_demand(1, limit=2, ahead=5)
    for task in range(3):
        machine.submitted(task)
    assert machine.ready(0) == [Send(0, 0), Send(1, 0)]
    assert machine.answered(0, 0, 1) == []
    assert machine.answered(0, 1, 1) == [Retire(0), Start(1)]
    assert machine.ready(1) == [Send(2, 1)]


def test_a_task_that_was_taken_back_does_not_count():
    machine = on_demand(2, limit=2, ahead=5)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.ready(0) == [Send(0, 0), Send(1, 0)]
    assert machine.ready(1) == [Recall(0, 1)]
    assert machine.recalled(0, [1]) == [Send(1, 1)]
    assert machine.answered(0, 0, 1) == [], "it may run one more"
    assert machine.submitted(2) == [Send(2, 0)]


def test_a_pool_that_starts_all_replaces_a_retired_worker_at_once():
    machine = Machine(1, 1, True, 1, 1, 1000)
    machine.started()
    machine.ready(0)
    machine.submitted(0)
    assert machine.answered(0, 0, 1) == [Retire(0), Start(1)]
    machine.submitted(1)
    machine.ready(1)
    machine.closed()
    assert machine.answered(1, 1, 1) == [Retire(1), Stop()], "but not while it is closing"


# ---------------------------------------------------------------- limited time


def timed_tasks(machine: Machine, count: int) -> list[Action]:
    return [action for task in range(count) for action in machine.submitted(task, timed=True)]


def test_the_time_of_a_task_runs_from_when_it_is_sent_to_an_idle_worker():
    machine = with_ready_workers(all_at_once(1), 1)
    assert machine.submitted(0, timed=True) == [Send(0, 0), Watch(0)]


def test_the_time_of_a_task_that_is_sent_ahead_runs_when_those_before_it_are_answered():
    machine = with_ready_workers(all_at_once(1, ahead=2), 1)
    assert timed_tasks(machine, 3) == [Send(0, 0), Watch(0), Send(1, 0), Send(2, 0)]
    assert machine.answered(0, 0, 1_000_000) == [Watch(1)]
    assert machine.answered(0, 1, 1_000_000) == [Watch(2)]
    assert machine.answered(0, 2, 1_000_000) == []


def test_the_time_of_a_task_without_a_limit_is_not_watched():
    machine = with_ready_workers(all_at_once(1, ahead=2), 1)
    machine.submitted(0, timed=True)
    machine.submitted(1)
    machine.submitted(2, timed=True)
    assert machine.answered(0, 0, 1_000_000) == []
    assert machine.answered(0, 1, 1_000_000) == [Watch(2)]


def test_several_answers_at_once_start_one_clock():
    machine = with_ready_workers(all_at_once(1, ahead=3), 1)
    timed_tasks(machine, 4)
    assert machine.answered_all(0, [(0, 1_000_000), (1, 1_000_000)]) == [Watch(2)]


def test_a_task_that_comes_first_since_the_one_before_it_was_cancelled_is_watched():
    machine = with_ready_workers(all_at_once(1), 1)
    assert timed_tasks(machine, 2) == [Send(0, 0), Watch(0), Send(1, 0)]
    assert machine.dropped(0, 0) == [Watch(1)]


def test_a_task_that_comes_first_since_the_one_before_it_was_taken_back_is_watched():
    machine = with_ready_workers(all_at_once(1), 1)
    timed_tasks(machine, 2)
    assert machine.recalled(0, [0], unwanted=0) == [Watch(1)]


def test_a_task_that_moves_to_an_idle_worker_is_watched_there():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.submitted(2, timed=True) == [Send(2, 0)]
    assert machine.answered(1, 1, 1_000_000) == [Recall(0, 1)]
    assert machine.recalled(0, [2]) == [Send(2, 1), Watch(2)]


def test_a_timed_task_is_watched_anew_each_time_that_it_is_sent():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, timed=True, retries=1)
    assert machine.died(0, []) == [Again(0, 0), Start(1)]
    assert machine.ready(1) == [Send(0, 1), Watch(0)]
    assert machine.died(1, [0]) == [Start(2)], "it had not begun, so this was no attempt"
    assert machine.ready(2) == [Send(0, 2), Watch(0)]


def test_a_timed_task_that_is_refused_is_watched_when_it_is_sent_again():
    machine = with_ready_workers(all_at_once(1), 1)
    assert machine.submitted(0, timed=True) == [Send(0, 0), Watch(0)]
    machine.refused(0, 0)
    assert machine.submitted(1) == [Send(0, 0), Watch(0), Send(1, 0)]


# ---------------------------------------------------------------- retries


def test_a_task_with_retries_is_sent_again_so_often_and_then_fails():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, retries=2)
    for worker in (0, 1):
        assert machine.died(worker, []) == [Again(0, worker), Start(worker + 1)]
        assert machine.ready(worker + 1) == [Send(0, worker + 1)]
    assert machine.died(2, []) == [Fail(0, 2), Start(3)]


def test_a_retried_task_goes_before_newer_ones():
    machine = with_ready_workers(all_at_once(1, ahead=2), 1)
    machine.submitted(0, retries=1)
    for task in range(1, 4):
        machine.submitted(task)
    assert machine.died(0, [1, 2]) == [Again(0, 0), Start(1)]
    assert machine.ready(1) == [Send(0, 1), Send(1, 1), Send(2, 1)]


def test_a_retried_task_goes_to_another_worker_that_is_idle():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0, retries=1)
    assert machine.died(0, []) == [Again(0, 0), Start(2), Send(0, 1)]


def test_of_the_tasks_of_a_dead_worker_only_the_one_that_ran_has_used_a_retry():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(2):
        machine.submitted(task, retries=1)
    assert machine.died(0, [1]) == [Again(0, 0), Start(1)]
    assert machine.ready(1) == [Send(0, 1), Send(1, 1)]
    assert machine.died(1, [1]) == [Fail(0, 1), Start(2)]
    machine.ready(2)
    assert machine.died(2, []) == [Again(1, 2), Start(3)]


def test_a_task_that_is_retried_can_be_withdrawn_meanwhile():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, retries=1)
    machine.died(0, [])
    assert machine.withdrawn(0) == []
    assert machine.ready(1) == []
    assert machine.closed() == [Stop()]


def test_a_closing_pool_waits_for_a_task_that_is_retried():
    machine = with_ready_workers(on_demand(1), 1)
    machine.submitted(0, retries=1)
    assert machine.closed() == []
    assert machine.died(0, []) == [Again(0, 0), Start(1)]
    assert machine.ready(1) == [Send(0, 1)]
    assert machine.answered(1, 0, 1) == [Stop()]


def test_a_task_that_is_retried_when_the_pool_breaks_fails():
    machine = on_demand(1)
    machine.submitted(0, retries=9)
    machine.ready(0)
    assert machine.died(0, []) == [Again(0, 0), Start(1)]
    machine.died(1, [])
    machine.died(2, [])
    assert machine.died(3, []) == [Break(3)]
    assert machine.broke() == [Fail(0, None)]


def test_a_doomed_task_is_not_retried():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, timed=True, retries=5)
    machine.doomed(0)
    assert machine.died(0, []) == [Fail(0, 0), Start(1)]


def test_a_doomed_task_takes_no_other_with_it():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, retries=1)
    machine.submitted(1, retries=1)
    machine.doomed(0)
    assert machine.died(0, [1]) == [Fail(0, 0), Start(1)]
    assert machine.ready(1) == [Send(1, 1)]
    assert machine.died(1, []) == [Again(1, 1), Start(2)]


def test_a_condemned_worker_is_sent_nothing_more_and_what_it_has_not_read_is_sent_elsewhere():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0)
    machine.condemned(0)
    assert machine.submitted(1) == [Send(1, 1)]
    assert machine.submitted(2) == [Send(2, 1)]
    assert machine.answered(0, 0, 1_000_000) == [], "it has nothing to do, and gets nothing"
    assert machine.submitted(3) == []
    assert machine.died(0, []) == [Start(2)]
    assert machine.ready(2)[0] == Send(3, 2)


def test_a_task_is_running_when_what_was_sent_after_it_is_unread():
    machine = with_ready_workers(all_at_once(1, ahead=3), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.is_running(0, 0, [1, 2])
    assert not machine.is_running(0, 0, [0, 1, 2]), "it was not read"
    assert not machine.is_running(0, 0, [2]), "it was answered, since the next was read"
    assert not machine.is_running(9, 0, [])


def test_a_doomed_task_that_is_answered_all_the_same_is_answered():
    machine = with_ready_workers(all_at_once(1), 1)
    machine.submitted(0, retries=1)
    machine.doomed(0)
    assert machine.answered(0, 0, 1) == []
    assert machine.died(0, []) == [Start(1)]


# ---------------------------------------------------------------- idle workers leave


def swept(machine: Machine, times: int) -> list[Action]:
    return [action for _ in range(times) for action in machine.swept()]


def test_a_worker_that_was_idle_for_long_leaves():
    machine = with_ready_workers(all_at_once(2), 2)
    assert swept(machine, SWEEPS) == []
    assert machine.swept() == [Retire(1), Retire(0)]
    assert machine.swept() == []


def test_a_worker_that_has_worked_meanwhile_stays_for_as_long_again():
    machine = with_ready_workers(on_demand(1), 1)
    assert swept(machine, SWEEPS) == []
    machine.submitted(0)
    machine.answered(0, 0, 1)
    assert swept(machine, SWEEPS) == []
    assert machine.swept() == [Retire(0)]


def test_busy_and_starting_workers_stay():
    machine = with_ready_workers(on_demand(2), 1)
    machine.submitted(0)
    assert machine.submitted(1) == [Send(1, 0), Start(1)]
    assert swept(machine, 3 * SWEEPS) == []


@pytest.mark.parametrize(("start_all", "starts"), [(False, 1), (True, 2)])
def test_when_all_have_left_a_task_brings_them_back(start_all, starts):
    machine = with_ready_workers(Machine(2, None, start_all, 1, 1, 1000), 2)
    swept(machine, SWEEPS + 1)
    assert machine.submitted(0) == [Start(2 + i) for i in range(starts)]
    assert machine.ready(2) == [Send(0, 2)]


def test_a_pool_whose_workers_have_left_stops_at_once():
    machine = with_ready_workers(all_at_once(1), 1)
    swept(machine, SWEEPS + 1)
    assert machine.closed() == [Stop()]


# ---------------------------------------------------------------- another number of workers


def test_more_workers_are_started_when_there_is_work_for_them():
    machine = with_ready_workers(on_demand(1), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.resized(3) == [Start(1), Start(2)]


def test_more_workers_are_not_started_for_nothing():
    assert with_ready_workers(on_demand(1), 1).resized(3) == []


def test_a_pool_that_starts_all_starts_the_new_ones_with_the_next_task():
    machine = with_ready_workers(all_at_once(1), 1)
    assert machine.resized(3) == []
    machine.submitted(0)
    assert machine.submitted(1) == [Send(1, 0), Start(1), Start(2)]


def test_idle_workers_leave_when_there_are_too_many():
    machine = with_ready_workers(all_at_once(3), 3)
    machine.submitted(0)
    assert machine.resized(1) == [Retire(2), Retire(1)]


def test_busy_workers_leave_when_they_have_nothing_left_to_do():
    machine = with_ready_workers(all_at_once(2), 2)
    for task in range(4):
        machine.submitted(task)
    assert machine.resized(1) == []
    machine.submitted(4)
    assert machine.answered(1, 1, 1_000_000) == [Send(4, 1)], "as long as there is something"
    assert machine.answered(1, 3, 1_000_000) == []
    assert machine.answered(1, 4, 1_000_000) == [Retire(1)]
    assert machine.answered(0, 0, 1_000_000) == []
    assert machine.answered(0, 2, 1_000_000) == [], "the last one stays"


def test_a_worker_that_is_ready_when_there_are_enough_leaves():
    machine = with_ready_workers(on_demand(2), 1)
    machine.submitted(0)
    assert machine.submitted(1) == [Send(1, 0), Start(1)]
    assert machine.answered_all(0, [(0, 1), (1, 1)]) == []
    assert machine.resized(1) == [Retire(0)]
    assert machine.ready(1) == []
    machine = with_ready_workers(on_demand(2), 1)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.resized(1) == []
    machine.answered(0, 0, 1_000_000)
    assert machine.ready(1) == [Retire(1)]


def test_a_worker_whose_last_task_was_taken_back_leaves_when_there_are_too_many():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0)
    machine.submitted(1)
    machine.resized(1)
    assert machine.recalled(1, [1], unwanted=1) == [Retire(1)]


def test_a_dead_worker_is_not_replaced_when_there_are_enough():
    machine = with_ready_workers(all_at_once(3), 3)
    for task in range(3):
        machine.submitted(task)
    machine.resized(2)
    assert machine.died(0, []) == [Fail(0, 0)]
    assert machine.died(1, []) == [Fail(1, 1), Start(3)]


def test_a_spent_worker_is_not_replaced_when_there_are_enough():
    machine = Machine(2, 1, True, 1, 1, 1000)
    with_ready_workers(machine, 0)
    machine.ready(0)
    machine.ready(1)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.resized(1) == []
    assert machine.answered(0, 0, 1) == [Retire(0)]
    assert machine.answered(1, 1, 1) == [Retire(1), Start(2)]


# ---------------------------------------------------------------- what a worker says that is not true


def test_what_a_worker_that_has_left_says_is_no_news():
    machine = with_ready_workers(on_demand(1), 1)
    swept(machine, SWEEPS + 1)
    assert machine.ready(0) == []
    assert machine.answered(0, 7, 1) == []
    machine.condemned(0)
    assert machine.died(0, []) == []


def test_an_answer_to_a_task_of_another_worker_changes_nothing():
    machine = with_ready_workers(all_at_once(2), 2)
    machine.submitted(0)
    machine.submitted(1)
    assert machine.answered(1, 0, 1) == []
    assert machine.died(0, []) == [Fail(0, 0), Start(2)]


def test_a_task_that_was_answered_before_it_was_read_is_not_taken_back():
    machine = with_ready_workers(all_at_once(1, ahead=2), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.answered(0, 1, 1_000_000) == []
    assert machine.recalled(0, [1]) == []
    assert machine.died(0, [1, 2]) == [Fail(0, 0), Start(1)]
    assert machine.ready(1) == [Send(2, 1)]


# ---------------------------------------------------------------- closing


def test_a_pool_that_never_had_a_task_stops_at_once():
    assert on_demand().closed() == [Stop()]


def test_a_closing_pool_finishes_what_was_submitted_and_stops_once():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(3):
        machine.submitted(task)
    assert machine.closed() == []
    assert machine.answered(0, 0, 1_000_000) == [Send(2, 0)]
    assert machine.answered(0, 1, 1_000_000) == []
    assert machine.answered(0, 2, 1_000_000) == [Stop()]
    assert machine.closed() == []
    assert machine.died(0, []) == []


def test_a_closing_pool_still_replaces_a_worker_that_something_is_pending_for():
    machine = with_ready_workers(all_at_once(1), 1)
    for task in range(2):
        machine.submitted(task)
    machine.closed()
    assert machine.died(0, [1]) == [Fail(0, 0), Start(1)]
    assert machine.ready(1) == [Send(1, 1)]
    assert machine.answered(1, 1, 1) == [Stop()]


def test_a_pool_that_is_closed_before_its_workers_are_ready_waits_for_its_tasks():
    machine = on_demand(1)
    machine.submitted(0)
    assert machine.closed() == []
    assert machine.ready(0) == [Send(0, 0)]
    assert machine.answered(0, 0, 1) == [Stop()]


# ---------------------------------------------------------------- tasks that wait for each other


def test_tasks_that_wait_for_each_other_get_a_worker_each():
    machine = with_ready_workers(on_demand(3), 1)
    actions = [a for task in range(3) for a in machine.submitted(task)]
    ready = 0
    while starts := [a.worker for a in actions if isinstance(a, Start)][ready:]:
        ready += len(starts)
        for worker in starts:
            actions += machine.ready(worker)
    assert ready == 2, "three tasks, none of which ends before the others have begun"
