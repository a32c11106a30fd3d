"""Names of the objects that the small model knows, and the emoji that draw each of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CORE_NAMES",
    "HELD_OUT_NAMES",
    "KEPT_OUT_3D",
    "MODEL_CLASSES",
    "OBJECT_CLASSES",
    "ObjectClass",
    "trained_classes",
    "with_article",
]


@dataclass(frozen=True)
class ObjectClass:
    """A noun and its drawings.

    Attributes:
        name: the noun in captions.
        kind: ``"live"`` or ``"object"``.
        emoji: short names in ``emoji-datasource``, the most typical first; one drawing per style
            each.
    """

    name: str
    kind: str
    emoji: tuple[str, ...]


# "name" draws itself; "name=a+b" is drawn by emoji a and b.
_LIVE = """
dog=dog2+dog+poodle+service_dog+guide_dog; cat=cat2+cat+black_cat; cow=cow+cow2; tiger=tiger+tiger2;
rabbit=rabbit+rabbit2; horse=horse+racehorse; pig=pig+pig2; mouse=mouse+mouse2;
monkey=monkey_face+monkey; panda=panda_face; bear; koala; lion=lion_face; fox=fox_face; wolf; frog;
elephant; giraffe=giraffe_face; zebra=zebra_face; sheep; crocodile; turtle; snake; snail;
whale=whale+whale2; dolphin; shark; fish=fish+tropical_fish; octopus; crab; bee; ladybug; butterfly;
spider; bird; owl; duck; penguin; chick=baby_chick+hatched_chick; rooster; parrot; flamingo;
unicorn=unicorn_face; dinosaur=sauropod+t-rex; dragon=dragon_face+dragon;
camel=camel+dromedary_camel; bat; hedgehog
"""
_OBJECTS = """
cactus; tulip; rose; sunflower; tree=deciduous_tree+evergreen_tree; palm tree=palm_tree; mushroom;
clover=four_leaf_clover+shamrock; apple=apple+green_apple; banana; strawberry; watermelon; lemon;
pineapple; pear; peach; tomato; eggplant; carrot; broccoli; avocado; hamburger; pizza; taco;
hot dog=hotdog; donut=doughnut; cookie; cake=birthday+cake; cupcake; ice cream=icecream+ice_cream;
lollipop; croissant; pretzel; pumpkin=jack_o_lantern; car=car+oncoming_automobile;
taxi=taxi+oncoming_taxi; bus=bus+oncoming_bus; truck; tractor; airplane; helicopter; rocket;
sailboat=boat; ship; bicycle=bike; fire truck=fire_engine; guitar; violin; trumpet; saxophone;
drum=drum_with_drumsticks; house; castle=european_castle; tent;
umbrella=umbrella+umbrella_on_ground; balloon; gift; soccer ball=soccer; basketball;
teddy bear=teddy_bear; crown; hat=tophat; shirt; dress; sneaker=athletic_shoe;
boot; backpack=school_satchel; handbag; camera; clock=alarm_clock;
television=tv; book=closed_book+green_book+blue_book+orange_book; key; bell; hammer;
light bulb=bulb; candle; chair; anchor; star; snowman=snowman_without_snow+snowman; diamond=gem;
trophy; teapot; bucket
"""

# Never shown in any style while training; they measure generalisation.
HELD_OUT_NAMES = ("hedgehog", "bat", "taco", "pretzel", "saxophone", "anchor", "bucket", "camera")

# Drawings of the 3D style that no training of the text-to-image model shows: those of the subjects,
# and after them their near doubles (``python -m cntlora_core.mini.making.near_doubles``).
KEPT_OUT_3D = (
    *("black_cat", "bird", "penguin", "octopus", "dragon_face"),
    *("school_satchel", "boot", "alarm_clock", "balloon", "tent"),
    *("cat2", "dragon", "purse", "round_pushpin"),
)

# The names that the classifier tells apart; those of ``MODEL_CLASSES`` are among them.
CORE_NAMES = (
    *("dog", "cat", "bird", "penguin", "octopus", "dragon", "fish", "owl", "fox", "elephant"),
    *("apple", "banana", "strawberry", "hamburger", "pizza", "cake", "car", "rocket", "airplane"),
    *("guitar", "house", "tent", "balloon", "backpack", "boot", "clock", "hat", "teddy bear"),
    *("tree", "book"),
)


def _parse(table: str, kind: str) -> list[ObjectClass]:
    classes = []
    for entry in table.replace("\n", " ").split(";"):
        name, _, drawings = entry.strip().partition("=")
        classes.append(ObjectClass(name, kind, tuple((drawings or name).split("+"))))
    return classes


OBJECT_CLASSES: tuple[ObjectClass, ...] = tuple(_parse(_LIVE, "live") + _parse(_OBJECTS, "object"))

# What the text-to-image model learns: few objects, each by one emoji, the same one in every style.
# The subjects' classes are among them.
MODEL_CLASSES: tuple[ObjectClass, ...] = tuple(
    _parse(
        """dog; cat; bird; penguin; octopus; dragon=dragon_face; owl; fox=fox_face; fish;
        elephant""",
        "live",
    )
    + _parse(
        """apple; banana; strawberry; hamburger; cake=birthday; car; rocket; house; tent; balloon;
        backpack=school_satchel; boot; clock=alarm_clock; hat=tophat; teddy bear=teddy_bear;
        tree=deciduous_tree""",
        "object",
    )
)


def trained_classes() -> tuple[ObjectClass, ...]:
    """The classes that training may show."""
    return tuple(
        object_class for object_class in OBJECT_CLASSES if object_class.name not in HELD_OUT_NAMES
    )


def with_article(noun: str) -> str:
    """``"apple"`` -> ``"an apple"``."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "use"))
    return f"{'an' if vowel else 'a'} {noun}"
