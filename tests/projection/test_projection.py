"""Random projections: reproducible, scaled so that inner products survive, exact in bfloat16."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tree import output

import logra_kernels as logra
from logra_kernels.projection import (
    ModuleProjection,
    ProjectionSpec,
    build_projections,
    describe_projection,
    projection_digest,
    random,
    register_projection_kind,
    spec,
)

FEATURES = {"a": (96, 40), "b.c": (17, 130)}
# a change of these changes what every store on disk means
GOLDEN = {
    "normal": "cc20d5881d43d7f29f1c04ed18c2c3275ea35dc9bc1cda22a7a96739fed6acde",
    "rademacher": "a08440b689edaa2e55dbff7ee26c6e13c1d659bb765b0faae5c8aa941707a9b9",
}


def proj_in(projection: ModuleProjection) -> Tensor:
    assert projection.proj_in is not None
    return projection.proj_in


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_same_in_every_process(kind: str) -> None:
    assert projection_digest(build_projections(FEATURES, (8, 16), kind, seed=3)) == GOLDEN[kind]


def test_same_in_a_fresh_process() -> None:
    program = (
        "from logra_kernels.projection import *;"
        f"print(projection_digest(build_projections({FEATURES!r}, (8, 16), 'normal', seed=3)))"
    )
    assert output(sys.executable, "-c", program).strip() == GOLDEN["normal"]


def test_depends_on_seed_name_and_side_alone() -> None:
    one = build_projections(FEATURES, 8, seed=0)
    alone = build_projections({"b.c": (17, 130)}, 8, seed=0)
    assert torch.equal(proj_in(one["b.c"]), proj_in(alone["b.c"]))
    other_seed = build_projections(FEATURES, 8, seed=1)
    assert not torch.equal(proj_in(one["a"]), proj_in(other_seed["a"]))
    square = build_projections({"a": (20, 20), "b": (20, 20)}, 8)
    assert square["a"].proj_out is not None
    assert not torch.equal(proj_in(square["a"]), square["a"].proj_out)
    assert not torch.equal(proj_in(square["a"]), proj_in(square["b"]))


def test_random_is_normal() -> None:
    random, normal = (build_projections(FEATURES, 8, kind) for kind in ("random", "normal"))
    assert projection_digest(random) == projection_digest(normal)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_inner_products_survive_on_average(kind: str) -> None:
    """E⟨Pa, Pb⟩ = ⟨a, b⟩: the mean over 400 seeds lies within four standard errors."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    made = []
    for seed in range(400):
        proj = proj_in(build_projections({"m": (50, 1)}, 10, kind, seed)["m"]).double()
        made.append((proj @ a) @ (proj @ b))
    products = torch.stack(made)
    error = (products.mean() - a @ b).abs()
    assert error <= 4 * products.std() / 400**0.5
    assert products.std() > 0


def test_normal_has_unit_variance_and_is_exact_in_bfloat16() -> None:
    proj = proj_in(build_projections({"m": (4000, 1)}, 64)["m"])
    assert torch.equal(proj, proj.bfloat16().float())
    # 256,000 draws: the standard error of the variance is sqrt(2 / 256000) = 0.28 %
    assert abs(proj.double().var() * 64 - 1) < 4 * 0.0028
    assert abs(proj.double().mean()) < 4 / (8 * 256_000**0.5)


def test_rademacher_is_two_valued_and_balanced() -> None:
    proj = proj_in(build_projections({"m": (4001, 1)}, 7, "rademacher")["m"])
    assert proj.unique().tolist() == pytest.approx([-(7**-0.5), 7**-0.5], rel=1e-7)
    # 28,007 fair coins: four standard errors
    assert abs(proj.sign().mean()) < 4 / 28_007**0.5


def test_long_streams_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are drawn in blocks, to bound the memory; 8 x 130 elements take 17 blocks of 64."""
    whole = projection_digest(build_projections(FEATURES, 8))
    monkeypatch.setattr(random, "_BLOCK_WORDS", 64)
    assert projection_digest(build_projections(FEATURES, 8)) == whole


def test_rank_that_reaches_the_width_is_the_identity() -> None:
    made = build_projections(FEATURES, (40, 16))
    assert made["a"].proj_out is None
    assert (made["a"].ko, made["a"].ki) == (40, 16)
    assert (made["b.c"].ko, made["b.c"].ki) == (40, 16)
    whole = ModuleProjection(96, 40)
    assert (whole.ko, whole.ki) == (40, 96)


def test_a_store_describes_its_projection_as_version_1_did() -> None:
    """The keys and their order too: resume compares them, and names the first that differs."""
    made_from = ProjectionSpec("random", (8, 16), seed=3)
    described = describe_projection(made_from.build(FEATURES), True, made_from)
    assert json.dumps(described) == json.dumps(
        {
            "kind": "normal",
            "bias": True,
            "widths": {"a": [96, 40], "b.c": [17, 130]},
            "rank": [8, 16],
            "seed": 3,
            "scaling": "1/sqrt(K): E<Pa, Pb> = <a, b>",
            "stream": "philox4x64, key sha256(seed, 0, module, 0, side)[:16]",
            "sha256": GOLDEN["normal"],
        }
    )
    whole = describe_projection({"a": ModuleProjection(96, 40)}, False)
    assert list(whole) == ["kind", "bias", "widths", "sha256"]
    assert whole["kind"] == "identity"


class FirstColumns:
    """Keeps the first K features: a kind that the package does not have."""

    name = "first"

    def matrix(
        self, spec: ProjectionSpec, module: str, side: str, shape: tuple[int, int]
    ) -> Tensor:
        return torch.eye(*shape)

    def describe(self, spec: ProjectionSpec) -> dict[str, Any]:
        return {"offset": spec.seed}


def test_a_registered_kind_needs_no_other_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "_kinds", dict(spec._kinds))
    register_projection_kind(FirstColumns(), "leading")
    model, x = nn.Linear(6, 5, bias=False), torch.randn(4, 6)
    run = logra.init("first", root_dir=str(tmp_path), rank=(2, 3), init="leading")
    run.watch(model)
    run.add_lora()
    run.setup({"save": "grad"})
    with run(data_id=range(4)):
        model(x).sum().backward()
    run.finalize()
    described = logra.Store.open(tmp_path / "first").projection
    assert (described["kind"], described["rank"], described["offset"]) == ("first", [2, 3], 0)
    want = x[:, None, :3].expand(4, 2, 3).reshape(4, 6)
    torch.testing.assert_close(run.get_log()[1]["model"]["grad"].reshape(4, 6), want)
    run.initialize_from_log()  # the store gives the same projection back


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "init": "pca"}, "init: 'pca' is made from a pilot"),
        ({"rank": 4, "init": "xavier"}, "init: expected one of random, normal, rademacher"),
        ({"rank": 0}, "rank: expected an integer >= 1 or (rank_out, rank_in), got 0"),
        ({"rank": (1, 2, 3)}, "got (1, 2, 3)"),
        ({"rank": 2.5}, "rank: expected an integer >= 1"),
        ({"rank": True}, "rank: expected an integer >= 1"),
        ({"rank": "64"}, "rank: expected an integer >= 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_projections(FEATURES, **arguments)
