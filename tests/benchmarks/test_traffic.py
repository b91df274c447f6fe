"""Counts of launches and bytes: short sequences and our operations by hand, networks against the baseline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pvdm_fast import ops
from pvdm_fast.layout import TriplaneLayout

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from benchmarks import report, traffic
from benchmarks.cases import all_cases
from benchmarks.registry import Setting
from benchmarks.traffic import Item, Total, count, shapes_alone

SETTING = Setting("tiny", torch.bfloat16)


def test_a_sequence_by_hand() -> None:
    """y = (x w) + b with b expanded, then a copy of a transposed half, and in-place operations."""
    with shapes_alone():
        x, w, b = torch.empty(6, 4), torch.empty(4, 10), torch.empty(10)

        def run() -> None:
            y = x @ w  # reads 24 + 40, writes 60
            z = y + b.expand(6, 10)  # reads 60 + 10, writes 60
            z.view(60).unflatten(0, (6, 10)).t()  # nothing
            half = z[:, :5].t().contiguous()  # reads 30, writes 30
            half.add_(1)  # reads 30, writes 30
            torch.empty(1000).zero_()  # writes 1000
            torch.empty(30).copy_(half.view(30))  # reads 30, writes 30

        items = count(run)
    assert items == [
        Item("mm", 1, 4 * 124, 2 * 6 * 4 * 10),
        Item("add", 1, 4 * 130, 0),
        Item("clone", 1, 4 * 60, 0),
        Item("add_", 1, 4 * 60, 0),
        Item("zero_", 1, 4 * 1000, 0),
        Item("copy_", 1, 4 * 60, 0),
    ]


def test_views_and_one_tensor_twice() -> None:
    with shapes_alone():
        x = torch.empty(3, 8, dtype=torch.bfloat16)
        items = count(lambda: (x.expand(2, 3, 8), x.detach(), x.unbind(0), x * x))
    assert items == [Item("mul", 1, 2 * 48, 0)]


def test_our_operations_by_hand() -> None:
    """geglu is one launch each way. triplane_expand's backward pass writes partial sums."""
    layout = TriplaneLayout(3, 5, 7)
    with shapes_alone():
        x = torch.empty(9, 20, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.empty(9, 10, dtype=torch.bfloat16)
        forward = count(lambda: ops.geglu(x))
        result = ops.geglu(x)
        backward = count(lambda: torch.autograd.grad(result, x, grad))
        planes = torch.empty(2, layout.num_tokens, 4, requires_grad=True)
        weight, bias = torch.empty(3, 12, 4, requires_grad=True), torch.empty(3, 12, requires_grad=True)
        lattice = ops.triplane_expand(planes, layout, weight, bias)
        expand = count(lambda: torch.autograd.grad(lattice, (planes, weight, bias), torch.empty_like(lattice)))
    assert forward == [Item("geglu", 1, 2 * 9 * (20 + 10), 0)]
    assert backward == [Item("geglu_backward", 1, 2 * 9 * (20 + 10 + 20), 0)]
    (item,) = expand
    tokens, shares = 2 * layout.num_lattice_tokens, 7  # of 32 tokens each, in float32
    parts, partials = tokens * 12, shares * 15 * 12
    gradients = planes.numel() + weight.numel() + bias.numel()
    read = tokens * 12 + planes.numel() + weight.numel()
    assert item.launches == 3
    assert item.bytes == 4 * (read + 2 * (parts + partials) + gradients)
    assert item.flops == 2 * 2 * tokens * 12 * 12


def test_least_time_is_the_longer_of_the_two() -> None:
    bandwidth, peak = traffic.GPUS["H100"]
    total = Total.of([Item("memory", 1, int(bandwidth), 1), Item("products", 2, 1, int(2 * peak))])
    assert total.seconds["H100"] == pytest.approx(3.0)
    assert (total.launches, total.bytes, total.flops) == (3, int(bandwidth) + 1, int(2 * peak) + 1)


@pytest.mark.parametrize(
    "name", [pytest.param("denoiser", marks=pytest.mark.slow), "autoencoder encode", "autoencoder decode"]
)
def test_networks(name: str) -> None:
    row = traffic.rows_of(all_cases()[name], SETTING)[0]
    ours, eager = row.totals["ours"], row.totals["eager"]
    assert row.direction == "forward"
    assert 0 < ours.launches < eager.launches
    assert row.floor.bytes < ours.bytes < eager.bytes
    assert ours.flops == pytest.approx(row.floor.flops, rel=0.25)  # the last projection layer, and embeddings


def test_attention_is_counted_alike() -> None:
    """Products of a forward pass: the fused operation's formula equals PyTorch's own count of eager's."""
    for name in ("segment_attention/inside planes", "axial_attention/time", "axial_attention/space"):
        totals = traffic.rows_of(all_cases()[name], SETTING)[0].totals
        assert totals["ours"].flops == totals["eager"].flops > 0, name


def test_report_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "gpu_traffic.md"
    document.write_text("before\n<!-- traffic -->\nold\n<!-- /traffic -->\nafter\n")
    monkeypatch.setattr(traffic, "DOCUMENT", document)
    assert traffic.main(["--size", "tiny", "--only", "geglu", "--write-docs"]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "**Computed, not measured**" in text and "geglu/feed-forward | forward" in text
    assert text in report.write_between(document.read_text(), "traffic", capsys.readouterr().out.strip())


def test_the_document_has_its_block() -> None:
    text = traffic.DOCUMENT.read_text()
    assert text.index("<!-- traffic -->") < text.index("Computed, not measured") < text.index("<!-- /traffic -->")
