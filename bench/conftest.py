"""What pytest-benchmark writes about the machine: ours, without names of hosts or folders."""

from typing import Any

import pytest

from bench._machine import commit, machine


@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["commit_info"] = {"id": commit()}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every sample: megabytes
