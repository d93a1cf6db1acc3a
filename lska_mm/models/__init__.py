"""The network; import modules by their own names, as `weights` uses some of them."""
