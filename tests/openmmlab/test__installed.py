"""The one test of this folder that is always there."""

import pytest


def test_openmmlab_is_installed(missing):
    if missing:
        pytest.skip(f"all of tests/openmmlab: {', '.join(missing)} not installed; make test-openmmlab installs them and runs it")
