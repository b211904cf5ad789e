"""What torch's kernels refuse and round on CUDA, on the CPU: read in torch's sources, 2.11 to 2.14."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class LikeCuda(TorchDispatchMode):
    """Within, two kernels for gradients do as on CUDA.

    The check of gradients has no bfloat16; a factor that is a tensor without dimensions is rounded to the format of
    what it multiplies.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_check = func is aten._amp_foreach_non_finite_check_and_unscale_.default
        if is_check and any(grad.dtype == torch.bfloat16 for grad in args[0]):
            raise NotImplementedError(f"\"{func}\" not implemented for 'BFloat16'")
        if func is aten._foreach_mul_.Tensor:
            tensors, factor = args
            for tensor in tensors:
                tensor.mul_(factor.to(tensor.dtype))
            return None
        return func(*args, **(kwargs or {}))
