"""Says what the figures of this run are worth."""

import torch

from .ops import ON_CPU


def pytest_report_header() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ON_CPU
