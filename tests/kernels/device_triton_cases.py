"""Every launch of every op is made while its tensors' device is current; run with TRITON_INTERPRET=1 (int8_triton_cases).

There is no GPU here: what stands in for it is which tensor `torch.cuda.device_of` was last entered with.
"""

import sys
from contextlib import contextmanager
from itertools import product

import torch
from triton.runtime.interpreter import GridExecutor

from reattend.kernels.attention import Options, attention
from reattend.kernels.attention_int8 import Quantization, attention_int8
from reattend.kernels.dictionary_linear import dictionary_linear
from reattend.kernels.int8_linear import int8_linear
from reattend.kernels.mla_decode import mla_decode

entered = []
launches = []
real_launch = GridExecutor.__call__


@contextmanager
def device_of(tensor):
    entered.append(tensor.device)
    yield
    entered.pop()


def launch(self, *arguments, **options):
    launches.append(self.fn.__name__)
    assert entered, self.fn
    devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
    assert devices == {entered[-1]}, self.fn
    return real_launch(self, *arguments, **options)


def launched(run, *names):
    launches.clear()
    run()
    assert launches == list(names), launches
    assert not entered


def linears():
    codes, scale = torch.ones(4, 32, dtype=torch.int8), torch.ones(4)
    for rows, activations in product((2, 5), ("int8", "none")):
        quantized = ("_quantize_rows_kernel", "_w8a8_kernel")
        names = quantized if activations == "int8" else ("_w8a16_gemv_kernel" if rows == 2 else "_w8a16_kernel",)
        x = torch.ones(rows, 32)
        launched(lambda: int8_linear(x, codes, scale, activations=activations, backend="triton"), *names)  # noqa: B023
    parts = torch.ones(4, 2), torch.ones(2, 32), torch.ones(3, 4, 32), torch.ones(3)
    launched(lambda: dictionary_linear(torch.ones(2, 32), *parts, backend="triton"), "_dictionary_kernel")


def attentions():
    query, key = torch.ones(1, 2, 17, 16), torch.ones(1, 2, 20, 16)
    launched(lambda: attention(query, key, key, backend="triton"), "_forward_kernel")
    launched(lambda: attention(query[:, :, :1], key, key, backend="triton"), "_part_kernel", "_merge_kernel")
    output = attention(query.requires_grad_(), key, key, backend="triton")
    launched(output.sum().backward, "_query_kernel", "_key_kernel")
    half = [tensor.detach().half() for tensor in (query, key)]
    launched(
        lambda: attention_int8(half[0], half[1], half[1], Options(), Quantization(smooth_v=True), backend="triton"),
        "_columns_kernel", "_merge_kernel", "_queries_kernel", "_columns_kernel", "_merge_kernel", "_values_kernel",
        "_keys_kernel", "_forward_kernel",
    )  # fmt: skip
    launched(
        lambda: mla_decode(half[0], half[0], half[1][0, :1], half[1][0, :1], scale=1.0, backend="triton"),
        "_part_kernel", "_merge_kernel",
    )  # fmt: skip


def main():
    torch.cuda.device_of = device_of
    GridExecutor.__call__ = launch
    linears()
    attentions()
    print("all launched where their tensors are")


if __name__ == "__main__":
    sys.exit(main())
