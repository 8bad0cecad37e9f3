"""Questions about *Paradise Lost*, written by hand for this package, each answered in one place.

A row: the question | what may be answered, with slashes | words that stand where the answer does.
"""

from __future__ import annotations

from typing import NamedTuple


class Question(NamedTuple):
    """A question, what may be answered, and words of the poem that stand where the answer does."""

    text: str
    answers: tuple[str, ...]
    anchor: str


_TABLE = """
Who is next to the Arch-Enemy in power and next in crime? | Beelzebub | next in crime
Which sea-beast is the hugest that swims the ocean-stream? | Leviathan | Created hugest
On what foam does the slumbering sea-beast lie? | Norway | haply slumbering on the
Who views the orb of the moon through optic glass? | Tuscan artist | Through optic glass
From the top of which hill is the moon viewed at evening? | Fesole | At evening, from the top
In which place do autumnal leaves strow the brooks? | Vallombrosa | Thick as autumnal leaves
Whose son waved the potent rod in Egypt's evil day? | Amram | up-called a pitchy cloud
Which horrid king is besmeared with blood of human sacrifice? | Moloch | horrid king, besmeared
Who is the obscene dread of Moab's sons? | Chemos / Peor | obscene dread of Moab's sons
By what name did the Phoenicians call Astoreth? | Astarte | whom the Phoenicians called
Whose annual wound allured the Syrian damsels? | Thammuz | allured The Syrian damsels
Which sea-monster is upward man and downward fish? | Dagon | sea-monster,upward man
In which town did the sea-monster have his temple? | Azotus | had his temple high Reared
Which city was the delightful seat of Rimmon? | Damascus | Him followed Rimmon
Than whom fell no Spirit more lewd from Heaven? | Belial | a Spirit more lewd
Which Cherub claimed the mighty standard as his right? | Azazel | a Cherub tall
Who was the least erected Spirit that fell from Heaven? | Mammon | the least erected Spirit
What is the high capital of Satan and his peers called? | Pandemonium | the high capital
What did men in Ausonian land call the architect? | Mulciber | in Ausonian land
On which Aegaean isle did the architect drop like a falling star? | Lemnos | th' Aegaean isle
Who was the strongest Spirit that fought in Heaven? | Moloch | the fiercest Spirit
Who seemed a pillar of state when he rose? | Beelzebub | A pillar of state
Which river is the flood of deadly hate? | Styx | the flood of deadly hate
Which river is one of sorrow, black and deep? | Acheron | of sorrow, black and deep
Which river is named of lamentation loud? | Cocytus | named of lamentation loud
Which river's waves of torrent fire inflame with rage? | Phlegeton | Whose waves of torrent fire
Which river is the river of oblivion? | Lethe | the river of oblivion
Which bog lies between Damiata and Mount Casius? | Serbonian | Betwixt Damiata and Mount Casius
From where came Alcides, crowned with conquest, when he felt the robe? | Oechalia | As when Alcides
On which mountain was the vulture bred? | Imaus | As when a vultur on
Who leaped into the flames of Aetna to be deemed a God? | Empedocles | leaped fondly
Who leaped into the sea to enjoy Plato's Elysium? | Cleombrotus | Plato's Elysium
Who is the regent of the sun, the sharpest-sighted Spirit of all? | Uriel | sharpest-sighted Spirit
On which mountain does he light after his steep flight? | Niphates | Throws his steep flight
Like which bird did he sit on the tree of life? | cormorant | The middle tree and highest there
In the fair field of which place did Proserpine gather flowers? | Enna | where Proserpine
Like which animal did he squat at the ear of Eve? | toad | close at the ear of Eve
Who touched him lightly with his spear? | Ithuriel | with his spear Touched lightly
Which sociable Spirit deigned to travel with Tobias? | Raphael | the sociable Spirit
Which bird does he seem to all the fowls? | phoenix | to all the fowls he seems
Which Seraph was found faithful among the faithless? | Abdiel | faithful found Among the faithless
Which two Thrones did Uriel and Raphael vanquish? | Adramelech / Asmadai | Two potent Thrones
Who was of Principalities the prime? | Nisroch | of Principalities the prime
Who is asked to descend from Heaven? | Urania | Descend from Heaven
Onto which field would he fall, to wander there forlorn? | Aleian | Erroneous there to wander
What did he take in his hand to circumscribe the universe? | compasses | to circumscribe This
Which river shot under ground at the foot of Paradise? | Tigris | at the foot of Paradise
What fell from Adam's slack hand? | garland | From his slack hand
Which tree did both choose in the thickest wood? | fig-tree / fig tree | for fruit renowned
Who came to the sea from Susa, to yoke the liberty of Greece? | Xerxes | of Greece to yoke
What did they chew instead of fruit? | ashes | instead of fruit Chewed
With whom did Deucalion restore the race of mankind? | Pyrrha | The race of mankind drowned
Which bird flew out of the ark before the dove? | raven | Forthwith from out the ark
What did the dove bring in his bill? | olive-leaf / olive leaf | The second time returning
"""


def _question(row: str) -> Question:
    text, answers, anchor = row.split(" | ")
    return Question(text, tuple(answers.split(" / ")), anchor)


QUESTIONS = tuple(map(_question, _TABLE.strip().splitlines()))
