"""`kernel`: the attention kernels against baselines, floors and the oracle."""
