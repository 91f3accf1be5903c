"""Label maps brought to the grid of their image, and what headers are believed to say."""

import itertools
import struct

import nibabel as nib
import numpy as np
import pytest

from salkernels.training.data.datasets import DATASETS, Scan, read_scan, read_truth
from salkernels.training.data.grid import Grid, on_grid
from salkernels.training.data.nifti import DataError, Volume, image_grid, read_image
from salkernels.training.data.preprocess import PreprocessConfig, plan

ACDC = DATASETS["acdc"]
AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.5, 0, 30], [0, 0, 8, -20], [0, 0, 0, 1.0]])
SHAPE = (7, 6, 5)


def oblique():
    """A short-axis stack, between the axes of the body."""
    a, b = 0.7, 0.6
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z * [1.4, 1.4, 9.0]
    affine[:3, 3] = 13, -40, 8
    return affine


def stored(array, affine, axes=(0, 1, 2), flips=()):
    """The same voxels at the same places of the world, stored along other axes."""
    array, affine = array.transpose(axes), affine[:, [*axes, 3]].copy()
    for axis in flips:
        affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
        affine[:3, axis] *= -1
        array = np.flip(array, axis)
    return np.ascontiguousarray(array), affine


def save(path, array, affine, *, sform=1, qform=1, pixdim=None, unit="mm"):
    """Written by nibabel; pixdim is then overwritten, with values that it would repair."""
    image = nib.Nifti1Image(array, None)
    image.set_qform(affine if not isinstance(affine, tuple) else affine[1], qform)
    image.set_sform(affine if not isinstance(affine, tuple) else affine[0], sform)
    image.header.set_xyzt_units(unit)
    image.to_filename(path)
    if pixdim is not None:
        raw = bytearray(path.read_bytes())
        struct.pack_into("<fff", raw, 80, *pixdim)
        path.write_bytes(raw)
    return path


def truth():
    return np.random.default_rng(3).integers(0, 4, SHAPE).astype(np.uint8)


def scan_of(tmp_path, label, label_affine, affine=AFFINE, **header):
    image = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    return Scan(
        "p1",
        "frame01",
        "",
        save(tmp_path / "p1.nii", image, affine),
        save(tmp_path / "p1_gt.nii", label, label_affine, **header),
    )


@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("flips", [(), (0,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_axes_in_any_order_and_direction_are_turned_back(tmp_path, affine, axes, flips):
    label, place = stored(truth(), affine, axes, flips)
    scan = scan_of(tmp_path, label, place, affine)
    image, found = read_scan(scan, ACDC)
    np.testing.assert_array_equal(found, truth())
    np.testing.assert_array_equal(read_truth(scan, ACDC), truth())
    assert image.notes == ()


def moved(by):
    affine = AFFINE.copy()
    affine[:3, 3] += by
    return affine


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (moved(10), "6.67 voxels away"),
        (moved([0, 0, 8]), "1 voxels away"),
        (moved([0.4, 0, 0]), "0.267 voxels away"),
        (AFFINE @ np.diag([2, 2, 1, 1]), "voxels away"),
        (AFFINE @ np.diag([1.01, 1, 1, 1]), "voxels away"),
        (AFFINE @ np.diag([-1, 1, 1, 1]), "voxels away"),  # reversed, and not where it was
        (oblique(), "voxels away|turned against"),
    ],
    ids=["elsewhere", "one slice on", "a quarter pixel", "larger", "1 %", "mirrored", "turned"],
)
def test_another_grid_of_the_same_shape_is_refused_by_name(tmp_path, place, reason):
    scan = scan_of(tmp_path, truth(), place)
    for read in (read_scan, read_truth):
        with pytest.raises(DataError, match=reason) as caught:
            read(scan, ACDC)
        assert str(caught.value).startswith(str(scan.label))
        assert "\n" not in str(caught.value)


def test_another_shape_is_refused_also_where_the_axes_are_permuted(tmp_path):
    label, place = stored(truth(), AFFINE, (1, 0, 2))
    scan = scan_of(tmp_path, label[:, :-1], place)
    with pytest.raises(DataError, match=r"shape \(6, 6, 5\) does not fit the image's \(7, 6, 5\)"):
        read_scan(scan, ACDC)


@pytest.mark.parametrize("change", [1e-4 * np.eye(4), -1e-4 * np.ones((4, 4)), 1e-5 * np.eye(4)])
def test_what_rounding_leaves_is_accepted(tmp_path, change):
    change = change.copy()
    change[3] = 0
    assert np.array_equal(read_scan(scan_of(tmp_path, truth(), AFFINE + change), ACDC)[1], truth())


def test_the_thickness_of_a_single_slice_decides_nothing():
    one = Grid((7, 6, 1), AFFINE, (1.5, 1.5, 8.0), "LPS")
    thin = Grid((7, 6, 1), AFFINE @ np.diag([1, 1, 0.1, 1]), (1.5, 1.5, 0.8), "LPS")
    label = truth()[..., :1]
    np.testing.assert_array_equal(on_grid("p", label, thin, one)[0], label)


@pytest.mark.parametrize("which", ["label map", "image"])
def test_a_header_without_a_place_is_taken_as_it_lies_and_said(tmp_path, which):
    """Label maps saved with an identity affine are common, and lie like their image."""
    places = (AFFINE, np.eye(4)) if which == "label map" else (np.eye(4), AFFINE)
    scan = scan_of(tmp_path, truth(), places[1], affine=places[0])
    image, found = read_scan(scan, ACDC)
    np.testing.assert_array_equal(found, truth())
    assert image.notes == (
        f"the {which}'s header records no place, so labels are taken as they lie",
    )


def test_without_places_spacings_must_still_agree(tmp_path):
    shown = {"sform": 0, "qform": 0}
    scan = scan_of(tmp_path, truth(), np.eye(4), **shown, pixdim=(1.5, 1.5, 8))
    assert read_scan(scan, ACDC)[0].spacing == (1.5, 1.5, 8)
    scan = scan_of(tmp_path, truth(), np.eye(4), **shown, pixdim=(3, 3, 8))
    with pytest.raises(DataError, match=r"p1_gt\.nii: voxels of \(3\.0, 3\.0, 8\.0\) mm"):
        read_scan(scan, ACDC)


def test_headers_as_in_acdc_go_on_working(tmp_path):
    """A unit sform with a code beside a true qform, in the image and in the label map."""
    scan = scan_of(tmp_path, truth(), (np.eye(4), AFFINE), affine=(np.eye(4), AFFINE))
    image, found = read_scan(scan, ACDC)
    assert image.spacing == (1.5, 1.5, 8.0)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_array_equal(found, truth())
    assert image.notes == ()


ONE_MM = np.diag([-1.0, -1, 1, 1])
ONE_MM[:3, 3] = 120, 110, -5


def test_sform_and_qform_that_disagree_in_scale(tmp_path):
    """pixdim is the size of a voxel: the qform holds, and the scan is named."""
    path = save(tmp_path / "a.nii", truth(), (ONE_MM, AFFINE))
    volume = read_image(path)
    assert (volume.spacing, volume.orientation) == ((1.5, 1.5, 8.0), "LPS")
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert "sform says voxels of 1 x 1 x 1" in volume.notes[0]
    alone = read_image(save(tmp_path / "b.nii", truth(), ONE_MM, qform=0, pixdim=(1.5, 1.5, 8)))
    assert (alone.spacing, alone.orientation) == ((1.5, 1.5, 8.0), "LPS")
    assert alone.notes
    agreeing = read_image(save(tmp_path / "c.nii", truth(), AFFINE))
    default = read_image(save(tmp_path / "d.nii", truth(), AFFINE, qform=0, pixdim=(1, 1, 1)))
    assert agreeing.notes == default.notes == ()
    assert default.spacing == (1.5, 1.5, 8.0)


def test_a_label_map_made_from_the_matrix_that_is_not_believed(tmp_path):
    scan = scan_of(tmp_path, truth(), ONE_MM, affine=(ONE_MM, AFFINE))
    np.testing.assert_array_equal(read_scan(scan, ACDC)[1], truth())


@pytest.mark.parametrize("pixdim", [(0, 0, 0), (1.5, 1.5, 0), (0, 1.5, 8)])
def test_pixdim_0_is_not_recorded_though_nibabel_makes_1_of_it(tmp_path, pixdim):
    path = save(tmp_path / "a.nii", truth(), np.eye(4), sform=0, qform=0, pixdim=pixdim)
    assert image_grid(path).spacing is None
    assert read_image(path).spacing is None
    coded = save(tmp_path / "b.nii", truth(), AFFINE, qform=0, pixdim=pixdim)
    assert read_image(coded).spacing == (1.5, 1.5, 8.0)


def slice_order(affine, shape=SHAPE):
    codes = "".join(nib.aff2axcodes(affine))
    volume = Volume(np.zeros(shape, np.float32), affine, (1.5, 1.5, 8), codes, nib.Nifti1Header())
    slices = plan(volume, PreprocessConfig()).to_slices(np.arange(shape[2]) + np.zeros(shape))
    return [int(s) for s in slices[:, 0, 0]]


@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["straight", "oblique"])
def test_slices_run_the_same_way_however_they_are_stored(affine):
    array = np.arange(SHAPE[2]) + np.zeros(SHAPE)
    there = slice_order(affine)
    _, reverse = stored(array, affine, flips=[2])
    assert slice_order(reverse) == there[::-1]
    assert slice_order(AFFINE) == [0, 1, 2, 3, 4]  # feet to head


def test_the_order_of_short_axis_stacks_does_not_hang_on_the_nearest_axis():
    """From apex to base: right, back and up, whichever of the three is the largest."""
    for normal in ([0.7, -0.5, 0.5], [0.5, -0.7, 0.5], [0.5, -0.5, 0.7]):
        normal = np.array(normal) / np.linalg.norm(normal)
        across = np.cross(normal, [0, 0, 1.0])
        across /= np.linalg.norm(across)
        affine = np.eye(4)
        affine[:3, :3] = np.stack([across, np.cross(normal, across), normal], axis=1)
        assert slice_order(affine) == [0, 1, 2, 3, 4]


def test_metres_are_named(tmp_path):
    volume = read_image(save(tmp_path / "a.nii", truth(), AFFINE, unit="meter"))
    with pytest.raises(DataError, match=r"a\.nii: pixels of 1500 x 1500 mm.*gives metres"):
        plan(volume, PreprocessConfig(), "a.nii")
    small = read_image(save(tmp_path / "b.nii", truth(), AFFINE / 1000))
    with pytest.raises(DataError, match=r"b\.nii: pixels of 0\.0015 x .*look like metres"):
        plan(small, PreprocessConfig(), "b.nii")
