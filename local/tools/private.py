"""Everything private of torch, Lightning and asteroid that this project uses, each with its reason.

tests/test_private.py tests what each use relies on: after an upgrade, run it first.
"""

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the forward or backward pass of a module.

    torch can register hooks and remove them, but has no public way to ask for them. The fast
    forward never calls the modules, so it would skip their hooks; recomputing would call them
    twice.
    """
    own = any(getattr(module, hooks) for hooks in HOOKS)
    return own or any(getattr(torch_module, hooks) for hooks in GLOBAL_HOOKS)
