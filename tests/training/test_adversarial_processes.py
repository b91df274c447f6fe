"""The second phase in two processes has the gradients and weights of one process with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from accelerate import Accelerator
from comparison import assert_close
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


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    one_step(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common = {**os.environ, **common, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**common, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    alone, together = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        assert_close(together[name], expected, tolerances.SECOND_PHASE_GRADIENT, name)


if __name__ == "__main__":
    assert Accelerator(cpu=True).num_processes == 2
    one_step(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
