"""
Stories of people who walk about with things, told one sentence at a time and scattered over a long text.

The first three of the bAbI tasks (Weston et al. 2015), simulated here, hidden in filler as BABILong does (Kuratov et al. 2024):
    one    "Where is Abel?"                        one sentence answers: his last move
    two    "Where is the lamp?"                    who took it, and where that person went
    three  "Where was the lamp before the attic?"  the same, one place back in time
depth is that of the sentence that names the answer. The other sentences lie before and after it in the order of events.

An event is (person, verb, object): ("Abel", "go", "attic"), ("Abel", "take", "lamp"), ("Abel", "drop", "lamp").
"""

from tasks.haystack import Ask, LongTask
from tasks.words import PEOPLE, PLACES, THINGS

SAY = {"go": ("{} went to the {}.", "{} walked to the {}.", "{} moved to the {}."),
       "take": ("{} took the {}.", "{} picked up the {}."),
       "drop": ("{} dropped the {}.", "{} put down the {}.")}
EVENTS = {1: 8, 2: 12, 3: 20}  # sentences in a story: enough for several answers to compete


class Babi(LongTask):
    def __init__(self, texts, task=1, events=None, people=3, places=6, things=2, **kwargs):
        super().__init__(texts, **kwargs)
        if task not in EVENTS:
            raise ValueError(f"expected task 1, 2 or 3, got {task}")
        if not (1 <= people <= len(PEOPLE) and 3 <= places <= len(PLACES) and 1 <= things <= len(THINGS)):
            raise ValueError(f"expected 1..{len(PEOPLE)} people, 3..{len(PLACES)} places, 1..{len(THINGS)} things, "
                             f"got {people}, {places}, {things}")
        self.task, self.events, self.cast = task, events or EVENTS[task], (people, places, things)
        self.name = f"babi{task}"

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        question = None
        for _ in range(1000): # a story may have nothing to ask about: a short one in which no thing is carried
            events = simulate(rng, self.events, *self.cast)
            if found := questions(self.task, events):
                question, answer, at = rng.choice(found)
                break
        if question is None:
            raise ValueError(f"{self.name}: no story of {self.events} events has a question for this task. Ask for more events")
        before = sorted(rng.uniform(0, depth) for _ in events[:at])
        after = sorted(rng.uniform(depth, 1) for _ in events[at + 1:])
        sentences = [rng.choice(SAY[verb]).format(person, thing) for person, verb, thing in events]
        return self.recall(rng, length, list(zip([*before, depth, *after], sentences)), [Ask(question, answer, at)])


def simulate(rng, count, people, places, things):
    """`count` events that can happen: people take what lies where they stand (or was never seen), and drop what they have."""
    people, places, things = rng.sample(PEOPLE, people), rng.sample(PLACES, places), rng.sample(THINGS, things)
    where, holder, lies, events = {}, {}, {}, [] # place of a person; person who has a thing; place of a thing put down
    while len(events) < count:
        person = rng.choice(people)
        here = where.get(person)
        can_take = [thing for thing in things if here and thing not in holder and lies.get(thing, here) == here]
        can_drop = [thing for thing in things if holder.get(thing) == person]
        verb = rng.choice(["go", "go"] + ["take"] * bool(can_take) + ["drop"] * bool(can_drop))
        if verb == "go":
            what = where[person] = rng.choice([place for place in places if place != here])
        elif verb == "take":
            what = rng.choice(can_take)
            holder[what] = person
        else:
            what = rng.choice(can_drop)
            lies[what] = where[holder.pop(what)]
        events.append((person, verb, what))
    return events


def questions(task, events):
    """All (question, answer, number of the event that names the answer) that the story allows for this task."""
    persons, things = timelines(events)
    if task == 1:
        return [(f"Where is {person}?", *places[-1]) for person, places in persons.items()]
    if task == 2:
        return [(f"Where is the {thing}?", *places[-1]) for thing, places in things.items()]
    out = []
    for thing, places in things.items():
        names = [name for name, _ in places]
        # each place once, or "before the attic" could mean either time
        out += [(f"Where was the {thing} before the {names[n]}?", *places[n - 1])
                for n in range(1, len(names)) if names.count(names[n]) == 1]
    return out


def timelines(events):
    """Where every person and every thing has been: name -> [(place, number of the event that says so), ...] in order."""
    persons, things, holder = {}, {}, {}
    for n, (person, verb, what) in enumerate(events):
        if verb == "go":
            persons.setdefault(person, []).append((what, n))
            for thing in [thing for thing, owner in holder.items() if owner == person]:
                things[thing].append((what, n))
        elif verb == "take":
            holder[what] = person
            place = persons[person][-1]
            if what not in things: # put down and taken again in one place is no move
                things[what] = [place]
        else:
            del holder[what]
    return persons, things
