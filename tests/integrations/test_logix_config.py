"""LogIX's configuration file, and the options of init."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_run import RAW, Data, log_all, log_queries, refuse

import logra_kernels as logix
from logra_kernels import Store


def write_config(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_config_file(tmp_path: Path, model: nn.Module, data: Data) -> None:
    path = write_config(
        tmp_path,
        f"""
        root_dir: {tmp_path}/from_file
        logging:
          flush_threshold: 200
          num_workers: 1
          cpu_offload: true
          log_dtype: float32
        lora:
          init: rademacher
          rank: [2, 3]
          parameter_sharing: false
        influence:
          damping: 0.25
          relative_damping: true
          mode: l-relatif
          flatten: false
        """,
    )
    run = logix.init(project="llm", config=path)
    run.watch(model)
    run.add_lora()
    run.setup(RAW)
    log_all(run, model, data)
    run.finalize()
    store = Store.open(tmp_path / "from_file" / "llm")
    assert store.dtype == "float32"
    assert len(store.shards) == 6  # 18 float32 columns a row, two rows in 200 bytes
    assert [(m.ko, m.ki) for m in store.modules] == [(2, 3)] * 3
    assert store.projection["kind"] == "rademacher"
    run.eval()
    log_queries(run, model, data, slice(1))
    result = run.compute_influence_all()
    assert result.mode == "l-relatif"
    explicit = run.compute_influence_all(damping_scale=0.25, mode="l-relatif")
    assert torch.equal(result.scores, explicit.scores)


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, "lora: {rank: 8}\ninfluence: {damping: 1.0e-3}\n")
    config = logix.init("a", path, rank=4, damping_scale=0.2).config
    assert (config.rank, config.damping, config.damping_scale) == (4, None, 0.2)
    config = logix.init("a", path).config
    assert (config.rank, config.damping, config.damping_scale) == (8, 1e-3, None)
    assert config.root_dir == "./logra"
    assert logix.init("a", {"lora": {"rank": 5}}).config.rank == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logging: {num_workers: 4}", "logging.num_workers: expected 1, got 4: one background"),
        ("logging: {cpu_offload: false}", "logging.cpu_offload: expected True, got False: the cov"),
        ("logging: {log_dtype: int8}", "logging.log_dtype: expected none (float32), float16"),
        ("logging: {flush_threshold: 0}", "logging.flush_threshold: expected a number of bytes"),
        ("lora: {parameter_sharing: true}", "lora.parameter_sharing: expected False, got True"),
        ("lora: {parameter_sharing_groups: [q]}", "lora.parameter_sharing_groups: expected None"),
        ("lora: {init: pca}", "init: 'pca' needs the kfac statistic"),
        ("lora: {rank: -1}", "rank: expected an integer >= 1"),
        ("lora: {alpha: 1}", "no key lora.alpha; there are init, rank, seed"),
        ("influence: {flatten: true}", "influence.flatten: expected False, got True"),
        ("influence: {relative_damping: 1}", "influence.relative_damping: expected true or false"),
        ("influence: {damping: high}", "damping: expected a finite number >= 0, got 'high'"),
        ("storage: {type: lmdb}", "no key 'storage'; there are root_dir, project, logging"),
        ("project: other", "project is 'other', init was given 'llm'"),
        ("logging: 3", "logging: expected keys and values, got 3"),
        ("- a", "expected keys and values, got list"),
        ("a: [", "not a YAML file"),
    ],
)
def test_config_refuses(tmp_path: Path, text: str, message: str) -> None:
    with refuse(message):
        logix.init("llm", write_config(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "init: no option 'ranks'; there are root_dir, rank, init"),
        ({"dtype": "bfloat16"}, "dtype: expected one of float16, float32, got 'bfloat16'"),
        ({"init": "orthogonal"}, "init: expected one of random, normal, rademacher"),
        ({"on_nonfinite": "drop"}, "on_nonfinite: expected one of raise, skip, got 'drop'"),
        ({"averaged_loss": "no"}, "averaged_loss: expected one of raise, warn, allow"),
        ({"damping": 1.0, "damping_scale": 1.0}, "damping: expected damping or damping_scale"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"allow_unused": 1}, "allow_unused: expected True or False, got 1"),
        ({"config": "nowhere.yaml"}, "config: no file nowhere.yaml"),
        ({"config": 5}, "config: expected a file's path or a dictionary, got 5"),
        ({"mode": "ratio"}, "mode: expected one of dot, l-relatif, l2, theta-relatif"),
        ({"damping": -1}, "damping: expected a finite number >= 0, got -1"),
        ({"damping_scale": True}, "damping_scale: expected a finite number >= 0, got True"),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with refuse(message):
        logix.init("llm", **options)


@pytest.mark.parametrize("project", ["", "a/b", "..", 3])
def test_project_is_a_folder_name(project: Any) -> None:
    with refuse("project: expected the name of a folder"):
        logix.init(project)
