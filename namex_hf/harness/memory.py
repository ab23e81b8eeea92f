"""Whether a model fits, told from headers before it is loaded."""

import os

import psutil
import torch

from ..errors import CheckpointError
from .candidates import Candidate, bytes_in


def free_bytes(device: str, parallelize: bool) -> tuple[int, str]:
    """Bytes that a process may fill with weights, and where. Processes of one machine share its CPU memory."""
    if torch.device(device).type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return psutil.virtual_memory().available // processes, f"of memory for each of {processes} processes"
    if parallelize:
        count = torch.accelerator.device_count()
        return sum(torch.accelerator.get_memory_info(i)[0] for i in range(count)), f"on {count} devices"
    return torch.accelerator.get_memory_info(torch.device(device))[0], f"on {device}"


def check_fits(rows: list[Candidate], device: str, dtype: str, parallelize: bool = False) -> None:
    """Raises:
    CheckpointError: a model whose weights alone are larger than what is free.
    """
    free, where = free_bytes(device, parallelize)
    for row in rows:
        added = 0 if row.plan is None else row.plan.all_added_bytes + row.plan.untied_bytes
        needed = bytes_in(row.checkpoint, dtype) + added
        if needed > free:
            more = "" if parallelize or torch.device(device).type == "cpu" else ", or --parallelize over several"
            raise CheckpointError(
                f"{row.checkpoint.name}: its weights take {needed / 1e9:.2f} GB in {dtype}, and {free / 1e9:.2f} GB "
                f"are free {where}; accepted: a smaller --dtype{more}"
            )
