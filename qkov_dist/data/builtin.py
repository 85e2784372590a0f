"""The two generated tasks, so that a first run needs no download: sums in words, and small Python functions.

Sample number n is a pure function of n: a template chosen in turn, filled with choices drawn from a generator seeded by
n. A draw that repeats an earlier sample is skipped, so all samples of a task differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice

from qkov_dist.errors import QkovError

DEFAULT_SAMPLES = 100
MAX_SAMPLES = 2000


Pair = tuple[str, str]  # prompt, completion
Template = Callable[[random.Random], Pair]


NAMES = (
    "Ada",
    "Ben",
    "Chloe",
    "Dev",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luca",
    "Mina",
    "Noor",
)
ITEMS = ("apples", "stamps", "marbles", "pencils", "postcards", "shells", "buttons", "tickets", "stickers", "plums")
BOXES = ("boxes", "bags", "crates", "drawers", "baskets", "jars")
FIELDS = ("price", "weight", "age", "score", "length", "year", "height", "rank", "cost", "speed")
THINGS = ("orders", "records", "students", "parts", "books", "trips", "samples", "players")


def builtin_samples(path: str, max_samples: int | None = None) -> Iterator[dict[str, str]]:
    """Prompt and completion of the samples of ``builtin:arithmetic`` or ``builtin:python``, always the same.

    Args:
        path: The task's path.
        max_samples: How many; None gives 100.

    Raises:
        QkovError: The task does not exist or has fewer samples.
    """
    templates = {"builtin:arithmetic": ARITHMETIC, "builtin:python": PYTHON}.get(path)
    if templates is None:
        remedy = "Choose one of the two, or give a JSONL file."
        raise QkovError(path, expected="builtin:arithmetic or builtin:python", got=repr(path), remedy=remedy)
    wanted = DEFAULT_SAMPLES if max_samples is None else max_samples
    if wanted > MAX_SAMPLES:
        remedy = "Lower max_samples, or give a JSONL file."
        raise QkovError(path, expected=f"at most {MAX_SAMPLES} samples", got=f"max_samples: {wanted}", remedy=remedy)
    for prompt, completion in islice(_distinct(templates), wanted):
        yield {"prompt": prompt, "completion": completion}


def _distinct(templates: tuple[Template, ...]) -> Iterator[Pair]:
    seen: set[Pair] = set()
    for number in count():
        pair = templates[number % len(templates)](random.Random(number))
        if pair not in seen:
            seen.add(pair)
            yield pair


def _question(text: str, reasoning: str) -> Pair:
    return f"Question: {text}\nAnswer:", f" {reasoning}"


def _gift(draw: random.Random) -> Pair:
    name, other = draw.sample(NAMES, 2)
    item, a, b = draw.choice(ITEMS), draw.randint(20, 95), draw.randint(3, 19)
    text = f"{name} has {a} {item} and gives {b} of them to {other}. How many {item} does {name} have left?"
    return _question(text, f"{name} starts with {a} and gives away {b}, so {a} - {b} = {a - b}. The answer is {a - b}.")


def _boxes(draw: random.Random) -> Pair:
    item, box = draw.choice(ITEMS), draw.choice(BOXES)
    a, b, c = draw.randint(3, 12), draw.randint(4, 15), draw.randint(1, 20)
    text = f"There are {a} {box} with {b} {item} each, and {c} loose {item}. How many {item} are there in all?"
    return _question(
        text, f"The {box} hold {a} * {b} = {a * b}. Then {a * b} + {c} = {a * b + c}. The answer is {a * b + c}."
    )


def _share(draw: random.Random) -> Pair:
    item, people, each, rest = draw.choice(ITEMS), draw.randint(3, 9), draw.randint(4, 18), draw.randint(0, 2)
    total = people * each + rest
    text = f"{people} friends share {total} {item} equally. How many does each get, and how many are left over?"
    work = f"{people} * {each} = {people * each}, and {total} - {people * each} = {rest}."
    return _question(text, f"{work} Each friend gets {each}, and {rest} are left over.")


def _long_sum(draw: random.Random) -> Pair:
    numbers = [draw.randint(11, 98) for _ in range(4)]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return f"Add step by step: {' + '.join(map(str, numbers))}.\n", f"{'. '.join(steps)}. The sum is {total}.\n"


def _columns(draw: random.Random) -> Pair:
    a, b = draw.randint(111, 899), draw.randint(111, 899)
    ones, tens, hundreds = a % 10 + b % 10, a // 10 % 10 + b // 10 % 10, a // 100 + b // 100
    parts = f"Ones: {ones}. Tens: {tens}0. Hundreds: {hundreds}00."
    return (
        f"Work out {a} + {b} by place value.\n",
        f"{parts} Together {hundreds * 100} + {tens * 10} + {ones} = {a + b}.\n",
    )


def _shop(draw: random.Random) -> Pair:
    name, item, price, number = draw.choice(NAMES), draw.choice(ITEMS), draw.randint(2, 9), draw.randint(3, 12)
    paid = (price * number // 10 + 1) * 10
    text = f"{name} buys {number} {item} at {price} euros each and pays with {paid} euros. How much change is due?"
    cost = price * number
    work = f"The {item} cost {number} * {price} = {cost} euros. {paid} - {cost} = {paid - cost}."
    return _question(text, f"{work} The change is {paid - cost} euros.")


def _journey(draw: random.Random) -> Pair:
    speed, hours, extra = draw.randint(4, 18) * 5, draw.randint(2, 7), draw.randint(3, 40)
    text = f"A train travels {hours} hours at {speed} km per hour and then {extra} km more. How far does it go?"
    far = speed * hours
    return _question(
        text, f"First {speed} * {hours} = {far} km. Then {far} + {extra} = {far + extra}. It goes {far + extra} km."
    )


def _product(draw: random.Random) -> Pair:
    a, b = draw.randint(12, 49), draw.randint(3, 9)
    tens, ones = a // 10 * 10, a % 10
    work = f"{tens} * {b} = {tens * b} and {ones} * {b} = {ones * b}, so {a} * {b} = {tens * b} + {ones * b} = {a * b}."
    return f"Multiply {a} by {b}, splitting the tens from the ones.\n", f"{work}\n"


def _ages(draw: random.Random) -> Pair:
    (name, other), age, gap, years = (
        draw.sample(NAMES, 2),
        draw.randint(6, 30),
        draw.randint(2, 15),
        draw.randint(3, 12),
    )
    text = f"{name} is {age} and {other} is {gap} years older. How old will {other} be in {years} years?"
    now = age + gap
    return _question(text, f"{other} is {age} + {gap} = {now} now. In {years} years, {now} + {years} = {now + years}.")


def _percent(draw: random.Random) -> Pair:
    rate, base = draw.choice((10, 20, 25, 50, 75)), draw.randint(2, 60) * 20
    work = f"1 percent of {base} is {base / 100:g}, and {rate} * {base / 100:g} = {rate * base / 100:g}."
    return _question(f"What is {rate} percent of {base}?", f"{work} The answer is {rate * base / 100:g}.")


def _function(signature: str, doc: str, *body: str) -> Pair:
    return f'def {signature}:\n    """{doc}"""\n', "".join(f"    {line}\n" for line in body)


def _count_field(draw: random.Random) -> Pair:
    things, key, limit = draw.choice(THINGS), draw.choice(FIELDS), draw.randint(2, 90)
    way, sign = draw.choice((("above", ">"), ("below", "<"), ("of at least", ">=")))
    doc = f"Count the {things} with a {key} {way} {limit}."
    return _function(
        f"count_{things}({things})", doc, f'return sum(1 for entry in {things} if entry["{key}"] {sign} {limit})'
    )


def _group(draw: random.Random) -> Pair:
    things, key = draw.choice(THINGS), draw.choice(FIELDS)
    value = draw.choice([field for field in FIELDS if field != key])
    return _function(
        f"{value}_by_{key}({things})",
        f"Collect the {value} of the {things} by their {key}.",
        "groups = {}",
        f"for entry in {things}:",
        f'    groups.setdefault(entry["{key}"], []).append(entry["{value}"])',
        "return groups",
    )


def _top(draw: random.Random) -> Pair:
    things, key, number = draw.choice(THINGS), draw.choice(FIELDS), draw.randint(2, 12)
    way, reverse = draw.choice((("largest", True), ("smallest", False)))
    return _function(
        f"{way}_{key}({things})",
        f"Return the {number} {things} with the {way} {key}.",
        f'ranked = sorted({things}, key=lambda entry: entry["{key}"], reverse={reverse})',
        f"return ranked[:{number}]",
    )


def _clamp(draw: random.Random) -> Pair:
    key, low, span = draw.choice(FIELDS), draw.randint(-20, 20), draw.randint(5, 80)
    return _function(
        f"clamp_{key}({key})",
        f"Limit {key} to the range from {low} to {low + span}.",
        f"if {key} < {low}:",
        f"    return {low}",
        f"return min({key}, {low + span})",
    )


def _convert(draw: random.Random) -> Pair:
    units = (
        ("km", "miles", "0.621371"),
        ("pounds", "kg", "0.453592"),
        ("inches", "cm", "2.54"),
        ("hours", "minutes", "60"),
    )
    (source, target, factor), digits = draw.choice(units), draw.randint(0, 6)
    key = draw.choice(("values", "readings", "numbers", "amounts", "row"))
    doc = f"Convert {key} from {source} to {target}, rounded to {digits} digits."
    return _function(
        f"{source}_to_{target}({key})", doc, f"return [round(value * {factor}, {digits}) for value in {key}]"
    )


def _window(draw: random.Random) -> Pair:
    key, size = draw.choice(FIELDS), draw.randint(2, 30)
    name, formula = draw.choice(
        (("mean", f"sum(part) / {size}"), ("range", "max(part) - min(part)"), ("sum", "sum(part)"))
    )
    return _function(
        f"moving_{name}({key}s)",
        f"Return the {name} of every {size} neighbouring {key}s.",
        "result = []",
        f"for start in range(len({key}s) - {size - 1}):",
        f"    part = {key}s[start:start + {size}]",
        f"    result.append({formula})",
        "return result",
    )


def _words(draw: random.Random) -> Pair:
    size, letter = draw.randint(2, 9), draw.choice("abcdefghklmnoprstuw")
    name, test = draw.choice((("starting with", f'word.startswith("{letter}")'), ("containing", f'"{letter}" in word')))
    return _function(
        "pick_words(text)",
        f"Return the words {name} {letter} that have more than {size} letters.",
        "picked = []",
        "for word in text.lower().split():",
        f"    if len(word) > {size} and {test}:",
        "        picked.append(word)",
        "return picked",
    )


def _polynomial(draw: random.Random) -> Pair:
    coefficients = [draw.randint(-9, 9) for _ in range(draw.randint(3, 4))]
    return _function(
        "evaluate(x)",
        f"Evaluate the polynomial with the coefficients {coefficients}, highest power first.",
        "value = 0",
        f"for coefficient in {coefficients}:",
        "    value = value * x + coefficient",
        "return value",
    )


def _recursion(draw: random.Random) -> Pair:
    start, step, factor = draw.randint(1, 20), draw.randint(1, 15), draw.randint(2, 9)
    return _function(
        "term(n)",
        f"Return term n of the sequence that starts at {start}, each next being {factor} times the last plus {step}.",
        "if n == 0:",
        f"    return {start}",
        f"return {factor} * term(n - 1) + {step}",
    )


def _parse(draw: random.Random) -> Pair:
    first, second = draw.sample(FIELDS, 2)
    mark, kind = draw.choice(";,|:/"), draw.choice(("int", "float", "str"))
    return _function(
        f"read_{first}_{second}(line)",
        f"Split a line such as {first}{mark}{second} and return both as a dictionary.",
        f'left, right = line.strip().split("{mark}")',
        f'return {{"{first}": {kind}(left), "{second}": {kind}(right)}}',
    )


ARITHMETIC = (_gift, _boxes, _share, _long_sum, _columns, _shop, _journey, _product, _ages, _percent)
PYTHON = (
    _count_field, _group, _top, _clamp, _convert, _window, _words, _polynomial, _recursion, _parse,
)  # fmt: skip
