"""Attention over long sequences: block kernels with log-sum-exp, and keys and values of earlier segments."""
