"""Random lives of a pool: the state machine with a trivial model of the driver, the workers and the sockets around it.

The model does what the driver does with the actions it is given, and lets happen what can happen: workers get ready,
read, run, answer and die; sockets are full; tasks are cancelled, run out of time, are ended; time passes; the number of
workers changes. Then the machine's promises are looked at, which are the invariants below.
"""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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

pytestmark = pytest.mark.slow


class _ModelTask:
    def __init__(self, timed: bool, retries: int) -> None:
        self.timed = timed
        self.retries = retries
        self.doomed = False


class _ModelWorker:
    def __init__(self) -> None:
        self.ready = False
        self.killed = False
        self.running: int | None = None
        self.unread: deque[int] = deque()
        self.answers: deque[int] = deque()  # on their way to the parent
        self.read = 0
        self.sweeps = 0  # that found it idle, without a task in between

    @property
    def queue(self) -> list[int]:
        """What was sent and is not answered, as far as the parent knows; oldest first."""
        return [*self.answers, *([] if self.running is None else [self.running]), *self.unread]

    @property
    def idle(self) -> bool:
        return self.ready and not self.queue and not self.killed

    def read_next(self) -> None:
        if self.ready and not self.killed and self.running is None and self.unread:
            self.running = self.unread.popleft()
            self.read += 1

    def work(self) -> None:
        self.read_next()
        if self.running is not None and not self.killed:
            self.answers.append(self.running)
            self.running = None
        self.read_next()

    def take_back(self, most: int = 1 << 30) -> list[int]:
        return [self.unread.popleft() for _ in range(min(most, len(self.unread)))]


class RandomLives(RuleBasedStateMachine):
    """The driver, workers and sockets as a model; the machine must keep its promises whatever happens to them."""

    @initialize(
        workers=st.integers(1, 4),
        limit=st.sampled_from([None, None, 1, 2, 3]),
        start_all=st.booleans(),
        ahead=st.sampled_from([(1, 1), (1, 4), (0, 0), (3, 8)]),
        room=st.sampled_from([1, 2, 100]),
        short=st.booleans(),
    )
    def make(self, workers, limit, start_all, ahead, room, short) -> None:
        self.machine = Machine(workers, limit, start_all, *ahead, 1000)
        if short:  # as after many tasks that took no time: dozens of steps, else
            self.machine._microseconds = 1.0
            self.machine._ahead = ahead[1]
        self.max_workers, self.limit, self.room = workers, limit, room
        self.workers: dict[int, _ModelWorker] = {}
        self.tasks: dict[int, _ModelTask] = {}
        self.open: set[int] = set()
        self.cancelled: set[int] = set()
        self.settled: dict[int, str] = {}
        self.watched: set[int] = set()
        self.answered_late: set[int] = (
            set()
        )  # when their time was over, they had just been answered
        self.lost: list[int] = []  # by the worker that has just died
        self.sent_first: list[int] = []
        self.refusals = self.stops = self.breaks = 0
        self.perform(self.machine.started())

    # -- the driver

    def perform(self, actions: list[Action]) -> None:
        todo, done = deque(actions), 0
        while todo:
            done += 1
            assert done < 200 + 20 * len(self.open), "one event must lead to an end of actions"
            if isinstance(todo[0], Send):
                self.send(todo)
                continue
            action = todo.popleft()
            if isinstance(action, Start):
                assert action.worker not in self.workers
                self.workers[action.worker] = _ModelWorker()
                assert len(self.workers) <= self.max_workers
            elif isinstance(action, Recall):
                worker = self.workers[action.worker]
                worker.read_next()
                todo.extend(self.recalled(action.worker, worker.take_back(action.most)))
            elif isinstance(action, Retire):
                assert not self.workers.pop(action.worker).queue
            elif isinstance(action, Fail):
                self.fail(action)
            elif isinstance(action, Again):
                task = self.tasks[action.task]
                self.lost.remove(action.task)
                assert task.retries > 0 and not task.doomed
                task.retries -= 1
                self.watched.discard(action.task)
            elif isinstance(action, Watch):
                assert self.tasks[action.task].timed
                if any(action.task in w.queue for w in self.workers.values()):  # else refused
                    self.watched.add(action.task)
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
            else:
                pytest.fail(f"not known to the driver: {action}")

    def send(self, todo: deque[Action]) -> None:
        """All sends that come next, together, as far as there is room."""
        batches: dict[int, list[int]] = {}
        while todo and isinstance(send := todo[0], Send):
            todo.popleft()
            worker = self.workers[send.worker]
            assert worker.ready, "a worker is sent tasks when it is ready"
            assert not worker.killed, "and not when it is being killed"
            assert send.task in self.open, "a task that is settled is not sent"
            worker.sweeps = 0
            if send.task in self.cancelled:
                self.settle(send.task, "cancelled")
                todo.extend(self.machine.dropped(send.worker, send.task))
            else:
                batches.setdefault(send.worker, []).append(send.task)
        for number, batch in batches.items():
            worker = self.workers[number]
            while batch and len(worker.unread) < self.room:
                task = batch.pop(0)
                if task not in self.sent_first:
                    self.sent_first.append(task)
                worker.unread.append(task)
            for task in reversed(batch):
                self.refusals += 1
                todo.extend(self.machine.refused(number, task))

    def recalled(self, number: int, taken: list[int], unwanted: int | None = None) -> list[Action]:
        self.watched -= set(taken)
        return self.machine.recalled(number, taken, unwanted)

    def fail(self, action: Fail) -> None:
        if action.worker is not None:
            task = self.tasks[action.task]
            self.lost.remove(action.task)
            assert task.doomed or not task.retries, "it could have been run again"
        self.settle(action.task, "failed")

    def settle(self, task: int, how: str) -> None:
        assert task not in self.settled, f"{task} is settled twice: {self.settled[task]}, {how}"
        self.settled[task] = how
        self.open.remove(task)
        self.watched.discard(task)

    def pick(self, number: int, among: list[int]) -> int:
        return among[number % len(among)]

    def arrive(self, number: int, count: int, microseconds: int) -> None:
        """The first answers of a worker, together."""
        answers = self.workers[number].answers
        tasks = [answers.popleft() for _ in range(min(count, len(answers)))]
        for task in tasks:
            self.settle(task, "answered")
        self.perform(self.machine.answered_all(number, [(task, microseconds) for task in tasks]))

    def die(self, number: int, microseconds: int = 1) -> None:
        if self.workers[number].answers:
            self.arrive(number, 1000, microseconds)
        worker = self.workers.pop(number, None)
        if worker is None:  # retired since
            return
        unread = worker.take_back()
        self.watched -= set(unread)
        self.lost = [] if worker.running is None else [worker.running]
        self.perform(self.machine.died(number, unread))
        assert not self.lost, f"nothing was said of {self.lost}"

    # -- events

    @precondition(lambda self: not self.machine.closing)
    @rule(count=st.integers(1, 5), timed=st.booleans(), retries=st.sampled_from([0, 0, 1, 3]))
    def submit(self, count, timed, retries) -> None:
        for _ in range(count):
            number = len(self.tasks)
            self.tasks[number] = _ModelTask(timed, retries)
            self.open.add(number)
            self.perform(self.machine.submitted(number, timed, retries))

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
        for _ in range(count):
            self.workers[self.pick(number, busy)].work()

    @precondition(lambda self: any(w.answers for w in self.workers.values()))
    @rule(
        number=st.integers(0, 99),
        count=st.integers(1, 4),
        microseconds=st.sampled_from([1, 100, 10_000_000]),
    )
    def answers_arrive(self, number, count, microseconds) -> None:
        number = self.pick(number, [n for n, w in self.workers.items() if w.answers])
        self.arrive(number, count, microseconds)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 99), microseconds=st.sampled_from([1, 10_000_000]))
    def a_worker_dies(self, number, microseconds) -> None:
        self.die(self.pick(number, list(self.workers)), microseconds)

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

    @precondition(lambda self: any(w.unread for w in self.workers.values()))
    @rule(number=st.integers(0, 99), which=st.integers(0, 99))
    def a_task_that_was_sent_ahead_is_cancelled(self, number, which) -> None:
        number = self.pick(number, [n for n, w in self.workers.items() if w.unread])
        unread = self.workers[number].take_back()
        unwanted = self.pick(which, unread)
        self.settle(unwanted, "cancelled")
        self.perform(self.recalled(number, unread, unwanted))

    @precondition(lambda self: self.watched)
    @rule(number=st.integers(0, 99), reads=st.booleans())
    def the_time_of_a_task_is_over(self, number, reads) -> None:
        task = self.pick(number, sorted(self.watched))
        ((number, worker),) = [(n, w) for n, w in self.workers.items() if task in w.queue]
        self.watched.discard(task)
        if reads:
            worker.read_next()
        unread = worker.take_back()
        if self.machine.is_running(number, task, unread):
            self.doom(number, task)
        elif task not in unread:
            assert task in worker.answers, "it runs, and is not ended"
            self.answered_late.add(task)
        if unread:
            self.perform(self.recalled(number, unread))

    @precondition(lambda self: any(w.running is not None for w in self.workers.values()))
    @rule(number=st.integers(0, 99))
    def a_running_task_is_ended(self, number) -> None:
        number = self.pick(number, [n for n, w in self.workers.items() if w.running is not None])
        self.doom(number, self.workers[number].running)

    def doom(self, number: int, task: int) -> None:
        self.tasks[task].doomed = self.workers[number].killed = True
        self.machine.doomed(task)
        self.machine.condemned(number)

    @precondition(lambda self: self.workers)
    @rule(number=st.integers(0, 99))
    def a_worker_is_of_no_more_use(self, number) -> None:
        number = self.pick(number, list(self.workers))
        self.workers[number].killed = True
        self.machine.condemned(number)

    @rule(times=st.sampled_from([1, 1, 2, SWEEPS, SWEEPS + 1]))
    def some_time_passes(self, times) -> None:
        for _ in range(times):
            leave = {n for n, w in self.workers.items() if w.idle and w.sweeps >= SWEEPS}
            for worker in self.workers.values():
                worker.sweeps += worker.idle
            before = set(self.workers)
            self.perform(self.machine.swept())
            if not self.breaks:  # else the driver ends them
                assert before - set(self.workers) == leave

    @rule(workers=st.integers(1, 4))
    def resize(self, workers) -> None:
        self.max_workers = workers
        self.perform(self.machine.resized(workers))

    @precondition(lambda self: len(self.tasks) > 5)
    @rule()
    def close(self) -> None:
        self.perform(self.machine.closed())

    # -- promises

    @invariant()
    def each_task_is_in_one_place(self) -> None:
        places = Counter(self.machine._pending)
        for number, worker in self.workers.items():
            state = self.machine._workers.get(number)
            if not self.breaks:
                assert state is not None and list(state.tasks) == worker.queue, f"worker {number}"
                places.update(worker.queue)
        assert set(places) == self.open and all(n == 1 for n in places.values()), places

    @invariant()
    def what_is_sent_is_counted(self) -> None:
        workers = self.machine._workers.values()
        assert self.machine._sent == sum(len(worker.tasks) for worker in workers)
        assert all(worker.assigned >= len(worker.tasks) for worker in workers)

    @invariant()
    def nobody_is_idle_while_something_is_pending(self) -> None:
        if self.machine._pending:
            assert not [n for n, w in self.workers.items() if w.idle]

    @invariant()
    def nobody_is_idle_while_there_are_too_many(self) -> None:
        if not self.breaks and len(self.workers) > self.max_workers:
            assert not [n for n, w in self.workers.items() if w.idle]

    @invariant()
    def something_pending_has_a_worker_to_wait_for(self) -> None:
        if self.machine._pending and not self.machine.broken:
            assert self.workers, "nobody will ever run what is pending"

    @invariant()
    def no_task_waits_behind_another_while_a_worker_is_idle(self) -> None:
        workers = self.workers.values()
        if any(w.answers for w in workers):
            return  # what is recalled may have been read meanwhile; the answer will lead to another look
        idle = [w for w in workers if w.idle]
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
    def the_clock_runs_for_those_that_are_first_in_a_queue(self) -> None:
        if not self.breaks:
            first = {w.queue[0] for w in self.workers.values() if w.queue}
            over = {task for task in first if self.tasks[task].doomed} | self.answered_late
            timed = {task for task in first if self.tasks[task].timed}
            assert timed - over <= self.watched <= timed

    @invariant()
    def nothing_is_kept_of_what_is_settled(self) -> None:
        assert self.machine._timed <= self.open
        assert self.machine._retries.keys() <= self.open

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
                if worker.killed:
                    self.die(number)
                    continue
                if not worker.ready:
                    worker.ready = True
                    self.perform(self.machine.ready(number))
                worker.work()
                if worker.answers:
                    self.arrive(number, 1, 1)
            if not self.open:
                break
        assert not self.open, f"never settled: {self.open}"
        assert self.stops == 1 or self.breaks


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(
    max_examples=300, stateful_step_count=40, report_multiple_bugs=False
)
