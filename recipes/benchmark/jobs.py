"""One measurement of `recipes/benchmark`, in a process of its own or in this one."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from measure import EXACT_MEMORY, free_bytes, machine, memory_of, seconds_at_best, seconds_in_turns
from rows import Row, rows
from work import Setup, Work

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a process measures: the time of all sides of a row, or the memory or the largest batch of one."""

    row: str
    measure: Literal["seconds", "memory", "largest"]
    setup: Setup
    side: str = ""
    turns: int = 5
    threads: int | None = None
    compiles: bool = False  # of the time: of the compiled sides alone


class JobError(RuntimeError):
    """A process that ended without a result."""


def in_own_process(job: Job) -> Result:
    """What `perform` gives in a new process.

    Raises:
        JobError: If the process fails; the message is the last line of what it said.
    """
    # Threads stay on a core each: else two end up on one now and then, and all calls after that take twice as long.
    environment = (
        {"OMP_PROC_BIND": "true"}
        | os.environ
        | (EXACT_MEMORY if job.measure == "memory" and job.setup.device == "cpu" else {})
    )
    command = [sys.executable, __file__, json.dumps(asdict(job))]
    # A session of its own: Ctrl-C reaches the parent, which then ends the process and keeps what was measured.
    done = subprocess.run(command, capture_output=True, text=True, env=environment, start_new_session=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        how = "was killed, for memory most likely" if done.returncode == -9 else f"exit status {done.returncode}"
        raise JobError(f"{job.row}, {job.measure} {job.side}: {how}: {said[-1]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def in_this_process(job: Job) -> Result:
    """What `perform` gives, with nothing of earlier jobs left in memory or in the compiler.

    Raises:
        JobError: If it fails; the message is the first line of the error's.
    """
    gc.unfreeze()  # what an earlier job froze
    gc.collect()
    torch.compiler.reset()  # else a function that was compiled for many sizes is no longer compiled
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return perform(job)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise JobError(f"{job.row}, {job.measure} {job.side}: {type(error).__name__}: {said}") from error


def perform(job: Job) -> Result:
    """Measure in this process."""
    if job.threads:
        torch.set_num_threads(job.threads)
    row = next(row for row in rows(job.setup.quick) if row.name == job.row)
    setup = replace(job.setup, dtype=row.dtype or job.setup.dtype)
    if row.largest is not None:
        largest, reason = row.largest(setup, job.side)
        return {"largest": largest, "note": f"stops at {largest}: {reason}"}
    if row.seconds is not None:
        seconds = row.seconds(setup, job.turns)
        limit = "decoding the files, with Pillow"
        return {"seconds": seconds, "limit": limit, "machine": machine(setup.device), "threads": 1, "notes": {}}
    assert row.build is not None
    work = row.build(setup)
    return _memory(work, row, job.side, setup) if job.measure == "memory" else _seconds(work, row, job, setup)


def _memory(work: Work, row: Row, side: str, setup: Setup) -> Result:
    if "compiled" in side:
        work.compile(row.is_model)
        work.call(side)  # compiled for these sizes
    else:
        work.call(side, tiny=True)
    return dict(memory_of(lambda: work.call(side), setup.device))


def _seconds(work: Work, row: Row, job: Job, setup: Setup) -> Result:
    notes: dict[str, str] = {}
    needs, free = row.needs(setup), free_bytes(setup.device)
    if "plain" in work.functions and needs > free:
        notes["plain"] = f"does not fit: needs about {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        del work.functions["plain"]
    if job.compiles:
        if "plain" in work.functions:
            work.compile(row.is_model)
        # Compiled code has OpenMP threads of its own, which wait busily and would slow the other sides down.
        work.functions = {side: function for side, function in work.functions.items() if "compiled" in side}
    for side in list(work.functions):
        _warm_up(work, side, notes)
    calls = {side: _caller(work, side) for side in work.functions}
    return {
        "seconds": seconds_in_turns(calls, job.turns, setup.device),
        "limit": work.limit,
        "least_seconds": seconds_at_best(work.least, setup.device, setup.type),
        "machine": machine(setup.device),
        "threads": torch.get_num_threads(),
        "notes": notes,
    }


def _warm_up(work: Work, side: str, notes: dict[str, str]) -> None:
    """Call a side once; if it cannot be compiled, note it and leave it out."""
    try:
        work.call(side)
    except Exception as error:
        if "compiled" not in side:
            raise
        notes[side] = f"cannot be compiled: {str(error).splitlines()[0]}"
        del work.functions[side]


def _caller(work: Work, side: str) -> Any:
    return lambda: work.call(side)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(perform(Job(**{**given, "setup": Setup(**given["setup"])}))))
