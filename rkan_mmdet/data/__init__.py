"""The demo's data set."""
