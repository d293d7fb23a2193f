"""What each use of something private relies on. A failure names the function that would break."""

import pytest
from torch import nn
from torch.nn.modules import module as torch_module

from local.tools.private import GLOBAL_HOOKS, HOOKS, has_hooks

REGISTER = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)
REGISTER_FOR_ALL = tuple(name.replace("register", "register_module") for name in REGISTER)


@pytest.mark.parametrize("name", [*REGISTER, *REGISTER_FOR_ALL])
def test_has_hooks_sees_every_kind_of_hook(name):
    module = nn.Linear(1, 1)
    for owner, attributes in (module, HOOKS), (torch_module, GLOBAL_HOOKS):
        for attribute in attributes:
            assert hasattr(owner, attribute), (
                f"torch has no {attribute} any more: has_hooks in local/tools/private.py is blind"
            )
    owner = torch_module if name in REGISTER_FOR_ALL else module
    blind = f"torch keeps hooks of {name} elsewhere: has_hooks in local/tools/private.py is blind"
    assert not has_hooks(module), blind
    handle = getattr(owner, name)(lambda *_: None)
    try:
        assert has_hooks(module), blind
    finally:
        handle.remove()
    assert not has_hooks(module), blind
