"""The sampler: fixed size, bounded share of positives, every set of candidates as likely as any other, no waiting."""

from pathlib import Path

import pytest
import torch

from tests.model.sync import count_blocking
from tests.mutation import mutant
from tmask.model import sampling
from tmask.model.sampling import Sample, sample


def masks(num_positive: int, num_negative: int, num_other: int) -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.tensor([1] * num_positive + [2] * num_negative + [0] * num_other)
    kind = kind[torch.randperm(len(kind))].expand(2, -1)
    return kind == 1, kind == 2


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expect_positive", "expect_negative"),
    [(50, 100, 8, 24), (3, 100, 3, 29), (0, 100, 0, 32), (50, 4, 8, 4), (50, 0, 8, 0), (2, 3, 2, 3), (0, 0, 0, 0),
     (8, 24, 8, 24), (9, 23, 8, 23), (7, 24, 7, 24)],
)  # fmt: skip
def test_counts(num_positive: int, num_negative: int, expect_positive: int, expect_negative: int) -> None:
    positive, negative = masks(num_positive, num_negative, 6)
    chosen = sample(positive, negative, size=32, positive_fraction=0.25)
    assert chosen.rows.shape == chosen.positive.shape == chosen.valid.shape == (2, 32)
    for n in range(2):
        picked = chosen.rows[n][chosen.valid[n]]
        assert len(picked) == expect_positive + expect_negative
        assert len(picked.unique()) == len(picked), "a candidate was drawn twice"
        assert int(chosen.positive[n].sum()) == expect_positive
        assert chosen.positive[n, :expect_positive].all(), "positives must stand in the first slots"
        assert positive[n][picked[:expect_positive]].all()
        assert negative[n][picked[expect_positive:]].all()


@pytest.mark.parametrize("size", [0, 4])
def test_no_candidates_at_all(size: int) -> None:
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    chosen = sample(nothing, nothing, size=size, positive_fraction=0.5)
    assert chosen.rows.tolist() == [[0] * size] * 2
    assert not chosen.valid.any()
    assert not chosen.positive.any()


def draws(sampler=sample) -> Sample:
    """3,000 images of 6 positives and 9 negatives among 18, of which 3 and 5 are drawn."""
    positive, negative = (mask[:1].expand(3000, -1) for mask in masks(6, 9, 3))
    return sampler(positive, negative, size=8, positive_fraction=0.375)


def check_uniform(chosen: Sample) -> None:
    """How often every candidate and every pair is drawn, in standard deviations of a draw without replacement."""
    N = len(chosen.rows)
    assert chosen.valid.all()
    for rows, count, drawn in ((chosen.rows[:, :3], 6, 3), (chosen.rows[:, 3:], 9, 5)):
        hit = torch.zeros(N, 18).scatter_(1, rows, 1.0)
        candidates = hit.any(0)
        assert candidates.sum() == count
        together = (hit.T @ hit)[candidates][:, candidates]  # [count, count]; single ones on the diagonal
        single, pair = drawn / count, drawn * (drawn - 1) / (count * (count - 1))
        expected = torch.where(torch.eye(count, dtype=torch.bool), single, pair) * N
        deviation = (together - expected) / (expected * (1 - expected / N)).sqrt()
        assert deviation.abs().max() < 4.5
        assert 0.3 < deviation.square().mean() < 2, "spread"
    # Two neighbouring images have as many candidates in common as chance gives: 3 * 3 / 6 + 5 * 5 / 9.
    common = (chosen.rows[1:, :, None] == chosen.rows[:-1, None, :]).sum((1, 2)).float().mean()
    assert abs(common - (1.5 + 25 / 9)) < 0.1


def test_every_set_is_as_likely() -> None:
    check_uniform(draws())


def test_the_generator_decides() -> None:
    positive, negative = masks(40, 60, 10)

    def draw(generator: torch.Generator | None) -> torch.Tensor:
        return sample(positive, negative, size=32, positive_fraction=0.5, generator=generator).rows

    default = torch.get_rng_state()
    first, again, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), default), "the default generator is not its own"
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(draw(generator), first)
    assert not torch.equal(draw(generator), first), "the next draw is another"
    unseeded = draw(None)
    torch.set_rng_state(default)
    assert torch.equal(draw(None), unseeded)


def test_never_waits() -> None:
    positive, negative = masks(5, 60, 3)
    with count_blocking() as found:
        sample(positive, negative, size=16, positive_fraction=0.5)
    assert not found


def test_images_are_sampled_apart() -> None:
    positive = torch.tensor([[True, False, False], [False, False, False]])
    negative = torch.tensor([[False, False, True], [False, True, False]])
    chosen = sample(positive, negative, size=4, positive_fraction=0.5)
    assert chosen.rows[0, :2].tolist() == [0, 2]
    assert chosen.rows[1, :1].tolist() == [1]
    assert chosen.valid.sum(1).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys = torch.rand(positive.shape", "keys = torch.zeros(1, 1) * torch.rand(positive.shape"),
        ("keys = torch.rand(positive.shape", "keys = torch.rand(positive.shape[1]"),
        ("torch.where(mask, keys, -1.0)", "torch.where(mask, keys ** torch.arange(1, 19), -1.0)"),
        ("order.values >= 0", "order.values > -2"),
        ("max_positive = int(size * positive_fraction)", "max_positive = size"),
        ("descending=True, stable=True", "descending=False, stable=True"),
    ],
    ids=["no chance", "all images alike", "first preferred", "others drawn", "no limit", "empty first"],
)
def test_a_broken_sampler_fails(tmp_path: Path, monkeypatch, old: str, new: str) -> None:
    broken = mutant(sampling, old, new, tmp_path)
    monkeypatch.setattr(f"{__name__}.sample", broken.sample)

    def battery() -> None:
        check_uniform(draws(broken.sample))
        test_counts(50, 100, 8, 24)
        test_counts(3, 100, 3, 29)

    with pytest.raises(AssertionError):
        battery()
