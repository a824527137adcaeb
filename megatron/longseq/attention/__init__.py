"""Attention over long sequences: over context-parallel ranks (Ulysses x ring), and over segments of a sequence."""
