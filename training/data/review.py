"""What a set of scans says only as a whole: spacing known or not, labels lost, labels empty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from .errors import DataError, listed, raise_problems

if TYPE_CHECKING:
    from .cache import VolumeCache, VolumeEntry

SHOWN_SCANS = 10
Recorded = Literal["recorded", "unknown", "mixed"]


def spacing_recorded(cache: VolumeCache) -> Recorded:
    """Whether the pixel size of the scans is known: of all, of none or of some."""
    if cache.config.unknown_spacing or all(entry.spacing for entry in cache.volumes):
        return "recorded"
    return "mixed" if any(entry.spacing for entry in cache.volumes) else "unknown"


def require_one_scale(cache: VolumeCache) -> None:
    """Raise a DataError where some scans record a spacing and others do not, unless that was said.

    Slices of the former have pixels of `spacing` mm, those of the latter are zoomed blindly.
    """
    if spacing_recorded(cache) != "mixed" or cache.config.mixed_spacing:
        return
    unknown = [entry.name for entry in cache.volumes if not entry.spacing]
    raise DataError(
        f"{len(unknown)} of {len(cache.volumes)} scans record no spacing, the others do: "
        f"{listed(unknown, SHOWN_SCANS)}; state it by --preprocess.unknown_spacing MM (by "
        f"--spacing MM in evaluate, by 'spacing' in a manifest), or pass "
        f"--preprocess.mixed_spacing true"
    )


def require_scale_of_training(
    here: Recorded, trained: Recorded | None, names: Sequence[str], mixed: bool
) -> None:
    """Raise a DataError where a model sees scans at another scale than those it learnt from.

    trained: spacing_recorded of the training, None where an older model does not say.
    names: the scans, or the file, for the message.
    mixed: whether the user, or the training, accepts both.
    """
    if trained in (None, "mixed", here) or mixed:
        return
    if here == "recorded":
        cause = "record a spacing, but those that the model learnt from did not"
        remedy = "pass --mixed_spacing if you accept another scale"
    else:
        cause = "record no spacing, but those that the model learnt from did"
        remedy = "state it by --spacing MM, or pass --mixed_spacing if you accept another scale"
    raise DataError(f"{listed(names, SHOWN_SCANS)}: headers {cause}; {remedy}")


def copies(cache: VolumeCache) -> list[str]:
    """Scans whose image is that of another subject, and whose."""
    owners: dict[str, VolumeEntry] = {}
    found = []
    for entry in cache.volumes:
        owner = owners.setdefault(entry.image_digest, entry)
        if owner.subject != entry.subject:
            found.append(f"{entry.name}: its image has the content of that of {owner.name}")
    return found


def require_scale_of_encoder(cache: VolumeCache, trained: Recorded | None, encoder: str) -> None:
    """Raise a DataError where fine-tuning sees scans at another scale than its encoder did.

    trained: spacing_recorded of its training, None where an older encoder does not say.
    """
    here = spacing_recorded(cache)
    if trained in (None, "mixed", here) or cache.config.mixed_spacing:
        return
    names = listed([entry.name for entry in cache.volumes], SHOWN_SCANS)
    remedy = "pass --preprocess.mixed_spacing true if you accept another scale"
    if here == "recorded":
        cause = "whose headers record no spacing, those here do"
        remedy = f"state it in pre-training by --preprocess.unknown_spacing MM, or {remedy}"
    else:
        cause = "with a recorded spacing, those here record none"
        remedy = f"state it by --preprocess.unknown_spacing MM, or {remedy}"
    raise DataError(f"{encoder} was made from scans {cause}: {names}; {remedy}")


def require_labels(cache: VolumeCache, subjects: Sequence[str]) -> None:
    """Raise a DataError that names the subjects none of whose scans has a label map."""
    missing = [subject for subject in subjects if not _labelled(cache, [subject])]
    remedy = "add their label files, or use these subjects for pre-training only"
    raise_problems(f"scans without labels cannot be learnt from or scored; {remedy}:", missing)


def require_classes(cache: VolumeCache, subjects: Sequence[str]) -> None:
    """Raise a DataError where no label map of the subjects holds any class but background."""
    entries = _labelled(cache, subjects)
    if entries and not any(entry.labelled_voxels for entry in entries):
        names = listed([entry.name for entry in entries], SHOWN_SCANS)
        raise DataError(
            f"no label map holds any class, of {names}; expected some of "
            f"{', '.join(cache.info.class_names[1:])}: check 'values' and 'above_max' in the "
            f"manifest, or draw other subjects"
        )


def notices(cache: VolumeCache) -> list[str]:
    """What the user should know of the data before trusting a number, one line each."""
    volumes = cache.volumes
    lines = [*_spacing_notice(cache)]
    lost = [entry for entry in volumes if entry.lost_voxels]
    lost.sort(key=lambda entry: -entry.lost_voxels / max(1, entry.labelled_voxels))
    if lost:
        shown = [
            f"{e.name} {e.lost_voxels:,} of {e.labelled_voxels:,} "
            f"({math.ceil(100 * e.lost_voxels / e.labelled_voxels)} %)"
            for e in lost
        ]
        lines.append(
            f"labelled voxels outside the canvas, in {len(lost)} of {len(volumes)} scans: "
            f"{listed(shown, SHOWN_SCANS)}; they cannot be learnt or found: raise preprocess.size "
            f"or preprocess.spacing"
        )
    stored = [entry.name for entry in volumes if not entry.oriented]
    if 0 < len(stored) < len(volumes):
        lines.append(
            f"{len(stored)} of {len(volumes)} scans record no orientation and are taken as stored, "
            f"perhaps in the reverse order of the others: {listed(stored, SHOWN_SCANS)}"
        )
    # Not refused: published releases hold such copies, ACDC as it is passed on among them.
    if twice := copies(cache):
        lines.append(
            f"one image under the names of two subjects: {listed(twice, SHOWN_SCANS)}; folds go by "
            f"subjects, so it may be learnt from and tested on at once: leave one out by --splits"
        )
    empty = [entry.name for entry in volumes if entry.labelled and not entry.labelled_voxels]
    if empty:
        lines.append(f"label maps without any class: {listed(empty, SHOWN_SCANS)}")
    for note in dict.fromkeys(note for entry in volumes for note in entry.notes):
        named = [entry.name for entry in volumes if note in entry.notes]
        lines.append(f"{listed(named, SHOWN_SCANS)}: {note}")
    return lines


def _spacing_notice(cache: VolumeCache) -> Iterable[str]:
    unknown = [entry.name for entry in cache.volumes if not entry.spacing]
    if not unknown:
        return
    config = cache.config
    taken = f"they are zoomed by unknown_zoom {config.unknown_zoom:g}, whatever their pixel size"
    if config.unknown_spacing:
        taken = f"pixels of {config.unknown_spacing:g} mm are taken, as stated"
    which = "" if len(unknown) == len(cache.volumes) else f" ({listed(unknown, SHOWN_SCANS)})"
    yield f"{len(unknown)} of {len(cache.volumes)} scans record no spacing{which}: {taken}"


def _labelled(cache: VolumeCache, subjects: Sequence[str]) -> list[VolumeEntry]:
    entries = [cache.volumes[i] for subject in subjects for i in cache.of_subject(subject)]
    return [entry for entry in entries if entry.labelled]
