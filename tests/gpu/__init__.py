"""Tests that need a CUDA device: bash scripts/test.sh tests/gpu (skipped where there is none)."""
