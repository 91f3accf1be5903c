"""Parsers of the commands that use a fine-tuned model, and options that commands share."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from . import plugins
from .config import Precision
from .parsing import Parser


def demo_parser() -> Parser:
    parser = Parser(description="Phantom data, SAL pre-training, fine-tuning, comparison.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for all of it")
    parser.add_argument("--draws", type=int, default=5, help="folds to fine-tune on")
    parser.add_argument("--pretrain_steps", type=int, default=0, help="0: the phantom preset's")
    parser.add_argument("--finetune_steps", type=int, default=0, help="0: the phantom preset's")
    return parser


def evaluate_parser() -> Parser:
    parser = Parser(description="Dice of a fine-tuned model on labelled scans.")
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--cache", type=Path | None, default=None, help="preprocessed slices")
    parser.add_argument(
        "--subjects", type=str, nargs="+", default=None,
        help="subjects to evaluate, or `all` that have labels; by default those that were held out "
        "in fine-tuning, and all of a data set that has none of them",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", type=str | None, default=None,
        help="layout of the data where it is not that of the training: acdc, chd or manifest",
    )  # fmt: skip
    parser.add_argument("--overwrite", type=bool, default=False, help="replace earlier scores")
    plugins.add_option(parser)
    add_spacing(parser)
    add_allow_mismatch(parser)
    return parser


def predict_parser() -> Parser:
    parser = Parser(description="Label maps of NIfTI images, on the images' own grid.")
    add_model(parser)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True,
        help="NIfTI files, folders of them (of any layout; label maps are left out), lists of "
        "paths (.txt) or manifests (.json)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the label maps")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace existing files")
    add_spacing(parser)
    return parser


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, help="run folder of finetune, or model.safetensors"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", type=Precision, default="fp32", help="of the forward pass")


def add_spacing(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--spacing", type=float, default=0.0,
        help="in-plane pixel size in mm of scans whose header records none",
    )  # fmt: skip
    parser.add_argument(
        "--mixed_spacing", type=bool, default=False,
        help="accept scans with a recorded spacing beside ones without",
    )  # fmt: skip


def add_allow_mismatch(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow_mismatch", type=bool, default=False,
        help="go on although data, split or encoder do not fit; the result says so",
    )  # fmt: skip
