"""Processes to be killed, forked from one that has imported everything already: an import costs more than a run."""

import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import reattend
from reattend.checkpoint import staging

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "reattend.pipeline.execution", "reattend.quantize.int8.transform", "reattend.healing.step"]
)


def apply_slowly(model: Path, out: Path, started: Connection) -> None:
    """Sync after each group and take time, so that a kill falls at all stages."""
    write = staging._write_all

    def slow(*arguments):
        time.sleep(0.003)
        write(*arguments)

    staging._SYNC_BYTES, staging._write_all = 1, slow
    started.send("go")
    reattend.apply("int8", model, out, resume=True)


def apply_and_die(model: Path, out: Path, step: int) -> None:
    """End the process inside the commit, at its rename or removal number `step`."""
    left = step

    def killing(old: Callable) -> Callable:
        def new(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return old(*arguments, **options)

        return new

    def commit(self, old=staging.Staging.commit):
        pathlib.Path.rename = killing(pathlib.Path.rename)
        shutil.rmtree = killing(shutil.rmtree)
        old(self)

    staging.Staging.commit = commit
    reattend.apply("int8", model, out, overwrite=True)
