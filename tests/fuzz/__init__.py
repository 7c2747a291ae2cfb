"""Lies and garbage: what comes through the wire and out of the store is not what an honest worker sends.

``test_bytes.py``
    The codecs, by hypothesis: whatever the bytes are, a message or a payload comes out, or a ``WireError``.
``test_store.py``
    A parent's store that is told things by a peer: it believes, or raises ``WireError``, and its books stay right.
``test_workers.py``
    Real workers that misbehave in the middle of a task (``misdeeds.py``): the task may fail and the worker die; all
    other tasks give their results, and nothing is left behind.

``python -m tests.fuzz --minutes 30 --seed 1`` goes on with the last for as long as one likes.

The tests' folder is on the path when these modules are imported: workers find the misdeeds as ``fuzz.misdeeds``.
"""
