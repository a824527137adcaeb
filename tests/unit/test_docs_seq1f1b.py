"""The simulated tables of the page about Seq1F1B equal those of the code."""

import pytest

from megatron.longseq.pipeline.tools import paper
from tests.unit.pages import between


@pytest.mark.slow
def test_the_simulated_tables_are_the_simulators() -> None:
    assert between("seq1f1b.md", "table") == paper.markdown(), "update them: python -m megatron.longseq.pipeline table"
