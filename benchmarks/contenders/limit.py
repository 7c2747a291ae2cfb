"""What the machine allows: no pool can be faster, unless it moves less than is said here.

The bound of a work is the same work done in this process, plus what no process pool can avoid:

* one bare round trip over a socketpair to another process (a byte each way, or as many as travel
  inside the message), without any serialisation, thread or future;
* pickling and unpickling what is passed, large buffers left out (protocol 5);
* one memcpy (`np.copyto` onto warm memory) of every large buffer that is not shared yet, in two
  threads if it is very large: one does not use all of the memory's bandwidth.

A map over large arrays runs on as many threads as there are workers: numpy lets go of the
interpreter lock, so this is the parallel work on shared memory itself.
"""

import contextlib
import itertools
import os
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .base import Contender

INLINE = 100_000  # bytes: what is smaller travels in the message
LARGE = 16_000_000  # bytes: what is smaller is copied as fast by one thread


class Inline(Contender):
    """The same work without any pool, in one process and one thread."""

    name, title = "inline", "one process"

    def start(self):
        pass

    def close(self):
        pass

    def call(self, fn, *args):
        return fn(*args)

    def map(self, fn, items):
        return [fn(item) for item in items]

    @contextlib.contextmanager
    def scikit_learn(self):
        from threadpoolctl import threadpool_limits  # scikit-learn needs it

        with threadpool_limits(1):
            yield


class Limit(Contender):
    name = title = "limit"

    def start(self):
        self.socket, theirs = socket.socketpair()
        self.child = os.fork()
        if self.child == 0:
            try:
                self.socket.close()
                _echo(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self.threads = None
        self.warm = {}  # size -> memory that was written before, in turns of two

    def call(self, fn, *args):
        value, inline, _ = self._carry((fn, args))
        self.ping(inline)
        fn, args = value
        return self._carry(fn(*args))[0]

    def map(self, fn, items):
        value, inline, large = self._carry((fn, list(items)))
        self.ping(inline)
        fn, items = value
        in_threads = large > len(items) * 1_000_000
        results = self._in_threads(fn, items) if in_threads else [fn(item) for item in items]
        return self._carry(results)[0]

    def close(self):
        self.socket.close()
        os.waitpid(self.child, 0)

    def ping(self, nbytes):
        """Send so many bytes to the other process and wait for one in return."""
        count = nbytes if nbytes < INLINE else 1
        self.socket.sendall(count.to_bytes(8, "little") + bytes(count))
        self.socket.recv(1)

    def copy(self, raw, parts=1):
        """Copy bytes onto warm memory, in so many threads, and return that."""
        # Two in turn: a result has to stay while the task that it is passed to makes the next.
        turns = self.warm.get(raw.nbytes)
        if turns is None:
            turns = self.warm[raw.nbytes] = [np.ones(raw.nbytes, np.uint8) for _ in range(2)]
        turns.reverse()
        cuts = [raw.nbytes * part // parts for part in range(parts + 1)]
        pieces = [slice(*cut) for cut in itertools.pairwise(cuts)]
        if parts == 1:
            np.copyto(turns[0], raw)
        else:
            self._in_threads(lambda piece: np.copyto(turns[0][piece], raw[piece]), pieces)
        return turns[0]

    def _in_threads(self, fn, items):
        self.threads = self.threads or ThreadPoolExecutor(self.workers)
        return list(self.threads.map(fn, items))

    def _carry(self, value):
        """Pickle, copy what is large and new, unpickle; with the bytes that are small and large."""
        buffers = []
        pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        placed, inline, large = [], len(pickled), 0
        for buffer in buffers:
            raw = np.frombuffer(buffer.raw(), np.uint8)
            if raw.nbytes < INLINE:
                inline += raw.nbytes
                placed.append(raw.copy())
            else:
                large += raw.nbytes
                placed.append(
                    raw if self._is_shared(raw) else self.copy(raw, 2 if raw.nbytes >= LARGE else 1)
                )
        return pickle.loads(pickled, buffers=placed), inline, large

    def _is_shared(self, raw):
        return any(np.may_share_memory(raw, memory) for t in self.warm.values() for memory in t)


def _echo(sock):
    buffer = memoryview(bytearray(INLINE + 8))
    while True:
        received = sock.recv_into(buffer)
        if not received:
            return
        expected = int.from_bytes(buffer[:8], "little") + 8
        while received < expected:
            received += sock.recv_into(buffer[received:])
        sock.send(b"x")
