"""Query heads that attend alike, of which one attends for all (CHAI, arXiv 2403.08058)."""

from pallas_kernels.clusters.clustered_kv import ClusteredKV
from pallas_kernels.clusters.head_clusters import HeadClusters, KeySlots
from pallas_kernels.clusters.membership import MEMBERSHIPS, representatives_of

__all__ = ["MEMBERSHIPS", "ClusteredKV", "HeadClusters", "KeySlots", "representatives_of"]
