"""The things of the world "things": their names, the words for them, and their icons in Fluent Emoji Flat.

Each thing has one look that differs clearly from the others: of several similar emoji only one is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

__all__ = ["THINGS", "Thing", "find_thing", "thing_names"]

# One thing a line: its name, then `=icon` where the icon has another name, then further words for it after a bar.
_TABLE: dict[str, str] = {
    "animals": """
cat =cat-face | kitten, kitty
dog =dog-face | puppy
fox
bear
panda
tiger =tiger-face
lion
cow =cow-face
pig =pig-face | piglet
frog | toad
monkey =monkey-face | ape
rabbit =rabbit-face | bunny
mouse =mouse-face
wolf
horse =horse-face | pony
unicorn
elephant
giraffe
zebra
camel
chicken | hen
chick =baby-chick
penguin
owl
duck
parrot
flamingo
swan
turtle | tortoise
snake
dinosaur =sauropod | dino
dragon =dragon-face
whale =spouting-whale
dolphin
fish
octopus
shark
crab
snail
butterfly
bee =honeybee
ladybug =lady-beetle | ladybird
spider
""",
    "food": """
apple =red-apple | red apple
green apple
banana
pear
tangerine | mandarin
lemon
watermelon
grapes | grape
strawberry
cherries | cherry
pineapple
kiwi =kiwi-fruit
avocado
tomato
eggplant | aubergine
carrot
broccoli
mushroom
chili =hot-pepper | pepper
bread | loaf
croissant
pretzel
cheese =cheese-wedge
egg =cooking | fried egg
hamburger | burger
fries =french-fries | chips
hot dog | hotdog, sausage
pizza
doughnut | donut
cookie | biscuit
cake =birthday-cake | birthday cake
cupcake | muffin
ice cream =soft-ice-cream | icecream
lollipop
coffee =hot-beverage | tea
beer =beer-mug
""",
    "plants": """
tree =deciduous-tree | oak
fir =evergreen-tree | pine, spruce
palm =palm-tree | palm tree
cactus
sunflower
tulip
rose
blossom =cherry-blossom | flower
clover =four-leaf-clover
maple leaf =maple-leaf | leaf
""",
    "vehicles": """
car =automobile | automobile
taxi | cab
bus
ambulance
fire engine =fire-engine | fire truck
tractor
bicycle | bike
train =locomotive | steam train, locomotive
airplane | plane, aeroplane
helicopter
rocket | spaceship
ufo =flying-saucer | flying saucer
sailboat | boat
anchor
""",
    "faces": """
smile =slightly-smiling-face | smiley, smiling face
laughing face =face-with-tears-of-joy | laughing
crying face =loudly-crying-face | crying
angry face =pouting-face | angry
sunglasses face =smiling-face-with-sunglasses | cool face
heart eyes =smiling-face-with-heart-eyes | in love
sleeping face =sleeping-face | sleeping
clown =clown-face
robot
alien
ghost
skull
pumpkin =jack-o-lantern | jack-o-lantern
snowman
""",
    "weather": """
sun
cloud
rain =cloud-with-rain | rain cloud
snowflake | snow
rainbow
moon =crescent-moon
star
lightning =high-voltage | thunderbolt
fire | flame
drop =droplet | raindrop
umbrella
""",
    "buildings": """
house | home
castle
church
tower =tokyo-tower | television tower
volcano
mountain =snow-capped-mountain
island =desert-island
""",
    "objects": """
heart =red-heart | red heart
balloon
present =wrapped-gift | gift
crown
key
bell
guitar
ball =soccer-ball | football
basketball
trophy | cup
book =closed-book
clock =alarm-clock | alarm clock
lamp =light-bulb | light bulb
gem =gem-stone | diamond, jewel
hat =top-hat | top hat
glasses
shirt =t-shirt | t-shirt
""",
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing: its name, every word for it (the name first), its icon and its category."""

    name: str
    words: tuple[str, ...]
    icon: str
    category: str


@cache
def _things() -> dict[str, Thing]:
    found: dict[str, Thing] = {}
    for category, lines in _TABLE.items():
        for line in lines.strip().splitlines():
            first, _, others = line.partition("|")
            name, _, icon = (part.strip() for part in first.partition("="))
            words = [word.strip() for word in others.split(",") if word.strip()]
            found[name] = Thing(name, (name, *words), icon or name.replace(" ", "-"), category)
    return found


THINGS = tuple(_things().values())


def thing_names() -> tuple[str, ...]:
    """Return the name of each thing, in the order of the table."""
    return tuple(_things())


def find_thing(name: str) -> Thing:
    """Return the thing with this name.

    Raises:
        KeyError: no thing has it.
    """
    return _things()[name]
