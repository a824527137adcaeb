"""The five-minute form of the soak."""

from pathlib import Path

import pytest

from tests.faults.soak import Soak


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_minutes(tmp_path: Path) -> None:
    result = Soak(tmp_path, seconds=150, every=40).run()
    assert result.faults >= 3 and result.lost_steps == 0, result
    assert result.is_good, result
