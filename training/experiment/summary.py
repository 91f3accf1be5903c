"""From finished runs to the table: means, paired differences, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ..checkpoint import RunError
from ..files import write_atomically
from ..probe import ENDPOINT
from ..runlog import ENVIRONMENT, read_metrics
from ..settings import damaged, read_record
from .cells import Cell
from .tables import ALL, Table

CONFIDENCE = 0.95
LOOKS = 5
PROBED = (
    f"**{ENDPOINT.capitalize()}**: ridge regression from the frozen encoder's maps to the classes, "
    "and no fine-tuning. It is for screening: it does not tell how well an encoder starts a U-Net, "
    "and its Dice is not to be compared with that of a fine-tuned one, the paper's among them."
)
MONITORED = ("gp", "la", "la_pairs", "la_control", "cosine_embedding", "cosine_encoder")


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


class Summary(NamedTuple):
    """Mean and standard deviation (n − 1) over folds."""

    mean: float
    std: float
    folds: int


class Difference(NamedTuple):
    """Mean over folds of Dice less the baseline's on the same fold, with a confidence interval."""

    mean: float
    low: float
    high: float
    folds: int


@dataclass(frozen=True)
class Results:
    """Everything that tables and figures of one experiment are made from."""

    table: Table
    arms: tuple[str, ...]
    labelled: tuple[int, ...]
    folds: tuple[int, ...]  # planned, done or not
    scores: tuple[Score, ...]
    pretraining: dict[str, list[dict[str, float]]]  # arm -> monitored figures by step
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

    def select(self, arm: str, labelled: int) -> list[Score]:
        """By fold."""
        found = [s for s in self.scores if (s.arm, s.labelled) == (arm, labelled)]
        return sorted(found, key=lambda score: score.fold)

    def summary(self, arm: str, labelled: int, name: str = "") -> Summary | None:
        """Of the mean Dice, or of one class; None where no fold is done."""
        scores = self.select(arm, labelled)
        values = [score.dice[name] if name else score.mean for score in scores]
        if not values:
            return None
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return Summary(float(np.mean(values)), std, len(values))

    def difference(self, arm: str, labelled: int, baseline: str) -> Difference | None:
        """Over the folds that both have; None where there are fewer than two."""
        ours, theirs = (
            {score.fold: score for score in self.select(name, labelled)} for name in (arm, baseline)
        )
        folds = sorted(ours.keys() & theirs.keys())
        if arm == baseline or len(folds) < 2:
            return None
        for fold in folds:
            if ours[fold].subjects != theirs[fold].subjects:
                raise ValueError(
                    f"fold {fold}: {arm} and {baseline} were fine-tuned on other subjects, "
                    f"{ours[fold].subjects} and {theirs[fold].subjects}; they cannot be compared"
                )
        return paired_difference([ours[f].mean - theirs[f].mean for f in folds])


def paired_difference(differences: Sequence[float]) -> Difference:
    """Mean and Student's interval of paired differences; it takes folds as independent draws."""
    values = np.asarray(differences, dtype=float)
    count, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * error
    return Difference(mean, mean - reach, mean + reach, count)


def collect(
    table: Table, cells: Sequence[Cell], audit: Callable[[Cell], Sequence[str]] | None = None
) -> Results:
    """Reads what is done of the planned runs.

    audit: names what does not fit of a run, or refuses it.

    Raises:
        RunError: results that cannot be joined, or that cannot be read.
    """
    scores, pretraining, commits = [], {}, set()
    marks: dict[str, None] = {}
    for cell in cells:
        if not cell.path.exists():
            continue
        marks.update(dict.fromkeys(audit(cell) if audit else ()))
        commits.add(read_record(cell.config.out / ENVIRONMENT).get("commit"))
        if cell.command == "pretrain":
            pretraining[cell.arm] = monitored(cell.config.out)
            continue
        result = read_record(cell.path)
        marks.update({f"{cell.name}: {text}": None for text in result.get("mismatches", ())})
        scores.append(_score(cell, result))
    if not marks:
        _require_one_partition(scores)
    planned = {cell.arm for cell in cells}
    arms = tuple(arm.name for arm in table.arms if arm.name in planned)
    labelled = tuple(dict.fromkeys(c.labelled for c in cells if c.scored))
    folds = tuple(sorted({cell.fold for cell in cells if cell.scored}))
    known = tuple(sorted(commit for commit in commits if commit))
    endpoint = "probe" if any(cell.command == "probe" for cell in cells) else "dice"
    return Results(
        table, arms, labelled, folds, tuple(scores), pretraining, known, tuple(marks), endpoint
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
            {"arm": arm, "baseline": results.table.baseline, "labelled": m, **gain._asdict()}
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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "labelled", "fold", "mean_dice", *classes, "labelled_subjects"])
    for score in results.scores:
        dice = [f"{score.dice[name]:.4f}" for name in classes]
        row = [score.arm, score.labelled or "all", score.fold, f"{score.mean:.4f}", *dice]
        writer.writerow([*row, " ".join(score.subjects)])
    return text.getvalue()


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The table beside the paper's, classes, paired differences, and what pre-training came to."""
    baseline = results.table.arm(results.table.baseline).label
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
        f"## Paired differences from {baseline}\n\nDice on each fold less that of {baseline} on "
        f"the same fold with the same labelled subjects: mean over folds [95 % interval, Student's "
        f"t]. Folds share their training scans, and each arm was pre-trained once, so the true "
        f"uncertainty is larger.\n\n{_difference_table(results)}",
        f"## Classes\n\n{_class_table(results)}",
    ]
    parts = head + (dice if results.labelled else [])
    if any("la_pairs" in rows[-1] for rows in results.pretraining.values() if rows):
        parts.append(
            "## The end of pre-training\n\nGP; LA on slices of one scan, as a control on slices of "
            "different scans, and the ratio of the two, which tells whether the right ones match; "
            f"mean cosine of arbitrary pixels (1 is collapse). Means of the last {LOOKS} looks."
            f"\n\n{_pretraining_table(results)}"
        )
    return "\n\n".join(parts) + "\n"


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
    return _table(rows)


def _difference_table(results: Results) -> str:
    rows = [["", *map(_labelled, results.labelled)]]
    for arm in results.arms:
        found = [results.difference(arm, m, results.table.baseline) for m in results.labelled]
        if any(found):
            cells = [f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" if d else "" for d in found]
            rows.append([results.table.arm(arm).label, *cells])
    return _table(rows)


def _class_table(results: Results) -> str:
    classes = list(results.scores[0].dice) if results.scores else []
    rows = [["", *(f"{name}, {_labelled(m)}" for m in results.labelled for name in classes)]]
    for arm in results.arms:
        cells = [_summary(results, arm, m, c) for m in results.labelled for c in classes]
        rows.append([results.table.arm(arm).label, *cells])
    return _table(rows)


def _pretraining_table(results: Results) -> str:
    columns = {
        "gp": "GP",
        "la_pairs": "LA, same scan",
        "la_control": "LA, different scans",
        "cosine_embedding": "cosine after E",
        "cosine_encoder": "cosine of the encoder",
    }
    names = list(columns.values())
    rows = [["", *names[:3], "same / different", *names[3:]]]
    for arm, history in results.pretraining.items():
        if history:
            ends = [mean_of_end(history, name) for name in columns]
            same, different = ends[1:3]
            share = same / different if same is not None and different else None
            cells = ["" if x is None else f"{x:.3g}" for x in (*ends[:3], share, *ends[3:])]
            rows.append([results.table.arm(arm).label, *cells])
    return _table(rows)


def mean_of_end(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Mean of the last looks that have this figure: each is of a single batch."""
    values = [row[name] for row in history if name in row][-LOOKS:]
    return float(np.mean(values)) if values else None


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _summary(results: Results, arm: str, labelled: int, name: str = "") -> str:
    value = results.summary(arm, labelled, name)
    if value is None:
        return "not run"
    spread = "" if math.isnan(value.std) else f" ({value.std:.3f})"
    missing = len(results.folds) - value.folds
    return f"{value.mean:.3f}{spread}" + (
        f", {missing} of {len(results.folds)} missing" * bool(missing)
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
