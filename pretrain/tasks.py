"""Documents that follow instructions: words, numbers, lists, facts, sentences, feelings, objects in JSON."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence

from pretrain.grammar import Writer, read_sections
from pretrain.requests import Message, ask
from pretrain.voice import typed

WORDS = read_sections("words.txt")
_OPPOSITES = [pair.split(",") for pair in WORDS["opposites"]]
_SYNONYMS = [group.split(",") for group in WORDS["synonyms"]]
_VERBS = [forms.split(",") for forms in WORDS["verbs"]]
_PLURALS = [pair.split(",") for pair in WORDS["plurals"]]
_DEFINITIONS = [line.split(": ") for line in WORDS["definitions"]]
_FACTS = [line.split("|") for line in WORDS["facts"]]
_NUMBERS, _TENS, _MONTHS = WORDS["numbers"], WORDS["tens"], WORDS["months"]
_ONLY = ["", " Give only the number.", " Answer with a number.", " Only the result."]


def in_words(number: int) -> str:
    """A number below a thousand in words."""
    if number < 20:
        return _NUMBERS[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_NUMBERS[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_NUMBERS[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _nouns(w: Writer, count: int) -> list[str]:
    kinds = ["object", "animal", "fruit", "food", "color", "city", "job", "place", "name", "adjective"]
    kind = w.rng.choice(kinds)
    found: dict[str, None] = {}
    while len(found) < count:
        found[w.pick(kind)] = None
    return list(found)


def arithmetic(w: Writer) -> list[Message]:
    rng = w.rng
    a, b = rng.randint(0, 60), rng.randint(0, 60)
    draw = rng.randrange(4)
    if draw == 0:
        words, sign, result = ["plus", "and"], "+", a + b
    elif draw == 1:
        a, b = max(a, b), min(a, b)
        words, sign, result = ["minus", "less"], "-", a - b
    elif draw == 2:
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        words, sign, result = ["times", "multiplied by"], "*", a * b
    else:
        b, result = rng.randint(1, 12), rng.randint(0, 12)
        a = b * result
        words, sign = ["divided by", "over"], "/"
    question = rng.choice(
        [f"What is {a} {rng.choice(words)} {b}?", f"{a} {sign} {b} =", f"Compute {a} {sign} {b}."]
    )
    return ask(question + rng.choice(_ONLY), str(result))


def word_problem(w: Writer) -> list[Message]:
    rng = w.rng
    thing = rng.choice(["apples", "books", "coins", "cards", "eggs", "keys", "pears", "tickets", "stamps"])
    a, b, c = rng.randint(2, 30), rng.randint(1, 20), rng.randint(2, 6)
    who, other = w.same("name"), w.pick("name")
    draw = rng.randrange(4)
    if draw == 0:
        text, steps, result = f"{who} has {a} {thing} and gets {b} more.", f"{a} + {b} = {a + b}", a + b
    elif draw == 1:
        a = a + b
        text, steps, result = (
            f"{who} has {a} {thing} and gives {b} to {other}.",
            f"{a} - {b} = {a - b}",
            a - b,
        )
    elif draw == 2:
        text, steps, result = f"{who} has {c} boxes with {b} {thing} each.", f"{c} * {b} = {c * b}", c * b
    else:
        text, result = f"{who} buys {a} {thing} and {b} more, then loses {min(a, c)}.", a + b - min(a, c)
        steps = f"{a} + {b} = {a + b}. {a + b} - {min(a, c)} = {result}"
    question = f"{text} How many {thing} {rng.choice(['are there now', 'is that', 'are left'])}?"
    if rng.random() < 0.3:
        talk = ask(question, str(result))
        talk[-1]["reasoning"] = steps  # the template shows it as a thought
        return talk
    answer = rng.choice([str(result), f"{steps}. The answer is {result}.", f"{steps}\n#### {result}"])
    return ask(question, answer)


def counting(w: Writer) -> list[Message]:
    rng = w.rng
    start, length, step = rng.randint(0, 30), rng.randint(3, 8), rng.choice([1, 1, 2, 5, 10])
    numbers = [str(start + step * n) for n in range(length)]
    divider, name = rng.choice([(" ", "spaces"), (", ", "commas"), ("\n", "line breaks")])
    by = f" in steps of {step}" if step > 1 else ""
    return ask(f"Count from {numbers[0]} to {numbers[-1]}{by}, divided by {name}.", divider.join(numbers))


def spelled_number(w: Writer) -> list[Message]:
    number = w.rng.randrange(1000)
    if w.rng.random() < 0.5:
        return ask(f"Write {number} in words.", in_words(number))
    return ask(f"Write {in_words(number)} as a number.", str(number))


def compare(w: Writer) -> list[Message]:
    rng = w.rng
    a, b = rng.sample(range(200), 2)
    largest = rng.random() < 0.5
    word = rng.choice(["larger", "greater", "bigger"]) if largest else rng.choice(["smaller", "less"])
    return ask(f"Which is {word}, {a} or {b}?", str(max(a, b) if largest else min(a, b)))


def opposite(w: Writer) -> list[Message]:
    pair = w.rng.sample(w.rng.choice(_OPPOSITES), 2)
    lead = w.rng.choice(['What is the opposite of "{}"?', "Opposite of {}:", "Give an antonym of {}."])
    return ask(lead.format(pair[0]), pair[1])


def synonym(w: Writer) -> list[Message]:
    pair = w.rng.sample(w.rng.choice(_SYNONYMS), 2)
    lead = w.rng.choice(['What is another word for "{}"?', "Synonym of {}:", "Say {} with another word."])
    return ask(lead.format(pair[0]), pair[1])


def plural(w: Writer) -> list[Message]:
    one, many = w.rng.choice(_PLURALS)
    if w.rng.random() < 0.6:
        return ask(w.rng.choice([f"What is the plural of {one}?", f"One {one}, two ..."]), many)
    return ask(f"What is the singular of {many}?", one)


def tense(w: Writer) -> list[Message]:
    rng = w.rng
    forms = dict(zip(["base", "now", "past", "ing"], rng.choice(_VERBS), strict=True))
    who, thing, place = w.pick("name"), w.pick("object"), w.pick("place")
    said = {
        "now": f"{who} {forms['now']} the {thing} in the {place}.",
        "past": f"{who} {forms['past']} the {thing} in the {place}.",
        "ing": f"{who} is {forms['ing']} the {thing} in the {place}.",
        "will": f"{who} will {forms['base']} the {thing} in the {place}.",
        "not": f"{who} does not {forms['base']} the {thing} in the {place}.",
        "ask": f"Does {who} {forms['base']} the {thing} in the {place}?",
    }
    names = {
        "now": "in the present tense",
        "past": "in the past tense",
        "ing": "as happening right now",
        "will": "in the future tense",
        "not": "as a negative sentence",
        "ask": "as a question",
    }
    source, target = rng.sample(sorted(said), 2)
    return ask(f'{rng.choice(["Rewrite", "Write", "Say"])} {names[target]}: "{said[source]}"', said[target])


def correct(w: Writer) -> list[Message]:
    rng = w.rng
    forms = rng.choice(_VERBS)
    who, thing = w.pick("name"), w.pick("object")
    right, wrong = rng.choice(
        [
            (f"{who} {forms[1]} a {thing} every day.", f"{who} {forms[0]} a {thing} every day."),
            (f"Yesterday {who} {forms[2]} a {thing}.", f"Yesterday {who} {forms[0]} a {thing}."),
            (f"They {forms[0]} the {thing} now.", f"They {forms[1]} the {thing} now."),
            (f"{who} is {forms[3]} the {thing}.", f"{who} are {forms[3]} the {thing}."),
        ]
    )
    return ask(f'{rng.choice(["Correct the sentence", "Fix the grammar", "Repair"])}: "{wrong}"', right)


def definition(w: Writer) -> list[Message] | str:
    rng = w.rng
    word, meaning = rng.choice(_DEFINITIONS)
    draw = rng.randrange(4)
    if draw == 0:
        return f"{word.capitalize()}: {meaning}."
    if draw == 1:
        return ask(f"Which word means: {meaning}?", word)
    question = rng.choice([f"What is {_article(word)}?", f"Define {word}.", f"What does {word} mean?"])
    return ask(question, f"{meaning.capitalize()}.")


def fact(w: Writer) -> list[Message]:
    rng = w.rng
    question, answer = rng.choice(_FACTS)
    draw = rng.random()
    if draw < 0.6:
        return ask(typed(rng, question), answer + rng.choice(["", ".", "."]))
    if draw < 0.7:
        return ask(question, json.dumps({"answer": answer}), 'Reply with JSON: {"answer": string}.')
    if draw < 0.8:
        return ask(question, answer.upper(), "Answer in capital letters.")
    other, second = rng.choice(_FACTS)
    return ask(question, answer) + ask(other, second)


def translation(w: Writer) -> list[Message]:
    language = w.rng.choice(["french", "german", "spanish"])
    english, foreign = w.rng.choice(WORDS[language]).split(",")
    if w.rng.random() < 0.5:
        return ask(f"Translate {english} into {language.title()}.", foreign)
    return ask(f"What does the {language.title()} word {foreign} mean?", english)


def letters(w: Writer) -> list[Message]:
    rng = w.rng
    word = w.pick(rng.choice(["object", "animal", "job", "place", "fruit"]))
    changes: dict[str, Callable[[str], str]] = {
        "Write in capital letters": str.upper,
        "Write with a capital first letter": str.capitalize,
        "Spell": lambda text: "-".join(text.upper()),
        "Spell with spaces": " ".join,
        "Copy": str,
        "Repeat twice": lambda text: f"{text} {text}",
        "Put in quotes": lambda text: f'"{text}"',
        "Put in brackets": lambda text: f"({text})",
        "How many letters has": lambda text: str(len(text.replace(" ", ""))),
        "First letter of": lambda text: text[0],
        "Last letter of": lambda text: text[-1],
        "Write backwards": lambda text: text[::-1],
    }
    lead = rng.choice(sorted(changes))
    return ask(f"{lead}: {word}", changes[lead](word))


def copying(w: Writer) -> list[Message]:
    rng = w.rng
    if rng.random() < 0.5:
        text = " ".join(_nouns(w, rng.randint(2, 6)))
    else:
        text = "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(3, 10)))
    return ask(f"{rng.choice(['Repeat', 'Copy', 'Say exactly', 'Echo'])}: {text}", text)


def lists(w: Writer) -> list[Message]:
    rng = w.rng
    items = _nouns(w, rng.randint(2, 5))
    given = ", ".join(items)
    changes: dict[str, Callable[[], str]] = {
        "Sort by the alphabet": lambda: ", ".join(sorted(items, key=str.lower)),
        "Write as a list with dashes": lambda: "\n".join(f"- {item}" for item in items),
        "Number these": lambda: "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1)),
        "Write as a JSON array": lambda: json.dumps(items),
        "Reverse the order": lambda: ", ".join(reversed(items)),
        "How many are these": lambda: str(len(items)),
        "What comes first": lambda: items[0],
        "What comes last": lambda: items[-1],
        "Divide by semicolons": lambda: "; ".join(items),
        "Join with and": lambda: " and ".join(items),
        "Which is the longest word": lambda: max(items, key=len),
    }
    lead = rng.choice(sorted(changes))
    return ask(f"{lead}: {given}", changes[lead]())


def naming(w: Writer) -> list[Message]:
    rng = w.rng
    kind = rng.choice(
        ["animal", "fruit", "color", "city", "job", "country", "drink", "month", "weekday", "name"]
    )
    plural_of = {"country": "countries", "city": "cities"}
    count = rng.randint(2, 5)
    found: dict[str, None] = {}
    while len(found) < count:
        found[w.pick(kind)] = None
    divider = rng.choice([", ", "\n"])
    how = " Use commas." if divider == ", " else " One a line."
    lead = rng.choice(["Name", "List", "Give me", "Write down"])
    return ask(f"{lead} {in_words(count)} {plural_of.get(kind, kind + 's')}.{how}", divider.join(found))


def category(w: Writer) -> list[Message]:
    rng = w.rng
    kinds = [
        "animal",
        "fruit",
        "color",
        "city",
        "job",
        "country",
        "food",
        "drink",
        "month",
        "weekday",
        "object",
    ]
    kind = rng.choice(kinds)
    thing = w.pick(kind)
    draw = rng.random()
    if draw < 0.4:
        return ask(f"What is {thing}: {', '.join(rng.sample(kinds, len(kinds)))}?", kind)
    if draw < 0.7:
        return ask(f"{thing} ->", kind)
    agree = rng.random() < 0.5
    other = kind if agree else rng.choice([k for k in kinds if k != kind])
    return ask(f"Is {thing} a kind of {other}? Yes or no.", "yes" if agree else "no")


def odd_one(w: Writer) -> list[Message]:
    rng = w.rng
    kind, other = rng.sample(["animal", "fruit", "color", "city", "job", "country", "month", "weekday"], 2)
    found: dict[str, None] = {}
    while len(found) < 3:
        found[w.pick(kind)] = None
    stranger = w.pick(other)
    items = [*found, stranger]
    rng.shuffle(items)
    return ask(f"Which one does not belong: {', '.join(items)}?", stranger)


def sentiment(w: Writer) -> list[Message]:
    rng = w.rng
    feeling = rng.choice(["positive", "negative", "neutral"])
    words = {"positive": "good_words", "negative": "bad_words", "neutral": "neutral_words"}[feeling]
    thing = w.write(rng.choice(WORDS["thing_rated"]))
    text = rng.choice(["{} was {}", "{} is {}", "i found {} {}", "we thought {} was {}", "{}: {}"])
    text = text.format(thing, rng.choice(WORDS[words]))
    if feeling != "neutral" and rng.random() < 0.4:
        more = (
            ["i will come back", "i recommend it", "thank you"],
            ["never again", "i want my money back", "avoid it"],
        )
        text += f", {rng.choice(more[feeling == 'negative'])}"
    lead = rng.choice(
        ["Sentiment:", "Is this positive, negative or neutral?", "How does the writer feel?", "Review:"]
    )
    if rng.random() < 0.2:
        stars = {"positive": ["4", "5"], "neutral": ["3"], "negative": ["1", "2"]}[feeling]
        return ask(f"Rate from 1 to 5: {typed(rng, text)}", rng.choice(stars))
    return ask(f"{lead} {typed(rng, text)}", feeling)


def topic(w: Writer) -> list[Message]:
    rng = w.rng
    lines = WORDS["topics"]
    at = rng.choice([n for n, line in enumerate(lines) if "{" not in line and "[" not in line])
    sentences = []
    for line in lines[at + 1 :]:
        if "{" not in line and "[" not in line:
            break
        sentences.append(line)
    w.phrases = {**w.phrases, "game": WORDS["game"]}
    text = w.write(rng.choice(sentences))
    lead = rng.choice(["Topic:", "Which section of a newspaper?", "Classify the headline:", "Subject:"])
    return ask(f"{lead} {typed(rng, text)}", lines[at])


def speech_act(w: Writer) -> list[Message]:
    rng = w.rng
    base, now, past, _ = rng.choice(_VERBS)
    who, thing = w.pick("name"), w.pick("object")
    kinds = {
        "question": [f"did {who} {base} the {thing}?", f"where is the {thing}?", f"who {past} my {thing}?"],
        "request": [
            f"please {base} the {thing}",
            f"could you {base} the {thing}?",
            f"{base} the {thing} for me",
        ],
        "statement": [f"{who} {now} the {thing}", f"the {thing} is {w.pick('color')}", f"i {past} a {thing}"],
    }
    kind = rng.choice(sorted(kinds))
    return ask(f"Question, request or statement? {typed(rng, rng.choice(kinds[kind]))}", kind)


def extraction(w: Writer) -> list[Message]:
    rng = w.rng
    values = {
        "name": w.same("name"),
        "city": w.same("city"),
        "job": w.same("job"),
        "age": str(rng.randint(5, 90)),
        "day": w.same("weekday"),
        "time": f"{rng.randint(1, 12)} o'clock",
        "people": str(rng.randint(2, 9)),
        "thing": w.same("object"),
        "color": w.same("color"),
        "amount": f"{rng.randint(1, 900)} {rng.choice(['euros', 'dollars', 'pounds'])}",
    }
    v = values
    texts = [
        (f"{v['name']} is {v['age']} years old and lives in {v['city']}.", ["name", "age", "city"]),
        (
            f"My name is {v['name']} and I work as {_article(v['job'])} in {v['city']}.",
            ["name", "job", "city"],
        ),
        (f"Book a table for {v['people']} on {v['day']} at {v['time']}.", ["people", "day", "time"]),
        (
            f"On {v['day']} {v['name']} paid {v['amount']} for a {v['color']} {v['thing']}.",
            ["day", "name", "amount", "color", "thing"],
        ),
        (
            f"{v['name']}, {_article(v['job'])}, lost a {v['thing']} in {v['city']} on {v['day']}.",
            ["name", "job", "thing", "city", "day"],
        ),
        (
            f"A table for {v['people']} at {v['time']} please, the name is {v['name']}.",
            ["people", "time", "name"],
        ),
        (
            f"Please send {v['amount']} to {v['name']} in {v['city']} by {v['day']}.",
            ["amount", "name", "city", "day"],
        ),
    ]
    text, keys = rng.choice(texts)
    draw = rng.random()
    if draw < 0.35:
        key = rng.choice(keys)
        return ask(rng.choice([f"{text} What is the {key}?", f"Extract the {key}: {text}"]), values[key])
    chosen = keys if draw < 0.7 else rng.sample(keys, rng.randint(1, len(keys)))
    found = {key: values[key] for key in chosen}
    if rng.random() < 0.2:
        return ask(f"Extract {', '.join(chosen)}: {text}", "\n".join(f"{k}: {found[k]}" for k in chosen))
    lead = rng.choice(["Extract as JSON", "JSON with", "Give a JSON object with"])
    return ask(f"{lead} {', '.join(chosen)}: {text}", json.dumps(found))


def dates(w: Writer) -> list[Message]:
    rng = w.rng
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2030)
    if rng.random() < 0.6:
        return ask(f"Write {day} {_MONTHS[month - 1]} {year} as YYYY-MM-DD.", f"{year}-{month:02}-{day:02}")
    hour, minute = rng.randint(1, 11), rng.choice(["", " fifteen", " thirty", " forty-five"])
    clock = {"": "00", " fifteen": "15", " thirty": "30", " forty-five": "45"}[minute]
    evening = rng.random() < 0.5
    part = "in the evening" if evening else "in the morning"
    return ask(
        f"Write {in_words(hour)}{minute or ' sharp'} {part} in 24-hour form.",
        f"{hour + 12 * evening:02}:{clock}",
    )


def with_words(w: Writer) -> list[Message]:
    rng = w.rng
    thing, place, adjective, who = w.pick("object"), w.pick("place"), w.pick("adjective"), w.pick("name")
    text = rng.choice(
        [
            f"{who} carried the {adjective} {thing} to the {place}.",
            f"In the {place} there was a {adjective} {thing}.",
            f"The {thing} from the {place} looked {adjective}.",
        ]
    )
    words = rng.sample([thing, place, adjective], rng.randint(1, 3))
    return ask(f"Write a sentence with the words {', '.join(words)}.", text)


def persona(w: Writer) -> list[Message]:
    rng = w.rng
    ends = ["Have a nice day!", "Take care.", "Is there anything else?", "Best wishes.", "See you soon!"]
    question, answer = rng.choice(_FACTS)
    end = rng.choice(ends)
    return ask(question, f"{answer}. {end}", f'End every answer with "{end}"')


FAMILIES: Sequence[tuple[Callable[[Writer], list[Message] | str], float]] = (
    (arithmetic, 1.5),
    (word_problem, 1.5),
    (counting, 0.5),
    (spelled_number, 0.5),
    (compare, 0.5),
    (opposite, 1),
    (synonym, 1.5),
    (plural, 0.7),
    (tense, 1.5),
    (correct, 1),
    (definition, 1.5),
    (fact, 1.5),
    (translation, 0.5),
    (letters, 1),
    (copying, 1),
    (lists, 1),
    (naming, 1),
    (category, 1),
    (odd_one, 0.7),
    (sentiment, 1.5),
    (topic, 1.5),
    (speech_act, 0.7),
    (extraction, 2.5),
    (dates, 0.5),
    (with_words, 0.7),
    (persona, 0.5),
)
