"""A seeded grammar of simple children's stories: the corpus that needs no download.

A story has a hero and a friend whose pronouns agree throughout, and a small plot in three
paragraphs: who and where, a problem and what was tried, how it ended. What belongs together (the
kite, the tree it hangs in and the ladder that reaches it) is drawn together, so that a model which
reads on has something to understand and not only words to count. In the manner of TinyStories
(Eldan and Li 2023), but from templates.
"""

import random
from dataclasses import dataclass

_BOYS = tuple("Ben Finn Jack Leo Max Noah Oscar Sam Theo Tim Tom Will".split())
_GIRLS = tuple("Anna Bella Ella Emma Lily Lucy Mia Nora Rosie Sara Sue Zoe".split())
_ANIMALS = tuple("bear bunny cat duck fox frog hedgehog mouse otter owl puppy squirrel".split())
_TRAITS = tuple("brave cheerful clever curious friendly funny gentle kind playful quiet shy".split())
_HE = {"he": "he", "him": "him", "his": "his", "himself": "himself"}
_SHE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}

_HOMES = (
    "in a small house by the sea",
    "in a little red house on a hill",
    "at the edge of a green forest",
    "near a quiet river",
    "in a small town with a big park",
    "on a farm with many apple trees",
    "in a cozy house at the end of the road",
    "in a village in the mountains",
)
_WHEN = (
    "One day",
    "One morning",
    "One sunny day",
    "One afternoon",
    "One cold morning",
    "On a bright spring day",
    "On a warm summer day",
    "One Saturday",
)
_OPENINGS = (
    "Once upon a time, there was a {kind} named {hero} who lived {home}.",
    "{hero} was a {kind} who lived {home}.",
    "There once was a {kind} named {hero}. {He} lived {home}.",
    "Once there was a {kind} called {hero}, and {he} lived {home}.",
)
_FRIENDSHIPS = (
    "{His} best friend was a {pal_kind} named {pal}.",
    "{hero} had a good friend named {pal}, a {pal_kind}.",
    "{He} liked to play with {pal}, a {pal_kind} from next door.",
    "Every day {he} played with {his} friend {pal}, a {pal_kind}.",
)
_ENDINGS = (
    "From that day on, {hero} and {pal} were even better friends.",
    "That night, {hero} went to bed with a big smile.",
    "The {kind} was very happy.",
)
_OUTDOOR_ENDINGS = (
    *_ENDINGS,
    "{hero} and {pal} smiled all the way home.",
    "It was the best day of the week.",
    "{hero} told {his} mom all about it, and she gave {him} a big hug.",
    "{hero} told {his} dad all about it, and he was very proud of {him}.",
    "They laughed and played until the sun went down.",
)


@dataclass(frozen=True)
class _Plot:
    """Sentence templates with alternatives, and the words that fill them.

    Each element of `problem` and `result` is a tuple of alternatives, of which one is used; an
    empty one leaves the sentence out. The words of a story are one choice from each tuple in
    `words`. A key with a capital letter stands for its word with a capital letter.
    """

    words: tuple[tuple[dict[str, str], ...], ...]
    problem: tuple[tuple[str, ...], ...]
    result: tuple[tuple[str, ...], ...]
    endings: tuple[str, ...]


def _choices(key: str, *values: str) -> tuple[dict[str, str], ...]:
    return tuple({key: value} for value in values)


_LOST = _Plot(
    words=(
        _choices(
            "thing",
            *("red ball", "toy boat", "blue hat", "teddy bear", "picture book", "toy train"),
            *("green scarf", "little drum", "wooden horse", "shiny bell"),
        ),
        (
            {
                "memory": "I was feeding the ducks",
                "place": "the pond",
                "spot": "behind the tall grass",
            },
            {"memory": "I was picking apples", "place": "the garden", "spot": "under the tree"},
            {"memory": "I was digging a hole", "place": "the beach", "spot": "next to a big rock"},
            {"memory": "I was eating lunch", "place": "the kitchen", "spot": "under the table"},
            {"memory": "I was watching the cows", "place": "the barn", "spot": "on top of the hay"},
            {"memory": "I was on the swing", "place": "the park", "spot": "behind the bench"},
            {"memory": "I was taking a nap", "place": "the bedroom", "spot": "between the pillows"},
        ),
        _choices("wrong", "under the bed", "in the toy box", "behind the door", "in the closet"),
        _choices("also_wrong", "on the shelf", "under the rug", "in the big basket", "by the stairs"),
    ),
    problem=(
        (
            "{when}, {hero} could not find {his} {thing}.",
            "{when}, {hero} wanted to play with {his} {thing}, but it was gone.",
            "{when}, {hero} lost {his} {thing}.",
        ),
        ("{He} was very sad.", "{He} wanted to cry.", "It was {his} favorite thing.", ""),
        (
            "{He} looked {wrong}, but it was not there. {He} looked {also_wrong}, but it was not "
            "there either.",
            "First {he} looked {wrong}. Then {he} looked {also_wrong}. The {thing} was not there.",
        ),
        (
            '{pal} came to help. "Where did you have it last?" {pal_he} asked.',
            '"Do not worry," said {pal}. "Where were you when you had it?"',
        ),
        (
            '{hero} thought hard. "{memory}!" {he} said.',
            '{hero} closed {his} eyes and thought. "I know! {memory}," {he} said.',
        ),
    ),
    result=(
        (
            "They ran to {place} and looked {spot}. There was the {thing}!",
            "So they went back to {place}. {Spot} was the {thing}!",
        ),
        (
            '"Thank you for helping me think," said {hero}.',
            "{hero} jumped for joy and thanked {pal}.",
            '"We found it!" they shouted together.',
        ),
    ),
    endings=(
        "After that, {hero} always put the {thing} back in its place.",
        "{hero} held the {thing} tight and did not lose it again.",
        *_ENDINGS,
    ),
)

_STUCK = _Plot(
    words=(
        (
            {
                "thing": "kite",
                "cause": "a strong wind blew the kite into a tall tree",
                "try": "{He} jumped as high as {he} could, but the branch was too high.",
                "tool": "a long ladder",
                "use": "{pal} held the ladder while {hero} climbed up",
                "free": "pulled the kite out of the leaves",
            },
            {
                "thing": "ball",
                "cause": "{he} kicked the ball onto the roof",
                "try": "{He} threw a stick at it, but the ball did not move.",
                "tool": "a ladder from the barn",
                "use": "{pal} held the ladder while {hero} climbed up",
                "free": "rolled the ball down into the grass",
            },
            {
                "thing": "boat",
                "cause": "the toy boat floated to the middle of the pond",
                "try": "{He} reached out {his} arm, but the boat was too far away.",
                "tool": "a long stick",
                "use": "{pal} held {his} other hand while {hero} reached out with the stick",
                "free": "pulled the boat back to the shore",
            },
            {
                "thing": "hat",
                "cause": "the wind took {his} hat and dropped it in the river",
                "try": "{He} ran along the river, but the water was too fast.",
                "tool": "a fishing net",
                "use": "they waited at the bridge, and {hero} put the net into the water",
                "free": "caught the hat as it came by",
            },
            {
                "thing": "coin",
                "cause": "{his} shiny coin fell into a crack in the floor",
                "try": "{He} tried with {his} fingers, but the crack was too small.",
                "tool": "a bit of sticky honey and a thin stick",
                "use": "{hero} put the honey on the stick while {pal} held a lamp",
                "free": "lifted the coin out of the crack",
            },
            {
                "thing": "balloon",
                "cause": "the string slipped and the balloon flew up to the ceiling",
                "try": "{He} stood on {his} toes, but the string was too high.",
                "tool": "a chair and a wooden spoon",
                "use": "{pal} held the chair while {hero} stood on it",
                "free": "caught the string with the spoon",
            },
        ),
    ),
    problem=(
        (
            "{when}, {hero} was playing with {his} {thing}.",
            "{when}, {hero} took {his} {thing} and went to play.",
        ),
        ("Suddenly, {cause}.", "Then {cause}.", "But {cause}."),
        ('"Oh no!" cried {hero}. "My {thing}!"', '"Oh no!" said {hero}. "What can I do?"'),
        ("{try}",),
        ("{He} sat down and felt sad.", "{He} was ready to give up.", "{He} began to cry."),
        (
            'Then {pal} came by. "Let us think," {pal_he} said. "We need {tool}."',
            'But {pal} had an idea. "I know what we need," {pal_he} said. "We need {tool}!"',
        ),
    ),
    result=(
        (
            "They found {tool}. {Use}. Slowly and carefully, {he} {free}.",
            "Soon they came back with {tool}. {Use}. At last, {he} {free}.",
        ),
        ('"We did it!" they shouted.', '"Hooray!" said {pal}.', '"Thank you, {pal}!" said {hero}.'),
    ),
    endings=("{hero} learned that two friends can do more than one.", *_OUTDOOR_ENDINGS),
)

_FEAR = _Plot(
    words=(
        (
            {
                "fear": "the dark",
                "start": "One night, the light went out, and the room was black",
                "sign": "There was a tall shape in the corner",
                "truth": "it was only a coat on a chair",
                "comfort": "a small lamp",
            },
            {
                "fear": "thunder",
                "start": "One evening, dark clouds came, and it began to rain",
                "sign": "There was a loud boom over the house",
                "truth": "it was only the clouds bumping in the sky",
                "comfort": "a warm blanket",
            },
            {
                "fear": "the old barn",
                "start": "One day, they walked past the old barn",
                "sign": "There was a strange sound inside",
                "truth": "it was only a baby goat who wanted milk",
                "comfort": "a bright lamp",
            },
            {
                "fear": "deep water",
                "start": "One summer day, they came to the lake",
                "sign": "Something moved under the water",
                "truth": "it was only a little green turtle",
                "comfort": "a big swimming ring",
            },
            {
                "fear": "the forest",
                "start": "One evening, they had to walk home through the forest",
                "sign": "Two yellow eyes looked out of a bush",
                "truth": "it was only a sleepy old owl",
                "comfort": "a little whistle",
            },
            {
                "fear": "the attic",
                "start": "One rainy day, they went up the stairs to the attic",
                "sign": "Something white moved in the corner",
                "truth": "it was only a sheet in the wind",
                "comfort": "a candle",
            },
        ),
    ),
    problem=(
        (
            "{hero} was afraid of {fear}.",
            "There was one thing that {hero} did not like: {he} was afraid of {fear}.",
        ),
        ("{start}.",),
        ("{sign}. {hero} began to shake.", "{sign}. {hero} wanted to run away."),
        ('"I am scared," {he} whispered.', '"What is that?" {he} asked in a small voice.'),
        (
            '{pal} took {his} hand and gave {him} {comfort}. "Let us look together," {pal_he} said.',
            '"I am here with you," said {pal}, and {pal_he} gave {him} {comfort}.',
        ),
    ),
    result=(
        (
            "{hero} took a deep breath and went closer. Then {he} began to laugh, for {truth}!",
            "Step by step, {hero} went to look. {He} saw that {truth}.",
        ),
        (
            '"I was scared, but I looked," {he} said. {He} felt very brave.',
            '"You were brave," said {pal}.',
        ),
    ),
    endings=(
        "After that, {hero} was not afraid of {fear} anymore.",
        "{hero} learned that scary things look smaller with a friend.",
        *_ENDINGS,
    ),
)

_SHARE = _Plot(
    words=(
        (
            {"toy": "swing", "place": "the park", "fun": "go up high", "turns": "push each other"},
            {"toy": "red bike", "place": "the playground", "fun": "ride fast", "turns": "ride in turns"},
            {
                "toy": "drum",
                "place": "the music school",
                "fun": "make a loud noise",
                "turns": "play one song each",
            },
            {
                "when": "One winter day",
                "toy": "sled",
                "place": "the snowy hill",
                "fun": "slide down",
                "turns": "sit on it together",
            },
            {
                "toy": "paint box",
                "place": "the school",
                "fun": "paint the sky",
                "turns": "paint one big picture together",
            },
            {
                "toy": "shovel",
                "place": "the beach",
                "fun": "dig a deep hole",
                "turns": "build one big castle together",
            },
        ),
        _choices("sound", "pulled and pulled", "shouted at each other", "would not let go"),
    ),
    problem=(
        (
            "{when}, {hero} and {pal} went to {place}. There they saw a {toy}.",
            "{when}, the two friends found a {toy} at {place}.",
        ),
        ('"I want to {fun}!" said {hero}. "No, it is my turn!" said {pal}.',),
        ("They both wanted the {toy}, and they {sound}.", "They both held the {toy} and {sound}."),
        (
            "{pal} fell down and began to cry. {hero} felt bad.",
            "In the end, {pal} sat down under a tree and did not say a word. {hero} felt sad.",
            "{pal} walked away with tears in {pal_his} eyes. Now {hero} had the {toy}, but it was no "
            "fun to be alone.",
        ),
    ),
    result=(
        (
            '{hero} went to {pal}. "I am sorry," {he} said. "We can share. Let us {turns}."',
            '"I am sorry, {pal}," said {hero}. "It is for you too. We can {turns}."',
        ),
        ('{pal} smiled. "I am sorry too," {pal_he} said.', '"That is a good idea," said {pal}.'),
        (
            "So they shared the {toy}, and it was much more fun.",
            "They played with the {toy} all day.",
        ),
    ),
    endings=("{hero} learned that sharing makes things better.", *_OUTDOOR_ENDINGS),
)

_RESCUE = _Plot(
    words=(
        (
            {
                "animal": "bird",
                "trouble": "had a hurt wing and could not fly",
                "care": "made a soft nest in a box and gave it water",
                "well": "its wing was strong again, and it flew up into the sky",
                "thanks": "came back every morning to sing at the window",
            },
            {
                "when": "One rainy day",
                "animal": "kitten",
                "trouble": "was wet and cold from the rain",
                "care": "dried it with a towel and gave it warm milk",
                "well": "it was warm and dry, and it began to purr",
                "thanks": "followed them everywhere",
            },
            {
                "animal": "lamb",
                "trouble": "could not find its mother",
                "care": "carried it over the hill and called for the sheep",
                "well": "a big sheep came running, and the lamb jumped with joy",
                "thanks": "ran to the fence each time they came by",
            },
            {
                "animal": "turtle",
                "trouble": "lay on its back and could not get up",
                "care": "turned it over and brought it some green leaves",
                "well": "it could walk again, and it went slowly back to the pond",
                "thanks": "lifted its head out of the water to say hello",
            },
            {
                "animal": "bee",
                "trouble": "was too tired to fly",
                "care": "put a drop of honey on a leaf and waited",
                "well": "it drank the honey and flew back to its flowers",
                "thanks": "danced around their heads",
            },
            {
                "animal": "fish",
                "trouble": "was trapped in a small puddle",
                "care": "filled a bucket with water and put it in",
                "well": "they let it go in the river, and it swam away fast",
                "thanks": "came to the shore each time they called",
            },
        ),
        _choices("way", "On the way to the lake", "Behind the house", "Near the bridge", "By the road"),
    ),
    problem=(
        ("{when}, {hero} and {pal} went for a walk.", "{when}, the two friends played outside."),
        ("{way}, they heard a small sound.", "{way}, {hero} saw something move."),
        ("It was a little {animal}. It {trouble}.", "There was a little {animal} that {trouble}."),
        ('"Poor {animal}," said {hero}.', '"We must help it," said {hero}.'),
        ('"But how?" asked {pal}.', "They thought about what it needed.", ""),
    ),
    result=(
        ("So they {care}.", "{hero} had an idea. They {care}."),
        ("Soon {well}!", "After some time, {well}."),
        ("From then on, the {animal} {thanks}.", "The little {animal} {thanks}."),
    ),
    endings=(
        "{hero} and {pal} had a new friend.",
        "It feels good to help someone who is small.",
        *_OUTDOOR_ENDINGS,
    ),
)

_BUILD = _Plot(
    words=(
        (
            {
                "work": "build a tall tower of blocks",
                "thing": "tower",
                "fail": "the tower fell down with a crash",
                "reason": "The blocks at the bottom are too small",
                "fix": "put the biggest blocks at the bottom",
                "success": "The tower stood as tall as a chair",
            },
            {
                "work": "bake a cake",
                "thing": "cake",
                "fail": "the cake came out flat and hard",
                "reason": "We forgot the eggs",
                "fix": "mixed in two eggs and stirred for a long time",
                "success": "The cake was round and sweet",
            },
            {
                "work": "build a castle of sand",
                "thing": "castle",
                "fail": "a wave came and washed the castle away",
                "reason": "We are too close to the water",
                "fix": "moved up the beach and dug a deep ditch",
                "success": "The castle stayed dry",
            },
            {
                "when": "One winter day",
                "work": "make a snowman",
                "thing": "snowman",
                "fail": "the head of the snowman rolled off",
                "reason": "The head is bigger than the body",
                "fix": "made a smaller head and pressed it down well",
                "success": "The snowman stood in the yard with a carrot nose",
            },
            {
                "work": "plant a garden",
                "thing": "garden",
                "fail": "all the little plants hung their heads",
                "reason": "They are thirsty",
                "fix": "brought water every morning and every night",
                "success": "The garden was full of red and yellow flowers",
            },
            {
                "work": "build a boat of wood",
                "thing": "boat",
                "fail": "water came in and the boat sank",
                "reason": "There is a hole in the floor",
                "fix": "closed the hole with a new piece of wood",
                "success": "The boat floated like a duck",
            },
        ),
    ),
    problem=(
        ("{when}, {hero} and {pal} wanted to {work}.", '{when}, {hero} said, "Let us {work}!"'),
        ("They worked all morning.", "They worked hard.", "They sang while they worked."),
        ("But then {fail}.", "But when they were almost done, {fail}."),
        (
            "{hero} was angry and stamped {his} foot.",
            '"I will never try again," said {hero}.',
            "{hero} was so sad that {he} wanted to stop.",
        ),
        ('But {pal} looked closely. "{reason}," {pal_he} said.', '"Look," said {pal}. "{reason}."'),
    ),
    result=(
        ("So they tried again. This time they {fix}.", "They started again, and they {fix}."),
        ("{success}!", "And it worked! {success}."),
        (
            '"I am glad that we tried again," said {hero}.',
            '"It is the best {thing} of all," said {pal}.',
            "Everyone came to see the {thing}.",
        ),
    ),
    endings=("{hero} learned that a mistake can show you what to do.", *_OUTDOOR_ENDINGS),
)

_LEARN = _Plot(
    words=(
        (
            {
                "skill": "ride a bike",
                "fail": "fell into the grass",
                "tip": "Look ahead and keep your feet moving",
                "success": "rode all the way around the park",
            },
            {
                "skill": "swim",
                "fail": "got water in {his} nose",
                "tip": "Kick your legs and breathe slowly",
                "success": "swam across the pond",
            },
            {
                "skill": "whistle",
                "fail": "only blew air",
                "tip": "Make your mouth small and round",
                "success": "whistled a whole song",
            },
            {
                "skill": "tie shoes",
                "fail": "made a big knot",
                "tip": "Make two ears like a bunny and cross them",
                "success": "tied both shoes all alone",
            },
            {
                "skill": "catch a ball",
                "fail": "dropped it",
                "tip": "Watch the ball and hold your hands close",
                "success": "caught ten balls in a row",
            },
            {
                "skill": "read",
                "fail": "mixed up the letters",
                "tip": "Say each sound and then put them together",
                "success": "read a whole page out loud",
            },
            {
                "when": "One winter day",
                "skill": "skate on the ice",
                "fail": "sat down hard on the ice",
                "tip": "Bend your knees and push to the side",
                "success": "skated in a big circle",
            },
        ),
        _choices("days", "for three days", "the whole week", "every day after lunch", "again and again"),
    ),
    problem=(
        (
            "{hero} wanted to learn how to {skill}.",
            "All the others knew how to {skill}, but {hero} did not.",
        ),
        (
            "{when}, {he} tried, but {he} {fail}.",
            "{when}, {he} tried for the first time and {fail}.",
        ),
        ("{He} tried again and {fail} once more.", '"It is too hard," {he} said.'),
        (
            '"I could not do it at first," said {pal}. "{tip}."',
            '{pal} showed {him} how. "{tip}," {pal_he} said.',
        ),
    ),
    result=(
        ("So {hero} practiced {days}.", "{hero} listened and practiced {days}."),
        ("Then, at last, {he} {success}!", "And one day, {he} {success}."),
        (
            '"Look at me!" {he} shouted. {pal} clapped {pal_his} hands.',
            "{pal} cheered, and {hero} was very proud.",
            '"You did it!" cried {pal}.',
        ),
    ),
    endings=("{hero} learned that hard things get easy when you practice.", *_OUTDOOR_ENDINGS),
)

_GIFT = _Plot(
    words=(
        (
            {"who": "mom", "she": "she", "her": "her"},
            {"who": "grandma", "she": "she", "her": "her"},
            {"who": "dad", "she": "he", "her": "his"},
            {"who": "grandpa", "she": "he", "her": "his"},
            {"who": "teacher", "she": "she", "her": "her"},
        ),
        (
            {
                "loves": "flowers",
                "idea": "a card with flowers on it",
                "means": "some paper and paint",
                "work": "painted red, blue and yellow flowers",
            },
            {
                "loves": "birds",
                "idea": "a house for birds",
                "means": "some old wood",
                "work": "cut a round door for the birds",
            },
            {
                "loves": "the sea",
                "idea": "a necklace of shells",
                "means": "a bag of shells and a string",
                "work": "put the white shells on the string, one by one",
            },
            {
                "loves": "music",
                "idea": "a new song",
                "means": "a little drum and a bell",
                "work": "made up a song with three parts",
            },
            {
                "loves": "sweet things",
                "idea": "a plate of cookies",
                "means": "flour, butter and honey",
                "work": "baked cookies that looked like stars",
            },
            {
                "loves": "stories",
                "idea": "a little book",
                "means": "ten sheets of paper",
                "work": "wrote a story and drew a picture on every page",
            },
        ),
    ),
    problem=(
        (
            "{when}, {hero} remembered that it was the birthday of {his} {who}.",
            "It was almost the birthday of {his} {who}.",
        ),
        (
            "{hero} wanted to give something nice, but {he} had no money.",
            "But {hero} had no gift and no money to buy one.",
        ),
        (
            '"What can I do?" {he} asked {pal}. "What does {she} love?" asked {pal}.',
            '{hero} told {pal} about it. "What does {she} like best?" {pal_he} asked.',
        ),
        ('"{She} loves {loves}," said {hero}.', '{hero} thought. "{Loves}!" {he} said.'),
        ('"Then you can make {idea}," said {pal}.', '"Then let us make {idea}!" said {pal}.'),
    ),
    result=(
        ("They found {means}, and {hero} {work}.", "{pal} brought {means}. {hero} {work}."),
        (
            "When {his} {who} saw the gift, {she} smiled and gave {him} a hug.",
            "{hero} gave it to {his} {who}, and {her} eyes began to shine.",
        ),
        (
            '"It is the best gift of all, because you made it," {she} said.',
            '"Thank you! I will keep it always in my heart," {she} said.',
        ),
    ),
    endings=("{hero} learned that the best gifts come from the heart.", *_ENDINGS),
)

_TRUTH = _Plot(
    words=(
        (
            {"who": "mom", "she": "she", "her": "her"},
            {"who": "grandma", "she": "she", "her": "her"},
            {"who": "dad", "she": "he", "her": "him"},
            {"who": "grandpa", "she": "he", "her": "him"},
        ),
        (
            {
                "deed": "broke the blue vase",
                "how": "was running in the house",
                "hide": "put the pieces under the rug",
                "repair": "fixed the vase with glue",
            },
            {
                "deed": "ate all the cookies",
                "how": "was hungry before dinner",
                "hide": "hid the empty jar behind the curtain",
                "repair": "baked new cookies",
            },
            {
                "deed": "spilled juice on the white rug",
                "how": "was dancing with a cup",
                "hide": "put a pillow on the spot",
                "repair": "washed the rug with soap",
            },
            {
                "deed": "tore a page of the big book",
                "how": "was turning the pages too fast",
                "hide": "hid the book in the closet",
                "repair": "fixed the page with tape",
            },
            {
                "deed": "left the gate open, and the hens ran away",
                "how": "was in a hurry",
                "hide": "closed the gate and said nothing",
                "repair": "went out and found all the hens",
            },
        ),
    ),
    problem=(
        ("{when}, {hero} {how}. {He} {deed}.",),
        ('"Oh no," {he} thought. "Now {Who} will be angry."', "{His} heart began to beat fast."),
        ("{He} {hide}.", "So {he} {hide}, and nobody saw it."),
        (
            "But {he} could not play and {he} could not eat. {He} felt bad inside.",
            "All day long, {he} had a heavy feeling in {his} tummy.",
        ),
        (
            'Then {pal} came. "Tell the truth," {pal_he} said. "You will feel better."',
            '"You should tell the truth," said {pal}. "I will come with you."',
        ),
    ),
    result=(
        (
            '{hero} went to {his} {who}. "I am sorry," {he} said. "I {deed}."',
            'So {hero} told {his} {who} everything. "It was me, and I am sorry," {he} said.',
        ),
        (
            '{His} {who} was not angry. "Thank you for telling me," {she} said.',
            'At first {his} {who} was quiet. Then {she} smiled. "It is good that you told me," {she} said.',
        ),
        ("Then they {repair} together.", "{hero} helped {her}, and they {repair}."),
    ),
    endings=(
        "{hero} felt light and happy again.",
        "{hero} learned that the truth makes the heart light.",
        *_ENDINGS,
    ),
)

_WEATHER = _Plot(
    words=(
        (
            {
                "when": "One Sunday",
                "plan": "have a picnic",
                "place": "on the hill",
                "weather": "big gray clouds came, and it began to rain",
                "shelter": "made a tent of two chairs and a blanket",
                "fun": "had the picnic on the floor",
            },
            {
                "when": "One windy morning",
                "plan": "fly a kite",
                "place": "in the field",
                "weather": "the wind stopped, and not one leaf moved",
                "shelter": "tied the kite to a bike",
                "fun": "rode so fast that the kite flew up",
            },
            {
                "when": "One summer day",
                "plan": "swim",
                "place": "at the lake",
                "weather": "it got so cold that they had to wear coats",
                "shelter": "picked up flat stones from the shore",
                "fun": "made the stones jump over the water",
            },
            {
                "when": "One evening",
                "plan": "look at the stars",
                "place": "on the roof",
                "weather": "fog came, and they could not see the sky",
                "shelter": "made small holes in a box and put a lamp inside",
                "fun": "watched a hundred stars on the ceiling",
            },
            {
                "when": "One winter day",
                "plan": "play ball",
                "place": "in the yard",
                "weather": "white snow fell and covered the ground",
                "shelter": "put on warm boots and gloves",
                "fun": "threw snowballs at a tree",
            },
        ),
        _choices("food", "bread and cheese", "apples and cake", "warm soup", "cookies and milk"),
    ),
    problem=(
        (
            "{when}, {hero} and {pal} wanted to {plan} {place}.",
            "{hero} and {pal} had waited all week to {plan} {place}.",
        ),
        ("They packed {food}.", "They took {food} with them.", "They brought {food}."),
        ("But then {weather}.", "But when they got there, {weather}."),
        (
            '"Now our day is ruined," said {hero}. {He} looked at {his} feet.',
            '{hero} was sad. "It is not fair," {he} said.',
        ),
        ('"Wait," said {pal}. "I have an idea."', "{pal} looked around and began to smile."),
    ),
    result=(
        ("They {shelter}. Then they {fun}.", "First they {shelter}. After that, they {fun}."),
        ("They ate the {food} and told funny stories.", "The {food} tasted very good."),
        ('"This is even better!" said {hero}.', '"I like this day after all," said {hero}.'),
    ),
    endings=("{hero} learned that a new plan can be a good plan.", *_ENDINGS),
)

_KINDNESS = _Plot(
    words=(
        (
            {"animal": "squirrel", "helps": "ran up a tree and looked for the road"},
            {"animal": "bird", "helps": "flew up high and looked for the road"},
            {"animal": "rabbit", "helps": "smelled the ground and found the path"},
            {"animal": "deer", "helps": "knew every path in the forest"},
            {"animal": "mouse", "helps": "asked all the other mice for the way"},
        ),
        (
            {"food": "bread", "amount": "one piece of bread"},
            {"food": "nuts", "amount": "a little bag of nuts"},
            {"food": "cake", "amount": "one small cake"},
            {"food": "berries", "amount": "a cup of berries"},
            {"food": "cheese", "amount": "a bit of cheese"},
        ),
    ),
    problem=(
        (
            "{when}, {hero} and {pal} walked in the forest. They had only {amount} to eat.",
            "{when}, the two friends went into the forest with {amount}.",
        ),
        (
            'They met a thin {animal}. "I am so hungry," said the {animal}.',
            'Under a tree sat a {animal}. "Please, I have not eaten all day," it said.',
        ),
        (
            "{hero} was hungry too, but {he} gave the {animal} half of the {food}.",
            '"You can have my {food}," said {hero}, and the {animal} ate everything.',
        ),
        (
            "Then it got dark, and the friends could not find the way home.",
            "Later, the sun went down. They were lost!",
        ),
        ("{pal} began to cry.", '"I want to go home," said {pal}.', "They were cold and scared."),
    ),
    result=(
        (
            'But then they heard a voice. "You helped me. Now I will help you," said the {animal}.',
            'Then the {animal} came back. "You were kind to me," it said. "Follow me!"',
        ),
        ("The {animal} {helps}.",),
        ("Soon they saw the lights of home.", "It led them all the way to their door."),
        ('"Thank you, dear {animal}!" they said.', ""),
    ),
    endings=("{hero} learned that kindness comes back to you.", *_ENDINGS),
)

_PLOTS = (*(_LOST, _STUCK, _FEAR, _SHARE, _RESCUE, _BUILD, _LEARN, _GIFT, _TRUTH, _WEATHER, _KINDNESS),)


def generate_stories(count: int, seed: int = 0) -> list[str]:
    """Makes simple children's stories, the same ones for the same seed on every machine.

    Args:
        count: number of stories; the first ones do not depend on it.
        seed: chooses the stories.

    Returns:
        `count` stories of about 60 to 150 words in three paragraphs.

    Raises:
        ValueError: `count` is negative.
    """
    if count < 0:
        raise ValueError(f"`count` must not be negative. Received: count={count}")
    rng = random.Random(seed)
    return [_tell(rng) for _ in range(count)]


def _tell(rng: random.Random) -> str:
    words = _draw_characters(rng)
    words |= _with_capitals({"home": rng.choice(_HOMES), "when": rng.choice(_WHEN)})
    plot = rng.choice(_PLOTS)
    for choices in plot.words:
        # The words of a plot may name the characters, so they are templates themselves.
        chosen = rng.choice(choices).items()
        words |= _with_capitals({key: word.format_map(words) for key, word in chosen})
    paragraphs = ((_OPENINGS, _FRIENDSHIPS), plot.problem, (*plot.result, plot.endings))
    return "\n\n".join(
        " ".join(filter(None, (rng.choice(sentence) for sentence in paragraph))) for paragraph in paragraphs
    ).format_map(words)


def _draw_characters(rng: random.Random) -> dict[str, str]:
    """The hero and a friend with the other pronoun, so that "he" and "she" are never in doubt."""
    hero, friend = rng.sample((("boy", _BOYS, _HE), ("girl", _GIRLS, _SHE)), 2)
    words = {}
    for prefix, (child, names, pronouns) in (("", hero), ("pal_", friend)):
        kind = child if rng.random() < 0.5 else rng.choice(_ANIMALS)
        words[prefix + "name"] = rng.choice(names)
        words[prefix + "kind"] = f"{rng.choice(_TRAITS)} little {kind}"
        words |= {prefix + key: pronoun for key, pronoun in pronouns.items()}
    words["hero"] = words.pop("name")
    words["pal"] = words.pop("pal_name")
    return _with_capitals(words)


def _with_capitals(words: dict[str, str]) -> dict[str, str]:
    """Adds "Key": "Word" for each "key": "word"."""
    return words | {_capitalize(key): _capitalize(word) for key, word in words.items()}


def _capitalize(word: str) -> str:
    return word[:1].upper() + word[1:]
