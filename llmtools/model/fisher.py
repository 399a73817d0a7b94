"""What an error in a layer's outputs costs the network: the second moment of the gradients there.

Of a change E of one weight the Kullback–Leibler divergence from the original grows by ½ E[(gᵀ E x)²], x the layer's
input and g the gradient of −log p of tokens that are sampled from the model's own distribution: the Fisher information.
With g and x independent that is ½ tr(G E H Eᵀ), G = E[g gᵀ] and H = E[x xᵀ], which `Sequential` makes small (YAQA,
arXiv:2505.22988, which goes on to factors that weigh tokens by one another). The estimate of G is shrunk to a multiple
of the identity as far as it is noise: in some layers most of the gradient is that of one or two tokens.

The gradients come from one backward pass through the original model, of which the gradients in each block's outputs are
kept: blocks · tokens · hidden values of the dtype that the model is computed in. When a block's turn comes, they are
carried back through it, still dense, to its linears. So the moments [out, out] of one block only are in memory at a
time, and not all of them, which are larger than the model.

Shapes: out — features of a linear; b, t — sequences and tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, where, within
from ..quant import HessianSum
from .blocks import Block, linear_at
from .walk import Batch, Calls, evaluating, hidden_of, logits_of, run_network

BlockGradients = dict[str, list[Tensor]]
"""Path of a block → the gradient in its hidden states [b, t, features] for each of its calls, in their order."""


def backward_of_samples(model: nn.Module, sequences: Iterable[tuple[int, Batch]]) -> None:
    """The backward pass of −Σ log p of tokens sampled from the model's own distribution, for the hooks of the caller.

    sequences: (seed of the samples, batch) each. No parameter gets a gradient. Raises InputError for a model without
    logits of tokens.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        for embedding in _embeddings(model):
            stack.callback(
                embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)).remove
            )
        for seed, batch in sequences:
            logits = logits_of(run_network(model, batch), model)
            slope = logits.detach().float().softmax(-1).flatten(0, -2)  # p, [b · t, vocabulary]
            generator = torch.Generator().manual_seed(seed)
            sampled = torch.multinomial(slope.cpu(), 1, generator=generator).to(slope.device)
            slope.scatter_add_(1, sampled, torch.full_like(slope[:, :1], -1.0))  # p − one-hot: −log p's gradient
            logits.backward(slope.view_as(logits).to(logits.dtype))


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that embed token ids: one, or one for the encoder and one for the decoder."""
    own: Any = model.get_input_embeddings()  # type: ignore[operator]
    same = [each for each in model.modules() if type(each) is type(own) and each.weight.shape == own.weight.shape]
    return same or [own]


def block_gradients(
    model: nn.Module,
    sequences: Iterable[tuple[int, Batch]],
    blocks: Sequence[str],
    kept: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> BlockGradients:
    """The gradients in the outputs of the blocks at these paths, for each of their calls over the sequences, which are
    those of `backward_of_samples`. kept: what is kept of a gradient, in memory or elsewhere."""
    found: BlockGradients = {path: [] for path in blocks}
    called = dict.fromkeys(blocks, 0)

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden, number = hidden_of(output, path), called[path]
            called[path] += 1
            found[path].append(torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape))
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: found[path].__setitem__(number, kept(gradient)))

        return hook

    with ExitStack() as stack:
        for path in blocks:
            stack.callback(model.get_submodule(path).register_forward_hook(keep(path)).remove)
        backward_of_samples(model, sequences)
    return found


class GradientSum(HessianSum):
    """Accumulates Σ g gᵀ over tokens, and Σ |g|⁴, which says how far the mean can be trusted."""

    def __init__(self, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(out_features, device)
        self._fourth = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        super().add(x)
        self._fourth += x.detach().float().square().sum(-1).double().square().sum()

    def reduce(self, add_up: Callable[[Tensor], None]) -> None:
        super().reduce(add_up)
        add_up(self._fourth)

    def value(self) -> Tensor:
        """(1 − ρ) E[g gᵀ] + ρ μ, [out, out] float32, μ the mean of the diagonal.

        ρ is Ledoit and Wolf's (2004, Journal of Multivariate Analysis 88, section 3.3): the share of what distinguishes
        E[g gᵀ] from μ that is due to the choice of the tokens. Single tokens with large gradients make it large, as
        does a short text.
        """
        mean = super().value()
        average = mean.diagonal().mean()
        size, spread = float(mean.square().sum()), float(mean.square().sum() - len(mean) * average**2)
        noise = (float(self._fourth) / self.tokens - size) / self.tokens
        share = min(1.0, noise / spread) if spread > 0 else 1.0
        mean.mul_(1 - share).diagonal().add_(share * average)
        return mean


def gradient_sums(
    model: nn.Module, block: Block, calls: Calls, gradients: Sequence[Tensor], paths: Sequence[str]
) -> dict[str, GradientSum]:
    """The sums of the linears at `paths` in a block that is still dense, from the gradients in the block's outputs.

    Linears that no gradient reaches have no tokens in their sum.
    """
    linears = {path: linear_at(model, path) for path in paths}
    sums = {path: GradientSum(linear.out_features, linear.weight.device) for path, linear in linears.items()}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(block.module))
        for path, total in sums.items():
            stack.callback(linears[path].register_forward_hook(_collector(path, total)).remove)
        for index, gradient in enumerate(gradients):
            hidden = calls.output(index)
            if hidden.requires_grad:
                hidden.backward(gradient.to(hidden))
    return sums


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module gets a gradient within the context."""
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(value)


def _collector(path: str, total: GradientSum) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        def collect(gradient: Tensor) -> None:
            with within(path):
                if not torch.isfinite(gradient).all():
                    raise InputError(
                        f"{where()}NaN or inf in the gradients of a calibration batch; load the model in bfloat16 or "
                        "float32, or round it one-sided"
                    )
                total.add(gradient)

        if not output.requires_grad:  # the first of the block; an output of its own that may be changed in place
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(collect)
        return output

    return hook
