"""Muon against PyTorch's own (which takes matrices alone) and against a singular value decomposition."""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode

import libs
from helpers import SMALL
from libs.config import CODE, SETTINGS, defaults_of
from libs.training.optimizers import Muon, build_optimizer, is_hidden_kernel, orthogonalize

CFG = {**defaults_of(SETTINGS)["train_cfg"], "optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (144, 16)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(1, 0.1, len(v))
    out, other = orthogonalize(torch.stack([u @ s.diag() @ v, torch.randn(shape)]))
    levelled = u.T @ out @ v.T
    assert (levelled - levelled.diag().diag()).abs().max() < 1e-4
    assert levelled.diag().min() > 0.6 and levelled.diag().max() < 1.25
    assert other.shape == shape


class Rounded(TorchFunctionMode):
    """Products of matrices as hardware makes them: from inputs of `bits` bits; in bfloat16 the results are rounded too."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits

    def round(self, x):
        if self.bits == 8:
            return x.bfloat16().float()
        return (x.contiguous().view(torch.int32) + 4096).bitwise_and(~8191).view(torch.float32)  # TF32: 11 bits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (torch.Tensor.matmul, torch.baddbmm):
            return function(*args, **kwargs or {})
        out = function(*args[:-2], *(self.round(x) for x in args[-2:]), **kwargs or {})
        return self.round(out) if self.bits == 8 else out


def spectrum(rows, columns, power):
    """A matrix with the singular values k^-power."""
    u, v = (torch.linalg.qr(torch.randn(n, rows)).Q for n in (rows, columns))
    return u * torch.arange(1, rows + 1) ** -power @ v.T


@pytest.mark.parametrize("bits", [24, 11, 8])
def test_orthogonalize_bears_the_rounding_of_tf32_and_bf16(bits):
    matrices = [spectrum(64, 576, p) for p in (0.0, 1.0, 2.0, 3.0)] + gradients()
    for matrix in matrices:
        with Rounded(bits) if bits < 24 else nullcontext():
            out = orthogonalize(matrix[None])[0]
        values = torch.linalg.svdvals(out)
        assert values.max() < 1.3, (matrix.shape, values.max())
        exact = orthogonalize(matrix[None].double())[0]
        assert (out - exact).norm() < (0.3 if bits == 8 else 0.06) * exact.norm()


def gradients():
    """The shipped digit model's, of its largest kernels, for some of its own samples."""
    model, config = libs.load_model(os.path.join(CODE, "..", "pretrained", "mnist_cpu.pth.tar"))
    labels = torch.arange(16) % 10
    images = next(libs.draw_images(model, labels, libs.sampling_settings(model, config, steps=4), batch_size=16))
    model.requires_grad_(True).compute_loss(2 * images - 1, labels, model.draw_times(16)).backward()
    kernels = [p.grad.flatten(1) for name, p in model.model.named_parameters() if is_hidden_kernel(name, p)]
    return sorted(kernels, key=len)[-6:]


def test_zero_gradient_is_no_nan():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 9)), torch.zeros(2, 4, 9))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with PyTorch 2.9")
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_a_matrix_moves_as_with_pytorch_muon(shape):
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs, start = copy.deepcopy(ours), ours.detach().clone()
    optimizers = [Muon([{"params": [ours], "orthogonal": True}], lr=1e-2, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True,
                                   adjust_lr_fn="match_rms_adamw")]
    for _ in range(10):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # PyTorch's iterates in bfloat16, which has 8 bits
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_the_size_of_an_update_is_adamws():
    p = torch.nn.Parameter(torch.zeros(64, 32, 3, 3))
    p.grad = torch.randn_like(p)
    Muon([{"params": [p], "orthogonal": True}], lr=1e-2, weight_decay=0).step()
    assert 0.2 * 1e-2 * 0.6 < p.detach().square().mean().sqrt() < 0.2 * 1e-2 * 1.25


def test_vectors_and_both_ends_are_adamws():
    """They move as with AdamW alone; every weight is in exactly one group."""
    ours = libs.DDPM(**SMALL)
    theirs = copy.deepcopy(ours)
    optimizers = [build_optimizer(ours.model, CFG, torch.device("cpu")),
                  build_optimizer(theirs.model, {**CFG, "optimizer": "adamw"}, torch.device("cpu"))]
    groups = {g["orthogonal"]: g["params"] for g in optimizers[0].param_groups}
    names = {id(p): name for name, p in ours.model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in groups.values() for p in group)
    assert {names[id(p)] for p in groups[False] if p.dim() == 4} == {"conv_in.weight", "final_conv.2.weight"}
    assert all(p.dim() == 4 for p in groups[True]) and len(groups[True]) > 10
    for _ in range(3):
        for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters()):
        assert torch.equal(a, b) != is_hidden_kernel(name, a), name
