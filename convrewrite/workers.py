"""Independent tasks side by side, each on one thread of torch.

Products of small matrices gain nothing from several threads, and two that share the processor's cores wait for each other; two
tasks on one thread each do not. A task's result does not depend on how many others run beside it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

from convrewrite.places import ready_thread
from convrewrite.process import torch_threads

Found = TypeVar("Found")


def side_by_side(tasks: Sequence[Callable[[], Found]]) -> list[Found]:
    """The results of the tasks, in their order: as many run at a time as torch has threads here, each on one of them.

    If tasks fail, the error of the first one in their order is raised, and tasks that have not begun are left out; so they are on
    an interrupt. Tasks must not touch what belongs to the process. Tasks within a task run one after the other.
    """
    workers = min(len(tasks), torch.get_num_threads())
    with torch_threads(1) if torch.get_num_threads() > 1 else nullcontext():
        if workers < 2:
            return [task() for task in tasks]
        with ThreadPoolExecutor(workers, thread_name_prefix="side by side", initializer=ready_thread) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
