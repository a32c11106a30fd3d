"""Streaming sums against naive ones; capturing through hooks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from cntlora_core.activations.capture import reading
from cntlora_core.activations.moments import SecondMoment
from cntlora_core.layers.attachment import find_attachment_points
from cntlora_core.methods.peft_model import collect_moments


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    width=st.integers(1, 7),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_split_and_order_of_batches_do_not_matter(sizes, width, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, width, generator=generator) for n in sizes]
    whole = torch.cat(batches).double()
    for order in (batches, batches[::-1], [torch.cat(batches)]):
        fitter = SecondMoment(width)
        for batch in order:
            fitter.update(batch)
        moment = fitter.result()
        assert moment.count == len(whole)
        expected = whole.T @ whole / max(len(whole), 1)
        torch.testing.assert_close(moment.matrix.double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_rows_are_summed_in_float32():
    rows = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    fitter = SecondMoment(2)
    for _ in range(8):
        fitter.update(rows)
    moment = fitter.result()
    assert moment.matrix.dtype == torch.float32
    torch.testing.assert_close(moment.matrix, torch.full((2, 2), float(rows[0, 0]) ** 2))


def test_added_sums_equal_those_of_one_fitter():
    rows = torch.randn(30, 4)
    one, left, right = (SecondMoment(4) for _ in range(3))
    one.update(rows)
    left.update(rows[:11])
    right.update(rows[11:])
    left.add(right.total, right.count, right.probed)
    torch.testing.assert_close(left.result().matrix, one.result().matrix)


@pytest.mark.parametrize("width", [513, 1100])
def test_wide_sums_are_whole_though_half_of_them_is_computed(width):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(7, width, generator=generator) for _ in range(2))
    fitter, other = SecondMoment(width), SecondMoment(width)
    fitter.update(first)
    other.update(second)
    fitter.add(other.total, other.count, other.probed)
    matrix = fitter.result().matrix
    rows = torch.cat([first, second]).double()
    torch.testing.assert_close(matrix.double(), rows.T @ rows / 14, rtol=1e-5, atol=1e-5)
    assert other.total is not None  # adding leaves the other as it was
    torch.testing.assert_close(other.result().matrix, second.T @ second / 7, rtol=1e-5, atol=1e-5)


def test_a_released_moment_keeps_its_width_and_count():
    fitter = SecondMoment(3)
    fitter.update(torch.ones(2, 3))
    moment = fitter.result()
    moment.release()
    assert (moment.width, moment.count) == (3, 2)
    assert moment.matrix.untyped_storage().nbytes() == 0


def test_non_finite_rows_and_wrong_widths_are_refused():
    with pytest.raises(FloatingPointError):
        SecondMoment(2).update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="3"):
        SecondMoment(2).update(torch.zeros(1, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 6)

    def forward(self, x, states, **_):
        x = x * 1.5
        return self.out(self.q(x) + self.k(states).mean(1, keepdim=True) * self.v(states).sum())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x, states, attention_mask=None):
        for block in self.blocks:
            x = block(x, states)
        return x


def points_of(model):
    return find_attachment_points(model, LoraConfig(target_modules=["q", "k", "v", "out"]))


def test_points_that_read_the_same_tensor_share_one_moment():
    torch.manual_seed(0)
    model = Model()
    points = points_of(model)
    batches = [{"x": torch.randn(2, 5, 6), "states": torch.randn(2, 4, 6)} for _ in range(3)]
    captured = collect_moments(model, points, batches)
    assert len(points) == 12
    # One for all keys and values together, one for each query, one for each output.
    assert len(captured.moments) == 1 + 3 + 3
    assert captured.of("blocks.0.k") is captured.of("blocks.2.v")

    # Every point's moment equals the naive one of a plain hook.
    for name in ("blocks.1.q", "blocks.2.out", "blocks.0.v"):
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].reshape(-1, 6).double())
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        rows = torch.cat(seen)
        torch.testing.assert_close(
            captured.of(name).matrix.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5
        )


def test_tensors_that_reuse_memory_are_not_taken_for_one():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))

        def forward(self, x):
            for layer in self.layers:
                x = layer(torch.tanh(x))  # the previous input dies here, its memory is free again
            return x

    model = Chain()
    points = find_attachment_points(model, LoraConfig(target_modules=r".*layers\.\d+"))
    captured = collect_moments(model, points, [torch.randn(128, 64)])
    assert len(captured.moments) == 12


def test_in_place_changes_between_two_reads_are_noticed():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            first = self.q(x)
            x.mul_(3.0)
            return first + self.k(x)

    model = InPlace()
    points = find_attachment_points(model, LoraConfig(target_modules=["q", "k"]))
    captured = collect_moments(model, points, [torch.randn(8, 4)])
    assert len(captured.moments) == 2
    ratio = captured.of("k").matrix / captured.of("q").matrix
    torch.testing.assert_close(ratio, torch.full((4, 4), 9.0))


def test_sharing_that_ends_is_captured_again_without_sharing():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.q(x) + self.k(x if self.calls % 2 else x * 2.0)

    model = Switch()
    points = find_attachment_points(model, LoraConfig(target_modules=["q", "k"]))
    captured = collect_moments(model, points, [torch.ones(3, 4), torch.ones(3, 4)])
    assert len(captured.moments) == 2
    torch.testing.assert_close(captured.of("q").matrix, torch.ones(4, 4))
    torch.testing.assert_close(captured.of("k").matrix, torch.full((4, 4), 2.5))


def test_a_point_that_is_called_from_a_later_batch_on_has_a_sum_of_its_own():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) + (self.k(x) if x[0, 0] > 0 else 0.0)

    model = Late()
    points = find_attachment_points(model, LoraConfig(target_modules=["q", "k"]))
    captured = collect_moments(model, points, [-torch.ones(3, 4), 3 * torch.ones(3, 4)])
    assert (captured.of("q").count, captured.of("k").count) == (6, 3)
    torch.testing.assert_close(captured.of("q").matrix, torch.full((4, 4), 5.0))
    torch.testing.assert_close(captured.of("k").matrix, torch.full((4, 4), 9.0))


def test_padding_is_left_out():
    model = Model()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    batch = {"x": torch.randn(2, 5, 6), "states": torch.randn(2, 5, 6), "attention_mask": mask}
    captured = collect_moments(model, points_of(model), [batch])
    rows = batch["states"][mask.bool()].double()
    moment = captured.of("blocks.0.k")
    assert moment.count == 6
    torch.testing.assert_close(moment.matrix.double(), rows.T @ rows / 6, rtol=1e-5, atol=1e-5)


def test_non_finite_activations_name_the_point_and_the_batch():
    model = Model()
    good = {"x": torch.randn(1, 5, 6), "states": torch.randn(1, 4, 6)}
    bad = {"x": good["x"], "states": good["states"] * float("inf")}
    with pytest.raises(FloatingPointError, match=r"blocks\.0\.k.*batch 1"):
        collect_moments(model, points_of(model), [good, bad])


def test_hooks_and_training_mode_are_restored_even_after_an_error():
    model = Model().train()
    model.blocks[1].eval()
    points = points_of(model)
    with pytest.raises(TypeError), reading(model, points, lambda *_: None) as run:
        run({"no": "such argument"})
    assert all(not p.module._forward_pre_hooks for p in points)
    assert model.training
    collect_moments(model, points, [{"x": torch.randn(1, 5, 6), "states": torch.randn(1, 4, 6)}])
    assert model.blocks[0].training
    assert not model.blocks[1].training


def test_patterns_that_match_nothing_are_refused_with_examples():
    with pytest.raises(ValueError, match=r"blocks\.0\.q"):
        find_attachment_points(Model(), LoraConfig(target_modules=["to_q"]))
