"""Random ragged problems for the kernel tests."""

# Axes: T packed tokens (Tq queries, Tk keys), H heads, K head width.

import torch


class Problem:
    """One call: tensors in `dtype`, and the gradients that flow back from it."""

    def __init__(self, lengths, *, n_heads=2, head_dim=64, dtype=torch.float32, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.options = {}
        self.cu_seqlens = boundaries(lengths)
        n_tokens = n_keys = int(self.cu_seqlens[-1])
        if lengths_k := options.get("lengths_k"):
            self.options["cu_seqlens_k"] = boundaries(lengths_k)
            n_keys = int(self.options["cu_seqlens_k"][-1])
        if (known := options.get("known")) is not None:
            self.options["n_known"] = torch.tensor(known)
        if bias := options.get("bias"):
            shape = (n_keys,) if bias == "key" else (n_keys, n_heads)
            self.options["key_bias"] = draw(*shape).float()
        if "scale" in options:
            self.options["scale"] = options["scale"]
        self.q, self.k, self.v = (draw(n, n_heads, head_dim).to(dtype) for n in (n_tokens, n_keys, n_keys))
        self.grad_out = draw(n_tokens, n_heads, head_dim).to(dtype)
        self.grad_lse = draw(n_tokens, n_heads).float()

    def run(self, function, dtype=None, **settings):
        """Output, log-sum-exp and all gradients of `function`, by name."""
        leaves = {name: getattr(self, name) for name in "qkv"}
        options = dict(self.options)
        if "key_bias" in options:
            leaves["key_bias"] = options["key_bias"]
        leaves = {name: t.to(dtype or t.dtype).detach().clone().requires_grad_() for name, t in leaves.items()}
        options |= {"key_bias": leaves["key_bias"]} if "key_bias" in leaves else {}
        out, lse = function(leaves["q"], leaves["k"], leaves["v"], self.cu_seqlens, **options, **settings)
        seen = lse.isfinite()
        gradients = (self.grad_out.to(out.dtype), torch.where(seen, self.grad_lse.to(lse.dtype), 0.0))
        torch.autograd.backward([out, lse], gradients)
        return {"out": out.detach(), "lse": lse.detach(), **{name: t.grad for name, t in leaves.items()}}


def boundaries(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
