"""End processes that a run has started together with it, even if the run is killed."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def exit_with_parent() -> None:
    """End this process as soon as the process that started it has ended. Does nothing in a process without a parent.

    A process that is killed cannot stop its children, and a queue to it does not show that it is gone.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="exit with parent", daemon=True).start()
