"""Checks of a launch before it trains: nodes, software, storage, data, and the process groups."""
