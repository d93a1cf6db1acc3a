"""Everything about checkpoints: names, reading, matching, and other kernels."""
