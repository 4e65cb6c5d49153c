from tests.models.conftest import folders

__all__ = ["folders"]
