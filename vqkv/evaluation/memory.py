"""Live tensor storage of the process: the check on every count of bytes."""

from __future__ import annotations

import gc

import torch


def live_storage_bytes() -> int:
    """Bytes of all storages that some live tensor uses, each counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for item in gc.get_objects():
        # Asking proxies and lazy modules for their class may import or warn; their type does not.
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            # Those that torch.compile traces with have sizes, but no memory.
            if storage.device.type != "meta":
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
