"""`python -m tests.regression`, see `tests.regression.command`.

Imports are behind the guard, because upstream's checkpoint writer starts a process that imports the main module again.
"""

if __name__ == "__main__":
    import sys

    from tests.regression.command import main

    sys.exit(main())
