"""System `cpu`: upstream's loop on machines without a CUDA device."""

from patches.record import Record

RECORDS: tuple[Record, ...] = ()
