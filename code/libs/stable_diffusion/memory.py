"""How much memory Stable Diffusion takes and how much there is, so that too little is said before the work."""

import threading

import torch

from ..common.errors import UsageError

# the most that one step (for each image and branch of guidance) and decoding one image hold beside the weights:
# bytes per pixel of the image, measured on a CPU in fp32 at 512 x 512; and what PyTorch takes for itself
UNET_BYTES, DECODER_BYTES, REST = 700, 4000, 200 * 2 ** 20


def drawing_bytes(dtype, height, width, batch_size=1):
    """Memory for drawing a batch of images, guided, beside the weights. dtype: of the UNet."""
    step = UNET_BYTES * dtype.itemsize / 4 * 2 * batch_size
    return int(height * width * max(step, DECODER_BYTES)) + REST


def _read(path):
    try:
        with open(path) as f:
            return f.read()
    except OSError:
        return ""


def memory_available(device):
    """Bytes that are free on a GPU, or for this process; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [int(line.split()[1]) * 1024 for line in _read("/proc/meminfo").splitlines()
             if line.startswith("MemAvailable:")]
    # a container's limit; of what it uses, cached files can go
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        cached = sum(int(line.split()[1]) for line in _read("/sys/fs/cgroup/memory.stat").splitlines()
                     if line.startswith("file "))
        found.append(int(limit) - int(used) + cached)
    return min(found, default=None)


def check_memory(device, need, what, remedy):
    """Raise UsageError if fewer than `need` bytes are free. what: needs them; remedy: what else to do."""
    have = memory_available(device)
    if have is not None and have < need:
        raise UsageError(f"memory: {what} takes about {need / 2 ** 30:.1f} GiB and {device} has "
                         f"{have / 2 ** 30:.1f} GiB free; {remedy}")


class PeakMemory:
    """The most memory that the process has held at a time, in bytes, apart from mapped files; looked at 50 times a
    second. 0 where the system does not say (it is not Linux)."""

    def __init__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self):
        lines = _read("/proc/self/status").splitlines()
        now = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        self.peak = max(self.peak, now)

    def _watch(self):
        while not self._stop.wait(0.02):
            self._look()

    def __enter__(self):
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._look()
        self._stop.set()
        self._thread.join()
