import pytest
import torch
from op_cases import DTYPES, TAILS, randn
from torch import Tensor

from logra_kernels import reference
from logra_kernels.ops import pack_rows, unpack_rows

pytestmark = pytest.mark.usefixtures("poison")


def spread(num_rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows from 2^-100 to 2^100 (as far as the type goes), elements over 40 powers of two."""
    rows = torch.ldexp(randn(num_rows, dim), torch.linspace(-100, 100, num_rows)[:, None].int())
    return torch.ldexp(rows, 20 * randn(num_rows, dim, seed=1)).to(dtype)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Bit for bit; of a NaN only that it is one."""
    assert torch.equal(got[1], expected[1])
    nan = expected[0].isnan()
    assert torch.equal(got[0].isnan(), nan)
    assert torch.equal(got[0].view(torch.int16)[~nan], expected[0].view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference(isa: str, dtype: torch.dtype) -> None:
    for dim in TAILS:
        rows = spread(30, dim, dtype)
        cut = dim // 3
        modules = [cut, 0, dim - cut], [3, 0, -100]
        assert_same(pack_rows(rows, *modules), reference.pack_rows(rows, *modules))
        packed, scale = reference.pack_rows(rows, *modules)
        assert torch.equal(
            unpack_rows(packed, scale, *modules).nan_to_num(),
            reference.unpack_rows(packed, scale, *modules).nan_to_num(),
        )


@pytest.mark.parametrize("exponent", [-126, -20, 0, 127])
def test_extreme_values(isa: str, exponent: int) -> None:
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    rows = torch.tensor(
        [
            [0.0, -0.0, 0.0, 0.0],
            [huge, -tiny, 1.0, 0.0],
            [tiny * 2.0**-23, -tiny * 2.0**-23, 0.0, tiny],  # subnormal
            [1.0, torch.inf, -torch.inf, 2.0**-30],
            [torch.nan, 1e30, -1.0, 70000.0],
            [65504.0, 65520.0, 2.0**-25, 3 * 2.0**-26],
        ]
    )
    modules = [1, 3], [0, exponent]
    assert_same(pack_rows(rows, *modules), reference.pack_rows(rows, *modules))


def test_every_rounding(isa: str) -> None:
    """Values around every half there is, and around the middle between neighbours."""
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    values = torch.cat([halves, middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20)])
    # 40000 sets the row's scale to 2, so that subnormals are reached at 2^-23 and below
    rows = torch.stack([torch.cat([values, torch.tensor([40000.0])])] * 2)
    rows[1].neg_()
    modules = [rows.shape[1]], [0]
    assert_same(pack_rows(rows, *modules), reference.pack_rows(rows, *modules))


def test_tiny_and_huge_rows_survive(isa: str) -> None:
    """As precise as fp16 is near the row's largest element, whatever the row's size."""
    rows = torch.ldexp(randn(40, 50), torch.linspace(-110, 110, 40)[:, None].int())
    modules = [20, 30], [0, -6]
    back = unpack_rows(*pack_rows(rows, *modules), *modules)
    largest = (rows.abs() * torch.tensor([1.0] * 20 + [64.0] * 30)).amax(1, keepdim=True)
    # 11 bits of each element, or 2^-25 / 2^14 of the largest one where it became subnormal
    bound = rows.abs() * 2.0**-11 + largest * 2.0**-39
    assert bool(((back - rows).abs() <= bound).all())


def test_row_scale_of_any_value(isa: str) -> None:
    packed, scale = randn(5, 33).half(), randn(5, seed=1) * torch.tensor([1, 1e-30, 1e30, 0, 1])
    modules = [33], [-7]
    assert torch.equal(
        unpack_rows(packed, scale, *modules), reference.unpack_rows(packed, scale, *modules)
    )


def test_empty(isa: str) -> None:
    packed, scale = pack_rows(randn(0, 5), [5], [0])
    assert packed.shape == (0, 5)
    assert scale.shape == (0,)
    packed, scale = pack_rows(randn(3, 0), [], [])
    assert packed.shape == (3, 0)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert unpack_rows(packed, scale, [], []).shape == (3, 0)
