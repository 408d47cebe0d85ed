"""Where full chunks are kept when the pool has no room for them: memory of the host, and a disk."""
