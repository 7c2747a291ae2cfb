"""Channels of real sockets and pipes, both ends in this process; a child only where a process must die."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from support import fork_while_closing, wait_until

from shmpool.errors import WireError
from shmpool.wire import packets
from shmpool.wire.channel import (
    _FRAME,
    _MARK,
    MAX_PACKET,
    ParentEnd,
    WorkerEnd,
    die_with,
    make_channel,
)


@pytest.fixture
def channel() -> Iterator[tuple[ParentEnd, WorkerEnd]]:
    parent, worker = make_channel()
    yield parent, worker
    parent.close()
    worker.close()


def a_file(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def sent(end: ParentEnd | WorkerEnd, data: bytes, *contents: bytes) -> object:
    """Send a message with a file for each of ``contents``."""
    fds = [a_file(content) for content in contents]
    try:
        return end.send(data, fds)
    finally:
        for fd in fds:
            os.close(fd)


def contents_of(fds: list[int]) -> list[bytes]:
    found = []
    for fd in fds:
        found.append(os.pread(fd, 100, 0))
        os.close(fd)
    return found


def receive_all(parent: ParentEnd, count: int, fds: list[int] | None = None) -> list[bytes]:
    """Read until so many messages are here; their descriptors are added to ``fds``."""
    found: list[bytes] = []

    def enough() -> bool:
        messages, _ = parent.receive()
        found.extend(map(bytes, messages))
        if fds is not None and messages:
            fds.extend(parent.descriptors.take(len(parent.descriptors)))
        return len(found) >= count

    wait_until(enough, 60, f"{count} messages")
    return found


# ---------------------------------------------------------------- parent to worker


def test_calls_arrive_in_order_each_as_one_message(channel):
    parent, worker = channel
    for number in range(20):
        assert parent.send(b"x" * number + b"%d" % number)
    for number in range(20):
        message = worker.receive()
        assert message is not None and bytes(message) == b"x" * number + b"%d" % number


def test_a_call_as_long_as_is_allowed_arrives_whole(channel):
    parent, worker = channel
    data = os.urandom(MAX_PACKET)
    assert parent.send(data)
    message = worker.receive()
    assert message is not None and bytes(message) == data


def test_a_call_that_no_socket_takes_is_an_error_and_not_a_full_socket(channel):
    parent, _ = channel
    with pytest.raises(OSError, match="too long"):
        parent.send(bytes(1 << 20))


def test_a_call_that_is_longer_than_the_workers_buffer_is_a_wire_error(channel):
    parent, worker = channel
    assert parent.send(bytes(MAX_PACKET + 1))
    with pytest.raises(WireError, match="cut short"):
        worker.receive()


def test_a_full_socket_refuses_and_takes_again_when_something_was_read(channel):
    parent, worker = channel
    count = 0
    while parent.send(bytes(50_000)):
        count += 1
        assert count < 100
    assert not parent.send(bytes(50_000)), "as long as nobody reads"
    for _ in range(count):
        worker.receive()
    assert parent.send(bytes(50_000))


@pytest.mark.parametrize("at_once", [True, False], ids=["sendmmsg", "one by one"])
def test_of_many_calls_those_are_sent_for_which_there_is_room(channel, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr(packets, "_sendmmsg", None)  # as on 32-bit systems
    parent, worker = channel
    calls = [b"%d" % i + bytes(3000) for i in range(1000)]
    count = parent.send_many(calls)
    assert 0 < count < len(calls)
    assert parent.send_many(calls[count:]) == 0
    for call in calls[:count]:
        assert bytes(worker.receive()) == call
    assert parent.send_many(calls[count : count + 2]) == 2


@pytest.mark.parametrize("before", [0, 1, 2, 70])
def test_one_of_many_calls_that_cannot_be_sent_is_an_error_when_it_is_the_first(channel, before):
    parent, worker = channel
    calls = [b"%d" % i for i in range(before)]
    too_long = bytes(10 * MAX_PACKET)
    if before:
        assert parent.send_many([*calls, too_long, b"after"]) == before
    with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
        parent.send_many([too_long, b"after"])
    assert [bytes(worker.receive()) for _ in calls] == calls
    parent.end_of_calls()
    with pytest.raises(BrokenPipeError):
        parent.send_many([b"1", b"2"])


def test_descriptors_arrive_with_their_calls(channel):
    parent, worker = channel
    sent(parent, b"two", b"a", b"b")
    parent.send(b"none")
    sent(parent, b"one", b"c")
    assert bytes(worker.receive()) == b"two"
    assert contents_of(worker.descriptors.take(2)) == [b"a", b"b"]
    assert bytes(worker.receive()) == b"none"
    assert bytes(worker.receive()) == b"one"
    assert contents_of(worker.descriptors.take(1)) == [b"c"]


def test_descriptors_that_have_not_come_are_a_wire_error(channel):
    parent, worker = channel
    sent(parent, b"one", b"a")
    worker.receive()
    with pytest.raises(WireError, match="2 descriptors, of which 1"):
        worker.descriptors.take(2)


def test_a_worker_that_does_not_wait_for_a_message_learns_that_none_is_there(channel):
    parent, worker = channel
    with pytest.raises(BlockingIOError):
        worker.receive(wait=False)
    sent(parent, b"one", b"a")
    assert bytes(worker.receive(wait=False)) == b"one"
    assert contents_of(worker.descriptors.take(1)) == [b"a"]
    with pytest.raises(BlockingIOError):
        worker.receive(wait=False)
    parent.end_of_calls()
    assert worker.receive(wait=False) is None


def test_the_worker_reads_what_was_sent_before_the_end_of_calls(channel):
    parent, worker = channel
    parent.send(b"last")
    parent.end_of_calls()
    assert bytes(worker.receive()) == b"last"
    assert worker.receive() is None
    assert worker.receive() is None, "the end stays the end"


def test_the_worker_sees_the_end_when_the_parent_has_closed(channel):
    parent, worker = channel
    parent.close()
    assert worker.receive() is None


# ---------------------------------------------------------------- taking back


def test_what_is_taken_back_is_the_oldest_and_the_worker_gets_the_rest(channel):
    parent, worker = channel
    for name in (b"1", b"2", b"3", b"4"):
        parent.send(name)
    assert bytes(worker.receive()) == b"1"
    assert parent.take_back() == b"2"
    assert parent.take_back() == b"3"
    assert bytes(worker.receive()) == b"4"
    assert parent.take_back() is None


def test_descriptors_go_with_what_is_taken_back(channel):
    parent, worker = channel
    sent(parent, b"1", b"a")
    sent(parent, b"2", b"b")
    assert parent.take_back() == b"1"
    assert bytes(worker.receive()) == b"2"
    assert contents_of(worker.descriptors.take(1)) == [b"b"]


def test_what_a_dead_worker_had_not_read_can_be_taken_back(channel):
    parent, worker = channel
    parent.send(b"1")
    parent.send(b"2")
    worker.receive()
    worker.close()
    assert parent.send(b"3"), "its death need not be known yet"
    assert parent.take_back() == b"2"
    assert parent.take_back() == b"3"
    assert parent.take_back() is None


def test_nothing_is_left_to_take_back_after_the_end_of_calls(channel):
    parent, _ = channel
    parent.send(b"1")
    parent.end_of_calls()
    assert parent.take_back() == b"1"
    assert parent.take_back() is None


def test_each_call_is_read_once_also_when_both_read_at_the_same_time(channel):
    parent, worker = channel
    count = 100  # more do not fit
    for number in range(count):
        assert parent.send(b"%d" % number)
    parent.end_of_calls()
    read: list[bytes] = []

    def work() -> None:
        while (message := worker.receive()) is not None:
            read.append(bytes(message))

    thread = threading.Thread(target=work)
    thread.start()
    taken = []
    while (data := parent.take_back()) is not None:
        taken.append(data)
    thread.join()
    assert sorted(map(int, read + taken)) == list(range(count))
    assert list(map(int, read)) == sorted(map(int, read))


# ---------------------------------------------------------------- worker to parent


def test_answers_arrive_in_order_many_in_one_read(channel):
    parent, worker = channel
    for number in range(50):
        worker.send(b"%d" % number)
    messages, more = parent.receive()
    assert [bytes(m) for m in messages] == [b"%d" % number for number in range(50)] and more


def test_no_answer_is_no_end(channel):
    parent, _ = channel
    assert parent.receive() == ([], None)


def test_an_answer_of_no_bytes_is_an_answer(channel):
    parent, worker = channel
    worker.send(b"")
    worker.send(b"x")
    assert [bytes(m) for m in parent.receive()[0]] == [b"", b"x"]


def test_an_answer_that_comes_in_pieces_is_put_together(channel):
    parent, worker = channel
    data = os.urandom(1000)
    framed = _FRAME.pack(len(data), len(data) ^ _MARK) + data
    pieces = [framed[:2], framed[2:9], framed[9:900], framed[900:] + framed[:3], framed[3:]]
    got = []
    for piece in pieces:
        worker._answers.sendall(piece)
        messages, more = parent.receive()
        got.append([bytes(m) for m in messages])
        assert more
    assert got == [[], [], [], [data], [data]]


@pytest.mark.parametrize("with_descriptor", [False, True])
def test_an_answer_that_is_larger_than_all_buffers_arrives_whole(channel, with_descriptor):
    parent, worker = channel
    data = os.urandom(3_000_000)

    def work() -> None:
        worker.send(b"before")
        if with_descriptor:
            sent(worker, data, b"a")
        else:
            worker.send(data)
        worker.send(b"after")

    thread = threading.Thread(target=work)
    thread.start()
    fds: list[int] = []
    assert receive_all(parent, 3, fds) == [b"before", data, b"after"]
    thread.join()
    assert contents_of(fds) == [b"a"] * with_descriptor
    worker.send(b"short again")
    assert receive_all(parent, 1) == [b"short again"]


def test_descriptors_are_here_when_their_answers_are(channel):
    parent, worker = channel
    sent(worker, b"1", b"a", b"b")
    worker.send(b"2")
    sent(worker, b"3", b"c")
    sent(worker, b"4", b"d")
    wanted = {b"1": 2, b"3": 1, b"4": 1}
    found = []
    while len(found) < 4:
        for message in parent.receive()[0]:
            name = bytes(message)
            found.append((name, contents_of(parent.descriptors.take(wanted.get(name, 0)))))
    assert found == [(b"1", [b"a", b"b"]), (b"2", []), (b"3", [b"c"]), (b"4", [b"d"])]


def test_the_end_of_answers_is_seen_after_the_last_one(channel):
    parent, worker = channel
    worker.send(b"last")
    worker.close()
    messages, _ = parent.receive()
    assert [bytes(m) for m in messages] == [b"last"]
    assert parent.receive() == ([], False)


@pytest.mark.parametrize("length", [(1 << 28) + 1, (1 << 32) - 1])
def test_an_answer_that_claims_to_be_huge_is_a_wire_error(channel, length):
    parent, worker = channel
    worker._answers.sendall(_FRAME.pack(length, length ^ _MARK))
    with pytest.raises(WireError, match="claims"):
        parent.receive()


@pytest.mark.parametrize("before", [b"", b"!", b"123", b"1234", b"12345678", b"a line of text\n"])
def test_what_else_gets_into_the_answers_is_a_wire_error_and_not_waited_for(channel, before):
    parent, worker = channel
    worker._answers.sendall(before)
    worker.send(b"answer")
    if not before:
        assert [bytes(m) for m in parent.receive()[0]] == [b"answer"]
        return
    with pytest.raises(WireError):
        parent.receive()


def test_answers_before_something_wrong_count(channel):
    parent, worker = channel
    worker.send(b"1")
    worker.send(b"2")
    worker._answers.sendall(b"something wrong")
    messages, _ = parent.receive()
    assert [bytes(m) for m in messages] == [b"1", b"2"]
    assert "claims" in parent.problem


def test_descriptors_that_no_message_speaks_of_are_a_wire_error(channel):
    parent, worker = channel
    sent(worker, b"1", b"a")
    parent.receive()
    with pytest.raises(WireError, match="1 descriptors that no message"):
        parent.receive()


def test_descriptors_may_come_with_the_beginning_of_a_message(channel):
    parent, worker = channel
    fd = a_file(b"a")
    framed = _FRAME.pack(3, 3 ^ _MARK) + b"abc"
    socket.send_fds(worker._answers, [framed[:5]], [fd])
    assert parent.receive() == ([], 5)
    assert parent.receive() == ([], None)
    worker._answers.sendall(framed[5:])
    assert [bytes(m) for m in parent.receive()[0]] == [b"abc"]
    os.close(fd)
    assert contents_of(parent.descriptors.take(1)) == [b"a"]


def test_descriptors_without_end_are_a_wire_error(channel):
    parent, worker = channel
    fd = a_file(b"a")
    framed = _FRAME.pack(1000, 1000 ^ _MARK) + bytes(1000)
    for i in range(2):
        socket.send_fds(worker._answers, [framed[i : i + 1]], [fd] * 200)
    os.close(fd)
    parent.receive()
    with pytest.raises(WireError, match="400 descriptors"):
        parent.receive()


@pytest.mark.parametrize(
    ("to_worker", "whose"), [(True, "its worker"), (False, "this process")], ids=["call", "answer"]
)
def test_descriptors_for_which_there_is_no_room_are_a_wire_error(channel, to_worker, whose):
    sender, receiver = channel if to_worker else reversed(channel)
    sent(sender, b"1", b"a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(WireError, match=f"were lost: {whose} may open no more"):
            receiver.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not len(receiver.descriptors)


def test_a_worker_whose_parent_is_gone_is_told(channel):
    parent, worker = channel
    parent.close()
    with pytest.raises(OSError, match="Broken pipe"):
        worker.send(b"x" * 1000)


# ---------------------------------------------------------------- life and death


def test_ends_can_be_closed_twice_and_close_what_nobody_asked_for():
    before = len(os.listdir("/proc/self/fd"))
    parent, worker = make_channel()
    sent(worker, b"1", b"a")
    sent(parent, b"1", b"a")
    parent.receive()
    worker.receive()
    for end in (parent, worker):
        end.close()
        end.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_forked_while_a_channel_is_closed_closes_nothing_twice(channel, monkeypatch):
    for end in channel:
        assert fork_while_closing(end.close, monkeypatch) == [0]


def test_no_descriptor_of_a_channel_is_inherited_through_exec(channel):
    parent, worker = channel
    fds = [worker.lifeline, parent._lifeline]
    fds += [s.fileno() for s in (parent._calls, parent._unread, parent.answers)]
    fds += [s.fileno() for s in (worker.calls, worker._answers)]
    assert not any(map(os.get_inheritable, fds))
    sent(parent, b"1", b"a")
    sent(worker, b"1", b"a")
    parent.receive()
    worker.receive()
    for descriptors in (parent.descriptors, worker.descriptors):
        (fd,) = descriptors.take(1)
        assert not os.get_inheritable(fd)
        os.close(fd)


def forked(work) -> int:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return pid


def ended_by(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def busy_in_c(parent: ParentEnd, worker: WorkerEnd, started: int) -> None:
    parent.close()
    die_with(worker.lifeline)
    os.write(started, b"!")
    sum(range(10**12))


def test_a_worker_that_is_busy_in_compiled_code_is_killed_when_its_parent_closes(channel):
    parent, worker = channel
    started, started_out = os.pipe()
    pid = forked(lambda: busy_in_c(parent, worker, started_out))
    os.close(started_out)
    assert os.read(started, 1) == b"!"
    os.close(started)
    parent.close()
    assert ended_by(pid) == -signal.SIGKILL


def test_a_worker_whose_parent_is_gone_before_it_asks_is_killed(channel):
    parent, worker = channel
    go, go_out = os.pipe()

    def work() -> None:
        parent.close()
        os.read(go, 1)
        die_with(worker.lifeline)
        select.select([], [], [], 30)

    pid = forked(work)
    parent.close()
    os.write(go_out, b"!")
    os.close(go)
    os.close(go_out)
    assert ended_by(pid) == -signal.SIGKILL


def test_a_worker_lives_on_while_somebody_holds_the_other_end(channel):
    parent, worker = channel
    kept = os.dup(parent._lifeline)

    def work() -> None:
        os.close(kept)
        parent.close()
        die_with(worker.lifeline)
        message = worker.receive()
        worker.send(bytes(message or b"nothing"))

    pid = forked(work)
    os.close(parent._lifeline)
    parent._lifeline = -1
    parent.send(b"hello")
    assert receive_all(parent, 1) == [b"hello"]
    assert ended_by(pid) == 0
    os.close(kept)


def test_a_channel_that_cannot_be_made_leaves_nothing_behind(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))

    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", no_pipe)
    with pytest.raises(OSError, match="Too many"):
        make_channel()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_workers_end_can_be_taken_apart_and_put_together(channel):
    parent, worker = channel
    calls, answers, lifeline = worker.parts()
    other = WorkerEnd(
        socket.socket(fileno=os.dup(calls.fileno())),
        socket.socket(fileno=os.dup(answers.fileno())),
        os.dup(lifeline),
    )
    parent.send(b"hello")
    assert bytes(other.receive()) == b"hello"
    other.close()
