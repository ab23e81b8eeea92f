"""The most memory that a model takes while it runs."""

import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak(device: str) -> bool:
    """Begin to count anew; whether the system can."""
    if torch.device(device).type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5")
    except OSError:  # Linux alone has it
        return False
    return True


def peak_bytes(device: str) -> int | None:
    """Since `forget_peak`: allocated on an accelerator; on a CPU resident, libraries included."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None
