"""Attention over packed sequences with each kernel. On the CPU, plain functions replace the CUDA kernels by name.

These functions take the arguments of torch's operators (their schemas are checked) and compute softmax attention
sequence by sequence.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from arpo_trl.training import prefix_attention
from arpo_trl.training.prefix_attention import (
    CPUKernel,
    EfficientKernel,
    FlashKernel,
    attend,
    kernel_for,
    plan_paths,
    why_no_attention,
)

CPU = torch.device("cpu")
KERNELS = [CPUKernel, FlashKernel, EfficientKernel]
LAST_KEY = 2
"""xformers' and torch's number for causal attention that is aligned at the last key."""


# What is planned -----------------------------------------------------------------------------------------------------


def test_the_path_of_an_edge_is_the_edges_above_it_and_itself():
    #           a a b b c d d e
    edges = ((0, 2, 8), (2, 4, 7), (4, 5, 5), (5, 7, 7), (7, 8, 8))
    paths = plan_paths(edges, CPU)
    assert paths.keys.tolist() == [0, 1, *range(4), *range(5), *range(4), 5, 6, 0, 1, 7]
    assert paths.query_starts.tolist() == [0, 2, 4, 5, 7, 8]
    assert paths.key_starts.tolist() == [0, 2, 6, 11, 17, 20]
    assert paths.query_starts.dtype == paths.key_starts.dtype == torch.int32
    assert (paths.longest_query, paths.longest_key) == (2, 6)
    #         a                 a                 b         b          c   d   d   e
    copies = [0, 2, 6, 11, 17,  1, 3, 7, 12, 18,  4, 8, 13, 5, 9, 14,  10, 15, 16, 19]  # fmt: skip
    assert paths.copies.tolist() == copies
    assert paths.copy_starts.tolist() == [0, 5, 10, 13, 16, 17, 18, 19]


def test_a_path_does_not_reach_into_the_tree_before_it():
    # two trees of a run and two branches each: a a b c · d e e f
    paths = plan_paths(((0, 2, 4), (2, 3, 3), (3, 4, 4), (4, 5, 8), (5, 7, 7), (7, 8, 8)), CPU)
    assert paths.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 4, 5, 6, 4, 7]
    assert paths.key_starts.tolist() == [0, 2, 5, 8, 9, 12, 14]


def test_where_nothing_is_shared_every_edge_attends_to_itself():
    paths = plan_paths(((0, 3, 3), (3, 5, 5)), CPU)
    assert paths.keys.tolist() == [0, 1, 2, 3, 4]
    assert paths.key_starts.tolist() == paths.query_starts.tolist() == [0, 3, 5]


# What is computed ----------------------------------------------------------------------------------------------------


def flash_forward(
    query, key, value, starts_q, starts_k, max_q, max_k, dropout, causal, debug, *, scale=None, **unused
):
    assert dropout == 0.0 and not debug and not any(unused.values())
    assert starts_q.dtype == starts_k.dtype == torch.int32
    output, logsums = torch.empty_like(query), torch.empty(query.size(1), query.size(0))
    for q, k in sequences(starts_q, starts_k, max_q, max_k):
        output[q], logsums[:, q] = plain(query[q], key[k], value[k], causal, scale)
    seed = torch.zeros(2, dtype=torch.uint64)
    return output, logsums, seed, torch.zeros((), dtype=torch.uint64), torch.empty(0)


def flash_backward(
    grad, query, key, value, output, logsums, starts_q, starts_k, max_q, max_k, dropout, causal, seed, unused,
    *, scale=None, **windows,
):  # fmt: skip
    assert dropout == 0.0 and not any(windows.values())
    assert logsums.is_contiguous() and logsums.shape == (query.size(1), query.size(0))  # it takes no strides
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for q, k in sequences(starts_q, starts_k, max_q, max_k):
        grads[0][q], grads[1][k], grads[2][k] = plain_backward(
            grad[q], query[q], key[k], value[k], output[q], logsums[:, q], causal, scale
        )
    return grads


def efficient_forward(
    query, key, value, bias, starts_q, starts_k, max_q, max_k, dropout, mask_type, with_logsums=False,
    *, scale=None, seqlen_k=None, window_size=None,
):  # fmt: skip
    assert (bias, dropout, seqlen_k, window_size) == (None, 0.0, None, None) and with_logsums
    assert query.size(2) == key.size(2)  # no grouped heads
    output = torch.empty_like(query)
    padded = torch.full((len(starts_q) - 1, query.size(2), -(-max_q // 32) * 32), torch.inf)
    for i, (q, k) in enumerate(sequences(starts_q, starts_k, max_q, max_k)):
        output[0, q], padded[i, :, : q.stop - q.start] = plain(
            query[0, q], key[0, k], value[0, k], mask_type == LAST_KEY, scale
        )
    return output, padded, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long), max_q, max_k


def efficient_backward(
    grad, query, key, value, bias, output, starts_q, starts_k, max_q, max_k, padded, dropout, seed, offset, mask_type,
    bias_grad, *, scale=None, **unused,
):  # fmt: skip
    assert padded.shape == (len(starts_q) - 1, query.size(2), -(-max_q // 32) * 32)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for i, (q, k) in enumerate(sequences(starts_q, starts_k, max_q, max_k)):
        length = q.stop - q.start
        assert padded[i, :, length:].isposinf().all()
        grads[0][0, q], grads[1][0, k], grads[2][0, k] = plain_backward(
            grad[0, q],
            query[0, q],
            key[0, k],
            value[0, k],
            output[0, q],
            padded[i, :, :length],
            mask_type == LAST_KEY,
            scale,
        )
    return *grads, torch.empty(0)


def sequences(starts_q, starts_k, max_q, max_k) -> Iterator[tuple[slice, slice]]:
    for q, r, k, m in zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True):
        assert 0 < r - q <= max_q and 0 < m - k <= max_k
        yield slice(int(q), int(r)), slice(int(k), int(m))


def scores(query, key, causal, scale):
    """(heads, queries, keys), keys of grouped heads repeated. The last query sees all keys of a causal call."""
    key = key.repeat_interleave(query.size(1) // key.size(1), dim=1)
    found = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * (scale or query.size(-1) ** -0.5)
    unseen = torch.ones_like(found).triu(1 + key.size(0) - query.size(0)).bool()
    return found.masked_fill(unseen, -torch.inf) if causal else found


def plain(query, key, value, causal, scale):
    found = scores(query, key, causal, scale)
    value = value.repeat_interleave(query.size(1) // value.size(1), dim=1).float()
    return torch.einsum("hqk,khd->qhd", found.softmax(-1), value).to(query.dtype), found.logsumexp(-1)


def plain_backward(grad, query, key, value, output, logsums, causal, scale):
    """By the formulas of FlashAttention's backward, in which only output and log-sums know of other keys."""
    groups = query.size(1) // key.size(1)
    weights = (scores(query, key, causal, scale) - logsums.unsqueeze(-1)).exp()
    wide = [of.repeat_interleave(groups, dim=1).float() for of in (key, value)]
    weighed = (grad.float() * output.float()).sum(-1).t().unsqueeze(-1)
    inner = weights * (torch.einsum("qhd,khd->hqk", grad.float(), wide[1]) - weighed)
    inner = inner * (scale or query.size(-1) ** -0.5)
    query_grad = torch.einsum("hqk,khd->qhd", inner, wide[0])
    key_grad = torch.einsum("hqk,qhd->khd", inner, query.float())
    value_grad = torch.einsum("hqk,qhd->khd", weights, grad.float())
    narrow = [of.unflatten(1, (-1, groups)).sum(2) for of in (key_grad, value_grad)]
    return tuple(of.to(query.dtype) for of in (query_grad, *narrow))


@pytest.fixture
def cuda_kernels_on_cpu() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        library.impl("_efficient_attention_forward", efficient_forward, "CPU")
        library.impl("_efficient_attention_backward", efficient_backward, "CPU")
        yield


def random_edges(rng: random.Random, start: int = 0, depth: int = 0) -> list[tuple[int, int, int]]:
    """A trie of edges of 1 to 6 tokens with up to three children each, at most four deep."""
    stop = start + rng.randrange(1, 7)
    below: list[tuple[int, int, int]] = []
    end = stop
    for _ in range(rng.choice([0, 2, 3]) if depth < 4 else 0):
        below += random_edges(rng, end, depth + 1)
        end = below[-1][2]
    return [(start, stop, end), *below]


@pytest.mark.usefixtures("cuda_kernels_on_cpu")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_lets_a_query_attend_to_its_path(kernel, monkeypatch):
    monkeypatch.setattr(prefix_attention, "kernel_for", lambda device, dtype: kernel())
    deepest = 0
    for seed in range(12):
        rng = random.Random(seed)
        edges = random_edges(rng)
        edges += random_edges(rng, edges[0][2])  # two trees
        paths = plan_paths(tuple(edges), CPU)
        size = edges[-1][2]
        deepest = max(deepest, *(sum(start <= q < end for start, _, end in edges) for q in range(size)))
        ends = [end for start, stop, end in edges for _ in range(start, stop)]
        sees = torch.tensor([[k <= q < end for k, end in enumerate(ends)] for q in range(size)])
        query, key, value = (torch.randn(1, heads, size, 16, requires_grad=True) for heads in (4, 2, 2))
        expected = scaled_dot_product_attention(query, key, value, sees, scale=0.3, enable_gqa=True).transpose(1, 2)
        found = attend(query, key, value, paths, scaling=0.3)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn_like(found)
        for mine, theirs in zip(
            *(torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (found, expected)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert deepest == 5


def test_float32_uses_the_efficient_kernel_on_cuda_and_half_precision_the_flash_kernel():
    cuda = torch.device("cuda", 0)
    assert isinstance(kernel_for(cuda, torch.float32), EfficientKernel)
    assert isinstance(kernel_for(cuda, torch.bfloat16), FlashKernel)
    assert isinstance(kernel_for(cuda, torch.float16), FlashKernel)
    assert isinstance(kernel_for(CPU, torch.bfloat16), CPUKernel)


# Whether it is used --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_is_padded_attention_up_to_rounding(dtype):
    assert why_no_attention(CPU, dtype, 4, 2, 16) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_is_padded_attention_up_to_rounding_on_this_gpu(dtype, head_dim):
    assert why_no_attention(torch.device("cuda", 0), dtype, 8, 2, head_dim) is None


@pytest.fixture
def forget() -> Iterator[None]:
    """What a device cannot do is found out once; here it changes."""
    why_no_attention.cache_clear()
    yield
    why_no_attention.cache_clear()


@pytest.mark.usefixtures("forget")
def test_a_failing_kernel_is_reported_with_its_error(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image is available for execution")

    monkeypatch.setattr(CPUKernel, "forward", broken)
    assert why_no_attention(CPU, torch.float32, 4, 2, 16) == (
        "packed attention in torch.float32 on cpu failed: RuntimeError: no kernel image is available for execution"
    )


@pytest.mark.usefixtures("forget")
def test_a_kernel_with_wrong_results_is_reported_with_the_difference(monkeypatch):
    right = CPUKernel.forward

    def wrong(*args):
        output, logsums = right(*args)
        return output * 1.01, logsums

    monkeypatch.setattr(CPUKernel, "forward", wrong)
    reason = why_no_attention(CPU, torch.float32, 4, 2, 16)
    assert "differs from padded by 1.0e-02, more than rounding (0.0001)" in reason


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_in_the_padded_attention_is_rounding(tf32, monkeypatch):
    """With grouped heads SDPA multiplies float32 in TF32, if it is on, and the kernel of packs does not."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32" if tf32 else "ieee")
    monkeypatch.setattr(prefix_attention, "_difference", lambda *_: 4e-4)
    assert (why_no_attention(torch.device("cuda", 0), torch.float32, 14, 2, 64) is None) == tf32


@pytest.mark.usefixtures("forget")
def test_a_gpu_or_heads_that_the_flash_kernel_does_not_take_are_named(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_no_attention(cuda, torch.float16, 4, 2, 64) == (
        "torch's flash kernel needs a GPU of compute capability 8.0 or more, but this one has 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for head_dim in (20, 264):
        assert f"and the model's is {head_dim}" in why_no_attention(cuda, torch.bfloat16, 4, 2, head_dim)
    assert "this is 'mps'" in why_no_attention(torch.device("mps"), torch.float32, 4, 2, 64)
