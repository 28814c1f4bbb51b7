"""Short generated stories of people who go to places and carry things, and questions about them."""

from __future__ import annotations

from random import Random

from tools.train_demo.words import NAMES, OBJECTS, PLACES


class _World:
    """Who is where, and who has, or where lies, each thing."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.people = rng.sample(NAMES, rng.randint(2, 4))
        self.places = rng.sample(PLACES, rng.randint(3, 5))
        self.things = rng.sample(OBJECTS, rng.randint(1, 3))
        self.at: dict[str, str] = {}
        self.owner: dict[str, str] = {}
        self.lies: dict[str, str] = {}

    def event(self) -> str:
        """Something that happens, in a sentence."""
        person, rng = self.rng.choice(self.people), self.rng
        mine = [t for t, owner in self.owner.items() if owner == person]
        free = [t for t in self.things if t not in self.owner and t not in self.lies]
        here = [t for t, place in self.lies.items() if place == self.at.get(person)]
        kind = rng.random()
        if person in self.at and kind < 0.3 and (takes := free + here):
            thing = rng.choice(takes)
            self.lies.pop(thing, None)
            self.owner[thing] = person
            return f"{person} {rng.choice(('took', 'picked up', 'grabbed'))} the {thing}."
        if mine and kind < 0.45:
            thing = rng.choice(mine)
            del self.owner[thing]
            self.lies[thing] = self.at[person]
            return f"{person} {rng.choice(('dropped', 'put down', 'left'))} the {thing}."
        if mine and kind < 0.55:
            thing, other = rng.choice(mine), rng.choice([p for p in self.people if p != person])
            # They have to meet: the other one comes first.
            self.owner[thing], self.at[other] = other, self.at[person]
            return f"{other} met {person} there. {person} gave the {thing} to {other}."
        place = rng.choice([p for p in self.places if p != self.at.get(person)])
        self.at[person] = place
        return f"{person} {rng.choice(('went to', 'walked to', 'moved to', 'ran to'))} the {place}."

    def where(self, thing: str) -> str:
        return self.lies[thing] if thing in self.lies else self.at[self.owner[thing]]

    def questions(self) -> list[tuple[str, str]]:
        """What can be asked now, with the answers."""
        asked = [
            (f"Where is {person}?", f"{person} is in the {place}.")
            for person, place in self.at.items()
        ]
        asked += [
            (f"Who has the {thing}?", f"{owner} has the {thing}.")
            for thing, owner in self.owner.items()
        ]
        for thing in (*self.owner, *self.lies):
            question = (f"Where is the {thing}?", f"The {thing} is in the {self.where(thing)}.")
            asked += [question] * 2
        return asked


def story(rng: Random) -> tuple[str, str]:
    """A story with a question at its end, and the answer."""
    world = _World(rng)
    events = " ".join(world.event() for _ in range(rng.randint(3, 9)))
    question, answer = rng.choice(world.questions())
    return f"{events} {question}", answer
