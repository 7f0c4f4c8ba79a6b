"""Frozen encoders to fine-tune on."""

import pytest
from small_finetune import new_encoder


@pytest.fixture(scope="session")
def encoder():
    return new_encoder("none")


@pytest.fixture(scope="session")
def standardised():
    """Its running statistics are not those of the task."""
    return new_encoder("batch")
