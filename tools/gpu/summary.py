"""What matters, in 60 lines: what is wrong first, then who is fastest where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .conductor import Ending
from .record import Row

LINES = 60
MOST_BAD, MOST_CASES, MOST_IN_ORDER = 12, 13, 5
PASSES = ("forward", "backward")


def summary(rows: Sequence[Row], endings: dict[str, Ending]) -> str:
    """Markdown of at most 60 lines."""
    parts = [
        *_machine(rows),
        *_steps(endings),
        *_right(rows),
        *_bad(rows),
        *_fast(rows),
        *_host(rows),
        *_tiles(rows),
        *_kernels(rows),
        *_train(rows),
        *_split(rows),
        *_contrast(rows),
        *_near(rows),
    ]
    if len(parts) > LINES:
        parts = [*parts[: LINES - 1], f"- {len(parts) - LINES + 1} more lines in results.jsonl"]
    return "\n".join(parts) + "\n"


def of(rows: Iterable[Row], step: str) -> list[Row]:
    return [row for row in rows if row["step"] == step]


def is_bad(row: Row) -> bool:
    return "failed" in row or row.get("ok") is False


def _machine(rows: Sequence[Row]) -> list[str]:
    found = next((row for row in of(rows, "report") if "processor" in row), None)
    if found is None:
        return ["# Results of an unknown machine", ""]
    gpu = found.get("gpu", {})
    clocks = f", {gpu['clocks.sm']} of {gpu['clocks.max.sm']}" if "clocks.sm" in gpu else ""
    driver = f", driver {gpu['driver_version']}" if "driver_version" in gpu else ""
    backends = "; ".join(f"{name}: {text}" for name, text in found["backends"].items())
    return [
        f"# {found['processor']}{clocks}{driver}",
        f"commit {found['commit'] or 'unknown'}, {found['date']}; Python {found['python']}, torch "
        f"{found['torch']}; {found['versions']}",
        f"backends: {backends}"[:300],
        *_pack(rows),
    ]


def _pack(rows: Sequence[Row]) -> list[str]:
    """Whether Triton finds the kernels of a pack, and how many were missing."""
    packs = [row["pack"] for row in of(rows, "report") if "pack" in row]
    warm = [
        f"{row['compiled']} kernels compiled beside the steps in {row['seconds']:.0f} s, "
        f"{row['found']} were there"
        for row in of(rows, "warm")[-1:]
        if "found" in row
    ]
    return [f"Triton: {'; '.join([*packs, *warm])}"] if packs or warm else []


def _steps(endings: dict[str, Ending]) -> list[str]:
    done = [f"{e.name} {e.seconds:.0f} s" for e in endings.values() if e.status == "done"]
    rest = [f"{e.name}: **{e.status}**" for e in endings.values() if e.status != "done"]
    return [
        f"done: {', '.join(done) or 'nothing'}",
        *([f"not done: {', '.join(rest)}"] * bool(rest)),
    ]


def _right(rows: Sequence[Row]) -> list[str]:
    """How many of each kind of check are right."""
    counts = []
    for step in ("smoke", "negatives", "checks", "time", "graph", "ddp"):
        found = [row for row in of(rows, step) if "ok" in row or "failed" in row]
        if found:
            counts.append(f"{step} {sum(not is_bad(r) for r in found)} of {len(found)}")
    tests = [f"{r['name']}: {r['summary']}" for r in of(rows, "checks") if "summary" in r]
    tools = [f"{r['name']} {r['findings']} findings" for r in of(rows, "checks") if "findings" in r]
    return [
        f"right: {', '.join(counts) or 'nothing was checked'}",
        *([f"{'; '.join(tests + tools)}"] if tests or tools else []),
    ]


def _bad(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if is_bad(row)]
    lines = [f"- BAD {row['step']}, {row['name']}: {_why(row)}"[:240] for row in found[:MOST_BAD]]
    if len(found) > MOST_BAD:
        lines.append(f"- {len(found) - MOST_BAD} more are bad: see results.jsonl")
    return lines


def _why(row: Row) -> str:
    if "failed" in row:
        return str(row["failed"])
    if row["step"] == "time":
        reasons = [r["reason"] for r in row.get("rows", []) if r.get("reason")]
        return reasons[0] if reasons else "out of bounds"
    if row.get("failures"):
        return "; ".join(row["failures"])
    skip = ("step", "name", "commit", "ok", "seconds", "backend", "what", "exit", "summary")
    return ", ".join(f"{k} {v}" for k, v in row.items() if k not in skip) or "not as expected"


def _fast(rows: Sequence[Row]) -> list[str]:
    """The measured order of all providers, by shape and pass."""
    cases: dict[str, dict[str, dict[str, Row]]] = {}
    for row in of(rows, "time"):
        for line in row.get("rows", []):
            by_pass = cases.setdefault(line["case"], {})
            by_pass.setdefault(line["pass"], {})[row["provider"]] = line
    lines = ["## Measured order, device ms (host µs for both passes; × the roofline)"] * bool(cases)
    for key, by_pass in list(cases.items())[:MOST_CASES]:
        parts = [f"{what}: {_order(by_pass[what])}" for what in PASSES if what in by_pass]
        lines.append(f"- {key} {'; '.join(parts)}")
        if "both" in by_pass:
            lines.append(f"  both: {_order(by_pass['both'], in_full=True)}")
    if len(cases) > MOST_CASES:
        lines.append(f"- {len(cases) - MOST_CASES} more shapes in timings.md")
    return lines


def _order(found: dict[str, Row], in_full: bool = False) -> str:
    """Providers from the fastest on: `a 1.2 < b 3.4`."""
    ranked = sorted(found, key=lambda name: float(found[name]["median_ms"]))
    shown = []
    for name in ranked[:MOST_IN_ORDER]:
        line = found[name]
        text = f"{name.removeprefix('salkernels-')} {line['median_ms']}"
        if in_full:
            notes = [f"{line['times_floor']} ×"] if line.get("times_floor") else []
            notes += [f"host {line['host_us']}"] if line.get("host_us") else []
            notes += [f"graph {line['graph_ms']}"] if line.get("graph_ms") else []
            notes += ["waits"] if line.get("queued") == "no" else []
            text += f" ({', '.join(notes)})" if notes else ""
        shown.append(text)
    rest = len(ranked) - len(shown)
    return " < ".join(shown) + (f" < {rest} more" if rest else "")


def _host(rows: Sequence[Row]) -> list[str]:
    """Back to back, by shape; what was measured while the device waited is marked."""
    groups: dict[str, list[str]] = {}
    for row in of(rows, "host"):
        if "least_us" in row:
            first, _, rest = row["name"].partition(" ")
            is_case = first.startswith("S") and "-" in first
            mark = "" if row["busy"] else " (device idle)"
            text = f"{rest if is_case else row['name']} {row['us']:.4g}{mark}"
            groups.setdefault(first if is_case else "yardsticks", []).append(text)
    lines = [f"- {key}: {', '.join(parts)}" for key, parts in groups.items()]
    return ["## Host, µs per call back to back", *lines] if lines else []


def _tiles(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"- {row['name']}: {row['tile']} {_ms(row['ms'])}, best {row['best']} {_ms(row['best_ms'])}"
        for row in of(rows, "tune")
        if "best" in row
    ]
    return ["## Tiles, ms: the table's, then the best", *lines] if lines else []


def _ms(value: float | None) -> str:
    return "does not run" if value is None else f"{value:.4g}"


def _kernels(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in of(rows, "kernels")[:4]:
        if "us" in row:
            parts = [f"{name[:36]} {us:g}" for name, us in list(row["us"].items())[:4]]
            lines.append(f"- {row['name']}: {', '.join(parts)}")
    return ["## Kernels, µs", *lines] if lines else []


def _train(rows: Sequence[Row]) -> list[str]:
    presets: dict[str, list[str]] = {}
    for row in of(rows, "train"):
        if "step_ms" in row:
            presets.setdefault(row["preset"], []).append(f"{row['loss']} {row['step_ms']:.4g}")
    lines = [f"- {preset}: {', '.join(parts)}" for preset, parts in presets.items()]
    return ["## Training step, ms, by alignment loss", *lines] if lines else []


def _split(rows: Sequence[Row]) -> list[str]:
    """Parts of a step, the longest first."""
    lines = []
    for row in of(rows, "split"):
        if "ms" in row:
            parts = sorted(row["ms"].items(), key=lambda part: -part[1])
            lines.append(f"- {row['preset']}: " + ", ".join(f"{n} {ms:.3g}" for n, ms in parts))
    return ["## Training step, ms, each part alone", *lines] if lines else []


def _contrast(rows: Sequence[Row]) -> list[str]:
    cases: dict[str, list[str]] = {}
    for row in of(rows, "negatives"):
        if "forward_ms" in row:
            found = f"{row['backend']} {row['forward_ms']:.4g} + {row['backward_ms']:.4g}"
            cases.setdefault(row["case"], []).append(found)
    lines = [f"- {case}: {', '.join(parts)}" for case, parts in cases.items()]
    return ["## wla_contrast, ms, forward + backward", *lines] if lines else []


def _near(rows: Sequence[Row]) -> list[str]:
    """Of nearly aligned features the worst relative error of a loss, by backend and dtype."""
    worst: dict[str, Any] = {}
    for row in of(rows, "numerics"):
        if "loss_relative" in row:
            key = f"{row['backend']} {row['dtype']}"
            if row["loss_relative"] >= worst.get(key, row)["loss_relative"]:
                worst[key] = row
    parts = [
        f"{key} {row['loss_relative']:.1e} (loss {row['loss']:.1e}, bias {row['bias']:.1e})"
        for key, row in worst.items()
    ]
    return [f"nearly aligned, worst relative error: {'; '.join(parts)}"] if parts else []
