"""Low-rank arithmetic against naive float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cntlora_core.lora_file.algebra import (
    LoRALayer,
    compress,
    compress_layers,
    norm,
    relative_error,
    subtract_initial,
    subtract_initial_layers,
    total_relative_error,
    with_alpha,
    without_mid,
)


def make_layer(
    out: int = 7,
    inner: int = 11,
    rank: int = 4,
    scaling: float = 2.0,
    seed: int = 0,
    kernel: int = 0,
) -> LoRALayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inner, *([kernel] * 2 if kernel else []), generator=generator)
    up = torch.randn(out, rank, *([1, 1] if kernel else []), generator=generator)
    return LoRALayer(down, up, scaling * rank)


def naive_delta(layer: LoRALayer) -> Tensor:
    product = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
    return layer.alpha / layer.down.shape[0] * product


def test_delta_is_scaled_product() -> None:
    layer = make_layer(scaling=0.75)
    assert layer.rank == 4
    assert layer.scaling == 0.75
    assert layer.delta().shape == (7, 11)
    torch.testing.assert_close(layer.delta().double(), naive_delta(layer), rtol=1e-6, atol=1e-6)


def test_delta_of_convolution_is_the_composed_convolution() -> None:
    """The delta as a kernel gives what down and up give one after the other."""
    layer = make_layer(out=5, inner=3, rank=2, kernel=3, scaling=1.5)
    image = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    inner = torch.nn.functional.conv2d(image, layer.down, padding=1)
    expected = 1.5 * torch.nn.functional.conv2d(inner, layer.up)
    actual = torch.nn.functional.conv2d(image, layer.delta(), padding=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_middle_kernel_is_contracted_exactly() -> None:
    """1x1 down, 3x3 mid, 1x1 up, applied in turn, against the layer without mid."""
    generator = torch.Generator().manual_seed(2)
    layer = LoRALayer(
        down=torch.randn(3, 4, 1, 1, generator=generator),
        up=torch.randn(5, 3, 1, 1, generator=generator),
        alpha=6.0,
        mid=torch.randn(3, 3, 3, 3, generator=generator),
    )
    image = torch.randn(1, 4, 6, 6, generator=generator)
    conv = torch.nn.functional.conv2d
    expected = 2.0 * conv(conv(conv(image, layer.down), layer.mid, padding=1), layer.up)
    plain = without_mid(layer)
    assert plain.mid is None
    assert plain.rank == 3
    torch.testing.assert_close(
        conv(image, plain.delta(), padding=1), expected, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(layer.delta(), plain.delta())


@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("initial_rank", [4, 2])
def test_subtract_initial_is_exact(kernel: int, initial_rank: int) -> None:
    trained, initial = (
        make_layer(kernel=kernel),
        make_layer(rank=initial_rank, seed=1, kernel=kernel),
    )
    result = subtract_initial(trained, initial)
    assert result.rank == 4 + initial_rank
    assert result.scaling == trained.scaling
    expected = naive_delta(trained) - naive_delta(initial)
    torch.testing.assert_close(naive_delta(result), expected, rtol=1e-12, atol=1e-12)


def test_untrained_layer_subtracts_to_zero() -> None:
    layer = make_layer()
    assert norm(subtract_initial(layer, layer)) < 1e-5 * norm(layer)


def test_subtract_initial_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="differ in scaling"):
        subtract_initial(make_layer(scaling=2.0), make_layer(scaling=1.0))
    with pytest.raises(ValueError, match="of different weights"):
        subtract_initial(make_layer(out=7), make_layer(out=8))
    with pytest.raises(ValueError, match=r"different layers.*unet\.b"):
        subtract_initial_layers({"unet.a": make_layer()}, {"unet.b": make_layer()})
    with pytest.raises(ValueError, match=r"^unet\.a: .*scaling"):
        subtract_initial_layers({"unet.a": make_layer()}, {"unet.a": make_layer(scaling=1.0)})


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
    full=st.integers(1, 12),
    rank=st.integers(1, 12),
    scaling=st.sampled_from([0.25, 1.0, 2.0, -1.5]),
    seed=st.integers(0, 1000),
)
def test_compress_is_the_best_approximation(
    out: int, inner: int, full: int, rank: int, scaling: float, seed: int
) -> None:
    """Eckart-Young: the error is the tail of the true singular values, for any shape and rank."""
    layer = make_layer(out, inner, full, scaling, seed)
    compressed, error = compress(layer, rank)
    assert compressed.rank <= max(rank, 1)
    assert compressed.scaling == pytest.approx(scaling, rel=1e-9)
    values = torch.linalg.svdvals(naive_delta(layer))
    expected = float(values[rank:].norm() / values.norm())
    assert error == pytest.approx(expected, abs=1e-9)
    measured = float((naive_delta(compressed) - naive_delta(layer)).norm() / values.norm())
    assert measured == pytest.approx(expected, abs=2e-6)


def test_compress_balances_the_factors() -> None:
    layer = LoRALayer(100 * make_layer().down, 0.01 * make_layer().up, 8.0)
    compressed, _ = compress(layer, 3)
    torch.testing.assert_close(
        compressed.down.norm(dim=1), compressed.up.norm(dim=0), rtol=1e-5, atol=1e-6
    )


def test_compress_keeps_convolution_shapes() -> None:
    layer = make_layer(out=6, inner=5, rank=8, kernel=3)
    compressed, error = compress(layer, 2)
    assert compressed.down.shape == (2, 5, 3, 3)
    assert compressed.up.shape == (6, 2, 1, 1)
    assert 0 < error < 1
    assert relative_error(compressed, layer) == pytest.approx(error, rel=1e-5)


def test_compress_of_subtracted_adapter_that_moved_little_is_near_exact() -> None:
    """What export does: rank 2r of which only the change in r directions matters."""
    initial = make_layer(40, 50, 4)
    trained = LoRALayer(initial.down, initial.up + 0.1 * make_layer(40, 50, 4, seed=5).up, 8.0)
    subtracted = subtract_initial(trained, initial)
    compressed, error = compress(subtracted, 4)
    assert subtracted.rank == 8
    assert compressed.rank == 4
    assert error < 1e-5
    assert relative_error(compressed, subtracted) < 1e-5


def test_compress_leaves_small_ranks_alone_and_refuses_zero() -> None:
    layer = make_layer(rank=4)
    same, error = compress(layer, 4)
    assert same is layer
    assert error == 0.0
    with pytest.raises(ValueError, match="at least 1"):
        compress(layer, 0)


def test_compress_of_zero_delta_reports_no_error() -> None:
    layer = LoRALayer(make_layer().down, torch.zeros(7, 4), 4.0)
    compressed, error = compress(layer, 2)
    assert error == 0.0
    assert not compressed.delta().any()


def test_compress_layers_takes_a_rank_for_each() -> None:
    layers = {"unet.a": make_layer(rank=6), "unet.b": make_layer(rank=6, seed=1)}
    small, errors = compress_layers(layers, {"unet.a": 2, "unet.b": 3})
    assert [small[name].rank for name in ("unet.a", "unet.b")] == [2, 3]
    assert all(0 < error < 1 for error in errors.values())
    exact = torch.cat([naive_delta(layer).flatten() for layer in layers.values()])
    left = torch.cat([naive_delta(layer).flatten() for layer in small.values()])
    expected = float((left - exact).norm() / exact.norm())
    assert total_relative_error(small, layers) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"unet\.b"):
        compress_layers(layers, {"unet.a": 2})


def test_relative_error_against_full_matrices() -> None:
    first, second = make_layer(scaling=0.5), make_layer(rank=3, seed=4, scaling=3.0)
    expected = (naive_delta(first) - naive_delta(second)).norm() / naive_delta(second).norm()
    assert relative_error(first, second) == pytest.approx(float(expected), rel=1e-9)
    zero = LoRALayer(first.down, torch.zeros_like(first.up), 1.0)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(first, zero) == float("inf")


def test_with_alpha_keeps_the_change() -> None:
    layer = make_layer(scaling=2.0)
    other = with_alpha(layer, 3.0)
    assert other.alpha == 3.0
    assert relative_error(other, layer) < 1e-6
    with pytest.raises(ValueError, match="alpha 0"):
        with_alpha(layer, 0.0)


@pytest.mark.parametrize(
    ("down", "up", "mid", "says"),
    [
        ((4, 3), (5, 3), None, "must agree"),
        ((4, 3), (5, 4, 1, 1), None, "two matrices or two"),
        ((4, 3, 3, 3), (5, 4, 3, 3), None, "1x1"),
        ((4, 3, 3, 3), (5, 4, 1, 1), (4, 4, 3, 3), "between 1x1"),
        ((4, 3, 1, 1), (5, 4, 1, 1), (4, 3, 3, 3), r"\(r, r, kh, kw\)"),
        ((0, 3), (5, 0), None, "two matrices or two"),
    ],
)
def test_shapes_that_do_not_belong_together(
    down: tuple[int, ...], up: tuple[int, ...], mid: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        LoRALayer(torch.ones(down), torch.ones(up), 1.0, None if mid is None else torch.ones(mid))
