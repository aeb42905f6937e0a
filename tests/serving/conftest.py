"""A loaded model, as for the tests of the face."""

from tests.face.conftest import installed, load

__all__ = ["installed", "load"]
