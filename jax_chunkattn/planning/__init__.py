"""From block tables to what the kernels read: shared runs, packing, work items, batches."""
