"""Everything about a GPU in one command: are the numbers right, how much is won, and does input keep up?

    python recipes/benchmark/accept_gpu.py --output report

Runs the GPU tests, then ours, the published way, the same under torch.compile and the backbone alone, in turns in one
process, in bf16 and fp32. Each row is printed and kept as soon as it is known: report.json and report.md lie in
`--output`, and the same command goes on where it was stopped. Rows that another card or another PyTorch gave are
measured again. `--rehearse` does all of it at toy sizes on the CPU.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import work
from measure import largest_that_fits, machine, memory_of, seconds_in_turns
from report import BASELINES, NONE, is_reached, ratios, table
from rows import Goal, Row
from work import Setup

from segheads.cli.run import run as run_command
from segheads.data import FolderDataset, RandomScaleCrop, TrainingSamples, collate_samples
from segheads.functional.paths import path_of_loss
from segheads.ranges import Range

ITERATIONS = 160_000  # of the published baseline
ROOT = Path(__file__).parents[2]
TESTS = {"tests": ("tests/test_gpu.py", "tests/metrics"), "tests_whole": ("tests/test_gpu_whole.py",)}
WORDS = {"bfloat16": "bf16", "float32": "fp32", "": NONE}
Record = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """What to measure, and how."""

    output: Path = Path("report")
    turns: Annotated[int, Range(1)] = 5
    minutes: Annotated[float, Range(0, above=True)] = 8.0
    """No row begins later; the next run goes on."""
    only: tuple[str, ...] = ()
    """Rows whose names begin so, such as `loss` or `step/senformer`."""
    again: bool = False
    """Measure rows again that are known."""
    tests: bool = True
    """Begin with the GPU tests, and end with the long ones."""
    rehearse: bool = False
    """Toy sizes on the CPU, to see that everything runs; the numbers mean nothing."""

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.rehearse else "cuda"


def main(config: Config) -> None:
    """Measure what is not known yet, row by row.

    Raises:
        SystemExit: If there is no GPU, or no row has such a name.
    """
    if not config.rehearse and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU; --rehearse does everything at toy sizes on the CPU")
    config.output.mkdir(parents=True, exist_ok=True)
    records, start = read(config), time.perf_counter()
    chosen = [(name, run) for name, run in plan(config) if not config.only or name.startswith(config.only)]
    if not chosen:
        raise SystemExit(f"no row begins with {', '.join(config.only)}; known: {', '.join(n for n, _ in plan(config))}")
    for number, (name, run) in enumerate(chosen, 1):
        if name in records and not config.again:
            print(f"{number}/{len(chosen)} {name}: known")
            continue
        if time.perf_counter() - start > 60 * config.minutes:
            print(f"{config.minutes:g} minutes are over; the same command goes on from {name}")
            break
        began = time.perf_counter()
        try:
            found = run()
        except Exception as error:  # a row that fails is told, and costs no other
            said = (str(error).splitlines() or [""])[0]
            found = {"notes": {"failed": f"{type(error).__name__}: {said}"}}
        record = {"name": name, "machine": machine(config.device), **found}
        records[name] = record
        write(config, records)
        print(f"{number}/{len(chosen)} {name}: {told(record)} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"\n{markdown(config, list(records.values()))}")


def plan(config: Config) -> list[tuple[str, Callable[[], Record]]]:
    """The rows in the order in which they are measured, the ones that decide first."""
    found: list[tuple[str, Callable[[], Record]]] = [("tests", partial(run_tests, "tests"))] if config.tests else []
    for dtype in ("bfloat16", "float32"):
        found += [
            (f"{row.name}/{WORDS[dtype]}", partial(compare, config, row, dtype))
            for row in rows(config.rehearse)
            if not (config.rehearse and dtype == "float32" and row.name != "loss/150")
        ]
    found.append(("input", partial(measure_input, config)))
    found.append(("largest_batch/mean_shift/bf16", partial(largest_batch, config)))
    if config.tests:
        found.append(("tests_whole", partial(run_tests, "tests_whole")))  # compilations and trainings: minutes
    return found


def rows(quick: bool) -> list[Row]:
    """What both sides do, with the numbers to reach on a GPU in bf16."""
    pixels = {150: ((32, 32), (512, 512)), 19: ((128, 256), (1024, 2048)), 1000: ((32, 32), (512, 512))}
    batches = {150: 16, 19: 4, 1000: 4}
    if quick:
        pixels = dict.fromkeys(pixels, ((4, 4), (32, 32)))
        batches = dict.fromkeys(batches, 2)
    loss_goals = (Goal("seconds", 0.2), Goal("seconds", 0.6, "compiled"), Goal("extra", 0.03))
    found: list[Row] = []
    for K, (grid, size) in pixels.items():
        sizes: dict[str, Any] = {"batch": batches[K], "classes": K, "grid": grid, "size": size}
        words = f"{K} classes, {grid[0]}x{grid[1]} to {size[0]}x{size[1]}, batch {batches[K]}"
        goals = (loss_goals, (Goal("seconds", 0.25),)) if K == 150 else ((), ())
        found.append(Row(f"loss/{K}", f"loss, {words}", partial(work.loss, **sizes), cuda=goals[0]))
        found.append(Row(f"label_map/{K}", f"label map, {words}", partial(work.label_map, **sizes), cuda=goals[1]))
    for tokens in (16, 32) if quick else (1024, 4096, 16_384):
        for channels in (16,) if quick else (192, 384):
            shift: dict[str, Any] = {"batch": 1, "tokens": tokens, "channels": channels}
            goal = (Goal("seconds", 0.35),) if (tokens, channels) == (4096, 192) else ()
            title = f"mean shift, {tokens:,} tokens, {channels} wide"
            found.append(Row(f"mean_shift/{tokens}_{channels}", title, partial(work.shift, **shift), cuda=goal))
    names = {"mean_shift": "MeanShifter-Ti/16", "segmenter": "Segmenter-S/16", "senformer": "SenFormer-R50"}
    for batch in (2,) if quick else (8, 16):
        for name, words in names.items():
            goal = (Goal("seconds", 1.15, "backbone"),) if name == "mean_shift" else ()
            title = f"training step, {words}, 512, batch {batch}"
            build = partial(work.step, name=name, batch=batch)
            found.append(Row(f"step/{name}_{batch}", title, build, cuda=goal, is_model=True))
    title = "evaluation, 683x512, windows 512/480, MeanShifter-Ti/16"
    found.append(Row("evaluation", title, work.evaluation, cuda=(Goal("seconds", 0.35),), is_model=True))
    return found


def compare(config: Config, row: Row, dtype: str) -> Record:
    """Time and extra memory of all sides; what does not run, or does not fit, is left out with a note."""
    assert row.build is not None
    setup, notes = Setup(config.device, dtype, config.rehearse), {}
    torch.compiler.reset()
    made = row.build(setup)
    compiles = not row.is_model or (row.name.startswith("step/mean_shift") and not config.rehearse)  # takes a minute
    if compiles and "plain" in made.functions:
        backend = "eager" if config.rehearse else "inductor"
        made.functions["compiled"] = torch.compile(made.functions["plain"], dynamic=False, backend=backend)
    extra: dict[str, int] = {}
    for side in list(made.functions):
        call = partial(made.call, side)
        if failure := _failure(call):
            notes[side] = failure
            del made.functions[side]
        else:
            extra[side] = memory_of(call, config.device)["extra"]
    seconds = seconds_in_turns({side: partial(made.call, side) for side in made.functions}, config.turns, config.device)
    goals = [dataclasses.asdict(goal) for goal in row.cuda] if dtype == "bfloat16" else []
    return {"title": row.title, "dtype": dtype, "seconds": seconds, "extra": extra, "goals": goals, "notes": notes}


def _failure(call: Callable[[], Any]) -> str:
    """Why a call does not run, such as for memory or a compiler's sake; empty where it does."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return ""


def run_tests(name: str) -> Record:
    """`pytest -m gpu`; without a GPU they are left out, and counted."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS[name]]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = run.stdout.strip().splitlines() or ["nothing was said"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    notes = {f"test {number}": line for number, line in enumerate(failed, 1)}
    said = "; ".join(line for line in lines if "left out" in line or line is lines[-1])
    return {"title": f"pytest -m gpu {' '.join(TESTS[name])}", "dtype": "", "said": said, "notes": notes}


def measure_input(config: Config) -> Record:
    """Images per second that the training input makes on all cores, decoding and all."""
    import input as loading

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = 0 if config.rehearse else cores
    number, size = (4, 64) if config.rehearse else (64 * cores, loading.CROP)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = loading.make_files(Path(folder), min(number, 64))
        dataset = FolderDataset(images, labels, 254, reduce_zero_label=True)
        samples = TrainingSamples(dataset, RandomScaleCrop(size, scale=(2048, 512)), seed=0)
        batches = [[(turn, index % len(dataset)) for index in range(2)] for turn in range(number // 2)]
        loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=batches,
            collate_fn=collate_samples,
            num_workers=workers,
        )
        iterator, begun = iter(loader), time.perf_counter()
        count = 0
        for place, batch in enumerate(iterator):
            if place == workers:  # processes have started
                begun, count = time.perf_counter(), 0
            count += len(batch["image"])
        rate = count / max(time.perf_counter() - begun, 1e-9)
    title = f"input, 683x512 files to 512x512 crops, {cores} cores"
    return {"title": title, "dtype": "", "images_per_second": rate, "notes": {}}


def largest_batch(config: Config) -> Record:
    """The largest batch of a MeanShifter's step that fits, of each side."""
    setup, found = Setup(config.device, "bfloat16", config.rehearse), {}

    def fits(side: str, batch: int) -> bool:
        if config.rehearse:
            return batch < (2 if side == "plain" else 3)
        made: Any = None
        try:
            made = work.step(setup, "mean_shift", batch)
            made.call(side)
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        finally:
            del made
            torch.cuda.empty_cache()
        return True

    for side in ("plain", "ours"):
        found[side] = largest_that_fits(partial(fits, side), precision=0.1)
    return {
        "title": "largest batch, training step, MeanShifter-Ti/16, 512",
        "dtype": "bfloat16",
        "largest": found,
        "goals": [],
        "notes": {},
    }


def told(record: Mapping[str, Any]) -> str:
    """A row in a line."""
    if "seconds" in record or "largest" in record:
        against = (*BASELINES, "backbone")
        shown = {f"ours / {side}": _ratio(record, "seconds", side) for side in against}
        shown |= {"memory": _ratio(record, "extra", "plain"), "largest": _ratio(record, "largest", "plain")}
        words = ", ".join(f"{name} {ratio}" for name, ratio in shown.items() if ratio != NONE)
    else:
        words = record.get("said") or f"{record.get('images_per_second', 0):.0f} images per second"
    return "; ".join([words, *(f"{side}: {note}" for side, note in record["notes"].items())])


def markdown(config: Config, records: Sequence[Mapping[str, Any]]) -> str:
    """One table, ratios first, and what follows from it."""
    known = {record["name"]: record for record in records}
    ordered = [known[name] for name, _ in plan(config) if name in known and name not in TESTS]
    parts = [f"# On a GPU\n\n{machine(config.device)}; {time.strftime('%Y-%m-%d')}"]
    if config.rehearse:
        parts.append("**A rehearsal on the CPU: sizes are tiny and the numbers mean nothing.**")
    parts += [f"`{known[name].get('title', name)}`: {told(known[name])}" for name in TESTS if name in known]
    head = ["what", "type", "ours / plain", "/ compiled", "/ backbone", "memory", "goals", "ours", "plain", "compiled"]
    parts.append(table(head, [_cells(record, config.rehearse) for record in ordered if "title" in record], (0, 1, 6)))
    parts += _conclusions(ordered)
    notes = [f"- {r['name']}: {side}: {note}" for r in ordered for side, note in r["notes"].items()]
    return "\n\n".join([*parts, *(["Notes:\n\n" + "\n".join(notes)] if notes else [])]) + "\n"


def _cells(record: Mapping[str, Any], rehearses: bool) -> list[str]:
    compared = [_ratio(record, "seconds", side) for side in (*BASELINES, "backbone")]
    if "largest" in record:
        compared[0] = _ratio(record, "largest", "plain")
        shown = [str(record["largest"].get(side, NONE)) for side in ("ours", *BASELINES)]
    elif "images_per_second" in record:
        shown = [f"{record['images_per_second']:.0f} /s", NONE, NONE]
    else:
        shown = [_milliseconds(record, side) for side in ("ours", *BASELINES)]
    title, kind = record["title"], WORDS[record["dtype"]]
    return [title, kind, *compared, _ratio(record, "extra", "plain"), _goals(record, rehearses), *shown]


def _goals(record: Mapping[str, Any], rehearses: bool = False) -> str:
    """The limits, and where it is no rehearsal whether they are reached."""
    said = []
    for goal in record.get("goals", ()):
        reached = is_reached(goal, record, goal["against"])
        name = "memory" if goal["measure"] == "extra" else goal["against"]
        word = {True: "reached", False: "**missed**", None: "not measured"}[reached]
        said.append(f"{name} ≤ {goal['limit']:g}" + ("" if rehearses else f": {word}"))
    return "; ".join(said)


def _conclusions(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether input keeps up with the quickest step, and how long the baseline takes."""
    steps = {r["name"]: r for r in records if r["name"].startswith("step/") and "ours" in r.get("seconds", {})}
    if not steps:
        return []
    rates = {n: int(n.split("_")[-1].split("/")[0]) / statistics.median(r["seconds"]["ours"]) for n, r in steps.items()}
    quickest = max(rates, key=lambda name: rates[name])
    said = [f"The quickest step, {quickest}, takes {rates[quickest]:.0f} images per second"]
    made = next((r["images_per_second"] for r in records if "images_per_second" in r), None)
    if made is not None:
        word = "keeps up" if made >= rates[quickest] else "**starves it**"
        said[0] += f"; input makes {made:.0f} and {word}"
    for name, record in steps.items():
        hours = ITERATIONS * statistics.median(record["seconds"]["ours"]) / 3600
        said.append(f"{name}: {hours:.1f} hours for {ITERATIONS:,} iterations, without loading")
    return ["\n".join(f"- {line}." for line in said)]


def _ratio(record: Mapping[str, Any], measure: str, against: str) -> str:
    found = ratios(record, measure, against)
    return f"{statistics.median(found):.2g}" if found else NONE


def _milliseconds(record: Mapping[str, Any], side: str) -> str:
    found = record.get("seconds", {}).get(side)
    return f"{1000 * statistics.median(found):.3g} ms" if found else NONE


def read(config: Config) -> dict[str, Record]:
    """Rows that this machine has measured before; failed ones are forgotten."""
    path = config.output / "report.json"
    if not path.exists():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))["rows"]
    here = machine(config.device)
    return {r["name"]: r for r in known if r["machine"] == here and "failed" not in r["notes"]}


def write(config: Config, records: Mapping[str, Record]) -> None:
    """JSON and table of all rows; a crash leaves the old files or the new ones."""
    device = torch.device(config.device)
    paths = {WORDS[name]: path_of_loss(device, getattr(torch, name)) for name in ("bfloat16", "float32")}
    values = {"rehearsal": config.rehearse, "loss and label map": paths, "rows": list(records.values())}
    texts = {"report.json": json.dumps(values, indent=1) + "\n", "report.md": markdown(config, list(records.values()))}
    for name, text in texts.items():
        path = config.output / name
        path.with_suffix(".new").write_text(text, encoding="utf-8")
        path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    run_command(main, Config)
