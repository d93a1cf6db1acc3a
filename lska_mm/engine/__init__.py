"""What a config may name for its training: hooks, a constructor, processes without a GPU."""
