"""Property tests: few examples by default, 100 with --all, and no limit on the time that an example takes."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("few", max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("all", settings.get_profile("few"), max_examples=100)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples before the test modules are imported, and one thread for their small tensors."""
    torch.set_num_threads(1)
    settings.load_profile("all" if config.option.all else "few")
