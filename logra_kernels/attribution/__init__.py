"""From a store and queries to influence: the Attributor, its modes, its results."""

from logra_kernels.attribution.attributor import Attributor
from logra_kernels.attribution.compress import compress_store
from logra_kernels.attribution.influence_result import Answer, InfluenceResult
from logra_kernels.attribution.plan import Groups, PreparedQueries, find_groups
from logra_kernels.attribution.streamed import StreamedScores, influence_between
from logra_kernels.attribution.two_stage import TwoStage

__all__ = [
    "Answer",
    "Attributor",
    "Groups",
    "InfluenceResult",
    "PreparedQueries",
    "StreamedScores",
    "TwoStage",
    "compress_store",
    "find_groups",
    "influence_between",
]
