"""Subcommands: demo, pretrain, finetune, probe, evaluate, predict, show, cache, experiment.

Settings come from, in order: the dataclass defaults, `--preset`, `--config FILE`, the command line.
An unknown key anywhere is an error.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentParser, Namespace

from salkernels import __version__

from . import plugins
from .config import FinetuneConfig, ProbeConfig, RunConfig, pretrain_config
from .data.nifti import DataError
from .data.text import printable
from .distributed import require_one_process
from .errors import RunError, Stopped
from .experiment.launcher import add_options, launch_settings
from .experiment.tables import TABLES, Endpoint
from .options import add_allow_mismatch, demo_parser, evaluate_parser, predict_parser
from .parsing import Parser, require_settings_files
from .presets import BEST, FINETUNE, PRETRAIN, PresetName

Config = TypeVar("Config", bound=RunConfig)

COMMAND = "salkernels-train"
# What `--help` shows; `--help-all` shows all.
NEEDED = "--data DIR --out DIR"
FIRST = {
    "pretrain": ("--data DIR", "--out DIR", "--preset NAME", "--method NAME", "--optim.steps N"),
    "finetune": ("--data DIR", "--out DIR", "--preset NAME", "--encoder RUN", "--labelled M"),
    "probe": ("--data DIR", "--out DIR", "--preset NAME", "--encoder RUN", "--labelled M"),
    "experiment": ("--data DIR", "--out DIR", "--preset NAME", "--arms NAME ...", "--jobs N"),
}
DESCRIPTION = "Self-supervised alignment learning on slices of 3D scans."
# Not settings of an experiment's runs: it sets them for each.
SET_BY_EXPERIMENT = {
    "data", "out", "cache", "resume", "seed", "threads", "method", "encoder", "fold", "labelled",
    "leave_out_fold", "allow_mismatch",
}  # fmt: skip
SWITCHES = (  # true where no value follows
    "--resume", "--cine", "--overwrite", "--only_pretrain", "--mixed_spacing", "--allow_mismatch",
    "--prune",
)  # fmt: skip
REPEATED = ("demo", "experiment")  # go on by themselves when they are run again
ERRORS = (RunError, DataError, ValueError, TypeError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    arguments = _spell_out(sys.argv[1:] if argv is None else argv)
    try:
        named = plugins.load_all(arguments)
    except RunError as error:
        print(f"{COMMAND}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    parser = make_parser(arguments)
    if not arguments:
        parser.print_help()
        return 2
    if parser.ask_for_help(arguments):
        return 0
    try:
        require_settings_files(arguments)
    except RunError as error:
        parser.error(str(error))
    namespace = parser.parse_args(arguments)
    command = namespace.command
    if namespace[command].get("preset", preset := _named_preset(arguments)) != preset:
        parser.error("preset is for the command line; a settings file cannot name it")
    if namespace[command].get("plugin", named) != named:
        parser.error("plugin is for the command line; a settings file cannot name code to run")
    name = f"{parser.prog} {command}"
    try:
        if command != "pretrain":
            require_one_process(command)
        COMMANDS[command](namespace[command])
    except Stopped as stopped:
        again = "run it again to go on" if command in REPEATED else "go on with --resume"
        print(f"{name}: {stopped}; {again}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except ERRORS as error:
        print(f"{name}: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, (RunError, DataError, ValueError)) else 1
    except (MemoryError, RuntimeError) as error:
        if not (memory := _full_memory(error)):
            raise
        print(
            f"{name}: error: {memory} is full ({_one_line(error)}); lower slices or batch_size, "
            f"crop, or model.width",
            file=sys.stderr,
        )
        return 1
    return 0


def _full_memory(error: Exception) -> str:
    """Whose memory an error says is full; "" where it says something else."""
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return "the GPU's memory"
    if isinstance(error, MemoryError) or re.search("DefaultCPUAllocator|bad_alloc", str(error)):
        return "the computer's memory"
    return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def make_parser(arguments: Sequence[str]) -> Parser:
    """The parser; the preset named in the arguments sets its defaults."""
    parser = Parser(prog=COMMAND, description=DESCRIPTION, version=__version__)
    parser.words = arguments
    preset = _named_preset(arguments)

    parser.add_command("demo", demo_parser(), help="run everything on a generated phantom")

    kind, pretraining = pretrain_config(), {**PRETRAIN[preset], **BEST.get(preset, {})}
    for name, config, settings, text in (
        ("pretrain", kind, pretraining, "pre-train an encoder on scans without labels"),
        (
            "finetune",
            FinetuneConfig,
            FINETUNE[preset],
            "fine-tune on few labelled subjects, evaluate",
        ),
        (
            "probe",
            ProbeConfig,
            FINETUNE[preset],
            "read classes linearly from a frozen encoder, evaluate",
        ),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        sub = Parser(description=description, first=FIRST[name], needed=NEEDED)
        sub.add_argument("--config", action="config", help="YAML file of settings")
        sub.add_argument(
            "--preset",
            type=PresetName,
            default="desk",
            help=f"named settings to start from: {', '.join(get_args(PresetName))}",
        )
        plugins.add_option(sub)
        sub.add_class_arguments(config)
        # A probe has no loss and the like.
        own = {field.name for field in fields(config)}
        sub.set_defaults({k: v for k, v in settings.items() if k.partition(".")[0] in own})
        parser.add_command(name, sub, help=text)

    parser.add_command("evaluate", evaluate_parser(), help="Dice of a fine-tuned model")
    parser.add_command("predict", predict_parser(), help="segment NIfTI images")

    show = Parser(description="Redraw the curves of a run and list its figures.")
    show.add_argument("run", type=Path, help="run folder")
    plugins.add_option(show)
    parser.add_command("show", show, help="figures and last figures of a run")

    cache = Parser(description="List preprocessed data, and remove what nobody uses.")
    cache.add_argument("folder", type=Path, help="folder of caches: `cache` beside the runs")
    cache.add_argument("--prune", type=bool, default=False, help="remove instead of list")
    cache.add_argument("--idle", type=float, default=30.0, help="days unused before removal")
    parser.add_command("cache", cache, help="preprocessed data on disk")

    text = "a table of the paper: pre-train every method, fine-tune on folds x M, compare"
    parser.add_command("experiment", _experiment_parser(preset, text), help=text)
    return parser


def _experiment_parser(preset: PresetName, text: str) -> Parser:
    parser = Parser(
        description=f"{text[0].upper()}{text[1:]}. Runs that are done are not repeated: give the "
        "same command again to go on, or more arms, folds or M to compute what is missing.",
        first=FIRST["experiment"],
        needed=f"{{{','.join(TABLES)}}} {NEEDED}",
    )
    parser.add_argument("name", choices=list(TABLES), help="which table")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument(
        "--results", type=Path | None, default=None, help="folder of tables; default OUT/results"
    )
    parser.add_argument(
        "--preset", type=PresetName, default="desk", help="named settings to start from"
    )
    plugins.add_option(parser)
    parser.add_argument("--arms", type=str, nargs="+", default=[], help="by default all")
    parser.add_argument(
        "--labelled", type=int, nargs="+", default=[], help="M; 0 is all, by default the paper's"
    )
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--endpoint", type=Endpoint, default="dice",
        help="Dice of fine-tuned U-Nets, or of a probe on frozen encoders: seconds, for screening",
    )  # fmt: skip
    parser.add_argument("--only_pretrain", type=bool, default=False, help="no fine-tuning")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    add_options(parser)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0: all")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0],
        help="of pre-training and fine-tuning; with several, intervals are over seeds",
    )  # fmt: skip
    parser.add_argument(
        "--rotate_folds", type=int, default=0,
        help="how many of the folds each seed takes, the next ones for each; 0: all",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", type=str, default="", help="arm to compare with; by default the table's"
    )
    add_allow_mismatch(parser)
    parser.add_class_arguments(pretrain_config(), "pretrain", skip=SET_BY_EXPERIMENT)
    parser.add_class_arguments(FinetuneConfig, "finetune", skip=SET_BY_EXPERIMENT)
    for stage, presets in (("pretrain", PRETRAIN), ("finetune", FINETUNE)):
        chosen = {k: v for k, v in presets[preset].items() if k not in SET_BY_EXPERIMENT}
        parser.set_defaults({f"{stage}.{name}": value for name, value in chosen.items()})
    return parser


def run_pretrain(namespace: Namespace) -> None:
    from .closing import of_pretraining
    from .distributed import is_main
    from .pretrain import pretrain

    config = _build(pretrain_config(), namespace)
    began = time.monotonic()
    path = pretrain(config)
    if is_main():
        seconds = time.monotonic() - began
        _say(of_pretraining(config, path, namespace.preset, seconds))


def run_finetune(namespace: Namespace) -> None:
    from .figures import summary
    from .finetune import finetune

    config = _build(FinetuneConfig, namespace)
    finetune(config)
    _say(f"{summary(config.out)}\nfigures: {config.out / 'figures'}")


def run_probe(namespace: Namespace) -> None:
    from .figures import summary
    from .probe import probe

    config = _build(ProbeConfig, namespace)
    probe(config)
    _say(summary(config.out))


def run_demo(namespace: Namespace) -> None:
    from .demo import demo

    steps = {"pretrain": namespace.pretrain_steps, "finetune": namespace.finetune_steps}
    configs = []
    for command in ("pretrain", "finetune"):
        options = ["--preset=phantom"]
        if steps[command]:
            options.append(f"--optim.steps={steps[command]}")
        arguments = [command, *options]
        configs.append(make_parser(arguments).parse_args(arguments)[command])
    pretraining = _build(pretrain_config(), configs[0])
    finetuning = _build(FinetuneConfig, configs[1])
    if not 1 <= namespace.draws <= finetuning.num_folds:
        raise ValueError(
            f"draws must be 1 to {finetuning.num_folds}, one per fold, got {namespace.draws}"
        )
    _say(demo(namespace.out, pretraining, finetuning, namespace.draws, _command()))


def run_evaluate(namespace: Namespace) -> None:
    from .data.cache import open_cache, require_labels
    from .data.manifest import dataset_info
    from .data.preprocess import PreprocessConfig
    from .data.review import notices, require_scale_of_training, spacing_recorded
    from .evaluate import evaluate, subjects_to_score, write_scores
    from .figures import finetuning, summary
    from .identity import Identity, contents, for_results, require_unseen
    from .inputs import tell
    from .models.weights import MODEL, weights_file
    from .runlog import require_free

    require_free(namespace.out, namespace.overwrite)
    model, about, device = _load_model(namespace)
    info = dataset_info(namespace.dataset or about["dataset"], namespace.data)
    if list(info.class_names) != about["class_names"]:
        raise RunError(
            f"the model knows the classes {', '.join(about['class_names'])}, but {namespace.data} "
            f"has {', '.join(info.class_names)}"
        )
    settings = PreprocessConfig(**about["preprocess"])
    mixed = namespace.mixed_spacing or settings.mixed_spacing
    stated = namespace.spacing or settings.unknown_spacing
    settings = replace(settings, mixed_spacing=mixed, unknown_spacing=stated)
    folder = namespace.cache or namespace.out.parent / "cache"
    cache = open_cache(info.find(namespace.data), settings, info, folder)
    tell(namespace.out, notices(cache))
    names = [entry.name for entry in cache.volumes]
    require_scale_of_training(spacing_recorded(cache), about.get("spacing"), names, mixed)
    subjects = subjects_to_score(namespace.subjects, about["held_out"], cache)
    require_labels(cache, subjects)
    tested = Identity(info.name, contents(cache), held_out=tuple(subjects))
    path = weights_file(namespace.model, MODEL)
    marks = require_unseen(tested, subjects, path, about, allow=namespace.allow_mismatch)
    scores = evaluate(model, cache, subjects, device, progress=True)
    about = for_results(about)
    about["mismatches"] = list(dict.fromkeys([*about.get("mismatches", []), *marks]))
    about |= {"evaluated": list(subjects), "evaluated_data": tested.plain()["data"]}
    write_scores(namespace.out, scores, about)
    finetuning(namespace.out, model, cache, subjects, device)
    _say(summary(namespace.out))


def run_predict(namespace: Namespace) -> None:
    from .predict import predict_files

    model, about, device = _load_model(namespace)
    options = {name: namespace[name] for name in ("overwrite", "spacing", "mixed_spacing")}
    predict_files(model, about, namespace.input, namespace.out, device, **options)


def run_cache(namespace: Namespace) -> None:
    from .data.pruning import report

    report(namespace.folder, namespace.idle, namespace.prune)


def run_experiment(namespace: Namespace) -> None:
    from .experiment.experiment import ExperimentConfig, experiment

    common = {name: namespace[name] for name in ("data", "threads", "allow_mismatch")}
    common |= {"cache": namespace.out / "cache", "seed": namespace.seeds[0]}
    pretraining = _build(pretrain_config(), namespace.pretrain, **common)
    finetuning = _build(FinetuneConfig, namespace.finetune, **common)
    config = ExperimentConfig(
        name=namespace.name,
        out=namespace.out,
        results=namespace.results,
        arms=tuple(namespace.arms),
        labelled=tuple(namespace.labelled),
        folds=tuple(namespace.folds),
        only_pretrain=namespace.only_pretrain,
        jobs=namespace.jobs,
        command=_command(),
        preset=namespace.preset,
        allow_mismatch=namespace.allow_mismatch,
        endpoint=namespace.endpoint,
        seeds=tuple(namespace.seeds),
        rotate_folds=namespace.rotate_folds,
        baseline=namespace.baseline,
        **launch_settings(namespace),
    )
    _say(experiment(config, pretraining, finetuning))


def _command() -> str:
    """What the user typed, for the table."""
    return f"{COMMAND} {shlex.join(sys.argv[1:])}"


def run_show(namespace: Namespace) -> None:
    if not (namespace.run / "metrics.jsonl").exists():
        runs = sorted(path.parent.name for path in namespace.run.glob("*/metrics.jsonl"))
        raise RunError(
            f"{namespace.run} is not the folder of a run: it has no metrics.jsonl"
            + (f"; the runs in it are {', '.join(runs)}" if runs else "")
        )
    from .figures import run_figures, summary  # matplotlib takes seconds, when it is used

    drawn = run_figures(namespace.run)
    _say(summary(namespace.run))
    _say("\n".join(f"figure: {path}" for path in drawn))


COMMANDS = {
    "demo": run_demo,
    "pretrain": run_pretrain,
    "finetune": run_finetune,
    "probe": run_probe,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "show": run_show,
    "cache": run_cache,
    "experiment": run_experiment,
}


def _say(text: str) -> None:
    """Prints text that may hold names of files."""
    print(printable(text))


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """`--resume` as `--resume true`: the parser wants a value of every setting."""
    spelt: list[str] = []
    for place, argument in enumerate(arguments):
        spelt.append(argument)
        following = arguments[place + 1 : place + 2] or ["--"]
        if argument in SWITCHES and following[0].startswith("--"):
            spelt.append("true")
    return _files_first(spelt)


def _files_first(arguments: Sequence[str]) -> list[str]:
    """--config right after the command: the parser lets what stands later win, we the flags."""
    files: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            files += [word, *(value for value in [next(words, None)] if value is not None)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return [*others[:1], *files, *others[1:]]


def _named_preset(arguments: Sequence[str]) -> PresetName:
    """The value of --preset, or the default where it is absent or wrong (the parser says so)."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="desk")
    name: PresetName = finder.parse_known_args(list(arguments))[0].preset
    return name if name in get_args(PresetName) else "desk"


def _build(kind: type[Config], namespace: Namespace, **known: Any) -> Config:
    """The dataclass from a parsed namespace; nested dataclasses check their own values.

    known: fields that the namespace does not hold.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=set(known))
    names = {field.name for field in fields(kind)}
    plain = namespace.clone()
    for name in set(vars(namespace)) - names:
        del plain[name]
    return kind(**vars(parser.instantiate(plain)), **known)


def _load_model(namespace: Namespace) -> Any:
    from .device import Device
    from .models import load_unet

    device = Device.of(RunConfig(device=namespace.device, precision=namespace.precision))
    model, about = load_unet(namespace.model)
    return device.to(model), about, device


if __name__ == "__main__":  # what one tries first; training/run.py is the documented one
    sys.exit(main())
