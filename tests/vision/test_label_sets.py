"""Names and colours of known data sets: complete, and those that others draw with."""

from __future__ import annotations

import pytest
from mixerzoo.vision.label_sets import LABEL_SETS, label_set, published_colours


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("cityscapes", 19), ("voc", 21), ("camvid", 11)])
def test_every_class_has_a_name_and_a_colour(name: str, count: int) -> None:
    known = label_set(name)
    assert len(known.names) == len(known.colours) == len(set(known.names)) == count
    assert all(0 <= part <= 255 for colour in known.colours for part in colour)
    assert published_colours(list(known.names)) == known.colours
    assert published_colours([*known.names, "another"]) is None


def test_data_sets_are_known_by_most_of_their_names() -> None:
    names = [f"{name.title()}, or another" for name in LABEL_SETS["ade20k"].names]
    names[89] = "television"  # as ADE20K's own table has it
    assert published_colours(names) == LABEL_SETS["ade20k"].colours
    assert published_colours([str(index) for index in range(150)]) is None
    assert published_colours([*names[:75], *map(str, range(75))]) is None


def test_colours_of_voc_are_the_bits_of_the_class_number() -> None:
    """VOCcolormap: the bits of a number go to red, green and blue in turn, each channel from its highest bit down."""
    for number, colour in enumerate(LABEL_SETS["voc"].colours):
        want = [sum((number >> (3 * place + channel) & 1) << (7 - place) for place in range(8)) for channel in range(3)]
        assert list(colour) == want


def test_some_that_everybody_remembers() -> None:
    ade, city = LABEL_SETS["ade20k"], LABEL_SETS["cityscapes"]
    assert dict(zip(ade.names, ade.colours, strict=True))["sky"] == (6, 230, 230)
    assert (ade.names[149], ade.colours[149]) == ("flag", (92, 0, 255))
    assert dict(zip(city.names, city.colours, strict=True))["road"] == (128, 64, 128)
    with pytest.raises(ValueError, match="known here, not of 'ade'"):
        label_set("ade")
