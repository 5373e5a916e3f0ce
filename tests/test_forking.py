"""A forked process does not collect the garbage of its parent."""

import gc
import multiprocessing
import os

from m3ae_fast.base import forking


class Ends:
    """An object in a reference cycle whose destructor prints the process that runs it."""

    def __init__(self, queue):
        self.me, self.queue = self, queue

    def __del__(self):
        self.queue.put(os.getpid())


def test_a_forked_process_does_not_collect_objects_of_its_parent():
    assert forking.__doc__
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    gc.collect()
    gc.disable()
    try:
        Ends(queue)
        process = context.Process(target=gc.collect)
        process.start()
        process.join()
        assert process.exitcode == 0 and queue.empty()
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert queue.get() == os.getpid()
    finally:
        gc.enable()


def test_objects_frozen_before_a_fork_stay_frozen():
    context = multiprocessing.get_context("fork")
    gc.freeze()
    try:
        process = context.Process(target=int)
        process.start()
        process.join()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
