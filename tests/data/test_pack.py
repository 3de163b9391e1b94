"""The packer: decoders look at the sequences they were given, each of whose tokens is there once."""

import numpy as np

from opt.data.pack import Packer


def test_writings_look_at_their_own_sequence_and_share_what_they_share() -> None:
    packer = Packer(4, 4)
    places = [packer.sequence("encoder", [packer.text(np.arange(length))]) for length in (3, 5, 2, 4)]
    for place in (places[3], places[1], places[3]):
        packer.write("text", np.arange(2), np.arange(2), place)
    writing = packer.batch([], {}, {}, {}, writings=("text", "codes")).writings["text"]
    assert writing.seen.tolist() == [10, 11, 12, 13, 3, 4, 5, 6, 7], "the first and third sequence nobody looks at"
    assert writing.layout.inverse.numel() == 6
    looked = {}
    for bucket in writing.context.buckets:
        query, key = writing.context.query[bucket.queries], writing.context.key[bucket.keys]
        for row in range(bucket.rows):
            tokens = writing.seen[key.view(bucket.rows, -1)[row]]
            valid = tokens if bucket.valid is None else tokens[bucket.valid[row]]
            looked[int(query.view(bucket.rows, -1)[row][0])] = valid.tolist()
    assert looked == {0: [10, 11, 12, 13], 2: [3, 4, 5, 6, 7], 4: [10, 11, 12, 13]}


def test_a_decoder_without_rows_looks_at_nothing() -> None:
    packer = Packer(4, 4)
    packer.sequence("encoder", [packer.text(np.arange(3))])
    writing = packer.batch([], {}, {}, {}, writings=("codes",)).writings["codes"]
    assert len(writing.seen) == len(writing.ids) == 0 and writing.context.buckets == ()
