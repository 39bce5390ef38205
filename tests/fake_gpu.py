"""A GPU made of labels: it computes on the host, and tells where two devices would have met.

    with fake_gpu():
        x = torch.ones(2, 3, device=GPU)     # an ordinary tensor, labelled
        x + torch.ones(2, 3)                 # raises: two devices
        x.cpu().tolist()                     # the numbers come back

The device is called 'cudafake': whoever asks whether a device is CUDA hears yes. A labelled tensor hides
a real one, on the CPU, so that what a program computes on it can be compared with the CPU, number by
number; or on torch's meta device, where a tensor has a shape alone, so that 5 B parameters fit.
What is not simulated: time, streams, and the rounding of other kernels.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import engine.parts
import realtime

GPU = "cudafake"
Generator = torch.Generator
save = torch.save
aten = torch.ops.aten

# these may read a tensor of the host: copies, and lists of places to look up
READS_HOST = (aten.copy_, aten._to_copy, aten.to, aten.index, aten.index_put, aten.index_put_)


class Labelled(Tensor):
    """A tensor that says it is on the GPU."""

    @staticmethod
    def __new__(cls, hidden: Tensor) -> "Labelled":
        return Tensor._make_wrapper_subclass(
            cls,
            hidden.shape,
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            device=torch.device(GPU, 0),
        )

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def __repr__(self) -> str:
        return f"Labelled({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN206
        return compute(func, args, kwargs or {}, "cpu")


class Driver(TorchDispatchMode):
    """Sees what is made on the device out of nothing, or sent there; `memory` is cpu or meta."""

    def __init__(self, memory: str) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        return compute(func, args, kwargs or {}, self.memory)


def parts_of(tree: object) -> Iterator[object]:
    """What arguments nest in tuples, lists and dicts; torch's own walk takes five times as long."""
    if isinstance(tree, dict):
        tree = tree.values()
    for x in tree:
        if isinstance(x, tuple | list | dict):
            yield from parts_of(x)
        else:
            yield x


def rebuilt(change: Callable, tree: object) -> object:
    """The same nest, with each of its parts changed."""
    if isinstance(tree, tuple | list):
        return type(tree)([rebuilt(change, x) for x in tree])
    if isinstance(tree, dict):
        return {name: rebuilt(change, x) for name, x in tree.items()}
    return change(tree)


def compute(func, args: tuple, kwargs: dict, memory: str) -> object:  # noqa: ANN001
    """One operation: on hidden tensors, after a look at where its arguments are."""
    leaves = []
    asked = None
    for x in parts_of((args, kwargs)):
        if isinstance(x, Tensor):
            leaves.append(x)
        elif asked is None and isinstance(x, torch.device):
            asked = x
    ours = [isinstance(x, Labelled) for x in leaves]
    if not any(ours) and (asked is None or asked.type != GPU):
        return func(*args, **kwargs)

    host = [x for x, mine in zip(leaves, ours, strict=True) if not mine and x.dim()]
    reads_host = func.overloadpacket in READS_HOST
    if any(ours) and host and not reads_host:
        shapes = [tuple(x.shape) for x in leaves]
        raise RuntimeError(f"two devices meet in {func}: {shapes}, on the GPU {ours}")

    # where the result is: where it was asked for, else where its first argument is
    stays = ours[0] if asked is None else asked.type == GPU
    place = torch.device(memory if stays else "cpu")

    def bare_of(x: object) -> object:
        if isinstance(x, torch.device):
            return place
        return x.hidden if isinstance(x, Labelled) else x

    bare_args = rebuilt(bare_of, args)
    bare = rebuilt(bare_of, kwargs)
    if func is aten._local_scalar_dense.default and bare_args[0].is_meta:
        return 1  # a number read off a device without numbers
    result = func(*bare_args, **bare)
    if memory == "meta" and not stays:
        result = rebuilt(arrived, result)

    # in place: the caller gets his own tensor back
    if func._schema.is_mutable and leaves and isinstance(result, Tensor):
        return args[0]
    return rebuilt(label, result) if stays else result


def label(x: object) -> object:
    return Labelled(x) if isinstance(x, Tensor) else x


def arrived(x: object) -> object:
    """What a device without numbers sends to the host."""
    return torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) and x.is_meta else x


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fused form is another operation on every device."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v


def save_numbers(state: object, file: object) -> None:
    """A label is nothing that a file could hold."""
    save(tree_map(lambda x: x.cpu() if isinstance(x, Labelled) else x, state), file)


def host_generator(device: object = "cpu") -> torch.Generator:
    """Draws are the host's, so that they can be compared."""
    del device
    return Generator("cpu")


class Inline:
    """A pool whose one thread is the caller's: what is watched is watched in one thread."""

    def __init__(self, threads: int) -> None:
        del threads

    def submit(self, work: Callable) -> Future:
        done = Future()
        done.set_result(work())
        return done


def register() -> None:
    """Make the device known, once in a process."""
    if torch._C._get_privateuse1_backend_name() != GPU:
        _setup_privateuseone_for_python_backend(GPU)


@contextlib.contextmanager
def fake_gpu(memory: str = "cpu") -> Iterator[None]:
    register()
    room = (200 * 10**9, 200 * 10**9)  # bytes: free, all
    stand_ins = (
        (F, "scaled_dot_product_attention", plain_attention),
        (engine.parts, "check_device", mock.Mock()),
        (realtime, "ThreadPoolExecutor", Inline),
        (torch, "Generator", host_generator),
        (torch, "save", save_numbers),
        (torch.cuda, "Stream", mock.Mock()),
        (torch.cuda, "mem_get_info", mock.Mock(return_value=room)),
        (torch.cuda, "stream", mock.MagicMock()),
        (torch.cuda, "synchronize", mock.Mock()),
    )
    with contextlib.ExitStack() as stack:
        for target, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(target, name, stand_in))
        # torch.tensor(numbers, device=...) then goes through the host, where a mode can see it
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(Driver(memory))
        yield
