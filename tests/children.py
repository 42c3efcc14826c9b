"""Processes to be killed, forked from one that has imported everything already: an import costs more than a run."""

import multiprocessing
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import reattend
from reattend.checkpoint import staging

CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ("pytest", "reattend.pipeline.execution", "reattend.quantize.int8.transform", "reattend.healing.step",
              "accelerate", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp")  # fmt: skip
CONTEXT.set_forkserver_preload(list(_PRELOADED))


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


def heal_slowly(student: Path, out: Path, run: dict, started: Connection) -> None:
    """Take time in each training step and before each file is complete, so that a kill falls at all stages."""
    from reattend.healing import loop, states

    def slowed(old: Callable) -> Callable:
        def new(*arguments):
            time.sleep(0.02)
            return old(*arguments)

        return new

    loop.Trainer._step = slowed(loop.Trainer._step)
    states.os.fsync = slowed(os.fsync)
    started.send("go")
    reattend.heal(student, out, resume=True, **run)


def together(function: str, *arguments, processes: int = 2, **options) -> tuple[list, list]:
    """Call a function of reattend in processes as torchrun starts them; return exit codes, and what was returned."""
    port, (results, sending) = free_port(), CONTEXT.Pipe(duplex=False)
    worlds = [(rank, processes, port) for rank in range(processes)]
    started = [
        CONTEXT.Process(target=_one_of, args=(world, sending, function, arguments, options)) for world in worlds
    ]
    for child in started:
        child.start()
    for child in started:
        child.join(120)
    returned = [results.recv() for child in started if child.exitcode == 0]
    return [child.exitcode for child in started], [found for _, found in sorted(returned, key=lambda pair: pair[0])]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _one_of(world: tuple[int, int, int], results: Connection, function: str, arguments, options) -> None:
    rank, count, port = world
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in named.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = getattr(reattend, function)(*arguments, **options)
    results.send((rank, found if isinstance(found, dict) else None))
