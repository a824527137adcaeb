"""`python -m tests.regression`, see `tests.regression.command`.

Nothing is imported before it is known that this is the command: upstream's checkpoint writer starts a process that
imports the main module again.
"""

if __name__ == "__main__":
    import sys

    from tests.regression.command import main

    sys.exit(main())
