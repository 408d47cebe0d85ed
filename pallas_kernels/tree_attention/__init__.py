from pallas_kernels.tree_attention.api import IMPLEMENTATIONS, tree_attention
from pallas_kernels.tree_attention.plan import HeadWindows, TreePlan
from pallas_kernels.tree_attention.xla import KEPT

__all__ = ["IMPLEMENTATIONS", "KEPT", "HeadWindows", "TreePlan", "tree_attention"]
