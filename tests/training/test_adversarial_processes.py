"""The second phase in two processes has the gradients and weights of one process with the same global batch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tolerances
import torch
from accelerate import Accelerator
from comparison import assert_close
from training.jobs import finish, free_port
from training.lives import context
from training.test_adversarial import make_stage

from pvdm_fast.jobs.processes import Processes
from pvdm_fast.jobs.share import Share
from pvdm_fast.training.trainer import step_generator

VIDEO = (4, 3, 4, 16, 24)


def one_step(folder: Path) -> None:
    """Loss, gradients, a discriminator step, and its record. The first process saves them."""
    stage = make_stage(norm="spectral", r1=0.1)
    accelerator = stage.accelerator
    share = Share(accelerator.process_index, accelerator.num_processes)
    video = torch.rand(VIDEO, generator=torch.Generator().manual_seed(5)) * 2 - 1
    model = accelerator.prepare_model(stage.model)
    stage.loss(model, share.of(video), step_generator(0), share).backward()
    stage.after_backward()
    assert stage.adversary is not None
    gradients = {name: parameter.grad for name, parameter in stage.model.named_parameters()}
    judged = {f"d.{name}": parameter.grad.clone() for name, parameter in stage.adversary.nets.named_parameters()}
    measured = stage.measured()
    means = Processes(accelerator).means(torch.stack(list(measured.values()))).values()
    found = dict(zip(measured, means, strict=True))
    stage.after_step(found)
    values = {name: torch.tensor(value) for name, value in found.items()}
    kept = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    stage.alternate = True
    stage.before_step(1)
    stage.model.zero_grad()
    stage.loss(model, share.of(video), step_generator(1), share).backward()
    stage.after_backward()
    assert all(parameter.grad is None for parameter in stage.model.parameters()), "the discriminators' turn"
    turn = {f"turn.{name}": parameter.grad for name, parameter in stage.adversary.nets.named_parameters()}
    if share.rank == 0:
        torch.save({**kept, **judged, **turn, **values}, folder / f"{share.world}.pt")


def in_a_job(folder: Path, rank: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    assert Accelerator(cpu=True).num_processes == 2
    one_step(folder)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    one_step(tmp_path)
    port = free_port()
    processes = [context().Process(target=in_a_job, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    assert finish(processes) == [0, 0]
    alone, together = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        assert_close(together[name], expected, tolerances.SECOND_PHASE_GRADIENT, name)
