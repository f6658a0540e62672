"""The catalogue describes each launch as a launcher would make it on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from logra_kernels.triton import catalogue, launch, project
from logra_kernels.triton.catalogue import ARCHITECTURES, Entry, defaults


@pytest.fixture(params=ARCHITECTURES)
def entries(request: pytest.FixtureRequest) -> list[Entry]:
    return defaults(request.param)


def test_every_argument_is_described(entries: list[Entry]) -> None:
    assert len({(e.kernel_name, str(e.signature), str(e.constexprs)) for e in entries}) > 30
    for entry in entries:
        names = [param.name for param in entry.kernel.params]
        assert list(entry.signature) == list(entry.arguments) == names
        constant = {name for name, kind in entry.signature.items() if kind == "constexpr"}
        assert set(entry.constexprs) == constant
        assert not constant & set(entry.aligned)
        # Strides are 64 bits wide, and counts carry no hint.
        for name, kind in entry.signature.items():
            if name.endswith(("_stride", "_example", "_token", "_outer", "_inner", "cov_row")):
                assert kind in ("i64", "constexpr"), (entry.name, name)
            if name in ("tokens", "num_rows", "num_queries", "count", "segments", "modules"):
                assert kind == "i32"
                assert name not in entry.aligned


def test_grids_follow_from_the_arguments(entries: list[Entry]) -> None:
    for entry in entries:
        integers = {
            name: value for name, value in entry.arguments.items() if isinstance(value, int)
        }
        assert launch.programs(entry.grid, integers) == entry.launch.programs > 0


def test_no_grid_is_beyond_the_hardware(entries: list[Entry]) -> None:
    assert all(entry.launch.programs < 2**31 for entry in entries)


def test_hints_follow_widths_and_addresses() -> None:
    def aligned(x: torch.Tensor) -> set[str]:
        proj = torch.empty(64, x.shape[-1], dtype=x.dtype, device="meta")
        (entry,) = catalogue.recorded("x", "sm_90", lambda: project(x, proj))
        return set(entry.aligned)

    wide = torch.empty(3, 40, 64, dtype=torch.float16, device="meta")
    assert {"x", "proj", "width", "x_inner", "x_outer", "proj_stride"} <= aligned(wide)
    assert "x" not in aligned(wide[..., 1:])
    assert "width" not in aligned(wide[..., :50])
    assert "x_inner" not in aligned(torch.empty(3, 40, 50, dtype=torch.float16, device="meta"))


def test_float32_products_are_exact_unless_torch_is_told_otherwise() -> None:
    x = torch.empty(3, 40, 64, device="meta")

    def precision(**how: str) -> str:
        with launch.recording("sm_90") as launches:
            project(x, x[0], **how)
        return str(launches[0].arguments["PRECISION"])

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert precision() == "ieee"
        for rounded in ("high", "medium"):
            torch.set_float32_matmul_precision(rounded)
            assert precision() == "tf32"
            assert precision(input_precision="ieee") == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture: expected sm_80, gfx942 or the like, got"):
        catalogue.target("h100")


def test_recording_ends_and_runs_nothing() -> None:
    x = torch.empty(3, 40, 64, device="meta")
    with launch.recording("sm_90") as launches:
        project(x, x[0])
    assert len(launches) == 1
    with pytest.raises(RuntimeError, match="the Triton kernels need a tensor on a GPU"):
        project(x, x[0])
    assert len(launches) == 1
