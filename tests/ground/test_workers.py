"""Tasks side by side: in order, on one thread each, with the same bytes however many there are."""

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from convrewrite.process import torch_threads
from convrewrite.workers import side_by_side


def solved(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(300, 300, generator=generator, dtype=torch.float64)
    return torch.linalg.solve(matrix @ matrix.T + torch.eye(300, dtype=torch.float64), matrix)


def tasks(count: int) -> list[Callable[[], Tensor]]:
    return [partial(solved, seed) for seed in range(count)]


def test_results_are_in_order_and_the_same_bytes_whatever_the_number_of_workers() -> None:
    found = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found.append(side_by_side(tasks(5)))
            assert torch.get_num_threads() == threads
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_every_task_has_one_thread_of_torch_and_two_run_at_a_time() -> None:
    both = threading.Barrier(2, timeout=30)

    def counted() -> int:
        both.wait()  # nobody comes past it alone
        return torch.get_num_threads()

    with torch_threads(2):
        assert side_by_side([counted, counted]) == [1, 1]


def test_within_a_task_others_run_one_after_the_other() -> None:
    def inner() -> list[int]:
        return side_by_side([threading.get_ident, threading.get_ident])

    with torch_threads(2):
        for one, other in side_by_side([inner, inner]):
            assert one == other


def test_the_first_failure_in_order_is_told_and_what_has_not_begun_is_left_out() -> None:
    begun: list[int] = []

    def failing(number: int) -> None:
        begun.append(number)
        raise ArithmeticError(f"task {number}")

    with torch_threads(2), pytest.raises(ArithmeticError, match="task 0"):
        side_by_side([partial(failing, number) for number in range(200)])
    assert 0 in begun
    with torch_threads(1), pytest.raises(ArithmeticError, match="task 0"):
        side_by_side([partial(failing, number) for number in range(3)])
    assert begun[-1] == 0


def test_nothing_to_do_is_nothing_done() -> None:
    assert side_by_side([]) == []
