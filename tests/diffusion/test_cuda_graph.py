"""Sampling with CUDA graphs, without a GPU: refusals, calls, and replays of what was captured."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streams import replace_streams
from torch import Tensor
from torch.utils._pytree import tree_iter

from pvdm_fast.analysis.recorder import Recorder, name_of
from pvdm_fast.diffusion import sampling
from pvdm_fast.diffusion.cuda_graph import WARM_UP_PASSES, GraphedPrediction, choose_prediction, difference
from pvdm_fast.diffusion.guidance import guided_prediction
from pvdm_fast.diffusion.sampling import NoiseSource, sample_latents, sample_video
from pvdm_fast.diffusion.schedulers import make_scheduler
from pvdm_fast.errors import UserError
from pvdm_fast.models import Autoencoder, Denoiser
from pvdm_fast.nn import residual
from pvdm_fast.sample import main


class Tape(Recorder):
    """Stands in for a CUDA graph. It records every operation while capturing, and a replay repeats them on the
    same tensors, without Python. Numbers that Python computed are frozen, as in a graph."""

    made: list[Tape]

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0
        Tape.made.append(self)

    def note(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        self.steps.append((function, arguments, options, tensors(result)))

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, written in self.steps:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(written, tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_iter(values) if isinstance(t, Tensor)]


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces torch.cuda's graphs and streams, and gives a log of what is done on which stream."""

    @contextmanager
    def capture(tape: Tape, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # the default ends other threads' allocations with an error
        log.append("capture")
        with tape:
            yield

    @contextmanager
    def device(_: torch.device) -> Iterator[None]:
        yield

    Tape.made, log = [], replace_streams(monkeypatch)
    for name, stand_in in dict(CUDAGraph=Tape, graph=capture, device=device).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    model = Denoiser.from_preset("tiny", time=2, height=4, width=4, latent_channels=4, prediction="v")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def sample(denoiser: Denoiser, predict: Any, condition: Tensor | None, guidance: float, name: str = "ddim") -> Tensor:
    shape = (2, 4, denoiser.layout.num_tokens)
    return sample_latents(
        denoiser, make_scheduler(name), shape, steps=4, noise=NoiseSource(3), condition=condition, guidance=guidance,
        predict=predict,
    )  # fmt: skip


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_replays_give_the_same_latents(taped: list[str], denoiser: Denoiser, scheduler: str) -> None:
    """Every step's latent, time and condition reach the captured pass. Later steps overwrite no result."""
    conditions = [None, *torch.randn(2, 2, 4, denoiser.layout.num_tokens).tanh()]
    predict = GraphedPrediction()
    for condition in conditions:
        expected = sample(denoiser, guided_prediction, condition, 1.5, scheduler)
        assert torch.equal(sample(denoiser, predict, condition, 1.5, scheduler), expected)
    # One without and one with a condition. The second condition is another input of the same graph.
    assert [tape.replays for tape in Tape.made] == [4, 8]
    assert len(Tape.made[0].steps) > 50


def test_the_times_of_a_flow_reach_the_captured_pass(taped: list[str]) -> None:
    """They are fractions, which whole numbers would cut."""
    flow = Denoiser.from_preset("tiny", time=2, height=4, width=4, latent_channels=4, prediction="flow")
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    noise = torch.randn(2, 4, flow.layout.num_tokens)
    predict = GraphedPrediction()
    for time in (1000.0, 333.25, 0.5):
        expected = guided_prediction(flow.eval(), noise, time)
        assert torch.equal(predict(flow, noise, time), expected)
        assert not torch.equal(guided_prediction(flow, noise, int(time)), expected) or time == 1000
    assert [tape.replays for tape in Tape.made] == [3]


def test_captured_once_a_shape_after_warming_up_aside(taped: list[str], denoiser: Denoiser) -> None:
    predict, latent = GraphedPrediction(), torch.randn(2, 4, denoiser.layout.num_tokens)
    passes = []
    handle = denoiser.register_forward_hook(lambda *_: passes.append(taped[-1]))
    results = [predict(denoiser, latent, timestep) for timestep in (900, 10)]
    handle.remove()
    assert taped == ["aside waits for current", "on aside", "off aside", "current waits for aside", "capture"]
    assert passes == ["on aside"] * WARM_UP_PASSES + ["capture"]
    assert not torch.equal(*results)
    predict(denoiser, latent[:1], 900)
    predict(denoiser, latent, 900)
    assert [tape.replays for tape in Tape.made] == [3, 1]


@pytest.mark.parametrize("counted", [True, False])
def test_joined_weights_are_current_in_replays(
    taped: list[str], denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    """A graph reads what was joined before, in the same memory: renewed where a weight has changed, and for each clip
    where PyTorch doesn't count the change."""
    monkeypatch.setattr(residual, "JOINED", frozenset({"cpu"}))
    model, predict = copy.deepcopy(denoiser), GraphedPrediction()
    weight = model.middle_block[0].emb_layers[1].weight
    rows = sum(len(m.emb_layers[1].weight) for m in model.modules() if isinstance(m, residual.ResidualBlock))
    for _ in range(3):
        expected = sample(model, guided_prediction, None, 0.0)
        assert torch.equal(sample(model, predict, None, 0.0), expected)
        with torch.no_grad():
            (weight if counted else weight.data).mul_(3)
    (tape,) = Tape.made
    assert tape.replays == 12
    assert not any(name_of(step) == "cat" and len(made[0]) == rows for step, _, _, made in tape.steps)
    latent = torch.randn(2, 4, model.layout.num_tokens)
    predict(model, latent, 5)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(predict(model, latent, 5), guided_prediction(model, latent, 5)), "outside of sampling too"


class Broken(Tape):
    """A graph whose replays give something else."""

    def replay(self) -> None:
        super().replay()
        self.steps[-1][3][0].add_(1.0)


@contextmanager
def failing(graph: Any, **options: Any) -> Iterator[None]:
    yield
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


FAULTS = {
    "differs": ("CUDAGraph", Broken, r"its first step is \S+ off the ungraphed one, whose largest value is \S+"),
    "fails": ("graph", failing, "CUDA error: operation not permitted when stream is capturing more"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_a_good_graph_sampling_goes_on(
    fault: str,
    taped: list[str],
    denoiser: Denoiser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the ungraphed latents; the reason is said once, and capturing is not tried again."""
    name, stand_in, reason = FAULTS[fault]
    monkeypatch.setattr(torch.cuda, name, stand_in)
    predict = GraphedPrediction()
    expected = sample(denoiser, guided_prediction, None, 0.0)
    for _ in range(2):
        assert torch.equal(sample(denoiser, predict, None, 0.0), expected)
    (warning,) = [record.message for record in caplog.records]
    assert re.fullmatch(f"sampling without CUDA graphs: {reason}", warning)
    assert len(Tape.made) == 1 and predict.refused
    with pytest.raises(UserError, match=f"no CUDA graph could be made .*{reason}.*: sample without --cuda-graph"):
        sample(denoiser, GraphedPrediction(required=True), None, 0.0)


def test_casts_are_not_cached_while_capturing(
    taped: list[str], denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is emptied when autocast ends, and the graph would go on reading what was in it."""
    taken: list[tuple[Any, ...]] = []

    @contextmanager
    def autocast(*arguments: Any, **options: Any) -> Iterator[None]:
        taken.append((*arguments, options))
        yield

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind == "cuda")
    GraphedPrediction()(denoiser, torch.randn(2, 4, denoiser.layout.num_tokens), 5)
    assert taken == [("cuda", torch.get_autocast_dtype("cuda"), {"cache_enabled": False})]


def test_how_far_a_replay_may_be() -> None:
    exact = torch.tensor([1.0, -2.0, float("nan")])
    assert difference(exact.clone(), exact) is None
    assert difference(exact + 1e-4, exact) is None
    assert "off the ungraphed one" in str(difference(exact + 0.01, exact))
    assert difference((exact + 0.01).bfloat16(), exact.bfloat16()) is None
    assert "not finite" in str(difference(torch.tensor([1.0, -2.0, 3.0]), exact))
    assert "not finite" in str(difference(torch.tensor([1.0, float("inf"), float("nan")]), exact))
    assert difference(torch.zeros(3), torch.zeros(3)) is None


class DTensor(Tensor):
    """What a sharded model's parameters are called."""


@pytest.mark.parametrize(
    ("wanted", "device", "steps", "graphed"),
    [
        (None, "cuda", 10, True),
        (None, "cuda", 9, False),
        (None, "cpu", 100, False),
        (False, "cuda", 100, False),
        (True, "cuda", 1, True),
    ],
)
def test_graphs_are_taken_on_a_gpu(wanted: bool | None, device: str, steps: int, graphed: bool) -> None:
    there = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device, 0))]))
    predict = choose_prediction(there, wanted, steps)  # type: ignore[arg-type]
    assert isinstance(predict, GraphedPrediction) == graphed
    assert predict is guided_prediction if not graphed else predict.required == bool(wanted)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("frames", "conditioned", "steps"), [(2, False, 3), (2, True, 3), (6, False, 4), (6, True, 9)])
def test_the_first_clip_has_a_graph_of_its_own(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, frames: int, conditioned: bool, steps: int
) -> None:
    """Without a condition: whether graphs are worth it depends on the steps of each."""
    asked: list[int] = []
    monkeypatch.setattr(
        sampling, "choose_prediction", lambda model, wanted, steps: asked.append(steps) or guided_prediction
    )
    autoencoder = Autoencoder.from_preset("tiny", frames=2, height=16, width=16, latent_channels=4).eval()
    condition = torch.zeros(1, 3, 2, 16, 16) if conditioned else None
    next(sampling.stream_video(autoencoder, denoiser, clips=1, frames=frames, steps=3, condition=condition))
    assert asked == [steps]


def test_a_sharded_denoiser_is_sampled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DTensor, "device", torch.device("cuda", 0))
    there = SimpleNamespace(parameters=lambda: iter([torch.zeros(1).as_subclass(DTensor)]))
    assert choose_prediction(there, None, 100) is guided_prediction  # type: ignore[arg-type]
    with pytest.raises(UserError, match="CUDA graphs need a whole denoiser, but this one is cut among processes"):
        choose_prediction(there, True, 100)  # type: ignore[arg-type]


def test_cpu_is_refused(denoiser: Denoiser) -> None:
    autoencoder = Autoencoder.from_preset("tiny", frames=2, height=16, width=16, latent_channels=4)
    with pytest.raises(UserError, match="CUDA graphs need a CUDA GPU, but the denoiser is on cpu: sample without"):
        sample_video(autoencoder, denoiser, clips=1, frames=2, steps=1, cuda_graph=True)


def test_cpu_is_refused_on_the_command_line(
    denoiser: Denoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Autoencoder.from_preset("tiny", frames=2, height=16, width=16, latent_channels=4).save_pretrained(
        tmp_path / "autoencoder"
    )
    denoiser.save_pretrained(tmp_path / "denoiser")
    arguments = [str(tmp_path), "--device", "cpu", "--cuda-graph", "--out", str(tmp_path / "samples.npy")]
    assert main(arguments) != 0
    assert "sample without --cuda-graph" in capsys.readouterr().err
    assert not (tmp_path / "samples.npy").exists()


@pytest.mark.parametrize("first", [True, False])
def test_with_and_without_inference_mode(
    taped: list[str], denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """One predictor serves both, in any order."""
    monkeypatch.setattr(residual, "JOINED", frozenset({"cpu"}))
    predict, expected = GraphedPrediction(), sample(denoiser, guided_prediction, None, 0.0)
    for inside in (first, not first, first):
        with torch.inference_mode(inside):
            assert torch.equal(sample(denoiser, predict, None, 0.0), expected)
