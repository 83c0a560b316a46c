"""Options that a reload applies, and the secrets that no child process inherits."""

from __future__ import annotations

import dataclasses
import os

import pytest

from ovserve.cli.serve import _take_environment
from ovserve.server import RELOADED
from ovserve.settings.options import Settings
from ovserve.settings.worker import WorkerSettings


def test_every_option_that_workers_read_is_reloaded() -> None:
    """A change of one of them reaches the workers, by replacing them or by a message."""
    options = {field.name for field in dataclasses.fields(Settings)}
    # Others, such as the node of a cluster, are no options.
    assert {field.name for field in dataclasses.fields(WorkerSettings)} & options <= RELOADED


@pytest.mark.parametrize("variable", ["OVSERVE_API_KEY", "OVSERVE_Api_Key", "OVSERVE_admin_key"])
def test_secrets_leave_the_environment_in_every_spelling(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "secret")
    assert _take_environment()[variable] == "secret"
    assert variable not in os.environ
