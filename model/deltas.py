"""Weight deltas: W + scale * delta, put into the weights in place and taken out without a trace."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Delta = Tensor | tuple[Tensor, Tensor]


class Deltas:
    """The deltas of one module. What they change is kept, so that taking them out is exact."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._originals: dict[str, Tensor] = {}

    def check(self, deltas: Mapping[str, Delta]) -> None:
        """Raises ValueError: an unknown name, or a delta that does not have the weight's shape."""
        known = dict(self._module.named_parameters())
        for name, delta in deltas.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"set_deltas: the model has no weight {name}{hint}")
            expected = known[name].shape
            if isinstance(delta, Tensor):
                fits, got = delta.shape == expected, str(list(delta.shape))
            else:
                up, down = delta
                fits = up.shape[0] == expected[0] and up.shape[1] == down.shape[0]
                fits &= down[0].numel() == expected[1:].numel()
                got = f"{list(up.shape)} and {list(down.shape)}"
            if not fits:
                raise ValueError(f"set_deltas: {name} must be {list(expected)} (got {got})")

    @torch.no_grad()
    def apply(self, deltas: Mapping[str, Delta], scale: float) -> None:
        """Take the old deltas out and put these in: float32 sums, rounded once."""
        known = dict(self._module.named_parameters())
        for name, original in self._originals.items():
            known[name].copy_(original)
        self._originals = {name: known[name].clone() for name in deltas}
        for name, delta in deltas.items():
            weight = known[name]
            if not isinstance(delta, Tensor):
                up, down = (t.to(weight.device, torch.float32).flatten(1) for t in delta)
                delta = (up @ down).view(weight.shape)
            weight.copy_(weight.float() + scale * delta.to(weight.device, torch.float32))
