"""The most memory that a call has at once, beyond what was there before: resident memory, from the kernel's counter."""

import ctypes
import gc

_libc = ctypes.CDLL(None)


class Peak:
    """Measures from its making to `bytes`.

    Memory that earlier calls freed goes back to the system first: what the allocator kept would hide a later call's.
    """

    def __init__(self) -> None:
        gc.collect()
        _libc.malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the high-water mark starts anew
        self._before = status("VmRSS")

    def bytes(self) -> int:
        """Return the most since the start."""
        return status("VmHWM") - self._before


def status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
