"""The editor reads words alone, never drops out, and knows which words may be edited."""

import numpy as np
import torch
from fixtures import WORDS, tokenizer

from opt.data.pack import TEXT, Packer
from opt.data.tokenizer import SPECIALS, Tokenizer
from opt.nn.editor import Editor, open_words, whole_words


def made() -> Editor:
    torch.manual_seed(0)
    return Editor(tokenizer().size, 12, 2, 16, 2, 32, 1e-12, taught=True)


def asked(editor: Editor, texts: list[list[int]], places: list[int]) -> torch.Tensor:
    packer = Packer(1, 1, views={"masked": (TEXT,)})
    starts = [packer.sequence("masked", [packer.text(np.array(text))]).start for text in texts]
    batch = packer.batch([""] * len(texts), {}, {}, {})
    index = torch.tensor(starts) + torch.tensor(places)
    return editor(batch.text, batch.views["masked"], index)


def test_a_place_depends_on_its_own_text_alone() -> None:
    editor = made()
    texts, places = [[2, 9, 4, 11, 3], [2, 4, 3], [2, 12, 4, 3]], [2, 1, 2]
    together = asked(editor, texts, places)
    assert together.shape == (3, tokenizer().size)
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        torch.testing.assert_close(asked(editor, [text], [place])[0], together[row])
    assert torch.equal(asked(editor.train(), texts, places), together)


def test_idle_it_uses_every_parameter_and_moves_none() -> None:
    editor = made()
    editor.idle(torch.device("cpu")).sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in editor.parameters())


def test_open_words_are_those_with_a_letter_or_digit() -> None:
    words = Tokenizer.train(["a red star, 2 stars. ( stars )"] * 2, 60)
    found = open_words(words)
    shown = {words.decode([number]) for number in np.flatnonzero(found)}
    assert {"a", "red", "2"} <= shown and not shown & {",", ".", "(", ")", ""}
    assert not found[: len(SPECIALS)].any()


def test_whole_words_begin_one() -> None:
    words = Tokenizer.train([" ".join(WORDS), "reds"] * 4, 60)
    found = whole_words(words)
    assert found[words.encode("red")].all()
    for number in np.flatnonzero(~found):
        assert words.words_of(np.array([words.encode("red")[0], number])).tolist() == [0, 0]
    assert (~found).any()
