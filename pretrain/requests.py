"""Documents about what people want: labels, paraphrases, summaries, answers, all from the same intents."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.grammar import Writer, read_sections
from pretrain.voice import typed, well_typed

Message = dict[str, str]

# What stays the same when a request is put in other words.
_SLOT = re.compile(
    r"\{(city|object|food|job|weekday|month|country|bought_item|money|currency|place|drink|device|adjective)\}"
)


@dataclass(frozen=True)
class Case:
    """One case of an intent: messages that mean much the same, and the answer to them; all are templates."""

    answer: str
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Intent:
    """A kind of thing that people want.

    Attributes:
        label: Some words, such as "cancel order".
        goal: What the customer wants, after "wants to".
        cases: What it comes down to.
    """

    label: str
    goal: str
    cases: tuple[Case, ...]


def read_intents(*files: str) -> list[Intent]:
    """The intents of text files: `> ` marks the goal, `< ` the answer with which a case begins."""
    intents = []
    for label, lines in read_sections(*files).items():
        goal, *rest = lines
        cases: list[tuple[str, list[str]]] = []
        for line in rest:
            if line.startswith("< "):
                cases.append((line[2:], []))
            else:
                cases[-1][1].append(_SLOT.sub(r"{@\1}", line, count=1))
        made = tuple(Case(answer, tuple(messages)) for answer, messages in cases)
        intents.append(Intent(label, goal.removeprefix("> "), made))
    return intents


INTENTS = read_intents("intents_bank.txt", "intents_life.txt")
_GROUPS = {"bank": read_intents("intents_bank.txt"), "life": read_intents("intents_life.txt")}
LABEL_STYLES: tuple[Callable[[str], str], ...] = (
    str,
    lambda label: label.replace(" ", "_"),
    lambda label: label.replace(" ", "-"),
    str.title,
    str.upper,
    str.capitalize,
    lambda label: label.title().replace(" ", ""),
    lambda label: label.upper().replace(" ", "_"),
)


def message(w: Writer, want: Intent | Case) -> str:
    """What a customer who wants this types."""
    case = w.rng.choice(want.cases) if isinstance(want, Intent) else want
    text = w.write(w.rng.choice(case.messages))
    if w.rng.random() < 0.12:
        text = f"{w.pick('hi')} {text}".lstrip(".,! ")
    if w.rng.random() < 0.08:
        text = f"{text.rstrip('.?! ')}. {w.pick('upset')}".rstrip(". ")
    return typed(w.rng, text)


def ask(user: str, model: str, system: str | None = None) -> list[Message]:
    """A conversation of one question."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}, {"role": "model", "content": model}]


def _some(rng: random.Random, least: int, most: int, include: Intent) -> list[Intent]:
    """Some intents of one kind, with this one among them, in random order."""
    group = next(intents for intents in _GROUPS.values() if include in intents)
    pool = group if rng.random() < 0.7 else INTENTS
    chosen = [i for i in rng.sample(pool, rng.randint(least, most)) if i is not include][: most - 1]
    chosen.append(include)
    rng.shuffle(chosen)
    return chosen


def label(w: Writer) -> list[Message]:
    """Message to label, with or without instructions."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    style = rng.choice(LABEL_STYLES)
    user, answer = message(w, intent), style(intent.label)
    draw = rng.random()
    if draw < 0.35:
        return ask(user, answer)
    if draw < 0.6:
        names = ", ".join(style(i.label) for i in _some(rng, 3, 6, intent))
        system = rng.choice(["Choose one label:", "Classify the message as one of:", "Possible intents:"])
        return ask(user, answer, f"{system} {names}.")
    if draw < 0.8:
        lead = rng.choice(["Intent of", "Label this message:", "Which intent?", "Classify:", "Topic of"])
        return ask(f"{lead} {user}", answer)
    system = rng.choice(["Name the intent.", "Answer with the label only.", "Sort the tickets."])
    return ask(user, answer, system)


def choose(w: Writer) -> list[Message]:
    """Message to the letter of the fitting goal."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    options = _some(rng, 2, 5, intent)
    lines = [f"{chr(65 + n)}) {option.goal}" for n, option in enumerate(options)]
    question = rng.choice(["What does the customer want?", "Which one fits?", "Choose the goal."])
    letter = chr(65 + options.index(intent))
    return ask(f"{message(w, intent)}\n{question}\n" + "\n".join(lines), letter)


def goal(w: Writer) -> list[Message]:
    """Message to what the customer wants, in a sentence."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    user = message(w, intent)
    lead = rng.choice(["", "", "What does the customer want? ", "Summarize: ", "In short: "])
    start = rng.choice(["The customer wants to", "They want to", "Somebody wants to"])
    return ask(lead + user, f"{start} {intent.goal}.", None if lead else "Say what the customer wants.")


def paraphrase(w: Writer) -> list[Message]:
    """Message to another message of the same meaning."""
    intent = w.rng.choice(INTENTS)
    lead = w.rng.choice(["Say it differently:", "Rephrase:", "Paraphrase:", "In other words:", "Rewrite:"])
    case = w.rng.choice(intent.cases)
    first, second = message(w, case), well_typed(w.write(w.rng.choice(case.messages)))
    return ask(f"{lead} {first}", second)


def same(w: Writer) -> list[Message]:
    """Two messages to whether they want the same."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    agree = rng.random() < 0.5
    other = intent if agree else next(i for i in _some(rng, 2, 2, intent) + INTENTS if i is not intent)
    lead = rng.choice(["Do these two want the same?", "Same request?", "Same meaning?"])
    return ask(f"{lead}\n1. {message(w, intent)}\n2. {message(w, other)}", "yes" if agree else "no")


def sort_out(w: Writer) -> list[Message]:
    """Several messages to the numbers of those with one intent."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    flags = [rng.random() < 0.4 for _ in range(rng.randint(3, 5))]
    others = [i for i in _some(rng, 3, 6, intent) if i is not intent]
    lines = [f"{n + 1}. {message(w, intent if flag else rng.choice(others))}" for n, flag in enumerate(flags)]
    hits = ", ".join(str(n + 1) for n, flag in enumerate(flags) if flag) or "none"
    return ask(f"Who wants to {intent.goal}?\n" + "\n".join(lines), hits)


def by_example(w: Writer) -> list[Message]:
    """A few labelled messages, then one more to label: the labels are made up for this document."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    chosen = _some(rng, 2, 3, intent)
    names = rng.sample(
        ["A", "B", "C", "red", "blue", "green", "one", "two", "three", "x", "y", "z"], len(chosen)
    )
    lines = [f"{message(w, i)} -> {name}" for i, name in zip(chosen, names, strict=True)]
    rng.shuffle(lines)
    return ask("\n".join([*lines, f"{message(w, intent)} ->"]), names[chosen.index(intent)])


def conversation(w: Writer) -> list[Message]:
    """A customer and an agent, one to three exchanges."""
    rng = w.rng
    messages: list[Message] = []
    if rng.random() < 0.2:
        firm = rng.choice(["a bank", "a shop", "an airline", "a hotel", "a phone company", "an office"])
        messages.append({"role": "system", "content": f"You help the customers of {firm}."})
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3])):
        intent = rng.choice(INTENTS)
        case = rng.choice(intent.cases)
        messages += ask(message(w, case), well_typed(w.write(case.answer)))
    if rng.random() < 0.2:
        messages += ask(
            rng.choice(["Thanks!", "thank you", "ok thanks", "Great, thank you."]), "You are welcome!"
        )
    return messages


def as_json(w: Writer) -> list[Message]:
    """Message to an object with intent and the things it names."""
    rng = w.rng
    kinds = {"city": "city", "day": "weekday", "name": "name", "thing": "object"}
    values = {key: w.same(kind) for key, kind in kinds.items()}
    bits = {
        "city": ["in {@city}", "from {@city}", "I live in {@city}"],
        "day": ["on {@weekday}", "since {@weekday}"],
        "name": ["my name is {@name}", "this is {@name}"],
        "thing": ["it is about a {@object}", "a {@object} is concerned"],
    }
    intent = rng.choice(INTENTS)
    chosen = rng.sample(sorted(kinds), rng.randint(1, 3))
    request = w.write(rng.choice(rng.choice(intent.cases).messages)).rstrip("?.! ")
    text = ", ".join([request, *(w.write(rng.choice(bits[key])) for key in chosen)])
    found = {"intent": intent.label, **{key: values[key] for key in chosen}}
    return ask(well_typed(text), json.dumps(found), "Answer in JSON.")


def listing(w: Writer) -> str:
    """Plain text: several ways to say one thing, or a help page."""
    rng = w.rng
    intent = rng.choice(INTENTS)
    case = rng.choice(intent.cases)
    if rng.random() < 0.5:
        lines = [message(w, case) for _ in range(rng.randint(3, 6))]
        return f"Customers who want to {intent.goal} write:\n" + "\n".join(f"- {line}" for line in lines)
    question, answer = (well_typed(w.write(text)) for text in (rng.choice(case.messages), case.answer))
    return f"{intent.label.capitalize()}\nQ: {question}\nA: {answer}"


FAMILIES: Sequence[tuple[Callable[[Writer], list[Message] | str], float]] = (
    (label, 9),
    (choose, 3),
    (goal, 4),
    (paraphrase, 5),
    (same, 3),
    (sort_out, 2),
    (by_example, 3),
    (conversation, 6),
    (as_json, 2),
    (listing, 4),
)
