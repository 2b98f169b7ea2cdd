"""Tables of `recipes/benchmark`'s results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]  # of one row: seconds, extra, whole, largest by side; title, limit, goals, notes, ...
BASELINES = ("plain", "compiled")
OURS = ("ours", "ours compiled")
NONE = "—"
MEASURES = {"seconds": "time", "extra": "extra memory", "whole": "memory of the process", "largest": "largest batch"}

INTRODUCTION = """\
Time is the median over turns (plain, ours, plain, ...), with each thread kept on one core; ratios are ours over the
other side's, medians of the turns' ratios with the lowest and the highest. Extra memory is what a call adds at its peak
once compilation is done, in a process of its own: resident memory on the CPU, the allocator's on a GPU. Compiled is the
plain side under torch.compile, in a process of its own; a goal counts as reached only if it is reached against both.
The limit is what cannot be avoided, at the rate that this machine has for it: exponentials and comparisons in the
cache, floating-point operations in large matrix products or convolutions (which may need fewer than are counted), or
the backbone's own time."""


def markdown(records: Sequence[Record]) -> str:
    """All tables, by machine."""
    parts = ["# Benchmark", INTRODUCTION]
    if any(record["quick"] for record in records):
        parts.append("**Quick run: sizes are tiny and the numbers mean nothing.**")
    places: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        places.setdefault((record["machine"], record["device"], record["dtype"]), []).append(record)
    for (machine, device, dtype), there in places.items():
        threads = sorted({record["threads"] for record in there})
        counted = " and ".join(f"{n} thread{'s' if n > 1 else ''}" for n in threads)
        parts.append(f"## {device}, {dtype}: {machine}, {counted}")
        parts += _sections(there)
    return "\n\n".join(parts) + "\n"


def _sections(records: Sequence[Record]) -> list[str]:
    single = [record for record in records if record["point"] is None and "seconds" in record]
    notes = [f"- {record['title']}: {side} {note}" for record in records for side, note in record["notes"].items()]
    heads = {
        "Numbers to reach": _goals(records),
        "Time": _times(single),
        "Memory": _memories([record for record in single if record["extra"]]),
        "Scaling": _scaling([record for record in records if record["point"] is not None]),
    }
    sections = [f"### {head}\n\n{table}" for head, table in heads.items() if table]
    if any(record["is_model"] and "plain" in record.get("seconds", {}) for record in records) and not any(
        record["is_model"] and "compiled" in record.get("seconds", {}) for record in records
    ):
        notes.append("- Whole models were not compiled, which takes minutes for each: `--compile-models`.")
    return sections + (["### Notes\n\n" + "\n".join(notes)] if notes else [])


def ratios(record: Record, measure: str, against: str, mine: str = "ours") -> list[float]:
    """Ours, or ours compiled, over another side's: for each turn of the time, else one; none if either is missing."""
    values = record.get(measure, {})
    if mine not in values or against not in values:
        return []
    if measure != "seconds":
        return [values[mine] / max(values[against], 1)]
    return [quick / slow for quick, slow in zip(values[mine], values[against], strict=True)]


def is_reached(goal: Mapping[str, Any], record: Record, against: str, mine: str = "ours") -> bool | None:
    """Whether a goal is reached against one side; None where there is nothing to compare."""
    found = ratios(record, goal["measure"], against, mine)
    if not found:
        return None
    ratio = statistics.median(found)
    return ratio >= goal["limit"] if goal["measure"] == "largest" else ratio <= goal["limit"]


def verdict(goal: Mapping[str, Any], record: Record, mine: str = "ours") -> str:
    """Reached, missed, or which of the two against eager and compiled."""
    against = BASELINES if goal["against"] == "plain" else (goal["against"],)
    found = {side: is_reached(goal, record, side, mine) for side in against}
    known = {side: reached for side, reached in found.items() if reached is not None}
    if not known:
        return "not measured"
    if len(set(known.values())) == 1:
        return "reached" if all(known.values()) else "missed"
    return "; ".join(f"{'reached' if reached else 'missed'} against {side}" for side, reached in known.items())


def _goals(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        for goal in record["goals"]:
            values = record.get(goal["measure"], {})
            lines += [_goal(record, goal, mine) for mine in OURS if mine == "ours" or mine in values]
    head = ["what", "measure", "against", "its value", "plain, compiled", "ours", "ours / it", "ours / compiled"]
    return table([*head, "goal", "verdict"], lines, left=(0, 1, 2, 9))


def _goal(record: Record, goal: Mapping[str, Any], mine: str) -> list[str]:
    measure, against = goal["measure"], goal["against"]
    values = record.get(measure, {})
    others = BASELINES if against == "plain" else (against,)
    shown = [_with_unit(measure, values.get(side)) for side in others] + [""] * (2 - len(others))
    compared = [_ratio(ratios(record, measure, side, mine)) for side in others] + [""] * (2 - len(others))
    title = record["title"] + ("" if mine == "ours" else f", {mine}")
    sign = "≥" if measure == "largest" else "≤"
    cells = [title, MEASURES[measure], against, *shown, _with_unit(measure, values.get(mine)), *compared]
    return [*cells, f"{sign} {goal['limit']:g}", verdict(goal, record, mine)]


def _times(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        values = record["seconds"]
        shown = [_value("seconds", values.get(side)) for side in (*BASELINES, *OURS)]
        compared = [_ratio(ratios(record, "seconds", side)) for side in BASELINES]
        lines.append([record["title"], *shown, *compared, _limit(record)])
    head = ["what", "plain", "compiled", *OURS, "ours / plain", "ours / compiled", "limit"]
    return table(head, lines, left=(0, 7))


def _limit(record: Record) -> str:
    """What cannot be avoided, how long that takes here, and how far away ours is."""
    ours = statistics.median(record["seconds"]["ours"])
    beside = next((side for side in ("backbone", "decoding") if side in record["seconds"]), None)
    least = statistics.median(record["seconds"][beside]) if beside else record["least_seconds"]
    if not least:
        return record["limit"]
    return f"{record['limit']}: {_value('seconds', [least])}, ours {ours / least:.3g} x"


def _memories(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        shown = [_value("extra", record["extra"].get(side)) for side in (*BASELINES, "ours", "backbone")]
        compared = [_ratio(ratios(record, "extra", side)) for side in BASELINES]
        whole = [_value("whole", record["whole"].get(side)) for side in ("plain", "ours")]
        lines.append([record["title"], *shown, *compared, *whole, _ratio(ratios(record, "whole", "plain"))])
    sides = ["plain", "compiled", "ours", "backbone", "ours / plain", "ours / compiled"]
    return table(["what, MB", *sides, "process: plain", "ours", "ours / plain"], lines)


def _scaling(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        axis, line, value = record["point"]
        cells = [axis, f"{value:,g}", line]
        for measure in ("seconds", "extra"):
            values = record[measure]
            cells += [_value(measure, values.get(side)) for side in ("plain", "ours")]
            cells.append(_ratio(ratios(record, measure, "plain")))
        lines.append(cells)
    sides = ["plain", "ours", "ours / plain"]
    megabytes = ["plain, MB", "ours, MB", "ours / plain"]
    return table(["axis", "value", "what", *sides, *megabytes], lines, left=(0, 2))


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table without the columns in which nothing was measured; nothing where there are no lines."""
    shown = [column for column in range(len(head)) if any(line[column] not in ("", NONE) for line in lines)]
    if not shown:
        return ""
    ruler = ["---" if column in left else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells[column] for column in shown)} |" for cells in (head, ruler, *lines))


def _value(measure: str, value: Any) -> str:
    if value is None:
        return NONE
    if measure == "largest":
        return f"{value:,}"
    if measure == "seconds":
        seconds = statistics.median(value)
        return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    return f"{value / 1e6:,.1f}" if value < 1e7 else f"{value / 1e6:,.0f}"


def _with_unit(measure: str, value: Any) -> str:
    return _value(measure, value) + (" MB" if measure in ("extra", "whole") and value is not None else "")


def _ratio(found: Sequence[float]) -> str:
    if not found:
        return NONE
    middle = f"{statistics.median(found):.3g}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.3g} to {max(found):.3g})"
