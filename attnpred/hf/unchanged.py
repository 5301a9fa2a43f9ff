"""Whether a module is what it was: parts, their `forward`, weights, and nobody who listens. Asked before every token.

So it has to be quick: a small model has hundreds of parts. Hooks are looked for only after somewhere in the process one
was made, or while there are any.
"""

from operator import is_
from typing import Any, final

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

OF_TRANSFORMERS = "transformers.utils.output_capturing"
"""Where hooks come from that stay, and do nothing unless attention weights or hidden states are asked for."""


@final
class Unchanged:
    """What all that is below `root` is now, but for `root` itself, whose children belong to it."""

    def __init__(self, root: nn.Module) -> None:
        held = [(holder._modules, name, part) for holder in root.modules() for name, part in holder.named_children()]
        self._held = [(children, name) for children, name, _ in held]
        self._parts: list[nn.Module] = [part for _, _, part in held]
        self._own = [vars(part) for part in self._parts]
        self._forwards = [own.get("forward") for own in self._own]
        self._parameters = [part._parameters for part in root.modules() if "weight" in part._parameters]
        self._weights: list[Any] = [parameters["weight"] for parameters in self._parameters]
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._versions = [weight._version for weight in self._counted]
        self._made: int | None = None  # handles of hooks, when none of them was here

    def holds(self) -> bool:
        """Return whether it still is, and nobody listens to a part."""
        return (
            all(map(is_, [children.get(name) for children, name in self._held], self._parts))
            and all(map(is_, [own.get("forward") for own in self._own], self._forwards))
            and all(map(is_, [parameters.get("weight") for parameters in self._parameters], self._weights))
            and [weight._version for weight in self._counted] == self._versions
            and not self.is_heard()
        )

    def is_heard(self) -> bool:
        """Return whether somebody listens to a part."""
        made = RemovableHandle.next_id
        if made == self._made:
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        for own in self._own:
            hooks = own["_forward_hooks"].values()
            if own["_forward_pre_hooks"] or any(hook.__module__ != OF_TRANSFORMERS for hook in hooks):
                return True
        self._made = made
        return False
