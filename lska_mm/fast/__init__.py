"""Faster implementations with the same results; the network only imports `door`."""
