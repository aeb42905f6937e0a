"""The age of a process, by which `plan` and `bench` tell how long Python takes to start."""

import time

from mixchat.base.system import process_seconds

_IMPORTED = time.perf_counter()


def test_a_process_is_older_than_its_modules_and_younger_than_the_tests_limit():
    """psutil rounds the time of the boot to a second, so a young process had a negative age."""
    first = process_seconds()
    assert time.perf_counter() - _IMPORTED < first < 86400
    assert first <= process_seconds()
