"""LPIPS: the formula against a slow one in float64, its gradient, and all ways in which weights can be wrong."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from comparison import assert_close
from lpips_weights import CONVOLUTIONS, SLICE_ENDS, random_backbone, random_heads
from torch import Tensor
from torch.nn import functional as F

from pvdm_fast.errors import UserError
from pvdm_fast.losses import LPIPS, load_lpips
from pvdm_fast.losses import lpips as module


@pytest.fixture(scope="module")
def backbone() -> dict[str, Tensor]:
    return random_backbone()


@pytest.fixture(scope="module")
def heads() -> dict[str, Tensor]:
    return random_heads()


def slow_distance(state: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
    """LPIPS as in its paper: a sum over layers, positions and channels."""
    distance: Any = torch.zeros((), dtype=torch.float64)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pair = [(x.double() - shift[:, None, None]) / scale[:, None, None] for x in (image, target)]
    layer = 0
    for number in range(30):
        if number in CONVOLUTIONS:
            weight, bias = (state[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
            columns = [F.unfold(x[None], 3, padding=1)[0] for x in pair]
            pair = [
                (weight.flatten(1) @ column + bias[:, None]).view(-1, *x.shape[1:])
                for column, x in zip(columns, pair, strict=True)
            ]
        elif number in (4, 9, 16, 23):
            pair = [x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).amax(dim=(2, 4)) for x in pair]
        else:
            pair = [x * (x > 0) for x in pair]
        if number in SLICE_ENDS:
            head = state[f"lin{layer}.model.1.weight"].double().flatten()
            positions = [(y, x) for y in range(pair[0].shape[1]) for x in range(pair[0].shape[2])]
            for y, x in positions:
                a, b = (features[:, y, x] / (features[:, y, x].square().sum().sqrt() + 1e-10) for features in pair)
                distance = distance + (head * (a - b) ** 2).sum() / len(positions)
            layer += 1
    return distance


def pictures(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(count, 3, height, width, generator=generator) * 2 - 1 for _ in range(2))  # type: ignore[return-value]


def test_distance_and_gradient_are_the_slow_formula_s(backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    state = {**backbone, **heads}
    image, target = pictures(2, 32, 16)
    image.requires_grad_()
    distance = LPIPS(state)(image, target)
    (gradient,) = torch.autograd.grad(distance.sum(), image)
    image_again = image.detach().requires_grad_()
    expected = torch.stack([slow_distance(state, a, b) for a, b in zip(image_again, target, strict=True)])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), image_again)
    assert distance.shape == (2,) and distance.min() > 0.01
    assert_close(distance, expected, tolerances.LPIPS)
    assert_close(gradient, expected_gradient, tolerances.LPIPS)


def test_what_it_is_zero_for_and_that_the_target_is_a_constant(
    backbone: dict[str, Tensor], heads: dict[str, Tensor]
) -> None:
    network = LPIPS({**backbone, **heads})
    image, target = pictures(1, 16, 16)
    target.requires_grad_()
    assert not network(image, target).requires_grad
    assert network(image, image).item() == 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_dead_features_have_a_finite_gradient(backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    """Where no channel is active, vectors have length 0, and the root has no finite slope there."""
    dead = {name: torch.full_like(t, -9.0) if "bias" in name else t for name, t in backbone.items()}
    image, target = pictures(1, 16, 16)
    image.requires_grad_()
    LPIPS({**dead, **heads})(image, target).sum().backward()
    assert image.grad is not None and torch.isfinite(image.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(dtype: torch.dtype, backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    network = LPIPS({**backbone, **heads})
    image, target = pictures(1, 16, 16)
    exact = network(image, target)
    with torch.autocast("cpu", dtype):
        rounded = network(image, target)
    assert rounded.dtype == torch.float32
    assert_close(rounded, exact, tolerances.LPIPS_16_BIT)


def test_both_ways_of_naming_are_the_same_network(
    backbone: dict[str, Tensor], heads: dict[str, Tensor], tmp_path: Path
) -> None:
    """torchvision's names, including its classifier, and those of the package lpips, in one file each."""
    renamed = {}
    for name, tensor in backbone.items():
        _, number, part = name.split(".")
        slice_number = next(i + 1 for i, end in enumerate(SLICE_ENDS) if int(number) <= end)
        renamed[f"net.slice{slice_number}.{number}.{part}"] = tensor
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    torch.save({**backbone, **heads, "classifier.0.bias": torch.zeros(3)}, files[0])
    torch.save(
        {**renamed, **heads, "lins.0.model.1.weight": torch.zeros(1), "scaling_layer.shift": torch.ones(1)}, files[1]
    )
    (first, described), (second, _) = (load_lpips(str(file)) for file in files)
    assert first.fingerprint() == second.fingerprint()
    assert described.startswith(f"VGG16 from {files[0]} (SHA-256 ")
    changed = {**backbone, **heads, "features.0.bias": backbone["features.0.bias"] + 1}
    assert LPIPS(changed).fingerprint() != first.fingerprint()


def test_heads_come_from_the_installed_package_without_importing_it(
    backbone: dict[str, Tensor], heads: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise ImportError('torchvision is missing')")
    torch.save(heads, folder / "vgg.pth")
    torch.save(backbone, tmp_path / "vgg16.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    network, described = load_lpips(str(tmp_path / "vgg16.pth"))
    assert network.fingerprint() == LPIPS({**backbone, **heads}).fingerprint()
    assert f"heads from {folder / 'vgg.pth'} (SHA-256 " in described


def test_torchvision(backbone: dict[str, Tensor], heads: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torchvision's own interface for weights, which downloads and checks them. And if it can't."""

    class Weights:
        @staticmethod
        def get_state_dict(progress: bool, check_hash: bool) -> dict[str, Tensor]:
            assert check_hash
            return {**backbone, **heads}

    models = types.ModuleType("torchvision.models")
    models.VGG16_Weights = types.SimpleNamespace(IMAGENET1K_V1=Weights)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    network, described = load_lpips("torchvision")
    assert described == "VGG16 from torchvision"
    assert network.fingerprint() == LPIPS({**backbone, **heads}).fingerprint()

    def unreachable(progress: bool, check_hash: bool) -> dict[str, Tensor]:
        raise OSError("no network")

    monkeypatch.setattr(Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"could not download VGG16 \(no network\): fetch https://.*--lpips-weights"):
        load_lpips("torchvision")


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match=r"needs torchvision .*pip install torchvision, or name a file with VGG16"):
        load_lpips("torchvision")


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_wrong_files_are_one_sentence(
    backbone: dict[str, Tensor], heads: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_packaged_heads", lambda: None)
    file = tmp_path / "weights.pth"
    wide = {**backbone, **heads, "features.5.weight": torch.zeros(128, 32, 3, 3)}
    cases = [
        (None, "there is no file .*weights.pth for --lpips-weights: name VGG16's weights"),
        (RunsCode(), "was refused: it is not a file of tensors only"),
        ({"weight": torch.zeros(3)}, "holds no VGG16: expected tensors such as features.0.weight"),
        (backbone, "the heads of LPIPS are neither in .* nor installed: pip install --no-deps lpips"),
        ({**heads, "features.0.bias": backbone["features.0.bias"]}, "the LPIPS weights lack features.0.weight"),
        (wide, r"features.5.weight is of shape \(128, 32, 3, 3\), but VGG16 has \(128, 64, 3, 3\)"),
    ]
    for content, message in cases:
        if content is not None:
            torch.save(content, file)
        with pytest.raises(UserError, match=message):
            load_lpips(str(file))
    assert not (tmp_path / "executed").exists()


def test_images_it_cannot_take(backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    network = LPIPS({**backbone, **heads})
    for first, second in (((1, 3, 15, 16), (1, 3, 15, 16)), ((1, 3, 16, 16), (2, 3, 16, 16))):
        with pytest.raises(ValueError, match="H and W at least 16"):
            network(torch.zeros(first), torch.zeros(second))


def test_agrees_with_the_package(backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
    """The package lpips itself, if it and torchvision can be imported."""
    package = pytest.importorskip("lpips", reason="pip install lpips, with torchvision", exc_type=ImportError)
    other = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    own = {
        f"net.slice{1 + sum(int(n.split('.')[1]) > end for end in SLICE_ENDS)}.{n[9:]}": t for n, t in backbone.items()
    }
    missing = other.load_state_dict({**own, **heads}, strict=False).missing_keys
    assert all(name.startswith(("lins.", "scaling_layer.")) for name in missing)
    image, target = pictures(2, 32, 16)
    with torch.no_grad():
        expected = other(image, target).flatten()
    assert_close(LPIPS({**backbone, **heads})(image, target), expected, tolerances.LPIPS)
