"""Fixtures of the chat's tests."""

import pytest
from chat_doubles import make_session


@pytest.fixture
def session_of():
    """Builds a session from what its engine is to say."""
    return make_session
