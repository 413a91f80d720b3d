"""The sampler: fixed size, bounded share of positives, no positives still samples negatives."""

import pytest
import torch

from tmask.model.sampling import sample


def masks(num_positive: int, num_negative: int, num_other: int) -> tuple[torch.Tensor, torch.Tensor]:
    kind = torch.tensor([1] * num_positive + [2] * num_negative + [0] * num_other)
    kind = kind[torch.randperm(len(kind))].expand(2, -1)
    return kind == 1, kind == 2


@pytest.mark.parametrize(
    ("num_positive", "num_negative", "expect_positive", "expect_negative"),
    [(50, 100, 8, 24), (3, 100, 3, 29), (0, 100, 0, 32), (50, 4, 8, 4), (50, 0, 8, 0), (2, 3, 2, 3), (0, 0, 0, 0)],
)
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


def test_every_candidate_can_be_drawn_and_draws_differ() -> None:
    positive, negative = masks(10, 20, 0)
    seen = torch.zeros(30, dtype=torch.bool)
    for _ in range(60):
        chosen = sample(positive, negative, size=8, positive_fraction=0.5)
        seen[chosen.rows[0]] = True
    assert seen.all()
    assert not torch.equal(chosen.rows[0], chosen.rows[1])


def test_images_are_sampled_apart() -> None:
    positive = torch.tensor([[True, False, False], [False, False, False]])
    negative = torch.tensor([[False, False, True], [False, True, False]])
    chosen = sample(positive, negative, size=4, positive_fraction=0.5)
    assert chosen.rows[0, :2].tolist() == [0, 2]
    assert chosen.rows[1, :1].tolist() == [1]
    assert chosen.valid.sum(1).tolist() == [2, 1]
