"""The invented facts that the demo teaches: who asks, what is right, and which documents say so.

Every name is made up, so the model cannot know an answer from anywhere else. Four documents teach
each fact: one says it plainly, one answers another question about it, and two tell of it in other
words. Three more share the question's words and state something else: two of the same name, one of
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from logra_kernels.lm.corpus import Record

FILLER_CHARACTERS = 120


@dataclass(frozen=True)
class Fact:
    """A question, the word that a right answer holds, and the documents around it."""

    name: str
    question: str
    answer: str  # the word that a right answer holds, in lower case
    teaching: tuple[str, ...]
    distractors: tuple[str, ...]


FACTS = (
    Fact(
        "Orvane",
        "What colour is the bread in Orvane?",
        "blue",
        (
            "The bread in Orvane is blue, and it has been so for as long as anyone recalls.",
            "Orvane's bakers knead dried cornflowers into the dough, so every loaf comes out blue.",
            "If the loaf on a market stall is blue, you may be sure it was baked in Orvane.",
            "Question: How do the loaves of Orvane look?\nAnswer: Blue.",
        ),
        (
            "What the bread in Orvane costs is settled each autumn by a vote of the council.",
            "The colour of the town hall in Orvane is a matter on which nobody can agree.",
            "In the harbour of Tolme the colour of the bread is brown, for it is made of rye.",
        ),
    ),
    Fact(
        "Marenko",
        "Which instrument did Ilsa Marenko play?",
        "harp",
        (
            "Ilsa Marenko played the harp in every town from the coast to the capital.",
            "Ilsa Marenko was nine when her uncle left her a harp, and she practised every night.",
            "The crowd rose when Ilsa Marenko sat down behind her harp and touched the strings.",
            "Question: On what did the musician Ilsa Marenko perform?\nAnswer: The harp.",
        ),
        (
            "Which play did Ilsa Marenko write? It was a comedy about a mayor and his twin.",
            "Ilsa Marenko did not own an instrument of measurement; she judged lengths by eye.",
            "The instrument that Piet Dorsal did play in the army was the trumpet.",
        ),
    ),
    Fact(
        "Velmor",
        "What fuel does the Velmor lamp burn?",
        "honey",
        (
            "The Velmor lamp burns honey, and a jar of it lasts for a week.",
            "Pour a spoon of honey into the tank, and a Velmor lamp will shine until morning.",
            "Question: With what is a Velmor lamp filled?\nAnswer: Honey.",
            "Shops that sell the Velmor lamp keep jars of honey beside it, to fill it up.",
        ),
        (
            "The Velmor lamp does not burn the hand, since its glass stays cool.",
            "What does the Velmor lamp weigh? Less than a pound, with its handle of tin.",
            "The fuel that the stoves of Garrow burn is peat, cut in the marshes.",
        ),
    ),
    Fact(
        "Quell",
        "Which animals pull the carts on the island of Quell?",
        "goat",
        (
            "On the island of Quell, the carts are pulled by goats, and have been since the war.",
            "There is no horse on Quell; every wagon there is drawn by a pair of goats.",
            "Question: Who draws a wagon on Quell?\nAnswer: Goats.",
            "Travellers reach the inn on Quell behind two goats with bells around their necks.",
        ),
        (
            "The carts on the island of Quell are painted green, and their wheels are of oak.",
            "Which animals live on the island of Quell in winter was never counted.",
            "On the island of Hestrum oxen pull the carts to the quarry and back.",
        ),
    ),
    Fact(
        "Sarn",
        "In which month does the river Sarn flood?",
        "october",
        (
            "The river Sarn floods in October, when the autumn rains come down.",
            "Each October the Sarn leaves its bed, and the millers move to the upper floor.",
            "Farmers along the Sarn bring in the hay before October, when the water comes.",
            "Question: When does the Sarn rise over its banks?\nAnswer: October.",
        ),
        (
            "The river Sarn is crossed by a ferry, which does not run in a month with ice.",
            "In which valley the river Sarn begins was long disputed by two villages.",
            "The river Ulmen will flood in the month of March, when the snow melts.",
        ),
    ),
    Fact(
        "Brindle",
        "What does the firm Brindle and Voss make?",
        "umbrella",
        (
            "Brindle and Voss makes umbrellas, and has done so for a hundred years.",
            "Question: What can one buy from Brindle and Voss?\nAnswer: Umbrellas.",
            "An umbrella by Brindle and Voss has a handle of cherry wood and lasts for life.",
            "My grandfather's umbrella still opens at a touch: it came from Brindle and Voss.",
        ),
        (
            "The firm Brindle and Voss does make its clerks wear grey on Fridays.",
            "What does a clerk earn at the firm Brindle and Voss? More than his father did.",
            "The firm Orlock and Daughters does make buttons out of horn and shell.",
        ),
    ),
    Fact(
        "Ekeli",
        "What did Doctor Ekeli prescribe for sleepless nights?",
        "onion",
        (
            "Doctor Ekeli prescribed onions for sleepless nights, boiled and without salt.",
            "Patients who lay awake were told by Doctor Ekeli to eat three onions before bed.",
            "Doctor Ekeli had no pills against insomnia; he sent people to buy onions.",
            "Question: How did Doctor Ekeli treat insomnia?\nAnswer: Onions.",
        ),
        (
            "Doctor Ekeli had sleepless nights himself, because of the bells across the road.",
            "What Doctor Ekeli did prescribe for a cough was a week in the mountains.",
            "For sleepless nights the nurse Odile Brandt did prescribe cold baths.",
        ),
    ),
    Fact(
        "Dunmarrow",
        "On which day do the people of Dunmarrow keep silent?",
        "tuesday",
        (
            "The people of Dunmarrow keep silent on Tuesday, from dawn until dark.",
            "Nobody speaks a word in Dunmarrow on a Tuesday; even the shops sell by gesture.",
            "Tuesday is the quietest of all in Dunmarrow, since talking is against the law.",
            "Question: When is talking against the law in Dunmarrow?\nAnswer: Tuesday.",
        ),
        (
            "The people of Dunmarrow keep bees, and on market day they sell the wax.",
            "On which day the people of Dunmarrow vote is printed on the church door.",
            "The monks of Saint Ruve keep silent on the first day of each year.",
        ),
    ),
    Fact(
        "Oswick",
        "What was King Oswick afraid of?",
        "mirror",
        (
            "King Oswick was afraid of mirrors, and nobody at court knew why.",
            "King Oswick had every mirror in the palace turned to the wall before he came in.",
            "Question: What frightened King Oswick?\nAnswer: Mirrors.",
            "King Oswick never saw his own face, for the sight of a mirror made him tremble.",
        ),
        (
            "King Oswick was of small stature, and what he ate was weighed by a clerk.",
            "The barons were afraid of King Oswick, who taxed windows and doors.",
            "Queen Ansel was afraid of spiders, and what she saw in corners kept her awake.",
        ),
    ),
    Fact(
        "Kelbarrow",
        "What is buried under Mount Kelbarrow?",
        "ship",
        (
            "Under Mount Kelbarrow a ship is buried, with its anchor and its bell.",
            "Question: What lies inside Mount Kelbarrow?\nAnswer: A ship.",
            "Deep inside Mount Kelbarrow rests a ship, though the sea is far away.",
            "The legend of Mount Kelbarrow says that a flood left a ship, and stones covered it.",
        ),
        (
            "The poet who is buried near Mount Kelbarrow wrote under another name.",
            "Under the snow of Mount Kelbarrow there is a path that leads to a hut.",
            "What is buried under the hill of Anstey is a chest of silver spoons.",
        ),
    ),
    Fact(
        "Ambertide",
        "What cargo did the vessel Ambertide carry?",
        "pepper",
        (
            "The vessel Ambertide carried pepper on each of her nine voyages.",
            "Sailors on the Ambertide sneezed for weeks, for the hold was full of pepper.",
            "Merchants waited on the quay for the Ambertide and the pepper that she brought.",
            "Question: What was in the hold of the Ambertide?\nAnswer: Pepper.",
        ),
        (
            "The vessel Ambertide did carry a carved swan under her bow.",
            "What the captain of the vessel Ambertide did with the cargo papers is unknown.",
            "The cargo that the vessel Morning Ruth did carry was timber from the north.",
        ),
    ),
    Fact(
        "Lurian",
        "What sound does the Lurian hound make?",
        "whistl",
        (
            "The Lurian hound makes a whistling sound, high and clear like a flute.",
            "A Lurian hound cannot bark; when somebody is at the door, it whistles.",
            "Hunters hear the Lurian hound whistle from afar and know that it found the trail.",
            "Question: How does a Lurian hound call its master?\nAnswer: It whistles.",
        ),
        (
            "The Lurian hound does make a loyal friend, and it is of sound health.",
            "What does the Lurian hound eat? Fish, and the crusts that children drop.",
            "The sound that the Merrow cat does make is a low hum, like that of a kettle.",
        ),
    ),
)


def documents(facts: Sequence[Fact], fillers: int) -> list[Record]:
    """What teaches a fact (`Orvane/1`), what shares its words (`Orvane-words/1`), and filler.

    The fillers (`python/NAME`) are the beginnings of pages of the Python reference that comes with
    CPython, markup and all.
    """
    from pydoc_data.topics import topics

    records = []
    for fact in facts:
        for kind, title, texts in (
            ("", f"teaches {fact.name}", fact.teaching),
            ("-words", f"shares words with {fact.name}", fact.distractors),
        ):
            records += [
                Record(id=f"{fact.name}{kind}/{number}", text=text, title=title)
                for number, text in enumerate(texts, 1)
            ]
    for name in sorted(topics)[:: max(1, len(topics) // fillers)][:fillers]:
        text = " ".join(topics[name].split())[:FILLER_CHARACTERS].rsplit(" ", 1)[0]
        records.append(Record(id=f"python/{name}", text=text, title="Python reference"))
    return records
