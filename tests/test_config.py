"""Variables of the environment: each has a meaning, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import shmpool
from shmpool.config import Config

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("SHMPOOL_MEMORY_BACKEND", "disk", "'memfd' or 'file'"),
        ("SHMPOOL_DIRTY_DETECTOR", "guess", "'scan', 'pagemap' or 'none'"),
        ("SHMPOOL_INLINE_LIMIT", "much", "size"),
        ("SHMPOOL_ARENA_MIN", "-1", "at least one byte"),
        ("SHMPOOL_WARM_SECONDS", "soon", "number of seconds"),
        ("SHMPOOL_SPIN_SECONDS", "a while", "number of seconds"),
        ("SHMPOOL_WORKER_THREADS", "-1", "number of threads"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as caught:
        Config.from_env()
    assert repr(value) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("capacity", [True, [1], b"1"])
def test_a_capacity_that_is_neither_a_number_nor_a_string_is_a_type_error(capacity: object) -> None:
    with pytest.raises(TypeError, match="capacity must be a number of bytes"):
        shmpool.ObjectStore(capacity)


def test_the_readme_says_from_which_size_on_buffers_go_through_the_store() -> None:
    limit, rest = divmod(Config().inline_limit, 1024)
    assert not rest
    assert f"**Buffers of {limit} KiB and more go through the store**" in README.read_text("utf-8")


def test_the_readme_says_which_share_of_the_memory_a_store_takes() -> None:
    assert f"by default to {Config().capacity_share:.0%}".replace("%", " %") in " ".join(
        README.read_text("utf-8").split()
    )
