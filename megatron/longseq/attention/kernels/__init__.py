"""Block attention kernels with log-sum-exp, behind one interface."""
