"""Commands of this project: installation, checks, tests, launcher."""
