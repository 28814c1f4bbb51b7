"""The words that generated tasks are made of. Most of them become single tokens."""

from __future__ import annotations

from pathlib import Path
from random import Random
from string import ascii_lowercase


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
# Words of functions and records. Training sees the first of each pair, evaluation only the second.
VERBS = (
    _split(
        "open close find send move start stop check print share paint clean wash fill order buy "
        "sell book rent lock load save watch count weigh fix pack ship store show hide add remove "
        "update create delete rename copy merge split lift test plan follow invite"
    ),
    _split(
        "cancel approve borrow deliver inspect schedule translate measure archive reserve decorate "
        "harvest rotate summon unpack"
    ),
)
NOUNS = (
    _split(
        "door window table chair parcel letter ticket flight room hotel car bus train boat bike "
        "light alarm camera photo song movie game note task event meeting account invoice payment "
        "order product shelf drawer tree flower field fence pump engine wheel cake soup salad "
        "bread shirt coat shoe glove mail user group file folder page report chart server"
    ),
    _split(
        "elevator passport blanket helmet ladder mattress volcano orchestra kettle umbrella "
        "contract prescription reservation sculpture satellite telescope scooter bakery balcony "
        "violin carpet lantern suitcase"
    ),
)
FIELDS = (
    _split(
        "name color size weight height width price amount number date time day place city street "
        "title label owner sender reader level speed volume mode state type kind style format "
        "target source limit count index code zone floor seat row side depth length age score rank "
        "version reason comment topic author editor"
    ),
    _split(
        "altitude currency destination temperature duration priority quantity recipient discount "
        "category frequency material brightness deadline warranty"
    ),
)
SWITCHES = (
    _split("urgent visible public locked hidden final quick silent active empty open free safe"),
    _split("refundable fragile anonymous waterproof optional portable gluten automatic insured"),
)
LISTS = (
    _split("tags names colors items words keys parts labels rooms steps"),
    _split("ingredients languages passengers symptoms flavors allergies instruments hobbies"),
)
CHOICES = (
    _split(
        "low high fast slow small large red blue north south east west left right first last hot "
        "cold day night wood stone daily weekly short long"
    ),
    _split(
        "urban rural manual robotic domestic foreign liquid solid monthly yearly organic remote"
    ),
)
VALUES = (
    _split("Oslo Paris Anna Ben river castle tiger lamp apple bridge violet maple copper falcon"),
    _split(
        "Zurich Quentin walnut granite penguin saffron meteor Lisa Havana coral thunder velvet "
        "cinnamon pebble Nadia Kyoto marble otter pistachio comet"
    ),
)
_ONSETS = ["", *_split("b br c ch d dr f fl g gr h j k l m n p pl qu r s sh st t th tr v w z")]
_VOWELS = _split("a e i o u ai ea oo ou")
_CODAS = [""] * 6 + _split("b ck d g l ll m n nd nt p r rd rt s st t x")


def invented(rng: Random) -> str:
    """A word that is in no list: one to three syllables, or any letters."""
    if rng.random() < 0.2:
        return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(2, 7)))
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        for _ in range(rng.choice((1, 1, 2, 2, 3)))
    )


class Lexicon:
    """Where words of functions and records come from, on one side of the split.

    In training most are words of any kind, or invented: no list is learnt by heart, and every
    token of the vocabulary is once a part of a name.
    """

    def __init__(self, rng: Random, held_out: bool) -> None:
        self._rng, self._side, self._used = rng, int(held_out), set[str]()

    def word(self, lists: tuple[list[str], list[str]]) -> str:
        """A word that this lexicon gave for nothing else."""
        while True:
            word = self._drawn(lists)
            if word not in self._used:
                self._used.add(word)
                return word

    def several(self, lists: tuple[list[str], list[str]], n: int) -> list[str]:
        """`n` words that differ from each other."""
        words: dict[str, None] = {}
        while len(words) < n:
            words[self._drawn(lists)] = None
        return list(words)

    def _drawn(self, lists: tuple[list[str], list[str]]) -> str:
        kind = 0.0 if self._side else self._rng.random()
        if kind < 0.2:
            return self._rng.choice(lists[self._side])
        while True:
            word = self._rng.choice(_ANY) if kind < 0.65 else invented(self._rng)
            if word not in HELD_OUT_WORDS:
                return word


# Words that are frequent in the documentation of Python's standard library (PSF licence).
_ANY = (Path(__file__).parent / "lexicon.txt").read_text().split()
# Without capitals: a value may get one.
HELD_OUT_WORDS = frozenset(
    word.lower()
    for pair in (VERBS, NOUNS, FIELDS, SWITCHES, LISTS, CHOICES, VALUES)
    for word in pair[1]
)
