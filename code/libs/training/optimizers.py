"""The optimizers of train.py: AdamW, and Muon for the convolutions with AdamW for the rest."""

from collections import defaultdict

import torch


def build_optimizer(network, cfg, device, is_hidden=None):
    """The optimizer that `train_cfg` names, over the network's weights; AdamW in one fused kernel where there is one.

    is_hidden: (name, parameter) -> whether Muon is meant for it; None: `is_hidden_kernel`.
    """
    options = {"lr": cfg["lr"], "betas": cfg["betas"], "weight_decay": cfg["weight_decay"],
               "fused": device.type in ("cpu", "cuda")}
    if cfg["optimizer"] == "adamw":
        return torch.optim.AdamW(network.parameters(), **options)
    is_hidden = is_hidden or is_hidden_kernel
    hidden, rest = [], []
    for name, p in network.named_parameters():
        (hidden if is_hidden(name, p) else rest).append(p)
    return Muon([{"params": hidden, "orthogonal": True}, {"params": rest, "orthogonal": False}], **options)


def is_hidden_kernel(name, p):
    """Whether a weight of the UNet is a convolution's, but of neither end.

    Attention and embeddings hold few of the weights: the time Muon takes is better spent on the kernels.
    """
    return p.dim() == 4 and not name.startswith(("conv_in.", "final_conv."))


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `orthogonal`, AdamW for the others.

    The update of a matrix is its momentum with all singular values set to about 1, so that every direction is
    learnt at the same speed, also those that the gradient hardly has. A convolution's kernel counts as the matrix
    C_out x (C_in k k). Scaled as by Liu et al. 2025 ("Muon is scalable"): the mean square of an update is that of
    AdamW's, so one learning rate and weight decay serve both.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for parameters in by_shape.values():  # together: one matrix of this size keeps no machine busy
                self._orthogonal_step(parameters, group["lr"], group["weight_decay"])
        return super().step(closure)

    def _orthogonal_step(self, parameters, lr, weight_decay):
        for p in parameters:
            if not self.state[p]:  # under AdamW's names, which its load_state_dict looks for; the steps are not counted
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
        moments = [self.state[p]["exp_avg"] for p in parameters]
        weight, momentum, grad = map(torch.stack, (parameters, moments, [p.grad for p in parameters]))
        new_momentum = momentum.lerp(grad, 1 - self.MOMENTUM)
        update = orthogonalize(grad.lerp(new_momentum, self.MOMENTUM).flatten(2))  # Nesterov's
        new_weight = (weight * (1 - lr * weight_decay)).add_(
            update.reshape(weight.shape), alpha=-lr * 0.2 * max(update.shape[1:]) ** 0.5)
        # GradScaler's word for: leave this update out; a tensor, for which the CPU need not wait
        left_out = getattr(self, "found_inf", weight.new_zeros(())) > 0
        torch._foreach_copy_(parameters, torch.where(left_out, weight, new_weight).unbind())
        torch._foreach_copy_(moments, torch.where(left_out, momentum, new_momentum).unbind())
        for p in parameters:
            p.grad = None  # done: AdamW passes over it


def orthogonalize(matrices):
    """U V^T of the singular value decomposition U S V^T, roughly: B x M x N -> B x M x N, singular values 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration, X <- (a + b X X^T + c (X X^T)^2) X with Jordan's coefficients, which give
    up exactness for speed. A few steps in a row are polynomials of one X X^T, so the work is done at its size; it is
    formed anew after three, or else the rounding errors of TF32 and bf16 would grow from step to step.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for steps in (3, 2):
        gram, product = x @ x.mT, None
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            factor.diagonal(dim1=1, dim2=2).add_(3.4445)
            product = factor if product is None else factor @ product
            if step < steps - 1:
                gram = factor @ gram @ factor
        x = product @ x
    return x.mT if tall else x
