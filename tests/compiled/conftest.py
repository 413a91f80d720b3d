"""These tests want the plug-in beside them: `make test-compiled`."""

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.pluginmanager.has_plugin("tests.compiled.plugin") else True
