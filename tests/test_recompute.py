import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch import nn

from local.fast.recompute import RecomputingForward, find_recomputed
from local.tasnet import NORM_TYPES, TemporalBlock
from local.tools.choices import MEMORY

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(N=12, L=8, B=8, H=12, P=3, X=3, R=2, C=2, audio_channels=2)


class DroppingBlock(TemporalBlock):
    def forward(self, residual):
        return residual + F.dropout(self.net(residual), 0.2, self.training)


def make_model(norm_type: str = "gLN", drops: bool = False) -> nn.Module:
    model = random_model({**SMALL, "norm_type": norm_type}).train()
    if drops:
        for module in model.modules():
            if isinstance(module, TemporalBlock):
                module.__class__ = DroppingBlock
    return model


def run(model: nn.Module, forward) -> list[torch.Tensor]:
    """Estimates, gradients, buffers, and a random number drawn at the end of a step."""
    torch.manual_seed(1)
    estimates = forward(torch.randn(2, 2, 300))
    estimates.square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [estimates.detach(), *grads, *model.buffers(), torch.rand(3)]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("drops", [False, True], ids=["plain", "dropout"])
def test_a_step_is_that_of_the_model_to_the_last_bit(norm_type, memory, drops):
    """The statistics of BN are counted once, and dropout drops the same again."""
    plain, model = make_model(norm_type, drops), make_model(norm_type, drops)
    for expected, found in zip(
        run(plain, plain), run(model, RecomputingForward(model, memory)), strict=True
    ):
        assert torch.equal(found, expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_more_recomputing_saves_fewer_tensors():
    saved, calls = {}, {}
    for memory in MEMORY:
        model, count, sizes = make_model(), [], {}
        forward = RecomputingForward(model, memory)
        first = model.separator.network[2][0][0].net[0]
        first.register_forward_hook(lambda *_, count=count: count.append(1))

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            estimates = forward(torch.randn(1, 2, 4000))
        estimates.mean().backward()
        saved[memory], calls[memory] = sum(sizes.values()), len(count)
    assert saved["none"] > 2 * saved["some"] > 2 * saved["most"]
    assert calls == {"none": 1, "some": 2, "most": 2}


def test_which_parts_are_recomputed():
    model = make_model()
    repeats = list(model.separator.network[2])
    blocks = [block for repeat in repeats for block in repeat]
    assert find_recomputed(model, "none") == ([], "")
    assert find_recomputed(model, "some") == (blocks, "")
    assert find_recomputed(model, "most") == (repeats, "")
    with pytest.raises(ValueError, match="none, some, most"):
        find_recomputed(model, "all")


def test_without_repeats_most_is_as_some():
    class Chain(nn.Module):
        block_class = nn.Linear

        def __init__(self):
            super().__init__()
            self.first, self.second, self.rest = nn.Linear(2, 2), nn.Linear(2, 2), nn.PReLU()

    chain = Chain()
    assert find_recomputed(chain, "most") == ([chain.first, chain.second], "")


def test_the_reason_is_given_if_nothing_is_recomputed():
    assert "block_class" in find_recomputed(nn.Linear(1, 1), "some")[1]
    model = make_model()
    model.separator.network[2][1][0].net[1].register_forward_hook(lambda *_: None)
    assert find_recomputed(model, "most")[0] == []
    assert "hooks in a block" in find_recomputed(model, "most")[1]


class Counter(nn.Module):
    """Assigns its buffer, where BN changes its own in place; it is None before the first pass."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("passes", None, persistent=False)

    def forward(self, hidden):
        self.passes = torch.ones(()) if self.passes is None else self.passes + 1
        return (hidden * self.weight / self.passes).exp()


def test_recomputing_finds_assigned_buffers_as_the_forward_pass_did():
    found = []
    for memory in ("none", "some"):
        model = nn.Sequential(Counter())
        model.block_class = Counter
        forward = RecomputingForward(model, memory)
        for _ in range(2):
            forward(torch.arange(3.0)).sum().backward()
        assert model[0].passes == 2
        assert list(model.state_dict()) == ["0.weight"]
        found.append(model[0].weight.grad)
    assert torch.equal(*found)
