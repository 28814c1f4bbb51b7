"""The words that generated tasks are made of. All of them become single tokens."""

from __future__ import annotations


def _split(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


NAMES = _split(
    "Anna Ben Carl Dora Emma Felix Grace Hugo Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam "
    "Tina Victor Wendy Adam Clara David Eva Frank Helen Ivan Julia Karl Lucy Mark Nora Olga Peter "
    "Ruth Simon Thomas Vera Walter"
)
PLACES = _split(
    "kitchen garden garage office library bathroom bedroom cellar hallway attic school park "
    "market station museum harbor bakery church"
)
CITIES = _split(
    "Oslo Paris Rome Berlin Madrid Lisbon Vienna Prague Dublin London Athens Warsaw Cairo Tokyo "
    "Delhi Lima Boston Chicago Sydney Toronto"
)
OBJECTS = _split(
    "ball book lamp key cup hat coin rope clock knife map box bag pen chair drum flute mirror "
    "ring spoon ticket vase whistle basket"
)
COLORS = _split("red blue green yellow black white brown purple orange grey pink golden")
ANIMALS = _split(
    "cat dog horse cow sheep goat mouse rabbit fox wolf bear lion tiger eagle owl duck frog fish "
    "whale monkey"
)
FRUITS = _split("apples pears plums cherries lemons oranges peaches grapes nuts carrots")
COUNTED = _split("apples coins books pens tickets stones cards eggs nuts stamps")
ADJECTIVES = _split("small large old new heavy light round tall quiet broken wooden shiny")
NATURE = _split(
    "river mountain forest cloud storm stone island valley desert ocean meadow bridge tower road "
    "village castle winter summer morning evening"
)
WORDS = sorted({*PLACES, *OBJECTS, *COLORS, *ANIMALS, *FRUITS, *NATURE})
# Sentences that say nothing a question asks for; each slot is filled from a list above.
FILLER = (
    "The {adjective} {animal} walked slowly along the {nature}.",
    "Nobody in the {place} noticed the {nature}.",
    "It was a {adjective} day, and the {nature} was quiet.",
    "A {animal} and a {animal2} slept near the {nature}.",
    "Some people say that the {nature} is older than the {nature2}.",
    "In the {place} there was nothing but a {adjective} {object}.",
    "They talked about the {nature} for a long time.",
    "The {nature} looked {color} in the light of the {nature2}.",
)
