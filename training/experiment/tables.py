"""Which arms and how many labelled subjects make up each table, and what the paper found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..methods import METHODS
from ..plugins import methods_of

ALL = 0  # as `labelled`: all subjects of the fold
Endpoint = Literal["dice", "probe"]  # of fine-tuned U-Nets, or of a probe on frozen encoders
SCORED = {"dice": "finetune", "probe": "probe"}  # by which command


@dataclass(frozen=True)
class Arm:
    """One way to start: a method, and what is set otherwise than in the preset.

    Args:
        name: of its folders; arms of the same name are the same in all tables.
        label: in tables and figures.
        method: registered name.
        settings: dotted names of pre-training settings -> values.
        value: of the setting that a table varies, for its curve.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """An experiment: arms, labelled subjects, and the arm that the others are compared with.

    Args:
        paper: arm -> M -> (mean, standard deviation) of Dice; ALL stands for the largest M.
        varies: the setting on the x axis of the figure, where a table varies one.
    """

    title: str
    arms: tuple[Arm, ...]
    labelled: tuple[int, ...]
    baseline: str
    paper: Mapping[str, Mapping[int, tuple[float, float]]] = field(default_factory=dict)
    varies: str = ""

    def arm(self, name: str) -> Arm:
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = ", ".join(arm.name for arm in self.arms)
        raise ValueError(f"this experiment has no arm {name!r}; expected some of {known}")


def with_plugins(table: Table, names: Sequence[str]) -> Table:
    """The table, with an arm for each of the names that is the method of a plug-in."""
    own = (Arm(name, METHODS[name].label, name) for name in methods_of(names))
    return replace(table, arms=(*table.arms, *own))


# Of the paper's tables 1 and 2, in their order; a method of one's own is no row of them.
PAPER = ("random", "rotation", "pirl", "simclr", "gcl", "pcl", "ccrop", "sal")
METHOD_ARMS = tuple(Arm(name, METHODS[name].label, name) for name in PAPER)


def _rows(
    columns: tuple[int, ...], rows: Mapping[str, tuple[tuple[float, float], ...]]
) -> dict[str, dict[int, tuple[float, float]]]:
    return {arm: dict(zip(columns, values, strict=True)) for arm, values in rows.items()}


def _sal(name: str, label: str, value: float | None = None, /, **settings: Any) -> Arm:
    """An ablation of SAL; the settings are those of `sal.`, `augment.` or `optim.` as `a__b`."""
    dotted = {key.replace("__", "."): chosen for key, chosen in settings.items()}
    return Arm(name, label, "sal", dotted, value)


def _frame(name: str, label: str, **settings: Any) -> Arm:
    """SAL without E, on independent views whose maps are brought into one frame before LA."""
    frame = {"sal__embedding": "none", "augment__geometry": "independent"}
    return _sal(name, label, **frame | {"sal__common_frame": True} | settings)


def _contrast(name: str, label: str, **settings: Any) -> Arm:
    """`_frame` with LA as a contrast; its weight is of a loss of another size than Eq. 1's."""
    return _frame(name, label, sal__loss="contrast", sal__lambda_=0.2, **settings)


# No change of intensity, as in the public code of PCL.
GREY: Mapping[str, Any] = {
    "augment.brightness": 0.0,
    "augment.contrast": 1.0,
    "augment.gamma": 1.0,
    "augment.bias": 0.0,
    "augment.noise": 0.0,
}
_ACDC, _CHD = (2, 6, 10, ALL), (2, 6, 15, ALL)
_SAL = Arm("sal", METHODS["sal"].label, "sal")
_NO_LA = _sal("sal-lambda0", "λ = 0", 0, sal__lambda_=0.0)

TABLES: dict[str, Table] = {
    "table1": Table(
        "Table 1: ways to start, on ACDC",
        METHOD_ARMS,
        _ACDC,
        "random",
        _rows(
            _ACDC,
            {
                "random": ((0.588, 0.07), (0.782, 0.03), (0.840, 0.03), (0.928, 0.00)),
                "rotation": ((0.572, 0.08), (0.809, 0.03), (0.868, 0.02), (0.925, 0.00)),
                "pirl": ((0.492, 0.03), (0.823, 0.04), (0.865, 0.01), (0.927, 0.00)),
                "simclr": ((0.352, 0.06), (0.725, 0.08), (0.824, 0.04), (0.927, 0.00)),
                "gcl": ((0.636, 0.05), (0.803, 0.04), (0.872, 0.01), (0.927, 0.01)),
                "pcl": ((0.671, 0.06), (0.850, 0.01), (0.885, 0.01), (0.929, 0.00)),
                "ccrop": ((0.262, 0.07), (0.729, 0.06), (0.853, 0.02), (0.926, 0.00)),
                "sal": ((0.723, 0.04), (0.869, 0.02), (0.890, 0.01), (0.929, 0.00)),
            },
        ),
    ),
    "table2": Table(
        "Table 2: ways to start, on CHD",
        METHOD_ARMS,
        _CHD,
        "random",
        _rows(
            _CHD,
            {
                "random": ((0.184, 0.06), (0.508, 0.06), (0.627, 0.05), (0.754, 0.02)),
                "rotation": ((0.171, 0.06), (0.488, 0.07), (0.625, 0.04), (0.749, 0.03)),
                "pirl": ((0.196, 0.07), (0.504, 0.08), (0.658, 0.03), (0.761, 0.03)),
                "simclr": ((0.192, 0.06), (0.515, 0.06), (0.631, 0.05), (0.756, 0.03)),
                "gcl": ((0.321, 0.05), (0.549, 0.06), (0.676, 0.04), (0.760, 0.04)),
                "pcl": ((0.338, 0.04), (0.566, 0.05), (0.685, 0.04), (0.771, 0.03)),
                "ccrop": ((0.256, 0.04), (0.548, 0.06), (0.690, 0.05), (0.769, 0.03)),
                "sal": ((0.348, 0.04), (0.572, 0.06), (0.693, 0.04), (0.772, 0.03)),
            },
        ),
    ),
    "table3": Table(
        "Table 3: the weight λ of the alignment loss",
        (
            _NO_LA,
            Arm("sal", "λ = 1", "sal", value=1),
            *(
                _sal(f"sal-lambda{weight}", f"λ = {weight}", weight, sal__lambda_=float(weight))
                for weight in (5, 40, 80)
            ),
        ),
        (6,),
        "sal-lambda0",
        _rows(
            (6,),
            {
                "sal-lambda0": ((0.850, 0.01),),
                "sal": ((0.869, 0.02),),
                "sal-lambda5": ((0.868, 0.02),),
                "sal-lambda40": ((0.868, 0.01),),
                "sal-lambda80": ((0.853, 0.02),),
            },
        ),
        varies="λ, weight of the alignment loss",
    ),
    "table4": Table(
        "Table 4: the window ω of the alignment loss",
        (
            Arm("sal-lambda0", "without LA", "sal", {"sal.lambda_": 0.0}),
            Arm("sal", "ω = 2", "sal", value=2),
            *(
                _sal(f"sal-window{side}", f"ω = {side}", side, sal__window_size=side)
                for side in (3, 4, 6)
            ),
        ),
        (6,),
        "sal-lambda0",
        _rows(
            (6,),
            {
                "sal-lambda0": ((0.850, 0.01),),
                "sal": ((0.869, 0.02),),
                "sal-window3": ((0.868, 0.01),),
                "sal-window4": ((0.869, 0.02),),
                "sal-window6": ((0.867, 0.01),),
            },
        ),
        varies="ω, window of the alignment loss",
    ),
    # Not in the paper: which embedding, views and strength keep the alignment loss from collapsing.
    "collapse": Table(
        "What keeps the alignment loss from collapsing",
        (
            METHOD_ARMS[0],
            _NO_LA,
            Arm("pcl", "PCL: λ = 0, independent views", "pcl"),
            _SAL,
            # A fixed orthogonal E leaves all cosines as they are: the same experiment as no E.
            _sal("sal-noE", "no E", sal__embedding="none"),
            _sal("sal-normE", "E of unit kernels", sal__embedding="normalised"),
            _sal("sal-sg", "keys without gradient", sal__stop_gradient=True),
            _sal("sal-noE-sg", "no E, keys without gradient",
                 sal__embedding="none", sal__stop_gradient=True),
            _sal("sal-centreE", "E, centred by image", sal__centre="image"),
            _sal("sal-noE-centre", "no E, centred by image",
                 sal__embedding="none", sal__centre="image"),
            _sal("sal-noE-window", "no E, centred by window, ω = 6",
                 sal__embedding="none", sal__centre="window", sal__window_size=6),
            _sal("sal-weak", "λ = 0.1", sal__lambda_=0.1),
            _sal("sal-independent", "E, independent views", augment__geometry="independent"),
            _sal("sal-noE-independent", "no E, independent views",
                 sal__embedding="none", augment__geometry="independent"),
            _sal("sal-frame", "E, independent views in one frame",
                 augment__geometry="independent", sal__common_frame=True),
            _frame("sal-noE-frame", "no E, independent views in one frame"),
            # Placebos of the arm before: the same pull, on what cannot be aligned.
            _frame("frame-same", "frame, the two views of one slice only", sal__pairs="same"),
            _frame("frame-other", "frame, placebo: slices of other scans", sal__pairs="other"),
            _frame("frame-roll", "frame, placebo: keys rolled by half a map", sal__roll=True),
            _frame("frame-adjacent", "frame, LA on adjacent slices", sal__t_la=0.15),
            # A pull with repulsion, and its placebos.
            _contrast("contrast", "contrast"),
            _contrast("contrast-E", "contrast, with E", sal__embedding="linear"),
            _contrast("contrast-same", "contrast, the two views of one slice only",
                      sal__pairs="same"),
            _contrast("contrast-other", "contrast, placebo: slices of other scans",
                      sal__pairs="other"),
            _contrast("contrast-roll", "contrast, placebo: keys rolled by half a map",
                      sal__roll=True),
            # The terms of VICReg on E's output, in that paper's proportion of 25 : 25 : 1.
            _sal("sal-vicreg", "E, with variance and covariance (VICReg)",
                 sal__variance=1.0, sal__covariance=0.04),
            # Baselines of another kind: pixels against pixels of the other view, slices apart.
            Arm("densecl", METHODS["densecl"].label, "densecl"),
            # Patients differ in grey values, by which SimCLR can tell slices apart if it may.
            METHOD_ARMS[PAPER.index("simclr")],
            Arm("simclr-grey", "SimCLR, grey values as they are", "simclr", GREY),
            _sal("sal-noE-s3", "no E, s = 3", sal__embedding="none", sal__scale=3),
            _sal("sal-noE-s5", "no E, s = 5", sal__embedding="none", sal__scale=5),
        ),
        (2,),
        "sal-lambda0",
    ),
    # Not in the paper either: what `demo` runs.
    "demo": Table("Two ways to start, on a phantom", (METHOD_ARMS[0], _SAL), (2,), "random"),
}  # fmt: skip
