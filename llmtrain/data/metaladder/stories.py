"""The stories that give structures their words: four for each. {name} and {other} are people, {things} what is counted, letters numbers.

A story's steps say in words what each step of the structure finds; the equation follows them.
"""

from typing import NamedTuple

NAMES = ("Mia", "Tom", "Ana", "Ben", "Lily", "Omar", "Sara", "Jack", "Nina", "Leo", "Ruth", "Ivan", "Kim", "Paul", "Zoe", "Adam")


class Story(NamedTuple):
    """A wording of a structure."""

    structure: str
    name: str
    question: str
    steps: tuple[str, ...]
    things: tuple[str, ...]


FOOD = ("apples", "pears", "plums", "lemons")
TOYS = ("marbles", "cards", "stickers", "stamps")
SHOP = ("pens", "books", "cups", "hats")
FARM = ("eggs", "carrots", "onions", "pumpkins")

STORIES = (
    Story(
        "gain_loss",
        "gift",
        "{name} has {a} {things}. {name} gets {b} more {things} and then gives {c} to a friend. How many {things} does {name} have now?",
        ("With the new ones {name} has", "After the gift {name} has"),
        TOYS,
    ),
    Story(
        "gain_loss",
        "bus",
        "A bus has {a} people on it. At a stop {b} people get on, and at the next one {c} people get off. How many people "
        "are on the bus now?",
        ("After the first stop there are", "After the next stop there are"),
        ("people",),
    ),
    Story(
        "gain_loss",
        "shelf",
        "There are {a} {things} on a shelf. {name} puts {b} {things} more on it, and later {c} are sold. How many {things} "
        "are on the shelf?",
        ("Filled up, the shelf has", "After the sale it has"),
        SHOP,
    ),
    Story(
        "gain_loss",
        "basket",
        "{name} picks {a} {things} in the morning and {b} in the evening. Then {other} eats {c} of them. How many {things} are left?",
        ("{name} picks", "What is left is"),
        FOOD,
    ),
    Story(
        "two_losses",
        "eaten",
        "{name} has {a} {things}. {name} eats {b} of them and {other} eats {c}. How many {things} are left?",
        ("After {name} there are", "After {other} there are"),
        FOOD,
    ),
    Story(
        "two_losses",
        "stall",
        "A stall has {a} {things}. It sells {b} before noon and {c} after noon. How many {things} does the stall still have?",
        ("At noon it has", "In the evening it has"),
        SHOP,
    ),
    Story(
        "two_losses",
        "game",
        "{name} starts a game with {a} {things}. In the first round {name} loses {b}, in the second round {c}. How many "
        "{things} does {name} have at the end?",
        ("After the first round {name} has", "After the second round {name} has"),
        TOYS,
    ),
    Story(
        "two_losses",
        "pond",
        "There are {a} ducks on a pond. First {b} ducks fly away, then {c} more. How many ducks stay on the pond?",
        ("After the first there are", "After the others there are"),
        ("ducks",),
    ),
    Story(
        "groups_extra",
        "boxes",
        "{name} has {a} boxes with {b} {things} in each box, and {c} {things} without a box. How many {things} does {name} have?",
        ("In the boxes there are", "With the others there are"),
        TOYS,
    ),
    Story(
        "groups_extra",
        "rows",
        "In a garden there are {a} rows of {b} {things} each. {name} plants {c} {things} more. How many {things} are in the garden?",
        ("The rows have", "With the new ones there are"),
        FARM,
    ),
    Story(
        "groups_extra",
        "bags",
        "{name} buys {a} bags of {b} {things} and takes {c} {things} from home. How many {things} does {name} have in all?",
        ("In the bags there are", "In all there are"),
        FOOD,
    ),
    Story(
        "groups_extra",
        "tables",
        "At a feast {a} tables have {b} guests each, and {c} guests are standing. How many guests are at the feast?",
        ("At the tables there are", "With the standing ones there are"),
        ("guests",),
    ),
    Story(
        "groups_used",
        "packs",
        "{name} buys {a} packs of {b} {things}. Then {name} loses {c} of them. How many {things} are left?",
        ("{name} buys", "What is left is"),
        TOYS,
    ),
    Story(
        "groups_used",
        "crates",
        "A farmer fills {a} crates with {b} {things} each and sells {c} {things}. How many {things} does the farmer still have?",
        ("In the crates there are", "After the sale there are"),
        FARM,
    ),
    Story(
        "groups_used",
        "bakery",
        "A baker makes {a} trays of {b} rolls each. {name} buys {c} rolls. How many rolls are left?",
        ("The baker makes", "What is left is"),
        ("rolls",),
    ),
    Story(
        "groups_used",
        "class",
        "A teacher has {a} sets of {b} {things}. The children use {c} of them. How many {things} are unused?",
        ("The teacher has", "Unused are"),
        SHOP,
    ),
    Story(
        "joined_shared",
        "friends",
        "{name} has {a} {things} and {other} has {b}. They put them together and share them among {c} children. How many "
        "{things} does each child get?",
        ("Together they have", "Each child gets"),
        TOYS,
    ),
    Story(
        "joined_shared",
        "harvest",
        "{name} picks {a} {things} and {other} picks {b}. They pack all of them into {c} bags, the same number in each. How "
        "many {things} are in a bag?",
        ("They pick", "Each bag has"),
        FOOD,
    ),
    Story(
        "joined_shared",
        "teams",
        "There are {a} girls and {b} boys in a club. They make {c} teams of the same size. How many children are in a team?",
        ("The club has", "Each team has"),
        ("children",),
    ),
    Story(
        "joined_shared",
        "shelves",
        "A shop gets {a} {things} on Monday and {b} on Tuesday. All of them go on {c} shelves, the same number on each. How "
        "many {things} are on a shelf?",
        ("The shop gets", "Each shelf has"),
        SHOP,
    ),
    Story(
        "left_shared",
        "party",
        "{name} has {a} {things} for a party. {b} of them are bad. The rest is shared among {c} guests. How many {things} "
        "does each guest get?",
        ("Good ones are", "Each guest gets"),
        FOOD,
    ),
    Story(
        "left_shared",
        "album",
        "{name} has {a} {things} and gives {b} away. The others go on {c} pages of an album, the same number on each. How "
        "many {things} are on a page?",
        ("What is left is", "Each page has"),
        TOYS,
    ),
    Story(
        "left_shared",
        "market",
        "A farmer has {a} {things}, keeps {b} and sells the rest to {c} people, the same number to each. How many {things} "
        "does each of them buy?",
        ("For sale are", "Each of them buys"),
        FARM,
    ),
    Story(
        "left_shared",
        "trip",
        "Of {a} pupils {b} stay at home. The others travel in {c} cars, the same number in each. How many pupils are in a car?",
        ("Travelling are", "Each car has"),
        ("pupils",),
    ),
    Story(
        "more_total",
        "collect",
        "{name} has {a} {things}. {other} has {b} {things} more than {name}. How many {things} do they have together?",
        ("{other} has", "Together they have"),
        TOYS,
    ),
    Story(
        "more_total",
        "days",
        "A shop sells {a} {things} on Monday and {b} more than that on Tuesday. How many {things} does it sell on both days?",
        ("On Tuesday it sells", "On both days it sells"),
        SHOP,
    ),
    Story(
        "more_total",
        "trees",
        "One tree has {a} {things}. Another tree has {b} {things} more. How many {things} do both trees have?",
        ("The other tree has", "Both trees have"),
        FOOD,
    ),
    Story(
        "more_total",
        "walk",
        "{name} walks {a} miles. {other} walks {b} miles more than {name}. How many miles do they walk in all?",
        ("{other} walks", "In all they walk"),
        ("miles",),
    ),
    Story(
        "fewer_total",
        "catch",
        "{name} catches {a} fish. {other} catches {b} fish fewer than {name}. How many fish do they catch together?",
        ("{other} catches", "Together they catch"),
        ("fish",),
    ),
    Story(
        "fewer_total",
        "jars",
        "A red jar has {a} {things}. A blue jar has {b} {things} fewer. How many {things} are in both jars?",
        ("The blue jar has", "Both jars have"),
        TOYS,
    ),
    Story(
        "fewer_total",
        "weeks",
        "A farm sells {a} {things} in one week and {b} fewer in the next week. How many {things} does it sell in the two weeks?",
        ("In the next week it sells", "In the two weeks it sells"),
        FARM,
    ),
    Story(
        "fewer_total",
        "order",
        "{name} orders {a} {things}. {other} orders {b} fewer than {name}. How many {things} do they order?",
        ("{other} orders", "They order"),
        SHOP,
    ),
    Story(
        "times_total",
        "score",
        "{name} scores {a} points. {other} scores {b} times as many points. How many points do they score together?",
        ("{other} scores", "Together they score"),
        ("points",),
    ),
    Story(
        "times_total",
        "piles",
        "A small pile has {a} {things}. A large pile has {b} times as many. How many {things} are in both piles?",
        ("The large pile has", "Both piles have"),
        FARM,
    ),
    Story(
        "times_total",
        "own",
        "{name} owns {a} {things} and {other} owns {b} times as many. How many {things} do the two own?",
        ("{other} owns", "The two own"),
        SHOP,
    ),
    Story(
        "times_total",
        "bowls",
        "There are {a} {things} in a white bowl and {b} times as many in a black bowl. How many {things} are in the two bowls?",
        ("The black bowl has", "The two bowls have"),
        FOOD,
    ),
    Story(
        "two_kinds",
        "prices",
        "{name} buys {a} tickets for {b} coins each and {c} drinks for {d} coins each. How many coins does {name} pay?",
        ("The tickets cost", "The drinks cost", "{name} pays"),
        ("coins",),
    ),
    Story(
        "two_kinds",
        "boxes",
        "{name} fills {a} large boxes with {b} {things} each and {c} small boxes with {d} {things} each. How many {things} "
        "are in the boxes?",
        ("The large boxes have", "The small boxes have", "All boxes have"),
        TOYS,
    ),
    Story(
        "two_kinds",
        "fields",
        "One field has {a} rows of {b} {things}, another has {c} rows of {d} {things}. How many {things} are in the two fields?",
        ("The first field has", "The second field has", "The two fields have"),
        FARM,
    ),
    Story(
        "two_kinds",
        "rooms",
        "A house has {a} rooms with {b} chairs each and {c} rooms with {d} chairs each. How many chairs are in the house?",
        ("The first rooms have", "The other rooms have", "The house has"),
        ("chairs",),
    ),
)
