"""Slices of scans as a dataset, and batches that take half of theirs from each of two scans."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from salkernels.training.data.nifti import read_image
from salkernels.training.data.phantom import write_phantom


class Slices(Dataset[dict[str, Tensor | int]]):
    """Each item is one slice (1, H, W) and what the losses must know of it."""

    def __init__(self, files: Sequence[Path]) -> None:
        scans = [torch.from_numpy(read_image(file).array).permute(2, 1, 0) for file in files]
        self.scans = [(scan - scan.mean()) / scan.std() for scan in scans]  # (Z, H, W)
        self.places = [(s, z) for s, scan in enumerate(self.scans) for z in range(len(scan))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> dict[str, Tensor | int]:
        volume, index = self.places[item]
        scan = self.scans[volume]
        image = scan[None, index]
        return {"image": image, "volume": volume, "index": index, "num_slices": len(scan)}


class TwoScans(Sampler[list[int]]):
    """Batches of n slices, n/2 from each of two scans, which should be of different subjects."""

    def __init__(self, data: Slices, n: int, steps: int) -> None:
        self.data, self.half, self.steps = data, n // 2, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        volume = torch.tensor([scan for scan, _ in self.data.places])
        for _ in range(self.steps):
            batch: list[int] = []
            for scan in torch.randperm(len(self.data.scans))[:2]:
                slices = (volume == scan).nonzero().flatten()
                # With replacement: a scan may have fewer slices than are drawn.
                batch += slices[torch.randint(len(slices), (self.half,))].tolist()
            yield batch


def phantom_files(folder: str | Path) -> list[Path]:
    """One generated scan of each of four subjects, in the place of your own files."""
    root = write_phantom(folder, subjects=4, slices=8, size=48)
    return sorted(root.glob("*/*_frame01.nii.gz"))
