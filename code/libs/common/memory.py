"""How much memory is free."""

import os


def available_memory():
    """Bytes of memory that can be allocated now, as far as the system tells."""
    try:
        with open("/proc/meminfo") as f:  # Linux; counts the disk cache, which gives way
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 * 2 ** 30
