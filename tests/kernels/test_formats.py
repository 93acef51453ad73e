"""Packed matrices: what they hold, that they are cut where groups end, and that bad ones are refused."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from llama.errors import QuantizationError
from llama.kernels.formats import INT8, Form, dequantize, pack_int4, quantize, unpack_int4

pytestmark = pytest.mark.usefixtures("two_threads")

INT4 = [Form("int4", size) for size in (32, 64, 128)]


def matrix(n_rows: int = 24, n_columns: int = 256) -> torch.Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("form", [INT8, *INT4])
def test_no_number_is_further_off_than_half_a_step(form: Form) -> None:
    rows = matrix()
    packed, scales = quantize(rows, form)
    assert packed.dtype == form.dtype
    assert scales.dtype == form.scale_dtype
    assert scales.shape == form.scale_shape(*rows.shape)
    assert packed.nbytes + scales.nbytes == form.nbytes(*rows.shape)
    steps = scales.float().abs().repeat_interleave(rows.shape[1] // (scales.numel() // rows.shape[0]))
    # int4 has one number fewer above zero than below: what is as large as the largest, the other way, is cut off by
    # a step; and eight steps move by as many of the scale's roundings to bfloat16.
    bound = 0.5 if form.kind == "int8" else 1 + 8 * 2**-8
    assert ((dequantize(packed, scales) - rows).abs().flatten() <= bound * steps + 1e-7).all()


def test_int4_is_ggufs_q4_0() -> None:
    """The same numbers and nearly the same scales as llama.cpp's own format, where groups have its size."""
    rows = matrix()
    packed, scales = quantize(rows, Form("int4", 32))
    theirs = torch.from_numpy(quants.quantize(rows.numpy(), GGMLQuantizationType.Q4_0)).unflatten(-1, (-1, 18))
    their_scales = theirs[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    torch.testing.assert_close(scales.float(), their_scales, rtol=2**-8, atol=0)  # bfloat16 against float16
    differing = (unpack_int4(packed) != unpack_int4(theirs[..., 2:].flatten(-2))).float().mean()
    assert differing < 0.02  # where the scales' last bits decide
    ours, reference = (
        dequantize(packed, scales),
        quants.dequantize(theirs.flatten(-2).numpy(), GGMLQuantizationType.Q4_0),
    )
    assert (ours - rows).norm() < 1.01 * (torch.from_numpy(reference) - rows).norm()


def test_int8_rows_are_within_torchs_own_error() -> None:
    rows = matrix()
    packed, scales = quantize(rows, INT8)
    origins = torch.zeros(len(rows), dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(rows, rows.abs().amax(1) / 127, origins, 0, -127, 127)
    torch.testing.assert_close(dequantize(packed, scales), theirs, rtol=1e-6, atol=0)


def test_packing_is_undone_exactly() -> None:
    numbers = torch.randint(16, (5, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_int4(pack_int4(numbers)), numbers)


@pytest.mark.parametrize("form", INT4)
def test_a_run_of_whole_groups_is_a_run_of_bytes(form: Form) -> None:
    rows, group = matrix(), form.group_size
    packed, scales = quantize(rows, form)
    for start, stop in ((0, group), (group, 256), (256 - group, 256)):
        part, part_scales = quantize(rows[:, start:stop], form)
        assert torch.equal(part, packed[:, start // 2 : stop // 2])
        assert torch.equal(part_scales, scales[:, start // group : stop // group])


@pytest.mark.parametrize("form", [INT8, *INT4])
def test_rows_of_zeros_stay_zeros(form: Form) -> None:
    packed, scales = quantize(torch.zeros(3, 128), form)
    assert scales.isfinite().all()
    assert not dequantize(packed, scales).any()


def test_what_does_not_exist_is_named() -> None:
    with pytest.raises(QuantizationError, match="'int3' is not one of int8, int4"):
        Form("int3")
    with pytest.raises(QuantizationError, match="group_size 48 is not one of 32, 64, 128"):
        Form("int4", 48)
    with pytest.raises(
        QuantizationError, match="wo has rows of 192, which groups of 128 do not divide: use group_size 32 or 64"
    ):
        Form("int4", 128).check_columns(192, "wo")
    with pytest.raises(QuantizationError, match="rows of 176, which groups of 32 do not divide: use int8"):
        Form("int4", 32).check_columns(176, "w2")
