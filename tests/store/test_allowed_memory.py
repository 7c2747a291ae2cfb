"""The default capacity: a share of what the machine and the control groups allow, by files made for the test."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import shmpool
from shmpool.config import Config
from shmpool.store import limits

GIB = 1 << 30
MACHINE = 16 * GIB
V1_UNLIMITED = 0x7FFFFFFFFFFFF000


class System:
    """A machine of 16 GiB, with the control groups that a test writes down."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, path: str, text: str) -> None:
        file = Path(f"{self._folder}{path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def open(self, path: str) -> io.TextIOBase:
        return open(f"{self._folder}{path}")

    @staticmethod
    def sysconf(name: str) -> int:
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": MACHINE // 4096}[name]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(tmp_path)
    monkeypatch.setattr(limits, "open", made.open, raising=False)
    monkeypatch.setattr(limits, "os", SimpleNamespace(sysconf=made.sysconf, path=os.path))
    return made


V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("groups", "files", "allowed"),
    [
        pytest.param("0::/\n", {}, MACHINE, id="no limit"),
        pytest.param("0::/\n", {f"{V2}/memory.max": f"{GIB}\n"}, GIB, id="a container's"),
        pytest.param(
            "0::/a/b\n", {f"{V2}/a/b/memory.max": f"{2 * GIB}\n"}, 2 * GIB, id="its own group's"
        ),
        pytest.param(
            "0::/a/b\n",
            {f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/memory.max": f"{3 * GIB}\n"},
            3 * GIB,
            id="that of the group around it",
        ),
        pytest.param(
            "0::/a/b\n",
            {f"{V2}/a/b/memory.max": f"{5 * GIB}\n", f"{V2}/a/memory.max": f"{3 * GIB}\n"},
            3 * GIB,
            id="the lower of two",
        ),
        pytest.param("0::/a\n", {f"{V2}/a/memory.max": f"{64 * GIB}\n"}, MACHINE, id="more than there is"),
        pytest.param("0::/a\n", {f"{V2}/a/memory.max": "max\n"}, MACHINE, id="max"),
        pytest.param("0::/a\n", {f"{V2}/a/memory.max": "what?\n"}, MACHINE, id="unreadable"),
        pytest.param(
            "3:cpu,cpuacct:/x\n2:memory:/docker/1\n",
            {f"{V1}/docker/1/memory.limit_in_bytes": f"{GIB}\n", f"{V1}/memory.limit_in_bytes": f"{V1_UNLIMITED}\n"},
            GIB,
            id="version 1",
        ),
        pytest.param(
            "2:hugetlb,memory:/\n",
            {f"{V1}/memory.limit_in_bytes": f"{V1_UNLIMITED}\n"},
            MACHINE,
            id="version 1, no limit",
        ),
        pytest.param(
            "4:memory:/a\n0::/b\n",
            {f"{V1}/a/memory.limit_in_bytes": f"{4 * GIB}\n", f"{V2}/b/memory.max": f"{6 * GIB}\n"},
            4 * GIB,
            id="both versions",
        ),
        pytest.param(None, {}, MACHINE, id="no control groups"),
    ],
)  # fmt: skip
def test_a_store_takes_a_share_of_what_is_allowed(
    system: System, groups: str | None, files: dict[str, str], allowed: int
) -> None:
    if groups is not None:
        system.write("/proc/self/cgroup", groups)
    for path, text in files.items():
        system.write(path, text)
    assert limits.allowed_memory() == allowed
    store = shmpool.ObjectStore()
    assert store.capacity == store.stats().capacity == int(0.6 * allowed)
    half = shmpool.ObjectStore(config=Config(capacity_share=0.5))
    assert half.capacity == allowed // 2
    assert shmpool.ObjectStore("1 GiB").capacity == GIB, "what the user says is not looked at"


def test_the_limit_of_a_control_group_is_kept(system: System) -> None:
    system.write("/proc/self/cgroup", "0::/small\n")
    system.write("/sys/fs/cgroup/small/memory.max", str(10 << 20))
    store = shmpool.ObjectStore(spill_dir=False)
    shmpool.put(bytes(5 << 20), store=store)
    with pytest.raises(shmpool.StoreFullError) as caught:
        shmpool.put(bytes(7 << 20), store=store)
    assert caught.value.capacity == int(0.6 * (10 << 20))


def test_executors_and_put_use_a_store_of_the_default_capacity(system: System) -> None:
    system.write("/proc/self/cgroup", "0::/\n")
    system.write("/sys/fs/cgroup/memory.max", str(GIB))
    from shmpool.store.current import get_store, set_store

    set_store(None)
    try:
        assert get_store().capacity == int(0.6 * GIB)
        with shmpool.ShmExecutor(1, "fork") as ex:
            assert ex.stats().store.capacity == int(0.6 * GIB)
    finally:
        set_store(None)


def test_what_this_machine_allows_is_no_more_than_it_has() -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < limits.allowed_memory() <= there
    capacity: Any = shmpool.ObjectStore().capacity
    assert capacity == int(limits.allowed_memory() * Config().capacity_share)
