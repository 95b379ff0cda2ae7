"""`swap`: put the registry's kernels into a model, ours or somebody else's."""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mirage_hello.kernels.policy import Policy, policy, use
from mirage_hello.kernels.registry import ops


def swap(module: nn.Module, spec: Any = "auto") -> nn.Module:
    """Make `module` compute with the registry's kernels under a policy, in place.

    Models written with `ops.*` follow the policy inside `forward`. In any other module, layers of
    exactly these types get a forward that calls an op: Conv2d (square stride and padding, no
    dilation, one group), GroupNorm, LayerNorm (one dimension), Linear, SiLU; a GroupNorm directly
    followed by a SiLU in a Sequential becomes one group_norm_silu; attention modules that take a
    processor (diffusers) get one that calls ops.attention. Parameters, state-dict keys and hooks
    stay as they are. Calling `swap` again replaces the policy; `unswap` undoes it.

    Args:
        module: any nn.Module.
        spec: a policy, see `policy`: "ptx", ("ptx", "auto"), {"attention": "triton"}, ...

    Returns:
        The same module.

    Raises:
        ValueError: unknown op or backend in the policy.
    """
    chosen = policy(spec)
    unswap(module)
    for layer in module.modules():
        if isinstance(layer, nn.Sequential):
            _fuse_norm_silu(layer)
    for layer in module.modules():
        forward = _FORWARDS.get(type(layer))
        if "forward" not in vars(layer) and forward is not None and _plain(layer):
            _set_forward(layer, forward)
        set_processor: Any = getattr(layer, "set_processor", None)
        if set_processor is not None and hasattr(layer, "to_q"):
            vars(layer)["_mirage_processor"] = layer.processor
            set_processor(AttentionProcessor())
    _follow(module, chosen)
    return module


def unswap(module: nn.Module) -> nn.Module:
    """Give every layer of a swapped module its own forward back."""
    for layer in module.modules():
        if vars(layer).pop("_mirage_swapped", False):
            vars(layer).pop("forward")
        if "_mirage_processor" in vars(layer):
            set_processor: Any = layer.set_processor
            set_processor(vars(layer).pop("_mirage_processor"))
    return module


def _set_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    layer.forward = types.MethodType(forward, layer)
    vars(layer)["_mirage_swapped"] = True


def _follow(module: nn.Module, chosen: Policy) -> None:
    """Run the module's forward, as it is now, inside the policy."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with use(chosen):
            return inner(*args, **kwargs)

    vars(module)["forward"] = forward
    vars(module)["_mirage_swapped"] = True


def _plain(layer: nn.Module) -> bool:
    """Whether the op can express this layer's options."""
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if isinstance(layer.padding, tuple) else ()
        return (
            layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and len(set(layer.stride)) == 1
            and len(padding) == 2
            and len(set(padding)) == 1
        )
    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    return True


def _conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return ops.conv2d(x, layer.weight, layer.bias, layer.stride[0], int(layer.padding[0]))


def _group_norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def _group_norm_silu(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.group_norm_silu(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


def _layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return ops.layer_norm(x, layer.weight, layer.bias, layer.eps)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias)


def _silu(layer: nn.SiLU, x: Tensor) -> Tensor:
    return ops.silu(x)


def _identity(layer: nn.Module, x: Tensor) -> Tensor:
    return x


_FORWARDS: dict[type, Callable[..., Any]] = {
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
    nn.SiLU: _silu,
}


def _fuse_norm_silu(sequence: nn.Sequential) -> None:
    """GroupNorm, SiLU side by side: the norm does both, the SiLU passes on."""
    layers = list(sequence)
    for norm, act in itertools.pairwise(layers):
        if type(norm) is nn.GroupNorm and type(act) is nn.SiLU:
            _set_forward(norm, _group_norm_silu)
            _set_forward(act, _identity)


class AttentionProcessor:
    """diffusers' attention through ops.attention: plain self- and cross-attention of a U-Net.

    Raises:
        NotImplementedError: a mask or a spatial, group or cross norm, which the op does not have.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        unsupported = {
            "attention_mask": attention_mask,
            "group_norm": attn.group_norm,
            "norm_cross": attn.norm_cross,
            "spatial_norm": attn.spatial_norm,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise NotImplementedError(
                    f"swap: attention with {name} is not an op here; set this module's own "
                    "processor again after swap"
                )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = (attn.heads, -1)
        q = attn.to_q(hidden_states).unflatten(-1, split)
        k, v = (proj(context).unflatten(-1, split) for proj in (attn.to_k, attn.to_v))
        out = attn.to_out[0](ops.attention(q, k, v, attn.scale).flatten(2))
        out = attn.to_out[1](out)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
