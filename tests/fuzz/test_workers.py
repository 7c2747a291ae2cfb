"""Workers that misbehave harm nobody but themselves."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from executor_tasks import SOON
from support import wait_until

from shmpool import ShmExecutor, WorkerDiedError
from shmpool.wire.messages import Answer

from .misdeeds import MISDEEDS, Hand
from .rounds import rounds

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MISDEEDS)
def test_what_a_worker_does_harms_its_own_task_only(name: str) -> None:
    with rounds("fork") as played:
        for seed in range(3):
            played.play(name, seed)


def test_nor_with_another_start_method(start_method: str) -> None:
    if start_method == "fork":
        pytest.skip("tried above")
    with rounds(start_method, 1) as played:
        played.play("garbage", 1)
        played.play("everything_is_closed", 2)


def wait_for(file: str) -> str:
    Path(file + ".begun").touch()
    wait_until(lambda: os.path.exists(file), 60, "the file")
    return "my own answer"


def answer_for(number: int) -> None:
    hand = Hand(0)
    hand.send(Answer(number, True, b"\0" + pickle.dumps("forged")))


def test_no_worker_answers_for_another(tmp_path: Path) -> None:
    file = str(tmp_path / "go")
    with ShmExecutor(2, "fork") as executor:
        honest = executor.submit(wait_for, file)
        wait_until(lambda: os.path.exists(file + ".begun"), 60, "the task to begin")
        liar = executor.submit(answer_for, honest.number)
        error = liar.exception(SOON)
        assert isinstance(error, WorkerDiedError)
        assert "was not asked" in str(error)
        Path(file).touch()
        assert honest.result(SOON) == "my own answer"
