"""The network; each module is imported by its own name, so that `weights` can use some."""
