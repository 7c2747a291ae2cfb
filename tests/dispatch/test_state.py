"""The state machine: tables of events and the actions they lead to, and random lives against a trivial model."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmpool.dispatch.state import Action, Break, Fail, Machine, Recall, Retire, Send, Start, Stop


def on_demand(
    workers: int = 2, *, limit: int | None = None, ahead: int = 1, most: int = 4
) -> Machine:
    return Machine(workers, limit, False, ahead, most, 1000)


def all_at_once(workers: int = 2, *, ahead: int = 1, most: int = 4) -> Machine:
    return Machine(workers, None, True, ahead, most, 1000)


def with_ready_workers(machine: Machine, count: int) -> Machine:
    """Bring ``count`` workers up, by way of tasks where they are started on demand; all are idle then."""
    starts = machine.started()
    if not starts:
        starts = [a for task in range(-count, 0) for a in machine.submitted(task)]
    for start in starts:
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


def test_a_recall_that_brings_nothing_is_not_followed_by_another():
    machine = on_demand(2)
    machine.submitted(0)
    machine.submitted(1)
    machine.ready(0)
    assert machine.ready(1) == [Recall(0, 1)]
    assert machine.recalled(0, []) == []


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


# ---------------------------------------------------------------- random lives


class _ModelWorker:
    def __init__(self) -> None:
        self.ready = False
        self.running: int | None = None
        self.unread: deque[int] = deque()
        self.answers: deque[int] = deque()  # on their way to the parent
        self.read = 0

    def read_next(self) -> None:
        if self.ready and self.running is None and self.unread:
            self.running = self.unread.popleft()
            self.read += 1


class RandomLives(RuleBasedStateMachine):
    """The driver, workers and sockets as a model; the machine must keep its promises whatever happens to them."""

    @initialize(
        workers=st.integers(1, 4),
        limit=st.sampled_from([None, None, 1, 2, 3]),
        start_all=st.booleans(),
        ahead=st.sampled_from([(1, 1), (1, 4), (0, 0), (3, 8)]),
        room=st.sampled_from([1, 2, 100]),
    )
    def make(self, workers, limit, start_all, ahead, room) -> None:
        self.machine = Machine(workers, limit, start_all, *ahead, 1000)
        self.max_workers, self.limit, self.room = workers, limit, room
        self.workers: dict[int, _ModelWorker] = {}
        self.next_task = 0
        self.open: set[int] = set()
        self.cancelled: set[int] = set()
        self.settled: dict[int, str] = {}
        self.sent_first: list[int] = []
        self.refusals = self.stops = self.breaks = 0
        self.perform(self.machine.started())

    # -- the driver

    def perform(self, actions: list[Action]) -> None:
        todo, done = deque(actions), 0
        while todo:
            done += 1
            assert done < 200 + 20 * len(self.open), "one event must lead to an end of actions"
            action = todo.popleft()
            if isinstance(action, Start):
                assert action.worker not in self.workers
                self.workers[action.worker] = _ModelWorker()
                assert len(self.workers) <= self.max_workers
            elif isinstance(action, Send):
                todo.extend(self.send(action.task, action.worker))
            elif isinstance(action, Recall):
                worker = self.workers[action.worker]
                worker.read_next()
                taken = [worker.unread.popleft() for _ in range(min(action[1], len(worker.unread)))]
                todo.extend(self.machine.recalled(action.worker, taken))
            elif isinstance(action, Retire):
                worker = self.workers.pop(action.worker)
                assert worker.running is None and not worker.unread and not worker.answers
            elif isinstance(action, Fail):
                self.settle(action.task, "failed")
            elif isinstance(action, Stop):
                self.stops += 1
                assert self.stops == 1, "it stops once"
                assert self.machine.closing and not self.open, "it stops when nothing is left"
            elif isinstance(action, Break):
                self.breaks += 1
                self.machine.closing = self.machine.stopped = True
                for worker in self.workers.values():  # the driver ends them all
                    worker.running = None
                    worker.unread.clear()
                    worker.answers.clear()  # nobody waits for them any more
                todo.extend(self.machine.broke())

    def send(self, task: int, number: int) -> list[Action]:
        worker = self.workers[number]
        assert worker.ready, "a worker is sent tasks when it is ready"
        assert task in self.open, "a task that is settled is not sent"
        if task in self.cancelled:
            self.settle(task, "cancelled")
            return self.machine.dropped(number, task)
        if len(worker.unread) >= self.room:
            self.refusals += 1
            return self.machine.refused(number, task)
        if task not in self.sent_first:
            self.sent_first.append(task)
        worker.unread.append(task)
        return []

    def settle(self, task: int, how: str) -> None:
        assert task not in self.settled, f"{task} is settled twice: {self.settled[task]}, {how}"
        self.settled[task] = how
        self.open.remove(task)

    def pick(self, number: int, among: list[int]) -> int:
        return among[number % len(among)]

    # -- events

    @precondition(lambda self: not self.machine.closing)
    @rule(count=st.integers(1, 5))
    def submit(self, count) -> None:
        for _ in range(count):
            task, self.next_task = self.next_task, self.next_task + 1
            self.open.add(task)
            self.perform(self.machine.submitted(task))

    @precondition(lambda self: any(not w.ready for w in self.workers.values()))
    @rule(number=st.integers(0, 99))
    def ready(self, number) -> None:
        worker = self.pick(number, [n for n, w in self.workers.items() if not w.ready])
        self.workers[worker].ready = True
        self.perform(self.machine.ready(worker))

    @precondition(
        lambda self: any(w.running is not None or w.unread for w in self.workers.values())
    )
    @rule(number=st.integers(0, 99), count=st.integers(1, 3))
    def a_worker_works(self, number, count) -> None:
        busy = [n for n, w in self.workers.items() if w.running is not None or w.unread]
        worker = self.workers[self.pick(number, busy)]
        for _ in range(count):
            worker.read_next()
            if worker.running is not None:
                worker.answers.append(worker.running)
                worker.running = None
            worker.read_next()

    @precondition(lambda self: any(w.answers for w in self.workers.values()))
    @rule(number=st.integers(0, 99), microseconds=st.sampled_from([1, 100, 10_000_000]))
    def an_answer_arrives(self, number, microseconds) -> None:
        number = self.pick(number, [n for n, w in self.workers.items() if w.answers])
        task = self.workers[number].answers.popleft()
        self.settle(task, "answered")
        self.perform(self.machine.answered(number, task, microseconds))

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 99), microseconds=st.sampled_from([1, 10_000_000]))
    def a_worker_dies(self, number, microseconds) -> None:
        number = self.pick(number, list(self.workers))
        worker = self.workers[number]
        while worker.answers and number in self.workers:
            task = worker.answers.popleft()
            self.settle(task, "answered")
            self.perform(self.machine.answered(number, task, microseconds))
        unread = list(worker.unread)
        worker.unread.clear()
        self.workers.pop(number, None)
        self.perform(self.machine.died(number, unread))

    @precondition(lambda self: self.machine._pending)
    @rule(number=st.integers(0, 99))
    def a_pending_task_is_cancelled(self, number) -> None:
        self.cancelled.add(self.pick(number, list(self.machine._pending)))

    @precondition(lambda self: self.machine._pending)
    @rule(number=st.integers(0, 99))
    def a_pending_task_is_withdrawn(self, number) -> None:
        task = self.pick(number, list(self.machine._pending))
        self.settle(task, "withdrawn")
        self.perform(self.machine.withdrawn(task))

    @rule()
    def nothing_happens(self) -> None:
        """There is always something that can be done."""

    @precondition(lambda self: self.next_task > 5)
    @rule()
    def close(self) -> None:
        self.perform(self.machine.closed())

    # -- promises

    @invariant()
    def each_task_is_in_one_place(self) -> None:
        places = Counter(self.machine._pending)
        for number, worker in self.workers.items():
            here = [*worker.answers, *([] if worker.running is None else [worker.running])]
            here += worker.unread
            state = self.machine._workers.get(number)
            if not self.breaks:
                assert state is not None and list(state.tasks) == here, f"worker {number}"
                places.update(here)
        assert set(places) == self.open and all(n == 1 for n in places.values()), places

    @invariant()
    def nobody_is_idle_while_something_is_pending(self) -> None:
        if self.machine._pending:
            for number, worker in self.workers.items():
                has = worker.answers or worker.unread or worker.running is not None
                assert has or not worker.ready, f"worker {number} is idle"

    @invariant()
    def something_pending_has_a_worker_to_wait_for(self) -> None:
        if self.machine._pending and not self.machine.broken:
            assert self.workers, "nobody will ever run what is pending"

    @invariant()
    def no_task_waits_behind_another_while_a_worker_is_idle(self) -> None:
        workers = self.workers.values()
        if any(w.answers for w in workers):
            return  # what is recalled may have been read meanwhile; the answer will lead to another look
        idle = [w for w in workers if w.ready and not w.unread and w.running is None]
        waiting = [w for w in workers if w.running is not None and w.unread]
        assert not (idle and waiting and self.limit is None)

    @invariant()
    def tasks_are_sent_oldest_first(self) -> None:
        if not self.refusals:
            assert self.sent_first == sorted(self.sent_first)

    @invariant()
    def nobody_runs_more_tasks_than_allowed(self) -> None:
        if self.limit is not None:
            assert all(w.read <= self.limit for w in self.workers.values())

    @invariant()
    def it_stops_when_all_is_done(self) -> None:
        if self.machine.closing and not self.open and not self.breaks:
            assert self.stops == 1

    def teardown(self) -> None:
        """Whatever has happened: workers that get ready and work settle every task, and the machine stops."""
        if not hasattr(self, "machine"):
            return
        self.perform(self.machine.closed())
        for _ in range(20 + 4 * (len(self.open) + len(self.workers))):
            for number, worker in list(self.workers.items()):
                if not worker.ready:
                    worker.ready = True
                    self.perform(self.machine.ready(number))
                worker.read_next()
                if worker.running is not None:
                    worker.answers.append(worker.running)
                    worker.running = None
                while worker.answers:
                    task = worker.answers.popleft()
                    self.settle(task, "answered")
                    self.perform(self.machine.answered(number, task, 1))
            if not self.open:
                break
        assert not self.open, f"never settled: {self.open}"
        assert self.stops == 1 or self.breaks


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(
    max_examples=300, stateful_step_count=40, report_multiple_bugs=False
)
