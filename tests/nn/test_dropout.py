"""Dropout by shared random numbers is dropout: the right share, no pattern, the right scale, repeatable."""

import pytest
import torch

from opt.nn.dropout import Dropout

SHAPE = (401, 255)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_dropped_by_chance_each_for_itself(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dropout, hidden = Dropout(share), torch.ones(SHAPE, dtype=dtype, requires_grad=True)
    output = dropout(hidden)
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    dropped = (output == 0).flatten()
    bound = 5 * (share * (1 - share) / dropped.numel()) ** 0.5
    assert abs(dropped.float().mean() - share) < bound
    assert output.dtype == dtype and torch.equal(gradient, output)
    kept = output[output != 0].unique().float()
    torch.testing.assert_close(kept, torch.tensor([1 / (1 - share)]), rtol=0.004, atol=0)
    centred = dropped.float() - dropped.float().mean()
    for apart in (1, 2, 3, 4, 255):  # neighbours, those of one random number, those of one column
        assert abs((centred[apart:] * centred[:-apart]).mean()) < 5 * share * (1 - share) / dropped.numel() ** 0.5


def test_a_seed_repeats_and_evaluation_drops_nothing() -> None:
    dropout, hidden = Dropout(0.3), torch.randn(SHAPE)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(dropout(hidden))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(dropout.eval()(hidden), hidden) and torch.equal(Dropout(0.0)(hidden), hidden)
    assert Dropout(0.3)(torch.zeros(0, 4)).shape == (0, 4)
