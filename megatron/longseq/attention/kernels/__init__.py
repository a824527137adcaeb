"""Block attention kernels behind one interface, with log-sum-exp."""
