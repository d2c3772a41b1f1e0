"""Memory: how much is free, and the way from the host's to a GPU's."""

import os

import torch

from .errors import UsageError


def available_memory(device="cpu"):
    """Bytes that can be allocated now: on a GPU, or by this process, as far as the system tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _number_in("/proc/meminfo", "MemAvailable:", 1024)  # Linux; counts the disk cache, which gives way
    if free is None:
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return 4 * 2 ** 30
    # a container has a limit of its own; the files that it holds in memory give way
    limit, used = (_number_in(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is None or used is None:
        return free
    return min(free, limit - used + (_number_in("/sys/fs/cgroup/memory.stat", "file ") or 0))


def fits(num_bytes, device, what):
    """Whether data, `what`, fill at most half of what is free on `device`. A line says so where they do not."""
    if num_bytes <= available_memory(device) // 2:
        return True
    print(f"{what} need {num_bytes / 2 ** 30:.1f} GiB, more than half of what is free on {device}: they stay on the "
          "host")
    return False


def send(x, device):
    """A tensor on `device`. A GPU copies it from pinned memory: from other memory, the CPU would wait for its work."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _number_in(path, start="", unit=1):
    """The number after `start`, times `unit`, in the first line of a file that begins so; None if there is none."""
    try:
        with open(path) as f:
            line = next(line for line in f if line.startswith(start))
            return int(line[len(start):].split()[0]) * unit
    except (OSError, StopIteration, ValueError):
        return None


def check_memory(need, work, remedy, device="cpu"):
    """Raise UsageError if fewer than `need` bytes are free. work: what needs them; remedy: what would help."""
    free = available_memory(device)
    if free < need:
        raise UsageError(f"memory: {work} needs about {need / 2 ** 30:.1f} GiB, {free / 2 ** 30:.1f} GiB are free on "
                         f"{device}; {remedy}")
