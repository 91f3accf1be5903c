"""An experiment from its settings to tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import FinetuneConfig, OptimConfig, PretrainConfig, RunConfig
from ..identity import data_hash
from ..inputs import open_dataset
from ..probe import ENDPOINT
from ..progress import say
from ..runlog import environment, to_plain
from .audit import Audit, own_name, require_own_table
from .cells import Cell, folds_by_seed, plan
from .launcher import Launcher, LauncherName
from .schedule import run_cells
from .summary import Results, collect, write
from .tables import SCORED, TABLES, Endpoint, Table, with_plugins


@dataclass(frozen=True)
class ExperimentConfig:
    """What to run of a table, and where.

    Args:
        name: "table1" to "table4" of the paper, or "collapse".
        out: folder of all runs; experiments in the same folder share those they have in common.
        results: folder of tables and figures; by default `results` in `out`.
        arms: which of the table's arms; none takes all.
        labelled: M, labelled subjects, 0 for all; none takes those of the table.
        folds: which folds.
        seeds: of pre-training and fine-tuning; with several, the seed is what intervals go by.
        rotate_folds: how many of the folds each seed takes, other ones each; 0: all of them.
        baseline: the arm that the others are compared with; "" is that of the table.
        only_pretrain: leave fine-tuning out, where only what pre-training logs is of interest.
        jobs: runs at a time, each a process with `threads` threads of its own.
        command: what the user typed, for the table.
        preset: name of the settings, for the table.
        endpoint: "dice", of fine-tuned U-Nets, or "probe", of linear probes on frozen encoders.
        allow_mismatch: keep runs that were made of other data or encoders; the table says so.
        launcher: who starts the runs: this process, or submitit on "slurm" or on this machine.
        launch_with: NAME=VALUE settings of submitit.
        retries: how often a run that failed or was lost is started again.
    """

    name: str
    out: Path
    results: Path | None
    arms: tuple[str, ...]
    labelled: tuple[int, ...]
    folds: tuple[int, ...]
    only_pretrain: bool
    jobs: int
    command: str
    preset: str
    allow_mismatch: bool = False
    endpoint: Endpoint = "dice"
    seeds: tuple[int, ...] = (0,)
    rotate_folds: int = 0
    baseline: str = ""
    launcher: LauncherName = "processes"
    launch_with: tuple[str, ...] = ()
    retries: int = 0

    @property
    def document(self) -> str:
        """How the files of the table are called."""
        return self.name + ("-probe" if self.endpoint == "probe" else "")

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        if self.retries < 0:
            raise ValueError(f"retries must be >= 0, got {self.retries}")
        if self.launch_with and self.launcher == "processes":
            raise ValueError("launch_with is for --launcher slurm or local, which is not given")
        if min(self.labelled, default=0) < 0:
            raise ValueError(f"labelled must be >= 1 subjects, or 0 for all, got {self.labelled}")
        if len(set(self.folds)) < len(self.folds) or not self.folds:
            raise ValueError(f"folds must be different numbers, got {self.folds}")
        seeds = self.seeds
        if len(set(seeds)) < len(seeds) or min(seeds, default=-1) < 0:
            raise ValueError(f"seeds must be different numbers >= 0, got {seeds}")
        if not 0 <= self.rotate_folds <= len(self.folds):
            raise ValueError(
                f"rotate_folds must be 0, or how many of the {len(self.folds)} folds each seed "
                f"takes, got {self.rotate_folds}"
            )


def experiment(
    config: ExperimentConfig, pretraining: PretrainConfig, finetuning: FinetuneConfig
) -> str:
    """Runs what is missing, and writes tables and figures as runs end; returns the Markdown."""
    table = with_plugins(TABLES[config.name], config.arms)
    if config.baseline:
        table = replace(table, baseline=table.arm(config.baseline).name)
    for fold in config.folds:
        # A file of splits has its own number of folds, which is known with the data.
        if fold < 0 or (finetuning.splits is None and fold >= finetuning.num_folds):
            raise ValueError(f"folds are counted from 0 to {finetuning.num_folds - 1}, got {fold}")
    launcher = None
    if config.launcher != "processes":
        launcher = Launcher(config.launcher, config.out, config.launch_with)
    arms = tuple(table.arm(name) for name in config.arms) or table.arms
    labelled = config.labelled or table.labelled
    labelled = () if config.only_pretrain else labelled
    folds = folds_by_seed(config.seeds, config.folds, config.rotate_folds)
    cells = plan(arms, labelled, folds, config.out, pretraining, finetuning, config.endpoint)
    # Once, before several runs would build the same cache.
    scoring = SCORED[config.endpoint]
    caches = {"pretrain": open_dataset(pretraining), scoring: open_dataset(finetuning)}
    audit = Audit(caches, config.allow_mismatch)
    name = own_name(config.out)
    _report(config, table, cells, audit, name)  # first: what is done must be of this experiment

    try:
        run_cells(
            cells,
            config.out,
            config.jobs,
            lambda _: _report(config, table, cells, audit, name),
            launcher,
            config.retries,
        )
    finally:
        _report(config, table, cells, audit, name)
        results = collect(table, cells, audit)
        draw(results, _folder(config), config.document, _conditions(config, cells))
    return (_folder(config) / f"{config.document}.md").read_text()


def draw(results: Results, folder: Path, name: str, conditions: str) -> list[Path]:
    """All figures of an experiment; returns their paths."""
    from . import plots  # matplotlib takes seconds, when it is used

    say("drawing figures")
    return plots.draw(results, folder, name, conditions)


def _report(
    config: ExperimentConfig, table: Table, cells: Sequence[Cell], audit: Audit, name: str
) -> None:
    require_own_table(_folder(config) / f"{config.document}.json", name)
    results = collect(table, cells, audit)
    data = audit.caches[SCORED[config.endpoint]]
    about = {
        "experiment": config.name,
        "endpoint": config.endpoint,
        "id": name,
        "commands": [config.command],
        "conditions": _conditions(config, cells),
        "data": {"sha256": data_hash(data), "subjects": len(data.subjects)},
        "environment": environment(),
        "settings": _settings(cells),
    }
    write(results, _folder(config), config.document, about)


def _conditions(config: ExperimentConfig, cells: Sequence[Cell]) -> str:
    """In one line, what the figures hold for."""
    pretraining = next((c.config for c in cells if c.command == "pretrain"), None)
    scoring = next((c.config for c in cells if c.scored), None)
    run = pretraining or scoring
    if run is None:
        return "no runs"
    data = "phantom" if config.name == "demo" else run.dataset.upper()
    parts = [
        f"{data}, preset {config.preset} (crop {run.crop}, width "
        f"{run.model.width}), {_counted('seed', config.seeds)}"
    ]
    if pretraining:
        parts.append(f"{_length(pretraining.optim)} of pre-training")
    if scoring:
        how = (
            f"{ENDPOINT} without fine-tuning; 3D Dice"
            if config.endpoint == "probe"
            else f"{_length(scoring.optim)} of fine-tuning; {_score(scoring)}"
        )
        parts.append(f"{how} on held-out subjects, mean (standard deviation) over {_units(config)}")
    return ", ".join(parts)


def _length(optim: OptimConfig) -> str:
    """How long a run is: "500 steps", or "30 passes over its slices (at least 500 steps)"."""
    steps = f"{optim.steps:,} step{'s' * (optim.steps > 1)}"
    if not optim.epochs:
        return steps
    return f"{optim.epochs:g} passes over the slices (at least {steps})"


def _score(scoring: RunConfig) -> str:
    """Which Dice of which weights."""
    assert isinstance(scoring, FinetuneConfig)
    pooled = "Dice pooled over voxels" if scoring.dice == "pooled" else "3D Dice"
    last = scoring.select == "last"
    return f"{pooled} of the {'last' if last else 'best (on the held-out subjects)'} weights"


def _units(config: ExperimentConfig) -> str:
    """What means and deviations are over."""
    folds = f"{config.rotate_folds or len(config.folds)} folds"
    if len(config.seeds) == 1:
        return folds
    rotating = f", other ones of {len(config.folds)} for each" if config.rotate_folds else ""
    return f"{len(config.seeds)} seeds of the mean over {folds}{rotating}"


def _counted(word: str, numbers: Sequence[int]) -> str:
    return f"{word}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _settings(cells: Sequence[Cell]) -> dict[str, Any]:
    """The settings of one run of each kind, without paths of this machine."""
    found: dict[str, Any] = {}
    for cell in cells:
        plain = to_plain(cell.config)
        for name in ("data", "out", "cache", "encoder", "splits"):
            plain.pop(name, None)
        found.setdefault(cell.command, plain)
    return found


def _folder(config: ExperimentConfig) -> Path:
    return config.results or config.out / "results"
