"""Where and in which precision a run computes."""

from __future__ import annotations

import pytest
import torch

from salkernels.training.device import Device, step_generator, without_tf32
from salkernels.training.errors import RunError
from salkernels.training.pretrain import pretrain
from salkernels.training.runlog import precision_before

CPU = torch.device("cpu")


def test_a_cpu_computes_in_fp32_unless_told_otherwise(pretrain_config):
    assert Device.of(pretrain_config()).dtype == torch.float32
    assert Device.of(pretrain_config(precision="bf16")).dtype == torch.bfloat16


def test_a_run_goes_on_in_the_precision_it_began_in(pretrain_config):
    config = pretrain_config(precision="bf16")
    pretrain(config)
    assert precision_before(config.out) == "bf16"
    assert Device.of(pretrain_config()).dtype == torch.float32
    resumed = Device.of(pretrain_config(resume=True))
    assert resumed.dtype == torch.bfloat16
    assert resumed.exact().dtype == torch.float32
    elsewhere = pretrain_config(resume=True, out=config.out / "none")
    assert Device.of(elsewhere).dtype == torch.float32


def precisions():
    backends = torch.backends
    return [s.fp32_precision for s in (backends.cuda.matmul, backends.cudnn.conv)]


def test_exact_is_without_tf32_and_leaves_the_switches_as_they_were():
    before = precisions()
    with Device(CPU, torch.bfloat16).exact().autocast():
        assert precisions() == ["ieee", "ieee"]
        assert not torch.is_autocast_enabled("cpu")
    assert precisions() == before
    with Device(CPU, torch.bfloat16).autocast():
        assert precisions() == before
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="within"), without_tf32():
        raise ValueError("within")
    assert precisions() == before


def test_steps_and_seeds_have_their_own_random_numbers():
    draws = {
        torch.rand(1, generator=step_generator(seed, step, CPU)).item()
        for seed in range(5)
        for step in range(50)
    }
    assert len(draws) == 250


def test_asking_for_a_gpu_that_is_not_there(pretrain_config):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RunError, match="sees no GPU"):
        pretrain(pretrain_config(device="cuda"))
    with pytest.raises(RunError, match="'gpu' is none that torch knows; expected auto, cpu"):
        pretrain(pretrain_config(device="gpu"))
    with pytest.raises(RunError, match="fp16 is for GPUs"):
        pretrain(pretrain_config(precision="fp16"))
