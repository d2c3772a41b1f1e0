"""Where training computes, in which precision, and how the network is called there."""

import math
import sys
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from ..common import rules
from ..common.errors import first_line


def pick_device(wanted):
    """The device `wanted`; the best there is where that one is missing, which is printed, or None."""
    rules.check("--device", wanted, {"--device": rules.optional(rules.device())}, where="")
    for name in filter(None, (wanted, "cuda:0", "mps", "cpu")):
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError):
            continue
        if wanted and name != wanted:
            print(f"devices: {wanted} is not available; using {name}", flush=True)
        return torch.device(name)


def pick_precision(name, device):
    """The dtype of autocast for the setting `dtype`; None: everything in fp32."""
    if device.type != "cuda":
        if name == "bf16" and device.type == "cpu":
            if not _cpu_has_bf16():
                print("dtype: this CPU has no instructions for bf16; fp32 will be many times as fast", flush=True)
            return torch.bfloat16
        if name not in ("auto", "fp32"):
            print(f"dtype: {name} does not work on {device.type}; using fp32", flush=True)
        return None
    if name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


def _cpu_has_bf16():
    """Whether oneDNN has bfloat16 kernels for this CPU; True where that is not known."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # PyTorch without oneDNN
        return True


def autocast(device, precision):
    """The context in which the loss is computed. precision: of `pick_precision`."""
    return torch.autocast(device.type, precision, enabled=precision is not None)


def memory_format(device):
    """The layout in which convolutions are fastest; on Apple's devices the default."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def peak_memory(device):
    """Bytes: allocated on the GPU, or held by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare_network(model, cfg, dataset, device, precision=None, n=2, processes=1):
    """Make the UNet of `model` fast for training with n images at once, as `train_cfg.compile` asks.

    Only the call of the network in training mode changes: weights keep their names, and a copy of the model that was
    made before stays as it is. One line says how it went; a method that fails here is left out.
    Returns the methods used: "compiled", "CUDA graphs", or none.
    """
    on_gpu = device.type == "cuda"
    # a graph writes its gradients to the same memory every time, so those of several parts cannot be added up
    record = on_gpu and cfg["compile"] is None and processes == cfg["accumulate"] == 1
    compiled = cfg["compile"] if cfg["compile"] is not None else on_gpu and not record
    done = []
    for name, wanted, prepare in ("compiled", compiled, _compile), ("CUDA graphs", record, _record):
        if wanted:
            try:
                with torch.random.fork_rng():
                    prepare(model, lambda: _trial_loss(model, dataset, device, precision, n), precision)
                done.append(name)
                print(f"network: {name}", flush=True)
            except Exception as e:  # no compiler, an operator it cannot take: it fails in many ways
                print(f"network: {name} does not work here, going on without ({first_line(e, 200)})", flush=True)
            model.model.zero_grad()
    return done


def _compile(model, trial, precision):
    """torch.compile. Its graph is for one batch size: another, a sample grid's for example, would be compiled anew."""
    model.model.forward = torch.compile(model.model.forward, dynamic=False)
    try:
        trial().backward()
    except Exception:
        del model.model.forward
        raise


def _record(model, trial, precision):
    """CUDA graphs: forward and backward become one launch each.

    Otherwise the CPU takes longer to launch a small network's thousand kernels than the GPU to run them.
    """
    inputs = []
    hook = model.model.register_forward_pre_hook(lambda _, args: inputs.extend(x.detach().clone() for x in args))
    try:
        trial()
    finally:
        hook.remove()
    # the graphs keep the nodes they were recorded with, of another stream; autograd waits for that one, and warns
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    with torch.autocast(inputs[0].device.type, precision, enabled=precision is not None, cache_enabled=False):
        torch.cuda.make_graphed_callables(model.model, tuple(inputs), allow_unused_input=True)


def _trial_loss(model, dataset, device, precision, n):
    """The loss of the first n images, computed as in train.py."""
    images, labels = dataset.batch(torch.arange(min(n, len(dataset))), torch.Generator())
    images, labels = images.to(device), labels.to(device)
    noise = torch.randn(len(labels), *model.img_shape, device=device)
    with autocast(device, precision):
        return model(images, labels, torch.zeros_like(labels), noise, encoded=dataset.encoded)


@contextmanager
def fast_sampling(model, device, precision):
    """A context in which images are drawn from `model`, in eval mode, faster: its network, and that of its guide,
    computes in `precision` and, on a GPU, through CUDA graphs. What it returns has the dtype of its input, so that all
    sums stay in fp32.
    """
    with ExitStack() as stack:
        for each in filter(None, (model, model.guide)):
            stack.enter_context(_fast(each.model, device, precision))
        yield


@contextmanager
def _fast(network, device, precision):
    before = network.forward
    own = vars(network).get("forward")  # of `prepare_network`

    def forward(*inputs):
        # no cache of the weights in half precision: a graph would go on with those of its recording
        with torch.autocast(device.type, precision, enabled=precision is not None, cache_enabled=False):
            return before(*inputs).to(inputs[0].dtype)

    if precision is not None or device.type == "cuda":
        network.forward = _replayed(network, forward, device) if device.type == "cuda" else forward
    try:
        yield
    finally:
        vars(network).pop("forward", None)
        if own:
            network.forward = own


def _replayed(network, forward, device):
    """`forward` through CUDA graphs, one for each shape of the inputs. Where that fails, `network` goes on without."""
    graphs = {}

    def record(inputs):
        inputs, stream = [x.clone() for x in inputs], torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # a warm-up, as PyTorch's documentation has it
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward(*inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = forward(*inputs)
        return graph, inputs, output

    def replay(*inputs):
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in graphs:
            try:
                graphs[key] = record(inputs)
            except Exception as e:  # as in prepare_network
                print(f"network: CUDA graphs do not work here, drawing without ({first_line(e, 200)})", flush=True)
                network.forward = forward
        if network.forward is forward:
            return forward(*inputs)
        graph, buffers, output = graphs[key]
        torch._foreach_copy_(buffers, inputs)
        graph.replay()
        return output.clone()  # the next replay writes there again

    return replay


def eager(model):
    """A context in which the UNet of `model` is not compiled: a sample grid does not justify compiling its batch size."""
    return torch.compiler.set_stance("force_eager") if "forward" in vars(model.model) else nullcontext()
