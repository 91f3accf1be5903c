"""From finished runs to the table: means, paired differences, JSON, CSV and Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from salkernels._shared.files import write_atomically
from salkernels._shared.tabular import csv_text, markdown_table

from ..errors import RunError
from ..probe import ENDPOINT
from ..runlog import ENVIRONMENT, read_metrics
from ..settings import damaged, read_record
from .cells import Cell
from .statistics import Difference, Summary, paired_difference, summarised
from .tables import ALL, Table

LOOKS = 5
PROBED = (
    f"**{ENDPOINT.capitalize()}**: ridge regression from the frozen encoder's maps to the classes, "
    "and no fine-tuning. It is for screening: it does not tell how well an encoder starts a U-Net, "
    "and its Dice is not to be compared with that of a fine-tuned one, the paper's among them."
)
PAPERS = (
    "The paper's numbers are of another scale, and some are most likely quoted and not run: see "
    '"The paper\'s numbers" in docs/training/experiments.md.'
)
MONITORED = (
    "gp", "chance_gp", "la", "la_pairs", "la_control", "cosine_embedding", "rank_embedding",
    "cosine_encoder", "rank_encoder", "contrast", "chance_contrast",
    "nearest_same_scan", "chance_nearest_same_scan", "nearest_distance", "chance_nearest_distance",
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """Dice of one fine-tuned model, or of one probe, on its fold's held-out scans."""

    arm: str
    labelled: int
    fold: int
    dice: dict[str, float]  # per class
    mean: float  # over the classes
    subjects: tuple[str, ...]  # whose labels were used
    held_out: tuple[str, ...] = ()  # who was scored
    seed: int = 0  # of pre-training, and of fine-tuning


@dataclass(frozen=True)
class Results:
    """Everything that tables and figures of one experiment are made from."""

    table: Table
    arms: tuple[str, ...]
    labelled: tuple[int, ...]
    planned: tuple[tuple[int, int], ...]  # (seed, fold), done or not
    scores: tuple[Score, ...]
    pretraining: dict[str, list[dict[str, float]]]  # arm -> monitored by step, mean over seeds
    commits: tuple[str, ...] = ()  # of the code that ran
    mismatches: tuple[str, ...] = ()  # what was let pass although it does not fit
    endpoint: str = "dice"

    @property
    def measure(self) -> str:
        """What the scores are, for titles and axes."""
        return "3D Dice" if self.endpoint == "dice" else f"3D Dice of a {ENDPOINT}"

    @property
    def paper(self) -> Mapping[str, Mapping[int, tuple[float, float]]]:
        """The paper's scores, where they are of the same kind."""
        return self.table.paper if self.endpoint == "dice" else {}

    @property
    def seeds(self) -> tuple[int, ...]:
        """Planned, done or not."""
        return tuple(sorted({seed for seed, _ in self.planned}))

    @property
    def unit(self) -> str:
        """What is taken as independent: pre-training seeds, or the folds of a single one."""
        return "seed" if len(self.seeds) > 1 else "fold"

    def select(self, arm: str, labelled: int) -> list[Score]:
        """By seed and fold."""
        found = [s for s in self.scores if (s.arm, s.labelled) == (arm, labelled)]
        return sorted(found, key=lambda score: (score.seed, score.fold))

    def summary(self, arm: str, labelled: int, name: str = "") -> Summary | None:
        """Of the mean Dice, or of one class; None where nothing is done."""
        scores = self.select(arm, labelled)
        if not scores:
            return None
        values = {(s.seed, s.fold): s.dice[name] if name else s.mean for s in scores}
        found = summarised([*self.by_unit(values).values()])
        return found._replace(folds=len(scores), seeds=len({s.seed for s in scores}))

    def gaps(self, arm: str, labelled: int, baseline: str) -> dict[tuple[int, int], float]:
        """(seed, fold) -> Dice less the baseline's, where both are done."""
        ours, theirs = (
            {(score.seed, score.fold): score for score in self.select(name, labelled)}
            for name in (arm, baseline)
        )
        both = sorted(ours.keys() & theirs.keys())
        for run in both:
            if ours[run].subjects != theirs[run].subjects:
                raise ValueError(
                    f"fold {run[1]}: {arm} and {baseline} were fine-tuned on other subjects, "
                    f"{ours[run].subjects} and {theirs[run].subjects}; they cannot be compared"
                )
        return {run: ours[run].mean - theirs[run].mean for run in both}

    def by_unit(self, values: Mapping[tuple[int, int], float]) -> dict[int, float]:
        """Values by (seed, fold) -> one for each unit: of a seed, the mean over its folds."""
        grouped: dict[int, list[float]] = {}
        for (seed, fold), value in values.items():
            grouped.setdefault(seed if self.unit == "seed" else fold, []).append(value)
        return {unit: float(np.mean(group)) for unit, group in grouped.items()}

    def difference(self, arm: str, labelled: int, baseline: str) -> Difference | None:
        """Over the units that both have; None where there are fewer than two."""
        gaps = self.gaps(arm, labelled, baseline)
        units = self.by_unit(gaps)
        if arm == baseline or len(units) < 2:
            return None
        found = paired_difference([*units.values()])
        return found._replace(folds=len(gaps), seeds=len({seed for seed, _ in gaps}))

    def best_of(self, labelled: int) -> tuple[str, int]:
        """The arm furthest above the baseline, and of how many it is the best; "", 0 if of one.

        It is flattered by that choice: with many arms one is ahead by chance.
        """
        found = {arm: self.difference(arm, labelled, self.table.baseline) for arm in self.arms}
        gains = {arm: gain.mean for arm, gain in found.items() if gain}
        return (max(gains, key=lambda arm: gains[arm]), len(gains)) if len(gains) > 1 else ("", 0)


def collect(
    table: Table, cells: Sequence[Cell], audit: Callable[[Cell], Sequence[str]] | None = None
) -> Results:
    """Reads what is done of the planned runs.

    audit: names what does not fit of a run, or refuses it.

    Raises:
        RunError: results that cannot be joined, or that cannot be read.
    """
    scores, commits = [], set()
    histories: dict[str, list[list[dict[str, float]]]] = {}
    marks: dict[str, None] = {}
    for cell in cells:
        if not cell.path.exists():
            continue
        marks.update(dict.fromkeys(audit(cell) if audit else ()))
        commits.add(read_record(cell.config.out / ENVIRONMENT).get("commit"))
        if cell.command == "pretrain":
            histories.setdefault(cell.arm, []).append(monitored(cell.config.out))
            continue
        result = read_record(cell.path)
        marks.update({f"{cell.name}: {text}": None for text in result.get("mismatches", ())})
        scores.append(_score(cell, result))
    if not marks:
        _require_one_partition(scores)
    arms = tuple(arm.name for arm in table.arms if arm.name in {cell.arm for cell in cells})
    labelled = tuple(dict.fromkeys(c.labelled for c in cells if c.scored))
    planned = tuple(sorted({(cell.seed, cell.fold) for cell in cells if cell.scored}))
    pretraining = {arm: averaged(rows) for arm, rows in histories.items()}
    known = tuple(sorted(commit for commit in commits if commit))
    endpoint = "probe" if any(cell.command == "probe" for cell in cells) else "dice"
    return Results(
        table, arms, labelled, planned, tuple(scores), pretraining, known, tuple(marks), endpoint
    )


def _score(cell: Cell, result: dict[str, Any]) -> Score:
    try:
        return Score(
            cell.arm,
            cell.labelled,
            cell.fold,
            {name: _number(value) for name, value in result["dice"].items()},
            _number(result["mean_dice"]),
            tuple(result["labelled"]),
            tuple(result.get("held_out", ())),
            cell.seed,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(cell.path, f"no results of a run ({error!r})") from error


def _require_one_partition(scores: Sequence[Score]) -> None:
    """Folds that are averaged test every subject at most once, the same one for every arm."""
    fold_of: dict[str, int] = {}
    for score in scores:
        for subject in score.held_out:
            if fold_of.setdefault(subject, score.fold) != score.fold:
                raise RunError(
                    f"{subject} is tested in fold {fold_of[subject]} and in fold {score.fold} "
                    f"({score.arm}): these are results of two splits, which cannot be averaged; "
                    f"delete the runs of one of them"
                )


def monitored(run: Path) -> list[dict[str, float]]:
    """The rows of a pre-training run that look at collapse."""
    return [
        {"step": row["step"], **{name: row[name] for name in MONITORED if name in row}}
        for row in read_metrics(run)
        if "cosine_encoder" in row
    ]


def averaged(runs: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Means over the runs of several seeds of what they monitored at the same steps."""
    if len(runs) == 1:
        return runs[0]
    rows: dict[float, list[dict[str, float]]] = {}
    for run in runs:
        for row in run:
            rows.setdefault(row["step"], []).append(row)
    return [
        {name: float(np.mean([r[name] for r in same if name in r])) for name in same[0]}
        for _, same in sorted(rows.items())
    ]


def write(results: Results, folder: Path, name: str, about: dict[str, Any]) -> None:
    """`name`.json, `name`.csv and `name`.md."""
    document = {
        **about,
        "summary": [
            {"arm": arm, "labelled": m, **value._asdict()}
            for arm in results.arms
            for m in results.labelled
            if (value := results.summary(arm, m))
        ],
        "differences": [
            {
                "arm": arm,
                "baseline": results.table.baseline,
                "labelled": m,
                **gain._asdict(),
                "best_of": results.best_of(m)[1] if arm == results.best_of(m)[0] else None,
            }
            for arm in results.arms
            for m in results.labelled
            if (gain := results.difference(arm, m, results.table.baseline))
        ],
        "commits": results.commits,
        "mismatches": results.mismatches,
        "scores": [asdict(score) for score in results.scores],
        "pretraining": results.pretraining,
    }
    text = json.dumps(_without_nan(document), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / f"{name}.json", text + "\n")
    write_atomically(folder / f"{name}.csv", as_csv(results))
    write_atomically(folder / f"{name}.md", markdown(results, about))


def as_csv(results: Results) -> str:
    """One line per scored run."""
    classes = list(results.scores[0].dice) if results.scores else []
    rows = [["arm", "labelled", "fold", "seed", "mean_dice", *classes, "labelled_subjects"]]
    for score in results.scores:
        dice = [f"{score.dice[name]:.4f}" for name in classes]
        which = [score.arm, str(score.labelled or "all"), str(score.fold), str(score.seed)]
        rows.append([*which, f"{score.mean:.4f}", *dice, " ".join(score.subjects)])
    return csv_text(rows)


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The table beside the paper's, classes, paired differences, and what pre-training came to."""
    title = results.table.title + (f" ({ENDPOINT})" if results.endpoint == "probe" else "")
    head = [
        f"# {title}",
        "\n".join(f"    {line}" for line in about["commands"]),
        f"{about['conditions']}.{_revisions(results)}",
    ]
    if results.endpoint == "probe":
        head.append(PROBED)
    if results.mismatches:
        marks = "\n".join(f"- {text}" for text in results.mismatches)
        head.append(f"**Not all of one piece**, and let pass by hand:\n\n{marks}")
    dice = [
        _dice_table(results),
        *_differences(results),
        f"## Classes\n\n{_class_table(results)}",
    ]
    parts = head + (dice if results.labelled else [])
    if any("la_pairs" in rows[-1] for rows in results.pretraining.values() if rows):
        parts.append(
            "## The end of pre-training\n\nGP, and what it is by chance; LA on slices of one scan, "
            "as a control on slices of different scans, and the ratio of the two, which tells "
            "whether the right ones match; mean cosine (1 is collapse) and effective rank (1 is "
            f"collapse to one line) of arbitrary pixels. Means of the last {LOOKS} looks."
            f"\n\n{_pretraining_table(results)}"
        )
    if any("nearest_same_scan" in rows[-1] for rows in results.pretraining.values() if rows):
        parts.append(
            "## Which slice is nearest\n\nOf each slice in a batch the most similar other one, by "
            "the encoder's pooled last map: how often it is of the same scan (chance in brackets), "
            f"and how far away its relative position is. Means of the last {LOOKS} looks.\n\n"
            f"{_nearest_table(results)}"
        )
    return "\n\n".join(parts) + "\n"


def _differences(results: Results) -> list[str]:
    """The section of paired differences; none where the baseline was not run."""
    arm = results.table.baseline
    if not any(results.difference(a, m, arm) for a in results.arms for m in results.labelled):
        return []
    name = results.table.arm(arm).label
    said = _explained(results, name)
    return [f"## Paired differences from {name}\n\n{said}\n\n{_difference_table(results)}"]


def _explained(results: Results, baseline: str) -> str:
    """What the table of differences shows, and how far it can be believed."""
    paired = f"Dice on each fold less that of {baseline} on the same fold, same labelled subjects"
    p = "exact two-sided p of flipped signs"
    best = ""
    if any(results.best_of(m)[1] for m in results.labelled):
        best = (
            " The highest is marked as the best of n, with the p of n tries (Bonferroni): that "
            "choice flatters its mean and interval, so it must be confirmed with fresh seeds."
        )
    if results.unit == "fold":
        return (
            f"{paired}: mean over folds [95 % interval, Student's t], {p}. Folds share their "
            "training scans, and each arm was pre-trained once, so the true uncertainty is "
            f"larger.{best}"
        )
    return (
        f"{paired} and the same seed, averaged over the folds of a seed: mean over "
        f"{len(results.seeds)} seeds of pre-training [95 % interval, Student's t], {p}. The seed "
        f"is the unit.{best}"
    )


def _revisions(results: Results) -> str:
    """Which code ran: an experiment that goes on over weeks may have seen several versions."""
    return f" Runs of revision {', '.join(results.commits)}." if results.commits else ""


def _dice_table(results: Results) -> str:
    columns = [_labelled(m) for m in results.labelled]
    paper = [m for m in results.labelled if any(m in row for row in results.paper.values())]
    rows = [["", *columns, *(f"paper, {_labelled(m)}" for m in paper)]]
    for arm in results.arms:
        theirs = results.paper.get(arm, {})
        rows.append(
            [
                results.table.arm(arm).label,
                *(_summary(results, arm, m) for m in results.labelled),
                *(f"{theirs[m][0]:.3f} ({theirs[m][1]:.2f})" if m in theirs else "" for m in paper),
            ]
        )
    return markdown_table(rows) + (f"\n\n{PAPERS}" if paper else "")


def _difference_table(results: Results) -> str:
    rows = [["", *map(_labelled, results.labelled)]]
    best = {m: results.best_of(m) for m in results.labelled}
    for arm in results.arms:
        found = {m: results.difference(arm, m, results.table.baseline) for m in results.labelled}
        if any(found.values()):
            cells = [
                _gap(gap, best[m][1] if arm == best[m][0] else 0) if gap else ""
                for m, gap in found.items()
            ]
            rows.append([results.table.arm(arm).label, *cells])
    return markdown_table(rows)


def _gap(found: Difference, best_of: int = 0) -> str:
    """best_of: of how many arms this is the best; 0: it is not."""
    known = not math.isnan(found.p)
    p = f", p = {found.p:.2g}" if known else ""
    if best_of:
        tries = f" (p = {min(1.0, best_of * found.p):.2g})" if known else ""
        p += f"; **best of {best_of}**{tries}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{p}"


def _class_table(results: Results) -> str:
    classes = list(results.scores[0].dice) if results.scores else []
    rows = [["", *(f"{name}, {_labelled(m)}" for m in results.labelled for name in classes)]]
    for arm in results.arms:
        cells = [_summary(results, arm, m, c) for m in results.labelled for c in classes]
        rows.append([results.table.arm(arm).label, *cells])
    return markdown_table(rows)


def _pretraining_table(results: Results) -> str:
    columns = {
        "gp": "GP",
        "chance_gp": "by chance",
        "la_pairs": "LA, same scan",
        "la_control": "LA, different scans",
        "cosine_embedding": "cosine after E",
        "rank_embedding": "rank after E",
        "cosine_encoder": "cosine of the encoder",
        "rank_encoder": "rank of the encoder",
    }
    names = list(columns.values())
    rows = [["", *names[:4], "same / different", *names[4:]]]
    for arm, history in results.pretraining.items():
        if history:
            ends = [mean_of_end(history, name) for name in columns]
            same, different = ends[2:4]
            share = same / different if same is not None and different else None
            cells = ["" if x is None else f"{x:.3g}" for x in (*ends[:4], share, *ends[4:])]
            rows.append([results.table.arm(arm).label, *cells])
    return markdown_table(rows)


def _nearest_table(results: Results) -> str:
    rows = [["", "of the same scan", "distance"]]
    for arm, history in results.pretraining.items():
        ends = [
            (mean_of_end(history, name), mean_of_end(history, f"chance_{name}"))
            for name in ("nearest_same_scan", "nearest_distance")
        ]
        cells = [f"{own:.2f} ({chance:.2f})" for own, chance in ends if own is not None and chance]
        if len(cells) == len(ends):
            rows.append([results.table.arm(arm).label, *cells])
    return markdown_table(rows)


def mean_of_end(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Mean of the last looks that have this figure: each is of a single batch."""
    values = [row[name] for row in history if name in row][-LOOKS:]
    return float(np.mean(values)) if values else None


def _summary(results: Results, arm: str, labelled: int, name: str = "") -> str:
    value = results.summary(arm, labelled, name)
    if value is None:
        return "not run"
    spread = "" if math.isnan(value.std) else f" ({value.std:.3f})"
    missing = len(results.planned) - value.folds
    return f"{value.mean:.3f}{spread}" + (
        f", {missing} of {len(results.planned)} missing" * bool(missing)
    )


def _labelled(m: int) -> str:
    return f"M = {'all' if m == ALL else m}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return value
