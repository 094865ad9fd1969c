"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), and the hook that finds it.

    context = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1)        phi(x) = elu(x) + 1

It has no softmax over scores, so the library does not recognise it. It is an operator of torch, as
the kernels of such attentions are, and one node of a graph.
"""

import torch
import torch.nn.functional as F

import surgery


@torch.library.custom_op("surgery_example::linear_attention", mutates_args=())
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the context (B, H, n, d) of queries, keys and values (B, H, n, d)."""
    return _formula(q, k, v)


def _formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1))


@linear_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        return torch.autograd.grad(_formula(*given), given, grad)


linear_attention.register_autograd(_backward, setup_context=_save)


@surgery.hookimpl
def find_sites(graph, root):
    return [
        surgery.FoundAttention(core=node, query=q, key=k, value=v, context=node)
        for node in graph.nodes
        if "surgery_example.linear_attention" in str(node.target)
        for q, k, v in [node.args]
    ]
