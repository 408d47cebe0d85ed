"""Inside the planner: options, runs of the block table, packing, the time model, work items."""
