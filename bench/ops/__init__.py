"""One function for each op, which gives a case of it, and for each op its table."""

from collections.abc import Callable, Iterator

from bench.harness.cases import Case
from bench.ops import gradients, rows, scans

# from quick or not to the cases of the table
TABLES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "project": gradients.projections,
    "per_sample_gradients": gradients.outer_products,
    "projected_gradients": gradients.projected,
    "covariance_update": rows.covariances,
    "scores": scans.all_scores,
    "topk_scores": scans.ends,
    "self_influence": scans.norms,
    "pack_rows": rows.packing,
}
