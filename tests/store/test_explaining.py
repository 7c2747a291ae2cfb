"""`shmpool.explain` knows what is in the store."""

from __future__ import annotations

import numpy as np
import pytest

from shmpool.errors import RefError
from shmpool.store import explaining
from shmpool.store.explaining import explain
from shmpool.store.refs import put
from shmpool.store.store import ObjectStore, travelling


@pytest.fixture
def store():
    return ObjectStore("64 MB")


def test_what_came_out_of_the_store_is_shared_and_its_slices_are(store):
    ref = put({"a": np.arange(100_000.0)}, store=store)
    stored = ref.get()["a"]
    other = np.arange(100_000.0)
    explanation = explain({"slice": stored[50_000:], "other": other}, store=store, quiet=True)
    assert {part.path: part.how for part in explanation.parts[:-1]} == {
        "obj['slice']": "shared",
        "obj['other']": "copied",
    }
    assert explanation.bytes_shared == stored.nbytes // 2
    assert explanation.bytes_copied == other.nbytes


def test_nothing_is_written_into_the_store(store):
    before = store.stats()
    explain([np.zeros(1_000_000)], store=store, quiet=True)
    assert store.stats() == before


def test_a_ref_inside_is_a_few_bytes(store):
    ref = put(np.zeros(1_000_000), store=store)
    explanation = explain({"ref": ref}, store=store, quiet=True)
    assert explanation.bytes_copied == 0
    assert explanation.bytes_inline < 1000
    assert travelling.carried is None
    del explanation
    assert store.live_blocks() == 1
    with pytest.raises(RefError):
        ref.__reduce__()


def test_the_process_wide_store_is_the_default(store, monkeypatch, capsys):
    monkeypatch.setattr(explaining, "get_store", lambda: store)
    stored = put(np.arange(100_000.0), store=store).get()
    explain(stored)
    out = capsys.readouterr().out
    assert out.startswith("800,000  shared  obj  numpy.ndarray  in the store already")
    assert "800,000 bytes shared, 0 copied" in out
