"""Workers as processes on this machine: spawned, tied to the thread that spawned them, watched through /proc."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess

from ovserve.errors import LaunchError
from ovserve.machine import machine_memory_bytes
from ovserve.wire.blobs import WorkerBlobs
from ovserve.wire.launcher import WorkerMain, WorkerSpec
from ovserve.wire.local import processes
from ovserve.wire.local.output import OnOutput, read_output
from ovserve.wire.local.pipes import PipeLink, open_link

__all__ = ["LocalLauncher", "LocalProcess"]


class LocalProcess:
    """`wire.launcher.WorkerProcess` for a process of this machine."""

    def __init__(self, process: SpawnProcess, machine_bytes: int) -> None:
        self._process = process
        self._machine_bytes = machine_bytes
        self.name = process.name
        self.pid = process.pid or 0
        self.readiness = process.sentinel

    def is_alive(self) -> bool:
        """Return whether it runs; reap it when it has exited."""
        return self._process.is_alive()

    def exit_reason(self) -> str:
        """Return why it has exited, from its exit code."""
        return processes.describe_exit(self._process.exitcode)

    def was_lost(self) -> bool:
        """Return False: this machine is no cluster."""
        return False

    def log_stacks(self) -> None:
        """Send SIGUSR1, for which a thread of the worker waits; another program that runs in its place ignores it."""
        if self._process.is_alive():  # reaps it: a process id is not used again before
            os.kill(self.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """Send SIGKILL. Idempotent."""
        self._process.kill()

    def resident_bytes(self) -> int:
        """Return its resident memory and its children's, without pages mapped from files; 0 when it has exited."""
        return processes.resident_bytes_with_children(self.pid)

    def memory_bytes(self) -> int:
        """Return the memory that it takes with its children, of shared pages its share; 0 when it has exited."""
        return processes.proportional_bytes_with_children(self.pid)

    def node(self) -> str:
        """Return "": this machine."""
        return ""

    def is_leaving(self) -> bool:
        """Return False: this machine stays."""
        return False

    def machine_bytes(self) -> int:
        """Return the memory of this machine, or of the control group of this process if that is less."""
        return self._machine_bytes

    def waits_for(self) -> str:
        """Return "": a process is started at once."""
        return ""

    def close(self) -> None:
        """Free the handle of a process that has exited."""
        self._process.close()


class LocalLauncher:
    """`wire.launcher.Launcher` that spawns processes.

    Every process ends with the thread that calls `start` (PR_SET_PDEATHSIG).

    Args:
        worker_main: the spawn target, importable by name.
        blobs: the workers' access to the front end's segments.
        on_output: called with a worker's name and a line that its native libraries have written to standard error, in
            a thread of that worker; None: such lines go where this process's own standard error goes.
    """

    def __init__(self, worker_main: WorkerMain, blobs: WorkerBlobs, on_output: OnOutput | None = None) -> None:
        self._worker_main = worker_main
        self._blobs = blobs
        self._on_output = on_output
        self._context = multiprocessing.get_context("spawn")
        self._machine_bytes = machine_memory_bytes()
        self._pids: set[int] = set()  # of all workers so far that may still exist

    def prepare(self) -> None:
        """Start the resource tracker. Its first start unblocks signals in the thread that makes it."""
        resource_tracker.ensure_running()

    def start(self, spec: WorkerSpec) -> tuple[LocalProcess, PipeLink]:
        """Spawn a worker. Raises LaunchError."""
        try:
            return self._spawn(spec)
        except OSError as error:  # no descriptors, memory or process ids left
            raise LaunchError(str(error)) from error

    def _spawn(self, spec: WorkerSpec) -> tuple[LocalProcess, PipeLink]:
        link, end = open_link(self._context, spec.model.name, spec.index, spec.incarnation)
        try:
            reading, writing = (None, None) if self._on_output is None else self._context.Pipe(duplex=False)
        except OSError:
            link.close()
            end.close()
            raise
        given = (end, self._blobs, spec.profile, spec.model, spec.settings)
        process = self._context.Process(
            target=processes.run_worker,
            args=(self._worker_main, os.getpid(), writing, *given),
            name=link.name,
            daemon=True,
        )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # If the tracker had exited, `start` would start it again, and leave signals unblocked in this thread.
            resource_tracker.ensure_running()
            # The child inherits the mask, so a Ctrl-C never reaches it.
            signal.pthread_sigmask(signal.SIG_BLOCK, processes.BLOCKED_SIGNALS)
            process.start()
        except OSError:
            link.close()
            if reading is not None:
                reading.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            end.close()
            if writing is not None:
                writing.close()
        if reading is not None and self._on_output is not None:
            read_output(reading, link.name, self._on_output)
        started = LocalProcess(process, self._machine_bytes)
        processes.raise_oom_score(started.pid)
        self._pids.add(started.pid)
        return started, link

    def overhead_bytes(self) -> int:
        """Return the memory that this process takes with its children, without the workers."""
        children = set(processes.children_of(os.getpid()))
        self._pids &= children  # the others have been reaped
        own = processes.proportional_bytes(os.getpid())
        return own + sum(processes.proportional_bytes_with_children(pid) for pid in children - self._pids)

    def close(self) -> None:
        """Do nothing: there is nothing beside the workers."""
