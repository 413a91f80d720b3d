"""Whether this process can still use its GPU. torch is imported by the question alone: some who ask never had it."""

from __future__ import annotations

_given_up = False


def give_up() -> None:
    """Say that what comes next in this process would fail for what has happened, not for what it is."""
    global _given_up
    _given_up = True


def lives() -> bool:
    """Whether CUDA, if this process has used it, still answers, and nothing gave it up."""
    import torch

    if _given_up:
        return False
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()  # a value read back: only then is it sure
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True
