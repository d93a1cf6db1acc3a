"""The same numbers sooner; the network knows `door` alone."""
