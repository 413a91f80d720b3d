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
        assert chosen.positive[n, :expect_positive].all(), "positives fill the first slots"
        assert positive[n][picked[:expect_positive]].all()
        assert negative[n][picked[expect_positive:]].all()


def draws() -> Sample:
    """Draws 3 of 6 positives and 5 of 9 negatives among 18 candidates, for 3,000 images."""
    kind = torch.tensor([1] * 6 + [2] * 9 + [0] * 3)[torch.randperm(18)].expand(3000, -1)
    return sample(kind == 1, kind == 2, size=8, positive_fraction=0.375)


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
    # Two neighbouring images have as many candidates in common as by chance: 3 * 3 / 6 + 5 * 5 / 9.
    common = (chosen.rows[1:, :, None] == chosen.rows[:-1, None, :]).sum((1, 2)).float().mean()
    assert abs(common - (1.5 + 25 / 9)) < 0.1


def test_every_set_is_as_likely_without_waiting() -> None:
    with count_blocking() as waits:
        chosen = draws()
    assert not waits
    check_uniform(chosen)


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


def test_images_are_sampled_apart_and_may_have_no_candidates() -> None:
    positive = torch.tensor([[True, False, False], [False, False, False]])
    negative = torch.tensor([[False, False, True], [False, True, False]])
    chosen = sample(positive, negative, size=4, positive_fraction=0.5)
    assert chosen.rows[0, :2].tolist() == [0, 2]
    assert chosen.rows[1, :1].tolist() == [1]
    assert chosen.valid.sum(1).tolist() == [2, 1]
    for size in (0, 4):
        chosen = sample(positive[:, :0], negative[:, :0], size=size, positive_fraction=0.5)
        assert chosen.rows.tolist() == [[0] * size] * 2
        assert not chosen.valid.any()
        assert not chosen.positive.any()


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
    with pytest.raises(AssertionError):  # noqa: PT012 - any of them may be the one that notices
        check_uniform(draws())
        test_counts(50, 100, 8, 24)
        test_counts(3, 100, 3, 29)
