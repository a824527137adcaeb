"""Seq1F1B on a laptop, and the paper's configurations on a cluster."""
