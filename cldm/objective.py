"""What a control is judged by: the residuals of a picture at a control, and their derivatives."""

import warnings
from abc import ABC, abstractmethod

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CHUNK, SAVING_CHUNK = 16, 2  # pictures in one call of the model, without and with save_memory
NUMBERS = 3  # the most numbers whose Jacobian fits a full chunk; with more the chunk shrinks in proportion
ATTENTION = 2**24, 2**26  # attention weights held at once in forward mode: on a CPU; on a GPU, which small slices slow
STEP = 5.0  # of finite differences, in units of a number's spread and the square root of the precision


class ForwardMode(TorchFunctionMode):
    """What torch's own kernels lack where derivatives go forward.

    Attention has none in the fused kernels, so it is computed for a slice of the queries at a time (Rabe & Staats 2021,
    self-attention does not need O(n^2) memory). Normalisation in half precision leaves a GPU's derivatives in float32,
    which no layer takes after it, so it is computed in float32, as attention is.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.scaled_dot_product_attention, F.layer_norm, F.group_norm):
            return function(*args, **(kwargs or {}))
        dtype = args[0].dtype
        full = torch.promote_types(dtype, torch.float32)
        args, kwargs = tree_map_only(
            torch.Tensor, lambda own: own.to(full) if own.is_floating_point() else own, (args, kwargs or {})
        )
        if function is F.scaled_dot_product_attention:
            function, args = slice_attention, (function, *args)
        return function(*args, **kwargs).to(dtype)


def slice_attention(attend, query, key, *rest, **options):
    """attend: scaled_dot_product_attention, whose arguments follow. Returns: what it does."""
    rows = max(1, ATTENTION[query.device.type != "cpu"] // (query.shape[:-2].numel() * key.shape[-2]))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.cat([attend(q, key, *rest, **options) for q in query.split(rows, -2)], -2)


def forward_mode(function, control, axes):
    """Differentiate function at control (..., d) along each of the axes (f, d).

    Returns: function(control), (...); its derivatives, (..., f).
    """

    def differentiate(axis):
        return torch.func.jvp(function, (control,), (axis.expand_as(control).contiguous(),))

    # torch's own derivatives warn of a deprecated call
    with ForwardMode(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        return torch.func.vmap(differentiate, out_dims=(None, -1))(axes)


def likelihood_loss(residuals, alike=(3,)):
    """The negative log-likelihood of normal residuals of unknown variances, as a mean square.

    Of residuals with variances of their own, those that are predicted well count for more than those that are mostly
    noise.
    residuals: (P, K, C, n). alike: dimensions over which residuals share one variance: (3,), every draw and channel has
    its own; (1, 2, 3), there is only one.
    Returns: losses (P,), geometric means of the mean squares, exp(-2 / N) of the likelihood; weights of iteratively
    reweighted least squares, which residuals can be multiplied by.
    Source: Seber & Wild 2003, concentrated likelihood.
    """
    squares = residuals.square().mean(alike, keepdim=True).clamp_min(torch.finfo(residuals.dtype).tiny)
    loss = squares.log().mean((1, 2, 3)).exp()
    return loss, loss[:, None, None, None] / squares


class Objective(ABC):
    """Residuals of B targets at controls: K draws of noise, n numbers each in C channels.

    Controls (P, d) come with the index (P,) of the target that each is for. Everything that does not depend on the
    control is computed once, when the objective is made.
    model: ControlLDM. free: (d,) bool, the f numbers of a control that derivatives are taken by. draws: K.
    """

    paired = False  # whether every two draws have opposite noise
    alike = (3,)  # as for likelihood_loss

    def __init__(self, model, free, draws):
        self.model, self.free, self.draws = model, free, draws
        self.periods = model.control_net.config.periods
        self.chunk = SAVING_CHUNK if model.save_memory else CHUNK
        self.calls = 0  # pictures that the model was evaluated on so far; a derivative counts as one more
        # twice as fast as forward mode for one number, but in need of more digits than half precision or TF32 have
        full = {model.base.unet.dtype, model.control_net.dtype} <= {torch.float32, torch.float64}
        self.by_differences = full and model.base.unet.device.type == "cpu"

    @abstractmethod
    def residuals(self, control, index, draw_index):
        """control: (P, k, d). index: (P,). draw_index: (k,), which of the K. Returns: (P, k, C, n)."""

    def _in_chunks(self, function, control, index, draw_index, chunk):
        """Returns: what function(control (P, k, d), index, draw_index) makes of everything: tensors (P, k, ...)."""
        draw_index = torch.arange(self.draws) if draw_index is None else draw_index
        draw_index = draw_index.to(index.device)
        control = control[:, None].repeat(1, len(draw_index), 1)
        rows = []
        for some, which in zip(*(part.split(max(1, chunk // len(draw_index))) for part in (control, index))):
            parts = [function(c, which, k) for c, k in zip(some.split(chunk, 1), draw_index.split(chunk))]
            rows.append([torch.cat(tensors, 1) for tensors in zip(*parts)])
        return tuple(map(torch.cat, zip(*rows)))

    @torch.no_grad()
    def evaluate(self, control, index, draw_index=None):
        """control: (P, d). index: (P,). draw_index: (k,); None: all. Returns: residuals (P, k, C, n)."""

        def function(control, index, draw_index):
            self.calls += control.shape[0] * control.shape[1]
            return (self.residuals(control, index, draw_index),)

        return self._in_chunks(function, control, index, draw_index, self.chunk)[0]

    @torch.no_grad()
    def linearize(self, control, index, draw_index=None, residuals=None):
        """Derivatives by finite differences, or where by_differences is false, in one pass of forward mode.

        control: (P, d). index: (P,). draw_index: (k,); None: all. residuals: there, if they are known.
        Returns: residuals (P, k, C, n) and their Jacobian (P, k, C, n, f), by the free numbers.
        """
        axes = torch.eye(control.shape[1], dtype=control.dtype, device=control.device)[self.free]
        if self.by_differences:
            residuals = self.evaluate(control, index, draw_index) if residuals is None else residuals
            steps = STEP * torch.finfo(residuals.dtype).eps ** 0.5 * self.model.control_net.spread(control) * axes
            ahead = [self.evaluate(control + step, index, draw_index) - residuals for step in steps]
            return residuals, torch.stack([own / step.sum() for own, step in zip(ahead, steps)], -1)

        def function(control, index, draw_index):
            self.calls += (1 + len(axes)) * control.shape[0] * control.shape[1]
            return forward_mode(lambda c: self.residuals(c, index, draw_index), control, axes)

        chunk = max(1, self.chunk // max(1, len(axes) // NUMBERS))
        return self._in_chunks(function, control, index, draw_index, chunk)

    def losses(self, control, index, draw_index=None):
        """As evaluate. Returns: (P,), of likelihood_loss."""
        return likelihood_loss(self.evaluate(control, index, draw_index), self.alike)[0]
