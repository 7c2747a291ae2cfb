"""What multiprocessing hands over once: sockets, connections, and whatever else reduces to a descriptor."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing import reduction, resource_sharer
from typing import Any

import pytest

import shmpool
from shmpool.errors import SerializationError
from shmpool.serialize.mainmodule import MainModule
from shmpool.serialize.pickling import (
    ARGUMENTS,
    ARGUMENTS_AGAIN,
    FUNCTION,
    FUNCTION_AGAIN,
    OBJECT,
    PUT,
    RESULT,
    Pickling,
    What,
    loads,
)


@pytest.fixture(params=[0, 1])
def debugging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMPOOL_PICKLE_DEBUG", str(request.param))


@pytest.fixture
def pickling(debugging: None) -> Pickling:
    return Pickling(MainModule.nothing(), lambda _: False)


class Handle:
    """Reduces to a descriptor, by code that nobody knows."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> Any:
        return _opened, (reduction.DupFd(self.fd),)


def _opened(ticket: Any) -> Handle:
    return Handle(ticket.detach())


KINDS: dict[str, Callable[[socket.socket], Any]] = {
    "socket": lambda one: one,
    "connection": lambda one: multiprocessing.connection.Connection(one.detach()),
    "handle": lambda one: Handle(one.detach()),
}


@pytest.fixture(params=KINDS)
def thing(request: pytest.FixtureRequest) -> Iterator[Any]:
    one, other = socket.socketpair()
    made = KINDS[request.param](one)
    with other:
        yield made
    if isinstance(made, Handle):
        os.close(made.fd)
    else:
        made.close()


def state() -> tuple[int, int, int]:
    return (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(resource_sharer._resource_sharer._cache),
    )


def take(*args: Any) -> None:
    del args


@pytest.mark.parametrize("what", [FUNCTION_AGAIN, PUT], ids=["function", "put"])
def test_where_it_would_be_handed_over_several_times_it_is_refused(pickling, thing, what: What):
    before = state()
    with pytest.raises(SerializationError, match="argument of a task without retries") as caught:
        pickling.dumps(functools.partial(take, {"s": thing}), what)
    assert caught.value.culprit.startswith(f"{what.name}.args[0]['s']"), caught.value
    if not isinstance(thing, Handle):  # which does not say so before it has made what is withdrawn
        assert state() == before
    assert state()[2] == before[2]
    resource_sharer.stop()
    assert state() == before


def test_arguments_of_a_task_that_is_run_again_are_refused_too(pickling, thing):
    with pytest.raises(SerializationError, match="handed over once") as caught:
        pickling.dumps(((1, [thing]), {}), ARGUMENTS_AGAIN)
    assert caught.value.culprit.startswith("args[1][0]")
    resource_sharer.stop()


@pytest.mark.parametrize("what", [FUNCTION, RESULT], ids=["function", "result"])
def test_where_it_is_handed_over_once_it_arrives(pickling, thing, what: What):
    stream, _ = pickling.dumps([thing], what)
    (back,) = loads(b"".join(stream), [])
    fd = back.fd if isinstance(back, Handle) else back.fileno()
    assert os.fstat(fd).st_ino
    os.close(back.fd) if isinstance(back, Handle) else back.close()
    resource_sharer.stop()


def test_a_stream_that_is_given_up_leaves_no_descriptor(pickling, thing):
    resource_sharer.stop()
    before = state()
    with pytest.raises(SerializationError, match=r"args\[1\]"):
        pickling.dumps(((thing, threading.Lock()), {}), ARGUMENTS)
    assert state()[2] == 0
    resource_sharer.stop()
    assert state() == before


def test_the_attempt_with_the_other_pickler_leaves_nothing_of_the_first(pickling, thing):
    resource_sharer.stop()
    before = state()
    pickling.dumps(((thing, lambda: 1), {}), ARGUMENTS)
    assert state()[2] == 1
    resource_sharer.stop()
    assert state() == before


def test_who_only_looks_leaves_no_descriptor_and_no_thread(pickling, thing):
    resource_sharer.stop()
    before = state()
    pickling.dumps({"s": thing}, OBJECT)
    assert state() == before
    explanation = shmpool.explain({"s": thing}, quiet=True)
    assert explanation.bytes_inline
    assert state() == before
    ok, failures = shmpool.inspect_serializability({"s": thing}, quiet=True)
    assert ok, failures
    assert state() == before
    ok, failures = shmpool.inspect_serializability([thing, threading.Lock()], quiet=True)
    assert [failure.path for failure in failures] == ["obj[1]"]
    assert state() == before


def test_what_the_user_has_made_to_be_handed_over_is_the_user_s(pickling):
    one, other = socket.socketpair()
    with one, other:
        ticket = reduction.DupFd(one.fileno())
        shmpool.explain([ticket], quiet=True)
        shmpool.inspect_serializability([ticket], quiet=True)
        with pytest.raises(SerializationError):
            pickling.dumps(([ticket, threading.Lock()], {}), ARGUMENTS)
        os.close(ticket.detach())
    resource_sharer.stop()


def test_who_only_looks_ends_no_thread_that_the_user_s_are_waiting_in(pickling):
    one, other = socket.socketpair()
    handle = Handle(one.fileno())
    with one, other:
        ticket = reduction.DupFd(one.fileno())
        before = state()
        shmpool.explain([handle], quiet=True)
        ok, failures = shmpool.inspect_serializability(handle, quiet=True)
        assert ok, failures
        assert state() == before
        os.close(ticket.detach())
    resource_sharer.stop()


def test_a_closed_one_is_named(pickling):
    one, other = socket.socketpair()
    one.close()
    other.close()
    with pytest.raises(SerializationError, match="Bad file descriptor") as caught:
        pickling.dumps((([one],), {}), ARGUMENTS)
    assert caught.value.culprit.startswith("args[0][0]")
    resource_sharer.stop()


def test_a_serializer_of_the_user_s_goes_before(pickling):
    one, other = socket.socketpair()
    with one, other:
        shmpool.register_serializer(socket.socket, serializer=lambda s: s.family, deserializer=str)
        try:
            stream, _ = pickling.dumps([one], PUT)
        finally:
            shmpool.deregister_serializer(socket.socket)
    assert loads(b"".join(stream), []) == [str(socket.AF_UNIX)]
