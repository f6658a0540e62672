"""From a store and queries to influence: the Attributor, its modes, its results."""

from logra_kernels.attribution.attributor import Attributor, influence_between
from logra_kernels.attribution.influence_result import InfluenceResult
from logra_kernels.attribution.plan import Groups, PreparedQueries, find_groups

__all__ = [
    "Attributor",
    "Groups",
    "InfluenceResult",
    "PreparedQueries",
    "find_groups",
    "influence_between",
]
