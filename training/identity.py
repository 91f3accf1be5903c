"""What a run believes in, by content: its data, who was seen how, who is tested, its encoder.

An identity is kept in the run's folder, in its checkpoints and in the description of its weights,
and compared wherever something is joined: a run with its continuation, a cell with its experiment,
weights with the subjects that they are tested on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from salkernels._shared.files import file_digest, write_atomically

from .config import RunConfig
from .data.cache import VolumeCache
from .errors import RunError
from .settings import read_record

FILE = "identity.json"
SHORT = 16  # hexadecimal digits of a digest: 64 bits
SHOWN = 6  # names in a message
OPTION = "--allow_mismatch"


@dataclass(frozen=True)
class Identity:
    """The identity of one run.

    dataset: name of the data set.
    subjects: all subjects of the data set: `scans` and `labels` are digests of all that there is
        of the subject, `images` those of its image files.
    with_labels, without_labels: whom the run trains on, and how.
    held_out: who is kept for the test.
    split: the settings that made the three.
    strict: whether those held out were to be unseen in pre-training too.
    encoder: digest of the weights that the run starts from, and their own identity.
    plugins: those that method or data set came from: name -> digest of the source.
    mismatches: what was let pass although it does not fit.
    """

    dataset: str
    subjects: dict[str, dict[str, Any]]
    with_labels: tuple[str, ...] = ()
    without_labels: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    split: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    encoder: dict[str, Any] | None = None
    plugins: dict[str, str] = field(default_factory=dict)
    mismatches: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As JSON-like values, with `data`, the hash of the data, and `hash`, that of it all."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if not self.plugins:  # as in runs from before there were any
            del values["plugins"]
        beliefs = {name: value for name, value in values.items() if name != "mismatches"}
        return {"hash": _hash(beliefs), "data": _hash(values["subjects"]), **values}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Identity:
        """From plain(); ValueError where it is not that."""
        try:
            names = {n: tuple(values[n]) for n in ("with_labels", "without_labels", "held_out")}
            for contents in values["subjects"].values():
                contents["scans"], contents["labels"], contents["images"]
            return cls(
                dataset=values["dataset"],
                subjects=values["subjects"],
                **names,
                split=dict(values["split"]),
                strict=bool(values["strict"]),
                encoder=values["encoder"],
                plugins={str(k): str(v) for k, v in values.get("plugins", {}).items()},
                mismatches=tuple(values["mismatches"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no identity of a run: {error!r}") from error

    def images(self, names: Iterable[str] | None = None) -> set[str]:
        """Digests of the image files of these subjects, or of all."""
        chosen = self.subjects if names is None else names
        return {image for name in chosen if name in self.subjects for image in self._of(name)}

    def _of(self, name: str) -> list[str]:
        images: list[str] = self.subjects[name]["images"]
        return images


def contents(cache: VolumeCache) -> dict[str, dict[str, Any]]:
    """What the files of each subject hold, as they are read."""
    found: dict[str, dict[str, Any]] = {}
    # Which class a stored value stands for is part of what a label map says.
    meaning = [cache.info.class_names, cache.info.values, cache.info.above_max]
    for subject in cache.subjects:
        volumes = [cache.volumes[i] for i in cache.of_subject(subject)]
        scans = [(v.frame, v.role, v.time_index, v.image_digest, v.stated_spacing) for v in volumes]
        labels = [(v.frame, v.label_digest, meaning) for v in volumes if v.label_digest]
        found[subject] = {
            "scans": _hash(scans)[:SHORT],
            "labels": _hash(labels)[:SHORT] if labels else None,
            "images": sorted({v.image_digest[:SHORT] for v in volumes}),
        }
    return found


def data_hash(cache: VolumeCache) -> str:
    """The hash of a data set's contents."""
    return _hash(contents(cache))


def split_of(config: RunConfig, *names: str) -> dict[str, Any]:
    """These settings, which make folds, and the hash of the file that has them instead."""
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.splits is not None:
        chosen["splits"] = file_digest(config.splits.expanduser())
    return chosen


def encoder_identity(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the weights that a run starts from."""
    return {"sha256": file_digest(path), "identity": about.get("identity")}


def read_identity(out: Path) -> Identity | None:
    """What a run folder says; None where it says nothing.

    Raises:
        RunError: damaged, with the path.
    """
    if not (out / FILE).exists():
        return None
    try:
        return Identity.of(read_record(out / FILE))
    except ValueError as error:
        raise RunError(f"{out / FILE} is damaged: {error}; restore it, or start anew") from error


def write_identity(out: Path, identity: Identity) -> None:
    write_atomically(out / FILE, json.dumps(identity.plain(), indent=1) + "\n")


def differences(before: Identity | None, now: Identity, *, labels: bool) -> list[str]:
    """What is no longer as it was, by name; nothing where all is the same.

    labels: whether label maps matter, as they do not in pre-training.
    """
    if before is None:
        return ["which data it used was not recorded"]
    found = []
    if before.dataset != now.dataset:
        found.append(f"the data set was {before.dataset}, and is {now.dataset}")
    old, new = before.subjects, now.subjects
    kinds = {"images": "scans"} | ({"labels": "labels"} if labels else {})
    for text, names in {
        "new subjects": new.keys() - old.keys(),
        "subjects that are gone": old.keys() - new.keys(),
        **{
            f"other {kind} of": {n for n in old.keys() & new.keys() if old[n][key] != new[n][key]}
            for kind, key in kinds.items()
        },
    }.items():
        if names:
            found.append(f"{text} {listed(names)}")
    for name, text in {
        "with_labels": "trained on with labels",
        "without_labels": "trained on without labels",
        "held_out": "held out",
    }.items():
        earlier, later = set(getattr(before, name)), set(getattr(now, name))
        if earlier != later and not found:  # else it follows from what is said
            found.append(
                f"{text}: {listed(earlier) or 'nobody'} then, {listed(later) or 'nobody'} now"
            )
    ours, theirs = ((i.encoder or {}).get("sha256") for i in (before, now))
    if ours != theirs:
        found.append(f"the encoder was {_brief(ours)}, and is {_brief(theirs)}")
    for name in sorted({*before.plugins, *now.plugins}):
        then, today = (identity.plugins.get(name) for identity in (before, now))
        if then != today:
            found.append(f"the plug-in {name} was {_brief(then)}, and is {_brief(today)}")
    return found


def require_same(
    before: Identity | None, now: Identity, where: object, *, labels: bool, allow: bool
) -> list[str]:
    """What differs, where that is allowed.

    Raises:
        RunError: something differs and is not allowed; it is named.
    """
    found = differences(before, now, labels=labels)
    if found and not allow:
        raise RunError(
            f"the run in {where} was made of something else: {'; '.join(found)}. Restore that, "
            f"choose another --out, or go on all the same with {OPTION}, which marks the result"
        )
    return found


def require_unseen(
    tested: Identity, names: Sequence[str], path: Path, about: Mapping[str, Any], *, allow: bool
) -> list[str]:
    """Which subjects the weights should not be tested on, where that is allowed.

    path, about: of the weights, or of those that a run starts from.

    Raises:
        RunError: they have seen some of the subjects; these are named.
    """
    start = of_weights(path, about)
    if start is not None:
        found = seen_before(tested, names, start)
    elif about.get("leave_out_fold") is not None:
        found = ["its file does not say whom it has seen"]
    else:
        learnt = set(about.get("labelled", ())) & set(names)
        found = [f"seen with labels: {listed(learnt)}"] if learnt else []
    if found and not allow:
        raise RunError(
            f"{path} must not be tested on subjects that it has seen ({'; '.join(found)}). Choose "
            f"other weights or subjects, or go on all the same with {OPTION}, which marks the "
            f"result"
        )
    if start is not None and (same := same_names(tested, names, start)):
        print(
            f"warning: {path} was trained on other images under the same names "
            f"({listed(same)}); they are taken for other people",
            file=sys.stderr,
        )
    return [f"{path.name}: {text}" for text in found]


def seen_before(tested: Identity, names: Sequence[str], start: Identity | None) -> list[str]:
    """Which of the subjects under test the weights that a run starts from have seen, and how.

    With labels is too much; without is, where weights were to be made without the test subjects.
    A subject is known by its images, and by its name where the two data sets have any image in
    common. Names alone do not tell: everyone has a patient001.
    """
    found = []
    while start is not None:
        for kind, seen, matters in (
            ("with labels", start.with_labels, True),
            ("in pre-training", start.without_labels, start.strict),
        ):
            both = _both(tested, names, start, seen) if matters else []
            if both:
                found.append(f"seen {kind}: {listed(both)}")
        start = parent(start)
    return found


def same_names(tested: Identity, names: Sequence[str], start: Identity | None) -> list[str]:
    """Subjects under test whose names, but not whose data set, the weights have met."""
    met: set[str] = set()
    while start is not None:
        if not tested.images() & start.images():
            met |= set(names) & {
                *start.with_labels,
                *(start.without_labels if start.strict else ()),
            }
        start = parent(start)
    return sorted(met)


def parent(identity: Identity) -> Identity | None:
    """The identity of the weights that a run started from."""
    inner = (identity.encoder or {}).get("identity")
    return Identity.of(inner) if inner else None


def of_weights(path: object, about: Mapping[str, Any]) -> Identity | None:
    """The identity in the description of weights; None where they have none.

    Raises:
        RunError: there is one, which cannot be read.
    """
    try:
        return Identity.of(about["identity"]) if about.get("identity") else None
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error


def for_results(about: Mapping[str, Any]) -> dict[str, Any]:
    """A description without the contents of each subject, for people to read."""
    plain = {name: value for name, value in about.items() if name != "identity"}
    identity = about.get("identity")
    if identity:
        plain["identity"] = {name: identity.get(name) for name in ("hash", "data")}
        plain["mismatches"] = identity.get("mismatches", [])
    return plain


def listed(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def _both(
    tested: Identity, names: Sequence[str], other: Identity, seen: Sequence[str]
) -> list[str]:
    images = other.images(seen)
    related = bool(tested.images() & other.images())
    return [n for n in names if images & tested.images([n]) or (related and n in seen)]


def _brief(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
