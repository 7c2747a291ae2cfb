"""What test_install.py runs in other processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.pool
from collections.abc import Callable
from typing import Any


def seen() -> dict[str, bool]:
    """For each name that install() replaces: is it shmpool's?"""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {
        "multiprocessing.Pool": multiprocessing.Pool.__func__,
        "context.Pool": context.Pool.__func__,
        "multiprocessing.pool.Pool": multiprocessing.pool.Pool,
        "concurrent.futures": concurrent.futures.ProcessPoolExecutor,
        "concurrent.futures.process": concurrent.futures.process.ProcessPoolExecutor,
    }
    return {name: thing.__module__.startswith("shmpool.") for name, thing in found.items()}


def everything_is_replaced() -> bool:
    return all(seen().values())


def nothing_is_replaced() -> bool:
    return not any(seen().values())


def send_answer(connection: Any, question: Callable[[], object]) -> None:
    connection.send(question())


def ask_child(connection: Any, method: str, question: Callable[[], object]) -> None:
    """Ask a process that this process starts."""
    connection.send(answer_of_child(method, question))


def answer_of_child(method: str, question: Callable[[], object]) -> object:
    return _answer(method, send_answer, question)


def answer_of_grandchild(method: str, question: Callable[[], object]) -> object:
    return _answer(method, ask_child, method, question)


def _answer(method: str, function: Callable[..., None], *args: object) -> object:
    context = multiprocessing.get_context(method)
    ours, theirs = multiprocessing.Pipe()
    process = context.Process(target=function, args=(theirs, *args))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()
        ours.close()


def double(x: Any) -> Any:
    return 2 * x


def sum_by_pool(numbers: list[int]) -> tuple[str, int]:
    """Open a pool inside of a worker."""
    with concurrent.futures.ProcessPoolExecutor(1) as executor:
        return type(executor).__module__, sum(executor.map(double, numbers))
