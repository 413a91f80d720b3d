import pytest
import torch

from tmask_kernels import pack_masks, unpack_masks

SIZES = [(1, 1), (5, 31), (4, 32), (3, 33), (17, 100), (0, 7), (7, 0)]


@pytest.mark.parametrize(("height", "width"), SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_pack_then_unpack_is_the_identity(device, lead, height, width):
    masks = torch.rand(*lead, height, width, device=device) > 0.5
    packed = pack_masks(masks)
    assert packed.dtype == torch.int32
    assert packed.shape == (*lead, height, -(-width // 32))
    assert torch.equal(unpack_masks(packed, width), masks)


@pytest.mark.parametrize("x", [0, 1, 7, 8, 30, 31, 32, 63, 65])
def test_pixel_x_is_bit_x_mod_32_of_word_x_div_32(device, x):
    masks = torch.zeros(2, 70, dtype=torch.bool, device=device)
    masks[1, x] = True
    expected = torch.zeros(2, 3, dtype=torch.int64)
    expected[1, x // 32] = 1 << (x % 32)
    assert torch.equal(pack_masks(masks).cpu().long() & 0xFFFFFFFF, expected)


def test_any_nonzero_byte_is_inside_and_strides_do_not_matter(device):
    masks = torch.randint(0, 4, (40, 37), dtype=torch.uint8, device=device)
    assert torch.equal(pack_masks(masks.mT), pack_masks(masks.mT.contiguous() != 0))


def test_words_of_any_stride_are_read(device):
    masks = torch.rand(6, 20, device=device) > 0.5
    packed = torch.empty(1, 6, dtype=torch.int32, device=device).T.copy_(pack_masks(masks))
    assert packed.stride() == (1, 6)
    assert packed.is_contiguous()
    assert torch.equal(unpack_masks(packed, 20), masks)
    wide = torch.rand(6, 100, device=device) > 0.5
    assert torch.equal(unpack_masks(pack_masks(wide)[::2, 1:3], 64), wide[::2, 32:96])


def test_bits_past_the_width_are_zero(device):
    packed = pack_masks(torch.ones(3, 40, dtype=torch.bool, device=device))
    assert packed[:, 1].tolist() == [0xFF] * 3


def test_traces_without_a_graph_break(device):
    masks = torch.rand(2, 5, 40, device=device) > 0.5
    compiled = torch.compile(lambda m: unpack_masks(pack_masks(m), 40), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks), masks)
