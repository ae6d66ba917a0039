"""How much memory a run will take, told before it starts: run on fake tensors, which have sizes but no numbers."""

import weakref
from contextlib import contextmanager

import psutil
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cldm.objectives import CHUNK, DERIVATIVES, SAVING_CHUNK, SlicedAttention
from ldm.unet import encode_unet

GIB = 2**30  # bytes


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensors made within it: how many there are `now`, and were at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()  # ids of the storages counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in self.known and id(storage) not in given:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key, count):
        self.known.discard(key)
        self.now -= count


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def measure(function):
    """Run function(tracker) on fake tensors. Returns: what it returned; bytes at the peak."""
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker() as tracker:
        return function(tracker), tracker.peak


def bytes_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


class Estimate:
    """What runs of a ControlLDM take, in bytes, its weights included.

    device: that they will run on, if the model is not there yet.
    """

    def __init__(self, model, device=None):
        self.model, self.target, self.device = model, device or model.base.device, model.base.device
        self.weights = bytes_of([*model.parameters(), *model.buffers()])

    def inputs(self, pictures):
        base, side = self.model.base, self.model.config.image_size // self.model.base.downsampling
        config = base.unet.config
        latents = torch.zeros(pictures, config.in_channels, side, side, device=self.device)
        timesteps = torch.zeros(pictures, dtype=torch.long, device=self.device)
        embeddings = torch.zeros(pictures, 77, config.cross_attention_dim, device=self.device)
        control = torch.zeros(pictures, self.model.control_net.control_dim, device=self.device)
        return latents, timesteps, embeddings, control, torch.zeros_like(latents)

    def encoding(self):
        """Of the VAE, over as many pictures as it takes at once."""
        side = self.model.config.image_size
        return measure(lambda _: self.model.base.encode(torch.zeros(1, 3, side, side, device=self.device)))[1]

    def training(self, batch_size, dtype=None, save_memory=False):
        """dtype: of automatic mixed precision, None without."""
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def step(_):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss = self.model.predict(*self.inputs(batch_size)).square().mean()
            return torch.autograd.grad(loss, trained, allow_unused=True)

        with checkpointing(self.model, save_memory):
            return self.weights + 2 * bytes_of(trained) + max(measure(step)[1], self.encoding())

    def sampling(self, pictures, steps, guided, save_memory=False):
        """A gradient through a chain of DDIM steps. pictures: targets x num_samples."""
        passes = 2 if guided and save_memory else 1
        pictures *= 2 if guided and not save_memory else 1

        def gradient(tracker):
            latents, timesteps, embeddings, control, reference = self.inputs(pictures)
            with torch.enable_grad():
                prediction = self.model.predict(
                    latents, timesteps, embeddings, control.requires_grad_(True), reference
                ).sum()
            kept = tracker.now
            torch.autograd.grad(prediction, control)
            return kept

        kept, peak = measure(gradient)
        others = passes - 1 if save_memory else steps - 1
        return self.weights + max(others * kept + peak, self.encoding())

    def reading(self, targets, draws, save_memory=False):
        """Levenberg-Marquardt over draws of noise, by forward mode; of the sampling objective too."""
        numbers = self.model.control_net.control_dim
        chunk = max(1, min(SAVING_CHUNK if save_memory else CHUNK, targets * draws) // max(1, numbers // DERIVATIVES))

        def encode(tracker):
            encoded = encode_unet(self.model.base.unet, *self.inputs(1)[:3])
            return tracker.now, encoded

        def predict(_):
            return self.model.predict(*self.inputs(chunk))

        with torch.no_grad(), SlicedAttention():
            derivative = (1 + numbers) * measure(predict)[1]  # a tangent of every number beside every tensor
            (encoded, _), _ = measure(encode)
            return self.weights + max(targets * draws * encoded + derivative, self.encoding())

    def announce(self, needed, remedies):
        """Print what a run needs and what there is, and if that is less, what would make it fit.

        needed: bytes. remedies: {settings as one would give them: function() -> bytes needed with them}.
        """
        there = free_bytes(self.target) + (self.weights if self.target == self.device else 0)
        print(f"memory: about {needed / GIB:.1f} GiB on {self.target}, {there / GIB:.1f} GiB are there")
        if needed <= there:
            return
        for text, need in remedies.items():
            if (less := need()) <= there:
                print(f"memory: it will not fit; {text} would need about {less / GIB:.1f} GiB")
                return
        print("memory: it will not fit; try a smaller image_size, or precision: bfloat16, in the model's YAML")


@contextmanager
def checkpointing(model, enabled):
    """Within it, gradients through a ControlLDM forget and recompute activations, block by block, if enabled."""
    networks = (model.base.unet, model.control_net) if enabled else ()
    for network in networks:
        network.enable_gradient_checkpointing()
    yield
    for network in networks:
        network.disable_gradient_checkpointing()


def free_bytes(device):
    """Returns: bytes that are free on a torch.device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
