"""Words and made-up prose for prompts, and how they are drawn.

Drawn by `random()` alone: it is what Python promises never to change, and a figure must be repeatable.
"""

import random
import uuid
from collections.abc import Callable, Sequence


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = words(
    """
    amber anchor apple arrow autumn badge basket beacon birch blanket bottle branch bridge bronze bucket butter
    button candle canyon carpet castle cedar cherry circle cloud clover coffee copper coral cotton cradle crystal
    curtain dagger daisy desert diamond dolphin dragon eagle ember engine falcon feather fiddle flame forest
    fossil fountain garden garlic ginger glacier granite hammer harbor hazel helmet hollow honey horizon island
    ivory jacket jasmine jungle kettle ladder lantern lemon lily linen lizard magnet maple marble meadow mirror
    mountain needle nickel oasis ocean olive onion orange orchid otter oyster paddle palace paper parrot pebble
    pencil pepper pillow pirate planet pocket pottery puzzle rabbit ribbon river rocket saddle sailor salmon
    shadow silver spider spiral summer sunset table temple thistle thunder tiger timber tulip tunnel turtle valley
    velvet violet walnut willow window winter wolf
    """
)
NOUNS = NAMES + words(
    """
    acorn album alley altar apron archer attic avenue bakery balcony balloon bamboo banner barrel beaver bell
    bench berry bishop boulder bracelet brick broom bubble cabin cabinet cactus camel canoe captain caravan carrot
    cave cello chimney cinema cliff coin comet compass cottage cousin cricket crown cushion dancer dentist dinner
    donkey door drawer drum dune easel echo elbow envelope factory farmer fence ferry finger flute fork fortune
    freckle gallery gate giant glove goat grape guitar hamlet harvest hedge heron hotel hunter iceberg igloo
    insect jewel jigsaw journal jug kitchen kite knot lagoon lake lamp leaf ledger leopard letter library lime
    lobster locket loom lunch mango mantle market mask medal melon mill mitten monkey moose mosaic moth museum
    nest notebook novel nurse oar orchard organ owl painter panda parade peach pearl penguin piano pickle pigeon
    pilot pine plum pond poppy porch potato prince pumpkin quarry quilt radio raft railway rainbow raven reef
    robin rope rose rudder sandal school scissors shell shovel singer sled slipper snail sofa sparrow spoon
    squirrel stable statue stove street swan tailor teapot tent theater thimble ticket tower trumpet tractor trail
    uncle vase village violin vulture wagon wallet whale wheel whistle widow windmill wizard yacht zebra
    """
)
ADJECTIVES = words(
    """
    able ancient angry awake bald bitter blank blind bold brave brief bright broad busy calm careful cheap
    cheerful civil clean clear clever clumsy cold common cool crisp cruel curious curly damp dark deaf dear deep
    dense dim distant dizzy dry dull dusty eager early easy elegant empty equal exact faint fair famous fancy fast
    fierce firm flat fond formal fragile free fresh friendly frozen full funny gentle glad golden grand grateful
    gray great greedy green guilty handy happy harsh hasty healthy heavy helpful hidden honest huge humble hungry
    icy idle jolly keen kind large late lazy lean light likely little lively lonely long loose loud lovely loyal
    lucky mad major mellow mild modern modest muddy narrow nasty neat nervous new noble noisy obvious odd old open
    patient perfect plain pleasant polite poor precious pretty proud pure quaint quick quiet rapid rare raw ready
    rich ripe rough round royal rude rusty sad safe salty scarce shallow sharp shiny short shy silent silly simple
    sleepy slim slow small smart smooth soft solid sour spare steady steep sticky stiff strange strict strong
    sturdy sudden sunny sweet swift tall tame tasty tender thick thin tidy tiny tired tough tricky ugly usual
    vague vain vast vivid warm weak wealthy weary wet wide wild wise witty wooden worthy young zealous
    """
)
VERBS = words(
    """
    accept admire admit advise agree allow answer appear applaud argue arrive attend avoid bake balance bathe
    become begin behave believe belong blink boast boil borrow bounce bow breathe build bury calculate camp carry
    carve cause chase chew choose clap climb collect compare complain confess consider contain copy cough count
    crawl create cross cure dance dare decide decorate deliver depend describe deserve destroy develop dig
    disappear discover dive divide drag dream drift drop earn encourage enjoy enter escape examine exist expand
    explain explore fail fasten fetch fold follow forgive gather glow grab greet grin grow guess guide happen
    hatch heal hide hop hover hug hurry imagine improve include inform invent invite jog join juggle knit launch
    learn lend lift listen love manage marry melt mend mourn multiply nod notice obey observe obtain occur offer
    order owe own pardon pause perform permit persuade plant pour practise pray predict prefer prepare pretend
    prevent produce promise prove provide punish quarrel realise receive recognise refuse relax rely remain
    remember remind remove repair repeat replace reply rescue resemble retire rinse scatter scold scrape search
    seem select separate serve sew shiver shrug sigh skip slide smile sneeze soak solve sparkle spill squeeze
    stare steal stretch succeed suffer suggest suppose surround suspect sway swim tease tempt thank tickle tie
    trace trade travel tremble trust tumble twist understand unite untie vanish visit wander warn wash waste wave
    weep welcome whisper wink wipe wish wonder worry wrap yawn yell
    """
)

PEOPLE = words("baker carpenter clerk doctor farmer judge miller nurse painter plumber porter tailor teacher")
DEEDS = (
    "asked about", "forgot", "had heard of", "looked for", "never saw", "often spoke of", "passed", "returned to",
    "sat near", "thought about", "waited outside", "walked past", "wrote about",
)  # fmt: skip
PLACES = words("barn bakery cellar chapel church cottage factory hospital library mill museum office school")
TIMES = (
    "after lunch", "before dawn", "during the holidays", "early in the week", "every other day", "in the rain",
    "late at night", "on the way home", "once a month", "that evening", "until it was dark", "with a friend",
    "without a word",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """A made-up one, of six words at least."""
    who, did, where, when = (pick(rng, words) for words in (PEOPLE, DEEDS, PLACES, TIMES))
    return f"The {who} {did} the {where} {when}."


def pick[T](rng: random.Random, values: Sequence[T]) -> T:
    return values[int(len(values) * rng.random())]


def between(rng: random.Random, low: int, high: int) -> int:
    """Any of low to high - 1."""
    return low + int((high - low) * rng.random())


def shuffled[T](rng: random.Random, values: Sequence[T]) -> list[T]:
    keys = [rng.random() for _ in values]
    return [values[index] for index in sorted(range(len(values)), key=keys.__getitem__)]


def distinct[T](rng: random.Random, count: int, draw: Callable[[random.Random], T]) -> list[T]:
    """What `draw` gives, until there are `count` different ones."""
    found: dict[T, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def places(rng: random.Random, count: int, of: int) -> list[int]:
    """`count` different ones of 0 to of - 1, ascending."""
    return sorted(distinct(rng, count, lambda rng: between(rng, 0, of)))


def number(rng: random.Random, digits: int) -> str:
    return str(between(rng, 10 ** (digits - 1), 10**digits))


def letters(rng: random.Random, count: int, alphabet: str) -> str:
    return "".join(pick(rng, alphabet) for _ in range(count))


def word_pair(rng: random.Random) -> str:
    """An adjective and a noun, as `quiet-harbor`."""
    return f"{pick(rng, ADJECTIVES)}-{pick(rng, NOUNS)}"


def uuid4(rng: random.Random) -> str:
    bits = 0
    for _ in range(4):
        bits = bits << 32 | between(rng, 0, 2**32)
    return str(uuid.UUID(int=bits, version=4))
