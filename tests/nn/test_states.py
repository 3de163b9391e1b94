import numpy as np
import torch

from opt.nn.states import States, side_by_side


def states(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return States(torch.randn(sum(lengths), 3, generator=generator), np.array(lengths))


def rows(some):
    return list(some.hidden.split(some.lengths.tolist()))


def test_taking_picks_whole_samples_in_any_order_and_number():
    some = states([2, 0, 3, 1])
    taken = some.take(np.array([3, 0, 3, 1]))
    assert taken.lengths.tolist() == [1, 2, 1, 0]
    whole = rows(some)
    torch.testing.assert_close(taken.hidden, torch.cat([whole[3], whole[0], whole[3], whole[1]]), rtol=0, atol=0)


def test_joining_is_end_to_end():
    one, two = states([2, 1], 1), states([4], 2)
    joined = States.joined([one, two])
    assert len(joined) == 3
    torch.testing.assert_close(joined.take(np.array([2])).hidden, two.hidden, rtol=0, atol=0)


def test_side_by_side_lays_each_sample_of_every_part_into_one_sequence():
    one, two, three = states([2, 1], 1), states([3, 0], 2), states([1, 4], 3)
    entries_ND, view = side_by_side([one, two, three])
    expected = [torch.cat([rows(part)[number] for part in (one, two, three)]) for number in range(2)]
    assert view.first.tolist() == [0, 6]
    torch.testing.assert_close(entries_ND, torch.cat(expected), rtol=0, atol=0)
    assert view.layout.query_borders.tolist() == [0, 6, 11]
