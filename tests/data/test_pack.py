"""The packer: decoders look at the sequences they were given, and at nothing else."""

import numpy as np

from opt.data.pack import FRAME, PATCH, Packer
from opt.data.pixels import Patches


def test_writings_look_at_their_own_sequence() -> None:
    packer = Packer(4, 4)
    places = [packer.sequence("encoder", [packer.text(np.arange(length))]) for length in (3, 5, 2, 4)]
    for place in (places[3], places[1], places[3]):
        packer.write("text", np.arange(2), np.arange(2), place)
    writing = packer.batch([], {}, {}, {}, writings=("text", "codes")).writings["text"]
    wanted = [[10, 11, 12, 13], [3, 4, 5, 6, 7], [10, 11, 12, 13]]
    assert writing.seen.tolist() == sum(wanted, []), "the first and third sequence nobody looks at"
    assert writing.layout.inverse.numel() == 6
    context = writing.context
    assert context.key is not None and context.key_order is None, "keys lie in the order of those who look"
    queries = context.query.split([bucket.rows * bucket.queries for bucket in context.buckets])
    keys = context.key.split([bucket.rows * bucket.keys for bucket in context.buckets])
    looked = {}
    for bucket, query, key in zip(context.buckets, queries, keys, strict=True):
        for row in range(bucket.rows):
            tokens = writing.seen[key.view(bucket.rows, -1)[row]]
            valid = tokens if bucket.valid is None else tokens[bucket.valid[row]]
            looked[int(query.view(bucket.rows, -1)[row][0])] = valid.tolist()
    assert looked == {0: wanted[0], 2: wanted[1], 4: wanted[2]}


def test_a_decoder_without_rows_looks_at_nothing() -> None:
    packer = Packer(4, 4)
    packer.sequence("encoder", [packer.text(np.arange(3))])
    writing = packer.batch([], {}, {}, {}, writings=("codes",)).writings["codes"]
    assert len(writing.seen) == len(writing.ids) == 0 and writing.context.buckets == ()


def test_hidden_patches_keep_their_places_and_the_whole_picture_stays() -> None:
    packer = Packer(4, 4, 3, (FRAME, PATCH), {"image": (PATCH,)})
    rng, given, parts = np.random.default_rng(0), [], []
    for count in (3, 5, 4):
        given.append(Patches(rng.integers(1, 255, (count, 3)).astype(np.uint8), rng.integers(1, 20, (count, 4)),
                             rng.random((count, 4)).astype(np.float32)))
        parts.append(packer.patches(given[-1]))
        packer.sequence("image", [packer.first(PATCH), parts[-1]])
    once = packer.hide_patches(parts[1], np.array([1, 4]))
    twice = packer.hide_patches(once, np.array([0, 1]))
    none = packer.hide_patches(parts[2], np.zeros(0, np.int64))
    for part in (once, twice, none):
        packer.sequence("image", [packer.first(PATCH), part])
    table = packer.batch([], {}, {}, {}).patches
    for part, whole, hidden in ((parts[0], 0, []), (parts[1], 1, []), (once, 1, [1, 4]), (twice, 1, [0, 1, 4]),
                                (none, 2, [])):
        assert np.array_equal(table.places[part.entries], given[whole].places)
        assert np.array_equal(table.shares[part.entries], given[whole].shares)
        assert np.flatnonzero(table.masked[part.entries]).tolist() == hidden
        pixels = given[whole].pixels.copy()
        pixels[hidden] = 0
        assert np.array_equal(table.pixels[part.entries], pixels)
